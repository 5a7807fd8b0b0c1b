package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/network"
	"conex/internal/portmap"

	mevents "github.com/moby/moby/api/types/events"
)

// attachments are the container's networks of now: at the start those of its record, since then with what was connected and disconnected.
func (m *monitor) attachments() []container.Attachment { return m.current().Attachments() }

// connect joins a further network while the container runs: first in the record, so that whoever comes after a crash finds it connected at
// its next start, then in the kernel. An error leaves neither.
func (s *server) connect(w http.ResponseWriter, q *http.Request) error {
	var at container.Attachment
	if err := json.NewDecoder(q.Body).Decode(&at); err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "invalid connect request: " + err.Error()}
	}
	m := s.m
	m.changes.Lock()
	defer m.changes.Unlock()
	old := m.attachments()
	if slices.ContainsFunc(old, func(o container.Attachment) bool { return o.Same(&at) }) {
		return &control.Error{Status: http.StatusConflict, Message: fmt.Sprintf("endpoint with name %s already exists in network %s", m.rec.Name, at.Network)}
	}
	if err := m.keepNetworks(append(slices.Clone(old), at)); err != nil {
		return err
	}
	if r := m.present(); r != nil {
		if err := r.join(context.Background(), at); err != nil {
			return errors.Join(err, m.keepNetworks(old))
		}
	}
	return answer(w, struct{}{})
}

// disconnect leaves a network while the container runs, in the same order.
func (s *server) disconnect(w http.ResponseWriter, q *http.Request) error {
	m := s.m
	m.changes.Lock()
	defer m.changes.Unlock()
	old := m.attachments()
	gone := container.Attachment{Network: q.FormValue("name"), NetworkID: q.FormValue("network")}
	k := slices.IndexFunc(old, func(o container.Attachment) bool { return o.Same(&gone) })
	if k < 0 {
		return &control.Error{Status: http.StatusConflict, Message: fmt.Sprintf("container %s is not connected to network %s", m.rec.ID, gone.Network)}
	}
	if err := m.keepNetworks(slices.Delete(slices.Clone(old), k, k+1)); err != nil {
		return err
	}
	if r := m.present(); r != nil {
		if err := r.leave(context.Background(), old[k]); err != nil {
			return err
		}
	}
	return answer(w, struct{}{})
}

// keepNetworks writes the container's networks into its record. The caller holds m.changes.
func (m *monitor) keepNetworks(ats []container.Attachment) error {
	rec, err := m.store.SetNetworks(m.rec.ID, ats)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.networks = &rec.Networks
	m.mu.Unlock()
	return nil
}

// join attaches a running container. The other networks go on as they are, but for the way out, which the new one may take.
func (r *run) join(ctx context.Context, at container.Attachment) error {
	if r.released {
		return &control.Error{Status: http.StatusConflict, Message: "container " + r.m.rec.ID + " is not running"}
	}
	ep, err := r.attach(ctx, at, 0, ways{-1, -1, -1})
	if err == nil {
		err = r.reroute(ctx, nil)
	}
	if err == nil {
		return r.settle()
	}
	if ep == nil {
		return err
	}
	r.eps = slices.DeleteFunc(r.eps, func(e *network.Endpoint) bool { return e == ep })
	return errors.Join(err, r.reroute(ctx, ep), r.unpublish(ep), r.drop(ctx, ep), r.settle())
}

// leave detaches a running container from one network. The way out is another's before this one goes.
func (r *run) leave(ctx context.Context, at container.Attachment) error {
	if r.released {
		return nil
	}
	k := slices.IndexFunc(r.eps, func(e *network.Endpoint) bool {
		return e.NetworkID == at.NetworkID || at.NetworkID == "" && e.NetworkName == at.Network
	})
	if k < 0 {
		return nil
	}
	ep := r.eps[k]
	r.eps = slices.Delete(r.eps, k, k+1)
	// Whatever goes wrong, it goes: the record has said so. Ports that no other network has taken go with it.
	return errors.Join(r.reroute(ctx, ep), r.unpublish(ep), r.drop(ctx, ep), r.settle())
}

// drop takes an endpoint's interface out of the container and gives its addresses back, in this order: nobody else may have them before.
func (r *run) drop(ctx context.Context, ep *network.Endpoint) error {
	netns, err := r.netns()
	if err != nil {
		return err
	}
	defer netns.Close()
	if err := r.m.nets.Unplug(ep, netns); err != nil {
		return err
	}
	if err := r.gate.remove(ep.Filter); err != nil {
		return err
	}
	if err := r.m.nets.DetachFrom(ctx, r.m.rec.ID, ep.NetworkID); err != nil {
		return err
	}
	r.m.networkEvent(mevents.ActionDisconnect, ep)
	return nil
}

// netns opens the running container's network namespace.
func (r *run) netns() (*os.File, error) {
	if f := r.ct.NetNS(); f != nil {
		if d, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(f.Fd()))); err == nil {
			return d, nil
		}
	}
	return os.Open("/proc/" + strconv.Itoa(r.proc.Pid()) + "/ns/net")
}

// settle makes the name service, the hosts file and state.json say what the endpoints are now.
func (r *run) settle() error {
	r.moved()
	return errors.Join(r.m.writeFiles(r.files, r.eps, r.links), r.m.setState(func(s *container.State) { s.Endpoints = describe(r.eps) }))
}

