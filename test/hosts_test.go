package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// place is a machine or a container, as a network namespace: servers and clients run in it without a process of their own there.
type place struct {
	name string
	ns   *os.File
	// addrs are where it is found, IPv4 and IPv6.
	addrs [2]netip.Addr
}

// Two hosts on a local network, and one behind a router:
//
//	outside ── router ──┬── host (conex, and its containers behind it)
//	                    └── neighbour
type hosts struct {
	t                                testing.TB
	outside, router, host, neighbour *place
}

const (
	outsideNet4, outsideNet6 = "203.0.113.%d/24", "2001:db8:ff::%d/64"
	lanNet4, lanNet6         = "198.51.100.%d/24", "2001:db8:1::%d/64"
)

// newHosts makes the machines; ns is the host's network namespace.
func newHosts(t *testing.T, ns *os.File) *hosts {
	t.Helper()
	h := &hosts{t: t, host: &place{name: "host", ns: ns}}
	for _, p := range []struct {
		p    **place
		name string
	}{{&h.outside, "outside"}, {&h.router, "router"}, {&h.neighbour, "neighbour"}} {
		*p.p = &place{name: p.name, ns: newNetns(t)}
		t.Cleanup(func() { (*p.p).ns.Close() })
	}
	for _, p := range []*place{h.outside, h.router, h.host, h.neighbour} {
		h.must(p.in(settledLinks))
	}
	// The local network is a bridge in the router.
	h.must(h.router.in(func() error {
		if err := forwarding(); err != nil {
			return err
		}
		attrs := rtnetlink.NewLinkAttrs()
		attrs.Name = "lan"
		return rtnetlink.LinkAdd(&rtnetlink.Bridge{LinkAttrs: attrs})
	}))
	h.cable(h.router, "host0", h.host, "uplink0")
	h.cable(h.router, "neighbour0", h.neighbour, "uplink0")
	h.cable(h.router, "outside0", h.outside, "uplink0")
	// What else the host makes has the kernel's own way.
	h.must(h.host.in(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("1"), 0) }))
	h.must(h.router.in(func() error {
		lan, err := rtnetlink.LinkByName("lan")
		if err != nil {
			return err
		}
		for _, port := range []string{"host0", "neighbour0"} {
			l, err := rtnetlink.LinkByName(port)
			if err == nil {
				err = rtnetlink.LinkSetMaster(l, lan)
			}
			if err != nil {
				return err
			}
		}
		return errors.Join(address("lan", lanNet4, lanNet6, 1), address("outside0", outsideNet4, outsideNet6, 1))
	}))
	for n, p := range []*place{h.host, h.neighbour} {
		h.must(p.in(func() error {
			return errors.Join(address("uplink0", lanNet4, lanNet6, n+2), defaultBy("uplink0", lanNet4, lanNet6, 1))
		}))
		p.addrs = [2]netip.Addr{at(lanNet4, n+2), at(lanNet6, n+2)}
	}
	h.must(h.outside.in(func() error {
		return errors.Join(address("uplink0", outsideNet4, outsideNet6, 9), defaultBy("uplink0", outsideNet4, outsideNet6, 1))
	}))
	h.outside.addrs = [2]netip.Addr{at(outsideNet4, 9), at(outsideNet6, 9)}
	return h
}

// settledLinks lets the link-local addresses of interfaces to come count at once, as those of machines that run for a while do.
func settledLinks() error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0)
}

func (h *hosts) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// in runs fn in the place.
func (p *place) in(fn func() error) error { return netlink.In(p.ns, fn) }

func at(format string, n int) netip.Addr { return netip.MustParsePrefix(fmt.Sprintf(format, n)).Addr() }

// cable joins two places with a veth pair.
func (h *hosts) cable(a *place, aName string, b *place, bName string) {
	h.t.Helper()
	h.must(a.in(func() error {
		attrs := rtnetlink.NewLinkAttrs()
		attrs.Name = aName
		err := rtnetlink.LinkAdd(&rtnetlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: rtnetlink.NsFd(b.ns.Fd())})
		return errors.Join(err, up(aName))
	}))
	h.must(b.in(func() error { return up(bName) }))
}

func up(name string) error {
	l, err := rtnetlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return rtnetlink.LinkSetUp(l)
}

// address gives an interface of the present namespace its addresses, which count at once, and brings it up.
func address(name, net4, net6 string, n int) error {
	l, err := rtnetlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, format := range []string{net4, net6} {
		a, err := rtnetlink.ParseAddr(fmt.Sprintf(format, n))
		if err != nil {
			return err
		}
		a.Flags = unix.IFA_F_NODAD
		if err := rtnetlink.AddrAdd(l, a); err != nil {
			return err
		}
	}
	return rtnetlink.LinkSetUp(l)
}

