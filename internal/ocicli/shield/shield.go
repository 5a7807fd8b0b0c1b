// Package shield has the OCI runtime command line executed through a read-only mount of its own, before anything else initialises.
//
// Whoever calls conex-runtime executes the file on the host's disk. A container whose image names /proc/self/exe as its command, or as
// a script's interpreter, would run that very file inside and find it, writable, behind /proc/<pid>/exe (CVE-2019-5736). So the
// commands that start a process of a container's execute the program once more, by a descriptor on a read-only mount that nobody else
// has, which package ocicli then forbids execution on. The monitor is started the same way.
//
// Go's part costs a whole start of the program. A program that is linked with -E conexRuntimeEntry, as the Makefile does it with
// conex-runtime, begins in entry_<arch>.s, which does the same before there is a Go runtime, in a tenth of the time. With any error
// it goes on to Go's own entry, and Go's part tries. It also gives the program a timer slack of 2 ms for 50 us (prctl(2)): a thread of
// Go's runtime looks after the others every 20 us, and cost a seventh of what a container takes. No container gets it (package slack).
package shield

import (
	"os"
	"slices"
	"strconv"
	"syscall"
	"unsafe"

	"conex/internal/initstage"
)

// Env names the variable with the number of the descriptor, in the program that was executed through it.
const Env = "CONEX_RUNTIME_SELF"

// Procs is what both give the program as GOMAXPROCS, behind the environment's own: one processor, since its work is done one step after the
// other, and each thread that Go's runtime wakes up for another processor costs more than it saves. The program takes it out of its
// environment. Nobody else writes it this way.
const Procs = "01"

// starting are the commands that fork into a container.
var starting = []string{"create", "run", "exec"}

func init() { initstage.TakeoverBefore(Wanted, Execute) }

// Wanted reports whether this process is the command line, for such a command, and not yet executed again. Global options come before
// the command; a folder called like one among their values costs the millisecond, no more.
func Wanted(args []string) bool {
	_, again := os.LookupEnv(Env)
	return !again && slices.ContainsFunc(args, func(a string) bool { return slices.Contains(starting, a) })
}

// minFD is the least number of the descriptor: above those that a caller hands on (--preserve-fds).
const minFD = 200

// What package syscall lacks, the same on all architectures. Package unix has it, and whatever imports that initialises a millisecond later.
const (
	sysOpenTree, sysMountSetattr          = 428, 442
	openTreeClone, openTreeCloexec        = 1, syscall.O_CLOEXEC
	attrRdonly, attrNosuid                = 1, 2
	atFDCWD, atEmptyPath                  = -100, 0x1000
	private                        uint64 = 1 << 18
)

// mountAttr is struct mount_attr of mount_setattr(2).
type mountAttr struct{ set, clr, propagation, userns uint64 }

// Execute does not return when it works. When it does not, as without the right to mount, the program goes on as it was started.
func Execute() {
	exe, empty := []byte("/proc/self/exe\x00"), []byte{0}
	cwd := atFDCWD
	tree, _, errno := syscall.Syscall(sysOpenTree, uintptr(cwd), uintptr(unsafe.Pointer(&exe[0])), openTreeClone|openTreeCloexec)
	if errno != 0 {
		return
	}
	defer syscall.Close(int(tree))
	attr := mountAttr{set: attrRdonly | attrNosuid, propagation: private}
	_, _, errno = syscall.Syscall6(sysMountSetattr, tree, uintptr(unsafe.Pointer(&empty[0])), atEmptyPath, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return
	}
	fd, _, errno := syscall.Syscall(syscall.SYS_FCNTL, tree, syscall.F_DUPFD, minFD)
	if errno != 0 {
		return
	}
	self := strconv.Itoa(int(fd))
	_ = syscall.Exec("/proc/self/fd/"+self, os.Args, append(os.Environ(), Env+"="+self, "GOMAXPROCS="+Procs)) // it returns with an error only
	syscall.Close(int(fd))
}
