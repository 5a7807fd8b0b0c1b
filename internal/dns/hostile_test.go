package dns

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// rubbish are messages that no resolver sends.
func rubbish() [][]byte {
	good := question(1, "db.", typeA, 1232)
	change := func(fn func(b []byte)) []byte {
		b := append([]byte(nil), good...)
		fn(b)
		return b
	}
	return [][]byte{
		{}, {0}, good[:headerLen-1], good[:headerLen], good[:headerLen+3], good[:len(good)-1],
		change(func(b []byte) { b[2] |= bitResponse }),
		change(func(b []byte) { b[2] |= 5 << 3 }),                                                     // an update
		change(func(b []byte) { b[5] = 0 }),                                                           // no question
		change(func(b []byte) { b[5] = 2 }),                                                           // two
		change(func(b []byte) { b[4], b[6], b[8], b[10] = 0xff, 0xff, 0xff, 0xff }),                   // 65,000 of everything
		change(func(b []byte) { b[headerLen], b[headerLen+1] = 0xc0, headerLen }),                     // a name that is itself
		change(func(b []byte) { b[headerLen] = 0x3f }),                                                // a label that ends behind the message
		change(func(b []byte) { b[headerLen] = 0x80 }),                                                // no kind of label
		append(append([]byte{}, good[:headerLen]...), make([]byte, 4000)...),                          // zeros
		append([]byte{0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xc0, headerLen, 0, 41, 0, 1}, good[4:]...), // an option that points at itself
		change(func(b []byte) { copy(b[headerLen:], "\x02\x00\x0a") }),
	}
}

// TestRubbish: the server answers with an error or not at all, and goes on.
func TestRubbish(t *testing.T) {
	w := newWorld(t, Config{})
	c := w.dial("udp", "127.0.0.11:53")
	for _, b := range rubbish() {
		_, err := c.Write(b)
		check(t, err)
		tcp := w.dial("tcp", "127.0.0.11:53")
		_, err = tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
		check(t, err)
		tcp.Close()
	}
	_, err := c.Write(make([]byte, 60000)) // longer than any query
	check(t, err)
	for _, network := range []string{"udp", "tcp"} {
		if got := w.query(network, "db.", typeA, 0); got != "Success 172.30.0.2" {
			t.Errorf("afterwards over %s: %s", network, got)
		}
	}
	// The errors say which query they are about, and none begins a conversation.
	check(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = c.Write(question(99, "db.", typeA, 0))
	check(t, err)
	b := make([]byte, 512)
	for n := 0; ; n++ {
		k, err := c.Read(b)
		check(t, err)
		if b[2]&bitResponse == 0 || k < headerLen || n > len(rubbish()) {
			t.Fatalf("answer %x", b[:k])
		}
		if b[1] == 99 {
			break
		}
	}
}

// TestSlowClients: connections that say nothing hold no more than their number; datagrams are answered beside them, and so is a connection
// once one of them goes.
func TestSlowClients(t *testing.T) {
	w := newWorld(t, Config{})
	before := runtime.NumGoroutine()
	var slow []net.Conn
	for range maxConns + 10 {
		c := w.dial("tcp", "127.0.0.11:53")
		_, err := c.Write([]byte{0}) // half a length
		check(t, err)
		slow = append(slow, c)
	}
	if got := w.query("udp", "db.", typeA, 0); got != "Success 172.30.0.2" {
		t.Errorf("beside slow clients: %s", got)
	}
	if n := runtime.NumGoroutine() - before; n > maxConns+2 {
		t.Errorf("%d goroutines for %d connections", n, len(slow))
	}
	for _, c := range slow {
		c.Close()
	}
	if got := w.query("tcp", "db.", typeA, 0); got != "Success 172.30.0.2" {
		t.Errorf("after slow clients: %s", got)
	}
	// One that asks for ever and never listens ends, too: its answers go nowhere.
	w = newWorld(t, Config{idle: 100 * time.Millisecond})
	many := make([]netip.Addr, 1000)
	for k := range many {
		many[k] = netip.AddrFrom4([4]byte{172, 30, byte(k >> 8), byte(k)})
	}
	w.people.set("many", many)
	c := w.dial("tcp", "127.0.0.11:53").(*net.TCPConn)
	check(t, c.SetReadBuffer(1))
	check(t, c.SetWriteDeadline(time.Now().Add(20*time.Second)))
	msg := question(1, "many.", typeA, 0)
	framed := bytes.Repeat(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...), 100)
	for {
		if _, err := c.Write(framed); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Errorf("a client that does not listen is still served")
			}
			break
		}
	}
}

