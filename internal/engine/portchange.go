package engine

import (
	"context"
	"errors"
	"net/http"

	"conex/internal/container"
	"conex/internal/control"
)

// ChangePorts publishes further ports of a container, or takes some back, whether it runs or not. A nil error promises that it will be so at its
// next starts too; a running container's connections go on.
func (e *Engine) ChangePorts(ctx context.Context, name string, c container.PortChange) error {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	id := n.Record.ID
	if mode := n.Record.HostConfig.NetworkMode; len(c.Add) > 0 && (mode.IsHost() || mode.IsContainer()) {
		return invalid("container %s has no network of its own whose ports could be published", name)
	}
	idle := func() error { return e.updated(e.Containers().UpdatePorts(id, &c)) }
	for ctx.Err() == nil {
		err = e.client(id).ChangePorts(ctx, c)
		if !errors.Is(err, control.ErrGone) {
			break
		}
		if err = e.changeIdle(ctx, id, idle); !errors.Is(err, container.ErrBusy) { // else somebody has started it
			break
		}
		if _, err = e.lookAgain(ctx, id); err != nil {
			break
		}
	}
	if err == nil {
		err = ctx.Err()
	}
	var ce *control.Error
	if errors.Is(err, container.ErrConflict) || errors.As(err, &ce) && ce.Status == http.StatusConflict {
		return conflict("%w", err)
	}
	return classify(err)
}
