package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
)

// networkMeasurements are what networks cost: at a start, and on the way of a packet. Both ends of a connection are this program's sockets
// in the two containers' network namespaces, so that what is measured is the way between them.
func networkMeasurements() []measurement {
	return []measurement{
		{name: "network-create", target: 10, once: func(_ *bench, e *engine, _ int) (float64, error) {
			v, err := e.timed("network", "create", "bench-network")
			return then(v, err, func() error { return e.do("network", "rm", "bench-network") })
		}},
		{name: "bridge-extra", target: 8, once: extra([]string{"--network", "none"}, nil)},
		{name: "port-extra", target: 5, once: extra(nil, []string{"-p", "18473:80"})},
		{name: "net-1GB", once: between(func(p, _ *pair) (float64, error) { return p.send(1 << 30) })},
		{name: "net-1GB-over-veth", unit: "%", target: 5, once: between(slower)},
		{name: "net-1GB-host-over-veth", unit: "%", target: 5, once: hosted(slower)},
		{name: "net-rtt-host-over-veth", unit: "µs", target: 5, once: hosted(later)},
		{name: "net-rtt-over-veth", unit: "µs", target: 5, once: between(later)},
		// Who comes from outside has a router on his way, the host: what is compared is a way by a router that has the bridge and a firewall with
		// states, and publishes nothing.
		{name: "port-throughput", unit: "%", target: 5, once: published(slower)},
		{name: "port-rtt", unit: "µs", target: 5, once: published(later)},
	}
}

// extra is what a run costs more with some flags than with others, measured one after the other.
func extra(without, with []string) func(*bench, *engine, int) (float64, error) {
	return func(_ *bench, e *engine, _ int) (float64, error) {
		less, err := e.timed(slices.Concat([]string{"run", "--rm"}, without, []string{image, "true"})...)
		if err != nil {
			return 0, err
		}
		more, err := e.timed(slices.Concat([]string{"run", "--rm"}, with, []string{image, "true"})...)
		return more - less, err
	}
}

// between measures on two containers of the default network, and has a bare pair of veths of the same MTU beside them.
func between(measure func(p, bare *pair) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(_ *bench, e *engine, _ int) (v float64, err error) {
		defer func() { err = errors.Join(err, e.remove("bench-from", "bench-to")) }()
		from, _, _, err := e.networked("bench-from")
		if err != nil {
			return 0, err
		}
		defer from.Close()
		return besideBare(e, from, measure)
	}
}

// hosted measures on the host and a container of its default network, which a veth pair and the bridge join, and has a bare pair beside them: what
// the bridge costs. Two containers are joined by two pairs.
func hosted(measure func(p, bare *pair) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(_ *bench, e *engine, _ int) (v float64, err error) {
		defer func() { err = errors.Join(err, e.remove("bench-to")) }()
		return besideBare(e, e.netns, measure)
	}
}

// besideBare measures from a namespace to a container that it runs.
func besideBare(e *engine, from *os.File, measure func(p, bare *pair) (float64, error)) (float64, error) {
	to, addr, mtu, err := e.networked("bench-to")
	if err != nil {
		return 0, err
	}
	defer to.Close()
	bare, err := barePair(mtu)
	if err != nil {
		return 0, err
	}
	defer bare.close()
	return measure(&pair{from: from, to: to, addr: addr}, bare)
}

// networked runs a container that waits, and says where it is found.
func (e *engine) networked(name string, args ...string) (ns *os.File, addr netip.Addr, mtu int, err error) {
	if err := e.inNetns(bridgeFilterOff); err != nil {
		return nil, addr, 0, err
	}
	if err := e.do(slices.Concat([]string{"run", "-d", "--name", name}, args, []string{image, "sleep", "1000"})...); err != nil {
		return nil, addr, 0, err
	}
	if ns, err = e.namespaceOf(name); err != nil {
		return nil, addr, 0, err
	}
	if addr, mtu, err = addressIn(ns); err != nil {
		ns.Close()
	}
	return ns, addr, mtu, err
}

// addressIn is eth0's IPv4 address and MTU in a namespace.
func addressIn(ns *os.File) (addr netip.Addr, mtu int, err error) {
	err = inside(ns, func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		mtu = i.MTU
		addrs, err := i.Addrs()
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
				addr = p.Addr()
				return nil
			}
		}
		return errors.New("eth0 has no address")
	})
	return addr, mtu, err
}

// published measures between an outsider and a container's published port, and has the way by a bridge that publishes nothing beside it.
func published(measure func(p, bare *pair) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(_ *bench, e *engine, _ int) (v float64, err error) {
		defer func() { err = errors.Join(err, e.remove("bench-to")) }()
		to, _, mtu, err := e.networked("bench-to", "-p", fmt.Sprintf("%d:%d", portOutside, portInside))
		if err != nil {
			return 0, err
		}
		defer to.Close()
		outsider, err := newNetns()
		if err != nil {
			return 0, err
		}
		defer outsider.Close()
		host := netip.MustParseAddr("198.51.100.1")
		if err := join(outsider, e.netns, mtu, "bench-out", host.Next(), host); err != nil {
			return 0, err
		}
		defer func() {
			err = errors.Join(err, e.inNetns(func() error {
				l, err := netlink.LinkByName("bench-out")
				if err != nil {
					return err
				}
				return netlink.LinkDel(l)
			}))
		}()
		bare, err := bridgedPair(mtu)
		if err != nil {
			return 0, err
		}
		defer bare.close()
		return measure(&pair{from: outsider, to: to, addr: host, port: portOutside}, bare)
	}
}

// bridgeFilterOff keeps what one container sends another out of the host's firewall. A new namespace begins with that where some program
// has loaded br_netfilter, and the measure would be of the firewall.
func bridgeFilterOff() error {
	for _, family := range []string{"iptables", "ip6tables", "arptables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+family, []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
