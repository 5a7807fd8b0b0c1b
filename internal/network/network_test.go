package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

func tableExists(t testing.TB, name string) bool {
	t.Helper()
	c, err := nftables.New()
	check(t, err)
	tables, err := c.ListTables()
	check(t, err)
	return slices.ContainsFunc(tables, func(x *nftables.Table) bool { return x.Name == name })
}

// elements counts the ports in the table's maps.
func elements(t testing.TB, table string) int {
	t.Helper()
	c, err := nftables.New()
	check(t, err)
	n := 0
	for _, name := range []string{"ports4", "addrports4"} {
		s, err := c.GetSetByName(&nftables.Table{Name: table, Family: nftables.TableFamilyINet}, name)
		check(t, err)
		es, err := c.GetSetElements(s)
		check(t, err)
		n += len(es)
	}
	return n
}

func TestAttach(t *testing.T) {
	w := newWorld(t)
	first := w.attach("first") // a bridge whose last port goes may forget its MTU
	check(t, w.m.Detach(t.Context(), "first"))
	check(t, first.ns.Close())
	for { // until the kernel has taken the pair down, or the test's time is over
		if _, err := rtnetlink.LinkByName(first.ep.HostInterface); err != nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	a, b := w.attach("aaa"), w.attach("bbb")
	if a.ep.MTU != wireMTU {
		t.Errorf("MTU %d, the uplink has %d", a.ep.MTU, wireMTU)
	}
	if a.ep.Address == b.ep.Address || !a.ep.Address.Contains(a.ep.Gateway) {
		t.Errorf("addresses %s and %s, gateway %s", a.ep.Address, b.ep.Address, a.ep.Gateway)
	}
	check(t, netlink.In(a.ns, func() error {
		l, err := rtnetlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if l.Attrs().HardwareAddr.String() != a.ep.MAC || l.Attrs().MTU != wireMTU {
			t.Errorf("eth0 has %s, MTU %d", l.Attrs().HardwareAddr, l.Attrs().MTU)
		}
		v6, err := rtnetlink.AddrList(l, unix.AF_INET6)
		if !slices.ContainsFunc(v6, func(v rtnetlink.Addr) bool { return v.IPNet.String() == a.ep.Address6.String() }) {
			t.Errorf("eth0 has the IPv6 addresses %v, want %s", v6, a.ep.Address6)
		}
		return err
	}))
	b.serve(80)
	(&container{ns: w.client, w: w}).serve(81)
	for _, network := range []string{"tcp", "udp"} {
		seen, err := ask(a.ns, network, fmt.Sprintf("%s:80", b.ep.Address.Addr()))
		check(t, err)
		if seen != a.ep.Address.Addr().String() {
			t.Errorf("%s between containers: source %s", network, seen)
		}
		if seen, err = ask(nil, network, fmt.Sprintf("%s:80", b.ep.Address.Addr())); err != nil || seen != a.ep.Gateway.String() {
			t.Errorf("%s from the host: source %s, %v", network, seen, err)
		}
		seen, err = ask(a.ns, network, clientIP4+":81")
		if err != nil || seen != hostIP4 {
			t.Errorf("%s to outside: source %s, %v, want the host's address", network, seen, err)
		}
	}
	got, err := w.m.Endpoints("aaa")
	check(t, err)
	if len(got) != 1 || got[0].Address != a.ep.Address || got[0].ContainerName != "name-aaa" {
		t.Errorf("records %+v", got)
	}
	if got, err := w.m.Endpoints("zzz"); err != nil || len(got) > 0 {
		t.Errorf("unknown container: %v %v", got, err)
	}
}

func TestPublishReach(t *testing.T) {
	w := newWorld(t)
	a, b := w.attach("aaa"), w.attach("bbb")
	a.serve(80)
	a.serve(81)
	gw := a.ep.Gateway.String()
	a.publish(
		portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80},
		portmap.Mapping{Proto: "udp", HostPort: 8080, ContainerPort: 80},
		portmap.Mapping{Proto: "tcp", HostPort: 8081, ContainerPort: 80, HostIP: netip.MustParseAddr(hostIP4)},
		portmap.Mapping{Proto: "udp", HostPort: 8081, ContainerPort: 80, HostIP: netip.MustParseAddr(hostIP4)},
		portmap.Mapping{Proto: "tcp", HostPort: 8082, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.5")},
		portmap.Mapping{Proto: "udp", HostPort: 8082, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.5")},
		portmap.Mapping{Proto: "tcp", HostPort: 8083, ContainerPort: 80, HostIP: netip.MustParseAddr("::1")},
		portmap.Mapping{Proto: "udp", HostPort: 8083, ContainerPort: 80, HostIP: netip.MustParseAddr("::1")},
	)
	// The client knows the way to the bridge and to the host's loopback: only the host keeps it out.
	check(t, netlink.In(w.client, func() error {
		for _, dst := range []string{a.ep.Address.Masked().String(), a.ep.Address6.Masked().String(), "127.0.0.0/8"} {
			_, n, err := net.ParseCIDR(dst)
			if err != nil {
				return err
			}
			via := hostIP4
			if n.IP.To4() == nil {
				via = hostIP6
			}
			if err := rtnetlink.RouteAdd(&rtnetlink.Route{Dst: n, Gw: net.ParseIP(via)}); err != nil {
				return err
			}
		}
		return os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte("1"), 0)
	}))
	for _, c := range []struct {
		name string
		from *os.File
		addr string
		seen string // "" when it must not be reached
	}{
		{"outside", w.client, hostIP4 + ":8080", clientIP4},
		{"outside, IPv6", w.client, "[" + hostIP6 + "]:8080", clientIP6},
		{"host by loopback", nil, "127.0.0.1:8080", gw},
		{"host by IPv6 loopback", nil, "[::1]:8080", gw},
		{"host by its address", nil, hostIP4 + ":8080", hostIP4},
		{"host by its IPv6 address", nil, "[" + hostIP6 + "]:8080", hostIP6},
		{"container itself, IPv6", a.ns, "[" + hostIP6 + "]:8080", gw},
		{"host by the gateway", nil, gw + ":8080", gw},
		{"container itself", a.ns, hostIP4 + ":8080", gw},
		{"container itself by the gateway", a.ns, gw + ":8080", gw},
		{"other container", b.ns, hostIP4 + ":8080", gw},
		{"one address, outside", w.client, hostIP4 + ":8081", clientIP4},
		{"one address, host", nil, hostIP4 + ":8081", hostIP4},
		{"one address, itself", a.ns, hostIP4 + ":8081", gw},
		{"one address, by another", nil, "127.0.0.1:8081", ""},
		{"loopback only, host", nil, "127.0.0.5:8082", gw},
		{"loopback only, outside", w.client, hostIP4 + ":8082", ""},
		{"loopback only, outside by force", w.client, "127.0.0.5:8082", ""},
		{"IPv6 loopback only, host", nil, "[::1]:8083", gw},
		{"IPv6 loopback only, outside", w.client, "[" + hostIP6 + "]:8083", ""},
		{"unpublished port, IPv6", w.client, "[" + a.ep.Address6.Addr().String() + "]:81", ""},
		{"unpublished port", w.client, a.ep.Address.Addr().String() + ":81", ""},
		{"published port past the host", w.client, a.ep.Address.Addr().String() + ":80", ""},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(c.name+"/"+network, func(t *testing.T) {
				if c.name == "loopback only, outside by force" {
					// Other software may have set this; the raw chain must hold nevertheless.
					const f = "/proc/sys/net/ipv4/conf/" + uplinkName + "/route_localnet"
					check(t, os.WriteFile(f, []byte("1"), 0))
					defer os.WriteFile(f, []byte("0"), 0)
				}
				seen, err := ask(c.from, network, c.addr)
				if c.seen == "" && err == nil {
					t.Errorf("reached, source %s", seen)
				}
				if c.seen != "" && (err != nil || seen != c.seen) {
					t.Errorf("source %q, want %q: %v", seen, c.seen, err)
				}
			})
		}
	}
}

