package logs

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// buffered is a driver in front of another one, for mode=non-blocking: it never waits for the disk, and drops what doesn't fit.
type buffered struct {
	next Driver
	max  int

	mu      sync.Mutex
	wake    sync.Cond
	queue   []chunk
	size    int
	dropped uint64
	closed  bool
	err     error
	done    chan struct{}
}

type chunk struct {
	stream string
	data   []byte
	t      time.Time
}

func newBuffered(next Driver, max int) *buffered {
	b := &buffered{next: next, max: max, done: make(chan struct{})}
	b.wake.L = &b.mu
	go b.run() // ends in Close, which waits for it
	return b
}

// Write queues a copy of p. The error is that of an earlier write.
func (b *buffered) Write(stream string, p []byte, t time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.err
	b.err = nil
	if b.size+len(p) > b.max {
		b.dropped += uint64(len(p))
		return err
	}
	b.size += len(p)
	b.queue = append(b.queue, chunk{stream, slices.Clone(p), t})
	b.wake.Signal()
	return err
}

func (b *buffered) run() {
	defer close(b.done)
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		for len(b.queue) == 0 && b.dropped == 0 {
			if b.closed {
				return
			}
			b.wake.Wait()
		}
		queue, dropped := b.queue, b.dropped
		b.queue, b.dropped = nil, 0
		b.mu.Unlock()
		var errs []error
		n := 0
		for _, c := range queue {
			n += len(c.data)
			errs = append(errs, b.next.Write(c.stream, c.data, c.t))
		}
		if dropped > 0 {
			note := fmt.Sprintf("[conex: %d bytes of output were dropped, the log was too slow]\n", dropped)
			errs = append(errs, b.next.Write("stderr", []byte(note), time.Now()))
		}
		b.mu.Lock()
		b.size -= n
		if err := errors.Join(errs...); err != nil {
			b.err = err
		}
	}
}

// Close writes what is queued and closes the log.
func (b *buffered) Close() error {
	b.mu.Lock()
	b.closed = true
	b.wake.Signal()
	b.mu.Unlock()
	<-b.done
	return errors.Join(b.err, b.next.Close())
}
