// Package events owns the engine's event log: one JSON line for each thing that happened, appended by whichever process did it.
//
// The file is events.log in the state folder. At 4 MiB it becomes events.log.1, in place of the one before, so the log is bounded.
// Writers hold events.log.lock shared while they append and exclusive while they rotate: after a rotation nobody can still write
// to the old file, and so a reader that has read it to its end has it all. Readers take no lock.
package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/moby/api/types/events"

	"conex/internal/disk"
	"conex/internal/linux/inotify"
	"conex/internal/plainjson"
)

// Event is what happened, as Docker's API describes it. Write fills in the times if they are zero.
type Event = events.Message

const (
	fileName = "events.log"
	oldName  = "events.log.1"
	lockName = "events.log.lock"
)

// DefaultMaxSize is the size in bytes at which the file is rotated.
const DefaultMaxSize = 4 << 20

// Log is the event log of one state folder.
type Log struct {
	dir string
	// MaxSize replaces DefaultMaxSize; set it before use.
	MaxSize int64
}

// Open returns the log in a state folder, which exists. It reads and makes nothing.
func Open(stateDir string) *Log { return &Log{dir: stateDir, MaxSize: DefaultMaxSize} }

func (l *Log) path(name string) string { return filepath.Join(l.dir, name) }

// Write appends an event in one write, so that events of several processes never mix. A nil error promises that readers see it; it
// doesn't survive a crash of the machine, as nothing in the state folder does.
func (l *Log) Write(e Event) error {
	if e.TimeNano == 0 {
		now := time.Now()
		e.Time, e.TimeNano = now.Unix(), now.UnixNano()
	}
	if e.Scope == "" {
		e.Scope = "local"
	}
	line, err := plainjson.Marshal(e)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	size, err := l.append(append(line, '\n'))
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	if size > l.MaxSize {
		if err := l.rotate(); err != nil {
			return fmt.Errorf("rotate events: %w", err)
		}
	}
	return nil
}

