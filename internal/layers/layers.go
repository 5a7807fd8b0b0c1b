// Package layers owns the immutable layers of images, each named by its diffID, the sha256 of its uncompressed tar.
//
// A layer lies in <root>/layers/<hex of the diffID>/:
//
//	meta.json      what Info says, the driver, and the boot in which it was written
//	synced         empty: everything else is known to be on the disk (see Store.Sync)
//	blobs.json     only if known: the compressed forms of the tar, and which repositories have them (see Blob)
//	implied.json   only if the tar uses folders that it does not name: their paths
//	layer.tar      driver erofs: the tar itself
//	index.erofs    driver erofs: names, attributes and where in layer.tar the contents lie (package erofsindex)
//	sparse.data    driver erofs, only with sparse files: their contents without the holes
//	fs/            driver dir: the unpacked tree, with overlayfs's whiteouts
//	tar.split      driver dir: the bytes of the tar that are not in fs/, so that it can be put together again bit by bit
//
// and is mounted at most once, for everybody, at <state>/layers/<hex> (driver erofs). A root may hold layers of both drivers.
//
// A layer appears by one rename, complete. It is not synced then: a pull ends with one Store.Sync for all its layers. A layer
// that no Sync covered, found after a reboot, is verified against its name at its first use, and its index made anew;
// if it is damaged it is removed, and the answer is ErrNotFound.
//
// Locks: <state>/layers/<hex>.lock is held to mount, repair or remove one layer, never two at a time except that a chain's lock
// (<state>/layers/chain-<key>.lock) comes before. Readers and importers take none.
package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Sentinels of this package.
var (
	// ErrNotFound says that the store has no such layer, or had one that a power loss damaged.
	ErrNotFound = errors.New("the layer is not here: pull or build its image again")
	// ErrDigest says that a tar is not the one that its name promised.
	ErrDigest = errors.New("wrong digest")
)

// Names of the drivers.
const (
	DriverEROFS = "erofs"
	DriverDir   = "dir"
)

// Options say how to open a store. The zero value probes for the best driver.
type Options struct {
	// Driver for new layers: DriverEROFS, DriverDir, or "" to probe.
	Driver string
	// State is the folder on a tmpfs below which layers are mounted. Empty: /run/conex.
	State string
}

// Store keeps layers. It holds no state in memory and may be used by many goroutines and processes at once.
type Store struct {
	root  *disk.Root
	state string // <state>/layers
	drv   driver
	why   string
	claim func(...ocispec.Digest) error // nil: the caller has seen to it
}

// Info describes a layer. Sizes are in bytes.
type Info struct {
	// DiffID names the layer: the sha256 of its tar.
	DiffID ocispec.Digest `json:"diffID"`
	// Size is the length of the tar.
	Size int64 `json:"size"`
	// ContentSize is the sum of the sizes of its regular files, hard links counted once.
	ContentSize int64 `json:"contentSize"`
	// DiskSize is what the layer takes on disk.
	DiskSize int64 `json:"diskSize"`
	// Entries is the number of entries of the tar.
	Entries int `json:"entries"`
	// Created is when this store got the layer.
	Created time.Time `json:"created"`
}

// meta is meta.json.
type meta struct {
	Info
	Driver string `json:"driver"`
	// Boot is the boot in which the layer was written or last verified.
	Boot string `json:"boot"`
	// Implied is the number of paths in implied.json.
	Implied int `json:"implied,omitempty"`
	// Format is the version of what the driver keeps beside the contents.
	Format int `json:"format"`
	// CRC32C is the checksum of the tar; nil in layers of before it was kept.
	CRC32C *uint32 `json:"crc32c,omitempty"`
	// Spill is the length of sparse.data.
	Spill int64 `json:"spill,omitempty"`
}

// driver is how a layer is kept and shown. The methods get the layer's folder.
type driver interface {
	name() string
	// finish turns a folder with layer.tar (and sparse.data) into the driver's form and returns its size on disk.
	finish(ctx context.Context, dir string, c content) (int64, error)
	// openTar opens the tar, byte by byte as it came.
	openTar(dir string) (io.ReadCloser, error)
	// verify reads everything and compares it with the name; want is ErrDigest for a difference.
	verify(ctx context.Context, dir string, m meta) error
	// lower returns a folder that shows the layer in overlayfs's form, mounting it if need be.
	lower(ctx context.Context, s *Store, m meta) (string, error)
}

func driverNamed(name string) (driver, error) {
	switch name {
	case DriverEROFS:
		return erofsDriver{}, nil
	case DriverDir:
		return dirDriver{}, nil
	}
	return nil, fmt.Errorf("unknown storage driver %q: use %s or %s", name, DriverEROFS, DriverDir)
}

// Open opens the store in root. With no driver named the first call of a boot tries whether the kernel mounts EROFS from a
// file (some milliseconds) and writes the answer down; later ones read it (some 10 µs). A driver named that does not
// work here is an error that says why.
func Open(root *disk.Root, opt Options) (*Store, error) {
	if opt.State == "" {
		opt.State = "/run/conex"
	}
	state, err := filepath.Abs(filepath.Join(opt.State, "layers"))
	if err != nil {
		return nil, err
	}
	s := &Store{root: root, state: state}
	if err := os.MkdirAll(s.state, 0o700); err != nil {
		return nil, fmt.Errorf("open layers: %w", err)
	}
	name := opt.Driver
	switch name {
	case DriverDir:
		s.why = "chosen by configuration"
	case "", DriverEROFS:
		p, err := s.probe()
		if err != nil {
			return nil, fmt.Errorf("open layers: %w", err)
		}
		s.why = p.Why
		if name == "" {
			name = p.Driver
		} else if p.Driver != name {
			return nil, fmt.Errorf("open layers: storage driver %s: %s", name, p.Why)
		} else {
			s.why = "chosen by configuration"
		}
	}
	s.drv, err = driverNamed(name)
	return s, err
}

