package nsfork

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"conex/internal/linux/slack"

	"golang.org/x/sys/unix"
)

// The runtime's own hooks around fork, as package syscall uses them. They block signals in the parent, and in the child reset
// the handlers, which must not run there.
//
//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// Attr says how the child is made.
type Attr struct {
	// Flags are CLONE_NEW* bits for clone3(2).
	Flags uint64
	// Cgroup is a directory of the v2 hierarchy that the child starts in; nil: the forking thread's own.
	Cgroup *os.File
	// Init makes the child a minimal init: it forks once more, runs the program in that second child, and stays behind as pid 1,
	// which reaps, forwards signals, and exits as the second child does.
	Init bool
	// Share lets the child have the caller's memory instead of a copy until it executes its command; the calling thread waits for that. It
	// saves the copy and what both then fault in, a tenth of what a small container costs. It is for a child that nobody can look into, alone
	// in a new pid namespace, and that is not in want of memory: where the kernel kills it for that, it kills all that share it (see
	// ownMemory for what is not made that way).
	Share bool
	// Blocking leaves the pidfd blocking: waiting by it takes a thread, but no poller need be made for it and no other thread woken up.
	Blocking bool
	// Forked is called when the child exists (of a program that forks again, the second), before Start waits for its report; an error kills the child and is Start's.
	Forked func(pid int) error
}

