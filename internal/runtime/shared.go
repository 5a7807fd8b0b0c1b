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
	type reply struct {
		f   *os.File
		err error
	}
	ch := make(chan reply, 1)
	thread.Go(func() { // which has the container's mounts for its root, and dies with it
		f, err := mountOf(pidfd, path)
		ch <- reply{f, err}
	})
	r := <-ch
	if r.err != nil {
		return nil, fmt.Errorf("share %s: %w", path, r.err)
	}
	return r.f, nil
}

func mountOf(pidfd *os.File, path string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, err
	}
	if err := unix.Setns(int(pidfd.Fd()), unix.CLONE_NEWNS); err != nil {
		return nil, err
	}
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
