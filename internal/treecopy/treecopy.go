// Package treecopy copies files from one tree into another, or out of a tar into one, while whoever owns a tree may change it.
//
// Nothing is looked at by a path and used by it again later: every file is a handle relative to its folder's handle, no symbolic link
// is followed, and what is no regular file is never opened. So a container that swaps its files for links, devices or pipes while
// it is copied to or from gets a wrong copy of its own files at worst (CVE-2018-15664). Nothing of a tree is executed or loaded
// (CVE-2019-14271).
package treecopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"

	"conex/internal/layertar"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// Options say what becomes of a file's attributes. Modes, times and the user's extended attributes are always kept.
type Options struct {
	// KeepOwner gives what is copied its owner; without it everything belongs to who makes it.
	KeepOwner bool
	// Owner, unless nil, owns everything that is copied.
	Owner *Owner
	// From says that the source's owners are ids of a user namespace seen from outside, To that the target's are to be. Without them an id
	// is an id.
	From, To *IDs
	// SetID keeps set-user-ID and set-group-ID bits, Caps file capabilities. Both mean something else under another owner.
	SetID, Caps bool
	// Devices copies device nodes; without it they are left out.
	Devices bool
	// Top gives the folder that a tar is put into what the tar says of its top; otherwise that folder keeps its own.
	Top bool
	// Complete refuses a tar that has no entry, or not the blocks of zeros at its end: its writer died, or was cut off between two entries.
	Complete bool
	// LeftOut is told of each device that is left out. May be nil.
	LeftOut func(path string)
	// Progress is told now and then how much has been copied, counted as Size counts. May be nil.
	Progress func(size int64)
}

// IDs are the ids of a user namespace, from 0 on, as they are outside of it.
type IDs struct{ First, Size uint32 }

// nobody is whom the kernel shows in the place of an id that a user namespace does not have.
const nobody = 65534

// Inside returns what an id is in the namespace.
func (i *IDs) Inside(id int) int {
	if i == nil {
		return id
	}
	if n := int64(id) - int64(i.First); n >= 0 && n < int64(i.Size) {
		return int(n)
	}
	return nobody
}

// Outside returns what an id of the namespace is outside; -1, which leaves an owner as he is, for one that it does not have.
func (i *IDs) Outside(id int) int {
	if i == nil {
		return id
	}
	if id < 0 || int64(id) >= int64(i.Size) {
		return -1
	}
	return int(i.First) + id
}

// Owner is a user and a group.
type Owner struct{ UID, GID int }

// ConflictError says that a folder stands where something else shall be, or the reverse.
type ConflictError struct {
	Path   string
	Folder bool // what stands there is a folder
}

func (e *ConflictError) Error() string {
	if e.Folder {
		return fmt.Sprintf("cannot overwrite directory %q with non-directory", e.Path)
	}
	return fmt.Sprintf("cannot overwrite non-directory %q with directory", e.Path)
}

// copier copies one tree.
type copier struct {
	Options
	ctx  context.Context //nolint:containedctx // one Copy or Extract, which it spans
	root *os.File        // the folder that everything is made in
	size int64
	// made are the files with several names: by the source's device and inode, the first copy.
	made map[[2]uint64]copied
	// top is the first folder that was made, which must not be copied into itself.
	top    [2]uint64
	engine dataEngine
}

// copied is a file that was made.
type copied struct {
	path     string // below copier.root
	dev, ino uint64
}

// Copy makes dst/as a copy of src/name, where src and dst are handles of folders. A name "." is the folder itself: its contents go into
// dst, and its attributes stay behind unless as is a name. What is at dst/as already is replaced, folders become one, and a file that
// something is mounted on is written into. A folder in the place of a file, or a file in that of a folder, is a *ConflictError. What disappears while
// its turn comes is left out, sockets are. It returns the size that a tar of it would have.
func Copy(ctx context.Context, src *os.File, name string, dst *os.File, as string, o Options) (size int64, err error) {
	c := &copier{Options: o, ctx: ctx, root: dst, made: map[[2]uint64]copied{}}
	defer c.engine.close()
	if err := c.entry(int(src.Fd()), name, int(dst.Fd()), as, as); err != nil {
		return c.size, err
	}
	return c.size + tarEnd, nil
}

