// Package slack owns how late the kernel may wake this program's threads (prctl(2), PR_SET_TIMERSLACK).
//
// A thread of Go's runtime looks after the others every 20 us while anything runs, and with the kernel's 50 us of slack a tenth of a short
// command's processor time is that. A program that is linked with -E conexEntry, as the Makefile does it with conex, begins in
// entry_<arch>.s, which asks for ten times as much before there is a Go runtime; all threads inherit it. Whoever was started with another
// slack than the kernel's keeps that: it is somebody's wish.
//
// It is ours alone. Whoever executes another program calls Usual on the thread that does, or Run, as nsfork does for containers. Not more
// than ten times, since a thread that looks for work sleeps for 3 us before it takes it from another; and what runs for long calls Settle.
package slack

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
)

// Nanoseconds. The entries know them too.
const (
	usual = 50000   // the kernel's
	wide  = 500000  // conexEntry
	wider = 2000000 // conexRuntimeEntry (internal/ocicli/shield), whose program works on one thread
)

func ours(slack int) bool { return slack == wide || slack == wider }

// Usual gives the calling thread, and so what it forks, the kernel's usual slack if it has one of ours, and reports whether it had. The
// goroutine is locked to its thread, or does not care which it has.
func Usual() bool {
	const get, set = 30, 29 // PR_GET_TIMERSLACK, PR_SET_TIMERSLACK
	now, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, get, 0, 0, 0, 0, 0)
	if errno != 0 || !ours(int(now)) {
		return false
	}
	_, _, errno = syscall.RawSyscall6(syscall.SYS_PRCTL, set, usual, 0, 0, 0, 0)
	return errno == 0
}

// Run calls start, which executes another program, on a thread with the usual slack.
func Run(start func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	Usual()
	return start()
}

// Settle gives all threads of the process, and so those that they will make, the usual slack if they have one of ours. It needs
// CAP_SYS_NICE.
func Settle() {
	// A thread may make another, as wide as itself, behind the back of who reads the list: until a look finds none.
	for again, looks := true, 0; again && looks < 10; looks++ {
		again = false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return
		}
		for _, t := range threads {
			again = settle("/proc/"+t.Name()+"/timerslack_ns") || again
		}
	}
}

// settle gives the thread whose file it is the usual slack, and reports whether that was one of ours and is not any more.
func settle(path string) bool {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return false // it has ended
	}
	defer f.Close()
	var b [16]byte
	n, err := f.Read(b[:])
	if err != nil {
		return false
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err != nil || !ours(now) {
		return false
	}
	_, err = f.WriteString(strconv.Itoa(usual))
	return err == nil
}