func TestPublishBulk(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	var ms []portmap.Mapping
	for p := 20000; p < 21100; p++ {
		ms = append(ms, portmap.Mapping{Proto: "tcp", HostPort: uint16(p), ContainerPort: 80})
	}
	r := a.publish(ms...)
	if n := elements(t, "conex"); n != len(ms) {
		t.Errorf("%d elements, want %d", n, len(ms))
	}
	if _, err := ask(w.client, "tcp", hostIP4+":21099"); err != nil {
		t.Error(err)
	}
	check(t, r.Close())
	if n := elements(t, "conex"); n != 0 {
		t.Errorf("%d elements after Close", n)
	}
}

func TestAttachConcurrent(t *testing.T) {
	w := newWorld(t)
	const n = 20
	eps := make([]*Endpoint, n)
	var wg sync.WaitGroup
	for k := range n {
		ns := newNetNS(t)
		wg.Go(func() {
			// A manager of its own, as another process has.
			ep, err := Open(w.root, w.state).Attach(t.Context(), AttachRequest{ContainerID: fmt.Sprintf("c%02d", k), NetNS: ns})
			if err != nil {
				t.Error(err)
				return
			}
			eps[k] = ep
		})
	}
	wg.Wait()
	seen := make(map[netip.Prefix]bool)
	for _, ep := range eps {
		if ep == nil || seen[ep.Address] {
			t.Fatalf("missing or doubled address: %+v", ep)
		}
		seen[ep.Address] = true
		if _, err := net.InterfaceByName(ep.HostInterface); err != nil {
			t.Error(err)
		}
	}
	list, err := w.m.Networks()
	check(t, err)
	if len(list) != 3 {
		t.Errorf("networks %+v, want bridge, host and none", list)
	}
}

