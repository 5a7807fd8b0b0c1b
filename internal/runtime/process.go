package runtime

import (
	"fmt"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// process is a child that nsfork made.
type process struct {
	pid     int
	pidfd   *os.File // non-blocking, so that waiting costs no thread; of Run's without a terminal it is not
	console *os.File

	wait   sync.Once
	done   chan struct{}
	status ExitStatus
	err    error
}

func newProcess(pid int, pidfd, console *os.File) *process {
	return &process{pid: pid, pidfd: pidfd, console: console, done: make(chan struct{})}
}

// Pid implements Process.
func (p *process) Pid() int { return p.pid }

// Console implements Process.
func (p *process) Console() *os.File { return p.console }

// Signal implements Process. The pidfd can't mean another process that got the number later.
func (p *process) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return os.ErrProcessDone
	default:
	}
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return os.ErrProcessDone
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return os.ErrProcessDone
	}
	if serr == unix.ESRCH {
		return os.ErrProcessDone
	}
	return serr
}

// siginfo is the part of siginfo_t that waitid(2) fills for SIGCHLD.
type siginfo struct {
	signo, errno, code int32
	_                  int32
	pid                int32
	uid                uint32
	status             int32
	_                  [128 - 28]byte
}

// Wait implements Process.
func (p *process) Wait() (ExitStatus, error) {
	p.wait.Do(func() {
		defer close(p.done)
		p.status, p.err = p.reap()
		p.pidfd.Close()
	})
	<-p.done
	return p.status, p.err
}

// cldExited is CLD_EXITED of siginfo's code: the process ended by itself; the other codes are deaths by a signal.
const cldExited = 1

func (p *process) reap() (ExitStatus, error) {
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return ExitStatus{}, fmt.Errorf("wait for process %d: %w", p.pid, err)
	}
	var info siginfo
	var errno syscall.Errno
	waitid := func(fd, flags uintptr) {
		for {
			_, _, errno = unix.Syscall6(unix.SYS_WAITID, unix.P_PIDFD, fd, uintptr(unsafe.Pointer(&info)), unix.WEXITED|flags, 0, 0)
			if errno != unix.EINTR {
				return
			}
		}
	}
	err = rc.Read(func(fd uintptr) bool {
		waitid(fd, unix.WNOHANG)
		// With nothing to report yet, a non-blocking pidfd says EAGAIN, and WNOHANG success without a signal number.
		return errno != unix.EAGAIN && (errno != 0 || info.signo != 0)
	})
	if err != nil { // not in the poller, by wish or on kernels before 5.10: a thread waits
		err = rc.Control(func(fd uintptr) { waitid(fd, 0) })
	}
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		return ExitStatus{}, fmt.Errorf("wait for process %d: %w", p.pid, err)
	}
	if info.code == cldExited {
		return ExitStatus{Code: int(info.status)}, nil
	}
	sig := syscall.Signal(info.status)
	return ExitStatus{Code: 128 + int(sig), Signal: sig}, nil
}
