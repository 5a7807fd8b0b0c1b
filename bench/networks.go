package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
		{name: "net-1GB-over-veth", unit: "%", target: 5, once: between(func(p, bare *pair) (float64, error) {
			ours, theirs, err := inTurns(p, bare, func(p *pair) (float64, error) { return p.send(1 << 29) })
			return 100 * (ours/theirs - 1), err
		})},
		{name: "net-rtt-over-veth", unit: "µs", target: 5, once: between(func(p, bare *pair) (float64, error) {
			ours, theirs, err := inTurns(p, bare, func(p *pair) (float64, error) { return p.roundTrip(5000) })
			return ours - theirs, err
		})},
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

// inTurns measures two things three times each, in turns, and returns the medians.
func inTurns(p, bare *pair, measure func(*pair) (float64, error)) (ours, theirs float64, err error) {
	var a, b []float64
	for range 3 {
		x, err := measure(p)
		if err != nil {
			return 0, 0, err
		}
		y, err := measure(bare)
		if err != nil {
			return 0, 0, err
		}
		a, b = append(a, x), append(b, y)
	}
	return median(a), median(b), nil
}

// pair is two network namespaces with a way from one to the other.
type pair struct {
	from, to *os.File
	addr     string // of to
}

// between measures on two containers of the default network, and has a bare pair of veths of the same MTU beside them.
func between(measure func(p, bare *pair) (float64, error)) func(*bench, *engine, int) (float64, error) {
	return func(_ *bench, e *engine, _ int) (v float64, err error) {
		if err := e.inNetns(bridgeFilterOff); err != nil {
			return 0, err
		}
		names := []string{"bench-from", "bench-to"}
		defer func() { err = errors.Join(err, e.remove(names...)) }()
		var ns [2]*os.File
		for i, name := range names {
			if err := e.do("run", "-d", "--name", name, image, "sleep", "1000"); err != nil {
				return 0, err
			}
			pid, err := e.output("inspect", "-f", "{{.State.Pid}}", name)
			if err != nil {
				return 0, err
			}
			if ns[i], err = os.Open("/proc/" + strings.TrimSpace(pid) + "/ns/net"); err != nil {
				return 0, err
			}
			defer ns[i].Close()
		}
		p := &pair{from: ns[0], to: ns[1]}
		mtu := 0
		err = inside(p.to, func() error {
			i, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			addrs, err := i.Addrs()
			if err != nil {
				return err
			}
			if len(addrs) == 0 {
				return errors.New("eth0 has no address")
			}
			ip, _, err := net.ParseCIDR(addrs[0].String())
			p.addr, mtu = ip.String(), i.MTU
			return err
		})
		if err != nil {
			return 0, err
		}
		bare, err := barePair(mtu)
		if err != nil {
			return 0, err
		}
		defer bare.from.Close()
		defer bare.to.Close()
		return measure(p, bare)
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

// barePair makes two namespaces that a veth pair joins.
func barePair(mtu int) (p *pair, err error) {
	p = &pair{addr: "192.0.2.2"}
	if p.from, err = newNetns(); err != nil {
		return nil, err
	}
	if p.to, err = newNetns(); err != nil {
		p.from.Close()
		return nil, err
	}
	configure := func(name, addr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	}
	err = inside(p.from, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "a", mtu
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "b", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(p.to.Fd())}); err != nil {
			return err
		}
		return configure("a", "192.0.2.1/24")
	})
	if err == nil {
		err = inside(p.to, func() error { return configure("b", p.addr+"/24") })
	}
	if err != nil {
		p.from.Close()
		p.to.Close()
		return nil, fmt.Errorf("bare veth pair: %w", err)
	}
	return p, nil
}

func inside(ns *os.File, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// connect opens a connection between the two, with serve at its other end. What serve returns comes from wait.
func (p *pair) connect(serve func(net.Conn) error) (c net.Conn, wait func() error, err error) {
	var l net.Listener
	if err := inside(p.to, func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(p.addr, "5001")); return err }); err != nil {
		return nil, nil, err
	}
	done := make(chan error, 1)
	go func() {
		defer l.Close()
		s, err := l.Accept()
		if err == nil {
			err = errors.Join(serve(s), s.Close())
		}
		done <- err
	}()
	if err := inside(p.from, func() (err error) { c, err = net.Dial("tcp", l.Addr().String()); return err }); err != nil {
		l.Close()
		<-done
		return nil, nil, err
	}
	return c, func() error { return <-done }, nil
}

// send returns how many milliseconds so many bytes take until the other end has them.
func (p *pair) send(bytes int) (float64, error) {
	c, wait, err := p.connect(func(s net.Conn) error {
		b := make([]byte, 256<<10)
		for n := 0; n < bytes; {
			k, err := s.Read(b)
			if err != nil {
				return err
			}
			n += k
		}
		_, err := s.Write(b[:1])
		return err
	})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	b := make([]byte, 256<<10)
	began := time.Now()
	for n := 0; n < bytes; n += len(b) {
		if _, err := c.Write(b); err != nil {
			return 0, errors.Join(err, wait())
		}
	}
	_, err = io.ReadFull(c, b[:1])
	took := float64(time.Since(began)) / 1e6
	return took, errors.Join(err, wait())
}

// roundTrip returns the median of so many questions and answers of a byte, in microseconds.
func (p *pair) roundTrip(times int) (float64, error) {
	c, wait, err := p.connect(func(s net.Conn) error {
		_, err := io.Copy(s, s)
		return err
	})
	if err != nil {
		return 0, err
	}
	var took []float64
	b := make([]byte, 1)
	for range times {
		began := time.Now()
		if _, err = c.Write(b); err == nil {
			_, err = io.ReadFull(c, b)
		}
		if err != nil {
			break
		}
		took = append(took, float64(time.Since(began))/1e3)
	}
	err = errors.Join(err, c.Close(), wait())
	if len(took) == 0 {
		return 0, err
	}
	return median(took), err
}
