package engine

import (
	"context"
	"errors"

	"conex/internal/control"
)

// Wait returns the exit code of a container's present run when it has ended; of its last run when it does not run; 0 when it never
// ran.
func (e *Engine) Wait(ctx context.Context, name string) (exitCode int, err error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return 0, err
	}
	id := n.Record.ID
	if n.Alive() != nil {
		x, err := e.client(id).Wait(ctx)
		if err == nil {
			return x.Code, nil
		}
		if !errors.Is(err, control.ErrGone) {
			return 0, err
		}
		if err := e.settleOne(ctx, id); err != nil {
			return 0, err
		}
	}
	if n, err = e.Containers().Snapshot(id); err != nil || n.Exit == nil {
		return 0, classify(err)
	}
	return n.Exit.Code, nil
}
