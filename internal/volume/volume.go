// Package volume owns volumes/: folders that outlive the containers they are mounted in.
//
//	volumes/<name>/meta.json   Volume
//	volumes/<name>/_data       the content
//	volumes.lock               flock: shared by who makes a container with volumes, alone by who removes unused ones
package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound says that there is no such volume.
	ErrNotFound = errors.New("no such volume")
	// ErrName says that a name has characters that are not allowed.
	ErrName = errors.New("invalid volume name")
)

// Volume is what meta.json says.
type Volume struct {
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	// Labels are --mount's volume-label.
	Labels map[string]string `json:"labels,omitempty"`
	// Anonymous volumes were made for one container.
	Anonymous bool `json:"anonymous,omitempty"`
}

// Store is the volume store of one root.
type Store struct{ root *disk.Root }

// Open returns the store.
func Open(root *disk.Root) *Store { return &Store{root} }

// Data returns the folder that is mounted.
func (s *Store) Data(name string) string { return s.root.Path("volumes", name, "_data") }

// CheckName checks a name against Docker's rule, [a-zA-Z0-9][a-zA-Z0-9_.-]+. The error is ErrName.
func CheckName(name string) error {
	ok := len(name) >= 2 && len(name) <= 255
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		ok = alnum || i > 0 && (c == '_' || c == '.' || c == '-')
	}
	if !ok {
		return fmt.Errorf("%w: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed", ErrName, name)
	}
	return nil
}

// Create makes the volume; made is false when it existed. fill, which may be nil, fills the new data folder before anybody sees it.
// A nil error promises that the volume, though not what fill wrote, survives a power loss.
func (s *Store) Create(v Volume, fill func(data string) error) (made bool, err error) {
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
	dir := filepath.Join(st.Dir, "v")
	data := filepath.Join(dir, "_data")
	if err := os.Mkdir(dir, 0o701); err != nil {
		return false, fmt.Errorf("create volume: %w", err)
	}
	if err := os.Mkdir(data, 0o755); err != nil {
		return false, fmt.Errorf("create volume: %w", err)
	}
	if err := disk.WriteJSON(filepath.Join(dir, "meta.json"), v, disk.Durable); err != nil {
		return false, err
	}
	if fill != nil {
		if err := fill(data); err != nil {
			return false, fmt.Errorf("fill volume %s: %w", v.Name, err)
		}
	}
	return st.Publish(s.root.Path("volumes", v.Name), "v")
}

// Fill fills a volume that exists and is empty, as Create would have; who starts a container with it meanwhile sees it come. With fill
// nil, or something in the volume, nothing is done.
func (s *Store) Fill(name string, fill func(data string) error) error {
	if fill == nil {
		return nil
	}
	d, err := os.Open(s.Data(name))
	if err != nil {
		return fmt.Errorf("open volume %s: %w", name, err)
	}
	defer d.Close()
	if names, err := d.Readdirnames(1); len(names) > 0 || err != io.EOF {
		return err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil { // of several at a time, one fills it
		return fmt.Errorf("lock volume %s: %w", name, err)
	}
	if _, err := d.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if names, err := d.Readdirnames(1); len(names) > 0 || err != io.EOF {
		return err
	}
	if err := fill(s.Data(name)); err != nil {
		return fmt.Errorf("fill volume %s: %w", name, err)
	}
	return nil
}

// Get returns one volume.
func (s *Store) Get(name string) (Volume, error) {
	var v Volume
	if err := CheckName(name); err != nil {
		return v, err
	}
	err := disk.ReadJSON(s.root.Path("volumes", name, "meta.json"), &v)
	if errors.Is(err, fs.ErrNotExist) {
		return v, fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	return v, err
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

// RemoveAnonymous deletes those of the volumes of a container which is gone that inUse, asked while nobody makes a container, does
// not know as another one's (--volumes-from). removed, which may be nil, is told of each.
func (s *Store) RemoveAnonymous(ctx context.Context, names []string, inUse func([]string) (map[string]bool, error), removed func(name string)) error {
	if len(names) == 0 {
		return nil
	}
	l, err := s.LockUnused(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	used, err := inUse(names)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if used[n] {
			continue
		}
		err := s.Remove(n)
		if err == nil && removed != nil {
			removed(n)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Remove deletes a volume. Idempotent. That nothing uses it is the caller's to know.
func (s *Store) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return s.root.Trash(s.root.Path("volumes", name))
}
