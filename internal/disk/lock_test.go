package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPause: a paused lock is somebody else's to take, and gone when its file is.
func TestPause(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	if err := l.Pause(); err != nil {
		t.Fatal(err)
	}
	other, err := TryAcquire(path)
	if err != nil {
		t.Fatal(err)
	}
	other.Release()
	if err := l.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, err := TryAcquire(path); !errors.Is(err, ErrLocked) {
		t.Errorf("a resumed lock is free: %v", err)
	}
	for _, again := range []bool{false, true} {
		if err := l.Pause(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if again {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := l.Resume(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("made again %t: %v", again, err)
		}
	}
}

// copyOf is what a child that is being forked has of a lock until it executes: the same open file.
func copyOf(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	c := os.NewFile(uintptr(fd), f.Name())
	t.Cleanup(func() { c.Close() })
	return c
}

// TestReleaseInspiteOfCopies: what was given back is free, whoever is being forked.
func TestReleaseInspiteOfCopies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for name, acquire := range map[string]func(string) (*Lock, error){"alone": Acquire, "shared": AcquireShared, "try": TryAcquire, "reader": AcquireReader} {
		l, err := acquire(path)
		if err != nil {
			t.Fatal(err)
		}
		copyOf(t, l.File())
		l.Release()
		l.Release()
		again, err := TryAcquire(path)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		again.Release()
	}
}

// TestHand: a lock that another process has goes on when this one gives back its part, and ends when the other does.
func TestHand(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := Acquire(path)
	if err != nil {
		t.Fatal(err)
	}
	other := Handed(copyOf(t, l.Hand()))
	copyOf(t, l.File())
	l.Release()
	if _, err := TryAcquire(path); !errors.Is(err, ErrLocked) || !Held(path) {
		t.Errorf("the other process's lock is free: %v", err)
	}
	other.Release()
	if again, err := TryAcquire(path); err != nil {
		t.Error(err)
	} else {
		again.Release()
	}
}
