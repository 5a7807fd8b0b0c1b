package runtime

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// copyUp copies what the image has at path into a tmpfs that will cover it ("tmpcopyup"). No such folder is no error.
func copyUp(root, tmpfs *os.File, path string) error {
	src, err := safepath.Open(root, path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := safepath.Open(tmpfs, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dst.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	if err := copyTree(src, dst); err != nil {
		return fmt.Errorf("copy %s up: %w", path, err)
	}
	return own(dst, &st)
}

// copyTree copies folders, files and links from src to dst, never through a link; pipes, sockets and devices are left out.
func copyTree(src, dst *os.File) error {
	names, err := src.Readdirnames(-1)
	if err != nil {
		return err
	}
	from, to := int(src.Fd()), int(dst.Fd())
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(from, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "stat", Path: name, Err: err}
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			buf := make([]byte, unix.PathMax)
			n, err := unix.Readlinkat(from, name, buf)
			if err == nil {
				err = unix.Symlinkat(string(buf[:n]), to, name)
			}
			if err == nil {
				err = unix.Fchownat(to, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW)
			}
			if err != nil {
				return &fs.PathError{Op: "link", Path: name, Err: err}
			}
		case unix.S_IFDIR:
			if err := unix.Mkdirat(to, name, 0o700); err != nil {
				return &fs.PathError{Op: "mkdir", Path: name, Err: err}
			}
			if err := copyEntry(from, to, name, unix.O_DIRECTORY, unix.O_RDONLY|unix.O_DIRECTORY, &st, copyTree); err != nil {
				return err
			}
		case unix.S_IFREG:
			err := copyEntry(from, to, name, unix.O_NONBLOCK, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, &st, func(src, dst *os.File) error {
				_, err := io.Copy(dst, src)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func copyEntry(from, to int, name string, flags, create int, st *unix.Stat_t, fill func(src, dst *os.File) error) error {
	in, err := unix.Openat(from, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	src := os.NewFile(uintptr(in), name)
	defer src.Close()
	out, err := unix.Openat(to, name, unix.O_NOFOLLOW|unix.O_CLOEXEC|create, 0o600)
	if err != nil {
		return &fs.PathError{Op: "create", Path: name, Err: err}
	}
	dst := os.NewFile(uintptr(out), name)
	defer dst.Close()
	if err := fill(src, dst); err != nil {
		return err
	}
	return own(dst, st)
}

// own gives f the owner, mode and modification time of st.
func own(f *os.File, st *unix.Stat_t) error {
	fd := int(f.Fd())
	err := errors.Join(unix.Fchown(fd, int(st.Uid), int(st.Gid)), unix.Fchmod(fd, st.Mode&0o7777))
	if err == nil {
		err = unix.UtimesNanoAt(fd, "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
	}
	if err != nil {
		return &fs.PathError{Op: "own", Path: f.Name(), Err: err}
	}
	return nil
}
