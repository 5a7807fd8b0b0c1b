package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
	"conex/internal/linux/nettest"
)

// TestMain runs the tests in a network namespace of their own, which is the host's here.
func TestMain(m *testing.M) {
	nettest.Main(m, "tests of the name service need root to make network namespaces", nettest.LoopbackUp)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newNetNS makes a network namespace without anything.
func newNetNS(t testing.TB) *os.File {
	t.Helper()
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{err: err}
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

// people are Names for tests.
type people struct {
	mu       sync.Mutex
	addrs    map[string][]netip.Addr
	reverse  map[netip.Addr]string
	subnet   netip.Prefix
	services []Service
	inward   bool
	err      error
}

func (p *people) set(name string, addrs []netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addrs[name] = addrs
}

func (p *people) Addresses(name string) ([]netip.Addr, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, ok := p.addrs[name]
	return append([]netip.Addr(nil), a...), ok, p.err
}

func (p *people) Reverse(a netip.Addr) (string, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.reverse[a], p.subnet.Contains(a), p.err
}

func (p *people) Services(name, proto string, port uint16) ([]Service, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, known := p.addrs[name]
	var out []Service
	for _, s := range p.services {
		if s.Port == port && proto == "tcp" {
			out = append(out, s)
		}
	}
	return out, known, p.err
}

func (p *people) Outward() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.inward
}

// world is a container with a name service.
type world struct {
	t      testing.TB
	ns     *os.File
	s      *Server
	people *people
}

// newWorld starts a server; the container's namespace has lo, which comes up after the sockets are there.
func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{t: t, ns: newNetNS(t), people: &people{
		addrs: map[string][]netip.Addr{
			"db":              {netip.MustParseAddr("172.30.0.2"), netip.MustParseAddr("fd00::2")},
			"stopped.example": nil,
			"v4":              {netip.MustParseAddr("172.30.0.3")},
			"api":             {netip.MustParseAddr("172.30.0.4"), netip.MustParseAddr("172.30.0.5"), netip.MustParseAddr("172.30.0.6")},
		},
		reverse:  map[netip.Addr]string{netip.MustParseAddr("172.30.0.2"): "db.net", netip.MustParseAddr("fd00::2"): "db.net"},
		subnet:   netip.MustParsePrefix("172.30.0.0/16"),
		services: []Service{{"db", 5432, []netip.Addr{netip.MustParseAddr("172.30.0.2"), netip.MustParseAddr("fd00::2")}}},
	}}
	cfg.NetNS = w.ns
	if cfg.Names == nil {
		cfg.Names = w.people
	}
	if cfg.Host == nil {
		cfg.Host = func() ([]netip.Addr, error) { return nil, nil }
	}
	s, err := Open(w.ns)
	check(t, err)
	w.inside(nettest.LoopbackUp)
	w.s, err = Start(s, cfg)
	check(t, err)
	t.Cleanup(func() { check(t, w.s.Close()) })
	return w
}

// inside runs fn in the container's network namespace.
func (w *world) inside(fn func() error) {
	w.t.Helper()
	check(w.t, netlink.In(w.ns, fn))
}

// dial connects a socket of the container to an address.
func (w *world) dial(network, addr string) net.Conn {
	w.t.Helper()
	var c net.Conn
	w.inside(func() (err error) {
		c, err = net.Dial(network, addr)
		return err
	})
	w.t.Cleanup(func() { c.Close() })
	return c
}

// question is a query as a resolver sends it.
func question(id uint16, name string, typ dnsmessage.Type, edns int) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	must(b.StartQuestions())
	must(b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET}))
	if edns > 0 {
		must(b.StartAdditionals())
		var h dnsmessage.ResourceHeader
		must(h.SetEDNS0(edns, dnsmessage.RCodeSuccess, true))
		must(b.OPTResource(h, dnsmessage.OPTResource{Options: []dnsmessage.Option{{Code: 10, Data: []byte("cookie..")}}}))
	}
	msg, err := b.Finish()
	must(err)
	return msg
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// ask sends a message and returns the answer.
func (w *world) ask(network string, msg []byte) []byte {
	w.t.Helper()
	c := w.dial(network, "127.0.0.11:53")
	defer c.Close()
	check(w.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	b, err := roundTrip(c, network, msg)
	if err != nil {
		w.t.Fatalf("no answer over %s: %v", network, err)
	}
	return b
}

func roundTrip(c net.Conn, network string, msg []byte) ([]byte, error) {
	if network == "tcp" {
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)); err != nil {
			return nil, err
		}
		return readMessage(c, 0xffff)
	}
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	b := make([]byte, 0xffff)
	n, err := c.Read(b)
	return b[:n], err
}

