package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/blobs"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Layout is an OCI image layout in a folder of the user's, to which images and caches are added. Blobs come before the index that names
// them, each by a rename, so that a reader never finds half of anything.
type Layout struct{ dir string }

// OpenLayout returns the layout in dir, which need not exist.
func OpenLayout(dir string) Layout { return Layout{dir} }

// WriteFolder adds the sets to the layout in dir. A name that an index there has already is moved to the new image.
func WriteFolder(ctx context.Context, dir string, sets []Set) error {
	p, err := newPlan(OCI, sets)
	if err != nil {
		return err
	}
	l := OpenLayout(dir)
	for _, b := range p.blobs {
		if err := l.PutBytes(ctx, b.content); err != nil {
			return err
		}
	}
	for _, b := range p.layers {
		if err := l.Put(ctx, b); err != nil {
			return err
		}
	}
	return l.add(p.index.Manifests...)
}

func (l Layout) blobPath(d ocispec.Digest) string {
	return filepath.Join(l.dir, "blobs", "sha256", d.Encoded())
}

// Has reports whether the layout has a blob of that digest and size.
func (l Layout) Has(d ocispec.Descriptor) bool {
	st, err := os.Lstat(l.blobPath(d.Digest))
	return err == nil && st.Mode().IsRegular() && st.Size() == d.Size
}

// PutBytes stores a small blob.
func (l Layout) PutBytes(ctx context.Context, content []byte) error {
	d := ocispec.Descriptor{Digest: ocispec.FromBytes(content), Size: int64(len(content))}
	return l.Put(ctx, Blob{Descriptor: d, Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }})
}

// Put stores a blob unless it is there. What is read is compared with its descriptor.
func (l Layout) Put(ctx context.Context, b Blob) error {
	if l.Has(b.Descriptor) {
		return nil
	}
	rc, err := b.Open()
	if err != nil {
		return fmt.Errorf("write blob %s: %w", b.Digest, err)
	}
	defer rc.Close()
	stop := context.AfterFunc(ctx, func() { rc.Close() })
	defer stop()
	err = l.replace(l.blobPath(b.Digest), func(w io.Writer) error {
		h := sha256.New()
		n, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(rc, b.Size+1))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil && (n != b.Size || hex.EncodeToString(h.Sum(nil)) != b.Digest.Encoded()) {
			err = errors.New("it is damaged: its content is not what its digest says; pull or build its image again")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("write blob %s: %w", b.Digest, err)
	}
	return nil
}

// replace writes a file by a rename.
func (l Layout) replace(path string, fn func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // without effect once it has its name
	if err = fn(f); err == nil {
		err = f.Chmod(0o644)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}

// index reads index.json; an empty one where there is none.
func (l Layout) index() (ocispec.Index, error) {
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	idx.SchemaVersion = 2
	f, err := os.Open(filepath.Join(l.dir, ociList))
	if errors.Is(err, fs.ErrNotExist) {
		return idx, nil
	}
	if err != nil {
		return idx, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, MaxList+1))
	if err != nil {
		return idx, err
	}
	if len(raw) > MaxList {
		return idx, refuse("%s has more than %d bytes", filepath.Join(l.dir, ociList), MaxList)
	}
	if err := json.Unmarshal(raw, &idx); err != nil {
		return idx, refuse("decode %s: %w", filepath.Join(l.dir, ociList), err)
	}
	return idx, nil
}

// add puts manifests into the index. Of names that are there already the new ones count.
func (l Layout) add(list ...ocispec.Descriptor) error {
	release, err := l.lock()
	if err != nil {
		return err
	}
	defer release()
	idx, err := l.index()
	if err != nil {
		return err
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(old ocispec.Descriptor) bool {
		return slices.ContainsFunc(list, func(d ocispec.Descriptor) bool {
			a, b := old.Annotations, d.Annotations
			return a[annotationRef] == b[annotationRef] && a[annotationName] == b[annotationName] && (a[annotationRef] != "" || old.Digest == d.Digest)
		})
	})
	idx.Manifests = append(idx.Manifests, list...)
	raw, err := json.Marshal(idx)
	if err != nil {
		return err
	}
	mark, err := json.Marshal(map[string]string{"imageLayoutVersion": "1.0.0"})
	if err != nil {
		return err
	}
	for _, t := range []text{{ociMark, mark}, {ociList, raw}} {
		err := l.replace(filepath.Join(l.dir, t.name), func(w io.Writer) error {
			_, err := w.Write(t.content)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// lock keeps others from changing the index. The folder itself is locked: no file of ours is left in it.
func (l Layout) lock() (release func(), err error) {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Open(l.dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", l.dir, err)
	}
	return func() {
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN) // a child that is being forked has a copy of the file until it executes
		f.Close()
	}, nil
}

// Tag names a manifest that the layout has.
func (l Layout) Tag(tag string, d ocispec.Descriptor) error {
	d.Annotations = map[string]string{annotationRef: tag}
	return l.add(d)
}

// Resolve finds the manifest of a tag or a digest. None is fs.ErrNotExist.
func (l Layout) Resolve(name string) (ocispec.Descriptor, error) {
	idx, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, d := range idx.Manifests {
		if d.Annotations[annotationRef] == name || string(d.Digest) == name {
			return d, nil
		}
	}
	var have []string
	for _, d := range idx.Manifests {
		have = append(have, d.Annotations[annotationRef])
	}
	if len(have) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%s holds no OCI layout: %w", l.dir, fs.ErrNotExist)
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s has no %q, but %s: %w", l.dir, name, strings.Join(have, ", "), fs.ErrNotExist)
}

// Blob opens a blob. The reader verifies digest and size.
func (l Layout) Blob(d ocispec.Descriptor) (io.ReadCloser, error) {
	if err := ocispec.Validate(d.Digest); err != nil || d.Digest.Algorithm() != "sha256" {
		return nil, refuse("digest %q is no sha256", d.Digest)
	}
	if !l.Has(d) {
		return nil, fmt.Errorf("blob %s of %d bytes in %s: %w", d.Digest, d.Size, l.dir, fs.ErrNotExist)
	}
	f, err := os.Open(l.blobPath(d.Digest))
	if err != nil {
		return nil, err
	}
	return blobs.Verify(f, d.Digest)
}