func TestAddressReuse(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	if _, err := ask(nil, "tcp", a.ep.Address.Addr().String()+":80"); err != nil {
		t.Fatal(err) // and now the host's neighbour table knows the address
	}
	check(t, w.m.Detach(t.Context(), "aaa"))
	check(t, w.m.Detach(t.Context(), "aaa"))
	// The old namespace is still there, as it is for a moment after an exit.
	b := w.attach("bbb")
	if b.ep.Address != a.ep.Address || b.ep.MAC != a.ep.MAC {
		t.Errorf("got %s %s, want %s %s again", b.ep.Address, b.ep.MAC, a.ep.Address, a.ep.MAC)
	}
	b.serve(81)
	if _, err := ask(nil, "tcp", b.ep.Address.Addr().String()+":81"); err != nil {
		t.Errorf("the new owner is not reached: %v", err)
	}
}

// Who is killed between claim and record leaves the claim alone.
func TestDetachDead(t *testing.T) {
	w := newWorld(t)
	a, b := w.attach("aaa"), w.attach("bbb")
	check(t, os.Remove(w.m.recordPath(a.ep.NetworkID, "aaa")))
	check(t, w.m.DetachDead(t.Context(), "aaa"))
	left, err := os.ReadDir(w.m.dir(a.ep.NetworkID, "addr"))
	check(t, err)
	if len(left) != 2 || left[0].Name() != b.ep.Address.Addr().String() || left[1].Name() != b.ep.Address6.Addr().String() {
		t.Errorf("addresses %v, want those of the living one", left)
	}
}

