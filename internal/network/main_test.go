package network

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/linux/netlink"
	"conex/internal/linux/nettest"
	"conex/internal/portmap"
)

// TestMain runs the tests in a network namespace of their own, so that the machine's interfaces and tables are not touched.
func TestMain(m *testing.M) {
	nettest.Main(m, "network tests need root to make network namespaces", nil)
}

// The test's world: the "host" is the namespace of the test process, joined to the namespace "client" by a cable.
const (
	hostIP4, clientIP4 = "198.51.100.1", "198.51.100.2"
	hostIP6, clientIP6 = "fd00:c::1", "fd00:c::2"
	uplinkName         = "uplink0"
	wireMTU            = 1400
)

type world struct {
	t      testing.TB
	m      *Manager
	root   *disk.Root
	state  string
	client *os.File
}

func newWorld(t testing.TB) *world {
	t.Helper()
	dir := t.TempDir()
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	check(t, err)
	w := &world{t: t, root: root, state: filepath.Join(dir, "run")}
	w.m = Open(root, w.state)
	w.client = newNetNS(t)
	lo, err := rtnetlink.LinkByName("lo")
	check(t, err)
	check(t, rtnetlink.LinkSetUp(lo))
	w.cable(uplinkName, w.client, hostIP4+"/24", clientIP4+"/24", hostIP6+"/64", clientIP6+"/64")
	up, err := rtnetlink.LinkByName(uplinkName)
	check(t, err)
	check(t, rtnetlink.RouteAdd(&rtnetlink.Route{LinkIndex: up.Attrs().Index, Gw: net.ParseIP(clientIP4)}))
	t.Cleanup(func() {
		for _, id := range w.attached() {
			check(t, w.m.Detach(context.Background(), id))
		}
		check(t, w.m.Cleanup(context.Background()))
		w.noneLeft()
		check(t, deleteLink(uplinkName))
	})
	return w
}

// cable joins the host to another namespace with a veth pair.
func (w *world) cable(name string, ns *os.File, addrs ...string) {
	w.t.Helper()
	attrs := rtnetlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, wireMTU
	check(w.t, rtnetlink.LinkAdd(&rtnetlink.Veth{LinkAttrs: attrs, PeerName: "wire0", PeerMTU: wireMTU, PeerNamespace: rtnetlink.NsFd(ns.Fd())}))
	configure := func(name string, addrs ...string) error {
		l, err := rtnetlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := rtnetlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := rtnetlink.AddrAdd(l, addr); err != nil {
				return err
			}
		}
		return rtnetlink.LinkSetUp(l)
	}
	var here, there []string
	for i := 0; i < len(addrs); i += 2 {
		here, there = append(here, addrs[i]), append(there, addrs[i+1])
	}
	check(w.t, configure(name, here...))
	check(w.t, netlink.In(ns, func() error { return configure("wire0", there...) }))
	// Asking makes the kernel's link watch catch up, which can take a second: else the cable's first packets are lost.
	_, err := rtnetlink.LinkByName(name)
	check(w.t, err)
	check(w.t, netlink.In(ns, func() error {
		_, err := rtnetlink.LinkByName("wire0")
		return err
	}))
	check(w.t, awaitAddresses(name))
	check(w.t, netlink.In(ns, func() error { return awaitAddresses("wire0") }))
}

