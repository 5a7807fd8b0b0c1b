package mount

import (
	"fmt"
	"os"

	"conex/internal/linux/thread"

	"golang.org/x/sys/unix"
)

// Aside calls f where m, a detached mount, covers the existing folder at: on a thread in a mount namespace of its own, which ends with f.
// It serves system calls that want paths of what shall be mounted nowhere.
func Aside(m *os.File, at string, f func() (*os.File, error)) (*os.File, error) {
	type reply struct {
		f   *os.File
		err error
	}
	ch := make(chan reply, 1)
	thread.Go(func() { // which dies with its mounts
		made, err := aside(m, at, f)
		ch <- reply{made, err}
	})
	r := <-ch
	return r.f, r.err
}

func aside(m *os.File, at string, f func() (*os.File, error)) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	target, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	if err := Attach(m, target); err != nil {
		return nil, err
	}
	return f()
}
