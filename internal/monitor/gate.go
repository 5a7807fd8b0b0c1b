package monitor

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"conex/internal/egress"
	"conex/internal/network"
)

// gate bounds what a run may reach (--egress): the filters of its interfaces, which names it may look up, and whom it tells of what
// was denied. All methods may be called on a nil gate, which bounds nothing.
type gate struct {
	m    *monitor
	told *egress.Told
	done chan struct{} // closed when the listener has ended

	mu      sync.Mutex
	list    egress.List
	filters []*egress.Filter
	// names are the names of addresses that were looked up, for messages, for networks that come later and for other lists.
	names egress.Learnt
	// The minute of events that has begun at since: what was told of names, how many in all, and how many more.
	since  time.Time
	asked  map[string]bool
	events int
	untold int
}

const (
	// maxLearnt bounds the addresses whose names are remembered, maxAliases the names of one, maxTold the events a minute.
	maxLearnt, maxAliases, maxTold = 1024, 8, 60
	// actionDenied is the event of what a container was not let do. Docker has none such.
	actionDenied = "egress-denied"
)

// openGate makes the run's gate when the container is bounded.
func (r *run) openGate() error {
	values := r.m.current().Options.Egress
	if len(values) == 0 {
		return nil
	}
	list, err := egress.Parse(values)
	if err != nil {
		return err
	}
	r.gate, err = r.m.newGate(list)
	return err
}

func (m *monitor) newGate(list egress.List) (*gate, error) {
	told, err := egress.Listen()
	if err != nil {
		return nil, err
	}
	g := &gate{m: m, list: list, told: told, done: make(chan struct{}), names: egress.Learnt{}, asked: map[string]bool{}}
	go g.listen()
	return g, nil
}

func (g *gate) settings() *network.Egress {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return &network.Egress{List: g.list, Group: g.told.Group()}
}

// add takes an interface's filter in, which learns what is known so far.
func (g *gate) add(f *egress.Filter) error {
	if g == nil || f == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.filters = append(g.filters, f)
	if len(g.names) == 0 {
		return nil
	}
	return f.Change(g.list, g.names)
}

// remove gives an interface's filter up; whoever detaches the interface removes it.
func (g *gate) remove(f *egress.Filter) error {
	if g == nil || f == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.filters = slices.DeleteFunc(g.filters, func(o *egress.Filter) bool { return o == f })
	return f.Close()
}

// close gives all filters up. Idempotent.
func (g *gate) close() error {
	if g == nil {
		return nil
	}
	err := g.told.Close()
	<-g.done
	g.mu.Lock()
	defer g.mu.Unlock()
	errs := []error{}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		errs = append(errs, err)
	}
	for _, f := range g.filters {
		errs = append(errs, f.Close())
	}
	g.filters = nil
	return errors.Join(errs...)
}

// begin learns what the container knows without asking: listed names in its hosts file, and of containers.
func (g *gate) begin(names *network.Names, hosts []string) error {
	for _, h := range hosts {
		name, ip, _ := strings.Cut(h, ":")
		if a, err := netip.ParseAddr(ip); err == nil {
			if err := g.learn(strings.ToLower(name), []netip.Addr{a}, egress.Forever); err != nil {
				return err
			}
		}
	}
	g.mu.Lock()
	list := g.list
	g.mu.Unlock()
	for _, name := range list.Fixed() {
		addrs, known, err := names.Addresses(name)
		if err != nil {
			return err
		}
		if known && len(addrs) > 0 {
			if err := g.learn(name, addrs, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// asks reports whether the container may have a name looked up outside; that it wanted to is told.
func (g *gate) asks(name string) bool {
	g.mu.Lock()
	listed := g.list.Names(name)
	g.mu.Unlock()
	if listed {
		return true
	}
	if name == "" || strings.HasSuffix(name, ".arpa") {
		return false // who an address belongs to is not where somebody wants to go
	}
	g.mu.Lock()
	known := g.asked[name]
	if !known && len(g.asked) < maxTold {
		g.asked[name] = true
	}
	g.mu.Unlock()
	if !known {
		g.tell(map[string]string{"protocol": "dns", "address": name})
	}
	return false
}

// learn opens the way to a listed name's addresses on all interfaces.
func (g *gate) learn(name string, addrs []netip.Addr, hold time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.list.Names(name) {
		return nil
	}
	until := time.Time{}
	if d := egress.Hold(hold); d > 0 {
		until = time.Now().Add(d)
	}
	for _, a := range addrs {
		a = a.Unmap()
		if g.names[a] == nil {
			if len(g.names) >= maxLearnt {
				clear(g.names)
			}
			g.names[a] = map[string]time.Time{}
		}
		if _, known := g.names[a][name]; !known && len(g.names[a]) >= maxAliases {
			clear(g.names[a])
		}
		g.names[a][name] = until
	}
	for _, f := range g.filters {
		if err := f.Learn(name, addrs, hold); err != nil {
			return err
		}
	}
	return nil
}

// listen tells of packets that were dropped, until the gate is closed.
func (g *gate) listen() {
	defer close(g.done)
	for {
		list, err := g.told.Next()
		if err != nil {
			return
		}
		for _, a := range list {
			attrs := map[string]string{"protocol": a.Proto, "address": a.Addr.String()}
			if a.Port != 0 {
				attrs["port"] = strconv.Itoa(int(a.Port))
			}
			g.mu.Lock()
			if name := latest(g.names[a.Addr]); name != "" {
				attrs["host"] = name
			}
			g.mu.Unlock()
			g.tell(attrs)
		}
	}
}

// latest is the name that holds the longest.
func latest(names map[string]time.Time) (best string) {
	for name, until := range names {
		switch b := names[best]; {
		case best == "", until.IsZero() && !b.IsZero(), !b.IsZero() && until.After(b), until.Equal(b) && name < best:
			best = name
		}
	}
	return best
}

// tell writes an event, no more than maxTold a minute; the next one after that says how many there were besides.
func (g *gate) tell(attrs map[string]string) {
	g.mu.Lock()
	if now := time.Now(); now.Sub(g.since) > time.Minute {
		g.since, g.events = now, 0
		clear(g.asked)
	}
	if g.events++; g.events > maxTold {
		g.untold++
		g.mu.Unlock()
		return
	}
	if g.untold > 0 {
		attrs["untold"] = strconv.Itoa(g.untold)
		g.untold = 0
	}
	g.mu.Unlock()
	g.m.event(actionDenied, attrs)
}