func TestLeftovers(t *testing.T) {
	w := newWorld(t)
	// A monitor died: its listener went with it, record and elements stay.
	a := w.attach("aaa")
	dead, err := portmap.Reserve(t.Context(), []portmap.Mapping{{Proto: "tcp", HostPort: 9000, ContainerPort: 80}, {Proto: "udp", HostPort: 9000, ContainerPort: 80}})
	check(t, err)
	check(t, w.m.Publish(t.Context(), a.ep, dead))
	orphan := *a.ep
	check(t, dead.Close())
	check(t, w.m.writeEndpoint(&orphan))
	table, err := w.m.table(t.Context())
	check(t, err)
	check(t, portmap.Rebuild(table))
	if got := elements(t, "conex"); got != 2 {
		t.Fatalf("%d elements, want the two of the dead monitor", got)
	}

	// Before anybody settles it, another container takes the port.
	b := w.attach("bbb")
	b.serve(80)
	b.publish(portmap.Mapping{Proto: "tcp", HostPort: 9000, ContainerPort: 80})
	if seen, err := ask(w.client, "tcp", hostIP4+":9000"); err != nil || seen != clientIP4 {
		t.Errorf("the port leads to the dead container: %s %v", seen, err)
	}
	// Settling the dead one must not take the port from the living.
	check(t, w.m.Detach(t.Context(), "aaa"))
	if seen, err := ask(w.client, "tcp", hostIP4+":9000"); err != nil || seen != clientIP4 {
		t.Errorf("the port was withdrawn from its new container: %s %v", seen, err)
	}
	if got := elements(t, "conex"); got != 1 {
		t.Errorf("%d elements, want 1", got)
	}
	// A container that starts again over its own leftover keeps its address.
	again, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", NetNS: newNetNS(t)})
	check(t, err)
	if again.Address != b.ep.Address {
		t.Errorf("address %s, before %s", again.Address, b.ep.Address)
	}
}

func TestRepair(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9100, ContainerPort: 80})
	conn, err := nftables.New()
	check(t, err)
	for k, harm := range []func(){
		func() { conn.FlushRuleset(); check(t, conn.Flush()) },
		func() {
			conn.FlushTable(&nftables.Table{Name: "conex", Family: nftables.TableFamilyINet})
			check(t, conn.Flush())
		},
		func() { check(t, deleteLink("conex0")) },
		func() { check(t, os.WriteFile(forwardFile4, []byte("0"), 0)) },
	} {
		harm()
		b := w.attach(fmt.Sprintf("b%d", k))
		if seen, err := ask(w.client, "tcp", hostIP4+":9100"); err != nil || seen != clientIP4 {
			t.Errorf("harm %d: not repaired: %s %v", k, seen, err)
		}
		b.serve(80)
		rb := b.publish(portmap.Mapping{Proto: "tcp", HostPort: 9101, ContainerPort: 80})
		if seen, err := ask(w.client, "tcp", hostIP4+":9101"); err != nil || seen != clientIP4 {
			t.Errorf("harm %d: new container: %s %v", k, seen, err)
		}
		// Flushed between Attach and Publish.
		c := w.attach(fmt.Sprintf("c%d", k))
		c.serve(80)
		conn.FlushRuleset()
		check(t, conn.Flush())
		r := c.publish(portmap.Mapping{Proto: "tcp", HostPort: 9102, ContainerPort: 80})
		for _, port := range []string{":9100", ":9102"} {
			if seen, err := ask(w.client, "tcp", hostIP4+port); err != nil || seen != clientIP4 {
				t.Errorf("harm %d: flushed before Publish: %s %v", k, seen, err)
			}
		}
		check(t, rb.Close())
		check(t, r.Close())
		check(t, w.m.Detach(t.Context(), c.ep.ContainerID))
		check(t, w.m.Detach(t.Context(), b.ep.ContainerID))
	}
}

