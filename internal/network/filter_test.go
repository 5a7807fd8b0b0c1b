package network

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/egress"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// bounded attaches a container that may reach what values say.
func (w *world) bounded(id string, group uint16, values ...string) *container {
	w.t.Helper()
	l, err := egress.Parse(values)
	check(w.t, err)
	c := &container{ns: newNetNS(w.t), w: w}
	c.ep, err = w.m.Attach(w.t.Context(), AttachRequest{ContainerID: id, Name: "name-" + id, NetNS: c.ns, Settings: Settings{Egress: &Egress{List: l, Group: group}}})
	check(w.t, err)
	w.t.Cleanup(func() { check(w.t, c.ep.Filter.Close()) })
	return c
}

type reach struct {
	network, addr string
	ok            bool
}

func (c *container) reaches(what string, list ...reach) {
	c.w.t.Helper()
	var wg sync.WaitGroup // what is denied takes its time
	for _, r := range list {
		wg.Go(func() {
			_, err := ask(c.ns, r.network, r.addr)
			for range 3 { // a datagram to a neighbour that is not known yet may be lost
				if err != nil && r.ok {
					_, err = ask(c.ns, r.network, r.addr)
				}
			}
			if (err == nil) != r.ok {
				c.w.t.Errorf("%s: %s to %s: %v, want it to work: %t", what, r.network, r.addr, err, r.ok)
			}
		})
	}
	wg.Wait()
}

func at(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }

