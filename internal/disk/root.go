package disk

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Version is the on-disk layout that this program writes. A root with a higher one is refused.
const Version = "1"

// Root is conex's data folder (--root, CONEX_ROOT). staging/ and trash/ lie in it, on the same filesystem, so that
// publishing and deleting are single renames.
type Root struct{ dir string }

// Folders are the folders of a root. They are root's alone: containers, volumes and layers hold set-user-id programs of the images'
// making, which must be out of the reach of the host's users (CVE-2021-41091).
var Folders = []string{"blobs", "blobs/sha256", "downloads", "images", "manifests", "layers", "containers", "names", "networks", "volumes", "buildcache", "builds",
	"leases", "staging", "trash"}

// OpenRoot makes the folder's skeleton where it is missing, in part or as a whole, and checks its version.
func OpenRoot(dir string) (*Root, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	v, err := os.ReadFile(filepath.Join(dir, "version"))
	switch {
	case err == nil && strings.TrimSpace(string(v)) == Version:
		return &Root{dir}, mendFolders(dir)
	case err == nil:
		return nil, fmt.Errorf("%s holds layout version %q, this conex knows %s: use a newer conex or another --root", dir, strings.TrimSpace(string(v)), Version)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open root: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	if err := mendFolders(dir); err != nil {
		return nil, err
	}
	if err := WriteFile(filepath.Join(dir, "version"), []byte(Version+"\n"), 0o644, Durable); err != nil {
		return nil, err
	}
	return &Root{dir}, nil
}

// LookRoot is OpenRoot for who only reads: it makes and mends nothing. The error is fs.ErrNotExist when there is no root.
func LookRoot(dir string) (*Root, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	v, err := os.ReadFile(filepath.Join(dir, "version"))
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	if s := strings.TrimSpace(string(v)); s != Version {
		return nil, fmt.Errorf("%s holds layout version %q, this conex knows %s: use a newer conex or another --root", dir, s, Version)
	}
	return &Root{dir}, nil
}

// mendFolders makes the folders that are missing: one lstat each in the usual case.
func mendFolders(dir string) error {
	for _, d := range Folders {
		var st unix.Stat_t
		if unix.Lstat(dir+"/"+d, &st) == nil {
			continue
		}
		if err := os.Mkdir(dir+"/"+d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("open root: %w", err)
		}
	}
	return nil
}

// Path joins elem to the root.
func (r *Root) Path(elem ...string) string {
	return filepath.Join(append([]string{r.dir}, elem...)...)
}

// Writable returns the error that writing to the root would have, as on a file system that is mounted read-only. Nothing is written.
func (r *Root) Writable() error {
	if err := unix.Access(r.dir, unix.W_OK); err != nil {
		return &fs.PathError{Op: "write to", Path: r.dir, Err: err}
	}
	return nil
}

// Stage is a private folder in staging/ that its process holds under flock. Whatever has no live owner is swept.
type Stage struct {
	// Dir is the folder to build in.
	Dir  string
	root *Root
	lock *Lock
}

// Stage makes a new staging folder. Close it, after or instead of publishing.
func (r *Root) Stage() (*Stage, error) {
	dir := r.Path("staging", RandomID()[:16])
	// The lock file comes first: a folder without one is swept.
	l, err := Acquire(dir + ".lock")
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		l.Release()
		os.Remove(dir + ".lock")
		return nil, fmt.Errorf("stage: %w", err)
	}
	return &Stage{Dir: dir, root: r, lock: l}, nil
}

// WriteJSON writes v as the file elem of the stage, mode 0600. Nobody sees it before it is published, so it needs no
// temporary file. With Durable, whoever publishes it syncs the folder that it is published in.
func (s *Stage) WriteJSON(v any, d Durability, elem ...string) (err error) {
	path := filepath.Join(append([]string{s.Dir}, elem...)...)
	data, err := encode(path, v)
	if err != nil {
		return err
	}
	var fd int
	err = retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.Write(data)
	if err == nil && d == Durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if d == Durable {
		// ext4 and xfs have the folder on the disk by now, and do nothing; btrfs has not what else is in it.
		return SyncDir(filepath.Dir(path))
	}
	return nil
}

