package layers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/disk"
	"conex/internal/layertar"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Remove unmounts a layer and deletes it. It is no error when there is no such layer. The caller makes sure that nothing
// refers to the layer; a container that runs on it all the same keeps its files with the driver erofs and loses them with dir. The space
// is given back by disk.Root.Sweep.
func (s *Store) Remove(id ocispec.Digest) error {
	if err := ocispec.Validate(id); err != nil {
		return fmt.Errorf("layer %q: %w", id, err)
	}
	if err := s.removeChains(func(ids []ocispec.Digest) bool { return slices.Contains(ids, id) }); err != nil {
		return fmt.Errorf("remove layer %s: %w", id, err)
	}
	at := filepath.Join(s.state, id.Encoded())
	l, err := disk.Acquire(at + ".lock")
	if err != nil {
		return err
	}
	defer l.Release()
	if err := unmount(at); err != nil {
		return fmt.Errorf("remove layer %s: %w", id, err)
	}
	if _, err := s.root.TrashLater(s.dir(id)); err != nil {
		return err
	}
	// Under the lock: whoever waits for it sees that the file is gone and takes a new one.
	return os.Remove(at + ".lock")
}

// removeChains forgets the folder attributes of the chains that match.
func (s *Store) removeChains(match func(ids []ocispec.Digest) bool) error {
	records, err := filepath.Glob(filepath.Join(s.state, "chain-*.json"))
	if err != nil {
		return err
	}
	for _, record := range records {
		var c chainInfo
		if err := disk.ReadJSON(record, &c); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err == nil && !match(c.IDs) {
			continue
		}
		if err := s.removeChain(strings.TrimSuffix(record, ".json")); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) removeChain(at string) error {
	l, err := disk.Acquire(at + ".lock")
	if err != nil {
		return err
	}
	defer l.Release()
	if err := unmount(at); err != nil {
		return err
	}
	if err := s.root.Trash(s.root.Path("layers", filepath.Base(at))); err != nil {
		return err
	}
	for _, ext := range []string{".erofs", ".json", ".lock"} {
		if err := os.Remove(at + ext); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// unmount takes a mount and its mount point away, whoever uses it. Without a mount it only removes the mount point.
func unmount(at string) error {
	for isMounted(at) {
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", at, err)
		}
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Unmount takes all mounts of this store away, for example before it is uninstalled. Layers stay; the next Lower mounts
// what it needs. Containers that run keep what they have.
func (s *Store) Unmount() error {
	if err := s.removeChains(func([]ocispec.Digest) bool { return true }); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.state)
	if err != nil {
		return fmt.Errorf("unmount layers: %w", err)
	}
	for _, e := range entries {
		if !isLayerName(e.Name()) {
			continue
		}
		at := filepath.Join(s.state, e.Name())
		l, err := disk.Acquire(at + ".lock")
		if err != nil {
			return err
		}
		err = unmount(at)
		l.Release()
		if err != nil {
			return err
		}
	}
	return nil
}

// repair handles a layer that was written in another boot and not synced, or whose meta.json can't be read: it is verified
// and gets a new index and meta.json, or it is removed and the answer is ErrNotFound.
func (s *Store) repair(ctx context.Context, id ocispec.Digest) (meta, error) {
	at := filepath.Join(s.state, id.Encoded())
	l, err := disk.AcquireContext(ctx, at+".lock")
	if err != nil {
		return meta{}, err
	}
	defer l.Release()
	m, trusted, readErr := s.read(id)
	if readErr == nil && trusted {
		return m, nil // another process repaired it while we waited
	}
	dir := s.dir(id)
	var bad error
	if _, err := os.Lstat(filepath.Join(dir, "layer.tar")); err == nil {
		bad, err = s.rebuild(ctx, id, m)
		if err != nil {
			return meta{}, fmt.Errorf("check layer %s: %w", id, err)
		}
	} else if readErr != nil {
		bad = readErr
	} else {
		drv, err := driverNamed(m.Driver)
		if err != nil {
			return meta{}, err
		}
		switch err := drv.verify(ctx, dir, m); {
		case errors.Is(err, ErrDigest), errors.Is(err, fs.ErrNotExist):
			bad = err
		case err != nil:
			return meta{}, fmt.Errorf("check layer %s: %w", id, err)
		default:
			m.Boot = disk.BootID()
			if err := disk.WriteJSON(filepath.Join(dir, "meta.json"), m, disk.Volatile); err != nil {
				return meta{}, err
			}
		}
	}
	if bad != nil {
		if err := errors.Join(unmount(at), s.root.Trash(dir)); err != nil {
			return meta{}, err
		}
		return meta{}, fmt.Errorf("layer %s was damaged, by a power loss or by hand, and is removed (%w): %w", id, bad, ErrNotFound)
	}
	m, _, err = s.read(id)
	return m, err
}

// rebuild makes a layer of driver erofs anew from its layer.tar. bad says why the tar can't serve.
func (s *Store) rebuild(ctx context.Context, id ocispec.Digest, old meta) (bad, err error) {
	st, err := s.root.Stage()
	if err != nil {
		return nil, err
	}
	defer st.Close() // nothing is in it when published
	dir := s.dir(id)
	if err := os.Link(filepath.Join(dir, "layer.tar"), filepath.Join(st.Dir, "layer.tar")); err != nil {
		return nil, err
	}
	if err := os.Link(s.blobsPath(id), filepath.Join(st.Dir, "blobs.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, "layer.tar"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := newSink(io.Discard)
	c, err := scan(&tee{ctx: ctx, src: f, sink: out}, filepath.Join(st.Dir, "sparse.data"))
	got, serr := out.finish()
	c.size, c.crc = out.n, out.crc
	switch {
	case errors.Is(err, layertar.ErrRefused):
		return err, nil
	case err != nil:
		return nil, err
	case serr != nil:
		return nil, serr
	case got != id:
		return fmt.Errorf("%w: layer.tar has %s", ErrDigest, got), nil
	}
	created := old.Created
	if created.IsZero() {
		if info, err := f.Stat(); err == nil {
			created = info.ModTime()
		}
	}
	if err := s.complete(ctx, erofsDriver{}, st.Dir, id, c, created); err != nil {
		return nil, err
	}
	if err := unmount(filepath.Join(s.state, id.Encoded())); err != nil {
		return nil, err
	}
	if err := s.root.Trash(dir); err != nil {
		return nil, err
	}
	_, err = st.Publish(dir)
	return nil, err
}
