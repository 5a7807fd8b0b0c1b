package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// MergeOptions say how MergeTree copies.
type MergeOptions struct {
	// Time, if it is set, is every file's modification time.
	Time *time.Time
	// Mirror removes what the source does not have.
	Mirror bool
	// NoDevices leaves devices out.
	NoDevices bool
	// Top gives dst itself what src has, too.
	Top bool
}

// MergeTree copies what is in the folder src (a readable handle) into the folder dst, which may have files already: folders become one, a
// file replaces a file by a rename, and what is a folder on one side alone is replaced as a whole. No symbolic link in dst is followed:
// one that stands where a folder shall be is replaced. Owners, and attributes that dst's file system does not have, are kept where this process may set them;
// dst itself keeps its own.
func MergeTree(ctx context.Context, dst string, src *os.File, o MergeOptions) error {
	d, err := os.OpenFile(dst, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	c := newCopier(&merge{ctx: ctx, MergeOptions: o})
	defer c.close()
	if err := c.folder(src, d); err != nil || !o.Top {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", src.Name(), err)
	}
	return c.attributes(int(d.Fd()), "", fmt.Sprintf("/proc/self/fd/%d", src.Fd()), &st)
}

// merge is what a copier does where the target has files.
type merge struct {
	MergeOptions
	ctx context.Context //nolint:containedctx // one MergeTree, which it spans
}

// begin prepares the folder dst for names, which will come into it.
func (m *merge) begin(dst *os.File, names []string) error {
	if err := m.ctx.Err(); err != nil || !m.Mirror {
		return err
	}
	have, err := dst.Readdirnames(-1)
	if err != nil {
		return err
	}
	wanted := make(map[string]bool, len(names))
	for _, n := range names {
		wanted[n] = true
	}
	for _, n := range have {
		if wanted[n] {
			continue
		}
		if err := removeAt(dst, n); err != nil {
			return err
		}
	}
	return nil
}

// place returns the name under which a file of a kind is made first: its own where nothing is in its way, or where folders become one.
func (m *merge) place(dst *os.File, name string, kind uint32) (string, error) {
	if err := m.ctx.Err(); err != nil {
		return "", err
	}
	var st unix.Stat_t
	err := unix.Fstatat(int(dst.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return name, nil
	}
	if err != nil {
		return "", err
	}
	was, is := st.Mode&unix.S_IFMT == unix.S_IFDIR, kind == unix.S_IFDIR
	switch {
	case was && is:
		return name, nil
	case was || is:
		return name, removeAt(dst, name)
	case kind == unix.S_IFSOCK:
		return name, nil
	}
	return tempPrefix + disk.RandomID()[:12], nil
}

// tempPrefix begins the names of files that are to replace others.
const tempPrefix = ".tmp-conex."

// settle gives what was made under another name its own.
func settle(dst *os.File, at, name string) error {
	if at == name {
		return nil
	}
	if err := unix.Renameat(int(dst.Fd()), at, int(dst.Fd()), name); err != nil {
		return err
	}
	// Renaming a link over another one of the same file leaves both.
	if err := unix.Unlinkat(int(dst.Fd()), at, 0); err != unix.ENOENT {
		return err
	}
	return nil
}

// attributes is the function of that name; in a merge what the file system or the user can't have is left out.
func (c *copier) attributes(dir int, name, src string, st *unix.Stat_t) error {
	err := attributes(dir, name, src, st)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
		return err
	}
	if name == "" {
		return unix.Fchmod(dir, st.Mode&0o777)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Fchmodat(dir, name, st.Mode&0o777, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// adapt changes what is copied of a file's attributes.
func (m *merge) adapt(st *unix.Stat_t) {
	if m.Time != nil {
		st.Mtim = unix.NsecToTimespec(m.Time.UnixNano())
		st.Atim = st.Mtim
	}
}

// removeAt removes a name from a folder, with all that is in it. It leaves the folder's file system and tree by no link.
func removeAt(dir *os.File, name string) error {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return err
	}
	defer root.Close()
	if strings.ContainsRune(name, '/') {
		return fmt.Errorf("remove %q: not a name", name)
	}
	return root.RemoveAll(name)
}
