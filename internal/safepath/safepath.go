// Package safepath owns the opening of paths inside a root that they cannot escape.
//
// A path is resolved as if the root were "/": an absolute symbolic link starts again at the root and ".." stops there,
// whatever somebody else changes in the tree meanwhile. The kernel does it with openat2(2) and RESOLVE_IN_ROOT; where that
// is missing (Linux before 5.6, or a seccomp filter above us) a walk of our own does it component by component, from
// folder handle to folder handle. This closes the class of CVE-2018-15664, CVE-2019-16884 and CVE-2021-30465, where a
// path was checked first and used later.
package safepath

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// noOpenat2 is set when the kernel has no openat2, or by a test that wants the fallback.
var noOpenat2 atomic.Bool

// maxLinks is the kernel's own limit of symbolic links in one resolution.
const maxLinks = 40

// Open opens path inside root as open(2) would with root as "/". O_CLOEXEC is added. With O_NOFOLLOW the last component is
// not followed (together with O_PATH: a handle of the link itself). root may be an O_PATH handle. Errors are *fs.PathError.
func Open(root *os.File, path string, flags int, mode uint32) (*os.File, error) {
	return open(root, path, flags, mode, 0)
}

// OpenNoLinksFD is OpenNoLinks without the *os.File around the descriptor, for who opens thousands.
func OpenNoLinksFD(root *os.File, path string, flags int) (int, error) {
	fd, err := openFD(int(root.Fd()), path, flags|unix.O_CLOEXEC, 0, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return -1, &fs.PathError{Op: "open in root", Path: path, Err: err}
	}
	return fd, nil
}

// OpenNoLinks is Open, but any symbolic link on the way, the last component included, is the error ELOOP.
func OpenNoLinks(root *os.File, path string, flags int, mode uint32) (*os.File, error) {
	return open(root, path, flags, mode, unix.RESOLVE_NO_SYMLINKS)
}

func open(root *os.File, path string, flags int, mode uint32, resolve uint64) (*os.File, error) {
	fd, err := openFD(int(root.Fd()), path, flags|unix.O_CLOEXEC, mode, resolve)
	if err != nil {
		return nil, &fs.PathError{Op: "open in root", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), root.Name()+"/"+strings.TrimLeft(path, "/")), nil
}

func openFD(root int, path string, flags int, mode uint32, resolve uint64) (int, error) {
	if strings.IndexByte(path, 0) >= 0 {
		return -1, unix.EINVAL
	}
	if path == "" {
		path = "."
	}
	if !noOpenat2.Load() {
		how := unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve}
		if flags&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0 {
			how.Mode = uint64(mode & 0o7777)
		}
		// EAGAIN: something was renamed while ".." was resolved and the kernel could not be sure. Ask again, then do it
		// ourselves: a hostile renamer must not be able to stop us for ever.
		for range 128 {
			fd, err := unix.Openat2(root, path, &how)
			switch err {
			case unix.EINTR, unix.EAGAIN:
				continue
			case unix.ENOSYS:
				noOpenat2.Store(true)
				return walk(root, path, flags, mode, resolve)
			}
			return fd, err
		}
	}
	return walk(root, path, flags, mode, resolve)
}

// walk is the fallback. It holds a handle of every folder from the root down to where it stands, so ".." is a step back
// on this list and not a question to a file system that may have changed.
func walk(root int, path string, flags int, mode uint32, resolve uint64) (int, error) {
	start, err := unix.Openat(root, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	stack := []int{start}
	pop := func(keep int) {
		for len(stack) > keep {
			unix.Close(stack[len(stack)-1])
			stack = stack[:len(stack)-1]
		}
	}
	defer pop(0)
	rest := strings.Split(path, "/")
	links := 0
	for {
		for len(rest) > 0 && (rest[0] == "" || rest[0] == ".") {
			rest = rest[1:]
		}
		if len(rest) == 0 { // the path was "/", or ended in ".." or "."
			return retry(func() (int, error) {
				return unix.Openat(stack[len(stack)-1], ".", flags&^(unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW), 0)
			})
		}
		name := rest[0]
		rest = rest[1:]
		if name == ".." {
			pop(max(1, len(stack)-1))
			continue
		}
		dir := stack[len(stack)-1]
		last := true
		for _, r := range rest {
			if r != "" && r != "." {
				last = false
			}
		}
		trailing := len(rest) > 0 // "name/" and "name/." want a folder
		fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT && last && flags&unix.O_CREAT != 0 {
			if trailing {
				return -1, unix.EISDIR
			}
			// O_NOFOLLOW: a link put here since is an error and never a way out.
			return retry(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_NOFOLLOW, mode) })
		}
		if err != nil {
			return -1, err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			unix.Close(fd)
			return -1, err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK && !(last && flags&unix.O_NOFOLLOW != 0 && !trailing) {
			if links++; links > maxLinks || resolve&unix.RESOLVE_NO_SYMLINKS != 0 || last && flags&(unix.O_CREAT|unix.O_EXCL) == unix.O_CREAT|unix.O_EXCL {
				unix.Close(fd)
				if links <= maxLinks && resolve&unix.RESOLVE_NO_SYMLINKS == 0 {
					return -1, unix.EEXIST
				}
				return -1, unix.ELOOP
			}
			target, err := readlink(fd)
			unix.Close(fd)
			if err != nil {
				return -1, err
			}
			if strings.HasPrefix(target, "/") {
				pop(1)
			}
			rest = append(strings.Split(target, "/"), rest...)
			continue
		}
		if !last {
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				unix.Close(fd)
				return -1, unix.ENOTDIR
			}
			stack = append(stack, fd)
			continue
		}
		unix.Close(fd)
		if trailing {
			flags |= unix.O_DIRECTORY
		}
		return retry(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_NOFOLLOW, mode) })
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

