package treecopy

import (
	"errors"

	"golang.org/x/sys/unix"
)

// errMounted says that a file stands there that something is mounted on, so it can't be replaced.
var errMounted = errors.New("a mount is in the way")

// attempts bounds the races that a name is fought for with somebody who makes it again and again.
const attempts = 1000

// put makes dir/as by make, which fails with EEXIST while something is there; that is removed. A folder is never removed.
func put(dir int, as, path string, make func() error) error {
	for range attempts {
		err := make()
		if err != unix.EEXIST {
			return err
		}
		var st unix.Stat_t
		if err := unix.Fstatat(dir, as, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			if err == unix.ENOENT {
				continue
			}
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return &ConflictError{Path: path, Folder: true}
		}
		err = unix.Unlinkat(dir, as, 0)
		switch err {
		case nil, unix.ENOENT:
		case unix.EISDIR:
			return &ConflictError{Path: path, Folder: true}
		case unix.EBUSY:
			return errMounted
		default:
			return err
		}
	}
	return errors.New("somebody else makes the same file again and again")
}

// makeFolder makes dir/as, or takes the folder that is there, and opens it. "." is dir itself.
func (c *copier) makeFolder(dir int, as, path string) (int, error) {
	for range attempts {
		err := error(unix.EEXIST)
		if as != "." {
			err = unix.Mkdirat(dir, as, 0o700)
		}
		if err != nil && err != unix.EEXIST {
			return -1, err
		}
		fd, err := openat(dir, as, unix.O_RDONLY|unix.O_DIRECTORY)
		switch err {
		case nil:
			return fd, nil
		case unix.ENOTDIR, unix.ELOOP:
			return -1, &ConflictError{Path: path}
		case unix.ENOENT:
			continue
		default:
			return -1, err
		}
	}
	return -1, errors.New("somebody else removes the folder again and again")
}

// create makes dir/as as a new regular file and opens it for writing. With mounted the file is an old one, emptied, that
// something is mounted on: it keeps its attributes.
func (c *copier) create(dir int, as, path string) (fd int, mounted bool, err error) {
	err = put(dir, as, path, func() (err error) {
		fd, err = openat(dir, as, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
		return err
	})
	if err == nil || !errors.Is(err, errMounted) {
		return fd, false, err
	}
	h, st, err := handle(dir, as)
	if err != nil {
		return -1, false, err
	}
	defer unix.Close(h)
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, false, unix.EBUSY
	}
	fd, err = reopen(h, unix.O_WRONLY|unix.O_TRUNC)
	return fd, true, err
}

// regular copies a file.
func (c *copier) regular(in int, st *unix.Stat_t, dir int, as, path string) error {
	src, err := reopen(in, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	dst, mounted, err := c.create(dir, as, path)
	if err != nil {
		return err
	}
	err = c.fill(src, dst, st)
	if err == nil && !mounted {
		var x map[string]string
		if x, err = readXattrs(src); err == nil {
			err = c.apply(dst, attributesOf(st, x))
		}
	}
	return errors.Join(err, unix.Close(dst))
}

// symlink makes a symbolic link.
func (c *copier) symlink(target string, a attributes, dir int, as, path string) error {
	if err := put(dir, as, path, func() error { return unix.Symlinkat(target, dir, as) }); err != nil {
		return err
	}
	return c.settle(dir, as, unix.S_IFLNK, 0, a)
}

// node makes a device or a pipe.
func (c *copier) node(kind uint32, rdev uint64, a attributes, dir int, as, path string) error {
	if err := put(dir, as, path, func() error { return unix.Mknodat(dir, as, kind|0o600, int(rdev)) }); err != nil {
		return err
	}
	return c.settle(dir, as, kind, rdev, a)
}

// settle gives what was just made under a name its attributes, unless somebody has put something else there.
func (c *copier) settle(dir int, as string, kind uint32, rdev uint64, a attributes) error {
	h, st, err := handle(dir, as)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(h)
	if st.Mode&unix.S_IFMT != kind || st.Nlink != 1 || kind != unix.S_IFLNK && st.Rdev != rdev {
		return nil
	}
	return c.applyHandle(h, a, kind == unix.S_IFLNK)
}

// linkTo makes dir/as a further name of what a handle stands for.
func (c *copier) linkTo(h, dir int, as, path string) error {
	var a, b unix.Stat_t
	if unix.Fstat(h, &a) == nil && unix.Fstatat(dir, as, &b, unix.AT_SYMLINK_NOFOLLOW) == nil && a.Dev == b.Dev && a.Ino == b.Ino {
		return nil // it has that name already, from an earlier copy
	}
	return put(dir, as, path, func() error {
		err := unix.Linkat(h, "", dir, as, unix.AT_EMPTY_PATH)
		if err == unix.ENOENT { // without CAP_DAC_READ_SEARCH
			err = unix.Linkat(unix.AT_FDCWD, procPath(h), dir, as, unix.AT_SYMLINK_FOLLOW)
		}
		return err
	})
}
