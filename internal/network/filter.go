package network

import (
	"net/netip"

	"conex/internal/egress"
)

// filter are the options of an endpoint's filter; nil without one.
func (i Info) filter(ep *Endpoint, e *Egress) *egress.Options {
	if e == nil {
		return nil
	}
	o := &egress.Options{Interface: ep.HostInterface, List: e.List, Group: e.Group}
	for _, a := range []netip.Prefix{ep.Address, ep.Address6} {
		if a.IsValid() {
			o.Addrs = append(o.Addrs, a.Addr())
		}
	}
	o.Addrs = append(o.Addrs, ep.LinkLocal...)
	if ep.Address6.IsValid() {
		o.Link6 = append(o.Link6, ep.Address6)
	}
	return o
}

// Denied lists what a container tried to reach lately and was not allowed to.
func (m *Manager) Denied(containerID string) ([]egress.Attempt, error) {
	eps, err := m.Endpoints(containerID)
	if err != nil {
		return nil, err
	}
	var out []egress.Attempt
	for _, ep := range eps {
		if !ep.Filtered {
			continue
		}
		list, err := egress.Denied(ep.HostInterface)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}
