package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"conex/internal/layers"
	"conex/internal/layertar"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"
	"conex/internal/runtime"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// openStage shows layers as one read-only tree, detached: it is gone when closed. nil for no layers.
func openStage(ctx context.Context, ls *layers.Store, ids []ocispec.Digest) (*os.File, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	lower, err := ls.Lower(ctx, ids)
	if err != nil {
		return nil, err
	}
	return mount.Overlay(mount.OverlayOptions{Lower: lower})
}

// target is the tree that a step without a process writes to: the stage below, which is only read, and a new layer. Nothing is
// created on disk but the layer's tar.
type target struct {
	lower *os.File       // nil: empty
	w     *layers.Writer // nil: only to look
	// kept are the folders of the layer, by path without leading slash, that repeat one of the stage below, for its attributes: what is in
	// that folder shows through.
	kept map[string]bool
	// changed says that the layer has more than such repetitions.
	changed bool
	// newest is the latest time of what was written, but for what only repeats the stage below.
	newest time.Time
}

// maxLinks is the kernel's limit of links in one path.
const maxLinks = 40

func newTarget(ctx context.Context, ls *layers.Store, base []ocispec.Digest) (*target, error) {
	lower, err := openStage(ctx, ls, base)
	if err != nil {
		return nil, err
	}
	w, err := ls.NewWriter(ctx)
	if err != nil {
		if lower != nil {
			lower.Close()
		}
		return nil, err
	}
	return &target{lower: lower, w: w, kept: map[string]bool{}}, nil
}

// close frees everything; after commit the layer stays.
func (t *target) close() error {
	var errs []error
	if t.lower != nil {
		errs = append(errs, t.lower.Close())
	}
	return errors.Join(append(errs, t.w.Close())...)
}

// commit gives the layer, with the newest time in it, or nothing when nothing was written.
func (t *target) commit() (made, error) {
	if !t.changed {
		return made{}, nil
	}
	info, err := t.w.Commit()
	return made{layer: info.DiffID, when: t.newest}, err
}

// own is what the layer itself has at a path, or nil.
func (t *target) own(p string) *layertar.Inode {
	if t.w == nil {
		return nil // who only looks
	}
	if i := t.w.Lookup(p); i != nil && !i.Implied {
		return i
	}
	return nil
}

// lookup says what lies at a path whose parents are no links. The error is fs.ErrNotExist when there is nothing.
func (t *target) lookup(p string) (mode uint32, link string, st *unix.Stat_t, err error) {
	if i := t.own(p); i != nil {
		if i.IsWhiteout() { // an archive had it
			return 0, "", nil, fs.ErrNotExist
		}
		return i.Type(), i.Target, nil, nil
	}
	if p == "" {
		return unix.S_IFDIR, "", nil, nil
	}
	if t.lower == nil {
		return 0, "", nil, fs.ErrNotExist
	}
	// Below a folder that only the layer has there is nothing of the stage.
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if t.kept[dir] {
			break
		}
		if t.own(dir) != nil {
			return 0, "", nil, fs.ErrNotExist
		}
	}
	f, err := safepath.OpenNoLinks(t.lower, path.Dir(p), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			err = fs.ErrNotExist
		}
		return 0, "", nil, err
	}
	defer f.Close()
	st = new(unix.Stat_t)
	name := path.Base(p)
	if err := unix.Fstatat(int(f.Fd()), name, st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, "", nil, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if link, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), name)); err != nil {
			return 0, "", nil, err
		}
	}
	return st.Mode & unix.S_IFMT, link, st, nil
}

// resolve follows the links in p, inside the root, and returns where it leads; the last element too when follow is set. What does not
// exist is taken as written.
func (t *target) resolve(p string, follow bool) (string, error) {
	rest := strings.Split(p, "/")
	cur := ""
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			cur = strings.TrimPrefix(path.Dir("/"+cur), "/")
			continue
		}
		next := join(cur, name)
		last := true
		for _, r := range rest {
			last = last && (r == "" || r == ".")
		}
		mode, link, _, err := t.lookup(next)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if err != nil || mode != unix.S_IFLNK || last && !follow {
			cur = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "resolve", Path: "/" + p, Err: unix.ELOOP}
		}
		if path.IsAbs(link) {
			cur = ""
		}
		rest = append(strings.Split(link, "/"), rest...)
	}
	return cur, nil
}

// isDir reports whether a resolved path is a folder.
func (t *target) isDir(p string) (bool, error) {
	mode, _, _, err := t.lookup(p)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return mode == unix.S_IFDIR, err
}

// owner is a numeric user and group.
type owner struct{ uid, gid int }

