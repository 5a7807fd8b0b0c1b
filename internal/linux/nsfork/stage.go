package nsfork

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"conex/internal/initstage"
	"conex/internal/linux/slack"

	"golang.org/x/sys/unix"
)

// The stage is the other way to run a program: this one is executed again under the name StageName, and forks with its own means. It takes
// some 10 ms instead of one. It is for where the fork can't serve, a port of Go's without the hooks above all, and does without clone3 and
// without them: nothing else runs in the stage that a fork could harm, and no signal is anybody's there.
//
//	parent: memfd with a copy of this program, sealed    stage: reads the list from a pipe
//	        ForkExec in the thread's namespaces
//	        into the cgroup, list written                       forks, a child of the parent's (CLONE_PARENT)      child: runs the list
//	        the child's number, from the stage's pidfd          reports its pidfd, waits for the pipe's end
//	        reaps the stage                                     ends
//	        reads the report                                                                                       fails, or execve

// StageName is the name that the stage is executed under.
const StageName = "conex-stage"

func init() { initstage.Takeover(StageName, stage) }

// Staged makes every Start take the stage. For tests, and for who finds that the fork does not work on their machine.
var Staged atomic.Bool

// wireProgram is what the stage gets.
type wireProgram struct {
	Ops       []wireOp
	Flags     uint64
	Init      bool
	InitLater bool
	// Kept and Files are the numbers of descriptors that the list keeps, those below, and of all that are handed over.
	Kept, Files int
}

type wireOp struct {
	Nr           uint64
	Args         []wireArg
	Tolerate     bool   `json:",omitempty"`
	SkipIf       uint64 `json:",omitempty"`
	UnlessFailed bool   `json:",omitempty"`
}

// wireArg is an argument: a number, memory, a list of strings, a filter, or an earlier op's result.
type wireArg struct {
	N      uint64   `json:",omitempty"`
	Memory []byte   `json:",omitempty"`
	List   [][]byte `json:",omitempty"`
	IsList bool     `json:",omitempty"`
	Filter []byte   `json:",omitempty"`
	Ref    bool     `json:",omitempty"`
}

// list is the argument of execve that points at strings.
type list []string

// startStaged is Start by the stage.
func (p *Program) startStaged(a Attr) (pid int, pidfd *os.File, err error) {
	self, err := sealedSelf()
	if err != nil {
		return 0, nil, err
	}
	defer self.Close()
	listR, listW, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	defer listW.Close()
	defer listR.Close()
	repR, repW, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	defer repR.Close()
	defer repW.Close()
	wire, files, err := p.wire(a, listR, repW)
	if err != nil {
		return 0, nil, err
	}
	argv := []string{StageName, strconv.Itoa(slices.Index(files, listR.Fd())), strconv.Itoa(slices.Index(files, repW.Fd()))}
	stage, err := syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), argv, &syscall.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		return 0, nil, fmt.Errorf("execute stage: %w", err)
	}
	repW.Close()
	listR.Close()
	// Now: the child's pivot_root(2) may take this thread along into another root, with another /proc.
	info, err := os.Open(fmt.Sprintf("/proc/%d/fdinfo", stage))
	if err == nil {
		defer info.Close()
		err = a.place(stage)
	}
	if err == nil {
		_, err = listW.Write(wire)
	}
	if err == nil {
		first := 0
		err = p.report(repR, func(mark, v uint32) error { // the stage and its child come in any order
			if mark == forkedAgain {
				pid = int(v)
				return a.born(pid)
			}
			child, err := stagedChild(info, v)
			if err == nil && !p.forks {
				pid = child
				return a.born(pid)
			}
			first = child
			return err
		})
		if first != 0 { // it has ended or is about to
			reap(first)
		}
	}
	listW.Close() // which ends the stage
	reap(stage)
	pid, pidfd, err = opened(pid, err)
	if err != nil {
		if pid != 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
			reap(pid)
		}
		return 0, nil, err
	}
	return pid, a.handle(pidfd), nil
}

// stagedChild is the process that the stage has a pidfd of: a child of ours, whose number in the stage's pid namespace may be another. info
// is the stage's /proc/<pid>/fdinfo.
func stagedChild(info *os.File, pidfd uint32) (int, error) {
	fd, err := unix.Openat(int(info.Fd()), strconv.Itoa(int(pidfd)), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("fork: find the stage's child: %w", err)
	}
	f := os.NewFile(uintptr(fd), "fdinfo")
	b, err := io.ReadAll(f)
	f.Close()
	if err != nil {
		return 0, fmt.Errorf("fork: find the stage's child: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			if pid, err := strconv.Atoi(strings.TrimSpace(v)); err == nil && pid > 0 {
				return pid, nil
			}
		}
	}
	return 0, errors.New("fork: the stage's child can't be found")
}

