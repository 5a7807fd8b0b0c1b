package runtime

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"conex/internal/linux/mount"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// nullTree returns a detached, read-only mount of the host's /dev/null, proven to be it: the container's own could have been
// replaced (CVE-2025-31133). Reading and writing the device works through it, but a container's root that gets it, as a
// masked file or as a standard stream, can't change the owner, mode or times of the host's node.
func nullTree() (*os.File, error) {
	t, err := mount.Clone(unix.AT_FDCWD, "/dev/null", false)
	if err != nil {
		return nil, err
	}
	if !isNull(t) {
		t.Close()
		return nil, errors.New("/dev/null of the host is not the null device")
	}
	if err := mount.SetAttr(t, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, 0, unix.MS_PRIVATE, false); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// isNull reports whether f, an O_PATH handle perhaps, stands for the null device.
func isNull(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// hostNull is the host's null device, opened once through such a mount.
var hostNull = sync.OnceValues(func() (*os.File, error) {
	t, err := nullTree()
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", t.Fd()), os.O_RDWR, 0)
})

// containerNull opens the null device for standard streams: the container's own, so that /proc/self/fd/0 reads as programs expect
// it, if it is one, otherwise host. The caller closes what is not host.
func containerNull(root, host *os.File) (*os.File, error) {
	// Looked at before it is opened: opening some devices does something.
	p, err := safepath.OpenNoLinks(root, "dev/null", unix.O_PATH, 0)
	if err != nil {
		return host, nil //nolint:nilerr // a container need not have one
	}
	defer p.Close()
	if !isNull(p) {
		return host, nil
	}
	f, err := safepath.OpenNoLinks(root, "dev/null", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return host, nil //nolint:nilerr // as above: its owner has denied it to everybody, or replaced it just now
	}
	if !isNull(f) {
		f.Close()
		return host, nil
	}
	if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
		f.Close()
		return nil, fmt.Errorf("open /dev/null: %w", err)
	}
	return f, nil
}
