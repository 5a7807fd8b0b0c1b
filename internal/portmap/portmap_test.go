package portmap

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/linux/netlink"
	"conex/internal/linux/nettest"
)

// TestMain runs the tests in a network namespace of their own, so that the machine's ports and tables are not touched.
func TestMain(m *testing.M) {
	nettest.Main(m, "port tests need root to make network namespaces", world)
}

// containerIP stands for a container: an address on the namespace's loopback, where the forwarder can reach it.
var containerIP = netip.MustParseAddr("10.77.0.2")

var (
	testTable  = Table{Name: "conex"}
	testBridge = Bridge{Name: "conex0", Masquerade: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}}
	testTarget = Target{Bridge: "conex0", IPv4: containerIP}
)

func world() error {
	if err := nettest.LoopbackUp(); err != nil {
		return err
	}
	lo, err := rtnetlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := rtnetlink.ParseAddr(containerIP.String() + "/32")
	if err != nil {
		return err
	}
	return rtnetlink.AddrReplace(lo, addr) // fuzz workers come here again
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func reserve(t *testing.T, ms ...Mapping) *Reservation {
	t.Helper()
	r, err := Reserve(t.Context(), ms)
	check(t, err)
	t.Cleanup(func() { check(t, r.Close()) })
	return r
}

func TestReserve(t *testing.T) {
	r := reserve(t, Mapping{Proto: "tcp", ContainerPort: 80}, Mapping{Proto: "tcp", ContainerPort: 81}, Mapping{Proto: "udp", ContainerPort: 80})
	ms := r.Mappings()
	if ms[0].HostPort < ephemeralFirst || ms[0].HostPort == ms[1].HostPort {
		t.Errorf("picked %v", ms)
	}
	// All addresses of both families are held.
	for _, addr := range []string{"127.0.0.1", "0.0.0.0", "[::1]", "[::]"} {
		l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", addr, ms[0].HostPort))
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s is not reserved: %v", addr, err)
			l.Close()
		}
	}
	for _, c := range []struct {
		m    Mapping
		want string
	}{
		{Mapping{Proto: "tcp", HostPort: ms[0].HostPort, ContainerPort: 80}, fmt.Sprintf("Bind for 0.0.0.0:%d failed: port is already allocated", ms[0].HostPort)},
		{Mapping{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: ms[0].HostPort, ContainerPort: 80}, fmt.Sprintf("Bind for 127.0.0.1:%d failed: port is already allocated", ms[0].HostPort)},
		{Mapping{Proto: "udp", HostIP: netip.MustParseAddr("::1"), HostPort: ms[2].HostPort, ContainerPort: 80}, fmt.Sprintf("Bind for [::1]:%d failed: port is already allocated", ms[2].HostPort)},
		{Mapping{Proto: "tcp", HostPort: ms[0].HostPort, HostPortEnd: ms[1].HostPort, ContainerPort: 80}, fmt.Sprintf("Bind for 0.0.0.0:%d-%d failed: all ports are allocated", ms[0].HostPort, ms[1].HostPort)},
	} {
		// The free mapping before it must be free again afterwards.
		_, err := Reserve(t.Context(), []Mapping{{Proto: "tcp", HostPort: 7000, ContainerPort: 1}, c.m})
		if !errors.Is(err, ErrPortTaken) || err.Error() != c.want {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
	check(t, reserve(t, Mapping{Proto: "tcp", HostPort: 7000, ContainerPort: 1}).Close())
	// A range takes its first free port.
	if got := reserve(t, Mapping{Proto: "tcp", HostPort: ms[0].HostPort, HostPortEnd: ms[1].HostPort + 1, ContainerPort: 80}).Mappings()[0].HostPort; got != ms[1].HostPort+1 {
		t.Errorf("range gave %d", got)
	}
	for _, m := range []Mapping{{Proto: "sctp", HostPort: 1, ContainerPort: 1, HostIP: netip.MustParseAddr("127.0.0.1")}, {Proto: "icmp", HostPort: 1, ContainerPort: 1}, {Proto: "tcp", HostPort: 1}, {Proto: "tcp", HostIP: netip.MustParseAddr("192.0.2.99"), HostPort: 7000, ContainerPort: 1}} {
		if r, err := Reserve(t.Context(), []Mapping{m}); err == nil || errors.Is(err, ErrPortTaken) {
			t.Errorf("%+v: %v %v", m, r, err)
		}
	}
}

func TestCollides(t *testing.T) {
	ip := func(s string) netip.Addr {
		if s == "" {
			return netip.Addr{}
		}
		return netip.MustParseAddr(s)
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"", "", true}, {"", "::1", true}, {"", "127.0.0.1", true}, {"0.0.0.0", "127.0.0.1", true}, {"0.0.0.0", "::1", false},
		{"::", "::1", true}, {"127.0.0.1", "127.0.0.2", false}, {"127.0.0.1", "127.0.0.1", true},
	} {
		a, b := Mapping{Proto: "tcp", HostIP: ip(c.a), HostPort: 80}, Mapping{Proto: "tcp", HostIP: ip(c.b), HostPort: 80}
		if a.Collides(b) != c.want || b.Collides(a) != c.want {
			t.Errorf("%q and %q: want %v", c.a, c.b, c.want)
		}
		b.Proto = "udp"
		if a.Collides(b) {
			t.Error("tcp collides with udp")
		}
	}
}

// TestForwardEnds has connections and sessions open in both directions when Close is called: no goroutine, port or element is
// left.
func TestForwardEnds(t *testing.T) {
	l, err := net.Listen("tcp4", containerIP.String()+":80")
	check(t, err)
	defer l.Close()
	u, err := net.ListenPacket("udp4", containerIP.String()+":80")
	check(t, err)
	defer u.Close()
	before := runtime.NumGoroutine()
	r := reserve(t, Mapping{Proto: "tcp", HostPort: 7100, ContainerPort: 80}, Mapping{Proto: "udp", HostPort: 7100, ContainerPort: 80})
	// A client that comes before the container is served once it is there.
	early, err := net.Dial("tcp", "127.0.0.1:7100")
	check(t, err)
	defer early.Close()
	table := testTable
	table.Socket = new(netlink.Kept) // a socket that were closed would be so later, see netlink.AfterGrace
	check(t, Ensure(table, testBridge))
	defer func() { check(t, Remove(table)) }()
	check(t, r.Activate(t.Context(), table, "c", testTarget))
	server, err := l.Accept()
	check(t, err)
	defer server.Close()
	_, err = server.Write([]byte("hi"))
	check(t, err)
	b := make([]byte, 64<<10)
	_, err = io.ReadFull(early, b[:2])
	check(t, err)

	for _, addr := range []string{"127.0.0.1:7100", "127.0.0.9:7100", "[::1]:7100"} {
		c, err := net.Dial("udp", addr)
		check(t, err)
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		// The largest datagrams, both ways, and two sessions that must not be mixed.
		msg := strings.Repeat(addr, 3000)
		_, err = c.Write([]byte(msg))
		check(t, err)
		n, from, err := u.ReadFrom(b)
		check(t, err)
		if string(b[:n]) != msg {
			t.Fatalf("%s: %d bytes arrived", addr, n)
		}
		_, err = u.WriteTo(b[:n], from)
		check(t, err)
		if n, err = c.Read(b); err != nil || string(b[:n]) != msg {
			t.Fatalf("%s: answer of %d bytes, %v", addr, n, err)
		}
	}
	check(t, r.Close())
	if _, err := early.Read(b); err == nil {
		t.Error("the connection outlives Close")
	}
	// Who says that it is done still counts until it has returned.
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines before, %d after", before, runtime.NumGoroutine())
		}
	}
	check(t, reserve(t, Mapping{Proto: "tcp", HostPort: 7100, ContainerPort: 80}, Mapping{Proto: "udp", HostPort: 7100, ContainerPort: 80}).Close())
	if err := r.Activate(t.Context(), table, "c", testTarget); err == nil {
		t.Error("a closed reservation was activated")
	}
}

