package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/disk"
)

// StartRequest starts a container that exists.
type StartRequest struct {
	Container string
	// Attach connects Streams to the output; AttachStdin the input too.
	Attach, AttachStdin bool
	Streams             Streams
}

// Start starts a container and, with Attach, stays until it ends or the user detaches. Starting one that runs is no error. The exit
// code is meaningful when attached: 0 after a detach.
func (e *Engine) Start(ctx context.Context, req StartRequest) (exitCode int, err error) {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return 0, err
	}
	for n.Alive() != nil { // or its monitor is about to die, and says nothing more
		err := e.client(n.Record.ID).Ping(ctx)
		switch {
		case errors.Is(err, control.ErrGone):
			if err = e.settleGone(ctx, n.Record.ID); err == nil {
				n, err = e.snapshot(ctx, n.Record.ID)
			}
			if err != nil {
				return 0, err
			}
			continue
		case err != nil && ctx.Err() != nil:
			return 0, err
		case n.Alive().Paused:
			return 0, conflict("cannot start a paused container, try unpause instead")
		case req.Attach:
			return e.Attach(ctx, AttachRequest{Container: n.Record.ID, NoStdin: !req.AttachStdin, Streams: req.Streams})
		}
		return 0, nil
	}
	rec := n.Record
	at := attachment{want: req.Attach, stdin: req.AttachStdin && rec.Config.OpenStdin}
	s, err := e.launch(ctx, rec, nil, startMonitor(), at, &req.Streams)
	if errors.Is(err, container.ErrBusy) { // somebody else has started it
		if req.Attach {
			return e.Attach(ctx, AttachRequest{Container: rec.ID, NoStdin: !req.AttachStdin, Streams: req.Streams})
		}
		return 0, nil
	}
	if err != nil || s == nil {
		return 0, err
	}
	defer s.Close()
	exit, err := e.join(ctx, rec, s, at.stdin, rec.Config.Tty, &req.Streams)
	return exit.code, err
}

// attachment says how a container is attached from its start.
type attachment struct{ want, stdin bool }

// launch makes a monitor, which runs the container, and returns when its process is there. The stream is nil unless one is wanted.
// An error is an *ExitError with Docker's exit code; container.ErrBusy says that it runs already.
//
// It takes the container's lock unless the caller has it already, and releases it, and uses the monitor up.
func (e *Engine) launch(ctx context.Context, rec *container.Record, lock *disk.Lock, mon *startingMonitor, at attachment, streams *Streams) (*control.Stream, error) {
	defer mon.abandon()
	cs := e.Containers()
	held := lock != nil
	var err error
	if !held {
		if lock, err = cs.LockIdle(ctx, rec.ID); err != nil {
			return nil, err
		}
	}
	defer lock.Release() // ours; the monitor has the same lock by its descriptor
	if !held {
		if err := e.settleLocked(ctx, rec.ID); err != nil {
			return nil, err
		}
		// Removed while we waited?
		id := rec.ID
		if rec, err = cs.Load(id); err != nil {
			if errors.Is(err, container.ErrNotFound) {
				err = errors.Join(err, cs.RemoveRun(id)) // which our lock has made
			}
			return nil, classify(err)
		}
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	req := control.StartRequest{
		Root: e.root.Path(), State: e.cfg.State, ID: rec.ID, Attach: at.want, AttachStdin: at.stdin, Restarts: mon.restarts,
		DNS: e.cfg.DNS, DNSSearch: e.cfg.DNSSearch, DNSDomains: e.cfg.DNSDomains, SystemdCgroup: e.systemdCgroup(), LogDriver: rec.HostConfig.LogConfig.Type, LogOptions: rec.HostConfig.LogConfig.Config,
	}
	if req.Runtime, err = e.runtimePath(rec.HostConfig.Runtime); err != nil {
		return nil, &ExitError{125, err}
	}
	if req.LogDriver == "" { // a record of before the driver was kept in it
		req.LogDriver, req.LogOptions = e.cfg.Log.Driver, e.cfg.Log.Options
	}
	if req.Edits, err = e.deviceEdits(rec.HostConfig); err != nil {
		return nil, &ExitError{125, err}
	}
	if req.Lower, err = ls.Lower(ctx, rec.Layers); err != nil {
		return nil, &ExitError{125, err}
	}
	if req.Images, err = e.imagesOf(ctx, ls, rec); err != nil {
		return nil, &ExitError{125, err}
	}
	if at.want && rec.Config.Tty && streams.Resize != nil {
		select {
		case sz := <-streams.Resize:
			req.Rows, req.Cols = sz.Rows, sz.Cols
		default:
		}
	} else if hc := rec.HostConfig; hc.ConsoleSize[0] > 0 {
		req.Rows, req.Cols = uint16(hc.ConsoleSize[0]), uint16(hc.ConsoleSize[1])
	}
	if err := e.Networks().SetPolicy(ctx, e.cfg.PublishPolicy == config.PublishDocker); err != nil {
		return nil, &ExitError{125, err}
	}
	rep, s, err := mon.begin(lock, req)
	if err != nil {
		return nil, &ExitError{125, err}
	}
	if rep.Error != "" {
		if s != nil {
			s.Close()
		}
		return nil, &ExitError{rep.ExitCode, startError(rep)}
	}
	return s, nil
}

// startError puts a failed start into words. Docker's own begin with a shim and a runtime that conex does not have.
func startError(rep control.Report) error {
	if rep.ExitCode == 126 || rep.ExitCode == 127 {
		return fmt.Errorf("unable to start container process: %s", rep.Error)
	}
	if rep.PortTaken {
		return &kindError{ErrConflict, fmt.Errorf("failed to set up container networking: %s", rep.Error)}
	}
	if strings.Contains(rep.Error, "not supported as upperdir") {
		return fmt.Errorf("%s: choose a data folder (--root) on another filesystem, such as ext4, xfs, btrfs or tmpfs", rep.Error)
	}
	if strings.Contains(rep.Error, ": attach mount ") && (strings.HasSuffix(rep.Error, syscall.EINVAL.Error()) || strings.HasSuffix(rep.Error, syscall.ENOTDIR.Error())) {
		return fmt.Errorf("%s: is it a folder mounted onto a file, or a file onto a folder?", rep.Error)
	}
	return errors.New(rep.Error)
}
