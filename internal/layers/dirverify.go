package layers

import (
	"fmt"
	"os"

	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// compareTree compares an unpacked tree with what its tar says: names, kinds, owners, modes, lengths, links and devices. Contents are what
// the tar's digest is made of, but for those of sparse files. Times and extended attributes are not compared: what the file system could not
// keep was rounded or left out.
func compareTree(path string, t *layertar.Tree) error {
	root, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	return compareFolder(root, "", t.Root())
}

func compareFolder(dir *os.File, path string, i *layertar.Inode) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if err := compareAttributes(path, &st, i); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		if i.Child(n) == nil {
			return fmt.Errorf("%w: fs/%s%s is not in the layer", ErrDigest, path, n)
		}
	}
	for _, n := range i.Names() {
		if err := compareEntry(dir, n, path+n, i.Child(n)); err != nil {
			return err
		}
	}
	return nil
}

func compareEntry(dir *os.File, name, path string, i *layertar.Inode) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return fmt.Errorf("%w: fs/%s is missing", ErrDigest, path)
		}
		return err
	}
	if st.Mode&unix.S_IFMT != i.Type() {
		return fmt.Errorf("%w: fs/%s is of another kind", ErrDigest, path)
	}
	switch i.Type() {
	case unix.S_IFDIR:
		sub, err := open(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer sub.Close()
		return compareFolder(sub, path+"/", i)
	case unix.S_IFREG:
		if st.Size != i.Size {
			return fmt.Errorf("%w: fs/%s has %d bytes, not %d", ErrDigest, path, st.Size, i.Size)
		}
	case unix.S_IFLNK:
		buf := make([]byte, len(i.Target)+1)
		n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
		if err != nil {
			return err
		}
		if string(buf[:n]) != i.Target {
			return fmt.Errorf("%w: fs/%s leads elsewhere", ErrDigest, path)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if st.Rdev != unix.Mkdev(i.Major, i.Minor) {
			return fmt.Errorf("%w: fs/%s is another device", ErrDigest, path)
		}
	}
	if i.IsWhiteout() {
		return nil
	}
	return compareAttributes(path, &st, i)
}

func compareAttributes(path string, st *unix.Stat_t, i *layertar.Inode) error {
	switch {
	case i.Type() != unix.S_IFLNK && st.Mode&0o7777 != i.Mode&0o7777:
		return fmt.Errorf("%w: fs/%s has mode %04o, not %04o", ErrDigest, path, st.Mode&0o7777, i.Mode&0o7777)
	case st.Uid != i.UID || st.Gid != i.GID:
		return fmt.Errorf("%w: fs/%s belongs to %d:%d, not to %d:%d", ErrDigest, path, st.Uid, st.Gid, i.UID, i.GID)
	}
	return nil
}
