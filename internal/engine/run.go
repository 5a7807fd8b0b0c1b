package engine

import (
	"context"
	"errors"

	"conex/internal/container"
)

// RunRequest creates and starts a container.
type RunRequest struct {
	CreateRequest
	// Detach returns as soon as the process runs.
	Detach  bool
	Streams Streams
	// OnCreated is told the id before the start (--cidfile); an error of it ends the run. May be nil.
	OnCreated func(id string) error
}

// RunResult says how a run went.
type RunResult struct {
	ID string
	// ExitCode is the process's, when the run was attached to its end.
	ExitCode int
	// Detached says that the container goes on: it was started so, or the user typed the detach keys.
	Detached bool
	Warnings []string
}

// Run is Create and Start. An error is an *ExitError: 125 when the container could not be made or started, 126 and 127 when its
// command could not be executed. With --rm nothing stays then; otherwise the container does, as with Docker.
func (e *Engine) Run(ctx context.Context, req RunRequest) (RunResult, error) {
	mon := startMonitor()
	rec, lock, warnings, err := e.create(ctx, req.CreateRequest, true)
	if err != nil {
		mon.abandon()
		return RunResult{}, exitError(classify(err))
	}
	res := RunResult{ID: rec.ID, Warnings: warnings}
	if req.OnCreated != nil {
		if err := req.OnCreated(rec.ID); err != nil {
			mon.abandon()
			if lock != nil {
				lock.Release()
			}
			return res, exitError(errors.Join(err, e.discard(ctx, rec)))
		}
	}
	c := rec.Config
	at := attachment{want: !req.Detach}
	at.stdin = at.want && c.OpenStdin && req.Streams.Stdin != nil
	s, err := e.launch(ctx, rec, lock, mon, at, &req.Streams)
	if errors.Is(err, container.ErrBusy) { // somebody has started it by its name since it was created
		if req.Detach {
			res.Detached = true
			return res, nil
		}
		res.ExitCode, err = e.Attach(ctx, AttachRequest{Container: rec.ID, NoStdin: !at.stdin, Streams: req.Streams})
		return res, err
	}
	if err != nil {
		return res, exitError(errors.Join(err, e.discardAuto(ctx, rec)))
	}
	if s == nil {
		res.Detached = true
		return res, nil
	}
	defer s.Close()
	exit, err := e.join(ctx, rec, s, at.stdin, c.Tty, &req.Streams)
	res.ExitCode, res.Detached = exit.code, exit.detached
	return res, err
}

// exitError gives an error the code 125 unless it has one.
func exitError(err error) error {
	var ee *ExitError
	if err == nil || errors.As(err, &ee) {
		return err
	}
	return &ExitError{125, err}
}

// discardAuto removes a container that did not start and was to be removed at its end. The monitor does it if it came that far.
func (e *Engine) discardAuto(ctx context.Context, rec *container.Record) error {
	if !rec.HostConfig.AutoRemove {
		return nil
	}
	return e.discard(ctx, rec)
}

func (e *Engine) discard(ctx context.Context, rec *container.Record) error {
	err := e.RemoveContainer(context.WithoutCancel(ctx), RemoveRequest{Container: rec.ID, Force: true, Volumes: true})
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}
