package nsfork

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// initState is what the minimal init needs, prepared by the parent.
type initState struct {
	mask   uint64 // all signals
	status uint64 // wait4's
	header unix.CapUserHeader
	caps   [2]unix.CapUserData
	filter [8]unix.SockFilter
	prog   unix.SockFprog
	name   [16]byte
	// arguments are what /proc/PID/cmdline shows of the forking process; the child writes name over its copy.
	arguments unsafe.Pointer
	size      uintptr
}

// InitName is what `ps` shows for the init.
const InitName = "conex-init"

// arguments are the bytes of this process's command line where the kernel put them, and reads them for /proc. What os.Args holds later
// may be anything.
var arguments = func() []byte {
	if len(os.Args) == 0 || len(os.Args[0]) == 0 {
		return nil
	}
	begin, size := unsafe.StringData(os.Args[0]), uintptr(len(os.Args[0])+1)
	for _, a := range os.Args[1:] {
		if unsafe.StringData(a) != (*byte)(unsafe.Add(unsafe.Pointer(begin), size)) {
			break
		}
		size += uintptr(len(a) + 1)
	}
	return unsafe.Slice(begin, size)
}()

// newInitState prepares an init that can do nothing but its work. It is a copy of the forking process, so whoever
// takes it over, as a container with CAP_SYS_PTRACE might, must not get more than the container has: it keeps CAP_KILL alone
// (its children may have other user ids; there are none outside its pid namespace), and its filter lets five system calls through.
func newInitState() *initState {
	s := &initState{mask: ^uint64(0)}
	copy(s.name[:], InitName)
	s.arguments, s.size = unsafe.Pointer(unsafe.SliceData(arguments)), uintptr(len(arguments))
	s.header.Version = unix.LINUX_CAPABILITY_VERSION_3
	const kill = 1 << unix.CAP_KILL
	s.caps[0].Effective, s.caps[0].Permitted = kill, kill
	load := func(off uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
	}
	jump := func(k uint32, jt, jf uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: jt, Jf: jf, K: k}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	// The numbers are this architecture's; another one's calls (32 bits) have none of these.
	const nr = 0 // offset of struct seccomp_data's first field
	s.filter = [8]unix.SockFilter{
		load(nr),
		jump(unix.SYS_RT_SIGTIMEDWAIT, 5, 0), jump(unix.SYS_KILL, 4, 0), jump(unix.SYS_WAIT4, 3, 0),
		jump(unix.SYS_EXIT_GROUP, 2, 0), jump(unix.SYS_CLOSE_RANGE, 1, 0),
		ret(unix.SECCOMP_RET_KILL_PROCESS), ret(unix.SECCOMP_RET_ALLOW),
	}
	s.prog = unix.SockFprog{Len: uint16(len(s.filter)), Filter: &s.filter[0]}
	return s
}

// becomeInit forks once more and returns in the second child only. The first child, pid 1 in the container, stays here:
// it waits for signals, reaps what dies, passes other signals on to the second child, and exits with its status.
//
//go:norace
//go:nosplit
func becomeInit(n, pipe uintptr, report *[2]uint32, s *initState) {
	mask := uintptr(unsafe.Pointer(&s.mask))
	if _, _, e := syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_BLOCK, mask, 0, 8, 0, 0); e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	// ps in the container, and on the host, shows an init and not a second monitor: from the start, as the second child may be the faster one. It gets
	// its own name when it executes.
	syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&s.name)), 0, 0, 0, 0)
	for i := uintptr(0); i < s.size; i++ {
		var c byte
		if i < uintptr(len(s.name)) && i+1 < s.size {
			c = s.name[i]
		}
		*(*byte)(unsafe.Add(s.arguments, i)) = c
	}
	pid, _, e := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	if pid == 0 {
		syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_UNBLOCK, mask, 0, 8, 0, 0)
		return
	}
	// The privileges go before anything of the container's runs beside us for long. Where that fails, the container must not run:
	// its pid 1 ends, and the second child with it.
	if _, _, e := syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&s.header)), uintptr(unsafe.Pointer(&s.caps)), 0); e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	if _, _, e := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&s.prog))); e != 0 {
		fail(uint32(n), e, pipe, report)
	}
	// Every descriptor that we inherited goes: the report pipe must close when the second child executes.
	syscall.RawSyscall(unix.SYS_CLOSE_RANGE, 0, ^uintptr(0)>>32, 0)
	status := (*uint32)(unsafe.Pointer(&s.status))
	for {
		sig, _, e := syscall.RawSyscall6(unix.SYS_RT_SIGTIMEDWAIT, mask, 0, 0, 8, 0, 0)
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