// awaitAddresses returns when an interface has all its IPv6 addresses, that of the link too.
func awaitAddresses(name string) error {
	l, err := rtnetlink.LinkByName(name)
	if err != nil {
		return err
	}
	addrs := []netip.Addr{linkLocal(l.Attrs().HardwareAddr)}
	list, err := rtnetlink.AddrList(l, rtnetlink.FAMILY_V6)
	if err != nil {
		return err
	}
	for _, a := range list {
		ip, _ := netip.AddrFromSlice(a.IP)
		addrs = append(addrs, ip)
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	return awaitLocal(c, int32(l.Attrs().Index), addrs...)
}

// attached lists the containers that have an endpoint record.
func (w *world) attached() []string {
	files, err := filepath.Glob(filepath.Join(w.state, "net", "*", "ep", "*.json"))
	check(w.t, err)
	var ids []string
	for _, f := range files {
		ids = append(ids, strings.TrimSuffix(filepath.Base(f), ".json"))
	}
	return ids
}

// noneLeft is the leak check: no interface, table or state of ours.
func (w *world) noneLeft() {
	w.t.Helper()
	// A veth that fell off its bridge goes with its container's namespace, and the kernel ends namespaces in its own time.
	var left []string
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		links, err := rtnetlink.LinkList()
		check(w.t, err)
		left = nil
		for _, l := range links {
			if n := l.Attrs().Name; ours(n) {
				left = append(left, n)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	if len(left) > 0 {
		w.t.Errorf("interfaces %v are left", left)
	}
	dirs, _ := os.ReadDir(filepath.Join(w.state, "net"))
	if dirs = slices.DeleteFunc(dirs, func(d os.DirEntry) bool { return d.Name() == "table.lock" }); len(dirs) > 0 {
		w.t.Errorf("state %v is left", dirs)
	}
	for _, name := range []string{"conex", "conex1"} {
		if tableExists(w.t, name) {
			w.t.Errorf("table %s is left", name)
		}
	}
}

// container is a namespace with an endpoint.
type container struct {
	ns *os.File
	ep *Endpoint
	w  *world
}

func (w *world) attach(id string) *container {
	w.t.Helper()
	c := &container{ns: newNetNS(w.t), w: w}
	ep, err := w.m.Attach(w.t.Context(), AttachRequest{ContainerID: id, Name: "name-" + id, NetNS: c.ns})
	check(w.t, err)
	c.ep = ep
	return c
}

// publish reserves and publishes ports until the test ends or the returned reservation is closed.
func (c *container) publish(ms ...portmap.Mapping) *portmap.Reservation {
	c.w.t.Helper()
	r, err := c.w.m.Reserve(c.w.t.Context(), ms)
	check(c.w.t, err)
	c.w.t.Cleanup(func() { check(c.w.t, r.Close()) })
	check(c.w.t, c.w.m.Publish(c.w.t.Context(), c.ep, r))
	return r
}

// serve answers every TCP connection and every UDP datagram on port with the peer's address and what it sent.
func (c *container) serve(port int) {
	c.w.t.Helper()
	for _, family := range []string{"4", "6"} {
		var l net.Listener
		var p net.PacketConn
		check(c.w.t, netlink.In(c.ns, func() (err error) {
			if l, err = net.Listen("tcp"+family, fmt.Sprintf(":%d", port)); err != nil {
				return err
			}
			p, err = net.ListenPacket("udp"+family, fmt.Sprintf(":%d", port))
			return err
		}))
		c.w.t.Cleanup(func() { l.Close(); p.Close() })
		go answerTCP(l)
		go answerUDP(p)
	}
}

func answerTCP(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			// Reading to the end first proves that a half-closed connection stays half open.
			b, _ := io.ReadAll(conn)
			fmt.Fprintf(conn, "%s %s", host(conn.RemoteAddr()), b)
		}()
	}
}

func answerUDP(p net.PacketConn) {
	b := make([]byte, 2048)
	for {
		n, from, err := p.ReadFrom(b)
		if err != nil {
			return
		}
		p.WriteTo([]byte(host(from)+" "+string(b[:n])), from)
	}
}

// patience is how long an answer may take. What must not be reached takes this long to show.
const patience = time.Second

// patient gives a connection as long as that, counted in turns of this process, which is that of the servers too: a machine that does not let it
// run takes nothing away from it. To be ended by its caller.
func patient(c interface{ SetDeadline(time.Time) error }) (end func()) {
	ctx, cancel := turns()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return func() {
		stop()
		cancel()
	}
}

func turns() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // ends with ctx
		const each = 10 * time.Millisecond
		for range patience / each {
			select {
			case <-ctx.Done():
				return
			case <-time.After(each):
			}
		}
		cancel()
	}()
	return ctx, cancel
}

func dial(network, addr string) (net.Conn, error) {
	ctx, cancel := turns()
	defer cancel()
	return new(net.Dialer).DialContext(ctx, network, addr)
}

// ask sends "hello" from a namespace (nil is the host) and returns the peer address that the server saw.
func ask(ns *os.File, network, addr string) (string, error) {
	var seen string
	f := func() error {
		c, err := dial(network, addr)
		if err != nil {
			return err
		}
		defer c.Close()
		defer patient(c)()
		if _, err := io.WriteString(c, "hello"); err != nil {
			return err
		}
		if t, ok := c.(*net.TCPConn); ok {
			if err := t.CloseWrite(); err != nil {
				return err
			}
			b, err := io.ReadAll(bufio.NewReader(c))
			seen = string(b)
			if err != nil {
				return err
			}
		} else {
			b := make([]byte, 100)
			n, err := c.Read(b)
			if err != nil {
				return err
			}
			seen = string(b[:n])
		}
		from, hello, _ := strings.Cut(seen, " ")
		if hello != "hello" {
			return fmt.Errorf("answer %q", seen)
		}
		seen = from
		return nil
	}
	if ns == nil {
		err := f()
		return seen, err
	}
	err := netlink.In(ns, f)
	return seen, err
}

func host(a net.Addr) string { return netip.MustParseAddrPort(a.String()).Addr().Unmap().String() }

// newNetNS makes a network namespace that lives as long as its file.
func newNetNS(t testing.TB) *os.File {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with this goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- result{f, err}
	}()
	r := <-ch
	check(t, r.err)
	t.Cleanup(func() { r.f.Close() })
	return r.f
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