// reroute sees that the default routes are on the networks that are the ways out now, and that the published ports lead there. leaving, if
// any, is an endpoint that has them still.
func (r *run) reroute(ctx context.Context, leaving *network.Endpoint) error {
	ats := slices.DeleteFunc(slices.Clone(r.m.attachments()), func(at container.Attachment) bool { return r.on(at) == nil })
	if len(ats) == 0 {
		return nil
	}
	out, err := r.m.waysOut(ctx, ats)
	if err != nil {
		return err
	}
	at := func(k int) *network.Endpoint {
		if k < 0 {
			return nil
		}
		return r.on(ats[k])
	}
	if first := at(out.main); first != nil {
		r.eps = slices.Insert(slices.DeleteFunc(r.eps, func(e *network.Endpoint) bool { return e == first }), 0, first)
	}
	netns, err := r.netns()
	if err != nil {
		return err
	}
	defer netns.Close()
	if err := r.m.nets.Route(r.eps, at(out.four), at(out.six), netns); err != nil {
		return err
	}
	return r.republish(ctx, leaving)
}

// on is the endpoint that an attachment has become; nil without one.
func (r *run) on(at container.Attachment) *network.Endpoint {
	for _, e := range r.eps {
		if e.NetworkID == at.NetworkID || e.NetworkName == at.Network {
			return e
		}
	}
	return nil
}

// publisher is the endpoint that published ports lead to: the way out if it is a bridge's, else another one that is.
func (r *run) publisher() *network.Endpoint {
	for _, e := range r.eps {
		if e.Driver == network.DriverBridge {
			return e
		}
	}
	return nil
}

// publish makes the reserved ports reach the container.
func (r *run) publish(ctx context.Context) error {
	to := r.publisher()
	if r.res == nil || to == nil {
		return nil
	}
	r.res.Inside(r.netns)
	return r.m.nets.Publish(ctx, to, r.res)
}

// republish moves the published ports to the endpoint that they are to lead to. The host's ports stay the same, and nobody finds them closed, unless
// the network binds them to another address of the host.
func (r *run) republish(ctx context.Context, leaving *network.Endpoint) error {
	to, from := r.publisher(), leaving
	for _, e := range r.eps {
		if len(e.Ports) > 0 {
			from = e
		}
	}
	switch {
	case to != nil && len(to.Ports) > 0:
		return nil
	case from == nil || len(from.Ports) == 0:
	case to == nil:
		return r.unpublish(from)
	default:
		r.ports = from.Ports
		ports, err := r.wanted(ctx)
		if err != nil {
			return err
		}
		if r.res != nil && alike(ports, from.Ports) {
			return r.m.nets.Move(ctx, from, to, r.res)
		}
		if err := r.unpublish(from); err != nil {
			return err
		}
	}
	if to == nil {
		return nil
	}
	if err := r.reserve(ctx); err != nil {
		return err
	}
	return r.publish(ctx)
}

// alike reports whether two lists are of the same ports of the host for the same of the container.
func alike(a, b []portmap.Mapping) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(m portmap.Mapping) bool { return !slices.ContainsFunc(b, m.Same) })
}

// unpublish takes the published ports from an endpoint, if it has them.
func (r *run) unpublish(ep *network.Endpoint) error {
	if len(ep.Ports) == 0 {
		return nil
	}
	r.ports = ep.Ports // which host ports they have had
	if r.res != nil {
		if err := r.res.Close(); err != nil {
			return err
		}
		r.res = nil
	}
	return r.m.nets.Unpublish(ep)
}

// interfaceName is what an interface inside is called: as its options say, else the network's prefix with the next number, of which none is
// used again while the container runs.
func (r *run) interfaceName(i network.Info, at container.Attachment) string {
	if name := at.DriverOpts[network.EndpointIfname]; name != "" {
		return name
	}
	if r.numbers == nil {
		r.numbers = map[string]int{}
	}
	prefix := i.Prefix()
	n := r.numbers[prefix]
	r.numbers[prefix]++
	return prefix + strconv.Itoa(n)
}

// bind says where on the host the ports are to be: where they were, if they were published before in this run, and on the address that the
// network names where the user named none.
func (r *run) bind(ctx context.Context, ats []container.Attachment, ports []portmap.Mapping) error {
	if len(ports) == 0 {
		return nil
	}
	out, err := r.m.waysOut(ctx, ats)
	if err != nil {
		return err
	}
	i, err := r.m.networkOf(ctx, ats[max(out.main, 0)])
	if err != nil {
		return err
	}
	had := slices.Clone(r.ports)
	for k := range ports {
		p := &ports[k]
		if !p.HostIP.IsValid() {
			p.HostIP = i.Binding()
		}
		if p.HostPort != 0 && p.HostPortEnd <= p.HostPort {
			continue
		}
		j := slices.IndexFunc(had, func(o portmap.Mapping) bool {
			return o.Proto == p.Proto && o.ContainerPort == p.ContainerPort && o.HostIP == p.HostIP
		})
		if j >= 0 {
			p.HostPort, p.HostPortEnd = had[j].HostPort, 0
			had = slices.Delete(had, j, j+1)
		}
	}
	return nil
}
