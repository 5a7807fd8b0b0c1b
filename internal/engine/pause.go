package engine

import (
	"context"
	"errors"

	"conex/internal/container"
	"conex/internal/control"
)

// Pause lets every process of a running container stand still until Unpause, a stop or a kill. One that is paused is ErrConflict.
func (e *Engine) Pause(ctx context.Context, name string) error {
	return e.freezeOrThaw(ctx, name, (*control.Client).Pause)
}

// Unpause lets a paused container go on. One that is not paused is ErrConflict.
func (e *Engine) Unpause(ctx context.Context, name string) error {
	return e.freezeOrThaw(ctx, name, (*control.Client).Unpause)
}

func (e *Engine) freezeOrThaw(ctx context.Context, name string, do func(*control.Client, context.Context) error) error {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	id := n.Record.ID
	switch a := n.Alive(); {
	case a == nil:
		return conflict("container %s is not running", id)
	case a.Status == container.Restarting:
		return conflict("container %s is restarting, wait until the container is running", id)
	}
	err = do(e.client(id), ctx)
	var ce *control.Error
	switch {
	case errors.Is(err, control.ErrGone):
		return errors.Join(e.settleGone(ctx, id), conflict("container %s is not running", id))
	case errors.As(err, &ce):
		return &kindError{ErrConflict, ce}
	default:
		return err
	}
}
