package seccomp

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

//go:generate go run gen.go

// call is one system call of an ABI.
type call struct {
	name string
	nr   uint32
}

// x32Bit marks a system call of the x32 ABI, which shares its AUDIT_ARCH with x86-64.
const x32Bit = 0x40000000

// callsX32 lists the calls that have a number of their own in x32 (without x32Bit); the other numbers are x86-64's.
var callsX32 = [...]call{
	{"rt_sigaction", 512}, {"rt_sigreturn", 513}, {"ioctl", 514}, {"readv", 515}, {"writev", 516}, {"recvfrom", 517},
	{"sendmsg", 518}, {"recvmsg", 519}, {"execve", 520}, {"ptrace", 521}, {"rt_sigpending", 522}, {"rt_sigtimedwait", 523},
	{"rt_sigqueueinfo", 524}, {"sigaltstack", 525}, {"timer_create", 526}, {"mq_notify", 527}, {"kexec_load", 528},
	{"waitid", 529}, {"set_robust_list", 530}, {"get_robust_list", 531}, {"vmsplice", 532}, {"move_pages", 533},
	{"preadv", 534}, {"pwritev", 535}, {"rt_tgsigqueueinfo", 536}, {"recvmmsg", 537}, {"sendmmsg", 538},
	{"process_vm_readv", 539}, {"process_vm_writev", 540}, {"setsockopt", 541}, {"getsockopt", 542}, {"io_setup", 543},
	{"io_submit", 544}, {"execveat", 545}, {"preadv2", 546}, {"pwritev2", 547},
}

// notX32 lists the other calls of x86-64 that x32 doesn't have.
var notX32 = [...]string{
	"uselib", "_sysctl", "create_module", "get_kernel_syms", "query_module", "nfsservctl", "set_thread_area",
	"get_thread_area", "epoll_ctl_old", "epoll_wait_old", "vserver", "uretprobe", "uprobe",
}

// abi is one way of calling the kernel: a table of numbers under an AUDIT_ARCH.
type abi struct {
	name specs.Arch
	// audit is what seccomp_data.arch holds.
	audit uint32
	// base is added to every number: x32Bit for x32, else 0.
	base uint32
	// narrow ABIs have 32-bit arguments.
	narrow bool
	// socketcall says that sockets are (also) reached through socketcall(2), and System V IPC through ipc(2).
	socketcall bool
	calls      []call
}

// abis lists what a kernel of goarch can run, the native ABI first.
func abis(goarch string) ([]abi, error) {
	switch goarch {
	case "amd64":
		return []abi{
			{name: specs.ArchX86_64, audit: unix.AUDIT_ARCH_X86_64, calls: callsAMD64[:]},
			{name: specs.ArchX86, audit: unix.AUDIT_ARCH_I386, narrow: true, socketcall: true, calls: calls386[:]},
			{name: specs.ArchX32, audit: unix.AUDIT_ARCH_X86_64, base: x32Bit},
		}, nil
	case "arm64":
		return []abi{
			{name: specs.ArchAARCH64, audit: unix.AUDIT_ARCH_AARCH64, calls: callsARM64[:]},
			{name: specs.ArchARM, audit: unix.AUDIT_ARCH_ARM, narrow: true, calls: callsARM[:]},
		}, nil
	}
	return nil, fmt.Errorf("seccomp: no system call table for %s", goarch)
}

// number returns the number of a named system call, false when the ABI lacks it.
func (a *abi) number(name string) (uint32, bool) {
	if a.base == x32Bit {
		for _, c := range callsX32 {
			if c.name == name {
				return c.nr | x32Bit, true
			}
		}
		if slices.Contains(notX32[:], name) {
			return 0, false
		}
		nr, ok := lookup(callsAMD64[:], name)
		return nr | x32Bit, ok
	}
	return lookup(a.calls, name)
}

func lookup(calls []call, name string) (uint32, bool) {
	i, ok := slices.BinarySearchFunc(calls, name, func(c call, n string) int { return strings.Compare(c.name, n) })
	if !ok {
		return 0, false
	}
	return calls[i].nr, true
}

// socketcalls are the sub-calls of socketcall(2), as linux/net.h numbers them.
var socketcalls = [...]call{
	{"socket", 1}, {"bind", 2}, {"connect", 3}, {"listen", 4}, {"accept", 5}, {"getsockname", 6}, {"getpeername", 7},
	{"socketpair", 8}, {"send", 9}, {"recv", 10}, {"sendto", 11}, {"recvfrom", 12}, {"shutdown", 13}, {"setsockopt", 14},
	{"getsockopt", 15}, {"sendmsg", 16}, {"recvmsg", 17}, {"accept4", 18}, {"recvmmsg", 19}, {"sendmmsg", 20},
}

// ipccalls are the sub-calls of ipc(2), as linux/ipc.h numbers them.
var ipccalls = [...]call{
	{"semop", 1}, {"semget", 2}, {"semctl", 3}, {"semtimedop", 4}, {"msgsnd", 11}, {"msgrcv", 12}, {"msgget", 13},
	{"msgctl", 14}, {"shmat", 21}, {"shmdt", 22}, {"shmget", 23}, {"shmctl", 24},
}

// multiplexed returns through which call and with which first argument the ABI reaches name, too.
func (a *abi) multiplexed(name string) (via string, sub uint32, ok bool) {
	if !a.socketcall {
		return "", 0, false
	}
	for _, c := range socketcalls {
		if c.name == name {
			return "socketcall", c.nr, true
		}
	}
	for _, c := range ipccalls {
		if c.name == name {
			return "ipc", c.nr, true
		}
	}
	return "", 0, false
}
