package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"conex/internal/disk"
	"conex/internal/undo"
	"conex/internal/volume"

	"golang.org/x/sys/unix"
)

// Cache mounts lie in buildcache/mount/<name>, with <name>.lock beside it. A name that private mounts share has further folders,
// <name>.1 and so on, for as many steps as had it at the same time.

// cacheName is what tells caches apart: the id, what they begin with, and the owner and mode where those were given.
func (x *execution) cacheName(m mountOp) string { return mountName(m.identity(x.in)) }

// identity is what a cache's name is made of; it begins with the id. in are the results of the step's inputs.
func (m *mountOp) identity(in []result) string {
	id := m.ID
	if m.Input > 0 {
		id += "\x00from\x00" + in[m.Input].key() + "\x00" + path.Clean("/"+m.Source)
	}
	if m.Owned {
		id += fmt.Sprintf("\x00owner\x00%o:%d:%d", m.Mode, m.UID, m.GID)
	}
	return id
}

func mountName(identity string) string {
	sum := sha256.Sum256([]byte(identity))
	return hex.EncodeToString(sum[:16])
}

// lockCaches takes the locks of all cache mounts, each once and in one order, so that no two steps wait for each other. It returns the
// folders by name.
func (x *execution) lockCaches(ctx context.Context, held *undo.Stack) (map[string]string, error) {
	sharing := map[string]string{} // by name, the strictest
	rank := []string{"", "shared", "private", "locked"}
	for _, m := range x.op.Mounts {
		if m.Type == "cache" {
			n := x.cacheName(m)
			if slices.Index(rank, m.Sharing) >= slices.Index(rank, sharing[n]) {
				sharing[n] = m.Sharing
			}
		}
	}
	if len(sharing) == 0 {
		return nil, nil
	}
	base := x.b.Root.Path("buildcache", "mount")
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, err
	}
	dirs := map[string]string{}
	now := time.Now() // of the last use: Entries tells what is old by it
	for _, n := range slices.Sorted(maps.Keys(sharing)) {
		dir := filepath.Join(base, n)
		l, err := x.lockCache(ctx, &dir, sharing[n])
		if err != nil {
			return nil, err
		}
		held.Add(l.Release)
		if err := os.Chtimes(dir+".lock", now, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		dirs[n] = dir
	}
	return dirs, nil
}

// lockCache takes the lock of a cache for one step: shared, alone after a wait, or with sharing=private alone on the first folder that
// is free, which dir is set to.
func (x *execution) lockCache(ctx context.Context, dir *string, sharing string) (*disk.Lock, error) {
	if sharing == "private" {
		first := *dir
		for i := 1; ; i++ {
			l, err := disk.TryAcquire(*dir + ".lock")
			if !errors.Is(err, disk.ErrLocked) {
				return l, err
			}
			*dir = fmt.Sprintf("%s.%d", first, i)
		}
	}
	try, wait := disk.TryAcquireShared, disk.AcquireSharedContext
	if sharing == "locked" {
		try, wait = disk.TryAcquire, disk.AcquireContext
	}
	l, err := try(*dir + ".lock")
	if !errors.Is(err, disk.ErrLocked) {
		return l, err
	}
	x.vertex.output("waiting for a cache mount that another step has\n", true)
	return wait(ctx, *dir+".lock")
}

// cacheDir makes a cache mount's folder, whose lock is held, if it is missing. It outlives the build and is no part of any layer.
func (x *execution) cacheDir(ctx context.Context, dir string, m mountOp) (string, error) {
	identity := m.identity(x.in)
	if err := noteMount(dir, identity); err != nil {
		return "", err
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	fresh, err := os.MkdirTemp(x.dir, "cache-")
	if err != nil {
		return "", err
	}
	filled, err := x.imports.mount(ctx, mountName(identity), fresh, x.vertex)
	if err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		x.vertex.output(fmt.Sprintf("cache mount %s is not imported: %v\n", m.ID, err), true)
		if err := os.RemoveAll(fresh); err != nil {
			return "", err
		}
		if err := os.Mkdir(fresh, 0o700); err != nil {
			return "", err
		}
	}
	if filled {
		_, err = disk.Publish(fresh, dir)
		return dir, err
	}
	if m.Input > 0 {
		if err := x.fillCache(ctx, fresh, m); err != nil {
			return "", err
		}
	}
	if m.Input == 0 || m.Owned {
		if err := errors.Join(os.Chown(fresh, m.UID, m.GID), unix.Chmod(fresh, m.Mode)); err != nil {
			return "", err
		}
	}
	// A step that shares the lock may have been faster.
	_, err = disk.Publish(fresh, dir)
	return dir, err
}

// fillCache copies what a cache mount begins with.
func (x *execution) fillCache(ctx context.Context, dir string, m mountOp) error {
	root, err := openStage(ctx, x.b.Layers, x.in[m.Input].layers)
	if err != nil {
		return err
	}
	if root == nil {
		return fmt.Errorf("%q: %w", m.Source, ErrNotFound)
	}
	defer root.Close()
	at, err := openIn(root, m.Source)
	if err != nil {
		return err
	}
	defer at.Close()
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", at.Fd()), unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return notFolder(path.Clean("/" + m.Source)[1:])
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return volume.CopyTree(ctx, dir, f, volume.CopyOptions{})
}
