// Package volume owns volumes/: folders that outlive the containers they are mounted in.
//
//	volumes/<name>/meta.json          Volume; its name is the folder's alone, so that a rename is one rename
//	volumes/<name>/_data              the content
//	volumes/<name>/lock               flock: shared by who runs a container with it or reads it, alone by who replaces, renames or removes it
//	volumes/<name>/fill.lock          flock: held by who fills an empty one
//	volumes/<name>/fill               what an empty one begins with, whole, on its way into _data
//	volumes/<name>/filling            says that something mounted is being filled
//	volumes/<name>/snapshots/<name>/  Snapshot in meta.json, _data, and lock: shared by who reads it, alone by who removes it
//	volumes.lock                      flock: shared by who makes a container with volumes, alone by who removes unused ones
//	<state>/volumes/<name>            where the file system of an option type= is mounted, while somebody uses it; <name>.lock: held by who mounts it
//
// Order of the locks: volumes.lock, a volume's lock, its fill.lock, its mount's lock.
package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/quota"

	"github.com/docker/go-units"
)

var (
	// ErrNotFound says that there is no such volume.
	ErrNotFound = errors.New("no such volume")
	// ErrName says that a name has characters that are not allowed.
	ErrName = errors.New("invalid volume name")
	// ErrNothing is what a function that fills volumes returns when it has nothing to put in: the volume stays as it is.
	ErrNothing = errors.New("nothing to fill a volume with")
	// ErrExists says that a volume or snapshot of that name is there already.
	ErrExists = errors.New("exists already")
	// ErrOptions says that the options of a volume make no sense.
	ErrOptions = errors.New("invalid volume options")
)

