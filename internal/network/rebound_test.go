package network

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/egress"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// echo answers every line of every TCP connection to a port.
func (c *container) echo(port int) {
	c.w.t.Helper()
	// Each family by its name: what Go finds out about both at once it finds out in the namespace that asks first.
	for _, family := range []string{"tcp4", "tcp6"} {
		var l net.Listener
		check(c.w.t, netlink.In(c.ns, func() (err error) {
			l, err = net.Listen(family, fmt.Sprintf(":%d", port))
			return err
		}))
		c.w.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					io.Copy(conn, conn)
				}()
			}
		}()
	}
}

// line is a connection that stays.
type line struct {
	t    *testing.T
	what string
	c    net.Conn
}

func (c *container) opens(what, addr string) *line {
	c.w.t.Helper()
	l := &line{t: c.w.t.(*testing.T), what: what}
	check(c.w.t, netlink.In(c.ns, func() (err error) {
		l.c, err = dial("tcp", addr)
		return err
	}))
	c.w.t.Cleanup(func() { l.c.Close() })
	l.lives("from the beginning", true)
	return l
}

func (l *line) lives(when string, want bool) {
	l.t.Helper()
	check(l.t, l.c.SetDeadline(time.Time{}))
	defer patient(l.c)()
	_, err := l.c.Write([]byte("x\n"))
	if err == nil {
		_, err = bufio.NewReader(l.c).ReadString('\n')
	}
	if (err == nil) != want {
		l.t.Errorf("%s: connection %s: %v, want it to live: %t", when, l.what, err, want)
	}
}

func listOf(t testing.TB, values ...string) egress.List {
	t.Helper()
	l, err := egress.Parse(values)
	check(t, err)
	return l
}

// TestEgressRebound bounds a container that runs, changes what it may reach, and frees it, and looks at connections that stand.
func TestEgressRebound(t *testing.T) {
	// The uplink asks for neighbours at once, not when nobody has contested its address for a second.
	check(t, os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0))
	w := newWorld(t)
	b := w.attach("bbb")
	b.echo(80)
	client := &container{ns: w.client, w: w}
	for _, p := range []int{80, 81, 82} {
		client.echo(p)
	}
	c := w.attach("ccc")
	c.echo(70)
	c.publish(portmap.Mapping{Proto: "tcp", HostPort: 7070, ContainerPort: 70})
	outside := netip.MustParseAddr(clientIP4)
	to80, to81, to82 := c.opens("to 80", at(outside, 80)), c.opens("to 81", at(outside, 81)), c.opens("to 82", at(outside, 82))
	to6 := c.opens("to 80 by IPv6", at(netip.MustParseAddr(clientIP6), 80))
	peer := c.opens("to a neighbour", at(b.ep.Address.Addr(), 80))
	answers := []*line{
		client.opens("by a published port", hostIP4+":7070"), client.opens("by a published port, IPv6", "["+hostIP6+"]:7070"),
		b.opens("of a neighbour", at(c.ep.Address.Addr(), 70)), b.opens("of a neighbour, IPv6", at(c.ep.Address6.Addr(), 70)),
		(&container{ns: thisNS(t), w: w}).opens("of the host", at(c.ep.Address.Addr(), 70)),
	}
	answered := func(when string) {
		t.Helper()
		for _, l := range answers {
			l.lives(when, true)
		}
	}

	check(t, w.m.Bound(t.Context(), c.ep, c.ns, Egress{List: listOf(t, "allow="+clientIP4+":80,web.test:81"), Learnt: egress.Learnt{outside: {"web.test": time.Time{}}}}))
	t.Cleanup(func() { check(t, w.m.Unbound(c.ep)) })
	const bounded = "bounded"
	to80.lives(bounded, true)
	to81.lives(bounded, true)
	to82.lives(bounded, false)
	to6.lives(bounded, false)
	peer.lives(bounded, false)
	answered(bounded)
	c.reaches(bounded, reach{"tcp", at(outside, 82), false}, reach{"tcp", at(b.ep.Address.Addr(), 80), false})
	eps, err := w.m.Endpoints("ccc")
	check(t, err)
	if len(eps) != 1 || !eps[0].Filtered {
		t.Errorf("endpoints %+v, want one that is recorded as filtered", eps)
	}

	// The same by another pattern, and without the address.
	const changed = "changed"
	named := egress.Learnt{outside: {"web.test": time.Now().Add(time.Minute), "old.test": time.Now().Add(-time.Minute)}}
	check(t, c.ep.Filter.Change(listOf(t, "allow=*.test:81,old.test:82"), named))
	to81.lives(changed, true)
	to80.lives(changed, false)
	answered(changed)
	c.opens("that begins by name", at(outside, 81))
	c.reaches(changed, reach{"tcp", at(outside, 80), false}, reach{"tcp", at(outside, 82), false})

	const denied = "denied"
	check(t, c.ep.Filter.Change(listOf(t, "deny"), named))
	to81.lives(denied, false)
	answered(denied)
	c.reaches(denied, reach{"tcp", at(outside, 81), false})

	const free = "freed"
	check(t, w.m.Unbound(c.ep))
	answered(free)
	c.opens("to anybody", at(outside, 82))
	c.opens("to a neighbour", at(b.ep.Address.Addr(), 80))
	if tableExists(t, "conex-"+c.ep.HostInterface) {
		t.Error("the filter is left")
	}
	if eps, err = w.m.Endpoints("ccc"); err != nil || eps[0].Filtered {
		t.Errorf("endpoints %+v, %v, want one that is recorded as not filtered", eps, err)
	}
	check(t, w.m.Bound(t.Context(), c.ep, c.ns, Egress{List: listOf(t, "deny")})) // and once more
	answered("bounded again")
}

