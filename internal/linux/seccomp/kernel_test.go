package seccomp

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"conex/internal/linux/caps"
)

// childEnv makes the test binary a child that installs the filter in this cache folder and reports what probes give.
const childEnv = "CONEX_SECCOMP_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := child(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// probe is a system call and what the default profile answers under Docker's default capabilities. The arguments are such
// that an allowed call fails harmlessly or does nothing.
type probe struct {
	name string
	nr   uintptr
	args [6]uintptr
	want unix.Errno
}

var probes = []probe{
	{"mount", unix.SYS_MOUNT, [6]uintptr{}, unix.EPERM},
	{"umount2", unix.SYS_UMOUNT2, [6]uintptr{}, unix.EPERM},
	{"unshare(NEWNS)", unix.SYS_UNSHARE, [6]uintptr{unix.CLONE_NEWNS}, unix.EPERM},
	{"setns", unix.SYS_SETNS, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"keyctl", unix.SYS_KEYCTL, [6]uintptr{}, unix.EPERM},
	{"add_key", unix.SYS_ADD_KEY, [6]uintptr{}, unix.EPERM},
	{"bpf", unix.SYS_BPF, [6]uintptr{}, unix.EPERM},
	{"kexec_load", unix.SYS_KEXEC_LOAD, [6]uintptr{}, unix.EPERM},
	{"io_uring_setup", unix.SYS_IO_URING_SETUP, [6]uintptr{}, unix.EPERM},
	{"clone(NEWUSER)", unix.SYS_CLONE, [6]uintptr{unix.CLONE_NEWUSER}, unix.EPERM},
	{"clone3", unix.SYS_CLONE3, [6]uintptr{}, unix.ENOSYS},
	{"newer than the profile", 5000, [6]uintptr{}, unix.ENOSYS},
	{"personality(query)", unix.SYS_PERSONALITY, [6]uintptr{0xffffffff}, 0},
	{"personality(PER_LINUX)", unix.SYS_PERSONALITY, [6]uintptr{0}, 0},
	{"personality(ADDR_NO_RANDOMIZE)", unix.SYS_PERSONALITY, [6]uintptr{0x40000}, unix.EPERM},
	{"personality(64 bits)", unix.SYS_PERSONALITY, [6]uintptr{1 << 32}, unix.EPERM},
	{"socket(AF_VSOCK)", unix.SYS_SOCKET, [6]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM}, unix.EPERM},
	{"socket(AF_ALG)", unix.SYS_SOCKET, [6]uintptr{unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
	{"socket(AF_UNIX, nonsense)", unix.SYS_SOCKET, [6]uintptr{unix.AF_UNIX, 0x7f}, unix.EINVAL},
	{"getpid", unix.SYS_GETPID, [6]uintptr{}, 0},
	{"close(-1)", unix.SYS_CLOSE, [6]uintptr{^uintptr(0)}, unix.EBADF},
	{"chroot, which a default capability allows", unix.SYS_CHROOT, [6]uintptr{}, unix.EFAULT},
}

// child runs in a process of its own: the filter can't be taken off again.
func child(dir string) error {
	prog, err := CachedDefault(dir, caps.Default())
	if err != nil {
		return err
	}
	flags, err := Flags(Default(caps.Default()))
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// TSYNC: the Go runtime has more threads than this one.
	if r, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags|unix.SECCOMP_FILTER_FLAG_TSYNC), uintptr(unsafe.Pointer(&fprog))); errno != 0 || r != 0 {
		return fmt.Errorf("seccomp: %d %w", r, errno)
	}
	for _, p := range probes {
		_, _, errno := unix.RawSyscall6(p.nr, p.args[0], p.args[1], p.args[2], p.args[3], p.args[4], p.args[5])
		if errno != p.want {
			return fmt.Errorf("%s: %v (%d), want %v (%d)", p.name, errno, errno, p.want, p.want)
		}
	}
	fmt.Println("all probes as expected")
	return nil
}

func TestFilterInTheKernel(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "all probes as expected") {
		t.Fatalf("%v\n%s", err, out)
	}
}