func TestExhaustion(t *testing.T) {
	w := newWorld(t)
	i := Info{ID: disk.RandomID(), Name: Bridge, Driver: "bridge", Interface: firstBridge, IPv4: Pool{Subnet: netip.MustParsePrefix("10.99.0.0/29"), Gateway: netip.MustParseAddr("10.99.0.1")}}
	check(t, w.m.save(i))
	for k := range 5 {
		w.attach(fmt.Sprintf("c%d", k))
	}
	_, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "more", NetNS: newNetNS(t)})
	if !errors.Is(err, ErrNoAddress) {
		t.Fatalf("error %v, want ErrNoAddress", err)
	}
	if _, err := os.Stat(w.m.recordPath(i.ID, "more")); err == nil {
		t.Error("the failed Attach left a record")
	}
	// A claim whose owner died before its record was written is found when addresses run out.
	check(t, w.m.Detach(t.Context(), "c3"))
	check(t, os.Symlink("ghost", w.m.dir(i.ID, "addr", "10.99.0.5")))
	if c := w.attach("more"); c.ep.Address.Addr().String() != "10.99.0.5" {
		t.Errorf("address %s, want the ghost's", c.ep.Address)
	}
}

func TestPortTaken(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9200, ContainerPort: 80})
	_, err := w.m.Reserve(t.Context(), []portmap.Mapping{{Proto: "tcp", HostPort: 9200, ContainerPort: 80}})
	if !errors.Is(err, portmap.ErrPortTaken) || err.Error() != "Bind for 0.0.0.0:9200 failed: port is already allocated (by container name-aaa)" {
		t.Errorf("error %v", err)
	}
	// The same number for udp is another port.
	r, err := w.m.Reserve(t.Context(), []portmap.Mapping{{Proto: "udp", HostPort: 9200, ContainerPort: 80}})
	check(t, err)
	check(t, r.Close())
}

func TestAttachFails(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	// The namespace has an eth0 already.
	if _, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", NetNS: a.ns}); err == nil {
		t.Fatal("attached twice")
	}
	if ids := w.attached(); len(ids) != 1 {
		t.Errorf("records %v", ids)
	}
	for _, r := range []AttachRequest{
		{ContainerID: "../x", NetNS: a.ns}, {ContainerID: "", NetNS: a.ns},
		{ContainerID: "x", Network: "nowhere", NetNS: a.ns}, {ContainerID: "x", Network: Host, NetNS: a.ns},
	} {
		if _, err := w.m.Attach(t.Context(), r); err == nil {
			t.Errorf("no error for %+v", r)
		}
	}
	if err := w.m.Cleanup(t.Context()); !errors.Is(err, ErrInUse) {
		t.Errorf("cleanup with an endpoint: %v", err)
	}
}

// TestGuard has a host that forwarded nothing: after Attach it forwards for containers, and still not between its own networks.
func TestGuard(t *testing.T) {
	w := newWorld(t)
	check(t, os.WriteFile(forwardFile4, []byte("0"), 0))
	other := newNetNS(t)
	w.cable("uplink1", other, "203.0.113.1/24", "203.0.113.2/24")
	t.Cleanup(func() { check(t, deleteLink("uplink1")) })
	route := func(ns *os.File, via string) {
		check(t, netlink.In(ns, func() error { return rtnetlink.RouteAdd(&rtnetlink.Route{Gw: net.ParseIP(via)}) }))
	}
	route(w.client, hostIP4)
	route(other, "203.0.113.1")
	(&container{ns: other, w: w}).serve(82)
	a := w.attach("aaa")
	if on, err := switchedOn(forwardFile4); err != nil || !on {
		t.Fatalf("forwarding %v %v", on, err)
	}
	if _, err := ask(a.ns, "tcp", "203.0.113.2:82"); err != nil {
		t.Errorf("container to the second network: %v", err)
	}
	if _, err := ask(w.client, "tcp", "203.0.113.2:82"); err == nil {
		t.Error("the host became a router")
	}
	check(t, w.m.Detach(context.Background(), "aaa"))
	check(t, w.m.Cleanup(context.Background()))
	if on, err := switchedOn(forwardFile4); err != nil || on {
		t.Errorf("forwarding after Cleanup: %v %v", on, err)
	}
}

