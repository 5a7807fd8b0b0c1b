// Package pidfd owns process file descriptors (pidfd_open(2)): signals to and the end of exactly the process that was meant,
// though its number may be in use by another one meanwhile.
package pidfd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrExited says that the process is gone (and, for a child, was waited for).
var ErrExited = errors.New("process has exited")

// Open returns a descriptor of a process, close-on-exec. It is readable (poll) once the process has exited. A number that no
// process has is ErrExited.
func Open(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil, fmt.Errorf("open process %d: %w", pid, ErrExited)
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// SendSignal sends a signal. ErrExited says that the process can't get it any more; signal 0 asks only that.
func SendSignal(f *os.File, sig syscall.Signal) error {
	err := control(f, func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
	if err == unix.ESRCH {
		return fmt.Errorf("send signal %d: %w", int(sig), ErrExited)
	}
	if err != nil {
		return fmt.Errorf("send signal %d: %w", int(sig), err)
	}
	return nil
}

// Poll waits until the process has exited, whose child it ever is, or until ctx ends, whose error it returns then. It blocks a
// thread in poll(2), not a CPU.
func Poll(ctx context.Context, f *os.File) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	// An eventfd wakes the poll when ctx ends. It is written before it is closed: the goroutine that would write is joined.
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("wait for process: eventfd: %w", err)
	}
	defer unix.Close(wake)
	written := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(written)
		one := [8]byte{7: 1}
		unix.Write(wake, one[:]) // can't fail: the counter is far from full
	})
	defer func() {
		if !stop() {
			<-written
		}
	}()
	return control(f, func(fd int) error {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(fds, -1)
			switch {
			case err == unix.EINTR:
			case err != nil:
				return fmt.Errorf("wait for process: poll: %w", err)
			case fds[0].Revents != 0:
				return nil
			case fds[1].Revents != 0:
				return ctx.Err()
			}
		}
	})
}

// control runs fn with the descriptor, which stays open meanwhile.
func control(f *os.File, fn func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := rc.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}
