package runtime

import (
	"fmt"
	"os"

	"conex/internal/linux/mount"
	"conex/internal/linux/thread"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// MountOf returns a copy of the mount at path in the mount namespace of another process, detached: a way to share it that leaves no
// mount on the host. What a container has put there instead is found without following links, so it can only be a mount of its own.
func MountOf(pidfd *os.File, path string) (*os.File, error) {
	f, err := inMounts(pidfd, func() (*os.File, error) { return mountOf(path) })
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", path, err)
	}
	return f, nil
}

// RootOf returns a copy of everything that another process, the first one of a container, has mounted, detached.
func RootOf(pidfd *os.File) (*os.File, error) {
	f, err := inMounts(pidfd, func() (*os.File, error) { return mount.Clone(unix.AT_FDCWD, "/", true) })
	if err != nil {
		return nil, fmt.Errorf("share the container's file system: %w", err)
	}
	if err := mount.SetAttr(f, 0, 0, unix.MS_PRIVATE, true); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// inMounts calls f on a thread in the mount namespace of another process.
func inMounts(pidfd *os.File, f func() (*os.File, error)) (*os.File, error) {
	type reply struct {
		f   *os.File
		err error
	}
	ch := make(chan reply, 1)
	thread.Go(func() { // which has the container's mounts for its root, and dies with it
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(pidfd.Fd()), unix.CLONE_NEWNS)
		}
		var tree *os.File
		if err == nil {
			tree, err = f()
		}
		ch <- reply{tree, err}
	})
	r := <-ch
	return r.f, r.err
}

func mountOf(path string) (*os.File, error) {
	root, err := safepath.OpenRoot("/")
	if err != nil {
		return nil, err
	}
	defer root.Close()
	at, err := safepath.OpenNoLinks(root, path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(at.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Type != unix.TMPFS_MAGIC {
		return nil, fmt.Errorf("it is no tmpfs there")
	}
	return mount.Clone(int(at.Fd()), "", false)
}