// TestTwoRoots has two installations on one host: each gets a bridge, a subnet and a table of its own.
func TestTwoRoots(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	dir := t.TempDir()
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	check(t, err)
	m := Open(root, filepath.Join(dir, "run"))
	// The second one chose when the first had not begun, so its record collides.
	first, err := w.m.lookup(t.Context(), Bridge)
	check(t, err)
	check(t, m.save(Info{ID: disk.RandomID(), Name: Bridge, Driver: "bridge", Interface: first.Interface, IPv4: first.IPv4, Chosen: true}))
	ep, err := m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", NetNS: newNetNS(t)})
	check(t, err)
	if ep.Address.Overlaps(a.ep.Address) {
		t.Errorf("subnets %s and %s overlap", ep.Address, a.ep.Address)
	}
	if !tableExists(t, "conex") || !tableExists(t, "conex1") {
		t.Error("want the tables conex and conex1")
	}
	check(t, m.Detach(t.Context(), "bbb"))
	check(t, m.Cleanup(t.Context()))
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9300, ContainerPort: 80})
	if seen, err := ask(w.client, "tcp", hostIP4+":9300"); err != nil || seen != clientIP4 {
		t.Errorf("the first root after the second left: %s %v", seen, err)
	}
}

func TestLoopback(t *testing.T) {
	ns := newNetNS(t)
	check(t, new(Manager).Loopback(ns))
	check(t, netlink.In(ns, func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		return l.Close()
	}))
}

// BenchmarkAttach measures what a container's start waits for, on a warm bridge.
func BenchmarkAttach(b *testing.B) {
	w := newWorld(b)
	w.attach("warm")
	for _, ports := range []int{0, 1} {
		b.Run(fmt.Sprintf("ports=%d", ports), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				ns := newNetNS(b)
				b.StartTimer()
				var ms []portmap.Mapping
				for p := range ports {
					ms = append(ms, portmap.Mapping{Proto: "tcp", HostPort: uint16(10000 + p), ContainerPort: 80})
				}
				r, err := w.m.Reserve(b.Context(), ms)
				check(b, err)
				ep, err := w.m.Attach(b.Context(), AttachRequest{ContainerID: "bench", NetNS: ns})
				check(b, err)
				if ports > 0 {
					check(b, w.m.Publish(b.Context(), ep, r))
				}
				b.StopTimer()
				check(b, r.Close())
				check(b, w.m.Detach(b.Context(), "bench"))
				check(b, ns.Close())
				b.StartTimer()
			}
		})
	}
}

// TestUDPMoves keeps one client socket, so one connection record in the kernel, while the port moves to another container.
func TestUDPMoves(t *testing.T) {
	w := newWorld(t)
	a, b := w.attach("aaa"), w.attach("bbb")
	a.serve(80)
	b.serve(81)
	var c net.Conn
	check(t, netlink.In(w.client, func() (err error) {
		c, err = net.Dial("udp", hostIP4+":9500")
		return err
	}))
	defer c.Close()
	// answered sends until somebody answers: nobody does while the port leads nowhere.
	answered := func(want string) {
		t.Helper()
		buf := make([]byte, 100)
		check(t, c.SetDeadline(time.Time{}))
		defer patient(c)()
		_, err := c.Write([]byte(want))
		check(t, err)
		n, err := c.Read(buf)
		if err != nil || string(buf[:n]) != clientIP4+" "+want {
			t.Errorf("%s: answer %q, %v", want, buf[:n], err)
		}
	}
	r := a.publish(portmap.Mapping{Proto: "udp", HostPort: 9500, ContainerPort: 80})
	answered("first")
	check(t, r.Close())
	// A datagram in between makes a record that leads to the host itself.
	_, err := c.Write([]byte("lost"))
	check(t, err)
	check(t, c.SetReadDeadline(time.Now().Add(patience)))
	if _, err := c.Read(make([]byte, 10)); err == nil {
		t.Error("an answer although nothing is published")
	}
	b.publish(portmap.Mapping{Proto: "udp", HostPort: 9500, ContainerPort: 81})
	answered("second")
}

