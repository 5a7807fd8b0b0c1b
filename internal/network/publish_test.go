package network

import (
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"conex/internal/portmap"
)

// TestMove moves a container's ports between its two networks without end: nobody finds them closed, and nothing of either is left behind.
func TestMove(t *testing.T) {
	need(t, "nft")
	w := newWorld(t)
	_, err := w.m.Create(t.Context(), Spec{Name: "other"})
	check(t, err)
	c := w.attach("aaa")
	second, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "aaa", Name: "name-aaa", Network: "other", NetNS: c.ns,
		Settings: Settings{Interface: "eth1", NoDefaultRoute: true, NoDefaultRoute6: true}})
	check(t, err)
	c.serve(80)
	ports := []portmap.Mapping{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, {Proto: "udp", HostPort: 8080, ContainerPort: 80}}
	r := c.publish(ports...)
	before := sh(t, "nft list ruleset")
	eps := []*Endpoint{c.ep, second}
	here := 0
	move := func() {
		t.Helper()
		from, to := eps[here], eps[1-here]
		check(t, w.m.Route(eps, to, to, c.ns))
		check(t, w.m.Move(t.Context(), from, to, r))
		here = 1 - here
		if recorded, err := w.m.Endpoints("aaa"); err != nil || len(recorded[0].Ports) != len(ports) || len(recorded[1].Ports) > 0 || recorded[0].Interface != to.Interface {
			t.Errorf("records %+v, %v, want the ports on %s alone", recorded, err, to.Interface)
		}
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	asked := map[string]int{}
	var mu sync.Mutex
	for _, a := range []struct {
		ns   *os.File
		addr string
		// cut says that a connection ends with the move; else every one is answered.
		cut bool
	}{{w.client, hostIP4 + ":8080", false}, {w.client, "[" + hostIP6 + "]:8080", false}, {nil, "127.0.0.1:8080", true}} {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, err := ask(a.ns, "tcp", a.addr)
				if err != nil && (!a.cut || errors.Is(err, syscall.ECONNREFUSED)) {
					t.Errorf("%s: %v", a.addr, err)
					return
				}
				mu.Lock()
				asked[a.addr]++
				mu.Unlock()
			}
		})
	}
	often := func() bool { // each address was asked so often that moves came in between, or asking has failed
		mu.Lock()
		defer mu.Unlock()
		for _, addr := range []string{hostIP4 + ":8080", "[" + hostIP6 + "]:8080", "127.0.0.1:8080"} {
			if asked[addr] < 10 {
				return t.Failed()
			}
		}
		return true
	}
	for n := 0; n < 50 || !often(); n++ {
		move()
	}
	close(stop)
	wg.Wait()
	if after := sh(t, "nft list ruleset"); after != before {
		t.Errorf("rules were\n%s\nand are\n%s", before, after)
	}

	// Clients that stay find the container where it is, and see its own bridge's gateway where the forwarder helps them.
	u, err := net.Dial("udp", "127.0.0.1:8080")
	check(t, err)
	defer u.Close()
	for range 3 {
		check(t, u.SetDeadline(time.Now().Add(10*patience)))
		_, err := u.Write([]byte("hello"))
		check(t, err)
		b := make([]byte, 100)
		n, err := u.Read(b)
		check(t, err)
		if got, _, _ := strings.Cut(string(b[:n]), " "); got != eps[here].Gateway.String() {
			t.Errorf("the container saw %s, want %s", got, eps[here].Gateway)
		}
		if seen, err := ask(w.client, "udp", hostIP4+":8080"); err != nil || seen != clientIP4 {
			t.Errorf("asked from outside: source %q, %v", seen, err)
		}
		move()
	}

	// Somebody takes the table away.
	sh(t, "nft delete table inet conex")
	move()
	if seen, err := ask(w.client, "tcp", hostIP4+":8080"); err != nil || seen != clientIP4 {
		t.Errorf("after the table was deleted: source %q, %v", seen, err)
	}
	check(t, r.Close())
	if err := w.m.Move(t.Context(), eps[here], eps[1-here], r); err == nil {
		t.Error("a closed reservation was moved")
	}
}
