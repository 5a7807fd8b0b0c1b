package dns

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"conex/internal/linux/nettest"
)

const (
	typeA, typeAAAA, typePTR, typeSRV, typeTXT = dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypePTR, dnsmessage.TypeSRV, dnsmessage.TypeTXT
)

// TestNames: what is ours is answered over both protocols, and nothing of it, known or not, is asked for elsewhere.
func TestNames(t *testing.T) {
	u := newUpstream(t, "127.0.0.1:53", nil, func(_ string, q []byte) [][]byte { return [][]byte{text(q, "leaked")} })
	w := newWorld(t, Config{Host: func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil }})
	for _, c := range []struct {
		name string
		typ  dnsmessage.Type
		want string
	}{
		{"db.", typeA, "Success 172.30.0.2"},
		{"DB.", typeA, "Success 172.30.0.2"},
		{"db.", typeAAAA, "Success fd00::2"},
		{"v4.", typeAAAA, "Success"},
		{"v4.", dnsmessage.TypeMX, "Success"},
		{"db.", dnsmessage.TypeNS, "Success"},
		{"stopped.example.", typeA, "NameError"},
		{"nobody.", typeA, "NameError"},
		{"nobody.", typeTXT, "NameError"},
		{"nobody.docker.internal.", typeA, "NameError"},
		{"docker.internal.", typeA, "NameError"},
		{"2.0.30.172.in-addr.arpa.", typePTR, "Success db.net."},
		{"2.0.30.172.in-addr.arpa.", typeTXT, "Success"},
		{"9.0.30.172.in-addr.arpa.", typePTR, "NameError"},
		{"2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", typePTR, "Success db.net."},
		{"1.0.0.127.in-addr.arpa.", typePTR, "Success localhost."},
		{"9.9.9.127.in-addr.arpa.", typePTR, "NameError"},
		{"localhost.", typeA, "Success 127.0.0.1"},
		{"a.localhost.", typeAAAA, "Success ::1"},
		{"_5432._tcp.db.", typeSRV, "Success db.5432 and 172.30.0.2 fd00::2"},
		{"_postgresql._tcp.db.", typeSRV, "Success db.5432 and 172.30.0.2 fd00::2"},
		{"_5432._tcp.db.", typeA, "Success"},
		{"_80._tcp.db.", typeSRV, "NameError"},
		{"_nonsense._tcp.db.", typeSRV, "NameError"},
		{"_80._tcp.nobody.", typeSRV, "NameError"},
		{"db.", typeAXFR, "Refused"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			if got := w.query(network, c.name, c.typ, 0); got != c.want {
				t.Errorf("%s %s over %s: %s, want %s", c.name, c.typ, network, got, c.want)
			}
		}
	}
	if got := w.query("udp", "db.", typeA, 1232); got != "Success 172.30.0.2 and edns 4096" {
		t.Errorf("with options: %s", got)
	}
	if q := u.questions(); q != "" {
		t.Errorf("others were asked: %s", q)
	}
	// What is nobody's goes out, under its name and type.
	for _, name := range []string{"example.com.", "1.2.0.192.in-addr.arpa.", "_80._tcp.example.com.", "metadata.google.internal.", "docker.internal.example."} {
		if got := w.query("udp", name, typeTXT, 0); got != "Success leaked" {
			t.Errorf("%s: %s", name, got)
		}
	}
	for _, typ := range []dnsmessage.Type{typeDS, typeDNSKEY, dnsmessage.TypeNS} {
		if got := w.query("udp", "com.", typ, 0); got != "Success leaked" {
			t.Errorf("com. %s: %s", typ, got)
		}
	}
	w.people.mu.Lock()
	w.people.err = unix.EIO
	w.people.mu.Unlock()
	for _, name := range []string{"db.", "2.0.30.172.in-addr.arpa.", "_80._tcp.db."} {
		if got := w.query("udp", name, typeA, 0); got != "ServerFailure" {
			t.Errorf("%s, unreadable: %s", name, got)
		}
	}
}

// TestShare: everybody behind a name comes first sometimes.
func TestShare(t *testing.T) {
	w := newWorld(t, Config{})
	first := map[string]int{}
	for range 300 {
		got := strings.Fields(w.query("udp", "api.", typeA, 0))
		if len(got) != 4 {
			t.Fatalf("answer %v", got)
		}
		first[got[1]]++
	}
	for a, n := range first {
		if len(first) != 3 || n < 50 {
			t.Errorf("%s came first %d times of 300: %v", a, n, first)
		}
	}
}

// TestSizes: an answer is no longer than the client can take, and whole over TCP.
func TestSizes(t *testing.T) {
	w := newWorld(t, Config{})
	var many []netip.Addr
	for k := range 200 {
		many = append(many, netip.AddrFrom4([4]byte{172, 30, 1, byte(k)}))
	}
	w.people.set("many", many)
	for _, c := range []struct {
		network     string
		edns, limit int
		cut         bool
	}{{"udp", 0, 512, true}, {"udp", 100, 512, true}, {"udp", 1232, 1232, true}, {"udp", 4096, 4096, false}, {"udp", 65535, 65507, false}, {"tcp", 0, 65535, false}, {"tcp", 512, 65535, false}} {
		msg := question(7, "many.", typeA, c.edns)
		b := w.ask(c.network, msg)
		got := describe(t, b, msg)
		if n := strings.Count(got, "172.30.1."); len(b) > c.limit || strings.Contains(got, "cut off") != c.cut || n < 200 && !c.cut || n < 25 || c.edns > 0 != strings.Contains(got, "edns") {
			t.Errorf("%s, edns %d: %d bytes, %s", c.network, c.edns, len(b), got)
		}
	}
}

