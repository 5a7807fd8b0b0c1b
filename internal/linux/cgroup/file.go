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

// errInvalid is what the kernel answers to a value that conflicts with another limit.
const errInvalid = unix.EINVAL

// writeFile writes a value to a cgroup file in one write. Unlike os.WriteFile it never tries to create the file, which
// cgroup filesystems answer with a misleading "permission denied", and it skips the runtime's poller.
func writeFile(path, value string) error {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	_, err = retry(func() (int, error) { return unix.Write(fd, []byte(value)) })
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// readFile reads a cgroup file, without its final newline. It skips the runtime's poller, too.
func readFile(path string) (string, error) {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return "", &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	for b := make([]byte, 0, 512); ; {
		n, err := retry(func() (int, error) { return unix.Read(fd, b[len(b):cap(b)]) })
		if err != nil {
			return "", &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if n == 0 {
			return strings.TrimSuffix(string(b), "\n"), nil
		}
		if b = b[:len(b)+n]; len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// number parses a counter; "max" and v1's huge numbers for no limit are 0.
func number(s string) uint64 {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	if err != nil || n >= 1<<62 {
		return 0
	}
	return n
}

// readNumber reads a file with one counter; a file that isn't there counts 0.
func readNumber(path string) (uint64, error) {
	s, err := readFile(path)
	if err != nil {
		return 0, missing(err)
	}
	return number(s), nil
}

// missing drops the errors that say that a file or the whole cgroup isn't there.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// readKeyed reads a file of lines "key value"; one that isn't there has no keys.
func readKeyed(path string) (map[string]uint64, error) {
	s, err := readFile(path)
	if err != nil {
		return nil, missing(err)
	}
	m := map[string]uint64{}
	for line := range strings.SplitSeq(s, "\n") {
		if k, v, ok := strings.Cut(line, " "); ok {
			m[k] = number(v)
		}
	}
	return m, nil
}

// readPids appends the process ids of one cgroup.procs. A cgroup that is being removed has none.
func readPids(dir string, pids []int) ([]int, error) {
	s, err := readFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return pids, missing(err)
	}
	for line := range strings.FieldsSeq(s) {
		pid, err := strconv.Atoi(line)
		if err != nil {
			return pids, fmt.Errorf("cgroup %s: process id %q", dir, line)
		}
		if pid != 0 { // a process of a PID namespace that we don't see
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// children lists the folders in a cgroup. The kernel counts them in the link count, so that the common case of none costs one
// stat instead of a listing.
func children(dir string) ([]string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, missing(err)
	}
	if st.Nlink == 2 {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, missing(err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	return out, nil
}

// tree calls fn for dir and every cgroup below it, children first.
func tree(dir string, fn func(dir string) error) error {
	subs, err := children(dir)
	if err != nil {
		return err
	}
	for _, s := range subs {
		if err := tree(s, fn); err != nil {
			return err
		}
	}
	return fn(dir)
}

// treePids lists the processes of dir and below.
func treePids(dir string) ([]int, error) {
	var pids []int
	err := tree(dir, func(d string) (err error) {
		pids, err = readPids(d, pids)
		return err
	})
	return pids, err
}

// mkdir makes root/path and the parents that are missing. prepare is called on each new folder, top down, before anything can
// depend on it. It starts over when a parent vanishes meanwhile: Prune removes empty ones.
func mkdir(root, path string, prepare func(dir string) error) error {
	full := filepath.Join(root, path)
	for range 10 {
		err := unix.Mkdir(full, 0o755)
		switch {
		case err == nil:
			if prepare != nil {
				return prepare(full)
			}
			return nil
		case err == unix.EEXIST:
			return nil
		case err == unix.ENOENT && filepath.Dir(path) != ".":
			if err := mkdir(root, filepath.Dir(path), prepare); err != nil {
				return err
			}
		default:
			return &fs.PathError{Op: "make cgroup", Path: full, Err: err}
		}
	}
	return fmt.Errorf("make cgroup %s: its parent vanishes again and again", full)
}

// rmdir removes one folder. ErrBusy says that processes or folders are in it.
func rmdir(dir string) error {
	switch err := unix.Rmdir(dir); err {
	case nil, unix.ENOENT:
		return nil
	case unix.EBUSY, unix.ENOTEMPTY:
		return fmt.Errorf("%s: %w", dir, ErrBusy)
	default:
		return &fs.PathError{Op: "remove cgroup", Path: dir, Err: err}
	}
}

// removeTree removes a cgroup and those below it.
func removeTree(dir string) error {
	err := rmdir(dir)
	if !errors.Is(err, ErrBusy) {
		return err
	}
	return tree(dir, rmdir)
}

// removeTreeBy is removeTree with patience. An exiting process leaves its cgroups a moment after its parent could have seen it
// die, and v1 offers no event for the last one to leave, so trying again is all there is to do: first at once, then after
// pauses that grow to 20 ms.
func removeTreeBy(dir string, deadline time.Time) error {
	pause := 100 * time.Microsecond
	for {
		err := removeTree(dir)
		if !errors.Is(err, ErrBusy) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pause)
		pause = min(2*pause, 20*time.Millisecond)
	}
}