// place moves a child that waits into the v2 cgroup which clone3 would have made it in.
func (a *Attr) place(pid int) error {
	if a.Cgroup == nil {
		return nil
	}
	fd, err := unix.Openat(int(a.Cgroup.Fd()), "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		_, err = unix.Write(fd, []byte(strconv.Itoa(pid)))
		unix.Close(fd)
	}
	if err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

// sealedSelf is a copy of this program that nobody can change, nor reach the file on the disk by (CVE-2019-5736).
func sealedSelf() (*os.File, error) {
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer src.Close()
	const mfdExec = 0x10 // since Linux 6.3
	fd, err := unix.MemfdCreate(StageName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|mfdExec)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate(StageName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	dst := os.NewFile(uintptr(fd), StageName)
	if _, err = io.Copy(dst, src); err == nil {
		_, err = unix.FcntlInt(dst.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		dst.Close()
		return nil, fmt.Errorf("copy own program: %w", err)
	}
	return dst, nil
}

// wire writes the list down with the descriptors' numbers in the stage, which gets files. Those that the list keeps from 3 on have the
// numbers that they have here; the others follow.
func (p *Program) wire(a Attr, own ...*os.File) (data []byte, files []uintptr, err error) {
	for i := range max(3, p.kept) {
		files = append(files, uintptr(i))
	}
	kept := len(files)
	add := func(fd uintptr) uint64 {
		if n := slices.Index(files[kept:], fd); n >= 0 {
			return uint64(kept + n)
		}
		files = append(files, fd)
		return uint64(len(files) - 1)
	}
	for _, f := range own {
		add(f.Fd())
	}
	ops := make([]wireOp, len(p.ops))
	for i, o := range p.ops {
		w := wireOp{Nr: uint64(o.nr), Tolerate: o.tolerate != 0, SkipIf: uint64(o.skipIf), UnlessFailed: o.unless != 0}
		for _, a := range p.args[i] {
			var arg wireArg
			switch v := a.(type) {
			case int:
				arg.N = uint64(v)
			case uint:
				arg.N = uint64(v)
			case uintptr:
				arg.N = uint64(v)
			case uint64:
				arg.N = v
			case string:
				arg.Memory = append([]byte(v), 0)
			case []byte:
				arg.Memory = append(append([]byte{}, v...), 0) // never empty, which would be a number
			case *os.File:
				arg.N = add(v.Fd())
			case FD:
				arg.N = add(uintptr(v))
			case Ref:
				arg.N, arg.Ref = uint64(v), true
			case list:
				arg.IsList = true
				for _, s := range v {
					arg.List = append(arg.List, []byte(s))
				}
			case *unix.SockFprog:
				arg.Filter = unsafe.Slice((*byte)(unsafe.Pointer(v.Filter)), int(v.Len)*int(unsafe.Sizeof(*v.Filter)))
			default:
				m, ok := plain(v)
				if !ok {
					return nil, nil, fmt.Errorf("fork: argument %T of %s can't be sent", v, p.names[i])
				}
				arg.Memory = m
			}
			w.Args = append(w.Args, arg)
		}
		ops[i] = w
	}
	data, err = json.Marshal(wireProgram{Ops: ops, Flags: a.Flags, Init: a.Init, InitLater: p.inits, Kept: kept, Files: len(files)})
	return data, files, err
}

// plain returns the bytes of a struct that a pointer leads to.
func plain(v any) ([]byte, bool) {
	r := reflect.ValueOf(v)
	if r.Kind() != reflect.Pointer || r.IsNil() {
		return nil, false
	}
	return unsafe.Slice((*byte)(r.UnsafePointer()), r.Type().Elem().Size()), true
}

// stage is the whole life of the stage. It runs in the container's namespaces, but for those that its child is made with.
func stage() int {
	runtime.LockOSThread() // for ever: credentials and namespaces are this thread's
	slack.Usual()
	if err := stageFork(); err != nil {
		fmt.Fprintln(os.Stderr, StageName+":", err)
		return 253
	}
	return 0
}

func stageFork() error {
	if len(os.Args) != 3 {
		return errors.New("this is no command for people")
	}
	list, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return err
	}
	report, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // from the runtime's other threads, else setns would refuse
		return err
	}
	in := os.NewFile(uintptr(list), "list")
	var w wireProgram
	if err := json.NewDecoder(in).Decode(&w); err != nil {
		if err == io.EOF {
			return nil // the parent has thought better of it, or died
		}
		return err
	}
	for fd := w.Kept; fd < w.Files; fd++ {
		unix.CloseOnExec(fd) // as they are in the parent
	}
	p, err := w.program()
	if err != nil {
		return err
	}
	s := &forkSignals{all: ^uint64(0)}
	var init *initState
	if w.Init {
		init = newInitState()
	}
	var later uintptr
	if w.InitLater {
		later = 1
	}
	pid, errno := forkRaw(uintptr(w.Flags)|unix.CLONE_PARENT, s, &p.ops[0], uintptr(len(p.ops)), uintptr(report), new([2]uint32), init, later)
	runtime.KeepAlive(p)
	runtime.KeepAlive(init)
	if errno != 0 {
		return &Error{"clone", errno}
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return errors.Join(err, unix.Kill(int(pid), unix.SIGKILL))
	}
	b := [2]uint32{forkedStaged, uint32(fd)}
	if _, err := unix.Write(report, unsafe.Slice((*byte)(unsafe.Pointer(&b)), unsafe.Sizeof(b))); err != nil {
		return errors.Join(err, unix.Kill(int(pid), unix.SIGKILL))
	}
	unix.Close(report)
	_, _ = io.Copy(io.Discard, in) // until the parent has seen the child, or is no more
	return nil
}

// program is the list again, with memory of ours.
func (w *wireProgram) program() (*Program, error) {
	if len(w.Ops) == 0 || w.Flags&unix.CSIGNAL != 0 {
		return nil, errors.New("not a list that the parent would send")
	}
	p := &Program{}
	for _, o := range w.Ops {
		var args []any
		for _, a := range o.Args {
			switch {
			case a.Ref:
				args = append(args, Ref(a.N))
			case a.IsList:
				var l list
				for _, s := range a.List {
					l = append(l, string(s))
				}
				args = append(args, l)
			case a.Filter != nil:
				filter := make([]unix.SockFilter, len(a.Filter)/int(unsafe.Sizeof(unix.SockFilter{})))
				copy(unsafe.Slice((*byte)(unsafe.Pointer(&filter[0])), len(a.Filter)), a.Filter)
				args = append(args, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
			case len(a.Memory) > 0:
				args = append(args, a.Memory)
			default:
				args = append(args, uintptr(a.N))
			}
		}
		r := p.Call("", uintptr(o.Nr), args...)
		c := &p.ops[r]
		if o.Tolerate {
			c.tolerate = 1
		}
		c.skipIf = uintptr(o.SkipIf)
		if o.UnlessFailed {
			c.unless = 1
		}
		if c.nr == await || c.nr == hold {
			buf := make([]byte, 8)
			p.keep = append(p.keep, buf)
			c.args[2] = uintptr(unsafe.Pointer(&buf[0]))
		}
	}
	return p, nil
}

// forkSignals is what keeps the Go runtime's handlers, which need its other threads, from running in a child.
type forkSignals struct {
	all, mask uint64
	// action is struct sigaction of the kernel's; none is SIG_DFL.
	action, none [4]uint64
}

// forkRaw is fork without clone3 and the runtime's hooks.
//
//go:norace
//go:nosplit
//go:noinline
func forkRaw(flags uintptr, s *forkSignals, ops *op, n, pipe uintptr, report *[2]uint32, init *initState, initLater uintptr) (uintptr, syscall.Errno) {
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&s.all)), uintptr(unsafe.Pointer(&s.mask)), 8, 0, 0)
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		for sig := uintptr(1); sig <= 64; sig++ {
			syscall.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&s.action)), 8, 0, 0)
			if s.action[0] > 1 { // neither SIG_DFL nor SIG_IGN
				syscall.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&s.none)), 0, 8, 0, 0)
			}
		}
	}
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&s.mask)), 0, 8, 0, 0)
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	if init != nil && initLater == 0 {
		becomeInit(n, pipe, report, init)
	}
	run(ops, n, pipe, report, init)
	return 0, 0 // not reached
}
