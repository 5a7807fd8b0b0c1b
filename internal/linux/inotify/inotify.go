// Package inotify owns the watch on one folder: whoever follows files that others append to sleeps until something happens.
package inotify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Watch tells when something changes in a folder or in a file in it, by inotify(7).
type Watch struct {
	f *os.File
	// lifelines are the names whose deletion ends the watch.
	lifelines []string
	// changed holds at most one token: something has happened since it was taken.
	changed chan struct{}
	// done is closed when the reading goroutine has ended, after err is set.
	done chan struct{}
	err  error
	once sync.Once
}

// New watches a folder. The watch ends when the folder is moved or deleted, or when an entry of one of the names lifelines is deleted in it (not when
// it is replaced): a folder's own deletion is reported only once nobody has a file in it open any more, which a follower has.
// Changes that happen after New has returned are not missed.
func New(dir string, lifelines ...string) (*Watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	// One watch on the folder sees writes to the files in it, too.
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE|unix.IN_MOVE_SELF|unix.IN_DELETE_SELF|unix.IN_ONLYDIR); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	w := &Watch{f: os.NewFile(uintptr(fd), "inotify"), lifelines: lifelines, changed: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run() // ends when Close closes f, which waits for it
	return w, nil
}

func (w *Watch) run() {
	defer close(w.done)
	buf := make([]byte, 16<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			w.err = err
			return
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			// struct inotify_event: wd, mask, cookie, len, each of 32 bits, and the name. An overflow of the queue is a change, too.
			mask := uint32(b[4]) | uint32(b[5])<<8 | uint32(b[6])<<16 | uint32(b[7])<<24
			size := int(uint32(b[12]) | uint32(b[13])<<8)
			b = b[unix.SizeofInotifyEvent:]
			name := string(bytes.TrimRight(b[:min(len(b), size)], "\x00"))
			if mask&(unix.IN_MOVE_SELF|unix.IN_DELETE_SELF|unix.IN_IGNORED) != 0 || mask&unix.IN_DELETE != 0 && slices.Contains(w.lifelines, name) {
				w.err = os.ErrNotExist
				return
			}
			b = b[min(len(b), size):]
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

// Wait returns when something has changed since the last call, or with ended when done is closed or the watch has ended. A nil done never is.
func (w *Watch) Wait(ctx context.Context, done <-chan struct{}) (ended bool, err error) {
	select {
	case <-w.changed:
		return false, nil
	case <-done:
		return true, nil
	case <-w.done:
		if errors.Is(w.err, os.ErrNotExist) {
			return true, nil
		}
		return true, fmt.Errorf("inotify: %w", w.err)
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// Close ends the watch. Safe to call twice.
func (w *Watch) Close() {
	w.once.Do(func() {
		w.f.Close()
		<-w.done
	})
}
