package engine

import (
	"context"
	"errors"
	"fmt"

	"conex/internal/container"
	"conex/internal/control"
)

// StopRequest says how to stop. The zero value means the container's own signal and time-out.
type StopRequest struct {
	// Signal is a name or number.
	Signal string
	// Timeout is in seconds; negative waits for ever.
	Timeout *int
}

// Stop ends a container: its stop signal, then SIGKILL. It returns when the end is recorded, and ports, address and volumes are free.
// Stopping one that does not run is no error.
func (e *Engine) Stop(ctx context.Context, name string, req StopRequest) error {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	return e.stop(ctx, n, "stop", req)
}

func (e *Engine) stop(ctx context.Context, n *container.Snapshot, command string, req StopRequest) error {
	if req.Signal != "" {
		if _, err := container.ParseSignal(req.Signal); err != nil {
			return invalid("%w", err)
		}
	}
	id := n.Record.ID
	for n.Stoppable() {
		_, err := e.client(id).Stop(ctx, command, req.Signal, req.Timeout)
		if err == nil {
			return nil
		}
		if !errors.Is(err, control.ErrGone) {
			return fmt.Errorf("cannot stop container: %s: %w", n.Record.Name, err)
		}
		// It ended by itself, or its monitor died. Then its restart policy may have started it again.
		if err := e.settleGone(ctx, id); err != nil {
			return err
		}
		if n, err = e.Containers().Snapshot(id); err != nil {
			if errors.Is(err, container.ErrNotFound) {
				return nil // it was run with --rm
			}
			return err
		}
	}
	return nil
}

// Restart stops a container, if it runs, and starts it.
func (e *Engine) Restart(ctx context.Context, name string, req StopRequest) error {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	if err := e.stop(ctx, n, "restart", req); err != nil {
		return err
	}
	if _, err := e.launch(ctx, n.Record, nil, startMonitor(), attachment{}, &Streams{}); err != nil && !errors.Is(err, container.ErrBusy) {
		return fmt.Errorf("cannot restart container %s: %w", name, err)
	}
	e.event(n.Record, "restart", nil)
	return nil
}