// TestEgress looks at every way that leads out of a container: outside, host, another container of its bridge, of another network.
func TestEgress(t *testing.T) {
	for _, nf := range []string{"0", "1"} { // packets of a bridge past the host's hooks, or through them
		if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(nf), 0); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		t.Run("bridge-nf-call="+nf, func(t *testing.T) {
			// The uplink asks for neighbours at once, not when nobody has contested its address for a second.
			check(t, os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0))
			w := newWorld(t)
			b := w.attach("bbb")
			b.serve(80)
			client := &container{ns: w.client, w: w}
			client.serve(80)
			client.serve(81)
			client.serve(53)
			host := &container{ns: thisNS(t), w: w}
			host.serve(90)

			outside, outside6 := netip.MustParseAddr(clientIP4), netip.MustParseAddr(clientIP6)
			none := w.bounded("none", 0, "deny")
			none.reaches("deny", reach{"tcp", at(outside, 80), false}, reach{"tcp", at(outside6, 80), false}, reach{"udp", at(outside, 53), false},
				reach{"udp", at(outside6, 53), false}, reach{"tcp", at(b.ep.Address.Addr(), 80), false}, reach{"tcp", at(b.ep.Address6.Addr(), 80), false},
				reach{"udp", at(b.ep.Address.Addr(), 80), false}, reach{"tcp", at(none.ep.Gateway, 90), false}, reach{"tcp", at(none.ep.Gateway6, 90), false},
				reach{"tcp", hostIP4 + ":90", false}, reach{"udp", "[" + hostIP6 + "]:90", false})

			some := w.bounded("some", 0, "allow="+clientIP4+":80,["+clientIP6+"]:53/udp", "allow="+b.ep.Address.Addr().String()+":80/tcp")
			some.reaches("some", reach{"tcp", at(outside, 80), true}, reach{"tcp", at(outside, 81), false}, reach{"udp", at(outside, 80), false},
				reach{"udp", at(outside6, 53), true}, reach{"tcp", at(outside6, 53), false}, reach{"tcp", at(outside6, 80), false},
				reach{"tcp", at(b.ep.Address.Addr(), 80), true}, reach{"udp", at(b.ep.Address.Addr(), 80), false}, reach{"tcp", at(b.ep.Address6.Addr(), 80), false},
				reach{"tcp", hostIP4 + ":90", false})

			cidr := w.bounded("cidr", 0, "allow=198.51.100.0/24,fd00:c::/32")
			cidr.reaches("cidr", reach{"tcp", at(outside, 81), true}, reach{"udp", at(outside, 53), true}, reach{"tcp", at(outside6, 81), true},
				reach{"tcp", hostIP4 + ":90", true}, reach{"tcp", at(cidr.ep.Gateway, 90), false}, reach{"tcp", at(b.ep.Address.Addr(), 80), false})

			named := w.bounded("named", 0, "allow=*.example.com:81,web.example.net")
			named.reaches("before the name is known", reach{"tcp", at(outside, 81), false})
			check(t, named.ep.Filter.Learn("a.example.com", []netip.Addr{outside, outside6}, time.Minute))
			check(t, named.ep.Filter.Learn("a.example.com", []netip.Addr{outside}, time.Minute)) // again, as names are asked for
			check(t, named.ep.Filter.Learn("example.com", []netip.Addr{b.ep.Address.Addr()}, time.Minute))
			named.reaches("pattern", reach{"tcp", at(outside, 81), true}, reach{"tcp", at(outside6, 81), true}, reach{"tcp", at(outside, 80), false},
				reach{"tcp", at(b.ep.Address.Addr(), 81), false})
			check(t, named.ep.Filter.Learn("web.example.net", []netip.Addr{outside}, time.Minute))
			named.reaches("name", reach{"tcp", at(outside, 80), true}, reach{"udp", at(outside, 53), true}, reach{"udp", at(outside6, 53), false})

			// Who speaks to it is answered: from outside by a published port, the host, the bridge.
			none.serve(70)
			none.publish(portmap.Mapping{Proto: "tcp", HostPort: 7070, ContainerPort: 70}, portmap.Mapping{Proto: "udp", HostPort: 7070, ContainerPort: 70})
			for _, p := range []string{"tcp", "udp"} {
				for _, a := range []string{hostIP4, "[" + hostIP6 + "]"} {
					if _, err := ask(w.client, p, a+":7070"); err != nil {
						t.Errorf("published port, %s by %s: %v", p, a, err)
					}
				}
				for _, a := range []netip.Addr{none.ep.Address.Addr(), none.ep.Address6.Addr()} {
					if _, err := ask(b.ns, p, at(a, 70)); err != nil {
						t.Errorf("from the bridge, %s to %s: %v", p, a, err)
					}
				}
				if _, err := ask(nil, p, "127.0.0.1:7070"); err != nil {
					t.Errorf("from the host's loopback, %s: %v", p, err)
				}
			}
			// And that opened no way for it to begin.
			none.reaches("after answers", reach{"tcp", at(outside, 80), false}, reach{"tcp", at(b.ep.Address.Addr(), 80), false})

			got, err := w.m.Denied("some")
			check(t, err)
			if k := slices.IndexFunc(got, func(a egress.Attempt) bool {
				return a.Addr == outside && a.Proto == "tcp" && a.Port == 81 && a.Packets > 0
			}); k < 0 {
				t.Errorf("denied %+v, want port 81 of %s among them", got, outside)
			}
			for _, id := range []string{"none", "some", "cidr", "named"} {
				eps, err := w.m.Endpoints(id)
				check(t, err)
				if len(eps) != 1 || !eps[0].Filtered {
					t.Errorf("endpoints of %s: %+v", id, eps)
				}
			}
			for _, c := range []*container{none, some, cidr, named} {
				check(t, c.ep.Filter.Close())
				check(t, w.m.Detach(t.Context(), c.ep.ContainerID))
				if tableExists(t, "conex-"+c.ep.HostInterface) {
					t.Errorf("the filter of %s is left", c.ep.ContainerID)
				}
			}
			check(t, w.m.Detach(t.Context(), "bbb"))
		})
	}
}

func thisNS(t *testing.T) *os.File {
	f, err := os.Open("/proc/thread-self/ns/net")
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// frame sends one raw frame out of a container.
func (c *container) frame(b []byte) {
	c.w.t.Helper()
	check(c.w.t, netlink.In(c.ns, func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Protocol: 0x0008})
	}))
}

// datagram is a frame with an IPv4 packet.
func datagram(srcMAC, dstMAC net.HardwareAddr, src, dst netip.Addr, proto byte, payload []byte) []byte {
	b := slices.Concat(dstMAC, srcMAC, []byte{8, 0, 0x45, 0, 0, byte(20 + len(payload)), 0, 1, 0, 0, 64, proto, 0, 0}, src.AsSlice(), dst.AsSlice(), payload)
	h := b[14:34]
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum+sum>>16))
	return b
}

