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
	err = e.change(ctx, id, func(m *control.Client) error { return m.ChangePorts(ctx, c) }, idle)
	var ce *control.Error
	if errors.Is(err, container.ErrConflict) || errors.As(err, &ce) && ce.Status == http.StatusConflict {
		return conflict("%w", err)
	}
	return classify(err)
}
