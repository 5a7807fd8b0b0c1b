// Package nsfork forks a process that runs a prepared list of raw system calls and ends in execve.
//
// It is the one primitive behind starting a container and executing in one. A Go process can't run Go code after fork(2):
// the runtime's other threads are gone, a lock that one of them held stays held, and memory can't be allocated. So the parent
// prepares every argument, and the child is a loop of a few instructions over that list (child.go).
package nsfork

import (
	"encoding/binary"
	"fmt"
	"os"
	"reflect"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Program is the list of system calls that a child runs in order. The first that fails ends the child.
// The zero value is empty and ready. A Program runs once.
type Program struct {
	ops   []op
	names []string
	args  [][]any // the ops' as they were given, for the stage; those that Start knows are left out
	kept  int     // descriptors below it are kept open, CloseOthers' number
	keep  []any   // what the ops point at, kept alive until the child has its own copy
	forks bool    // has a second fork
	inits bool    // says where the init comes to be
}

// op is one system call. It is read by the child, which may not touch the heap's structure: plain words only.
type op struct {
	nr       uintptr
	args     [6]uintptr
	refs     uintptr // bit i: args[i] is the index of an earlier op, whose result is meant
	tolerate uintptr // 1: a failure is no failure
	skipIf   uintptr // 1+index of an earlier op: skip this one if that one succeeded (or, with unless, if it failed)
	unless   uintptr
	result   uintptr
	failed   uintptr
}

// Ref names the result of an earlier call: a descriptor that the child opens.
type Ref int

// FD is an open descriptor's number as an argument. The caller keeps it open; unlike *os.File it stays non-blocking.
type FD int

// Call appends a system call. Arguments may be int, uint, uintptr, uint64, a string (passed as C string), a []byte (its
// address), *os.File (its descriptor), a pointer to a struct without pointers, *unix.SockFprog or a Ref. name is for the error message.
func (p *Program) Call(name string, nr uintptr, args ...any) Ref {
	o := op{nr: nr}
	for i, a := range args {
		switch v := a.(type) {
		case int:
			o.args[i] = uintptr(v)
		case uint:
			o.args[i] = uintptr(v)
		case uintptr:
			o.args[i] = v
		case uint64:
			o.args[i] = uintptr(v)
		case string:
			b := append([]byte(v), 0)
			p.keep = append(p.keep, b)
			o.args[i] = uintptr(unsafe.Pointer(&b[0]))
		case []byte:
			p.keep = append(p.keep, v)
			o.args[i] = uintptr(unsafe.Pointer(unsafe.SliceData(v)))
		case *unix.SockFprog:
			p.keep = append(p.keep, v)
			o.args[i] = uintptr(unsafe.Pointer(v))
		case list:
			o.args[i] = uintptr(p.strings(v))
		case *os.File:
			p.keep = append(p.keep, v)
			o.args[i] = v.Fd()
		case FD:
			o.args[i] = uintptr(v)
		case Ref:
			o.args[i] = uintptr(v)
			o.refs |= 1 << i
		default:
			r := reflect.ValueOf(a)
			if r.Kind() != reflect.Pointer {
				panic(fmt.Sprintf("nsfork: argument %d of %s is a %T", i, name, a)) // a mistake of the programmer
			}
			p.keep = append(p.keep, a)
			o.args[i] = uintptr(r.UnsafePointer())
		}
	}
	return p.add(name, o, args...)
}

func (p *Program) add(name string, o op, args ...any) Ref {
	if p.ops == nil {
		const usual = 256 // a container's; growing to it would take three times the memory
		p.ops, p.names, p.args = make([]op, 0, usual), make([]string, 0, usual), make([][]any, 0, usual)
	}
	p.ops, p.names, p.args = append(p.ops, o), append(p.names, name), append(p.args, args)
	return Ref(len(p.ops) - 1)
}

// Try is Call for a system call that may fail.
func (p *Program) Try(name string, nr uintptr, args ...any) Ref {
	r := p.Call(name, nr, args...)
	p.ops[r].tolerate = 1
	return r
}

// Unless makes the call c run only if the earlier, tolerated call r failed.
func (p *Program) Unless(c, r Ref) { p.ops[c].skipIf = uintptr(r) + 1 }

// OnlyIf makes the call c run only if the earlier, tolerated call r succeeded.
func (p *Program) OnlyIf(c, r Ref) { p.ops[c].skipIf, p.ops[c].unless = uintptr(r)+1, 1 }

// Numbers of ops that are no system calls: closeOthers, await and hold.
const (
	closeOthers = ^uintptr(0) - iota
	await
	hold
)

// CloseOthers appends the closing of every descriptor from number from (at least 3) on, but for at most two to keep. What an
// earlier call opened is closed too. Marking them close-on-exec would not do: until execve a working folder of /proc/self/fd/<n>
// would lead out of the container through any folder of the host that the forking process has open (CVE-2024-21626).
func (p *Program) CloseOthers(from int, keep ...*os.File) {
	o := op{nr: closeOthers}
	o.args[0] = uintptr(from)
	args := []any{from}
	for i, f := range keep {
		o.args[1+i] = f.Fd()
		p.keep, args = append(p.keep, f), append(args, f)
	}
	p.kept = from
	p.add("close descriptors", o, args...)
}

// Await appends a pause until one byte comes from f, a pipe. Its end without one ends the child.
func (p *Program) Await(f *os.File) { p.pause(await, "wait for the parent", f, nil) }

// Hold appends a pause that outlives the parent: Start returns when it is reached, and the child goes on when one byte comes from f,
// a named pipe open for reading and writing. What fails afterwards is written to report, a file: see ReadReport.
func (p *Program) Hold(f, report *os.File) { p.pause(hold, "wait for the start", f, report) }

func (p *Program) pause(nr uintptr, name string, f, report *os.File) {
	o := op{nr: nr}
	buf := make([]byte, 8)
	o.args[0], o.args[2] = f.Fd(), uintptr(unsafe.Pointer(&buf[0]))
	p.keep = append(p.keep, buf, f)
	args := []any{f}
	if report != nil {
		o.args[1] = report.Fd()
		p.keep, args = append(p.keep, report), append(args, report)
	}
	p.add(name, o, args...)
}

// ReadReport returns what a held child wrote to its report when something failed after the hold: nil when nothing did. The names
// are gone with the parent; the last call of a program is execve.
func ReadReport(b []byte) error {
	if len(b) < 8 {
		return nil
	}
	name := "start"
	if binary.NativeEndian.Uint32(b) == 1 {
		name = "execve"
	}
	return &Error{name, unix.Errno(binary.NativeEndian.Uint32(b[4:]))}
}

// Numbers of ops that are no system calls either.
const (
	forkAgain = ^uintptr(15) - iota
	initHere
	ready
)

// Fork appends a second fork: the rest of the program runs in the new process, which is the forking process's child like the first
// (CLONE_PARENT) and what Start returns; the first ends. flags are CLONE_NEW* bits. A namespace belongs to the user namespace of
// who makes it, so a program that joins one (setns(2)) and wants a pid namespace of it must fork after that. At most once in a program.
func (p *Program) Fork(flags uint64) {
	flags |= unix.CLONE_PARENT
	p.forks = true
	p.add("fork", op{nr: forkAgain, args: [6]uintptr{uintptr(flags)}}, flags)
}

// Init appends the place where the child becomes an init, if Attr.Init asks for one; otherwise that is the program's beginning. The init
// keeps the ids that the child has there.
func (p *Program) Init() {
	p.inits = true
	p.add("fork init", op{nr: initHere})
}

// Ready appends the end of Start: it returns now, and what fails later ends the child unheard. For children that only wait for us.
func (p *Program) Ready() {
	p.add("ready", op{nr: ready})
}

// Exec appends execve(2) of path. No string may hold a NUL byte, which would end it there: callers have checked that.
func (p *Program) Exec(path string, argv, envv []string) {
	p.Call("execve", unix.SYS_EXECVE, path, list(argv), list(envv))
}

// Exit appends exit_group(2).
func (p *Program) Exit(code int) { p.Call("exit", unix.SYS_EXIT_GROUP, code) }

func (p *Program) strings(ss []string) unsafe.Pointer {
	ptrs := make([]*byte, len(ss)+1)
	for i, s := range ss {
		b := append([]byte(s), 0)
		ptrs[i] = &b[0]
	}
	p.keep = append(p.keep, ptrs)
	return unsafe.Pointer(&ptrs[0])
}

// Error is the call of the child that failed.
type Error struct {
	// Call is the name given to it.
	Call string
	// Errno is what it returned.
	Errno unix.Errno
}

func (e *Error) Error() string { return e.Call + ": " + e.Errno.Error() }

// Unwrap returns the Errno.
func (e *Error) Unwrap() error { return e.Errno }