func (l *Log) append(line []byte) (size int64, err error) {
	lock, err := disk.AcquireShared(l.path(lockName))
	if err != nil {
		return 0, err
	}
	defer lock.Release()
	f, err := os.OpenFile(l.path(fileName), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := f.Write(line)
	if err != nil && n > 0 {
		// A full filesystem took a part: end the line, or the next event would be lost with it.
		_, nerr := f.Write([]byte("\n"))
		err = errors.Join(err, nerr)
	}
	if err == nil {
		size, err = f.Seek(0, io.SeekCurrent)
	}
	return size, errors.Join(err, f.Close())
}

func (l *Log) rotate() error {
	lock, err := disk.Acquire(l.path(lockName))
	if err != nil {
		return err
	}
	defer lock.Release()
	st, err := os.Stat(l.path(fileName))
	if errors.Is(err, os.ErrNotExist) || err == nil && st.Size() <= l.MaxSize {
		return nil // another writer was faster
	}
	if err != nil {
		return err
	}
	return os.Rename(l.path(fileName), l.path(oldName))
}

// ReadOptions choose what Read gives.
type ReadOptions struct {
	// Since and Until bound the time of the events, if they are set.
	Since, Until time.Time
	// Follow goes on with what happens later, until ctx ends or Until has come.
	Follow bool
	// Filter chooses events; nil means all.
	Filter func(Event) bool
}

// errUntil is the cause of a context that ends at Until.
var errUntil = errors.New("until")

// Read calls fn for each event, in the order in which they were written, and stops at its first error, which it returns. Lines that
// aren't events are left out. With Follow it returns ctx's error when that ends, and nil when Until has come.
func (l *Log) Read(ctx context.Context, o ReadOptions, fn func(Event) error) error {
	if !o.Follow {
		return l.read(ctx, o, nil, fn)
	}
	w, err := inotify.New(l.dir, "")
	if err != nil {
		return fmt.Errorf("follow events: %w", err)
	}
	defer w.Close()
	if o.Until.IsZero() {
		return l.read(ctx, o, w, fn)
	}
	limited, cancel := context.WithDeadlineCause(ctx, o.Until, errUntil)
	defer cancel()
	err = l.read(limited, o, w, fn)
	if errors.Is(err, context.DeadlineExceeded) && context.Cause(limited) == errUntil {
		// What was written before Until but not seen yet has no reader any more; it was woken for each of them, so this is empty
		// but for a race of microseconds.
		return nil
	}
	return err
}

func (l *Log) read(ctx context.Context, o ReadOptions, w *inotify.Watch, fn func(Event) error) error {
	// The file that was read to its end. The state folder is a tmpfs, which never uses an inode number again.
	var last os.FileInfo
	for {
		old, cur, err := l.open()
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		for i, f := range []*os.File{old, cur} {
			if f == nil {
				continue
			}
			st, err := f.Stat()
			switch {
			case err != nil:
			case i == 0 && last != nil && os.SameFile(last, st): // read while it was the current one
			case i == 0:
				err = drain(ctx, bufio.NewReader(f), nil, o, fn)
			default:
				last = st
				err = l.follow(ctx, f, st, o, w, fn)
			}
			f.Close()
			if err != nil {
				if cur != nil {
					cur.Close()
				}
				return err
			}
		}
		if w == nil {
			return nil
		}
		if cur == nil {
			ended, err := w.Wait(ctx, nil)
			if err != nil || ended {
				return err
			}
		}
	}
}

// open opens the old and the current file, nil where there is none, such that no rotation lies between them.
func (l *Log) open() (old, cur *os.File, err error) {
	for {
		if old, err = openIfExists(l.path(oldName)); err != nil {
			return nil, nil, err
		}
		if cur, err = openIfExists(l.path(fileName)); err == nil && same(old, l.path(oldName)) {
			return old, cur, nil
		}
		for _, f := range []*os.File{old, cur} {
			if f != nil {
				f.Close()
			}
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

func openIfExists(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// same reports whether path still leads to f, or still nowhere for nil.
func same(f *os.File, path string) bool {
	now, err := os.Stat(path)
	if f == nil {
		return errors.Is(err, os.ErrNotExist)
	}
	st, serr := f.Stat()
	return err == nil && serr == nil && os.SameFile(st, now)
}

// follow reads the current file, and with a watch goes on until the file isn't the current one any more.
func (l *Log) follow(ctx context.Context, f *os.File, st os.FileInfo, o ReadOptions, w *inotify.Watch, fn func(Event) error) error {
	r := bufio.NewReader(f)
	var torn []byte
	for {
		if err := drain(ctx, r, &torn, o, fn); err != nil || w == nil {
			return err
		}
		if now, err := os.Stat(l.path(fileName)); err != nil || !os.SameFile(st, now) {
			return drain(ctx, r, &torn, o, fn) // rotated: nothing can follow what is there now
		}
		if ended, err := w.Wait(ctx, nil); err != nil || ended {
			if ended && err == nil {
				err = fmt.Errorf("follow events: %s is gone", l.dir)
			}
			return err
		}
	}
}

// drain gives the events up to the end that the file has now. An incomplete last line is kept in torn for the next time.
func drain(ctx context.Context, r *bufio.Reader, torn *[]byte, o ReadOptions, fn func(Event) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		line, err := r.ReadBytes('\n')
		if torn != nil && len(*torn) > 0 {
			line = append(*torn, line...)
			*torn = nil
		}
		if err == io.EOF {
			if torn != nil {
				*torn = line
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		var e Event
		if json.Unmarshal(bytes.TrimSpace(line), &e) != nil || e.TimeNano == 0 {
			continue
		}
		t := time.Unix(0, e.TimeNano)
		if t.Before(o.Since) || !o.Until.IsZero() && t.After(o.Until) || o.Filter != nil && !o.Filter(e) {
			continue
		}
		if err := fn(e); err != nil {
			return err
		}
	}
}
