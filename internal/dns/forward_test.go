package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// hosts is Config.Host for some servers.
func hosts(addrs ...string) func() ([]netip.Addr, error) {
	var list []netip.Addr
	for _, a := range addrs {
		list = append(list, netip.MustParseAddr(a))
	}
	return func() ([]netip.Addr, error) { return list, nil }
}

// TestForward: question and answer pass as they are, but for the number.
func TestForward(t *testing.T) {
	var mu sync.Mutex
	seen := map[string][]byte{}
	numbers := map[uint16]bool{}
	u := newUpstream(t, "127.0.0.1:53", nil, func(network string, q []byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		numbers[binary.BigEndian.Uint16(q)] = true
		// An answer with what we know nothing of.
		a := append(text(q, "über "+network), "and rubbish behind"...)
		seen[network] = append([]byte(nil), a...)
		if !bytes.Equal(q[2:], question(0, "Example.COM.", 65, 1400)[2:]) {
			t.Errorf("the question became %x", q)
		}
		return [][]byte{a}
	})
	w := newWorld(t, Config{Host: hosts("127.0.0.1")})
	for _, network := range []string{"udp", "tcp"} {
		for range 20 {
			got := w.ask(network, question(0x1234, "Example.COM.", 65, 1400))
			mu.Lock()
			if !bytes.Equal(got[2:], seen[network][2:]) || got[0] != 0x12 || got[1] != 0x34 {
				t.Errorf("over %s: %x, the server said %x", network, got, seen[network])
			}
			mu.Unlock()
		}
	}
	if len(numbers) < 35 || numbers[0x1234] && len(numbers) < 38 {
		t.Errorf("numbers of 40 questions: %v", numbers)
	}
	u.questions()
}

// TestSizesForward: what a datagram has no room for is cut off, and fetched over TCP.
func TestSizesForward(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 250)
	u := newUpstream(t, "127.0.0.1:53", nil, func(network string, q []byte) [][]byte {
		a := text(q, string(long), string(long), string(long), string(long), string(long), string(long), string(long), string(long))
		if network == "udp" && !bytes.Contains(q, []byte("\x04rude")) {
			a = text(q)
			a[2] |= bitTruncated
		}
		return [][]byte{a}
	})
	w := newWorld(t, Config{Host: hosts("127.0.0.1")})
	for _, c := range []struct {
		network, name string
		edns          int
		cut           bool
	}{
		{"udp", "polite.example.", 0, true},
		{"tcp", "polite.example.", 0, false},
		{"udp", "rude.example.", 0, true},
		{"udp", "rude.example.", 1232, true},
		{"udp", "rude.example.", 4000, false},
		{"tcp", "rude.example.", 0, false},
	} {
		msg := question(3, c.name, typeTXT, c.edns)
		b := w.ask(c.network, msg)
		describe(t, b, msg)
		if cut := b[2]&bitTruncated != 0; cut != c.cut || !cut && len(b) < 2000 || cut && len(b) > 512 {
			t.Errorf("%s over %s, edns %d: %d bytes, cut off %v", c.name, c.network, c.edns, len(b), cut)
		}
	}
	u.questions()
}