// TestEgressForged sends what a container with CAP_NET_RAW can, and looks at the wire of a peer on its bridge whether it came.
func TestEgressForged(t *testing.T) {
	w := newWorld(t)
	peer, c := w.attach("peer"), w.bounded("forger", 0, "allow=203.0.113.7:80")
	mac, err := net.ParseMAC(c.ep.MAC)
	check(t, err)
	peerMAC, err := net.ParseMAC(peer.ep.MAC)
	check(t, err)
	other := net.HardwareAddr{2, 1, 2, 3, 4, 5}
	var wire int
	check(t, netlink.In(peer.ns, func() error {
		wire, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0x0300) // ETH_P_ALL
		return err
	}))
	defer unix.Close(wire)
	check(t, unix.SetsockoptTimeval(wire, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300_000}))
	// came looks for a mark among what comes; the last frame sent is one that must come.
	self, to := c.ep.Address.Addr(), peer.ep.Address.Addr()
	const mark, end = "forged-mark", "end-of-test"
	came := func(frames ...[]byte) bool {
		t.Helper()
		for _, f := range frames {
			c.frame(f)
		}
		ok := false
		b := make([]byte, 2048)
		for {
			n, _, err := unix.Recvfrom(wire, b, 0)
			if err != nil {
				return ok
			}
			ok = ok || bytes.Contains(b[:n], []byte(mark))
		}
	}
	seg := func(flags byte) []byte {
		return append([]byte{0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0}, mark...)
	}
	udp := append([]byte{0x30, 0x39, 0, 80, 0, byte(8 + len(mark)), 0, 0}, mark...)
	for _, f := range []struct {
		what string
		b    []byte
	}{
		{"tcp, ACK without a connection", datagram(mac, peerMAC, self, to, 6, seg(16))},
		{"tcp, RST", datagram(mac, peerMAC, self, to, 6, seg(4))},
		{"tcp, SYN and ACK", datagram(mac, peerMAC, self, to, 6, seg(18))},
		{"udp", datagram(mac, peerMAC, self, to, 17, udp)},
		{"icmp echo", datagram(mac, peerMAC, self, to, 1, append([]byte{8, 0, 0, 0, 0, 0, 0, 0}, mark...))},
		{"icmp echo reply", datagram(mac, peerMAC, self, to, 1, append([]byte{0, 0, 0, 0, 0, 0, 0, 0}, mark...))},
		{"another protocol", datagram(mac, peerMAC, self, to, 253, []byte(mark))},
		{"another's source", datagram(mac, peerMAC, to, netip.MustParseAddr("203.0.113.7"), 6, seg(2))},
		{"another's source to the peer", datagram(mac, peerMAC, c.ep.Gateway, to, 17, udp)},
		{"another's MAC", datagram(other, peerMAC, self, to, 17, udp)},
		{"another's MAC to what is allowed", datagram(other, peerMAC, self, netip.MustParseAddr("203.0.113.7"), 6, seg(2))},
		{"a fragment's tail", func() []byte {
			b := datagram(mac, peerMAC, self, to, 17, udp)
			b[14+7] = 8 // offset
			return b
		}()},
		{"another ethertype", append(slices.Concat(peerMAC, mac, []byte{0x88, 0xb5}), mark...)},
		{"a VLAN", append(slices.Concat(peerMAC, mac, []byte{0x81, 0, 0, 5, 8, 0}), datagram(mac, peerMAC, self, to, 17, udp)[14:]...)},
		{"ARP in another's name", append(slices.Concat(peerMAC, mac, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 2}, mac, c.ep.Gateway.AsSlice(), peerMAC, to.AsSlice()), mark...)},
	} {
		if came(f.b) {
			t.Errorf("%s has passed", f.what)
		}
	}
	// The looking is no use unless something can come: what is allowed does, given to the peer's MAC.
	if !came(datagram(mac, peerMAC, self, netip.MustParseAddr("203.0.113.7"), 6, seg(2))) {
		t.Error("what is allowed has not passed")
	}
	if !came(append(slices.Concat(peerMAC, mac, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1}, mac, self.AsSlice(), make([]byte, 6), to.AsSlice()), mark...)) {
		t.Error("ARP in its own name has not passed")
	}
	check(t, c.ep.Filter.Close())
}