// Publish renames the folder (or, with elem, one entry in it) to dst. won is false when dst existed already: somebody else
// published the same content first, which is a success too.
func (s *Stage) Publish(dst string, elem ...string) (won bool, err error) {
	src := filepath.Join(append([]string{s.Dir}, elem...)...)
	return Publish(src, dst)
}

// Publish renames src to dst without replacing what is there; won is false when dst existed already.
func Publish(src, dst string) (won bool, err error) {
	err = unix.Renameat2(unix.AT_FDCWD, src, unix.AT_FDCWD, dst, unix.RENAME_NOREPLACE)
	if err == unix.EEXIST || err == unix.ENOTEMPTY {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("publish %s: %w", dst, err)
	}
	return true, nil
}

// Close removes what was not published. Safe to call twice.
func (s *Stage) Close() error {
	if s.lock == nil {
		return nil
	}
	err := os.RemoveAll(s.Dir)
	os.Remove(s.Dir + ".lock")
	s.lock.Release()
	s.lock = nil
	return err
}

// Trash makes path disappear at once and deletes it afterwards; the space of large files comes back a little later. A crash in between
// leaves it to Sweep.
// It is no error when path does not exist.
func (r *Root) Trash(path string) error {
	t, err := r.TrashLater(path)
	if err != nil || t == "" {
		return err
	}
	return os.RemoveAll(t)
}

// TrashLater renames path into trash/ and returns the new place, for callers that delete off their critical path.
func (r *Root) TrashLater(path string) (string, error) {
	t := r.Path("trash", RandomID()[:16])
	if err := os.Rename(path, t); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		return "", fmt.Errorf("delete %s: %w", path, err)
	}
	return t, nil
}

// Sweep deletes what is in trash/ and what dead processes left in staging/. Idempotent; safe beside live ones.
func (r *Root) Sweep() error {
	var errs []error
	entries, err := os.ReadDir(r.Path("trash"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		errs = append(errs, remove(r.Path("trash", e.Name())))
	}
	entries, err = os.ReadDir(r.Path("staging"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, isLock := strings.CutSuffix(e.Name(), ".lock")
		if isLock && exists(r.Path("staging", name)) {
			continue // handled with its folder
		}
		lock := r.Path("staging", name+".lock")
		l, err := TryAcquire(lock)
		if errors.Is(err, ErrLocked) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := remove(r.Path("staging", name)); err != nil {
			errs = append(errs, err)
		} else if !exists(r.Path("staging", name)) {
			os.Remove(lock)
		}
		l.Release()
	}
	return errors.Join(errs...)
}

// remove is os.RemoveAll, which leaves a folder that somebody puts something into meanwhile: a command that a killed builder has started, and
// that nobody has settled yet. The next sweep takes it.
func remove(path string) error {
	err := os.RemoveAll(path)
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// RandomID returns 64 random hexadecimal digits, the form of a container id.
func RandomID() string {
	var b [32]byte
	rand.Read(b[:]) // never fails, says crypto/rand
	return hex.EncodeToString(b[:])
}

// Leftovers lists what Sweep would delete. Nothing is changed.
func (r *Root) Leftovers() ([]string, error) {
	var list []string
	for _, dir := range []string{"trash", "staging"} {
		entries, err := os.ReadDir(r.Path(dir))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			path := r.Path(dir, e.Name())
			name := strings.TrimSuffix(path, ".lock")
			if dir == "staging" && (Held(name+".lock") || name != path && exists(name)) || !exists(path) {
				continue
			}
			list = append(list, path)
		}
	}
	return list, nil
}