func defaultBy(name, net4, net6 string, n int) error {
	l, err := rtnetlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, format := range []string{net4, net6} {
		if err := rtnetlink.RouteAdd(&rtnetlink.Route{LinkIndex: l.Attrs().Index, Gw: at(format, n).AsSlice()}); err != nil {
			return err
		}
	}
	return nil
}

func forwarding() error {
	return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
}

// routeBy adds a route through another place of the local network.
func (p *place) routeBy(via *place, to netip.Prefix) error {
	return p.in(func() error {
		l, err := rtnetlink.LinkByName("uplink0")
		if err != nil {
			return err
		}
		gw := via.addrs[0]
		if to.Addr().Is6() {
			gw = via.addrs[1]
		}
		dst := &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}
		return rtnetlink.RouteReplace(&rtnetlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: gw.AsSlice()})
	})
}

// container is the place of a running container.
func (w *world) container(name string) *place {
	w.t.Helper()
	f := strings.Fields(w.conex("inspect", "-f", "{{.State.Pid}}{{range .NetworkSettings.Networks}} {{.IPAddress}} {{.GlobalIPv6Address}}{{end}}", name))
	ns, err := os.Open("/proc/" + f[0] + "/ns/net")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ns.Close() })
	p := &place{name: name, ns: ns}
	for i, a := range f[1:min(len(f), 3)] {
		if p.addrs[i], err = netip.ParseAddr(a); err != nil {
			w.t.Fatalf("address of %s: %v", name, err)
		}
	}
	return p
}

// serve answers on a port of every address that the place has now, TCP and UDP, with its name and the asker's address. It returns what
// ends it and waits for that. One listener an address: an answer to a datagram leaves from where the question went to.
func (p *place) serve(port uint16) (stop func(), err error) {
	var addrs []net.Addr
	if err := p.in(func() (err error) { addrs, err = net.InterfaceAddrs(); return err }); err != nil {
		return nil, err
	}
	var done sync.WaitGroup
	var open []io.Closer
	stop = func() {
		for _, c := range open {
			c.Close()
		}
		done.Wait()
	}
	for _, a := range addrs {
		ip := netip.MustParsePrefix(a.String()).Addr()
		if ip.IsLinkLocalUnicast() {
			continue
		}
		listen := netip.AddrPortFrom(ip, port).String()
		err := p.in(func() error {
			l, err := net.Listen("tcp", listen)
			if err != nil {
				return err
			}
			open = append(open, l)
			done.Go(func() { p.answerTCP(l) })
			u, err := net.ListenPacket("udp", listen)
			if err != nil {
				return err
			}
			open = append(open, u)
			done.Go(func() { p.answerUDP(u) })
			return nil
		})
		if err != nil {
			stop()
			return nil, fmt.Errorf("serve in %s: %w", p.name, err)
		}
	}
	return stop, nil
}

func (p *place) answerTCP(l net.Listener) {
	var done sync.WaitGroup
	defer done.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed
		}
		done.Go(func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
				fmt.Fprintf(c, "%s %s", p.name, addrOf(c.RemoteAddr()))
			}
		})
	}
}

func (p *place) answerUDP(u net.PacketConn) {
	b := make([]byte, 16)
	for {
		_, from, err := u.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			u.WriteTo([]byte(p.name+" "+addrOf(from).String()), from) //nolint:errcheck // a lost answer: the asker asks again
		}
	}
}

func addrOf(a net.Addr) netip.Addr { return netip.MustParseAddrPort(a.String()).Addr().Unmap() }

// errSilent says that there was no answer, for whatever reason.
var errSilent = errors.New("no answer")

// ask returns who answers and the address that it saw. UDP is asked several times: a datagram may be lost, and the first one often
// waits for a neighbour's hardware address.
func (p *place) ask(proto string, to netip.AddrPort, patience time.Duration) (who string, seen netip.Addr, err error) {
	var answer string
	err = p.in(func() error {
		c, err := net.DialTimeout(proto, to.String(), patience)
		if err != nil {
			return errors.Join(errSilent, err)
		}
		defer c.Close()
		tries := 1
		if proto == "udp" {
			tries = 4
		}
		b := make([]byte, 128)
		for range tries {
			c.SetDeadline(time.Now().Add(patience / time.Duration(tries)))
			if _, err = c.Write([]byte{'?'}); err != nil {
				continue
			}
			var n int
			if n, err = c.Read(b); err == nil {
				answer = string(b[:n])
				return nil
			}
		}
		return errors.Join(errSilent, err)
	})
	if err != nil {
		return "", netip.Addr{}, err
	}
	who, addr, _ := strings.Cut(answer, " ")
	seen, err = netip.ParseAddr(addr)
	return who, seen, err
}

// run runs a command in the place.
func (p *place) run(stdin string, args ...string) error {
	return p.in(func() error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	})
}