// TestNext: a server that is silent, gone, unable or unwilling leaves the question to the next; one that was silent is asked last from then on.
func TestNext(t *testing.T) {
	servers := map[string]*upstream{}
	for addr, respond := range map[string]func(string, []byte) [][]byte{
		"127.0.1.1": func(string, []byte) [][]byte { return nil },
		"127.0.1.2": func(_ string, q []byte) [][]byte { return [][]byte{textAnswer(q, dnsmessage.RCodeServerFailure)} },
		"127.0.1.3": func(_ string, q []byte) [][]byte { return [][]byte{textAnswer(q, dnsmessage.RCodeRefused)} },
		"127.0.1.4": func(_ string, q []byte) [][]byte { return [][]byte{text(q, "good")} },
		"[::1]":     func(_ string, q []byte) [][]byte { return [][]byte{text(q, "six")} },
		"127.0.1.5": func(_ string, q []byte) [][]byte { return [][]byte{textAnswer(q, dnsmessage.RCodeNameError)} },
		"127.0.1.6": func(_ string, q []byte) [][]byte { // header alone, as old servers say it
			h := append([]byte(nil), q[:headerLen]...)
			h[2], h[3], h[5], h[11] = h[2]|bitResponse, byte(dnsmessage.RCodeFormatError), 0, 0
			return [][]byte{h}
		},
	} {
		servers[addr] = newUpstream(t, addr+":53", nil, respond)
	}
	const gone = "127.0.1.99"
	for _, c := range []struct {
		servers []string
		want    string
	}{
		{[]string{"127.0.1.2", "127.0.1.3", "127.0.1.4"}, "Success good"},
		{[]string{gone, "127.0.1.6", "127.0.1.4"}, "Success good"},
		{[]string{"127.0.1.5", "127.0.1.4"}, "NameError"},
		{[]string{"127.0.1.2", gone}, "ServerFailure"},
		{[]string{"127.0.1.3"}, "Refused"},
		{[]string{gone}, "ServerFailure"},
		{[]string{"::1"}, "Success six"},
		{[]string{"::1%lo"}, "Success six"},
		{[]string{"::1%nowhere", "::ffff:127.0.1.4"}, "Success good"},
		{nil, "ServerFailure"},
		{[]string{"127.0.1.1", "127.0.1.4"}, "Success good"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			w := newWorld(t, Config{Host: hosts(c.servers...)})
			if got := w.query(network, "example.com.", typeTXT, 0); got != c.want {
				t.Errorf("%v over %s: %s, want %s", c.servers, network, got, c.want)
			}
			if len(c.servers) == 2 && c.servers[0] == "127.0.1.1" {
				servers["127.0.1.1"].questions()
				if got := w.query(network, "example.com.", typeTXT, 0); got != c.want {
					t.Errorf("again over %s: %s", network, got)
				}
				if q := servers["127.0.1.1"].questions(); q != "" {
					t.Errorf("the silent server was asked first again: %s", q)
				}
			}
		}
	}
	// A server that hears only the second time is as good.
	var mu sync.Mutex
	heard := 0
	newUpstream(t, "127.0.1.7:53", nil, func(_ string, q []byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		if heard++; heard == 1 {
			return nil
		}
		return [][]byte{text(q, "second")}
	})
	w := newWorld(t, Config{Host: hosts("127.0.1.7")})
	if got := w.query("udp", "example.com.", typeTXT, 0); got != "Success second" {
		t.Errorf("a lost datagram: %s", got)
	}
	// Servers that speak no TCP are asked by datagram.
	p, err := net.ListenPacket("udp", "127.0.1.8:53")
	check(t, err)
	defer p.Close()
	go func() {
		b := make([]byte, 512)
		n, from, err := p.ReadFrom(b)
		if err == nil {
			_, _ = p.WriteTo(text(b[:n], "by datagram"), from)
		}
	}()
	w = newWorld(t, Config{Host: hosts("127.0.1.8")})
	if got := w.query("tcp", "example.com.", typeTXT, 0); got != "Success by datagram" {
		t.Errorf("without TCP: %s", got)
	}
}

// TestGuesses: an answer counts only when number and question are those that were sent.
func TestGuesses(t *testing.T) {
	newUpstream(t, "127.0.0.1:53", nil, func(_ string, q []byte) [][]byte {
		wrong := func(change func(a []byte)) []byte {
			a := text(q, "forged")
			change(a)
			return a
		}
		return [][]byte{
			wrong(func(a []byte) { a[0] ^= 1 }),
			wrong(func(a []byte) { a[2] &^= bitResponse }),
			wrong(func(a []byte) { a[headerLen+1] = 'z' }),
			wrong(func(a []byte) { a[questionEnd(a)-3] ^= 1 }),
			wrong(func(a []byte) { a[5] = 0 }),
			text(question(binary.BigEndian.Uint16(q), "other.example.", typeTXT, 0), "forged"),
			{}, {0}, q[:headerLen],
			wrong(func(a []byte) { a[headerLen+1] ^= 0x20 }), // this one only shouts
		}
	})
	w := newWorld(t, Config{Host: hosts("127.0.0.1")})
	msg := question(5, "example.com.", typeTXT, 0)
	b := w.ask("udp", msg)
	if b[headerLen+1] != 'E' || !bytes.Contains(b, []byte("forged")) {
		t.Errorf("answer %q", b)
	}
}