// TestClose: whatever is under way ends with the server.
func TestClose(t *testing.T) {
	newUpstream(t, "127.0.0.1:53", nil, func(string, []byte) [][]byte { return nil })
	before := runtime.NumGoroutine()
	for range 20 {
		w := newWorld(t, Config{Host: hosts("127.0.0.1")})
		udp, tcp := w.dial("udp", "127.0.0.11:53"), w.dial("tcp", "127.0.0.11:53")
		msg := question(1, "example.com.", typeTXT, 0)
		for range 10 {
			_, err := udp.Write(msg)
			check(t, err)
		}
		_, err := tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
		check(t, err)
		w.query("udp", "db.", typeA, 0)
		began := time.Now()
		check(t, w.s.Close())
		if d := time.Since(began); d > answerTime {
			t.Errorf("closing took %s", d)
		}
		check(t, tcp.SetReadDeadline(time.Now().Add(20*time.Second)))
		if _, err := io.ReadAll(tcp); err != nil && !isReset(err) {
			t.Errorf("the connection: %v", err)
		}
	}
	// Their threads in namespaces end a moment later than they do.
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before+2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

func isReset(err error) bool {
	op, ok := err.(*net.OpError)
	return ok && op.Op == "read"
}

// nobody are Names that know db alone.
type nobody struct{}

func (nobody) Addresses(name string) ([]netip.Addr, bool, error) {
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}, name == "db", nil
}
func (nobody) Reverse(netip.Addr) (string, bool, error) { return "a-b.c", true, nil }
func (nobody) Services(name, _ string, port uint16) ([]Service, bool, error) {
	return []Service{{name, port, []netip.Addr{netip.IPv4Unspecified()}}}, true, nil
}
func (nobody) Outward() bool { return false }

// FuzzQuery: whatever the container sends, the answer is a message about the same question that fits what it can take, and a message is read here
// exactly when the protocol's library reads it.
func FuzzQuery(f *testing.F) {
	for _, b := range rubbish() {
		f.Add(b)
	}
	f.Add(question(1, "_80._tcp.db.", typeSRV, 512))
	f.Add(question(1, "1.0.0.127.in-addr.arpa.", typePTR, 512))
	f.Add(question(1, "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", typePTR, 0))
	s := &Server{}
	s.Change(Config{Names: nobody{}})
	f.Fuzz(func(t *testing.T, b []byte) {
		given := string(b)
		q, refusal := parse(b)
		if string(b) != given {
			t.Fatal("the message was written to")
		}
		if q == nil {
			if refusal != nil && (len(refusal) != headerLen || refusal[2]&bitResponse == 0 || refusal[3]&rcodeBits == 0) {
				t.Fatalf("refusal %x", refusal)
			}
			return
		}
		for _, limit := range []int{512, 65000} {
			q.limit = limit
			out, done := s.local(q, make([]byte, 3, 64))
			if !done {
				continue
			}
			var m dnsmessage.Message
			if err := m.Unpack(out[3:]); err != nil {
				t.Fatalf("%q: answer %x: %v", b, out, err)
			}
			if len(out)-3 > max(limit, q.end+optionsLen) {
				t.Fatalf("%d bytes, limit %d", len(out), limit)
			}
			if string(out[3+headerLen:3+q.end]) != given[headerLen:q.end] {
				t.Fatal("another question")
			}
		}
	})
}

// FuzzAnswer: what servers send is compared, never trusted.
func FuzzAnswer(f *testing.F) {
	q := question(1, "db.example.", typeTXT, 0)
	f.Add(text(q, "x"))
	f.Add(q)
	f.Fuzz(func(t *testing.T, b []byte) {
		if answers(b, q) && binary.BigEndian.Uint16(b[4:]) == 1 && questionEnd(b) != len(q) {
			t.Errorf("%x passed as an answer", b)
		}
	})
}
