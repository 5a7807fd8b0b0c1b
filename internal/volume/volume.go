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
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"conex/internal/disk"
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

// Remove deletes a volume. Idempotent. That nothing uses it is the caller's to know.
func (s *Store) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return s.root.Trash(s.root.Path("volumes", name))
}
