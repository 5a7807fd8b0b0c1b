package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrNoIDMap says that a file system can't be shown with other ids.
var ErrNoIDMap = errors.New("its file system can't be shown with other ids (idmapped mounts)")

// IDMap shows the files of the detached mount f with other ids: who has an id in the user namespace owner-wise on disk is seen as
// what that id is outside of it, and what is written as the latter is kept as the former (mount_setattr(2), MOUNT_ATTR_IDMAP).
func IDMap(f, user *os.File, recursive bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	err := unix.MountSetattr(int(f.Fd()), "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(user.Fd())})
	if err == unix.EINVAL && recursive {
		return fmt.Errorf("%s: %w, or that of a mount below it, which bind-recursive=disabled leaves out", f.Name(), ErrNoIDMap)
	}
	if err == unix.EINVAL {
		return fmt.Errorf("%s: %w", f.Name(), ErrNoIDMap)
	}
	if err != nil {
		return fmt.Errorf("show %s with other ids: %w", f.Name(), err)
	}
	return nil
}

// cloneMapped is Clone and IDMap of a folder, Clone alone without a user namespace.
func cloneMapped(path string, user *os.File) (*os.File, error) {
	m, err := Clone(unix.AT_FDCWD, path, false)
	if err != nil {
		return nil, err
	}
	if err := SetAttr(m, 0, 0, unix.MS_PRIVATE, false); err != nil {
		m.Close()
		return nil, err
	}
	if user == nil {
		return m, nil
	}
	if err := IDMap(m, user, false); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// overlayMapped is Overlay over layers that are shown with the ids of o.Users. An overlay itself can't be; what is written to it is
// kept in the upper folder as the map says.
func overlayMapped(o OverlayOptions, attr int) (m *os.File, err error) {
	layers := make([]*os.File, 0, len(o.Lower)+1)
	defer func() {
		for _, l := range layers {
			l.Close()
		}
	}()
	for _, l := range o.Lower {
		t, err := cloneMapped(l, o.Users)
		if err != nil {
			return nil, err
		}
		layers = append(layers, t)
	}
	if o.Upper != "" {
		if filepath.Dir(o.Upper) != filepath.Dir(o.Work) {
			return nil, errors.New("mount overlay: the upper and the work folder are not siblings")
		}
		// One mount has both, as overlayfs wants it.
		users := o.Users
		if o.UpperAsIs {
			users = nil
		}
		t, err := cloneMapped(filepath.Dir(o.Upper), users)
		if err != nil {
			return nil, err
		}
		layers = append(layers, t)
	}
	if !noLayerFDs.Load() {
		m, err = overlayOfFDs(o, layers, attr)
		if err == nil || !errors.Is(err, errNoLayerFDs) {
			return m, err
		}
		noLayerFDs.Store(true)
	}
	return overlayOfAttached(o, layers, attr)
}

// noLayerFDs remembers that this kernel's overlayfs wants paths. errNoLayerFDs tells it.
var (
	noLayerFDs    atomic.Bool
	errNoLayerFDs = errors.New("overlayfs takes no descriptors of detached mounts")
)

// overlayOfFDs mounts an overlay over detached mounts (Linux 6.15).
func overlayOfFDs(o OverlayOptions, layers []*os.File, attr int) (*os.File, error) {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open file system type overlay: %w", err)
	}
	defer unix.Close(fd)
	for i := range o.Lower {
		if err := unix.FsconfigSetFd(fd, "lowerdir+", int(layers[i].Fd())); err != nil {
			return nil, fmt.Errorf("%w: %w", errNoLayerFDs, fsError(fd, err))
		}
	}
	if err := unix.FsconfigSetString(fd, "source", "overlay"); err != nil {
		return nil, fsError(fd, err)
	}
	if o.Upper != "" {
		for _, k := range []string{"redirect_dir", "metacopy"} {
			if err := unix.FsconfigSetString(fd, k, "off"); err != nil {
				return nil, fsError(fd, fmt.Errorf("mount overlay: option %s: %w", k, err))
			}
		}
		for k, path := range map[string]string{"upperdir": o.Upper, "workdir": o.Work} {
			sub, err := unix.Openat(int(layers[len(o.Lower)].Fd()), filepath.Base(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("mount overlay: open %s: %w", path, err)
			}
			err = unix.FsconfigSetFd(fd, k, sub)
			unix.Close(sub)
			if err != nil {
				return nil, fmt.Errorf("%w: %w", errNoLayerFDs, fsError(fd, err))
			}
		}
		if o.Volatile {
			if err := unix.FsconfigSetFlag(fd, "volatile"); err != nil {
				return nil, fsError(fd, fmt.Errorf("mount overlay: volatile: %w", err))
			}
		}
	}
	return create(fd, "overlay", attr)
}

// overlayOfAttached attaches the layers first, below a folder of its own that the calling thread's mount namespace alone sees, and
// only for a moment: an overlay has mounts of its own of its layers.
func overlayOfAttached(o OverlayOptions, layers []*os.File, attr int) (m *os.File, err error) {
	at, err := os.MkdirTemp("", "conex-layers-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(at)
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, "mode=700"); err != nil {
		return nil, fmt.Errorf("mount overlay: %w", err)
	}
	defer func() {
		if uerr := unix.Unmount(at, unix.MNT_DETACH); uerr != nil && err == nil {
			m.Close()
			m, err = nil, fmt.Errorf("unmount %s: %w", at, uerr)
		}
	}()
	plain := o
	plain.Users, plain.Lower = nil, nil
	for i, l := range layers {
		dir := filepath.Join(at, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
		t, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		err = Attach(l, t)
		t.Close()
		if err != nil {
			return nil, err
		}
		if i < len(o.Lower) {
			plain.Lower = append(plain.Lower, dir)
			continue
		}
		plain.Upper, plain.Work = filepath.Join(dir, filepath.Base(o.Upper)), filepath.Join(dir, filepath.Base(o.Work))
	}
	return Overlay(plain)
}