// Volume is what meta.json says.
type Volume struct {
	Name    string            `json:"-"`
	Created time.Time         `json:"created"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Options are the local driver's: type, o and device say what is mounted in the place of the content, size bounds it.
	Options map[string]string `json:"options,omitempty"`
	// Anonymous volumes were made for one container, or without a name.
	Anonymous bool `json:"anonymous,omitempty"`
}

// Store is the volume store of one root.
type Store struct {
	root  *disk.Root
	state string
	// Number gives a project number that nothing has, for a volume with a size, and holds it until done is called, when the volume's
	// folder has it. Nil where no such volume is made.
	Number func() (n uint32, done func(), err error)
}

// Open returns the store. state is the state folder, below which the file systems of volumes are mounted.
func Open(root *disk.Root, state string) *Store { return &Store{root: root, state: state} }

// Data returns the folder that is mounted, unless the volume has a file system of its own (see Use).
func (s *Store) Data(name string) string { return s.root.Path("volumes", name, "_data") }

func (s *Store) path(name string, elem ...string) string {
	return s.root.Path(append([]string{"volumes", name}, elem...)...)
}

// CheckName checks a name against Docker's rule, [a-zA-Z0-9][a-zA-Z0-9_.-]*. The error is ErrName.
func CheckName(name string) error {
	if !validName(name) {
		return &nameError{fmt.Sprintf("%q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed", name)}
	}
	return nil
}

// nameError is ErrName in Docker's words.
type nameError struct{ text string }

func (e *nameError) Error() string        { return e.text }
func (e *nameError) Is(target error) bool { return target == ErrName }

// CheckSnapshotName is CheckName for a snapshot's name.
func CheckSnapshotName(name string) error {
	if !validName(name) {
		return &nameError{fmt.Sprintf("snapshot name %q: only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed", name)}
	}
	return nil
}

func validName(name string) bool {
	ok := name != "" && len(name) <= 255
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '_' || c == '.' || c == '-')
	}
	return ok
}

// Create makes the volume; made is false when it existed. fill, which may be nil, fills the new data folder before anybody sees it.
// A nil error promises, with disk.Durable, that the volume survives a power loss, and that what fill wrote does if fill promises it.
func (s *Store) Create(v Volume, d disk.Durability, fill func(data string) error) (made bool, err error) {
	if err := CheckName(v.Name); err != nil {
		return false, err
	}
	if _, err := os.Lstat(s.Data(v.Name)); err == nil {
		return false, nil
	}
	st, err := s.root.Stage()
	if err != nil {
		return false, err
	}
	defer st.Close()
	data, err := s.makeData(st.Dir, &v, "")
	if err != nil {
		return false, fmt.Errorf("create volume: %w", err)
	}
	if fill != nil {
		if err := fill(data); err != nil && !errors.Is(err, ErrNothing) {
			return false, err
		}
		if err := s.fits(data, &v); err != nil {
			return false, err
		}
	}
	if err := st.WriteJSON(v, d, "meta.json"); err != nil {
		return false, err
	}
	if made, err = st.Publish(s.path(v.Name)); err == nil && made && d == disk.Durable {
		err = disk.SyncDir(s.root.Path("volumes"))
	}
	return made, err
}

// makeData makes a folder for v's content in dir, with v's bound: counted together with the folder with, or alone if that is "".
func (s *Store) makeData(dir string, v *Volume, with string) (string, error) {
	data := filepath.Join(dir, "_data")
	if err := os.Mkdir(data, 0o755); err != nil {
		return "", err
	}
	size, err := v.Size()
	if err != nil || size == 0 {
		return data, err
	}
	if with != "" {
		n, err := quota.Project(with)
		if err != nil {
			return "", err
		}
		return data, quota.Limit(data, n, size)
	}
	n, done, err := s.Number()
	if err != nil {
		return "", err
	}
	defer done()
	return data, quota.Limit(data, n, size)
}

// fits checks that new content is within v's size: a quota lets the host's root, who makes it, write on.
func (s *Store) fits(data string, v *Volume) error {
	size, err := v.Size()
	if err != nil || size == 0 {
		return err
	}
	var m disk.Meter
	sp, err := m.Tree(data)
	if err == nil && sp.Disk > size {
		err = fmt.Errorf("volume %s: there is no room: its size is %s and this takes %s", v.Name, units.BytesSize(float64(size)), units.BytesSize(float64(sp.Disk)))
	}
	return err
}

// Projects are the project numbers of volumes, and of what is being made or removed.
func (s *Store) Projects() (map[uint32]bool, error) {
	out := map[uint32]bool{}
	for _, pattern := range []string{s.path("*", "_data"), s.path("*", "snapshots", "*", "_data"), s.root.Path("staging", "*", "_data"),
		s.root.Path("trash", "*", "_data"), s.root.Path("trash", "*")} {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, d := range dirs {
			n, err := quota.Project(d)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, quota.ErrNotSupported) {
				return nil, err
			}
			out[n] = true
		}
	}
	return out, nil
}

// Get returns one volume.
func (s *Store) Get(name string) (Volume, error) {
	v := Volume{Name: name}
	if err := CheckName(name); err != nil {
		return v, err
	}
	err := disk.ReadJSON(s.path(name, "meta.json"), &v)
	if errors.Is(err, fs.ErrNotExist) {
		return v, fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	if err != nil && s.torn(&v) {
		return v, nil
	}
	if err != nil {
		return v, fmt.Errorf("volume %s: its record can't be read (system check --repair writes it anew): %w", name, err)
	}
	return v, nil
}

// torn reports whether a volume's record has nothing in it, and says what it was: a loss of power leaves that of one which was not made
// durable, the anonymous one of a container that is removed when it ends.
func (s *Store) torn(v *Volume) bool {
	data, err := os.ReadFile(s.path(v.Name, "meta.json"))
	if err != nil || len(bytes.Trim(data, "\x00")) > 0 {
		return false
	}
	fi, err := os.Stat(s.path(v.Name))
	if err == nil {
		*v = Volume{Name: v.Name, Created: fi.ModTime().UTC(), Anonymous: true}
	}
	return err == nil
}

// List returns the names of all volumes.
func (s *Store) List() ([]string, error) {
	entries, err := os.ReadDir(s.root.Path("volumes"))
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// LockUse is held from before a container's volumes are made or found until its record names them.
func (s *Store) LockUse() (*disk.Lock, error) {
	return disk.AcquireShared(s.root.Path("volumes.lock"))
}

// LockUnused is held by who removes volumes that no record names: it waits for whoever holds LockUse.
func (s *Store) LockUnused(ctx context.Context) (*disk.Lock, error) {
	return disk.AcquireContext(ctx, s.root.Path("volumes.lock"))
}

// WhenFree calls fn again as long as it says disk.ErrLocked: somebody reads a volume. Whatever locks fn takes are free while it waits, since
// who reads may do so for long, and who makes a container needs volumes.lock.
func WhenFree(ctx context.Context, fn func() error) error {
	for {
		err := fn()
		if !errors.Is(err, disk.ErrLocked) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// RemoveAnonymous deletes those of the volumes of a container which is gone that inUse, asked while nobody makes a container, does
// not know as another one's (--volumes-from). removed, which may be nil, is told of each.
func (s *Store) RemoveAnonymous(ctx context.Context, names []string, inUse func([]string) (map[string]bool, error), removed func(name string)) error {
	if len(names) == 0 {
		return nil
	}
	var trash []string
	var errs []error
	err := WhenFree(ctx, func() error {
		l, err := s.LockUnused(ctx)
		if err != nil {
			return err
		}
		defer l.Release()
		used, err := inUse(names)
		if err != nil {
			return err
		}
		var busy []string
		for _, n := range names {
			if used[n] {
				continue
			}
			if kept, err := s.Snapshots(n); err != nil || len(kept) > 0 {
				errs = append(errs, err) // somebody wants what was in it
				continue
			}
			at, err := s.TryTrash(n)
			switch {
			case errors.Is(err, disk.ErrLocked):
				busy = append(busy, n)
			case err != nil:
				errs = append(errs, err)
			case at != "":
				trash = append(trash, at)
				if removed != nil {
					removed(n)
				}
			}
		}
		if names = busy; len(busy) > 0 {
			return disk.ErrLocked
		}
		return nil
	})
	for _, t := range trash {
		errs = append(errs, os.RemoveAll(t))
	}
	return errors.Join(append(errs, err)...)
}

// Remove deletes a volume with its snapshots, as soon as nobody reads it. Idempotent. That no container has it is the caller's to know.
func (s *Store) Remove(ctx context.Context, name string) error {
	var trash string
	err := WhenFree(ctx, func() (err error) {
		trash, err = s.TryTrash(name)
		return err
	})
	if err != nil || trash == "" {
		return err
	}
	return os.RemoveAll(trash)
}

// TryTrash is Remove that does not wait (disk.ErrLocked says that somebody reads the volume), and leaves it to its caller to delete what it
// returns, a path in trash/, when that holds no lock any more. It is "" where there is no such volume.
func (s *Store) TryTrash(name string) (trash string, err error) {
	l, err := s.TryAlone(name)
	if errors.Is(err, ErrNotFound) {
		// What a power loss left of one has no record.
		return s.root.TrashLater(s.path(name))
	}
	if err != nil {
		return "", err
	}
	defer l.Release()
	if err := s.unmount(name); err != nil {
		return "", err
	}
	return s.root.TrashLater(s.path(name))
}

// Rename gives a volume another name. The caller has it alone (Alone), and knows that no container has it. ErrExists if the name is taken.
func (s *Store) Rename(from, to string) error {
	if err := CheckName(to); err != nil {
		return err
	}
	if err := s.unmount(from); err != nil {
		return err
	}
	won, err := disk.Publish(s.path(from), s.path(to))
	if err == nil && !won {
		return fmt.Errorf("volume %s: %w", to, ErrExists)
	}
	return errors.Join(err, disk.SyncDir(s.root.Path("volumes")))
}
