package network

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/egress"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// Survey is how a root's networks stand in the kernel.
type Survey struct {
	// Networks are those that have a bridge now, Endpoints those of containers on all of them.
	Networks  []Info
	Endpoints []*Endpoint
	// Faults keep containers from what they should reach; Leaked are interfaces that nobody has, and filters of such; Foreign are bridges of conex's
	// that belong to no network of this root, another root's as a rule.
	Faults, Leaked, Foreign []string
	// Findings are what others do to the networks: see portmap.Audit.
	Findings []portmap.Finding
}

// Survey compares records and kernel. Unlike all else here it makes, mends and locks nothing.
func (m *Manager) Survey(ctx context.Context) (Survey, error) {
	var s Survey
	list, err := m.records()
	if err != nil {
		return s, err
	}
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		return s, fmt.Errorf("list interfaces: %w", err)
	}
	ports := map[int]bool{} // bridges of this root
	plugged := map[string]bool{}
	for _, i := range list {
		eps, err := m.endpoints(i.ID)
		if err != nil {
			return s, err
		}
		s.Endpoints = append(s.Endpoints, eps...)
		for _, ep := range eps {
			plugged[ep.HostInterface] = true
		}
		if i.Interface == "" || i.blank() {
			continue
		}
		br, ok, err := m.standing(i)
		if err != nil {
			return s, err
		}
		switch {
		case br.index == 0 && len(eps) > 0:
			s.Faults = append(s.Faults, fmt.Sprintf("bridge %s of network %s is gone: its containers reach nothing", i.Interface, i.Name))
		case br.index == 0: // made when it is needed
		case !ok && len(eps) > 0:
			s.Faults = append(s.Faults, fmt.Sprintf("bridge %s of network %s is down, or has lost its address %s", i.Interface, i.Name, i.subnets()))
		}
		if br.index != 0 {
			ports[int(br.index)] = true
			s.Networks = append(s.Networks, i)
		}
	}
	if s.Leaked, err = unplugged(ctx, ports, plugged); err != nil {
		return s, err
	}
	for _, l := range links {
		a := l.Attrs()
		switch {
		case l.Type() == "bridge" && ours(a.Name) && !slices.ContainsFunc(list, func(i Info) bool { return i.Interface == a.Name }):
			s.Foreign = append(s.Foreign, a.Name)
		}
	}
	filters, err := egress.Interfaces()
	if err != nil {
		return s, err
	}
	for _, name := range filters {
		if !plugged[name] && !slices.ContainsFunc(links, func(l rtnetlink.Link) bool { return l.Attrs().Name == name }) {
			s.Leaked = append(s.Leaked, "the filter of "+name)
		}
	}
	var bridges []portmap.Audited
	for _, i := range s.Networks {
		if i.Driver == DriverBridge {
			bridges = append(bridges, portmap.Audited{Bridge: i.bridge(), Six: i.IPv6.Valid()})
		}
	}
	if len(bridges) == 0 {
		return s, nil
	}
	if on, err := switchedOn(forwardFile4); err != nil {
		return s, err
	} else if !on && len(s.Endpoints) > 0 { // else the next container switches it on
		s.Faults = append(s.Faults, "net.ipv4.ip_forward is 0: containers reach nothing outside the host, and nothing outside reaches them")
	}
	t, err := m.table(ctx)
	if err != nil {
		return s, err
	}
	for _, b := range bridges {
		ok, err := portmap.Standing(t, b.Bridge)
		if err != nil {
			return s, err
		}
		if !ok {
			s.Faults = append(s.Faults, fmt.Sprintf("nftables table %s is gone, was changed, or lacks bridge %s: published ports and the way out do not work", t.Name, b.Name))
			break
		}
	}
	out, err := m.upUplinks()
	if err != nil {
		return s, err
	}
	s.Findings, err = portmap.Audit(ctx, t, bridges, out)
	return s, err
}

// takedown is how long a veth may be there after its container: the kernel ends namespaces in its own time.
const takedown = 2 * time.Second

// unplugged lists veths on the bridges that no endpoint has, and that don't go by themselves.
func unplugged(ctx context.Context, bridges map[int]bool, plugged map[string]bool) ([]string, error) {
	for end := time.Now().Add(takedown); ; {
		links, err := netlink.Dump(rtnetlink.LinkList)
		if err != nil {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		var left []string
		for _, l := range links {
			if a := l.Attrs(); strings.HasPrefix(a.Name, linkPrefix) && bridges[a.MasterIndex] && !plugged[a.Name] {
				left = append(left, a.Name)
			}
		}
		if len(left) == 0 || time.Now().After(end) {
			return left, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(takedown / 40):
		}
	}
}
