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
	// KeepForm says whether a compressed form of a layer that stays may stay too; nil keeps all. What a lease names stays in any case.
	KeepForm func(ocispec.Digest) bool
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
		held, anyOpen, err := leases(s.Root, true)
		if err != nil {
			return err
		}
		if anyOpen {
			res.Deferred = true
			return disk.WriteFile(pending(s.Root), nil, 0o600, disk.Volatile)
		}
		marks := map[ocispec.Digest]bool{}
		if err := s.mark(marks, markers); err != nil {
			return err
		}
		some, err := s.remove(marks, held, &res)
		if err != nil {
			return err
		}
		if err := os.Remove(pending(s.Root)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if some {
			return disk.WriteFile(left(s.Root), nil, 0o600, disk.Volatile)
		}
		if err := os.Remove(left(s.Root)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
	if err != nil {
		return res, fmt.Errorf("sweep: %w", err)
	}
	gc.Release() // staging has locks of its own
	if err := emptyTrash(s.Root, res.Bytes); err != nil {
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

// remove deletes what is neither marked nor held by a lease. left says that there is something that only leases keep.
func (s Stores) remove(marks, held map[ocispec.Digest]bool, res *Result) (left bool, err error) {
	ls, err := s.Layers.List()
	if err != nil {
		return false, err
	}
	var m disk.Meter
	for _, l := range ls {
		if marks[l.DiffID] || held[l.DiffID] {
			left = left || !marks[l.DiffID]
			// The compressed forms of a layer stay with it, so that it can be pushed bit by bit.
			forms, err := s.Layers.Blobs(l.DiffID)
			if err != nil {
				continue // a note that a power loss cut short: the forms are fetched or made again when they are needed
			}
			for _, b := range forms {
				if s.KeepForm == nil || s.KeepForm(b.Digest) {
					marks[b.Digest] = true
				}
			}
			continue
		}
		sp, err := m.Tree(s.Root.Path("layers", l.DiffID.Encoded()))
		if err != nil {
			return left, err
		}
		if err := s.Layers.Remove(l.DiffID); err != nil {
			return left, err
		}
		res.Layers = append(res.Layers, l.DiffID)
		res.Bytes += sp.Disk
	}
	bs, err := s.Blobs.List()
	if err != nil {
		return left, err
	}
	for _, b := range bs {
		if marks[b] || held[b] {
			left = left || !marks[b]
			continue
		}
		sp, err := m.One(s.Root.Path("blobs", "sha256", b.Encoded()))
		if err != nil {
			return left, err
		}
		if err := s.Blobs.Remove(b); err != nil {
			return left, err
		}
		res.Blobs = append(res.Blobs, b)
		res.Bytes += sp.Disk
	}
	return left, nil
}

// Pending reports whether a sweep was put off because of an open lease. Whoever closes such a lease looks, and sweeps.
func Pending(root *disk.Root) bool {
	_, err := os.Lstat(pending(root))
	return err == nil
}

// Left reports whether a sweep spared something that only leases name. Whoever closes a lease that it held for long looks, and sweeps.
func Left(root *disk.Root) bool {
	_, err := os.Lstat(left(root))
	return err == nil
}