// query asks for a name and describes the answer: the code, a mark for what is cut off, the records in order.
func (w *world) query(network, name string, typ dnsmessage.Type, edns int) string {
	w.t.Helper()
	msg := question(0x1234, name, typ, edns)
	return describe(w.t, w.ask(network, msg), msg)
}

func describe(t testing.TB, b, asked []byte) string {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatalf("answer %x: %v", b, err)
	}
	if m.ID != binary.BigEndian.Uint16(asked) || !m.Response || !m.RecursionAvailable || !m.RecursionDesired {
		t.Errorf("header %+v", m.Header)
	}
	if end := questionEnd(asked); end > 0 && !strings.HasPrefix(string(b[headerLen:]), string(asked[headerLen:end])) {
		t.Errorf("the question came back as %v", m.Questions)
	}
	out := []string{strings.TrimPrefix(m.RCode.String(), "RCode")}
	if m.Truncated {
		out = append(out, "cut off")
	}
	for k, list := range [][]dnsmessage.Resource{m.Answers, m.Additionals} {
		if k == 1 && len(list) > 0 {
			out = append(out, "and")
		}
		for _, r := range list {
			switch body := r.Body.(type) {
			case *dnsmessage.AResource:
				out = append(out, netip.AddrFrom4(body.A).String())
			case *dnsmessage.AAAAResource:
				out = append(out, netip.AddrFrom16(body.AAAA).String())
			case *dnsmessage.PTRResource:
				out = append(out, body.PTR.String())
			case *dnsmessage.SRVResource:
				out = append(out, fmt.Sprintf("%s%d", body.Target, body.Port))
			case *dnsmessage.TXTResource:
				out = append(out, body.TXT...)
			case *dnsmessage.OPTResource:
				out = append(out, fmt.Sprintf("edns %d", r.Header.Class))
			default:
				out = append(out, fmt.Sprintf("%T", body))
			}
		}
	}
	return strings.Join(out, " ")
}

// upstream is a name server on the host, or where at runs.
type upstream struct {
	mu      sync.Mutex
	asked   []string
	udp     net.PacketConn
	tcp     net.Listener
	respond func(network string, q []byte) [][]byte
}

// newUpstream listens on an address of the host, or of the namespace that in enters, and answers each query with what respond returns.
func newUpstream(t testing.TB, addr string, in func(func() error), respond func(network string, q []byte) [][]byte) *upstream {
	t.Helper()
	u := &upstream{respond: respond}
	if in == nil {
		in = func(fn func() error) { check(t, fn()) }
	}
	in(func() (err error) {
		if u.udp, err = net.ListenPacket("udp", addr); err != nil {
			return err
		}
		u.tcp, err = net.Listen("tcp", addr)
		return err
	})
	var wg sync.WaitGroup
	wg.Add(2)
	go func() {
		defer wg.Done()
		b := make([]byte, 0xffff)
		for {
			n, from, err := u.udp.ReadFrom(b)
			if err != nil {
				return
			}
			for _, a := range u.note("udp", b[:n]) {
				_, _ = u.udp.WriteTo(a, from) // whoever asked may be gone
			}
		}
	}()
	go func() {
		defer wg.Done()
		for {
			c, err := u.tcp.Accept()
			if err != nil {
				return
			}
			if q, err := readMessage(c, 0xffff); err == nil {
				for _, a := range u.note("tcp", q) {
					_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
				}
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		u.udp.Close()
		u.tcp.Close()
		wg.Wait()
	})
	return u
}

func (u *upstream) note(network string, q []byte) [][]byte {
	var p dnsmessage.Parser
	name := "?"
	if _, err := p.Start(q); err == nil {
		if question, err := p.Question(); err == nil {
			name = question.Name.String()
		}
	}
	u.mu.Lock()
	u.asked = append(u.asked, network+" "+name)
	u.mu.Unlock()
	return u.respond(network, append([]byte(nil), q...))
}

// questions returns what the upstream was asked, and forgets it.
func (u *upstream) questions() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := strings.Join(u.asked, ", ")
	u.asked = nil
	return out
}

// text answers a query with a TXT record of words.
func text(q []byte, words ...string) []byte { return textAnswer(q, dnsmessage.RCodeSuccess, words...) }

func textAnswer(q []byte, rcode dnsmessage.RCode, words ...string) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(q)
	must(err)
	question, err := p.Question()
	must(err)
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true, RCode: rcode})
	must(b.StartQuestions())
	must(b.Question(question))
	must(b.StartAnswers())
	for _, w := range words {
		must(b.TXTResource(dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: 77}, dnsmessage.TXTResource{TXT: []string{w}}))
	}
	msg, err := b.Finish()
	must(err)
	return msg
}
