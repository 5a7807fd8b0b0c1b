package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"conex/internal/egress"
)

// Bound puts a filter before an endpoint of a container that runs without one. What others began goes on.
func (m *Manager) Bound(ctx context.Context, ep *Endpoint, netns *os.File, e Egress) (err error) {
	if err := boundable(ep.Driver, ep.NetworkName); err != nil {
		return err
	}
	i, err := m.lookup(ctx, ep.NetworkID)
	if err != nil {
		return err
	}
	o := i.filter(ep, &e)
	if o.MAC, err = net.ParseMAC(ep.MAC); err != nil {
		return err
	}
	if o.Flows, err = begunByOthers(ep, netns); err != nil {
		return err
	}
	ep.Filtered = true // first: whoever settles it shall look for one
	if err := m.rewriteEndpoint(ep); err != nil {
		return err
	}
	if ep.Filter, err = egress.Install(*o); err != nil {
		ep.Filtered = false
		return errors.Join(err, m.rewriteEndpoint(ep))
	}
	return nil
}

// Unbound takes an endpoint's filter away.
func (m *Manager) Unbound(ep *Endpoint) error {
	if !ep.Filtered {
		return nil
	}
	if err := ep.Filter.Close(); err != nil { // only its owner may; it still stands
		return err
	}
	if err := egress.Remove(ep.HostInterface); err != nil {
		return err
	}
	ep.Filter, ep.Filtered = nil, false
	return m.rewriteEndpoint(ep)
}

// boundable reports whether a network's endpoints can have a filter.
func boundable(driver, name string) error {
	if driver == DriverBridge {
		return nil
	}
	return fmt.Errorf("--egress: network %s has the driver %s, whose packets pass no interface of the host; use a bridge network", name, driver)
}

// filter are the options of an endpoint's filter; nil without one.
func (i Info) filter(ep *Endpoint, e *Egress) *egress.Options {
	if e == nil {
		return nil
	}
	o := &egress.Options{Interface: ep.HostInterface, List: e.List, Group: e.Group, Learnt: e.Learnt}
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
