package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"conex/internal/linux/mount"
	"conex/internal/linux/userns"
	"conex/internal/safepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// early reports whether sources of mounts must be opened before the container's mount namespace is entered: there every mount is a
// slave of the host's, and so would be what is mounted of it, though it shall be shared.
func (r *rootfs) early() bool {
	for _, m := range r.cfg.Spec.Mounts {
		if parseMountOptions(m.Options).propagation == unix.MS_SHARED {
			return true
		}
	}
	return false
}

// collect opens the sources of bind mounts in the host's mount namespace.
func (r *rootfs) collect() error {
	r.trees = map[int]*os.File{}
	for i, m := range r.cfg.Spec.Mounts {
		o := parseMountOptions(m.Options)
		if !o.bind && m.Type != "bind" || r.cfg.Sources[m.Destination].Lower != nil || r.cfg.Sources[m.Destination].Overlay != nil || len(r.cfg.Trees) > 0 && o.propagation != unix.MS_SHARED {
			continue
		}
		t, err := r.bindSource(m, o)
		if err == nil && o.propagation != unix.MS_SHARED {
			err = mount.SetAttr(t, 0, 0, unix.MS_SLAVE, true)
		}
		if t != nil {
			r.trees[i] = t
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	return nil
}

// source returns a detached mount of what m, number i of the spec's, binds, with its attributes and ids.
func (r *rootfs) source(i int, m specs.Mount, o mountOptions) (t *os.File, err error) {
	src := r.cfg.Sources[m.Destination]
	switch {
	case r.trees[i] != nil:
		t = r.trees[i]
		delete(r.trees, i)
	case src.Lower != nil:
		t, err = r.imageSource(src)
	case src.Overlay != nil:
		t, err = r.overlaySource(m, src)
	default:
		t, err = r.bindSource(m, o)
	}
	if err != nil {
		return nil, err
	}
	err = o.attributes(t)
	if err == nil && src.Lower == nil && src.Overlay == nil {
		err = r.mapSource(t, m, o, src)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// bindSource opens a bind mount's source. A path below it (Source.Subpath) leads nowhere but into it, whatever links somebody puts
// there meanwhile: it is resolved once, and what was found is mounted by its handle (CVE-2021-25741, CVE-2023-3676 and their kind).
func (r *rootfs) bindSource(m specs.Mount, o mountOptions) (*os.File, error) {
	sub := r.cfg.Sources[m.Destination].Subpath
	if sub == "" {
		t, err := mount.Clone(unix.AT_FDCWD, m.Source, o.recursive)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("bind source path does not exist: %s", m.Source)
		}
		return t, err
	}
	dir, err := safepath.OpenRoot(m.Source)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, err := safepath.Open(dir, sub, unix.O_PATH, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot access path %s: %w", sub, errors.Unwrap(err))
	}
	defer f.Close()
	return mount.Clone(int(f.Fd()), "", o.recursive)
}

// overlaySource mounts a bind's source with the container's changes above it. The source is opened as bindSource does.
func (r *rootfs) overlaySource(m specs.Mount, src Source) (*os.File, error) {
	dir, err := os.OpenFile(m.Source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bind source path does not exist: %s", m.Source)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("overlay is for folders: %s is none", m.Source)
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	at := dir
	if src.Subpath != "" {
		if at, err = safepath.Open(dir, src.Subpath, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return nil, fmt.Errorf("cannot access path %s: %w", src.Subpath, errors.Unwrap(err))
		}
		defer at.Close()
	}
	return mount.Overlay(mount.OverlayOptions{
		Lower: []string{fmt.Sprintf("/proc/self/fd/%d", at.Fd())}, Upper: src.Overlay.Upper, Work: src.Overlay.Work, Volatile: src.Overlay.Volatile, Users: r.users.mapping(),
	})
}

// imageSource mounts an image's layers, or what is at a path in them.
func (r *rootfs) imageSource(src Source) (*os.File, error) {
	tree, err := mount.Overlay(mount.OverlayOptions{Lower: src.Lower, Users: r.users.mapping()})
	if err != nil || src.Subpath == "" {
		return tree, err
	}
	defer tree.Close()
	f, err := safepath.Open(tree, src.Subpath, unix.O_PATH, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot access path %s: %w", src.Subpath, errors.Unwrap(err))
	}
	defer f.Close()
	t, err := mount.Clone(int(f.Fd()), "", false)
	if !errors.Is(err, unix.EINVAL) {
		return t, err
	}
	// Before Linux 6.15 only of what is attached somewhere: aside, in our own mount namespace, for a moment.
	at, err := os.OpenFile(r.cfg.Scratch, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open scratch folder: %w", err)
	}
	defer at.Close()
	if err := mount.Attach(tree, at); err != nil {
		return nil, err
	}
	t, err = mount.Clone(int(f.Fd()), "", false)
	if uerr := unix.Unmount(r.cfg.Scratch, unix.MNT_DETACH); uerr != nil && err == nil {
		t.Close()
		return nil, fmt.Errorf("unmount %s: %w", r.cfg.Scratch, uerr)
	}
	return t, err
}

// mapSource shows a bind mount with other ids where the spec or the configuration says so.
func (r *rootfs) mapSource(t *os.File, m specs.Mount, o mountOptions, src Source) error {
	users := r.users.mapping()
	switch {
	case src.Owner != nil:
		seen, err := processUser(r.root, r.cfg.Spec.Process, r.cfg.User, r.cfg.GroupAdd, r.cfg.Exact)
		if err != nil {
			return err
		}
		own := *src.Owner
		if own.UID == seen.UID && own.GID == seen.GID {
			if users == nil {
				return nil // as it is
			}
			break
		}
		f, err := userns.Mapping(ownerMap(own.UID, seen.UID, r.users.uids()), ownerMap(own.GID, seen.GID, r.users.gids()))
		if err != nil {
			return err
		}
		defer f.Close()
		return mount.IDMap(t, f, o.recursive)
	case len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0:
		f, err := userns.Mapping(idMap(m.UIDMappings), idMap(m.GIDMappings))
		if err != nil {
			return err
		}
		defer f.Close()
		return mount.IDMap(t, f, o.ridmap)
	case !o.idmap:
		return nil
	case users == nil:
		return errors.New("idmap without id mappings, neither of the mount nor of a user namespace")
	}
	return mount.IDMap(t, users, o.ridmap || src.Owner != nil && o.recursive)
}

// maxID is one more than the largest id; the last number is none.
const maxID = 1<<32 - 1

// ownerMap shows what belongs to id owner on disk as belonging to the container's id seen, and the other way about; all others are
// themselves, as far as ids has them (nil: no user namespace). On disk nobody else becomes owner, and seen becomes nobody else.
func ownerMap(owner, seen uint32, ids userns.Map) userns.Map {
	if ids == nil {
		ids = userns.Map{{Inside: 0, Outside: 0, Size: maxID}}
	}
	out := userns.Map{}
	if to, ok := ids.Outside(seen); ok {
		out = append(out, userns.Range{Inside: owner, Outside: to, Size: 1})
	}
	low, high := uint64(min(owner, seen)), uint64(max(owner, seen))
	for _, r := range ids {
		from, end := uint64(r.Inside), uint64(r.Inside)+uint64(r.Size)
		for _, part := range [][2]uint64{{from, min(end, low)}, {max(from, low+1), min(end, high)}, {max(from, high+1), end}} {
			if part[0] < part[1] {
				out = append(out, userns.Range{Inside: uint32(part[0]), Outside: r.Outside + uint32(part[0]-from), Size: uint32(part[1] - part[0])})
			}
		}
	}
	return out
}
