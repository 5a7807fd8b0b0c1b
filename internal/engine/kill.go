package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"conex/internal/container"
	"conex/internal/control"
)

// Kill sends a signal (name or number; "" is SIGKILL) to a container's first process. A container that does not run is ErrConflict.
func (e *Engine) Kill(ctx context.Context, name, signal string) error {
	signal = cmp.Or(signal, "KILL")
	if _, err := container.ParseSignal(signal); err != nil {
		return invalid("%w", err)
	}
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	id := n.Record.ID
	if n.Stoppable() {
		err = e.client(id).Kill(ctx, signal)
		var ce *control.Error
		if err == nil || !errors.Is(err, control.ErrGone) && !errors.As(err, &ce) {
			return err
		}
		if ce != nil {
			return &kindError{ErrConflict, fmt.Errorf("cannot kill container: %s: %w", name, ce)}
		}
		if err := e.settleGone(ctx, id); err != nil {
			return err
		}
	}
	return conflict("cannot kill container: %s: container %s is not running", name, id)
}
