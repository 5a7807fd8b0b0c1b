package engine

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"conex/internal/container"
	"conex/internal/control"
)

// Update changes a container's limits, its restart policy and what it may reach, whether it runs or not. Warnings are Docker's, about what the
// kernel lacks; such limits are left as they are. On an error nothing is changed.
func (e *Engine) Update(ctx context.Context, name string, c container.Changes) (warnings []string, err error) {
	if warnings, err = checkResources(&c.Resources, true); err != nil {
		return warnings, err
	}
	if err := checkRestartPolicy(c.RestartPolicy); err != nil {
		return warnings, err
	}
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return warnings, err
	}
	id := n.Record.ID
	if c.Egress != nil {
		values, err := validateEgress(*c.Egress, n.Record.HostConfig)
		if err != nil {
			return warnings, err
		}
		values = append([]string{}, values...) // none is something else than nil to the monitor
		c.Egress = &values
	}
	idle := func() error {
		rec, err := e.Containers().Update(id, &c)
		if err == nil {
			e.event(rec, "update", c.Attributes())
		}
		return err
	}
	err = e.change(ctx, id, func(m *control.Client) error { return m.Update(ctx, c) }, idle)
	if err == nil {
		return warnings, nil
	}
	what := "Cannot update container " + id
	var ce *control.Error
	if errors.Is(err, container.ErrConflict) || errors.As(err, &ce) && ce.Status == http.StatusConflict {
		return warnings, conflict("%s: %w", what, err)
	}
	return warnings, fmt.Errorf("%s: %w", what, classify(err))
}

// change has the monitor of a running container change it by live, and changes the record of one that does not run by idle. Without live a
// running one is a conflict.
func (e *Engine) change(ctx context.Context, id string, live func(*control.Client) error, idle func() error) error {
	err := ctx.Err()
	for err == nil {
		err = control.ErrGone
		if live != nil {
			err = live(e.client(id))
		}
		if !errors.Is(err, control.ErrGone) {
			return err
		}
		if err = e.changeIdle(ctx, id, idle); !errors.Is(err, container.ErrBusy) { // else somebody has started it
			return err
		}
		if _, err = e.lookAgain(ctx, id); live == nil && err == nil {
			return conflict("container %s runs: stop it first", id[:12])
		}
		if err == nil {
			err = ctx.Err()
		}
	}
	return err
}

// changeIdle changes the record of a container that no monitor runs. ErrBusy when one does by now.
func (e *Engine) changeIdle(ctx context.Context, id string, change func() error) error {
	cs := e.Containers()
	l, err := cs.LockIdle(ctx, id)
	if err != nil {
		return err
	}
	defer l.Release()
	if err := e.settleLocked(ctx, id); err != nil {
		return err
	}
	err = change()
	if errors.Is(err, container.ErrNotFound) {
		return errors.Join(err, cs.RemoveRun(id)) // which our lock has made
	}
	return err
}

// updated announces a record that has changed.
func (e *Engine) updated(rec *container.Record, err error) error {
	if err == nil {
		e.event(rec, "update", nil)
	}
	return err
}
