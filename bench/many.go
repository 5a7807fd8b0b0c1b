package main

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// manyMeasurements are about many containers on one machine. What they take is told for each container.
func manyMeasurements() []measurement {
	return []measurement{
		{name: "100-sequential", target: 25, rounds: 2, once: many(1, (*engine).remove)},
		{name: "100-eight-at-a-time", target: 15, rounds: 2, once: many(8, (*engine).remove)},
		{name: "remove-100", target: 8, rounds: 2, once: func(b *bench, e *engine, i int) (float64, error) {
			var each float64
			_, err := many(8, func(e *engine, names ...string) error {
				v, err := e.timed(e.rm(names...)...)
				each = v / float64(len(names))
				return err
			})(b, e, i)
			return each, err
		}},
		{name: "containers-500-ps", target: 50, rounds: psRounds, once: ps500},
	}
}

// forgets is how long at least ext4 makes new files slower after many were deleted: it steps around their inodes, in case the journal is
// lost (RECENTCY_MIN in its ialloc.c).
const forgets = time.Minute

// many starts 100 containers, some at a time, and removes them when the clock has stopped. The round that warms up makes do with few.
func many(atATime int, remove func(e *engine, names ...string) error) func(*bench, *engine, int) (float64, error) {
	return func(b *bench, e *engine, i int) (float64, error) {
		n := 100
		if i == 0 {
			n = 2 * atATime
		} else {
			time.Sleep(time.Until(b.deleted.Add(forgets)))
		}
		defer func() { b.deleted = time.Now() }()
		began := time.Now()
		names, err := e.runMany(n, atATime, "bridge")
		took := float64(time.Since(began)) / 1e6 / float64(n)
		return then(took, err, func() error { return remove(e, names...) })
	}
}

// runMany starts n containers and returns their names.
func (e *engine) runMany(n, atATime int, network string) ([]string, error) {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("bench-many-%d", i)
	}
	errs := make([]error, atATime)
	next := make(chan string, n)
	for _, name := range names {
		next <- name
	}
	close(next)
	var wg sync.WaitGroup
	for w := range atATime {
		wg.Go(func() {
			for name := range next {
				errs[w] = errors.Join(errs[w], e.do("run", "-d", "--name", name, "--network", network, image, "sleep", "100000"))
			}
		})
	}
	wg.Wait()
	return names, errors.Join(errs...)
}

// psRounds is how often ps is asked while 500 containers run.
const psRounds = 5

// ps500 times ps beside 500 running containers, which the first round starts and the last removes.
func ps500(b *bench, e *engine, i int) (float64, error) {
	const n = 500
	if i == 0 {
		if names, err := e.runMany(n, 8, "none"); err != nil {
			return 0, errors.Join(err, e.remove(names...))
		}
	}
	v, err := e.timed("ps")
	if err != nil || i == min(b.rounds, psRounds) {
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprintf("bench-many-%d", i)
		}
		return then(v, err, func() error { return e.remove(names...) })
	}
	return v, nil
}
