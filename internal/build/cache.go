package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// The two kinds of keys, each a folder of buildcache/.
const (
	byDefinition = "def"
	byContent    = "content"
)

// version is part of every key: a conex that would give another result for the same op counts it up.
const version = "4"

// Record is what the cache keeps of one step, in buildcache/{def,content}/<aa>/<key>. Its modification time is its last use.
type Record struct {
	// Key is the record's own name.
	Key string `json:"key"`
	// Kind and Op say what the step does; Title is how it was shown.
	Kind  string          `json:"kind"`
	Title string          `json:"title,omitempty"`
	Op    json.RawMessage `json:"op,omitempty"`
	// Inputs are the ingredients of Key besides Op: definition keys, or for a content key each input's layers joined by commas.
	Inputs []string `json:"inputs,omitempty"`
	// Layer is the layer that the step made, "" when it changed nothing.
	Layer ocispec.Digest `json:"layer,omitempty"`
	// Created is the time of the step in an image's history, see docs/decisions/0021; Took is how long it took, in nanoseconds.
	Created time.Time     `json:"created"`
	Took    time.Duration `json:"took,omitempty"`
	// Files is the fingerprint of what a COPY --from selected, as far as it was computed.
	Files string `json:"files,omitempty"`
	// Build is the build that ran the step, see History, at Made; Import is where an imported record came from.
	Build  string    `json:"build,omitempty"`
	Made   time.Time `json:"made,omitzero"`
	Import string    `json:"import,omitempty"`
}

// cache is buildcache/.
type cache struct {
	root    *disk.Root
	layers  *layers.Store
	discard bool // nothing is put
}

// keyOf hashes what makes a step: kind, op and inputs.
func keyOf(class, kind string, op []byte, inputs []string) string {
	h := sha256.New()
	field := func(b []byte) {
		fmt.Fprintf(h, "%d:", len(b))
		h.Write(b)
	}
	for _, s := range []string{version, class, kind} {
		field([]byte(s))
	}
	field(op)
	for _, in := range inputs {
		field([]byte(in))
	}
	return hex.EncodeToString(h.Sum(nil))
}

func (c *cache) path(class, key string) string {
	return c.root.Path("buildcache", class, key[:2], key)
}

// get returns a record whose layer is there, and marks it as used now. ok is false when there is none.
func (c *cache) get(class, key string) (rec Record, ok bool, err error) {
	path := c.path(class, key)
	err = disk.ReadJSON(path, &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return rec, false, nil
	}
	if err != nil || rec.Key != key {
		return rec, false, nil //nolint:nilerr // a record that a power loss cut short is a miss; the step will replace it
	}
	if rec.Layer != "" {
		if err := c.layers.Claim(rec.Layer); err != nil {
			return rec, false, fmt.Errorf("build cache: %w", err)
		}
		if _, err := c.layers.Stat(rec.Layer); err != nil {
			if errors.Is(err, layers.ErrNotFound) {
				return rec, false, nil
			}
			return rec, false, fmt.Errorf("build cache: %w", err)
		}
	}
	now := time.Now()
	if err := os.Chtimes(path, now, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return rec, false, fmt.Errorf("build cache: %w", err)
	}
	return rec, true, nil
}

// put writes a record. Volatile: after a power loss a missing record costs a rebuilt step, a torn one is a miss.
func (c *cache) put(class string, rec Record) error {
	if c.discard {
		return nil
	}
	path := c.path(class, rec.Key)
	err := disk.WriteJSON(path, rec, disk.Volatile)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
			return fmt.Errorf("build cache: %w", err)
		}
		err = disk.WriteJSON(path, rec, disk.Volatile)
	}
	if err != nil {
		return fmt.Errorf("build cache: %w", err)
	}
	return nil
}

// lock makes a step the work of one process at a time; busy is called if another one has it. Whoever holds it has all inputs of the step
// and takes no further step's lock, so two builds can't wait for each other.
func (c *cache) lock(ctx context.Context, key string, busy func()) (release func(), err error) {
	dir := c.root.Path("buildcache", "lock")
	path := filepath.Join(dir, key)
	l, err := disk.TryAcquire(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("build cache: %w", err)
		}
		l, err = disk.TryAcquire(path)
	}
	if errors.Is(err, disk.ErrLocked) {
		busy()
		l, err = disk.AcquireContext(ctx, path)
	}
	if err != nil {
		return nil, err
	}
	return func() {
		os.Remove(path) // while it is locked: who waits for it finds that it has no name any more, and makes a new one
		l.Release()
	}, nil
}

// clearLocks removes the lock files that killed builders left.
func (c *cache) clearLocks() error {
	dir := c.root.Path("buildcache", "lock")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("build cache: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		l, err := disk.TryAcquire(path)
		if errors.Is(err, disk.ErrLocked) {
			continue
		}
		if err != nil {
			return err
		}
		os.Remove(path)
		l.Release()
	}
	return nil
}

// Mark calls mark for each layer that the build cache needs, for package collect. Unreadable records are skipped: they are misses.
func Mark(root *disk.Root, mark func(...ocispec.Digest)) error {
	for _, class := range []string{byDefinition, byContent} {
		err := filepath.WalkDir(root.Path("buildcache", class), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || e.IsDir() || disk.IsTemp(e.Name()) {
				return err
			}
			var rec Record
			if err := disk.ReadJSON(path, &rec); err == nil && rec.Layer != "" {
				mark(rec.Layer)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read build cache: %w", err)
		}
	}
	return nil
}
