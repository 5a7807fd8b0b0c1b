package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/portmap"

	apic "github.com/moby/moby/api/types/container"
)

// ports changes which ports are published while the container runs: first in the kernel, which may refuse, then in the record, so that an
// answer without error promises both. A monitor that is killed between leaves the record as it was, and its ports to whoever
// settles it.
func (s *server) ports(w http.ResponseWriter, q *http.Request) error {
	var c container.PortChange
	if err := json.NewDecoder(q.Body).Decode(&c); err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "invalid ports request: " + err.Error()}
	}
	m := s.m
	m.changes.Lock()
	defer m.changes.Unlock()
	r := m.present()
	if r != nil && r.released {
		r = nil
	}
	if r != nil {
		if err := r.name(c.Remove); err != nil {
			return err
		}
	}
	// A dry run: what the record refuses shall not have happened in the kernel.
	trial := *m.current()
	if err := trial.ChangePorts(&c); err != nil {
		return &control.Error{Status: http.StatusConflict, Message: err.Error()}
	}
	ctx := context.Background() // a change is short, and whoever asked for it may leave
	undo := func() error { return nil }
	if r != nil {
		var err error
		if undo, err = r.changePorts(ctx, &c); err != nil {
			return portError(err)
		}
	}
	rec, err := m.store.UpdatePorts(m.rec.ID, &c)
	if err != nil {
		return errors.Join(err, undo())
	}
	m.mu.Lock()
	m.host = rec.HostConfig
	m.mu.Unlock()
	if r != nil {
		if err := m.setState(func(s *container.State) { s.Endpoints = describe(r.eps) }); err != nil {
			return err
		}
	}
	m.event("update", nil)
	return answer(w, struct{}{})
}

// name completes the names of ports that are to go by what they are published as.
func (r *run) name(names []container.PortName) error {
	for k := range names {
		n := &names[k]
		found := false
		for _, ep := range r.eps {
			if i := slices.IndexFunc(ep.Ports, func(m portmap.Mapping) bool { return isNamed(*n, m) }); i >= 0 {
				n.Private, found = ep.Ports[i].ContainerPort, true
			}
		}
		if !found {
			return &control.Error{Status: http.StatusConflict, Message: "no public port '" + n.String() + "' published for " + r.m.rec.Name}
		}
	}
	return nil
}

// isNamed reports whether a published port is one that is named.
func isNamed(n container.PortName, m portmap.Mapping) bool {
	return string(n.Proto) == m.Proto && (n.Private == 0 || n.Private == m.ContainerPort) && (!n.HostIP.IsValid() || n.HostIP == m.HostIP) &&
		n.HostPort == strconv.Itoa(int(m.HostPort))
}

// portError gives a taken port the status of a conflict.
func portError(err error) error {
	if errors.Is(err, portmap.ErrPortTaken) {
		return &control.Error{Status: http.StatusConflict, Message: err.Error()}
	}
	return err
}

// changePorts does what a change asks of a running container, or nothing. undo takes back what was added; ports that went stay away. The
// caller holds m.changes.
func (r *run) changePorts(ctx context.Context, c *container.PortChange) (undo func() error, err error) {
	undo = func() error { return nil }
	ats := r.m.attachments()
	if len(ats) == 0 || len(r.eps) == 0 {
		return undo, &control.Error{Status: http.StatusConflict, Message: "container " + r.m.rec.Name + " has no network of its own whose ports could be published"}
	}
	more, err := mappings(&container.Record{Config: r.m.rec.Config, HostConfig: &apic.HostConfig{PortBindings: c.Add}})
	if err != nil {
		return undo, &control.Error{Status: http.StatusBadRequest, Message: err.Error()}
	}
	had := r.ports
	r.ports = nil // a new port has had no port of the host
	err = r.bind(ctx, ats, more)
	r.ports = had
	if err != nil {
		return undo, err
	}
	to := r.publisher()
	switch {
	case to == nil:
		return undo, &control.Error{Status: http.StatusConflict, Message: "container " + r.m.rec.Name + " is on no bridge network that could publish its ports"}
	case len(more) == 0:
	case r.res == nil:
		if r.res, err = r.m.nets.Reserve(ctx, more); err != nil {
			return undo, err
		}
		r.res.Inside(r.netns)
		if err := r.m.nets.Publish(ctx, to, r.res); err != nil {
			err = errors.Join(err, r.res.Close(), r.m.nets.Unpublish(to))
			r.res = nil
			return undo, err
		}
	default:
		if err := r.m.nets.PublishMore(ctx, to, r.res, more); err != nil {
			return undo, err
		}
	}
	if len(more) > 0 {
		added := to.Ports[len(to.Ports)-len(more):]
		undo = func() error {
			return r.m.nets.PublishLess(ctx, to, r.res, func(m portmap.Mapping) bool { return slices.Contains(added, m) })
		}
	}
	if len(c.Remove) == 0 || r.res == nil {
		return undo, nil
	}
	return undo, r.m.nets.PublishLess(ctx, to, r.res, func(m portmap.Mapping) bool {
		return slices.ContainsFunc(c.Remove, func(n container.PortName) bool { return isNamed(n, m) })
	})
}