// mkdirAll makes a resolved path with its missing parents. Folders that exist are repeated in the layer as they are, so that the
// layer alone says what each of its folders is like.
func (t *target) mkdirAll(p string, o owner, mode int64, when time.Time) error {
	if p == "" || p == "." {
		return nil
	}
	for i := 0; i <= len(p); i++ {
		if i < len(p) && p[i] != '/' {
			continue
		}
		dir := p[:i]
		if i := t.own(dir); i != nil && !i.IsWhiteout() {
			if !i.IsDir() {
				return notFolder(dir)
			}
			continue
		}
		kind, _, st, err := t.lookup(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			h := &tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: mode, Uid: o.uid, Gid: o.gid, ModTime: when}
			if err := t.write(h, nil); err != nil {
				return err
			}
		case err != nil:
			return err
		case kind != unix.S_IFDIR:
			return notFolder(dir)
		default:
			x, err := t.lowerXattrs(dir)
			if err != nil {
				return err
			}
			h := &tar.Header{
				Typeflag: tar.TypeDir, Name: dir, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
				ModTime: time.Unix(st.Mtim.Unix()), PAXRecords: paxXattrs(x),
			}
			if err := t.w.WriteEntry(h, nil); err != nil {
				return err
			}
			t.kept[dir] = true
		}
	}
	return nil
}

func (t *target) lowerXattrs(p string) ([]string, error) {
	f, err := safepath.OpenNoLinks(t.lower, p, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return xattrs(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), true)
}

func notFolder(p string) error { return fmt.Errorf("%q is not a folder", "/"+p) }

// replace is write for what an archive holds: as tar does, a file takes the place of a folder of the stage below with all that is in
// it, and a folder that of a file or link.
func (t *target) replace(h *tar.Header, content io.Reader) error {
	if t.own(h.Name) == nil {
		was, _, _, err := t.lookup(h.Name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil && (was == unix.S_IFDIR) != (tarKind(h.Typeflag) == unix.S_IFDIR) {
			return t.append(h, content, false)
		}
	}
	return t.write(h, content)
}

// write appends an entry whose parents exist and whose name is resolved, after a look at what it would replace.
func (t *target) write(h *tar.Header, content io.Reader) error {
	kind := tarKind(h.Typeflag)
	was, _, _, err := t.lookup(h.Name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	kept := false
	if err == nil {
		switch {
		case kind == unix.S_IFDIR && was != unix.S_IFDIR:
			return fmt.Errorf("cannot copy a folder to %q, which is no folder", "/"+h.Name)
		case kind != unix.S_IFDIR && was == unix.S_IFDIR:
			return fmt.Errorf("cannot copy a file to %q, which is a folder", "/"+h.Name)
		}
		if kind == unix.S_IFDIR {
			kept = t.kept[h.Name] || t.own(h.Name) == nil
		}
	}
	return t.append(h, content, kept)
}

// append writes an entry; kept says that what the stage has in the folder still shows.
func (t *target) append(h *tar.Header, content io.Reader, kept bool) error {
	if err := t.w.WriteEntry(h, content); err != nil {
		return err
	}
	if h.ModTime.After(t.newest) && h.ModTime.Unix() <= maxEpoch {
		t.newest = h.ModTime
	}
	// A folder that takes new attributes is a change, though the stage's files in it stay.
	t.changed = true
	if kept {
		t.kept[h.Name] = true
	} else if len(t.kept) > 0 {
		delete(t.kept, h.Name)
	}
	return nil
}

func tarKind(flag byte) uint32 {
	switch flag {
	case tar.TypeDir:
		return unix.S_IFDIR
	case tar.TypeSymlink:
		return unix.S_IFLNK
	case tar.TypeChar:
		return unix.S_IFCHR
	case tar.TypeBlock:
		return unix.S_IFBLK
	case tar.TypeFifo:
		return unix.S_IFIFO
	}
	return unix.S_IFREG
}

// paxXattrs puts extended attributes, as xattrs lists them, into a tar header's form.
func paxXattrs(list []string) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]string, len(list))
	for _, x := range list {
		k, v, _ := strings.Cut(x, "\x00")
		m["SCHILY.xattr."+k] = v
	}
	return m
}

// lookupOwner reads an owner as --chown and USER have it, "user[:group]", by number or by name in the stage's own passwd and group files. A number alone stands for
// the group too, a name for its user's own group, as in Docker.
func (t *target) lookupOwner(chown string) (owner, error) {
	user, group, hasGroup := strings.Cut(chown, ":")
	uid, uerr := strconv.ParseUint(user, 10, 31)
	gid, gerr := strconv.ParseUint(group, 10, 31)
	if user == "" {
		uid, uerr = 0, nil
	}
	if uerr == nil && (!hasGroup || group == "") {
		return owner{int(uid), int(uid)}, nil
	}
	if uerr == nil && gerr == nil {
		return owner{int(uid), int(gid)}, nil
	}
	if t.lower == nil {
		return owner{}, fmt.Errorf("owner %s: there is no passwd file to look names up in", chown)
	}
	u, err := runtime.ResolveUser(t.lower, chown, nil)
	if err != nil {
		return owner{}, fmt.Errorf("owner %s: %w", chown, err)
	}
	if uerr == nil {
		u.UID = uint32(uid)
	}
	return owner{int(u.UID), int(u.GID)}, nil
}
