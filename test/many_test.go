package test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// atATime is how many commands TestManyContainers runs at once.
const atATime = 8

// TestManyContainers creates, starts, executes into, stops and removes many containers by eight processes at a time, half of them in
// the bridge network: no command fails, all are there at once, and nothing is left (the end of the world checks that). CONEX_CONTAINERS
// says how many.
func TestManyContainers(t *testing.T) {
	n := 40
	if s := os.Getenv("CONEX_CONTAINERS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			t.Fatalf("CONEX_CONTAINERS: %v", err)
		}
	}
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	name := func(i int) string { return fmt.Sprintf("many-%03d", i) }
	each := func(what string, args func(i int) []string, want func(i int, out string) bool) {
		t.Helper()
		var wg sync.WaitGroup
		next := make(chan int)
		for range atATime {
			wg.Go(func() {
				for i := range next {
					r := w.try(args(i)...)
					if r.code != 0 || r.stderr != "" || want != nil && !want(i, strings.TrimSpace(r.stdout)) {
						t.Errorf("%s %s: exit code %d, %q, %s", what, name(i), r.code, r.stdout, r.stderr)
					}
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	isName := func(i int, out string) bool { return out == name(i) }
	each("create", func(i int) []string {
		net := "none"
		if i%2 == 0 {
			net = "bridge"
		}
		return []string{"create", "--name", name(i), "--network", net, "-l", "number=" + strconv.Itoa(i), "busybox", "sleep", "100000"}
	}, func(_ int, out string) bool { return len(out) == 64 })
	w.containers() // for the search for what they leave
	each("start", func(i int) []string { return []string{"start", name(i)} }, isName)
	ps := w.try("ps", "-q")
	if got := len(strings.Fields(ps.stdout)); got != n {
		t.Errorf("ps shows %d of %d", got, n)
	}
	t.Logf("ps of %d containers took %v", n, ps.took)
	// Each has an address of its own.
	seen := map[string]string{}
	for line := range strings.Lines(w.conex(append([]string{"inspect", "-f", "{{.Name}} {{.NetworkSettings.Networks.bridge.IPAddress}}"}, w.bridged()...)...)) {
		id, addr, _ := strings.Cut(strings.TrimSpace(line), " ")
		if addr == "" || seen[addr] != "" {
			t.Errorf("%s has the address %q, as %q has", id, addr, seen[addr])
		}
		seen[addr] = id
	}
	if len(seen) != (n+1)/2 {
		t.Errorf("%d addresses of %d", len(seen), (n+1)/2)
	}
	each("exec", func(i int) []string { return []string{"exec", name(i), "hostname"} }, func(_ int, out string) bool { return len(out) == 12 })
	each("stop", func(i int) []string { return []string{"stop", "-t", "0", name(i)} }, isName)
	if got := w.conex("ps", "-q"); got != "" {
		t.Errorf("after stop ps shows %q", got)
	}
	if got := len(strings.Fields(w.conex("ps", "-aq", "--filter", "exited=137"))); got != n {
		t.Errorf("ps shows %d of %d as stopped", got, n)
	}
	each("rm", func(i int) []string { return []string{"rm", name(i)} }, isName)
	if got := w.conex("ps", "-aq"); got != "" {
		t.Errorf("after rm ps shows %q", got)
	}
}

// bridged lists the containers in the bridge network.
func (w *world) bridged() []string {
	return strings.Fields(w.conex("ps", "-q", "--no-trunc", "--filter", "network=bridge"))
}
