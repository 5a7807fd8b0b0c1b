package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The port that the receiving end of a pair listens on, and what it is published as.
const portInside, portOutside = 5001, 15001

// pair is two network namespaces with a way from one to the other.
type pair struct {
	from, to *os.File
	addr     netip.Addr // where from finds to
	port     uint16     // portInside unless it is published as another
	between  *os.File   // a router on the way that goes with the pair; may be nil
}

func (p *pair) close() {
	for _, f := range []*os.File{p.from, p.to, p.between} {
		if f != nil {
			f.Close()
		}
	}
}

// barePair makes two namespaces that a veth pair joins.
func barePair(mtu int) (p *pair, err error) {
	p = &pair{addr: netip.MustParseAddr("192.0.2.2")}
	defer func() {
		if err != nil {
			p.close()
			err = fmt.Errorf("bare veth pair: %w", err)
		}
	}()
	if p.from, err = newNetns(); err != nil {
		return nil, err
	}
	if p.to, err = newNetns(); err != nil {
		return nil, err
	}
	return p, join(p.to, p.from, mtu, "veth", p.addr, p.addr.Prev())
}

// bridgedPair makes two namespaces with a router between them, which has a bridge on the side of the second and tracks connections, as any
// host does that has a firewall with states: the way to a container without who publishes its ports. Connection tracking alone is 4 to 6 us of
// a round trip.
func bridgedPair(mtu int) (p *pair, err error) {
	p = &pair{addr: netip.MustParseAddr("203.0.113.2")}
	defer func() {
		if err != nil {
			p.close()
			err = fmt.Errorf("bare bridge: %w", err)
		}
	}()
	for _, f := range []**os.File{&p.from, &p.to, &p.between} {
		if *f, err = newNetns(); err != nil {
			return nil, err
		}
	}
	client := netip.MustParseAddr("198.51.100.2")
	if err := join(p.from, p.between, mtu, "veth0", client, client.Prev()); err != nil {
		return nil, err
	}
	if err := join(p.to, p.between, mtu, "veth1", p.addr, p.addr.Prev()); err != nil {
		return nil, err
	}
	return p, inside(p.between, func() error {
		if err := bridged("veth1", mtu, p.addr.Prev()); err != nil {
			return err
		}
		if err := trackConnections(); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	})
}

// bridged puts an interface of this thread's namespace below a new bridge, which gets its address.
func bridged(name string, mtu int, addr netip.Addr) error {
	port, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "bridge0", mtu
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	a, err := netlink.ParseAddr(netip.PrefixFrom(addr, 24).String())
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(port, a); err != nil {
		return err
	}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	a.Label = ""
	return errors.Join(netlink.LinkSetMaster(port, bridge), netlink.AddrAdd(bridge, a), netlink.LinkSetUp(bridge))
}

// trackConnections has this thread's namespace forward what belongs to a connection by a rule of its own, and all else too.
func trackConnections() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "bench"})
	chain := c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}})
	return c.Flush()
}

// join connects a namespace by a veth pair with another, which is its way out. name is the interface in that one.
func join(ns, with *os.File, mtu int, name string, addr, gateway netip.Addr) error {
	configure := func(name string, addr netip.Addr) (netlink.Link, error) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return nil, err
		}
		a, err := netlink.ParseAddr(netip.PrefixFrom(addr, 24).String())
		if err != nil {
			return nil, err
		}
		return l, errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	}
	err := inside(with, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, mtu
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns.Fd())}); err != nil {
			return err
		}
		_, err := configure(name, gateway)
		return err
	})
	if err != nil {
		return err
	}
	return inside(ns, func() error {
		l, err := configure("eth0", addr)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice()})
	})
}