func TestTCPRefused(t *testing.T) {
	r := reserve(t, Mapping{Proto: "tcp", HostPort: 7200, ContainerPort: 9})
	defer func() { check(t, Remove(testTable)) }()
	check(t, r.Activate(t.Context(), testTable, "c", testTarget))
	c, err := net.Dial("tcp", "127.0.0.1:7200")
	if err == nil { // else the reset was faster than Dial
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("nobody listens in the container: %v, want a reset", err)
	}
}

// TestUDPIdle lets sessions expire and checks that the next datagram opens a new one.
func TestUDPIdle(t *testing.T) {
	u, err := net.ListenPacket("udp4", containerIP.String()+":81")
	check(t, err)
	defer u.Close()
	r := reserve(t, Mapping{Proto: "udp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 7300, ContainerPort: 81})
	r.target = testTarget
	conn := r.held[0].udp
	raw, err := conn.SyscallConn()
	check(t, err)
	p := &udpPort{r: r, conn: conn, raw: raw, v4: true, port: 81, idle: time.Millisecond, sessions: make(map[client]*net.UDPConn)}
	r.done.Go(p.serve)
	c, err := net.Dial("udp", "127.0.0.1:7300")
	check(t, err)
	defer c.Close()
	for range 3 {
		_, err = c.Write([]byte("x"))
		check(t, err)
		check(t, u.SetReadDeadline(time.Now().Add(10*time.Second)))
		_, _, err := u.ReadFrom(make([]byte, 10))
		check(t, err)
		deadline := time.Now().Add(10 * time.Second)
		for n := 1; n > 0; {
			p.mu.Lock()
			n = len(p.sessions)
			p.mu.Unlock()
			if time.Now().After(deadline) {
				t.Fatal("the session does not expire")
			}
			runtime.Gosched()
		}
	}
}

// TestMemory holds an idle published port to a budget: the monitor has 3 MB for everything.
func TestMemory(t *testing.T) {
	const ports = 100
	var ms []Mapping
	for p := range ports {
		ms = append(ms, Mapping{Proto: []string{"tcp", "udp"}[p%2], HostPort: uint16(7400 + p), ContainerPort: 80})
	}
	used := func() uint64 {
		runtime.GC()
		runtime.GC() // the second empties what pools kept over the first
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := used()
	r := reserve(t, ms...)
	defer func() { check(t, Remove(testTable)) }()
	check(t, r.Activate(t.Context(), testTable, "c", testTarget))
	each := (int64(used()) - int64(before)) / ports
	t.Logf("%d bytes a published port", each)
	if each > 16<<10 {
		t.Errorf("%d bytes a published port, want at most 16 KiB", each)
	}
}

// TestAuditLegacy needs iptables-legacy to set what conex only reads.
func TestAuditLegacy(t *testing.T) {
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		t.Skip("iptables-legacy is not installed, so nobody can set its policy here")
	}
	policy := func(p string) {
		if out, err := exec.Command("iptables-legacy", "-P", "FORWARD", p).CombinedOutput(); err != nil {
			t.Skipf("this kernel has no iptables-legacy: %s", out)
		}
	}
	for _, c := range []struct {
		policy string
		want   bool
	}{{"DROP", true}, {"ACCEPT", false}} {
		policy(c.policy)
		found, err := Audit(t.Context(), testTable, []Audited{{testBridge, true}}, nil)
		check(t, err)
		got := false
		for _, f := range found {
			got = got || strings.Contains(f.What, "iptables-legacy")
		}
		if got != c.want {
			t.Errorf("policy %s: findings %+v", c.policy, found)
		}
	}
}

func FuzzLegacyRules(f *testing.F) {
	f.Add(make([]byte, 200), 0)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		for _, lf := range legacyFamilies {
			verdict, standard, next, err := lf.rule(b, at)
			if err != nil && (standard || verdict != 0) {
				t.Error("a verdict beside an error")
			}
			if err == nil && next <= at {
				t.Error("the rule after this one is not after it")
			}
			legacyChain{f: lf, entries: b, first: at, policy: len(b)}.passes("conex0")
		}
	})
}