// Driver returns the name of the driver for new layers, and a sentence on why it was chosen.
func (s *Store) Driver() (name, why string) { return s.drv.name(), s.why }

// Claiming returns a store that calls claim for each layer that it makes, before the layer is there or is found to be there already, so
// that no sweep takes it from then on. It is for who can't know beforehand which layers come about.
func (s *Store) Claiming(claim func(...ocispec.Digest) error) *Store {
	c := *s
	c.claim = claim
	return &c
}

// Claim calls what Claiming was given, if anything. Look only afterwards whether a layer is there.
func (s *Store) Claim(ids ...ocispec.Digest) error {
	if s.claim == nil {
		return nil
	}
	return s.claim(ids...)
}

// dir returns the folder of a layer.
func (s *Store) dir(id ocispec.Digest) string { return s.root.Path("layers", id.Encoded()) }

// Stat describes a layer or returns ErrNotFound.
func (s *Store) Stat(id ocispec.Digest) (Info, error) {
	m, err := s.load(id)
	return m.Info, err
}

// load reads a layer's meta.json, and makes sure that a layer of another boot is whole.
func (s *Store) load(id ocispec.Digest) (meta, error) {
	if err := ocispec.Validate(id); err != nil {
		return meta{}, fmt.Errorf("layer %q: %w", id, err)
	}
	m, trusted, err := s.read(id)
	if err == nil && trusted {
		return m, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Lstat(s.dir(id)); errors.Is(serr, fs.ErrNotExist) {
			return meta{}, fmt.Errorf("layer %s: %w", id, ErrNotFound)
		}
	}
	return s.repair(context.Background(), id)
}

// read reads meta.json; trusted says that the layer was written in this boot or synced, and that nobody deleted a file of it.
func (s *Store) read(id ocispec.Digest) (m meta, trusted bool, err error) {
	dir := s.dir(id)
	if err := disk.ReadJSON(filepath.Join(dir, "meta.json"), &m); err != nil {
		return m, false, err
	}
	if m.DiffID != id {
		return m, false, fmt.Errorf("layer %s: meta.json speaks of %q", id, m.DiffID)
	}
	for _, name := range contents[m.Driver] {
		if _, err := os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			return m, false, nil
		}
	}
	if m.Boot == disk.BootID() {
		return m, true, nil
	}
	_, err = os.Lstat(filepath.Join(dir, "synced"))
	return m, err == nil, nil
}

// contents are what a driver's layers have in any case.
var contents = map[string][]string{"erofs": {"layer.tar", "index.erofs"}, "dir": {"fs"}}

// List describes all layers, oldest first.
func (s *Store) List() ([]Info, error) {
	entries, err := os.ReadDir(s.root.Path("layers"))
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	var out []Info
	for _, e := range entries {
		id := ocispec.Digest("sha256:" + e.Name())
		if ocispec.Validate(id) != nil {
			continue // a chain's folder attributes
		}
		info, err := s.Stat(id)
		if errors.Is(err, ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, info)
	}
	sort.Slice(out, func(a, b int) bool {
		if !out[a].Created.Equal(out[b].Created) {
			return out[a].Created.Before(out[b].Created)
		}
		return out[a].DiffID < out[b].DiffID
	})
	return out, nil
}

// OpenTar opens the exact bytes whose sha256 is the diffID. Driver erofs gives an *os.File.
func (s *Store) OpenTar(id ocispec.Digest) (io.ReadCloser, Info, error) {
	m, err := s.load(id)
	if err != nil {
		return nil, Info{}, err
	}
	drv, err := driverNamed(m.Driver)
	if err != nil {
		return nil, Info{}, err
	}
	r, err := drv.openTar(s.dir(id))
	if err != nil {
		return nil, Info{}, fmt.Errorf("open layer %s: %w", id, err)
	}
	return r, m.Info, nil
}

// Verify reads the whole layer and compares it with its name; a difference is ErrDigest.
func (s *Store) Verify(ctx context.Context, id ocispec.Digest) error {
	m, err := s.load(id)
	if err != nil {
		return err
	}
	drv, err := driverNamed(m.Driver)
	if err != nil {
		return err
	}
	if err := drv.verify(ctx, s.dir(id), m); err != nil {
		return fmt.Errorf("verify layer %s: %w", id, err)
	}
	return nil
}

// Sync makes the layers survive a power loss: one syncfs for all of them. Call it once at the end of a pull or build,
// before what refers to the layers is written. A nil error promises that the layers are on the disk.
func (s *Store) Sync(ids ...ocispec.Digest) error {
	var todo []string
	for _, id := range ids {
		mark := filepath.Join(s.dir(id), "synced")
		if _, err := os.Lstat(mark); err != nil {
			todo = append(todo, mark)
		}
	}
	if len(todo) == 0 {
		return nil
	}
	if err := disk.SyncFS(s.root.Path("layers")); err != nil {
		return err
	}
	for _, mark := range todo {
		f, err := os.OpenFile(mark, os.O_CREATE|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			return fmt.Errorf("sync layers: %w", err)
		}
	}
	return nil
}

// isLayerName tells a layer's name from the other things in the folders of this package.
func isLayerName(name string) bool {
	return len(name) == 64 && strings.Trim(name, "0123456789abcdef") == ""
}