// tarBlock and tarEnd are the sizes in bytes of a tar's unit and of its end.
const (
	tarBlock = 512
	tarEnd   = 2 * tarBlock
)

// count adds an entry to the size, its content comes later.
func (c *copier) count(path string) {
	c.size += tarBlock
	if len(path) > 100 {
		c.size += 2 * tarBlock // its name needs an entry of its own
	}
	if c.Progress != nil {
		c.Progress(c.size)
	}
}

// content adds n bytes of content.
func (c *copier) content(n int64) {
	c.size += n
	if c.Progress != nil {
		c.Progress(c.size)
	}
}

// handle opens a name in a folder without opening what it stands for.
func handle(dir int, name string) (int, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := openat(dir, name, unix.O_PATH)
	if err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

func openat(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// reopen opens what a handle stands for, which was seen to be a regular file or a folder.
func reopen(fd, flags int) (int, error) {
	for {
		n, err := unix.Open(procPath(fd), flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// entry copies sdir/name to ddir/as, which is path below c.root.
func (c *copier) entry(sdir int, name string, ddir int, as, path string) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	in, st, err := handle(sdir, name)
	if err == unix.ENOENT && path != as { // gone since its folder was read
		return nil
	}
	if err != nil {
		return fail(path, err)
	}
	defer unix.Close(in)
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR {
		return c.folder(in, &st, ddir, as, path)
	}
	switch kind {
	case unix.S_IFSOCK:
		return nil
	case unix.S_IFBLK, unix.S_IFCHR:
		if !c.Devices {
			if c.LeftOut != nil {
				c.LeftOut(path)
			}
			return nil
		}
	}
	c.count(path)
	key := [2]uint64{st.Dev, st.Ino}
	if first, ok := c.made[key]; ok && st.Nlink > 1 {
		if done, err := c.link(first, ddir, as, path); done || err != nil {
			return fail(path, err)
		}
	}
	switch kind {
	case unix.S_IFREG:
		err = c.regular(in, &st, ddir, as, path)
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, rerr := unix.Readlinkat(in, "", buf)
		if rerr != nil {
			return fail(path, rerr)
		}
		err = c.symlink(string(buf[:n]), attributesOf(&st, nil), ddir, as, path)
	default:
		err = c.node(kind, st.Rdev, attributesOf(&st, nil), ddir, as, path)
	}
	if err == nil && st.Nlink > 1 {
		var now unix.Stat_t
		if err := unix.Fstatat(ddir, as, &now, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			c.made[key] = copied{path, now.Dev, now.Ino}
		}
	}
	return fail(path, err)
}

// fail names the file that an error is about; the errors that name it already stay as they are.
func fail(path string, err error) error {
	var ce *ConflictError
	var ne *namedError
	if err == nil || errors.As(err, &ce) || errors.As(err, &ne) || errors.Is(err, context.Canceled) {
		return err
	}
	return &namedError{path, err}
}

type namedError struct {
	path string
	err  error
}

func (e *namedError) Error() string { return "copy " + e.path + ": " + e.err.Error() }

func (e *namedError) Unwrap() error { return e.err }

func (c *copier) folder(in int, st *unix.Stat_t, ddir int, as, path string) error {
	if c.top != [2]uint64{} && c.top == [2]uint64{st.Dev, st.Ino} {
		return fail(path, errors.New("a folder can't be copied into itself"))
	}
	src, err := reopen(in, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fail(path, err)
	}
	f := os.NewFile(uintptr(src), path)
	defer f.Close()
	out, err := c.makeFolder(ddir, as, path)
	if err != nil {
		return fail(path, err)
	}
	defer unix.Close(out)
	var made unix.Stat_t
	if err := unix.Fstat(out, &made); err != nil {
		return fail(path, err)
	}
	if c.top == [2]uint64{} {
		c.top = [2]uint64{made.Dev, made.Ino}
	}
	c.count(path)
	names, err := f.Readdirnames(-1)
	if err != nil {
		return fail(path, err)
	}
	sort.Strings(names)
	prefix := path + "/"
	if path == "." {
		prefix = "./"
	}
	for _, n := range names {
		if err := c.entry(src, n, out, n, prefix+n); err != nil {
			return err
		}
	}
	if as == "." {
		return nil
	}
	x, err := readXattrs(src)
	if err != nil {
		return fail(path, err)
	}
	return fail(path, c.apply(out, attributesOf(st, x)))
}

// attributes are what a file has besides its content.
type attributes struct {
	mode         uint32
	uid, gid     int
	atime, mtime unix.Timespec
	xattrs       map[string]string
}

func attributesOf(st *unix.Stat_t, x map[string]string) attributes {
	return attributes{st.Mode & 0o7777, int(st.Uid), int(st.Gid), st.Atim, st.Mtim, x}
}

// apply gives an open file its attributes. The owner comes before the mode, since chown clears set-id bits, and before capabilities,
// which it drops.
func (c *copier) apply(fd int, a attributes) error {
	if uid, gid, ok := c.owner(a); ok {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if err := unix.Fchmod(fd, c.mode(a)); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	for _, name := range sortedKeys(a.xattrs) {
		if !c.wants(name) {
			continue
		}
		err := unix.Fsetxattr(fd, name, []byte(a.xattrs[name]), 0)
		if err != nil && err != unix.ENOTSUP && err != unix.EPERM {
			return fmt.Errorf("set extended attribute %s: %w", name, err)
		}
	}
	if err := futimes(fd, a); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// applyHandle does it for what can't be opened: links, devices, pipes. The handle was made of what this process made.
func (c *copier) applyHandle(fd int, a attributes, isLink bool) error {
	if uid, gid, ok := c.owner(a); ok {
		if err := unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if !isLink {
		if err := unix.Fchmodat(unix.AT_FDCWD, procPath(fd), c.mode(a), 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := futimes(fd, a); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

func (c *copier) owner(a attributes) (uid, gid int, ok bool) {
	uid, gid, ok = c.From.Inside(a.uid), c.From.Inside(a.gid), c.KeepOwner
	if c.Owner != nil {
		uid, gid, ok = c.Owner.UID, c.Owner.GID, true
	}
	return c.To.Outside(uid), c.To.Outside(gid), ok
}

func (c *copier) mode(a attributes) uint32 {
	if c.SetID {
		return a.mode
	}
	return a.mode &^ (unix.S_ISUID | unix.S_ISGID)
}

// wants reports whether an extended attribute is copied.
func (c *copier) wants(name string) bool {
	switch {
	case name == capability:
		return c.Caps
	case strings.HasPrefix(name, "user."), name == layertar.ACLAccess, name == layertar.ACLDefault:
		return layertar.KeepXattr(name)
	}
	return false // security labels and the like are of the place, not of the file
}

const capability = "security.capability"

func futimes(fd int, a attributes) error {
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{a.atime, a.mtime}, unix.AT_EMPTY_PATH)
}

// readXattrs returns the extended attributes of an open file.
func readXattrs(fd int) (map[string]string, error) {
	var small [512]byte
	buf := small[:]
	n, err := unix.Flistxattr(fd, buf)
	if err == unix.ERANGE {
		buf = make([]byte, 64<<10) // the kernel's limit
		n, err = unix.Flistxattr(fd, buf)
	}
	if err == unix.ENOTSUP || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	out := map[string]string{}
	var value []byte
	for _, name := range bytes.Split(bytes.TrimRight(buf[:n], "\x00"), []byte{0}) {
		if len(name) == 0 {
			continue
		}
		if value == nil {
			value = make([]byte, 64<<10) // the kernel's limit
		}
		k, err := unix.Fgetxattr(fd, string(name), value)
		if err == unix.ENODATA || err == unix.ENOTSUP {
			continue // gone since, or of a kind that this file system only lists
		}
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		out[string(name)] = string(value[:k])
	}
	return out, nil
}

func sortedKeys(m map[string]string) []string {
	if len(m) == 0 {
		return nil
	}
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// link makes a further name of a file that was made. It is found again from the top without following links and must be the file
// that it was; false when it is not there any more.
func (c *copier) link(first copied, ddir int, as, path string) (bool, error) {
	f, err := safepath.OpenNoLinks(c.root, first.path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil { // taken away meanwhile, or a link itself: the caller copies it anew
		return false, nil //nolint:nilerr // see above
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Dev != first.dev || st.Ino != first.ino {
		return false, nil //nolint:nilerr // as above
	}
	return true, c.linkTo(int(f.Fd()), ddir, as, path)
}
