package layers

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// Change is what an overlay's upper folder says about a path.
type Change struct {
	// Path begins with "/".
	Path string
	Kind ChangeKind
}

// ChangeKind is what has happened to a path.
type ChangeKind int

// The numbers are those of Docker's API.
const (
	Modified ChangeKind = iota
	Added
	Deleted
)

// Changes lists what differs between an overlay's lower tree, a handle, and the same with the folder upper on top: in byte order, a folder
// before what is in it. Only upper is walked. As with Docker, a folder is modified also when something in it has changed, its times
// alone don't count, what has the same attributes as below is no change, and of a folder that is gone nothing more is said. exclude is as in WriteUpper.
// Somebody may change the folder meanwhile; no file in it is opened.
func Changes(upper string, lower *os.File, exclude func(path string) bool) ([]Change, error) {
	dir, err := os.OpenFile(upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	c := &changes{exclude: exclude}
	if lower != nil {
		if lower, err = safepath.OpenNoLinks(lower, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			return nil, err
		}
		defer lower.Close()
	}
	if err := c.folder(dir, lower, "", false); err != nil {
		return nil, fmt.Errorf("changes in %s: %w", upper, err)
	}
	return c.list, nil
}

type changes struct {
	list    []Change
	exclude func(string) bool
}

func (c *changes) add(path string, kind ChangeKind) {
	c.list = append(c.list, Change{"/" + path, kind})
}

// vanished reports whether err says that a live folder has lost or replaced the name since it was read.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ESTALE)
}

// folder compares the folder upper with lower, nil if there is none of that name below. Of an opaque folder everything below is gone.
func (c *changes) folder(upper, lower *os.File, path string, opaque bool) error {
	names, err := upper.Readdirnames(-1)
	if err != nil {
		return err
	}
	here := make(map[string]bool, len(names))
	for _, n := range names {
		here[n] = true
	}
	if opaque && lower != nil {
		below, err := lower.Readdirnames(-1)
		if err != nil {
			return err
		}
		for _, n := range below {
			if !here[n] {
				names = append(names, n)
			}
		}
	}
	slices.Sort(names)
	for _, n := range names {
		p := strings.TrimPrefix(path+"/"+n, "/")
		switch {
		case c.exclude != nil && c.exclude(p):
		case !here[n]:
			c.add(p, Deleted)
		default:
			if err := c.entry(upper, lower, n, p); err != nil && !vanished(err) {
				return fmt.Errorf("%s: %w", p, err)
			}
		}
	}
	return nil
}

func (c *changes) entry(upper, lower *os.File, name, path string) error {
	var now, was unix.Stat_t
	if err := unix.Fstatat(int(upper.Fd()), name, &now, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	known := false
	if lower != nil {
		err := unix.Fstatat(int(lower.Fd()), name, &was, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && err != unix.ENOENT {
			return err
		}
		known = err == nil && (was.Mode&unix.S_IFMT != unix.S_IFCHR || was.Rdev != 0) // a single layer shows its own whiteouts
	}
	caps, mark, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/%s", upper.Fd(), name))
	if err != nil {
		return err
	}
	kind := now.Mode & unix.S_IFMT
	if kind == unix.S_IFCHR && now.Rdev == 0 || mark.whiteout && kind == unix.S_IFREG && now.Size == 0 {
		if known {
			c.add(path, Deleted)
		}
		return nil
	}
	same := known && sameAttributes(&now, &was)
	if same {
		old, _, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/%s", lower.Fd(), name))
		if err != nil {
			return err
		}
		const capability = "SCHILY.xattr.security.capability"
		same = old[capability] == caps[capability]
	}
	at := len(c.list)
	switch {
	case !known:
		c.add(path, Added)
	case !same || kind == unix.S_IFDIR: // of a folder this may turn out to be nothing
		c.add(path, Modified)
	}
	if kind != unix.S_IFDIR {
		return nil
	}
	sub, err := open(int(upper.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	var below *os.File
	if known && was.Mode&unix.S_IFMT == unix.S_IFDIR {
		if below, err = open(int(lower.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			return err
		}
		defer below.Close()
	}
	if err := c.folder(sub, below, path, mark.opaque); err != nil {
		return err
	}
	if same && len(c.list) == at+1 {
		c.list = c.list[:at]
	}
	return nil
}

// sameAttributes reports whether a file is as it was. Folders change their size and times with what is in them.
func sameAttributes(a, b *unix.Stat_t) bool {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid {
		return false
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			return false
		}
	}
	return a.Size == b.Size && a.Mtim == b.Mtim
}