// TestPort53 shows that the port is the container's own: whatever it binds there works beside ours, before and after.
func TestPort53(t *testing.T) {
	w := newWorld(t, Config{})
	echo := func(network, addr string) string {
		t.Helper()
		c := w.dial(network, addr)
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		_, err := c.Write([]byte("hello"))
		check(t, err)
		b := make([]byte, 64)
		n, err := c.Read(b)
		check(t, err)
		return string(b[:n])
	}
	for _, addr := range []string{"0.0.0.0:53", "[::]:53", "127.0.0.1:53", "127.0.0.11:53"} {
		var p net.PacketConn
		var l net.Listener
		w.inside(func() (err error) {
			if p, err = net.ListenPacket("udp", addr); err != nil {
				return err
			}
			l, err = net.Listen("tcp", addr)
			return err
		})
		done := make(chan struct{}, 2)
		go func() {
			defer func() { done <- struct{}{} }()
			b := make([]byte, 64)
			for {
				_, from, err := p.ReadFrom(b)
				if err != nil {
					return
				}
				if _, err := p.WriteTo([]byte("own udp"), from); err != nil {
					return
				}
			}
		}()
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = c.Write([]byte("own tcp")) // what was read says whether it came
				c.Close()
			}
		}()
		if addr != "127.0.0.11:53" {
			for _, network := range []string{"udp", "tcp"} {
				if got := echo(network, "127.0.0.1:53"); got != "own "+network {
					t.Errorf("%s: own server over %s says %q", addr, network, got)
				}
			}
		}
		for _, network := range []string{"udp", "tcp"} {
			if got := w.query(network, "db.", typeA, 0); got != "Success 172.30.0.2" {
				t.Errorf("%s: over %s %s", addr, network, got)
			}
		}
		p.Close()
		l.Close()
		<-done
		<-done
	}
	// Whoever asks from another address of his own gets the answer there.
	var c net.Conn
	w.inside(func() (err error) {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 77)}}
		c, err = d.Dial("udp", "127.0.0.11:53")
		return err
	})
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	msg := question(9, "db.", typeA, 0)
	b, err := roundTrip(c, "udp", msg)
	check(t, err)
	if got := describe(t, b, msg); got != "Success 172.30.0.2" {
		t.Error(got)
	}
}

// TestWithoutBPF: plain sockets answer too, where the kernel has no way to steer.
func TestWithoutBPF(t *testing.T) {
	w := &world{t: t, ns: newNetNS(t), people: &people{addrs: map[string][]netip.Addr{"db": {netip.MustParseAddr("172.30.0.2")}}}}
	var s *Sockets
	w.inside(nettest.LoopbackUp)
	w.inside(func() (err error) {
		s, err = plain()
		return err
	})
	var err error
	w.s, err = Start(s, Config{Names: w.people, NetNS: w.ns, Host: func() ([]netip.Addr, error) { return nil, nil }})
	check(t, err)
	for _, network := range []string{"udp", "tcp"} {
		if got := w.query(network, "db.", typeA, 0); got != "Success 172.30.0.2" {
			t.Errorf("over %s: %s", network, got)
		}
	}
	check(t, w.s.Close())
	check(t, w.s.Close())
	// Nothing of it is left.
	w.inside(func() error {
		p, err := net.ListenPacket("udp", "127.0.0.11:53")
		if err != nil {
			return err
		}
		return p.Close()
	})
}

// TestMany: one container asks 20,000 times from several sockets at once, and loses none.
func TestMany(t *testing.T) {
	w := newWorld(t, Config{})
	const senders, each = 8, 2500
	errs := make(chan error, senders)
	for k := range senders {
		c := w.dial("udp", "127.0.0.11:53")
		check(t, c.SetDeadline(time.Now().Add(time.Minute)))
		go func() {
			// Several are under way at a time, as many as a busy server of names has.
			const window = 32
			open := map[uint16]bool{}
			b := make([]byte, 512)
			for sent := 0; sent < each || len(open) > 0; {
				for len(open) < window && sent < each {
					sent++
					id := uint16(k*each + sent)
					open[id] = true
					if _, err := c.Write(question(id, "db.", typeA, 0)); err != nil {
						errs <- err
						return
					}
				}
				n, err := c.Read(b)
				if err != nil {
					errs <- err
					return
				}
				id := uint16(b[0])<<8 | uint16(b[1])
				if n < headerLen || !open[id] || b[7] != 1 {
					t.Errorf("answer %x", b[:n])
				}
				delete(open, id)
			}
			errs <- nil
		}()
	}
	for range senders {
		if err := <-errs; err != nil {
			t.Errorf("a query was lost: %v", err)
		}
	}
}

// BenchmarkAnswer is a question about a name of ours, and its answer.
func BenchmarkAnswer(b *testing.B) {
	w := newWorld(b, Config{})
	c := w.dial("udp", "127.0.0.11:53")
	msg, buf := question(1, "db.", typeA, 0), make([]byte, 512)
	b.ReportAllocs()
	for b.Loop() {
		_, err := c.Write(msg)
		check(b, err)
		_, err = c.Read(buf)
		check(b, err)
	}
}

// BenchmarkLocal is the server's part of it, without the kernel's.
func BenchmarkLocal(b *testing.B) {
	s := &Server{}
	s.Change(Config{Names: nobody{}})
	msg, buf := question(1, "db.", typeA, 0), make([]byte, 0, 512)
	b.ReportAllocs()
	for b.Loop() {
		q, _ := parse(msg)
		q.limit = 512
		s.local(q, buf)
	}
}
