package nsfork

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// becomeInit forks once more and returns in the second child only. The first child, pid 1 in the container, stays here:
// it waits for signals, reaps what dies, passes other signals on to the second child, and exits with its status.
//
// The words of sigs: the full signal mask, the wait status, the second child's pid, scratch.
//
//go:norace
//go:nosplit
func becomeInit(n, pipe uintptr, report *[2]uint32, sigs *[4]uint64) {
	mask := &sigs[0]
	*mask = ^uint64(0)
	if _, _, e := syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_BLOCK, uintptr(unsafe.Pointer(mask)), 0, 8, 0, 0); e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	pid, _, e := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	if pid == 0 {
		syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_UNBLOCK, uintptr(unsafe.Pointer(mask)), 0, 8, 0, 0)
		return
	}
	// Every descriptor that we inherited goes: the report pipe must close when the second child executes.
	syscall.RawSyscall(unix.SYS_CLOSE_RANGE, 0, ^uintptr(0)>>32, 0)
	status := (*uint32)(unsafe.Pointer(&sigs[1]))
	for {
		sig, _, e := syscall.RawSyscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(mask)), 0, 0, 8, 0, 0)
		if e != 0 {
			continue // EINTR
		}
		if sig != uintptr(unix.SIGCHLD) {
			syscall.RawSyscall(unix.SYS_KILL, pid, sig, 0)
			continue
		}
		for {
			dead, _, e := syscall.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0), uintptr(unsafe.Pointer(status)), unix.WNOHANG, 0, 0, 0)
			if e != 0 || dead == 0 {
				break
			}
			if dead != pid {
				continue
			}
			code := uintptr(*status>>8) & 0xff
			if s := uintptr(*status) & 0x7f; s != 0 {
				code = 128 + s // pid 1 can't die of a signal that it sends itself
			}
			for {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
			}
		}
	}
}