func inside(ns *os.File, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// connection is a TCP connection between the two ends of a pair, blocking sockets that are used by two threads, each on a processor of its own:
// what is compared is the way, not where the scheduler puts who waits.
type connection struct{ client, server int }

// silence is how long an end may hear nothing.
const silence = 20 * time.Second

func (p *pair) connect() (c *connection, err error) {
	ends := &connection{-1, -1}
	listener := -1
	defer func() {
		if listener >= 0 {
			unix.Close(listener)
		}
		if err != nil {
			ends.close()
		}
	}()
	socket := func() (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return -1, os.NewSyscallError("socket", err)
		}
		limit := unix.NsecToTimeval(int64(silence))
		return fd, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	err = inside(p.to, func() (err error) {
		if listener, err = socket(); err != nil {
			return err
		}
		return errors.Join(unix.Bind(listener, &unix.SockaddrInet4{Port: portInside}), unix.Listen(listener, 1))
	})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	port := portInside
	if p.port != 0 {
		port = int(p.port)
	}
	err = inside(p.from, func() (err error) {
		if ends.client, err = socket(); err != nil {
			return err
		}
		// Go's signals interrupt it; it goes on, and the next call says how it stands.
		for {
			err := unix.Connect(ends.client, &unix.SockaddrInet4{Port: port, Addr: p.addr.As4()})
			if err == unix.EISCONN {
				return nil
			}
			if err != unix.EINTR && err != unix.EALREADY {
				return err
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", p.addr, err)
	}
	for ends.server, err = -1, unix.EINTR; err == unix.EINTR; {
		ends.server, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("accept: %w", err)
	}
	return ends, unix.SetsockoptInt(ends.server, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

func (c *connection) close() {
	for _, fd := range []int{c.client, c.server} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// onProcessor runs fn on a thread that stays on the first or second of the processors that we may use.
func onProcessor(k int, fn func() error) error {
	return onThread(func() error {
		var all, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			return os.NewSyscallError("sched_getaffinity", err)
		}
		for cpu := 0; all.Count() >= 2 && cpu < len(all)*64; cpu++ {
			if !all.IsSet(cpu) {
				continue
			}
			if k--; k < 0 {
				one.Set(cpu)
				if err := unix.SchedSetaffinity(0, &one); err != nil {
					return os.NewSyscallError("sched_setaffinity", err)
				}
				break
			}
		}
		return fn()
	})
}

// both runs what the ends do until both are done.
func both(client, server func() error) error {
	done := make(chan error, 1)
	go func() { done <- onProcessor(1, server) }()
	err := onProcessor(0, client)
	return errors.Join(err, <-done)
}

// write and read are whole.
func write(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("write", err)
		}
		b = b[n:]
	}
	return nil
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, errors.New("read: the connection has ended")
		default:
			return n, nil
		}
	}
}

// send returns how many milliseconds so many bytes take until the other end has them.
func (c *connection) send(bytes int) (took float64, err error) {
	err = both(func() error {
		b := make([]byte, 256<<10)
		began := time.Now()
		for n := 0; n < bytes; n += len(b) {
			if err := write(c.client, b[:min(len(b), bytes-n)]); err != nil {
				return err
			}
		}
		_, err := read(c.client, b[:1])
		took = float64(time.Since(began)) / 1e6
		return err
	}, func() error {
		b := make([]byte, 256<<10)
		for n := 0; n < bytes; {
			k, err := read(c.server, b)
			if err != nil {
				return err
			}
			n += k
		}
		return write(c.server, b[:1])
	})
	return took, err
}

// roundTrip returns the median of so many questions and answers of a byte, in microseconds.
func (c *connection) roundTrip(times int) (float64, error) {
	took := make([]float64, 0, times)
	err := both(func() error {
		b := make([]byte, 1)
		for range times {
			began := time.Now()
			if err := write(c.client, b); err != nil {
				return err
			}
			if _, err := read(c.client, b); err != nil {
				return err
			}
			took = append(took, float64(time.Since(began))/1e3)
		}
		return nil
	}, func() error {
		b := make([]byte, 1)
		for range times {
			if _, err := read(c.server, b); err != nil {
				return err
			}
			if err := write(c.server, b); err != nil {
				return err
			}
		}
		return nil
	})
	return median(took), err
}

// send is connection.send on a new connection.
func (p *pair) send(bytes int) (float64, error) {
	c, err := p.connect()
	if err != nil {
		return 0, err
	}
	defer c.close()
	return c.send(bytes)
}

// inTurns measures on both pairs so many times, one after the other, first one then the other first, on a connection each that has had a turn
// before. It returns what compare makes of each two, in the median: what else the machine does falls on both.
func inTurns(p, bare *pair, times int, measure func(*connection) (float64, error), compare func(ours, theirs float64) float64) (float64, error) {
	var ends [2]*connection
	for k, p := range []*pair{p, bare} {
		c, err := p.connect()
		if err != nil {
			return 0, err
		}
		defer c.close()
		if _, err := measure(c); err != nil {
			return 0, err
		}
		ends[k] = c
	}
	var all []float64
	for i := range times {
		var v [2]float64
		for j := range 2 {
			k := (i + j) % 2
			var err error
			if v[k], err = measure(ends[k]); err != nil {
				return 0, err
			}
		}
		all = append(all, compare(v[0], v[1]))
	}
	return median(all), nil
}

// slower is by how many per cent a gigabyte, in pieces, takes longer than on the bare way.
func slower(p, bare *pair) (float64, error) {
	return inTurns(p, bare, 32, func(c *connection) (float64, error) { return c.send(32 << 20) }, func(ours, theirs float64) float64 { return 100 * (ours/theirs - 1) })
}

// later is how many microseconds a round trip takes longer than on the bare way.
func later(p, bare *pair) (float64, error) {
	return inTurns(p, bare, 20, func(c *connection) (float64, error) { return c.roundTrip(500) }, func(ours, theirs float64) float64 { return ours - theirs })
}