// TestEgressNoGap changes between two lists without end: what neither allows never comes through, what both allow never fails.
func TestEgressNoGap(t *testing.T) {
	w := newWorld(t)
	client := &container{ns: w.client, w: w}
	var seen net.PacketConn
	check(t, netlink.In(w.client, func() (err error) {
		seen, err = net.ListenPacket("udp4", ":82")
		return err
	}))
	t.Cleanup(func() { seen.Close() })
	var leaked atomic.Int64
	go func() {
		b := make([]byte, 100)
		for {
			if _, _, err := seen.ReadFrom(b); err != nil {
				return
			}
			leaked.Add(1)
		}
	}()
	client.serve(80)
	outside := netip.MustParseAddr(clientIP4)
	c := w.bounded("ccc", 0, "allow="+clientIP4+":80/udp,"+clientIP4+":85/udp")
	learnt := egress.Learnt{outside: {"web.test": time.Time{}}}
	lists := []egress.List{
		listOf(t, "allow=web.test:80/udp,web.test:85/udp,"+clientIP4+":81/udp"), listOf(t, "allow="+clientIP4+":80/udp,"+clientIP4+":85/udp,web.test:83/udp"),
		listOf(t, "allow=web.test:80/udp,web.test:85/udp"),
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var sent, asked, failed atomic.Int64
	wg.Go(func() {
		check(t, netlink.In(c.ns, func() error {
			s, err := net.ListenPacket("udp4", ":0")
			if err != nil {
				return err
			}
			defer s.Close()
			to, allowed := net.UDPAddrFromAddrPort(netip.AddrPortFrom(outside, 82)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(outside, 85))
			for ; ; sent.Add(1) {
				select {
				case <-stop:
					return nil
				default:
					s.WriteTo([]byte("leak"), to)
					s.WriteTo([]byte("let"), allowed)
				}
			}
		}))
	})
	wg.Go(func() {
		for ; ; asked.Add(1) {
			select {
			case <-stop:
				return
			default:
				if _, err := ask(c.ns, "udp", at(outside, 80)); err != nil {
					failed.Add(1)
				}
			}
		}
	})
	for k := 0; k < 90 || (sent.Load() < 1000 || asked.Load() < 10) && !t.Failed(); k++ {
		check(t, c.ep.Filter.Change(lists[k%len(lists)], learnt))
	}
	close(stop)
	wg.Wait()
	if n := leaked.Load(); n > 0 {
		t.Errorf("%d of %d datagrams that no list allows have come", n, sent.Load())
	}
	denied, err := egress.Denied(c.ep.HostInterface)
	check(t, err)
	if len(denied) != 1 || denied[0].Port != 82 {
		t.Errorf("denied was %+v, want port 82 alone", denied)
	}
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d questions that all lists allow were not answered", n, asked.Load())
	}
}
