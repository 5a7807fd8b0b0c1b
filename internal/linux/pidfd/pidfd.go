// Package pidfd owns process file descriptors (pidfd_open(2)): signals and exit statuses of exactly the process that was
// meant, though its number may be in use by another one meanwhile.
package pidfd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"

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
	return FromFD(fd), nil
}

// FromFD takes over a descriptor that clone3(2) has returned.
func FromFD(fd int) *os.File { return os.NewFile(uintptr(fd), "pidfd") }

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

// Status is how a process ended.
type Status struct {
	// Code is the exit code, 0 to 255, if Signal is 0.
	Code int
	// Signal is what killed the process, or 0.
	Signal syscall.Signal
	// CoreDumped says that the kernel wrote a core dump.
	CoreDumped bool
}

// ExitCode is the code that shells and Docker report: 128 plus the signal's number for a killed process.
func (s Status) ExitCode() int {
	if s.Signal != 0 {
		return 128 + int(s.Signal)
	}
	return s.Code
}

// siginfo is siginfo_t as waitid(2) fills it: signo, errno, code, then on 64-bit machines 4 bytes of padding, pid, uid, status.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [100]byte
}

// The si_code values of SIGCHLD.
const (
	cldExited = 1
	cldKilled = 2
	cldDumped = 3
)

// Wait waits for the end of a child of this process, collects it and returns its status. It blocks its thread; the wait is over
// with ErrExited if somebody else has collected the child. Only the parent can do this; others use Poll.
func Wait(f *os.File) (Status, error) {
	s, _, err := wait(f, 0)
	return s, err
}

// TryWait is Wait that returns at once; exited is false while the child runs.
func TryWait(f *os.File) (s Status, exited bool, err error) {
	return wait(f, unix.WNOHANG)
}

// WaitContext waits for the end of a child without holding a thread, collects it and returns its status. When ctx ends first its
// error is returned and the child not collected.
func WaitContext(ctx context.Context, f *os.File) (Status, error) {
	if err := Poll(ctx, f); err != nil {
		return Status{}, err
	}
	return Wait(f)
}

func wait(f *os.File, flags int) (s Status, exited bool, err error) {
	var si siginfo
	err = control(f, func(fd int) error {
		for {
			// x/sys's Waitid takes a Siginfo whose union can't be read without knowing its layout, so the layout is spelled out here.
			_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_PIDFD, uintptr(fd), uintptr(unsafe.Pointer(&si)), uintptr(unix.WEXITED|flags), 0, 0)
			switch errno {
			case 0:
				return nil
			case unix.EINTR:
			default:
				return errno
			}
		}
	})
	if err == unix.ECHILD {
		return s, false, fmt.Errorf("wait for process: %w, or is not a child", ErrExited)
	}
	if err != nil {
		return s, false, fmt.Errorf("wait for process: %w", err)
	}
	switch {
	case si.pid == 0:
		return s, false, nil // WNOHANG, still running
	case si.code == cldExited:
		s.Code = int(si.status) & 0xff
	default:
		s.Signal, s.CoreDumped = syscall.Signal(si.status), si.code == cldDumped
	}
	return s, true, nil
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

// GetPid returns the process's number in our PID namespace; ErrExited when it was collected already.
func GetPid(f *os.File) (int, error) {
	var info []byte
	err := control(f, func(fd int) (err error) {
		info, err = os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("process number of a pidfd: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(info)); s.Scan(); {
		v, ok := bytes.CutPrefix(s.Bytes(), []byte("Pid:"))
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(string(bytes.TrimSpace(v)))
		switch {
		case err != nil:
			return 0, fmt.Errorf("process number of a pidfd: %w", err)
		case pid < 0:
			return 0, fmt.Errorf("process number of a pidfd: %w", ErrExited)
		case pid == 0:
			return 0, errors.New("process number of a pidfd: the process is outside of our PID namespace")
		}
		return pid, nil
	}
	return 0, errors.New("process number of a pidfd: not a pidfd")
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
