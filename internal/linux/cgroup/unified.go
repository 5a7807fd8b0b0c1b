package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unified is a cgroup's folder in a v2 tree, with what works there without any controller.
type unified struct{ dir string }

// fd opens the folder for clone3.
func (u unified) fd() (*os.File, error) {
	fd, err := retry(func() (int, error) { return unix.Open(u.dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err == unix.ENOENT {
		return nil, fmt.Errorf("%s: %w", u.dir, ErrNotExist)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: u.dir, Err: err}
	}
	return os.NewFile(uintptr(fd), u.dir), nil
}

// kill has the kernel kill everything below; ok is false where it can't (before Linux 5.14).
func (u unified) kill() (ok bool, err error) {
	err = writeFile(filepath.Join(u.dir, "cgroup.kill"), "1")
	if errors.Is(err, fs.ErrNotExist) {
		return !exists(u.dir), nil // no cgroup: nobody to kill
	}
	return true, err
}

// freeze stops or resumes everything below, and waits until the kernel says that it is so.
func (u unified) freeze(on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	if err := writeFile(filepath.Join(u.dir, "cgroup.freeze"), value); err != nil {
		if errors.Is(err, fs.ErrNotExist) && !exists(u.dir) {
			return fmt.Errorf("%s: %w", u.dir, ErrNotExist)
		}
		return err
	}
	return u.waitEvent("frozen "+value, time.Now().Add(freezeTimeout))
}

// freezeTimeout bounds the wait for tasks to stop: one that is in an uninterruptible sleep stops only afterwards.
const freezeTimeout = 10 * time.Second

// errEventTimeout says that a cgroup did not reach a state in time.
var errEventTimeout = errors.New("time-out")

// waitEvent waits until cgroup.events has a line. A cgroup that isn't there (any more) has reached every state.
func (u unified) waitEvent(line string, deadline time.Time) error {
	path := filepath.Join(u.dir, "cgroup.events")
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var buf [256]byte
	for {
		// The read comes before the poll: it arms the poll, which then reports every change since.
		n, err := retry(func() (int, error) { return unix.Pread(fd, buf[:], 0) })
		if err == unix.ENODEV {
			return nil
		}
		if err != nil {
			return &fs.PathError{Op: "read", Path: path, Err: err}
		}
		for l := range strings.SplitSeq(string(buf[:n]), "\n") {
			if l == line {
				return nil
			}
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("%s: waiting for %q: %w", u.dir, line, errEventTimeout)
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if _, err := retry(func() (int, error) { return unix.Poll(fds, int(left.Milliseconds())+1) }); err != nil {
			return fmt.Errorf("poll %s: %w", path, err)
		}
	}
}

// killLoop is for kernels without cgroup.kill: it signals every process that pids lists until there are none but our own. The
// caller has frozen the cgroup if it can, so that none can fork meanwhile.
func killLoop(pids func() ([]int, error)) error {
	self := os.Getpid() // one of our threads may be inside, by EnterThread
	for range 1000 {
		list, err := pids()
		if err != nil {
			return err
		}
		fresh := 0
		for _, pid := range list {
			if pid == self {
				continue
			}
			fd, err := unix.PidfdOpen(pid, 0)
			if err == unix.ESRCH {
				continue
			}
			if err != nil {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			unix.Close(fd)
			if err == nil && !dying(pid) {
				fresh++
			} else if err != nil && err != unix.ESRCH {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		if fresh == 0 {
			return nil
		}
	}
	return fmt.Errorf("kill: new processes keep appearing: %w", ErrBusy)
}

// dying reports whether a process has SIGKILL pending or is dead already, so that it can't fork any more.
func dying(pid int) bool {
	s, err := readFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.SplitSeq(s, "\n") {
		k, v, _ := strings.Cut(line, ":")
		v = strings.TrimSpace(v)
		switch k {
		case "State":
			if v != "" && strings.ContainsAny(v[:1], "ZX") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if set, err := strconv.ParseUint(v, 16, 64); err == nil && set>>(unix.SIGKILL-1)&1 == 1 {
				return true
			}
		}
	}
	return false
}
