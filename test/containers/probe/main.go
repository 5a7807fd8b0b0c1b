// Command probe asks the kernel, inside a container of either engine, what a process may do there.
//
//	probe calls       every system call with senseless arguments: those that are refused
//	probe arguments   the calls whose answer depends on an argument: socket families, clone and unshare flags, personalities
//	probe devices     makes and opens device nodes
//	probe writable DIR...    what below the folders can be opened for writing
//	probe keyring     the session keyring's name
//	probe whoami      real, effective and saved user, and whether privileges can be gained
package main

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed amd64.txt
var names string

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "probe: what?")
		os.Exit(2)
	}
	switch os.Args[1] {
	case "calls":
		calls()
	case "call":
		call()
	case "arguments":
		arguments()
	case "devices":
		devices()
	case "writable":
		for _, dir := range os.Args[2:] {
			writable(dir)
		}
	case "keyring":
		keyring()
	case "whoami":
		whoami()
	default:
		fmt.Fprintln(os.Stderr, "probe: what is", os.Args[1])
		os.Exit(2)
	}
}

// calls makes each call in a process of its own, since some end it.
func calls() {
	for line := range strings.Lines(names) {
		nr, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		cmd := exec.Command("/proc/self/exe", "call", nr)
		timer := time.AfterFunc(time.Second, func() { cmd.Process.Kill() }) //nolint:errcheck // it has ended
		out, _ := cmd.Output()                                              //nolint:errcheck // a call that ends or stops the process was let through
		timer.Stop()
		if errno := string(out); errno == "EPERM" || errno == "ENOSYS" {
			fmt.Println(name, errno)
		}
	}
}

func call() {
	nr, err := strconv.Atoi(os.Args[2])
	if err != nil {
		os.Exit(2)
	}
	switch nr {
	case unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_RT_SIGRETURN:
		return // allowed everywhere, and no return from them is to be had here
	}
	const bad = ^uintptr(0)
	_, _, errno := unix.RawSyscall6(uintptr(nr), bad, bad, bad, bad, bad, bad)
	if errno != 0 {
		os.Stdout.WriteString(unix.ErrnoName(errno)) //nolint:errcheck // its reader sees that nothing came
	}
}

func answer(errno unix.Errno) string {
	if errno == 0 {
		return "ok"
	}
	return unix.ErrnoName(errno)
}

func arguments() {
	runtime.LockOSThread()
	for family := range 46 {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
			fmt.Println("socket family", family, err)
		}
	}
	for _, f := range []struct {
		name string
		flag uintptr
	}{
		{"newns", unix.CLONE_NEWNS}, {"newcgroup", unix.CLONE_NEWCGROUP}, {"newuts", unix.CLONE_NEWUTS}, {"newipc", unix.CLONE_NEWIPC},
		{"newuser", unix.CLONE_NEWUSER}, {"newpid", unix.CLONE_NEWPID}, {"newnet", unix.CLONE_NEWNET}, {"newtime", unix.CLONE_NEWTIME},
	} {
		// CLONE_SIGHAND without CLONE_VM: the kernel says EINVAL once the filter has let it through.
		_, _, errno := unix.RawSyscall6(unix.SYS_CLONE, f.flag|unix.CLONE_SIGHAND, 0, 0, 0, 0, 0)
		_, _, errno2 := unix.RawSyscall6(unix.SYS_UNSHARE, f.flag|unix.CLONE_SIGHAND|1, 0, 0, 0, 0, 0)
		_, _, errno3 := unix.RawSyscall6(unix.SYS_SETNS, ^uintptr(0), f.flag, 0, 0, 0, 0)
		fmt.Println(f.name, "clone", answer(errno), "unshare", answer(errno2), "setns", answer(errno3))
	}
	for _, p := range []uintptr{0, 8, 0x20000, 0x20008, 0x40000, 0x400000, 0xffffffff} {
		_, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, p, 0, 0)
		fmt.Printf("personality %#x %s\n", p, answer(errno))
	}
	_, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
	fmt.Println("clone3", answer(errno))
	_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, 0, unix.TIOCSTI, 0)
	fmt.Println("ioctl TIOCSTI", answer(errno))
}

func devices() {
	dir := "/dev/shm"
	for _, d := range []struct {
		kind         uint32
		major, minor uint32
	}{
		{unix.S_IFCHR, 1, 1}, {unix.S_IFCHR, 1, 2}, {unix.S_IFCHR, 1, 3}, {unix.S_IFCHR, 1, 4}, {unix.S_IFCHR, 1, 5}, {unix.S_IFCHR, 1, 7}, {unix.S_IFCHR, 1, 8}, {unix.S_IFCHR, 1, 9},
		{unix.S_IFCHR, 1, 11}, {unix.S_IFCHR, 4, 0}, {unix.S_IFCHR, 4, 64}, {unix.S_IFCHR, 5, 0}, {unix.S_IFCHR, 5, 1}, {unix.S_IFCHR, 5, 2}, {unix.S_IFCHR, 136, 0}, {unix.S_IFCHR, 10, 200},
		{unix.S_IFCHR, 10, 229}, {unix.S_IFCHR, 10, 232}, {unix.S_IFCHR, 10, 235}, {unix.S_IFBLK, 7, 0}, {unix.S_IFBLK, 8, 0}, {unix.S_IFBLK, 254, 0}, {unix.S_IFBLK, 259, 0},
	} {
		kind := "c"
		if d.kind == unix.S_IFBLK {
			kind = "b"
		}
		name := filepath.Join(dir, "node")
		made := unix.Mknod(name, d.kind|0o600, int(unix.Mkdev(d.major, d.minor)))
		opened := made
		if made == nil {
			// The mount is nodev: what the device group says shows in a folder of the root file system.
			unix.Unlink(name)
			name = "/probe-node"
			made = unix.Mknod(name, d.kind|0o600, int(unix.Mkdev(d.major, d.minor)))
			var fd int
			fd, opened = unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
			if opened == nil {
				unix.Close(fd)
			}
			unix.Unlink(name)
		}
		refused := "let through"
		if errors.Is(opened, unix.EPERM) {
			refused = "EPERM"
		}
		fmt.Printf("%s %d:%d mknod %v, open %s\n", kind, d.major, d.minor, made, refused)
	}
}

// writable prints what below dir the kernel would let us write; of the folders of processes only our own.
func writable(dir string) {
	count := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone, or closed: not writable
		}
		if rel, _ := filepath.Rel("/proc", path); strings.HasPrefix(path, "/proc/") && (rel[0] >= '0' && rel[0] <= '9' || rel == "self" || rel == "thread-self") {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.Type()&fs.ModeSymlink == 0 && unix.Access(path, unix.W_OK) == nil {
			if count++; count <= 200 {
				fmt.Println(path)
			}
		}
		return nil
	})
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println(dir, "writable:", count)
}

func keyring() {
	id, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	if err != nil {
		fmt.Println("session keyring:", err)
		return
	}
	text, err := unix.KeyctlString(unix.KEYCTL_DESCRIBE, id)
	if err != nil {
		fmt.Println("describe:", err)
		return
	}
	fmt.Println("session keyring:", text)
}

func whoami() {
	r, e, s := unix.Getresuid()
	nnp, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	fmt.Printf("user %d effective %d saved %d no_new_privs %d %v\n", r, e, s, nnp, err)
}
