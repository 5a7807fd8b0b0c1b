//go:build amd64 || arm64

package nsfork

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// canShare says that cloneVM is written for this architecture.
const canShare = true

// unreported is what a child that shares memory leaves in its report when nothing fails.
const unreported = ^uint32(0) - 2

// startShared is Start with a child that has this process's memory until it executes (vfork(2)). So it needs no pipe to report by: when
// the calling thread goes on, the child has executed, failed or died.
func (p *Program) startShared(a Attr) (pid int, pidfd *os.File, err error) {
	args, fd := p.cloneArgs(&a)
	args.flags |= unix.CLONE_VM | unix.CLONE_VFORK
	report := &[2]uint32{unreported}
	syscall.ForkLock.Lock()
	r, errno := forkShared(args, &p.ops[0], uintptr(len(p.ops)), report)
	afterFork()
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(p)
	runtime.KeepAlive(args)
	if errno == unix.ENOSYS { // see Start
		Staged.Store(true)
		return p.startStaged(a)
	}
	if errno != 0 {
		return 0, nil, &Error{"clone3", errno}
	}
	pid = int(r)
	if report[0] != unreported {
		reap(pid) // it has ended, and nobody else knows of it
		unix.Close(int(*fd))
		return 0, nil, p.failure(report[0], report[1])
	}
	return pid, a.handle(os.NewFile(uintptr(*fd), "pidfd")), nil
}

// forkShared is fork with shared memory. The child runs on below this frame, as package syscall's does: the parent, which finds its frame as
// it left it and everything below it overwritten, returns at once.
//
//go:norace
//go:nosplit
//go:noinline
func forkShared(args *cloneArgs, ops *op, n uintptr, report *[2]uint32) (uintptr, syscall.Errno) {
	beforeFork()
	pid, errno := cloneVM(uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args))
	if errno != 0 || pid != 0 {
		return pid, syscall.Errno(errno)
	}
	// From here on this is the child.
	afterForkInChild()
	run(ops, n, ^uintptr(0), report, nil)
	return 0, 0 // not reached
}

// cloneVM is clone3(2) whose return address outlives what the child does to the stack.
//
//go:noescape
func cloneVM(args, size uintptr) (pid, errno uintptr)
