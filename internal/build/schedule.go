package build

import (
	"context"
	"runtime"
	"sync"
)

// gates bound what a build does at a time. What waits for others (a step's lock, a cache mount's, its inputs) is in none of them, so it
// keeps nobody from work; and nobody waits for a lock inside a gate, so that no ring of waiting can close.
type gates struct {
	// work is for making layers, which costs processors and some MB each.
	work gate
	// runs is for the commands of RUN steps, which mostly wait for something themselves.
	runs gate
}

// newGates lets so many commands run at a time; 0 is any number, as in BuildKit.
func newGates(commands int) *gates {
	// Layers wait for the disk some of the time, so a few more than there are processors.
	g := &gates{work: make(gate, runtime.GOMAXPROCS(0)+2)}
	if commands > 0 {
		g.runs = make(gate, commands)
	}
	return g
}

// gate lets as many in as it has room for; nil lets everybody in.
type gate chan struct{}

// enter waits for room. Whoever got in calls leave.
func (g gate) enter(ctx context.Context) (leave func(), err error) {
	if g == nil {
		return func() {}, ctx.Err()
	}
	select {
	case g <- struct{}{}:
		return sync.OnceFunc(func() { <-g }), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// flights keeps nodes of one definition in one build from doing the same work twice, also with --no-cache.
type flights struct {
	mu sync.Mutex
	by map[string]*flight
}

// flight is a step that is being executed, or was.
type flight struct {
	done chan struct{}
	rec  Record
	ok   bool
}

// join waits for the flight of key and returns its record. With mine the caller is the one to do the work, and calls land.
func (f *flights) join(ctx context.Context, key string) (fl *flight, mine bool, err error) {
	for {
		f.mu.Lock()
		fl, taken := f.by[key]
		if !taken {
			fl = &flight{done: make(chan struct{})}
			if f.by == nil {
				f.by = map[string]*flight{}
			}
			f.by[key] = fl
		}
		f.mu.Unlock()
		if !taken {
			return fl, true, nil
		}
		select {
		case <-fl.done:
			if fl.ok {
				return fl, false, nil
			}
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// land ends a flight. One that is not ok is forgotten: its result is of no use to others.
func (f *flights) land(key string, fl *flight) {
	if !fl.ok {
		f.mu.Lock()
		delete(f.by, key)
		f.mu.Unlock()
	}
	close(fl.done)
}
