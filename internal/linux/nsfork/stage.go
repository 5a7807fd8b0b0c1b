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
	"sync/atomic"
	"syscall"
	"unsafe"

	"conex/internal/initstage"

	"golang.org/x/sys/unix"
)

// The stage is the other way to run a program: instead of a fork whose child runs no Go, the program is executed again under the name
// StageName and runs the list with Go's own means, on one thread, ending in execve like the child. It takes some 10 ms instead of one. It
// is for where the fork can't serve, a port of Go's without the hooks above all, and does without clone3 and without them.
//
// What a process of several threads may not do, it can't: enter a user namespace, fork again to leave a minimal init behind. Such a
// program is refused.
//
//	parent: memfd with a copy of this program, sealed    stage: reads the list from a pipe
//	        ForkExec in the thread's namespaces
//	        into the cgroup, list written                       runs it
//	        reads the report                                    a failure is reported as the child would; execve closes the pipe

// StageName is the name that the stage is executed under.
const StageName = "conex-stage"

func init() { initstage.Takeover(StageName, stage) }

// Staged makes every Start take the stage. For tests, and for who finds that the fork does not work on their machine.
var Staged atomic.Bool

// ErrStage says that a program needs what only the fork can do.
var ErrStage = errors.New("needs a fork of the runtime's own, which this build or machine does not have")

// wireOp is an op as the stage gets it.
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
	if p.forks || p.inits || a.Init || a.Flags&unix.CLONE_NEWUSER != 0 {
		return 0, nil, fmt.Errorf("fork: %w", ErrStage)
	}
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
	wire, files, err := p.wire(listR, repW)
	if err != nil {
		return 0, nil, err
	}
	fd := -1
	argv := []string{StageName, strconv.Itoa(slices.Index(files, listR.Fd())), strconv.Itoa(slices.Index(files, repW.Fd()))}
	pid, err = syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", self.Fd()), argv, &syscall.ProcAttr{
		Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Cloneflags: uintptr(a.Flags), PidFD: &fd},
	})
	if err != nil {
		return 0, nil, fmt.Errorf("execute stage: %w", err)
	}
	repW.Close()
	listR.Close()
	pidfd = os.NewFile(uintptr(fd), "pidfd")
	if err = a.place(pid); err == nil {
		if a.Forked != nil {
			err = a.Forked(pid)
		}
		if err == nil {
			_, err = listW.Write(wire)
		}
		listW.Close()
	}
	if err == nil {
		_, err = p.report(repR, nil)
	} else {
		_ = unix.Kill(pid, unix.SIGKILL) // nobody else knows of it
	}
	if err != nil {
		reap(pid)
		pidfd.Close()
		return 0, nil, err
	}
	return pid, nonblock(pidfd), nil
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
func (p *Program) wire(own ...*os.File) (data []byte, files []uintptr, err error) {
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
					arg.List = append(arg.List, append([]byte(s), 0))
				}
			case *unix.SockFprog:
				arg.Filter = unsafe.Slice((*byte)(unsafe.Pointer(v.Filter)), int(v.Len)*int(unsafe.Sizeof(*v.Filter)))
			default:
				m, ok := plain(v)
				if !ok {
					return nil, nil, fmt.Errorf("fork: argument %T of %s: %w", v, p.names[i], ErrStage)
				}
				arg.Memory = m
			}
			w.Args = append(w.Args, arg)
		}
		ops[i] = w
	}
	data, err = json.Marshal(ops)
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

// stage is the whole life of the stage: it ends in execve, or with the report of what failed. It runs in the container's namespaces.
func stage() int {
	runtime.LockOSThread() // for ever: credentials and namespaces are this thread's
	report := -1
	if len(os.Args) == 3 {
		report, _ = strconv.Atoi(os.Args[2]) // what it is not, can't be written to
	}
	err := prepareStage()
	if err == nil {
		var ops []wireOp
		if ops, err = readStage(); err == nil {
			runStage(ops, report)
		}
	}
	fmt.Fprintln(os.Stderr, StageName+":", err)
	return 253
}

func prepareStage() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	return unix.Unshare(unix.CLONE_FS) // from the runtime's other threads, else setns would refuse
}

func readStage() ([]wireOp, error) {
	fd, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "list")
	b, err := io.ReadAll(f)
	f.Close()
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		os.Exit(253) // the parent has thought better of it, or died
	}
	var ops []wireOp
	return ops, json.Unmarshal(b, &ops)
}

// runStage does what run does in the child.
func runStage(ops []wireOp, report int) {
	unix.CloseOnExec(report)
	type done struct {
		result uintptr
		failed bool
	}
	state := make([]done, len(ops))
	held := false
	fail := func(i int, errno unix.Errno) {
		n := uint32(i)
		if held {
			n = uint32(len(ops) - i)
		}
		b := [2]uint32{n, uint32(errno)}
		_, _ = unix.Write(report, unsafe.Slice((*byte)(unsafe.Pointer(&b)), unsafe.Sizeof(b))) // there is nobody else to tell
		os.Exit(253)
	}
	var keep []any
	for i, o := range ops {
		if o.SkipIf != 0 && state[o.SkipIf-1].failed == o.UnlessFailed {
			state[i].failed = true
			continue
		}
		var args [6]uintptr
		for j, a := range o.Args {
			switch {
			case a.Ref:
				args[j] = state[a.N].result
			case a.IsList:
				ptrs := make([]*byte, len(a.List)+1)
				for k, s := range a.List {
					ptrs[k] = &s[0]
				}
				keep = append(keep, ptrs)
				args[j] = uintptr(unsafe.Pointer(&ptrs[0]))
			case a.Filter != nil:
				filter := make([]unix.SockFilter, len(a.Filter)/int(unsafe.Sizeof(unix.SockFilter{})))
				copy(unsafe.Slice((*byte)(unsafe.Pointer(&filter[0])), len(a.Filter)), a.Filter)
				prog := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
				keep = append(keep, prog)
				args[j] = uintptr(unsafe.Pointer(prog))
			case len(a.Memory) > 0:
				args[j] = uintptr(unsafe.Pointer(&a.Memory[0]))
			default:
				args[j] = uintptr(a.N)
			}
		}
		switch uintptr(o.Nr) {
		case closeOthers:
			if errno := closeRanges(args[0], uintptr(report), args[1], args[2]); errno != 0 {
				fail(i, errno)
			}
			continue
		case ready:
			unix.Close(report)
			continue
		case await, hold:
			if uintptr(o.Nr) == hold {
				unix.Close(report)
				report, held = int(args[1]), true
			}
			var b [8]byte
			if errno := one(args[0], uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
				fail(i, errno)
			}
			continue
		}
		r, _, errno := syscall.RawSyscall6(uintptr(o.Nr), args[0], args[1], args[2], args[3], args[4], args[5])
		state[i].result = r
		if errno != 0 {
			state[i].failed = true
			if !o.Tolerate {
				fail(i, errno)
			}
		}
	}
	runtime.KeepAlive(keep)
	runtime.KeepAlive(ops)
	fail(len(ops), 0)
}
