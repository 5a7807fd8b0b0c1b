package network

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"conex/internal/portmap"
)

// Reserve is portmap.Reserve whose error for a taken port names the container that has it, when it is one of this root's.
func (m *Manager) Reserve(ctx context.Context, ports []portmap.Mapping) (*portmap.Reservation, error) {
	var others []portmap.Mapping
	if slices.ContainsFunc(ports, func(p portmap.Mapping) bool { return p.Proto == "sctp" }) {
		var err error
		if others, err = m.live(); err != nil {
			return nil, err
		}
	}
	r, err := portmap.ReserveBeside(ctx, ports, others)
	return r, m.nameHolder(err)
}

// nameHolder completes the error for a taken port. The holder's name is a courtesy, so it has no error of its own.
func (m *Manager) nameHolder(err error) error {
	var taken *portmap.TakenError
	if !errors.As(err, &taken) {
		return err
	}
	nets, nerr := m.attached()
	for _, id := range nets {
		eps, eerr := m.endpoints(id)
		if nerr != nil || eerr != nil {
			return err
		}
		for _, e := range eps {
			if slices.ContainsFunc(e.Ports, taken.Mapping.Collides) {
				taken.Holder = cmp.Or(e.ContainerName, e.ContainerID)
			}
		}
	}
	return err
}

// Publish makes reserved ports reach the endpoint and records them in it, so that whoever settles a dead monitor can withdraw
// them. The reservation stays the caller's: Close it when the container ends, before Detach.
func (m *Manager) Publish(ctx context.Context, ep *Endpoint, r *portmap.Reservation) error {
	i, err := m.lookup(ctx, ep.NetworkID)
	if err != nil {
		return err
	}
	t, err := m.table(ctx)
	if err != nil {
		return err
	}
	if !t.Docker {
		if err := r.Obey(); err != nil {
			return err
		}
	}
	ports := r.Mappings()
	if len(ports) == 0 {
		return nil
	}
	to := ep.target(i)
	for k := range ports {
		ports[k].Target = to
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	// Two that reserved one sctp port at a time learn of each other here.
	for _, p := range ports {
		if p.Proto != "sctp" {
			continue
		}
		live, err := m.live()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(live, p.Collides) {
			return m.nameHolder(&portmap.TakenError{Mapping: p})
		}
	}
	ep.Ports = ports
	// The record first: elements without one would be nobody's after a crash.
	if err := m.rewriteEndpoint(ep); err != nil {
		return err
	}
	return r.Activate(ctx, t, ep.ContainerID, to)
}

// PublishMore publishes further ports of a running container that publishes some. An error leaves those that it has.
func (m *Manager) PublishMore(ctx context.Context, ep *Endpoint, r *portmap.Reservation, ports []portmap.Mapping) error {
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	return m.nameHolder(r.Add(ctx, ports, func(all []portmap.Mapping) error {
		ep.Ports = all
		return m.writeEndpoint(ep)
	}))
}

// PublishLess takes ports of a running container back.
func (m *Manager) PublishLess(ctx context.Context, ep *Endpoint, r *portmap.Reservation, match func(portmap.Mapping) bool) error {
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	return r.Drop(ctx, match, func(left []portmap.Mapping) error {
		ep.Ports = left
		return m.writeEndpoint(ep)
	})
}

// Move makes the ports that an endpoint of a running container publishes lead to another one of it: no client finds them closed. After an error
// they lead where they led.
func (m *Manager) Move(ctx context.Context, from, to *Endpoint, r *portmap.Reservation) error {
	i, err := m.lookup(ctx, to.NetworkID)
	if err != nil {
		return err
	}
	l, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	// Both records have the ports in between: whoever settles a monitor that died then withdraws both.
	err = r.Move(to.target(i), func(ports []portmap.Mapping) error {
		to.Ports = ports
		return m.rewriteEndpoint(to)
	})
	if err != nil {
		to.Ports = nil
		return errors.Join(err, m.rewriteEndpoint(to))
	}
	return m.Unpublish(from)
}

// Unpublish records that an endpoint's ports are withdrawn; their reservation is closed.
func (m *Manager) Unpublish(ep *Endpoint) error {
	ep.Ports = nil
	return m.rewriteEndpoint(ep)
}

// target is where published ports find the endpoint.
func (ep *Endpoint) target(i Info) portmap.Target {
	return portmap.Target{Bridge: i.Interface, IPv4: ep.Address.Addr(), IPv6: ep.Address6.Addr()}
}