// TestWhomToAsk: the owner's servers are asked from inside and nobody else is; domains have their own; without a way out nobody is asked for
// the container.
func TestWhomToAsk(t *testing.T) {
	say := func(word string) func(string, []byte) [][]byte {
		return func(_ string, q []byte) [][]byte { return [][]byte{text(q, word)} }
	}
	newUpstream(t, "127.0.0.1:53", nil, say("host"))
	newUpstream(t, "127.0.0.2:5353", nil, say("corp"))
	newUpstream(t, "127.0.0.3:53", nil, say("deep"))
	domains := map[string][]netip.AddrPort{
		"corp.example": {netip.MustParseAddrPort("127.0.0.2:5353")}, "deep.corp.example": {netip.MustParseAddrPort("127.0.0.3:53")},
		"blocked.example": nil, "lan": {netip.MustParseAddrPort("127.0.0.2:5353")},
	}
	w := newWorld(t, Config{Host: hosts("127.0.0.1"), Domains: domains})
	ask := func(w *world, name, want string) {
		t.Helper()
		if got := w.query("udp", name, typeTXT, 0); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{
		"example.com.": "Success host", "corp.example.": "Success corp", "a.b.corp.example.": "Success corp", "x.deep.corp.example.": "Success deep",
		"xcorp.example.": "Success host", "blocked.example.": "NameError", "a.blocked.example.": "NameError", "nas.lan.": "Success corp", "lan.": "Success corp", "nas.": "NameError",
	} {
		ask(w, name, want)
	}
	w.people.mu.Lock()
	w.people.inward = true
	w.people.mu.Unlock()
	for name, want := range map[string]string{"example.com.": "ServerFailure", "corp.example.": "ServerFailure"} {
		ask(w, name, want)
	}
	if got := w.query("udp", "v4.", typeA, 0); got != "Success 172.30.0.3" {
		t.Errorf("without a way out: %s", got)
	}

	given := newWorld(t, Config{Host: hosts("127.0.0.1"), Domains: domains, Given: []netip.Addr{netip.MustParseAddr("127.0.0.1")}})
	newUpstream(t, "127.0.0.1:53", given.inside, say("inside"))
	given.people.mu.Lock()
	given.people.inward = true
	given.people.mu.Unlock()
	for _, name := range []string{"example.com.", "corp.example.", "blocked.example."} {
		ask(given, name, "Success inside")
	}
	// A server that the container has no way to is not asked from the host either.
	lost := newWorld(t, Config{Host: hosts("127.0.0.1"), Given: []netip.Addr{netip.MustParseAddr("192.0.2.53")}})
	ask(lost, "example.com.", "ServerFailure")
	broken := newWorld(t, Config{Host: func() ([]netip.Addr, error) { return nil, errors.New("unreadable") }})
	ask(broken, "example.com.", "ServerFailure")
}

// TestFlood: while no server answers, what is under way stays bounded, names of ours are answered as ever, and everybody is told at last.
func TestFlood(t *testing.T) {
	newUpstream(t, "127.0.0.1:53", nil, func(string, []byte) [][]byte { return nil })
	w := newWorld(t, Config{Host: hosts("127.0.0.1")})
	c := w.dial("udp", "127.0.0.11:53")
	check(t, c.SetDeadline(time.Now().Add(time.Minute)))
	roomy(t, c) // all of them are told at the same time
	const sent = maxAsked + maxWaiting + 500
	for k := range sent {
		_, err := c.Write(question(uint16(k), "example.com.", typeTXT, 0))
		check(t, err)
		if k%100 == 0 { // the server's turn
			if got := w.query("udp", "db.", typeA, 0); got != "Success 172.30.0.2" {
				t.Fatalf("under the flood: %s", got)
			}
		}
	}
	if n := len(w.s.waiting); n > maxWaiting {
		t.Errorf("%d are waiting", n)
	}
	b := make([]byte, 512)
	for range sent {
		n, err := c.Read(b)
		check(t, err)
		if dnsmessage.RCode(b[3]&rcodeBits) != rcodeServerFailure {
			t.Fatalf("answer %x", b[:n])
		}
	}
}

// roomy lets a socket hold what comes while nobody reads.
func roomy(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*net.UDPConn).SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueSize) }))
	check(t, err)
}