// cloneArgs is struct clone_args of clone3(2), version 2.
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// Start forks. The child inherits the calling thread's namespaces, root and working folder, so callers that changed those have
// locked their goroutine to its thread. Start returns once the child has executed (its error pipe closed) or failed, then with
// an *Error. The pid is that of the caller's pid namespace; the pidfd is non-blocking, for the poller.
func (p *Program) Start(a Attr) (pid int, pidfd *os.File, err error) {
	if p.ops == nil {
		return 0, nil, fmt.Errorf("fork: empty program")
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	slack.Usual()
	if Staged.Load() {
		return p.startStaged(a)
	}
	if a.Share && canShare && !p.ownMemory(&a) {
		return p.startShared(a)
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return 0, nil, fmt.Errorf("fork: %w", err)
	}
	if pipe[1] < 3 { // where the child's standard streams go
		high, err := unix.FcntlInt(uintptr(pipe[1]), unix.F_DUPFD_CLOEXEC, 3)
		unix.Close(pipe[1])
		if err != nil {
			unix.Close(pipe[0])
			return 0, nil, fmt.Errorf("fork: %w", err)
		}
		pipe[1] = high
	}
	args, fd := p.cloneArgs(&a)
	var init *initState
	if a.Init {
		init = newInitState()
	}
	report := new([2]uint32)
	// No descriptor may be opened without close-on-exec between another goroutine's fork and exec: package syscall's lock.
	var initLater uintptr
	if p.inits {
		initLater = 1
	}
	syscall.ForkLock.Lock()
	r, errno := fork(args, &p.ops[0], uintptr(len(p.ops)), uintptr(pipe[1]), report, init, initLater)
	afterFork()
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(p)
	runtime.KeepAlive(args)
	runtime.KeepAlive(init)
	unix.Close(pipe[1])
	if errno == unix.ENOSYS {
		// A kernel before 5.3, or a filter of somebody's around us that does not know the call.
		Staged.Store(true)
		unix.Close(pipe[0])
		return p.startStaged(a)
	}
	if errno != 0 {
		unix.Close(pipe[0])
		return 0, nil, &Error{"clone3", errno}
	}
	rd := os.NewFile(uintptr(pipe[0]), "fork report")
	defer rd.Close()
	return p.finish(a, int(r), os.NewFile(uintptr(*fd), "pidfd"), rd)
}

// cloneArgs are what clone3 wants to know, and where it writes the pidfd.
func (p *Program) cloneArgs(a *Attr) (*cloneArgs, *int32) {
	// The kernel writes the pidfd to an address that the compiler does not know as one: the word must lie on the heap, which keep
	// sees to. On the stack it would be left behind when the stack grows, or the collector shrinks it, before the fork.
	fd := new(int32)
	p.keep = append(p.keep, fd)
	args := &cloneArgs{
		flags:      a.Flags | unix.CLONE_PIDFD,
		pidfd:      uint64(uintptr(unsafe.Pointer(fd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	if a.Cgroup != nil {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(a.Cgroup.Fd())
	}
	return args, fd
}

// finish waits until the child has executed, or reaps it. Of a program that forks again the first child gives way to the second.
func (p *Program) finish(a Attr, pid int, pidfd *os.File, rd io.Reader) (int, *os.File, error) {
	var err error
	if a.Forked != nil && !p.forks {
		err = a.Forked(pid)
	}
	second := 0
	if err == nil {
		err = p.report(rd, func(_, v uint32) error {
			second = int(v)
			return a.born(second)
		})
	} else {
		// Nobody else knows of the child, so the number is still its own.
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if p.forks {
		// The first child has ended or is about to. The second can't be reaped by anybody else either.
		reap(pid)
		pidfd.Close()
		pid, pidfd, err = opened(second, err)
	}
	if err == nil {
		return pid, a.handle(pidfd), nil
	}
	// The child is about to exit, or already a zombie: reap it here, nobody else knows of it.
	if pid != 0 {
		reap(pid)
	}
	if pidfd != nil {
		pidfd.Close()
	}
	return 0, nil, err
}

// born tells whoever wants to know of the child that will execute, and kills it if that one does not want it.
func (a *Attr) born(pid int) error {
	if a.Forked == nil {
		return nil
	}
	err := a.Forked(pid)
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // not reaped yet, so the number is still its own
	}
	return err
}

// opened opens a child's pidfd, which is nil beside an error. The child is killed then.
func opened(pid int, err error) (int, *os.File, error) {
	if pid == 0 {
		if err == nil {
			err = errors.New("fork: the child died")
		}
		return 0, nil, err
	}
	if err != nil {
		return pid, nil, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL)
		return pid, nil, fmt.Errorf("fork: %w", err)
	}
	return pid, os.NewFile(uintptr(fd), "pidfd"), nil
}

// Marks of a report that is no failure: the process id of a second fork's child, and the number that the stage has its child's pidfd under.
const (
	forkedAgain = ^uint32(0) - iota
	forkedStaged
)

// report reads what the child writes before execve closes the pipe. born is told of every process that was forked, and
// has killed it when it returns an error.
func (p *Program) report(rd io.Reader, born func(mark, v uint32) error) (err error) {
	for {
		var buf [8]byte
		n, rerr := io.ReadFull(rd, buf[:])
		if n == 0 && rerr == io.EOF {
			return err
		}
		if n != len(buf) {
			return fmt.Errorf("fork: the child's report broke off: %w", rerr)
		}
		i, v := binary.NativeEndian.Uint32(buf[:4]), binary.NativeEndian.Uint32(buf[4:])
		if i == forkedAgain || i == forkedStaged {
			if berr := born(i, v); err == nil {
				err = berr
			}
			continue
		}
		if err != nil {
			continue
		}
		err = p.failure(i, v)
	}
}

// failure is the error of a child that says which op failed, and how.
func (p *Program) failure(i, errno uint32) error {
	name := "fork init"
	if int(i) < len(p.names) {
		name = p.names[i]
	}
	return &Error{name, unix.Errno(errno)}
}

// ownMemory reports whether the child must not share the parent's memory: it waits for the parent, forks, or enters a namespace that the
// kernel lets only a process alone in its memory enter.
func (p *Program) ownMemory(a *Attr) bool {
	return a.Init || a.Forked != nil || p.forks || a.Flags&(unix.CLONE_NEWUSER|unix.CLONE_NEWTIME) != 0 || slices.ContainsFunc(p.ops, func(o op) bool {
		return o.nr == await || o.nr == hold || o.nr == ready || o.nr == unix.SYS_SETNS
	})
}

// handle is the pidfd as whoever starts the child wants it.
func (a *Attr) handle(pidfd *os.File) *os.File {
	if a.Blocking && pidfd.Fd() > 2 {
		return pidfd
	}
	return nonblock(pidfd)
}

// nonblock puts the pidfd into the runtime's poller, so that waiting for the child costs no thread.
func nonblock(f *os.File) *os.File {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return f
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return f
	}
	f.Close()
	return os.NewFile(uintptr(fd), "pidfd")
}

func reap(pid int) {
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if err != unix.EINTR {
			return
		}
	}
}

// fork makes the child and, in it, runs the operations. Only the parent returns.
// Nothing here or below may grow the stack, allocate, or call anything that is not nosplit.
//
//go:norace
//go:nosplit
//go:noinline
func fork(args *cloneArgs, ops *op, n, pipe uintptr, report *[2]uint32, init *initState, initLater uintptr) (uintptr, syscall.Errno) {
	beforeFork()
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args), 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	// From here on this is the child.
	afterForkInChild()
	if init != nil && initLater == 0 {
		becomeInit(n, pipe, report, init)
		// From here on this is the second child.
	}
	run(ops, n, pipe, report, init)
	return 0, 0 // not reached
}

// run is the child's whole life. This is the process that becomes the container's command.
//
//go:norace
//go:nosplit
func run(ops *op, n, pipe uintptr, report *[2]uint32, init *initState) {
	held := false
	for i := uintptr(0); i < n; i++ {
		o := (*op)(unsafe.Add(unsafe.Pointer(ops), i*unsafe.Sizeof(*ops)))
		if o.skipIf != 0 {
			other := (*op)(unsafe.Add(unsafe.Pointer(ops), (o.skipIf-1)*unsafe.Sizeof(*ops)))
			if other.failed == o.unless {
				o.failed = 1
				continue
			}
		}
		for j := uintptr(0); j < 6; j++ {
			if o.refs&(1<<j) != 0 {
				a := (*uintptr)(unsafe.Add(unsafe.Pointer(&o.args), j*unsafe.Sizeof(uintptr(0))))
				other := (*op)(unsafe.Add(unsafe.Pointer(ops), *a*unsafe.Sizeof(*ops)))
				*a = other.result
			}
		}
		switch o.nr {
		case closeOthers:
			// The report pipe stays until execve closes it.
			if errno := closeRanges(o.args[0], pipe, o.args[1], o.args[2]); errno != 0 {
				fail(uint32(i), errno, pipe, report)
			}
			continue
		case hold:
			syscall.RawSyscall(unix.SYS_CLOSE, pipe, 0, 0)
			pipe, held = o.args[1], true
		}
		if o.nr == await || o.nr == hold {
			if errno := one(o.args[0], o.args[2]); errno != 0 {
				fail(uint32(i), errno, pipe, report)
			}
			continue
		}
		if o.nr == forkAgain {
			again(o.args[0], uint32(i), pipe, report)
			continue
		}
		if o.nr == initHere {
			if init != nil {
				becomeInit(n, pipe, report, init)
			}
			continue
		}
		if o.nr == ready {
			syscall.RawSyscall(unix.SYS_CLOSE, pipe, 0, 0)
			continue
		}
		var errno syscall.Errno
		o.result, _, errno = syscall.RawSyscall6(o.nr, o.args[0], o.args[1], o.args[2], o.args[3], o.args[4], o.args[5])
		if errno != 0 {
			o.failed = 1
			if o.tolerate == 0 && held {
				fail(uint32(n-i), errno, pipe, report) // counted from the end, see ReadReport
			}
			if o.tolerate == 0 {
				fail(uint32(i), errno, pipe, report)
			}
		}
	}
	fail(uint32(n), 0, pipe, report) // a program without exec
}

// one reads one byte; the end of the file is EPIPE.
//
//go:norace
//go:nosplit
func one(fd, buf uintptr) syscall.Errno {
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_READ, fd, buf, 1)
		if n == 1 && errno == 0 {
			return 0
		}
		if errno == 0 {
			return unix.EPIPE
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// closeRanges closes every descriptor from lo on but a, b and c.
//
//go:norace
//go:nosplit
func closeRanges(lo, a, b, c uintptr) syscall.Errno {
	const last = ^uintptr(0) >> 32
	for {
		next := last // the least of those to keep that is lo or more
		if a >= lo && a < next {
			next = a
		}
		if b >= lo && b < next {
			next = b
		}
		if c >= lo && c < next {
			next = c
		}
		if next == last {
			_, _, errno := syscall.RawSyscall(unix.SYS_CLOSE_RANGE, lo, last, 0)
			return errno
		}
		if next > lo {
			if _, _, errno := syscall.RawSyscall(unix.SYS_CLOSE_RANGE, lo, next-1, 0); errno != 0 {
				return errno
			}
		}
		lo = next + 1
	}
}

// again forks once more and returns in the new process. The present process tells the parent who that is, and ends.
//
//go:norace
//go:nosplit
func again(flags uintptr, i uint32, pipe uintptr, report *[2]uint32) {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags, 0, 0, 0, 0, 0)
	if errno != 0 {
		fail(i, errno, pipe, report)
	}
	if pid == 0 {
		return
	}
	fail(forkedAgain, syscall.Errno(pid), pipe, report)
}

// fail reports the failed operation to the parent and ends the child.
//
//go:norace
//go:nosplit
func fail(i uint32, errno syscall.Errno, pipe uintptr, report *[2]uint32) {
	report[0], report[1] = i, uint32(errno)
	syscall.RawSyscall(unix.SYS_WRITE, pipe, uintptr(unsafe.Pointer(report)), unsafe.Sizeof(*report))
	for {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 253, 0, 0)
	}
}
