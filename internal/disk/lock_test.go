package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
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