// readlink reads the target of the link that fd, an O_PATH handle, stands for.
func readlink(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// MakeFile makes an empty file at path, and its missing parents, inside root, and returns an O_PATH handle of it; what is there already
// is left as it is. A new file gets mode, new folders 0755. Nothing that somebody puts there meanwhile can make it wait.
func MakeFile(root *os.File, path string, mode uint32) (*os.File, error) {
	dir, _ := filepath.Split(path)
	parent, err := MkdirAll(root, dir, 0o755)
	if err != nil {
		return nil, err
	}
	parent.Close()
	// Non-blocking: it may be a pipe by now.
	f, err := Open(root, path, unix.O_CREAT|unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, mode)
	if err != nil {
		return nil, err
	}
	f.Close()
	return Open(root, path, unix.O_PATH, 0)
}

// MkdirAll makes path and its missing parents inside root and returns an O_PATH handle of the last folder. Existing
// symbolic links are followed, inside the root. New folders get mode as it stands (the umask does not count).
func MkdirAll(root *os.File, path string, mode uint32) (*os.File, error) {
	const dirFlags = unix.O_PATH | unix.O_DIRECTORY
	// The usual case: it is there.
	f, err := Open(root, path, dirFlags, 0)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	// Grow the longest existing prefix by one name at a time. The prefix is resolved anew from the root each time, since
	// "a/link/../b" depends on where the link leads.
	parts := strings.Split(path, "/")
	prefix := ""
	var cur *os.File
	if dir, name := filepath.Split(path); dir != "" && path == filepath.Clean(path) && !strings.Contains(path, "..") {
		// Mostly the last one alone is missing.
		if cur, err = Open(root, dir, dirFlags, 0); err == nil {
			parts, prefix = []string{name}, dir
		}
	}
	if cur == nil {
		if cur, err = Open(root, ".", dirFlags, 0); err != nil {
			return nil, err
		}
	}
	for _, p := range parts {
		if p == "" || p == "." {
			continue
		}
		next := prefix + p
		f, err := Open(root, next, dirFlags, 0)
		if errors.Is(err, fs.ErrNotExist) {
			if p == ".." {
				cur.Close()
				return nil, err
			}
			err = unix.Mkdirat(int(cur.Fd()), p, mode&0o7777)
			made := err == nil
			if err == unix.EEXIST { // another process made it, or p is a dangling link, which the next line refuses
				err = nil
			}
			if err == nil {
				f, err = Open(root, next, dirFlags, 0)
			} else {
				err = &fs.PathError{Op: "mkdir in root", Path: next, Err: err}
			}
			if err == nil && made {
				err = chmodFD(f, mode)
			}
		}
		cur.Close()
		if err != nil {
			if f != nil {
				f.Close()
			}
			return nil, err
		}
		cur, prefix = f, next+"/"
	}
	return cur, nil
}

// chmodFD sets the mode of what an O_PATH handle stands for, past the umask.
func chmodFD(f *os.File, mode uint32) error {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Mode&0o7777 == mode&0o7777 { // no umask, most often
		return nil
	}
	if err := unix.Fchmodat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), mode&0o7777, 0); err != nil {
		return &fs.PathError{Op: "chmod in root", Path: f.Name(), Err: err}
	}
	return nil
}

// ReadFile reads the regular file at path inside root. A file longer than limit bytes (0: no limit) is an error, and so is
// anything that is no regular file, since reading a pipe or a device could block for ever.
func ReadFile(root *os.File, path string, limit int64) ([]byte, error) {
	f, err := Open(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read in root", Path: path, Err: errors.New("not a regular file")}
	}
	if limit <= 0 {
		return io.ReadAll(f)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, &fs.PathError{Op: "read in root", Path: path, Err: fmt.Errorf("longer than %d bytes", limit)}
	}
	return data, err
}

// Stat describes what path inside root leads to, symbolic links followed.
func Stat(root *os.File, path string) (unix.Stat_t, error) { return stat(root, path, 0) }

// Lstat describes what lies at path inside root; a symbolic link as last component is described itself.
func Lstat(root *os.File, path string) (unix.Stat_t, error) { return stat(root, path, unix.O_NOFOLLOW) }

func stat(root *os.File, path string, flags int) (unix.Stat_t, error) {
	var st unix.Stat_t
	f, err := Open(root, path, unix.O_PATH|flags, 0)
	if err != nil {
		return st, err
	}
	defer f.Close()
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return st, &fs.PathError{Op: "stat in root", Path: path, Err: err}
	}
	return st, nil
}

// Readlink returns the target of the symbolic link at path inside root, as it is written there.
func Readlink(root *os.File, path string) (string, error) {
	f, err := Open(root, path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	target, err := readlink(int(f.Fd()))
	if err != nil {
		return "", &fs.PathError{Op: "readlink in root", Path: path, Err: err}
	}
	return target, nil
}

// OpenRoot opens dir as a root for the functions of this package.
func OpenRoot(dir string) (*os.File, error) {
	return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}
