package monitor

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"conex/internal/control"
	"conex/internal/egress"
	"conex/internal/network"
)

// rebound changes what a running container may reach to what values say, none for anything. At each moment it may reach no more than by the old
// values or the new ones. On an error the old ones count. The caller holds m.changes.
func (r *run) rebound(ctx context.Context, values []string) (err error) {
	if r.released || r.names == nil { // no network of its own
		return nil
	}
	if len(values) == 0 {
		return r.unbound()
	}
	list, err := egress.Parse(values)
	if err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: err.Error()}
	}
	if r.gate != nil {
		return r.gate.change(list, r.names.names, r.m.rec.HostConfig.ExtraHosts)
	}
	g, err := r.m.newGate(list)
	if err != nil {
		return err
	}
	r.gate = g
	defer func() {
		if err != nil {
			err = errors.Join(err, r.unbound())
		}
	}()
	// First the names: what the container looks up from now on opens its way.
	if err := g.begin(r.names.names, r.m.rec.HostConfig.ExtraHosts); err != nil {
		return err
	}
	if err := r.askOthers(); err != nil {
		return err
	}
	netns, err := r.netns()
	if err != nil {
		return err
	}
	defer netns.Close()
	for _, ep := range r.eps {
		if err := g.bound(ep, func(e network.Egress) error { return r.m.nets.Bound(ctx, ep, netns, e) }); err != nil {
			return err
		}
	}
	return nil
}

// unbound takes the run's gate away.
func (r *run) unbound() error {
	g := r.gate
	if g == nil {
		return nil
	}
	r.gate = nil
	err := r.askOthers()
	for _, ep := range r.eps {
		if ep.Filter != nil {
			err = errors.Join(err, g.remove(ep.Filter), r.m.nets.Unbound(ep))
		}
	}
	return errors.Join(err, g.close())
}

// askOthers makes the name service ask whom it is to ask by now.
func (r *run) askOthers() error {
	if r.names.netns == nil && r.gate == nil && len(r.m.rec.HostConfig.DNS) > 0 {
		netns, err := r.netns()
		if err != nil {
			return err
		}
		r.names.netns = netns // until the name service ends
	}
	cfg, err := r.whomToAsk(r.names)
	if err != nil {
		return err
	}
	r.names.server.Change(cfg)
	return nil
}

// bound puts a filter before an interface that runs without one, with all that is learnt until then.
func (g *gate) bound(ep *network.Endpoint, install func(network.Egress) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := install(network.Egress{List: g.list, Group: g.told.Group(), Learnt: g.names}); err != nil {
		return err
	}
	g.filters = append(g.filters, ep.Filter)
	return nil
}

// change lets the filters pass another list, or none of them.
func (g *gate) change(list egress.List, names *network.Names, hosts []string) error {
	old, err := g.replace(list)
	if err == nil {
		err = g.begin(names, hosts) // what the new list names may be known without being asked for
	}
	if err == nil {
		return nil
	}
	if old == nil {
		return err
	}
	_, back := g.replace(old)
	return errors.Join(err, back)
}

// replace is change for the filters alone. An error leaves the old list, if they could be changed back.
func (g *gate) replace(list egress.List) (old egress.List, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	old = g.list
	for k, f := range g.filters {
		if err := f.Change(list, g.names); err != nil {
			for _, f := range slices.Backward(g.filters[:k+1]) {
				err = errors.Join(err, f.Change(old, g.names))
			}
			return nil, err
		}
	}
	g.list = list
	clear(g.asked) // so that it is told of once more
	return old, nil
}
