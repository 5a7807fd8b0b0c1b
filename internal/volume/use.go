package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"
	"conex/internal/linux/mount"

	"golang.org/x/sys/unix"
)

// Use is the right to a volume's content: as long as it is held, nobody replaces, renames or removes it. It dies with its process.
type Use struct {
	// Dir is where the content lies.
	Dir    string
	Volume Volume

	store *Store
	lock  *disk.Lock
	// snapshot is the lock of the snapshot that is read, nil if none is.
	snapshot *disk.Lock
}

// Use begins a use. A volume with a file system of its own is mounted by its first user.
func (s *Store) Use(name string) (*Use, error) {
	l, err := s.hold(name, disk.AcquireReader)
	if err != nil {
		return nil, err
	}
	u := &Use{Dir: s.Data(name), store: s, lock: l}
	if u.Volume, err = s.Get(name); err == nil {
		err = s.pour(name)
	}
	if err == nil && u.Volume.Mounted() {
		u.Dir, err = s.mount(&u.Volume)
	}
	if err != nil {
		return nil, errors.Join(err, u.Release())
	}
	return u, nil
}

// Release ends the use. Who is the last unmounts. Safe on nil and when called twice.
func (u *Use) Release() error {
	if u == nil || u.lock == nil {
		return nil
	}
	u.snapshot.Release()
	u.lock.Release()
	u.lock = nil
	if !u.Volume.Mounted() {
		return nil
	}
	return u.store.settle(u.Volume.Name)
}

// hold takes a volume's lock. ErrNotFound when there is no such volume.
func (s *Store) hold(name string, acquire func(path string) (*disk.Lock, error)) (*disk.Lock, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	path := s.path(name, "lock")
	for {
		if _, err := os.Lstat(s.path(name, "meta.json")); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, name)
		}
		l, err := acquire(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since we looked
		}
		return l, err
	}
}

// Alone waits until nobody uses a volume, and lets nobody use it until the lock is released.
func (s *Store) Alone(ctx context.Context, name string) (*disk.Lock, error) {
	return s.hold(name, func(path string) (*disk.Lock, error) { return disk.AcquireContext(ctx, path) })
}

// TryAlone is Alone that does not wait: disk.ErrLocked says that somebody uses the volume.
func (s *Store) TryAlone(name string) (*disk.Lock, error) { return s.hold(name, disk.TryAcquire) }

// MountPoint is where a volume's own file system is mounted while somebody uses it.
func (s *Store) MountPoint(name string) string { return filepath.Join(s.state, "volumes", name) }

// mount mounts a volume's own file system, unless it is. The caller uses the volume.
func (s *Store) mount(v *Volume) (string, error) {
	at := s.MountPoint(v.Name)
	if err := os.MkdirAll(at, 0o700); err != nil {
		return "", fmt.Errorf("mount volume %s: %w", v.Name, err)
	}
	l, err := disk.Acquire(at + ".lock")
	if err != nil {
		return "", err
	}
	defer l.Release()
	if is, err := mount.IsRoot(at); is || err != nil {
		return at, err
	}
	t, err := newMount(v)
	if err != nil {
		return "", fmt.Errorf("mount volume %s: %w", v.Name, err)
	}
	defer t.Close()
	place, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer place.Close()
	return at, mount.Attach(t, place)
}

// newMount makes the mount that a volume's options describe, attached nowhere.
func newMount(v *Volume) (*os.File, error) {
	m, device := parseMount(v.Options), v.Options["device"]
	if m.bind {
		t, err := mount.Clone(unix.AT_FDCWD, device, m.recursive)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s does not exist", device)
		}
		if err != nil {
			return nil, err
		}
		var st unix.Stat_t
		err = unix.Fstat(int(t.Fd()), &st)
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			err = fmt.Errorf("%s is no folder", device)
		}
		if err == nil {
			err = mount.SetAttr(t, m.attr, 0, m.propagation, m.recursive)
		}
		if err != nil {
			t.Close()
			return nil, err
		}
		return t, nil
	}
	if err := m.resolved(device); err != nil {
		return nil, err
	}
	t, err := mount.New(m.fstype, append([]mount.Param{{Key: "source", Value: device}}, m.params...), int(m.attr))
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("this kernel has no file system type %q: load its module (modprobe %s)", m.fstype, strings.TrimSuffix(m.fstype, "4"))
	case errors.Is(err, unix.ENOTBLK):
		return nil, fmt.Errorf("%s is no block device", device)
	}
	return t, err
}

// settle unmounts a volume's own file system if nobody uses it.
func (s *Store) settle(name string) error {
	if _, err := os.Lstat(s.MountPoint(name)); errors.Is(err, fs.ErrNotExist) {
		return nil // most have none; and on a read-only root nobody can have it alone
	}
	l, err := s.TryAlone(name)
	if errors.Is(err, disk.ErrLocked) {
		return nil // whoever uses it does it, or the next settler
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	defer l.Release()
	return s.unmount(name)
}

// unmount is settle for who has the volume alone. Idempotent.
func (s *Store) unmount(name string) error {
	at := s.MountPoint(name)
	if _, err := os.Lstat(at); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := disk.Acquire(at + ".lock")
	if err != nil {
		return err
	}
	defer l.Release()
	for {
		is, err := mount.IsRoot(at)
		if err != nil {
			return err
		}
		if !is {
			break
		}
		// What a process of the host has open there it keeps.
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount volume %s: %w", name, err)
		}
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Remove(at + ".lock"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Settle unmounts what users that were killed have left mounted. It costs one system call where nothing is mounted.
func (s *Store) Settle() error {
	entries, err := os.ReadDir(filepath.Join(s.state, "volumes"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			errs = append(errs, s.settle(e.Name()))
		}
	}
	return errors.Join(errs...)
}