// TestLeave ends containers by who has their reservation: one whose ports are published, one whose ports somebody else put into the table from
// the record before it did so itself, and one whose record is lost.
func TestLeave(t *testing.T) {
	w := newWorld(t)
	ports := []portmap.Mapping{{Proto: "tcp", HostPort: 9000, ContainerPort: 80}}
	table, err := w.m.table(t.Context())
	check(t, err)
	for name, r := range map[string]func(*container) *portmap.Reservation{
		"published": func(c *container) *portmap.Reservation { return c.publish(ports...) },
		"by the record": func(c *container) *portmap.Reservation {
			check(t, c.publish(ports...).Close())
			check(t, w.m.writeEndpoint(c.ep))
			check(t, portmap.Rebuild(table))
			r, err := w.m.Reserve(t.Context(), ports)
			check(t, err)
			return r
		},
		"lost": func(c *container) *portmap.Reservation {
			r := c.publish(ports...)
			check(t, os.Remove(w.m.recordPath(c.ep.NetworkID, "aaa")))
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := r(w.attach("aaa"))
			if got := elements(t, "conex"); got != 1 {
				t.Fatalf("%d elements, want 1", got)
			}
			check(t, w.m.Leave(t.Context(), "aaa", r))
			if got := elements(t, "conex"); got != 0 {
				t.Errorf("%d elements are left", got)
			}
			eps, err := w.m.Endpoints("aaa")
			check(t, err)
			if len(eps) != 0 {
				t.Error("the record is left")
			}
			again, err := w.m.Reserve(t.Context(), ports)
			check(t, err)
			check(t, again.Close())
			check(t, w.m.DetachDead(t.Context(), "aaa"))
		})
	}
}

// TestIPv6CountsAtOnce looks, on a machine that has other things to do, whether a container can be reached as soon as it is attached: the kernel
// has its address and the bridge's among its own, and doubts none of them.
func TestIPv6CountsAtOnce(t *testing.T) {
	w := newWorld(t)
	var stop atomic.Bool
	var burners sync.WaitGroup
	for range 2 * runtime.NumCPU() {
		burners.Go(func() {
			for n := 0; !stop.Load(); n++ {
			}
		})
	}
	defer burners.Wait()
	defer stop.Store(true)
	look := func(what string, name string, addrs ...netip.Addr) error {
		l, err := rtnetlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			routes, err := rtnetlink.RouteGetWithOptions(a.AsSlice(), &rtnetlink.RouteGetOptions{OifIndex: l.Attrs().Index})
			if err != nil {
				return err
			}
			if len(routes) != 1 || routes[0].Type != unix.RTN_LOCAL {
				t.Errorf("%s: %s is not the kernel's own: %v", what, a, routes)
			}
		}
		list, err := rtnetlink.AddrList(l, rtnetlink.FAMILY_V6)
		for _, a := range list {
			if a.Flags&unix.IFA_F_TENTATIVE != 0 && a.IP.IsGlobalUnicast() {
				t.Errorf("%s: %s is tentative", what, a)
			}
		}
		return err
	}
	for n := range 20 {
		name := fmt.Sprintf("c%d", n)
		c := w.attach(name)
		check(t, netlink.In(c.ns, func() error { return look(name, c.ep.Interface, c.ep.Address6.Addr()) }))
		bridge, err := rtnetlink.LinkByName(firstBridge)
		check(t, err)
		check(t, look("bridge", firstBridge, c.ep.Gateway6, linkLocal(bridge.Attrs().HardwareAddr)))
		check(t, w.m.Detach(t.Context(), name))
		if n%5 == 4 { // the next one makes the bridge
			check(t, w.m.Cleanup(t.Context()))
		}
	}
}
