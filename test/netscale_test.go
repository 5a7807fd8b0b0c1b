package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// number reads how many of something a test does: the variable's value, else a few.
func number(t *testing.T, variable string, few int) int {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		return few
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return n
}

// resolver asks the name service of a container, from inside.
func (p *place) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (c net.Conn, err error) {
		err = p.in(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, "127.0.0.11:53")
			return err
		})
		return c, err
	}}
}

// TestManyOnANetwork puts many containers on one network: each has an address of its own, one finds all by name, the alias of all gives
// all, and afterwards nothing is left. CONEX_CONTAINERS says how many, 200 are promised.
func TestManyOnANetwork(t *testing.T) {
	n := number(t, "CONEX_CONTAINERS", 30)
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.conex("network", "create", "crowd")
	name := func(i int) string { return fmt.Sprintf("one-of-%03d", i) }
	var wg sync.WaitGroup
	next := make(chan int)
	for range atATime {
		wg.Go(func() {
			for i := range next {
				if r := w.try("run", "-d", "--name", name(i), "--network", "name=crowd,alias=all", "busybox", "sleep", "100000"); r.code != 0 {
					t.Errorf("run %s: %s", name(i), r.stderr)
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	w.containers() // for the search for what they leave
	if t.Failed() {
		return
	}
	first := w.container(name(0))
	rs := first.resolver()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var seen []netip.Addr
	began := time.Now()
	for i := range n {
		addrs, err := rs.LookupNetIP(ctx, "ip4", name(i))
		if err != nil || len(addrs) != 1 || slices.Contains(seen, addrs[0]) {
			t.Fatalf("%s has the addresses %v, %v", name(i), addrs, err)
		}
		seen = append(seen, addrs[0])
	}
	t.Logf("%d names resolved in %v", n, time.Since(began))
	all, err := rs.LookupNetIP(ctx, "ip4", "all")
	if err != nil || len(all) != n {
		t.Errorf("the alias of %d containers has %d addresses, %v", n, len(all), err)
	}
	for _, a := range all {
		if !slices.Contains(seen, a.Unmap()) && !slices.Contains(seen, a) {
			t.Errorf("the alias has %s, which no container has", a)
		}
	}
	// Those at both ends reach each other.
	last := w.container(name(n - 1))
	stop, err := last.serve(service)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for _, a := range last.addrs {
		if !a.IsValid() {
			continue
		}
		if who, _, err := first.ask("tcp", netip.AddrPortFrom(a, service), 10*time.Second); err != nil || who != last.name {
			t.Errorf("%s at %s: %q answers, %v", last.name, a, who, err)
		}
	}
}

// TestPortAgain publishes the same port by one container after the other; each time it leads to the one that has it, and in the end the
// table is what it was. CONEX_ROUNDS says how often, 1,000 times are promised.
func TestPortAgain(t *testing.T) {
	n := number(t, "CONEX_ROUNDS", 30)
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.conex("run", "--rm", "-p", "8080:80", "busybox", "true")
	before := w.tracesAtRest()
	for i := range n {
		said := fmt.Sprintf("round %d", i)
		w.conex("run", "-d", "--name", "web", "-p", "8080:80", "busybox", "sh", "-c", "mkdir /www; echo "+said+" >/www/index.html; exec httpd -f -p 80 -h /www")
		if got := strings.TrimSpace(w.get("http://127.0.0.1:8080/")); got != said {
			t.Fatalf("the port says %q in %s", got, said)
		}
		w.conex("rm", "-f", "web")
	}
	now := ""
	for deadline := time.Now().Add(giveUp); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if now = w.traces(); now == before {
			return
		}
	}
	t.Errorf("after %d rounds:\n%s", n, lineDifferences(before, now))
}

// TestConnectUnderTraffic connects a container to a second network and disconnects it, while another one talks with it on the first: no
// datagram is lost, over IPv4 nor IPv6.
func TestConnectUnderTraffic(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.conex("network", "create", "--ipv6", "one")
	w.conex("network", "create", "--ipv6", "two")
	for _, name := range []string{"server", "client"} {
		w.conex("run", "-d", "--name", name, "--network", "one", "busybox", "sleep", "100000")
	}
	server, client := w.container("server"), w.container("client")
	stop, err := server.serve(service)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	ctx, cancel := context.WithCancel(t.Context())
	type traffic struct {
		what  string
		asked int
		err   error
	}
	results := make(chan traffic)
	for _, addr := range server.addrs {
		to := netip.AddrPortFrom(addr, service)
		go func() {
			r := traffic{what: "udp " + to.String()}
			r.asked, r.err = client.askAndAsk(ctx, to)
			results <- r
		}()
	}
	const rounds = 10
	for range rounds {
		w.conex("network", "connect", "--alias", "second", "two", "server")
		w.conex("network", "disconnect", "two", "server")
	}
	cancel()
	for range server.addrs {
		r := <-results
		if r.err != nil {
			t.Errorf("%s: after %d answers: %v", r.what, r.asked, r.err)
		}
		if r.asked < rounds {
			t.Errorf("%s: only %d questions were asked meanwhile", r.what, r.asked)
		}
		t.Logf("%s: %d questions, all answered", r.what, r.asked)
	}
}

// askAndAsk asks over one UDP socket, one question after the other, until ctx ends. A datagram that gets no answer within ten seconds is lost.
func (p *place) askAndAsk(ctx context.Context, to netip.AddrPort) (asked int, err error) {
	var c net.Conn
	if err := p.in(func() (err error) { c, err = net.Dial("udp", to.String()); return err }); err != nil {
		return 0, err
	}
	defer c.Close()
	b := make([]byte, 128)
	for ; ctx.Err() == nil; asked++ {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return asked, err
		}
		if _, err := c.Write([]byte{'?'}); err != nil {
			return asked, err
		}
		if n, err := c.Read(b); err != nil || n == 0 {
			return asked, errors.Join(errSilent, err)
		}
	}
	return asked, nil
}

// TestPortsMoveWithNetworks takes a container off its networks one by one: the published port leads to it over those that are left, an
// internal one as the last, and again when it is connected to another. As long as it is on one nobody finds the port closed.
func TestPortsMoveWithNetworks(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	for _, args := range [][]string{{"one"}, {"two"}, {"--internal", "three"}} {
		w.conex(append([]string{"network", "create"}, args...)...)
	}
	w.conex("run", "-d", "--name", "web", "-p", "8080:80", "-p", "80", "--network", "one", "--network", "two", "--network", "three",
		"busybox", "sh", "-c", "mkdir /www; echo here >/www/index.html; exec httpd -f -p 80 -h /www")
	ports := w.conex("port", "web")
	reached := func(when string) {
		t.Helper()
		if got := w.get("http://127.0.0.1:8080/"); got != "here\n" {
			t.Errorf("%s the port says %q", when, got)
		}
		if got := w.conex("port", "web"); got != ports {
			t.Errorf("%s the ports are %q, were %q", when, got, ports)
		}
	}
	reached("at first")
	// One client after another: each waits for its answer, for the server's queue is short. Whose connection ends at a move has none.
	stop, answered := make(chan struct{}), 0
	var refused error
	var client sync.WaitGroup
	client.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			c, err := w.dial(ctx, "tcp", "127.0.0.1:8080")
			cancel()
			if err != nil {
				refused = err
				continue
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
			if b, err := io.ReadAll(c); err == nil && strings.HasSuffix(string(b), "\r\n\r\nhere\n") {
				answered++
			}
			c.Close()
		}
	})
	end := sync.OnceFunc(func() {
		close(stop)
		client.Wait()
	})
	defer end()
	w.conex("network", "disconnect", "one", "web")
	reached("on two and three")
	w.conex("network", "connect", "one", "web")
	reached("on one again")
	w.conex("network", "disconnect", "one", "web")
	w.conex("network", "disconnect", "two", "web")
	reached("on three")
	end()
	if refused != nil || answered < 10 {
		t.Errorf("beside %d connections with an answer: %v", answered, refused)
	}
	w.conex("network", "disconnect", "three", "web")
	if got := w.conex("port", "web"); got != "" {
		t.Errorf("without a network the ports are %q", got)
	}
	w.conex("network", "connect", "two", "web")
	reached("on two again")
}
