package layers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Peek describes a layer as its meta.json has it. Unlike Stat it verifies, repairs and removes nothing.
func (s *Store) Peek(id ocispec.Digest) (Info, error) {
	if err := ocispec.Validate(id); err != nil {
		return Info{}, fmt.Errorf("layer %q: %w", id, err)
	}
	m, _, err := s.read(id)
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Lstat(s.dir(id)); errors.Is(serr, fs.ErrNotExist) {
			err = ErrNotFound
		}
	}
	if err != nil {
		return Info{}, fmt.Errorf("layer %s: %w", id, err)
	}
	return m.Info, nil
}

// Fault is what Check found wrong with a layer.
type Fault struct {
	// Err says what.
	Err error
	// Mendable says that the tar is good: Mend makes everything else anew.
	Mendable bool
}

// Check reads a whole layer and compares it with its name; it changes nothing. A nil Fault and a nil error say that the layer is whole,
// or is not there (any more); the error that it can't be known.
func (s *Store) Check(ctx context.Context, id ocispec.Digest) (*Fault, error) {
	f, err := s.check(ctx, id)
	if f == nil && err == nil {
		return nil, nil
	}
	// It may have been repaired or removed while we read: what is judged under its lock holds.
	l, lerr := disk.AcquireContext(ctx, filepath.Join(s.state, id.Encoded()+".lock"))
	if lerr != nil {
		return nil, lerr
	}
	defer l.Release()
	if _, err := os.Lstat(s.dir(id)); errors.Is(err, fs.ErrNotExist) {
		return nil, os.Remove(l.File().Name())
	}
	return s.check(ctx, id)
}

func (s *Store) check(ctx context.Context, id ocispec.Digest) (*Fault, error) {
	dir := s.dir(id)
	m, _, err := s.read(id)
	var fault error
	var drv driver = erofsDriver{}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		fault = errors.New("meta.json is missing")
	case err != nil:
		fault = err
	default:
		if drv, err = driverNamed(m.Driver); err != nil {
			fault = err
			break
		}
		for _, name := range contents[m.Driver] {
			if _, err := os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
				fault = fmt.Errorf("%s is missing", name)
			}
		}
	}
	if fault == nil {
		err := drv.verify(ctx, dir, m)
		switch {
		case err == nil:
			_, err = s.Blobs(id)
			if err != nil {
				return &Fault{err, true}, nil
			}
			return nil, nil
		case errors.Is(err, ErrDigest), errors.Is(err, fs.ErrNotExist):
			fault = err
		default:
			return nil, fmt.Errorf("check layer %s: %w", id, err)
		}
	}
	f, err := os.Open(filepath.Join(dir, "layer.tar"))
	if err != nil {
		return &Fault{fault, false}, nil //nolint:nilerr // without a tar there is nothing to mend from
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, &ctxReader{ctx, f}, make([]byte, blockSize)); err != nil {
		return nil, fmt.Errorf("check layer %s: %w", id, err)
	}
	return &Fault{fault, hex.EncodeToString(h.Sum(nil)) == id.Encoded()}, nil
}

// Mend makes index, description and note of the blobs of a layer anew from its good tar, as Check has found it. The layer is unmounted;
// containers that run on it keep what they have.
func (s *Store) Mend(ctx context.Context, id ocispec.Digest) error {
	l, err := disk.AcquireContext(ctx, filepath.Join(s.state, id.Encoded()+".lock"))
	if err != nil {
		return err
	}
	defer l.Release()
	m, _, err := s.read(id)
	if err != nil || m.DiffID != id {
		m = meta{}
	}
	if _, err := s.Blobs(id); err != nil {
		if err := os.Remove(s.blobsPath(id)); err != nil {
			return err
		}
		if f, err := s.check(ctx, id); f == nil || err != nil {
			return err // that was all
		}
	}
	bad, err := s.rebuild(ctx, id, m)
	if err == nil {
		err = bad
	}
	if err != nil {
		return fmt.Errorf("mend layer %s: %w", id, err)
	}
	return nil
}

// Quarantine moves a layer that can't be mended out of the store to the path to, unless it is whole after all. Containers that run on it
// keep what they have with the driver erofs. moved is false when it was whole or gone.
func (s *Store) Quarantine(ctx context.Context, id ocispec.Digest, to string) (moved bool, err error) {
	if err := s.removeChains(func(ids []ocispec.Digest) bool { return slices.Contains(ids, id) }); err != nil {
		return false, err
	}
	at := filepath.Join(s.state, id.Encoded())
	l, err := disk.AcquireContext(ctx, at+".lock")
	if err != nil {
		return false, err
	}
	defer l.Release()
	f, err := s.check(ctx, id)
	if f == nil || err != nil {
		return false, err
	}
	if err := unmount(at); err != nil {
		return false, err
	}
	return disk.Publish(s.dir(id), to)
}