// TestEgressOwned lets others flush, change and delete the filter, as long as its owner lives and afterwards.
func TestEgressOwned(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("nft is not installed")
	}
	w := newWorld(t)
	client := &container{ns: w.client, w: w}
	client.serve(80)
	c := w.bounded("owned", 0, "deny")
	table := "conex-" + c.ep.HostInterface
	out, err := exec.Command(nft, "flush", "ruleset").CombinedOutput()
	if err != nil {
		t.Logf("flush: %v %s", err, out)
	}
	if out, err := exec.Command(nft, "flush", "chain", "netdev", table, "out").CombinedOutput(); err == nil {
		t.Errorf("another process flushed the chain: %s", out)
	}
	if out, err := exec.Command(nft, "delete", "table", "netdev", table).CombinedOutput(); err == nil {
		t.Errorf("another process deleted the table: %s", out)
	}
	if !tableExists(t, table) {
		t.Fatal("the filter is gone")
	}
	c.reaches("after a flush", reach{"tcp", clientIP4 + ":80", false})
	if got, err := egress.Interfaces(); err != nil || !slices.Contains(got, c.ep.HostInterface) {
		t.Errorf("filters of %v, %v, want %s", got, err, c.ep.HostInterface)
	}
	// Its owner dies: the filter stays, and whoever settles can remove it.
	check(t, c.ep.Filter.Close())
	if !tableExists(t, table) {
		t.Fatal("the filter went with its owner")
	}
	c.reaches("after its owner's death", reach{"tcp", clientIP4 + ":80", false})
	check(t, w.m.Detach(t.Context(), "owned"))
	if tableExists(t, table) {
		t.Error("the filter is left")
	}
}

// TestEgressTold floods a filter, and hears of it within bounds.
func TestEgressTold(t *testing.T) {
	w := newWorld(t)
	told, err := egress.Listen()
	check(t, err)
	defer told.Close()
	c := w.bounded("flood", told.Group(), "deny")
	heard := make(chan egress.Attempt, 10000)
	go func() {
		defer close(heard)
		for {
			list, err := told.Next()
			if err != nil {
				return
			}
			for _, a := range list {
				heard <- a
			}
		}
	}()
	check(t, netlink.In(c.ns, func() error {
		conn, err := net.ListenPacket("udp", ":0")
		if err != nil {
			return err
		}
		defer conn.Close()
		for i := range 20000 {
			// Many packets to few places, then to many.
			addr := &net.UDPAddr{IP: net.ParseIP(clientIP4), Port: 1000 + i%3}
			if i >= 3000 {
				addr = &net.UDPAddr{IP: net.IPv4(203, 0, byte(i>>8), byte(i)), Port: 9}
			}
			if _, err := conn.WriteTo([]byte("x"), addr); err != nil && !strings.Contains(err.Error(), "not permitted") {
				return err
			}
		}
		return nil
	}))
	first := map[string]int{}
	for a := range heard {
		if first[fmt.Sprint(a.Addr, a.Proto, a.Port)]++; len(first) == 3 {
			break
		}
	}
	for i := range 3 {
		k := fmt.Sprint(clientIP4, "udp", 1000+i)
		if first[k] != 1 {
			t.Errorf("told %d times of %s, want once; %v", first[k], k, first)
		}
	}
	check(t, told.Close())
	n := 0
	for range heard {
		n++
	}
	if n > 2000 {
		t.Errorf("told of %d attempts of 17,000 within moments", n)
	}
	got, err := w.m.Denied("flood")
	check(t, err)
	total := uint64(0)
	for _, a := range got[:3] {
		total += a.Packets
	}
	if len(got) > 1024 || total < 2990 || got[0].Proto != "udp" {
		t.Errorf("%d destinations, %d packets of 3000 to the first three: %+v", len(got), total, got[:3])
	}
	check(t, c.ep.Filter.Close())
}
