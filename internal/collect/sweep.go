package collect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// Marker calls mark for each digest that something uses: a layer, a blob, or an image (whose layers it then marks itself).
type Marker func(mark func(...ocispec.Digest)) error

// Stores are what Sweep works on.
type Stores struct {
	Root   *disk.Root
	Images *image.Store
	Layers *layers.Store
	Blobs  *blobs.Store
}

// Result says what a sweep removed.
type Result struct {
	Layers, Blobs []ocispec.Digest
	// Bytes is the space that came free on disk.
	Bytes int64
	// Deferred is true when an open lease kept the sweep from layers and blobs: Pending stays true until a later one did the work.
	Deferred bool
}

// Sweep removes the layers and blobs that no image, no live lease and no marker names. Images are read here; containers and the
// build cache come as markers. An error of a marker ends the sweep before anything is removed: what could not be read could be in
// use. It holds gc.lock exclusively, then the image store's lock, so nothing can be marked that a marker no longer sees: whoever
// writes a record that names layers holds a lease on them until it is written. Last it clears staging/ and trash/ of what dead
// processes left there.
func Sweep(ctx context.Context, s Stores, markers ...Marker) (Result, error) {
	var res Result
	gc, err := disk.AcquireContext(ctx, gcLock(s.Root))
	if err != nil {
		return res, fmt.Errorf("sweep: %w", err)
	}
	defer gc.Release()
	err = s.Images.Locked(func() error {
		marks, anyOpen, err := leases(s.Root, true)
		if err != nil {
			return err
		}
		if anyOpen {
			res.Deferred = true
			return disk.WriteFile(pending(s.Root), nil, 0o600, disk.Volatile)
		}
		if err := s.mark(marks, markers); err != nil {
			return err
		}
		if err := s.remove(marks, &res); err != nil {
			return err
		}
		if err := os.Remove(pending(s.Root)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
	if err != nil {
		return res, fmt.Errorf("sweep: %w", err)
	}
	gc.Release() // staging has locks of its own
	if err := s.Root.Sweep(); err != nil {
		return res, fmt.Errorf("sweep: %w", err)
	}
	return res, nil
}

// Marks returns what images, live leases and markers name, and whether an open lease protects everything. Compressed blobs are not in
// it: they stay with their layers. The caller sees to it that nothing changes meanwhile, as with Still.
func Marks(s Stores, markers ...Marker) (marks map[ocispec.Digest]bool, open bool, err error) {
	if marks, open, err = leases(s.Root, false); err != nil {
		return nil, false, err
	}
	return marks, open, s.mark(marks, markers)
}

func (s Stores) mark(marks map[ocispec.Digest]bool, markers []Marker) error {
	mark := func(ds ...ocispec.Digest) {
		for _, d := range ds {
			marks[d] = true
		}
	}
	images, err := s.Images.List()
	if err != nil {
		return err
	}
	for _, img := range images {
		mark(img.ID, img.Manifest)
		mark(img.Layers()...)
	}
	indexes, err := s.Images.Indexes()
	if err != nil {
		return err
	}
	mark(indexes...)
	for _, m := range markers {
		if err := m(mark); err != nil {
			return err
		}
	}
	return nil
}

// remove deletes what is not marked.
func (s Stores) remove(marks map[ocispec.Digest]bool, res *Result) error {
	ls, err := s.Layers.List()
	if err != nil {
		return err
	}
	for _, l := range ls {
		if marks[l.DiffID] {
			// The compressed forms of a layer stay with it, so that it can be pushed bit by bit.
			forms, err := s.Layers.Blobs(l.DiffID)
			if err != nil {
				return err
			}
			for _, b := range forms {
				marks[b.Digest] = true
			}
			continue
		}
		if err := s.Layers.Remove(l.DiffID); err != nil {
			return err
		}
		res.Layers = append(res.Layers, l.DiffID)
		res.Bytes += l.DiskSize
	}
	bs, err := s.Blobs.List()
	if err != nil {
		return err
	}
	for _, b := range bs {
		if marks[b] {
			continue
		}
		n, err := s.Blobs.Size(b)
		if err != nil && !errors.Is(err, blobs.ErrNotFound) {
			return err
		}
		if err := s.Blobs.Remove(b); err != nil {
			return err
		}
		res.Blobs = append(res.Blobs, b)
		res.Bytes += n
	}
	return nil
}

// Pending reports whether a sweep was put off because of an open lease. Whoever closes such a lease looks, and sweeps.
func Pending(root *disk.Root) bool {
	_, err := os.Lstat(pending(root))
	return err == nil
}
