package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"syscall"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/tty"
)

// AttachRequest connects to a running container's streams.
type AttachRequest struct {
	Container string
	// NoStdin leaves the input unconnected.
	NoStdin bool
	Streams Streams
}

// Attach connects to a running container until it ends, then returns its exit code, or until the user detaches, then 0.
func (e *Engine) Attach(ctx context.Context, req AttachRequest) (exitCode int, err error) {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return 0, err
	}
	rec := n.Record
	switch a := n.Alive(); {
	case a == nil:
		return 0, conflict("cannot attach to a stopped container, start it first")
	case a.Status == container.Restarting:
		return 0, conflict("cannot attach to a restarting container, wait until it is running")
	}
	stdin := !req.NoStdin && rec.Config.OpenStdin && req.Streams.Stdin != nil
	c := e.client(rec.ID)
	s, err := c.Attach(ctx, stdin)
	if errors.Is(err, control.ErrGone) {
		return 0, errors.Join(e.settleGone(ctx, rec.ID), conflict("cannot attach to a stopped container, start it first"))
	}
	if err != nil {
		return 0, err
	}
	defer s.Close()
	if rec.Config.Tty && req.Streams.Resize != nil {
		select {
		case sz := <-req.Streams.Resize:
			// A size that differs makes the program draw its screen anew, which a newcomer has not seen.
			err := c.Resize(ctx, "", sz.Rows+1, sz.Cols)
			if err == nil {
				err = c.Resize(ctx, "", sz.Rows, sz.Cols)
			}
			if err != nil && !errors.Is(err, control.ErrGone) {
				return 0, fmt.Errorf("resize terminal: %w", err)
			}
		default:
		}
	}
	exit, err := e.join(ctx, rec, s, stdin, rec.Config.Tty, &req.Streams)
	return exit.code, err
}

// client talks to a container's monitor.
func (e *Engine) client(id string) *control.Client {
	return control.NewClient(e.Containers().RunDir(id, "sock"))
}

// ended is how an attached command ended, seen from its user.
type ended struct {
	code     int
	detached bool
}

// join copies between the user's streams and a process's until the process ends, the user detaches, or ctx ends (the process goes
// on then, too).
func (e *Engine) join(ctx context.Context, rec *container.Record, s *control.Stream, stdin, isTTY bool, st *Streams) (ended, error) {
	type output struct {
		exit *container.Exit
		err  error
	}
	out := make(chan output, 1)
	go func() { // ends with the stream, which the caller closes
		x, err := s.CopyOutput(st.Stdout, st.Stderr)
		out <- output{x, err}
	}()
	detached := make(chan struct{})
	if stdin {
		in := st.Stdin
		if isTTY {
			keys, err := tty.ParseDetachKeys(st.DetachKeys)
			if err != nil {
				return ended{}, invalid("invalid detach keys (%s): %w", st.DetachKeys, err)
			}
			in = tty.NewDetachReader(in, keys)
		}
		go func() { // ends with the user's input; a terminal's may outlive us, as a read of it can't be called back
			_, err := io.Copy(s, in)
			if errors.Is(err, tty.ErrDetached) {
				close(detached)
				return
			}
			// An error means that the process is gone, which the output's end says too.
			_ = s.CloseWrite()
		}()
	}
	done, enough := make(chan struct{}), make(chan struct{})
	defer close(done)
	go e.forward(rec.ID, s.ExecID, st, done, enough)
	select {
	case <-detached:
		return ended{detached: true}, nil
	case <-enough:
		return ended{detached: true}, &ExitError{1, ErrInsists}
	case <-ctx.Done():
		return ended{detached: true}, ctx.Err()
	case o := <-out:
		if o.err != nil {
			return ended{}, o.err
		}
		if o.exit != nil {
			return ended{code: o.exit.Code}, nil
		}
		return e.orphaned(ctx, rec, s.ExecID)
	}
}

// orphaned finds out how a process ended whose monitor went away without a word.
func (e *Engine) orphaned(ctx context.Context, rec *container.Record, execID string) (ended, error) {
	if err := e.settleGone(ctx, rec.ID); err != nil {
		return ended{}, err
	}
	const killed = 128 + int(syscall.SIGKILL)
	if execID != "" {
		return ended{code: killed}, &ExitError{killed, fmt.Errorf("the monitor of container %s died, its processes were killed", rec.Name)}
	}
	n, err := e.Containers().Snapshot(rec.ID)
	if err != nil && !errors.Is(err, container.ErrNotFound) {
		return ended{}, err
	}
	if n == nil || n.Exit == nil {
		return ended{code: killed}, &ExitError{killed, fmt.Errorf("the monitor of container %s died, its processes were killed", rec.Name)}
	}
	return ended{code: n.Exit.Code}, nil
}

// ErrInsists is what attaching ends with when the user has asked three times for an end that the process does not come to, as Docker's
// client ends then. The process goes on.
var ErrInsists = errors.New("got 3 SIGTERM/SIGINTs, forcefully exiting")

// forward passes the terminal's sizes and the user's signals on until done is closed. A third SIGINT or SIGTERM stays here and closes enough.
func (e *Engine) forward(id, execID string, st *Streams, done <-chan struct{}, enough chan<- struct{}) {
	c := e.client(id)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	resize, signals := st.Resize, st.Signals
	asked := 0
	for {
		select {
		case <-done:
			return
		case sz, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			// The process may end at any moment; then there is nothing to resize or signal.
			_ = c.Resize(ctx, execID, sz.Rows, sz.Cols)
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			if sig == syscall.SIGINT || sig == syscall.SIGTERM {
				if asked++; asked == 3 {
					close(enough)
					return
				}
			}
			if n, ok := sig.(syscall.Signal); ok && execID == "" {
				_ = c.Forward(ctx, strconv.Itoa(int(n)))
			}
		}
	}
}
