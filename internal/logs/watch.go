package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// watch tells when something changes in a log's folder, by inotify(7).
type watch struct {
	f *os.File
	// changed holds at most one token: something has happened since it was taken.
	changed chan struct{}
	// done is closed when the reading goroutine has ended, after err is set.
	done chan struct{}
	err  error
	once sync.Once
}

// newWatch makes the folder if it isn't there yet, so that a log can be followed before its container starts.
func newWatch(dir string) (*watch, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("follow log: %w", err)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("follow log: inotify: %w", err)
	}
	// One watch on the folder sees writes to the files in it, too.
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE|unix.IN_MOVE_SELF|unix.IN_DELETE_SELF|unix.IN_ONLYDIR); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("follow log %s: inotify: %w", dir, err)
	}
	w := &watch{f: os.NewFile(uintptr(fd), "inotify"), changed: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run() // ends when close closes f, which waits for it
	return w, nil
}

func (w *watch) run() {
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
			// The log is removed with its container: moved to the trash, or deleted where it is. The folder's own event comes only when
			// nobody has a file in it open any more, so the link's is what tells; a writer replaces the link, it never deletes it.
			if mask&(unix.IN_MOVE_SELF|unix.IN_DELETE_SELF|unix.IN_IGNORED) != 0 || mask&unix.IN_DELETE != 0 && name == linkName {
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

// wait returns when something has changed since the last call, or with ended when done is closed or the folder is gone.
func (w *watch) wait(ctx context.Context, done <-chan struct{}) (ended bool, err error) {
	select {
	case <-w.changed:
		return false, nil
	case <-done:
		return true, nil
	case <-w.done:
		if errors.Is(w.err, os.ErrNotExist) {
			return true, nil
		}
		return true, fmt.Errorf("follow log: inotify: %w", w.err)
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// close ends the watch. Safe to call twice.
func (w *watch) close() {
	w.once.Do(func() {
		w.f.Close()
		<-w.done
	})
}
