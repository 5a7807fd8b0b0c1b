package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copier is one MergeTree. It remembers files with several names: by device and inode, the new folder and name of the first.
type copier struct {
	links map[[2]uint64]*os.File
	names map[[2]uint64]string
	merge *merge
}

func newCopier(m *merge) *copier {
	return &copier{links: map[[2]uint64]*os.File{}, names: map[[2]uint64]string{}, merge: m}
}

func (c *copier) close() {
	for _, f := range c.links {
		f.Close()
	}
}

func (c *copier) folder(src, dst *os.File) error {
	names, err := src.Readdirnames(-1)
	if err != nil {
		return err
	}
	if err := c.merge.begin(dst, names); err != nil {
		return err
	}
	for _, name := range names {
		if err := c.entry(src, dst, name); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	return nil
}

func (c *copier) entry(src, dst *os.File, name string) (err error) {
	sfd, dfd := int(src.Fd()), int(dst.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(sfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	key := [2]uint64{st.Dev, st.Ino}
	at := name // what takes the place of something is made under another name
	if at, err = c.merge.place(dst, name, kind); err != nil {
		return err
	}
	defer func() {
		if err != nil && at != name {
			unix.Unlinkat(dfd, at, 0) //nolint:errcheck // it may not have come to be
		}
	}()
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := c.links[key]; ok {
			if err := unix.Linkat(int(first.Fd()), c.names[key], dfd, at, 0); err != nil {
				return err
			}
			return settle(dst, at, name)
		}
	}
	switch kind {
	case unix.S_IFSOCK:
		return nil
	case unix.S_IFDIR:
		if err := c.subfolder(sfd, dfd, name); err != nil {
			return err
		}
	case unix.S_IFREG:
		if err := copyFile(sfd, dfd, name, at); err != nil {
			return err
		}
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(sfd, name, buf)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(buf[:n]), dfd, at); err != nil {
			return err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if c.merge.NoDevices {
			return nil
		}
		fallthrough
	default:
		if err := unix.Mknodat(dfd, at, kind|0o600, int(st.Rdev)); err != nil {
			return err
		}
	}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		fd, err := unix.FcntlInt(uintptr(dfd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c.links[key], c.names[key] = os.NewFile(uintptr(fd), dst.Name()), name
	}
	c.merge.adapt(&st)
	if err := c.attributes(dfd, at, fmt.Sprintf("/proc/self/fd/%d/%s", sfd, name), &st); err != nil {
		return err
	}
	return settle(dst, at, name)
}

func (c *copier) subfolder(sfd, dfd int, name string) error {
	if err := unix.Mkdirat(dfd, name, 0o700); err != nil && err != unix.EEXIST {
		return err
	}
	src, err := openAt(sfd, name, unix.O_DIRECTORY|unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := openAt(dfd, name, unix.O_DIRECTORY|unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer dst.Close()
	return c.folder(src, dst)
}

func openAt(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func copyFile(sfd, dfd int, name, at string) (err error) {
	in, err := openAt(sfd, name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := openAt(dfd, at, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in) // copy_file_range, which clones where the file system can
	return errors.Join(err, out.Close())
}

// attributes gives dir/name (name "": dir itself) what src, described by st, has. The owner comes before the mode, since chown clears
// set-id bits, and before capabilities, which it drops.
func attributes(dir int, name, src string, st *unix.Stat_t) error {
	flags := unix.AT_SYMLINK_NOFOLLOW
	path := fmt.Sprintf("/proc/self/fd/%d", dir)
	if name == "" {
		flags = unix.AT_EMPTY_PATH
	} else {
		path += "/" + name
	}
	if err := unix.Fchownat(dir, name, int(st.Uid), int(st.Gid), flags); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK
	if !isLink {
		if err := unix.Chmod(path, st.Mode&0o7777); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := copyXattrs(path, src, name == ""); err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if name == "" {
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, times, 0)
	}
	return unix.UtimesNanoAt(dir, name, times, unix.AT_SYMLINK_NOFOLLOW)
}

// copyXattrs copies extended attributes. follow is for paths that are a handle's link in /proc.
func copyXattrs(dst, src string, follow bool) error {
	list, get, set := unix.Llistxattr, unix.Lgetxattr, unix.Lsetxattr
	if follow {
		list, get, set = unix.Listxattr, unix.Getxattr, unix.Setxattr
	}
	n, err := list(src, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	buf := make([]byte, n)
	if n, err = list(src, buf); err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	for _, name := range bytes.Split(bytes.TrimRight(buf[:n], "\x00"), []byte{0}) {
		if len(name) == 0 || bytes.HasPrefix(name, []byte("trusted.overlay.")) {
			continue // it speaks of the layer that src lies in; overlayfs counts those that it does not list
		}
		val := make([]byte, 64<<10) // the kernel's limit
		n, err := get(src, string(name), val)
		if err != nil {
			return fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		if err := set(dst, string(name), val[:n], 0); err != nil {
			return fmt.Errorf("set extended attribute %s: %w", name, err)
		}
	}
	return nil
}
