// Package disk is the only writer of conex's state files: atomic replace, publish, locks, staging and trash.
//
// Every other package goes through it, so the crash rules stand in one place:
// a reader sees a file's old or its new content, never a part; a tree appears
// whole or not at all; what a dead process left behind is told from what a live
// one still uses by the flock(2) that its owner holds.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"conex/internal/plainjson"

	"golang.org/x/sys/unix"
)

// Durability says how long a written file must survive.
type Durability int

const (
	// Durable files survive a crash of the machine: the data and then the folder are synced.
	Durable Durability = iota
	// Volatile files survive a crash of conex only; they are replaced atomically but not synced.
	// For tmpfs and for what a reboot makes meaningless.
	Volatile
)

// WriteFile replaces path atomically with data and mode perm.
// A nil error promises that readers see the new content and, with Durable, that it survives a power loss.
func WriteFile(path string, data []byte, perm fs.FileMode, d Durability) error {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "./"
	}
	tmp, err := writeTemp(dir+tempPrefix+base+".", data, perm, d)
	if err == nil {
		if err = unix.Rename(tmp, path); err != nil {
			err = &fs.PathError{Op: "replace", Path: path, Err: err}
		}
	}
	if err != nil {
		if tmp != "" {
			_ = unix.Unlink(tmp) // else it is a leftover like those of the killed
		}
		var pe *fs.PathError
		if errors.As(err, &pe) {
			pe.Path = path // nobody has heard of the temporary file
		}
		return err
	}
	if d == Durable {
		return SyncDir(filepath.Clean(dir))
	}
	return nil
}

// writeTemp makes a file whose name begins with prefix and returns that, "" if none was made. With the kernel's calls alone: package os asks
// the poller about every file first, and about a folder in the new name's place.
func writeTemp(prefix string, data []byte, perm fs.FileMode, d Durability) (name string, err error) {
	var fd int
	fail := func(op string, err error) error { return &fs.PathError{Op: op, Path: name, Err: err} }
	for try := 0; ; try++ {
		name = prefix + strconv.FormatUint(uint64(rand.Uint32()), 10)
		err := retry(func() (err error) {
			fd, err = unix.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
			return err
		})
		const tries = 10000
		if err == unix.EEXIST && try < tries {
			continue
		}
		if err != nil {
			return "", fail("create", err)
		}
		break
	}
	for rest := data; len(rest) > 0 && err == nil; {
		var n int
		if err = retry(func() (err error) { n, err = unix.Write(fd, rest); return err }); err == nil {
			rest = rest[n:]
		} else {
			err = fail("write", err)
		}
	}
	if err == nil {
		if err = retry(func() error { return unix.Fchmod(fd, uint32(perm.Perm())) }); err != nil {
			err = fail("chmod", err)
		}
	}
	if err == nil && d == Durable {
		if err = retry(func() error { return unix.Fsync(fd) }); err != nil {
			err = fail("sync", err)
		}
	}
	if cerr := unix.Close(fd); err == nil && cerr != nil && cerr != unix.EINTR {
		err = fail("close", cerr)
	}
	return name, err
}

// tempPrefix marks temporary files of WriteFile, which readers of a folder skip.
const tempPrefix = ".tmp-"

// IsTemp reports whether a folder entry is a leftover temporary file of WriteFile.
func IsTemp(name string) bool { return strings.HasPrefix(name, tempPrefix) }

// RemoveTemps removes what writers of path left that were killed. The caller knows that nobody writes it now. No error promises that
// nothing is left.
func RemoveTemps(path string) error {
	dir, base := filepath.Split(path)
	entries, err := os.ReadDir(filepath.Clean(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove leftovers of %s: %w", path, err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix+base+".") {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// WriteJSON replaces path atomically with v as indented JSON, mode 0644 less nothing.
func WriteJSON(path string, v any, d Durability) error {
	data, err := encode(path, v)
	if err != nil {
		return err
	}
	return WriteFile(path, data, 0o600, d)
}

func encode(path string, v any) ([]byte, error) {
	data, err := plainjson.MarshalIndent(v, "  ")
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", path, err)
	}
	return append(data, '\n'), nil
}

// ReadJSON decodes the file at path into v. The error satisfies errors.Is(err, fs.ErrNotExist) when there is none.
func ReadJSON(path string, v any) error {
	data, err := ReadFile(path)
	if err != nil {
		return err
	}
	if err := plainjson.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}

// ReadFile is os.ReadFile for the small files of which `ps` reads thousands: open, read, close, where that asks the poller about each of
// them first and makes 10 system calls.
func ReadFile(path string) ([]byte, error) { return read(path, math.MaxInt, true) }

// ReadAtMost is ReadFile for a file of any kind, a pipe for instance, that may not be longer than limit bytes.
func ReadAtMost(path string, limit int) ([]byte, error) { return read(path, limit, false) }

func read(path string, limit int, regular bool) ([]byte, error) {
	var fd int
	err := retry(func() (err error) { fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); return err })
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	for data := make([]byte, 0, 4096); ; {
		var n int
		err := retry(func() (err error) { n, err = unix.Read(fd, data[len(data):cap(data)]); return err })
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		}
		data = data[:len(data)+n]
		if len(data) > limit {
			return nil, fmt.Errorf("%s: more than %d bytes", path, limit)
		}
		if n == 0 || regular && len(data) < cap(data) { // only its end makes a regular file's read short
			return data, nil
		}
		if len(data) < cap(data) {
			continue
		}
		data = append(data, 0)[:len(data)]
	}
}

// retry calls fn again as long as a signal interrupts it.
func retry(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}

// Update reads path, gives its content (nil when it does not exist) to fn, and replaces it with what fn returns.
// The lock file path+".lock" is held meanwhile, so no two updates interleave. If fn returns an error, or nil data, nothing
// is written; the error is passed on.
func Update(path string, perm fs.FileMode, d Durability, fn func(old []byte) ([]byte, error)) error {
	l, err := Acquire(path + ".lock")
	if err != nil {
		return err
	}
	defer l.Release()
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	data, err := fn(old)
	if err != nil || data == nil {
		return err
	}
	return WriteFile(path, data, perm, d)
}

// SyncDir flushes a folder's entries.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// SyncFS flushes the whole filesystem that holds path, once, instead of an fsync per file.
func SyncFS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync filesystem of %s: %w", path, err)
	}
	return nil
}

// BootID returns the kernel's id of this boot. Records that carry another one were written before the last reboot.
var BootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
})

// Allocated returns what a file takes on the disk, in bytes, as du counts: its blocks, not its length.
func Allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}
