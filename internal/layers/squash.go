package layers

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"sort"

	"conex/internal/linux/mount"
	"conex/internal/ocispec"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// Squash makes one layer of several: on top of the layers base it shows what the layers added show there, bottom first. What one of
// them made and a later one deleted is not in it; what the base has and they deleted is hidden. Equal layers give an equal result. An
// Info without entries says that nothing is left: no layer is to be added then.
func (s *Store) Squash(ctx context.Context, base, added []ocispec.Digest) (_ Info, err error) {
	q := &squash{touched: map[string]bool{}, opaque: map[string]bool{}}
	st, err := s.root.Stage() // an empty folder
	if err != nil {
		return Info{}, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	all, err := s.show(ctx, st.Dir, append(append([]ocispec.Digest(nil), base...), added...))
	if err != nil {
		return Info{}, err
	}
	defer all.Close()
	if len(base) > 0 {
		if q.base, err = s.show(ctx, st.Dir, base); err != nil {
			return Info{}, err
		}
		defer q.base.Close()
	}
	var dirs []*os.File
	defer func() {
		for _, d := range dirs {
			d.Close()
		}
	}()
	for _, id := range added {
		lower, err := s.Lower(ctx, []ocispec.Digest{id})
		if err != nil {
			return Info{}, err
		}
		d, err := safepath.OpenRoot(lower[len(lower)-1])
		if err != nil {
			return Info{}, err
		}
		dirs = append(dirs, d)
	}
	if err := q.walk(ctx, "", dirs, false); err != nil {
		return Info{}, fmt.Errorf("squash layers: %w", err)
	}
	w, err := s.NewWriter(ctx)
	if err != nil {
		return Info{}, err
	}
	defer w.Close() // without effect after Commit
	if err := q.write(w, all); err != nil {
		return Info{}, fmt.Errorf("squash layers: %w", err)
	}
	if w.Entries() == 0 {
		return Info{}, nil
	}
	return w.Commit()
}

// show mounts layers, read-only, attached nowhere.
func (s *Store) show(ctx context.Context, empty string, ids []ocispec.Digest) (*os.File, error) {
	lower, err := s.Lower(ctx, ids)
	if err != nil {
		return nil, err
	}
	if len(lower) == 1 { // a single folder would be shown as it is, with its marks of deleted files
		lower = append(lower, empty)
	}
	return mount.Overlay(mount.OverlayOptions{Lower: lower})
}

// squash collects what the added layers speak of.
type squash struct {
	base *os.File // nil without one
	// touched are the paths that they name, opaque the folders of them that hide the base's, gone the base's files that they deleted.
	touched, opaque map[string]bool
	gone            []string
}

// name is what the layers say of one name.
type squashName struct {
	hides bool // the base's file of the name
	from  int  // the first layer that still shows
	kind  uint32
}

// walk looks at a folder; dirs are the layers that have it, nil for the others. hidden says that the base's folder does not show.
func (q *squash) walk(ctx context.Context, p string, dirs []*os.File, hidden bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	seen := map[string]bool{}
	var names []string
	for _, d := range dirs {
		if d == nil {
			continue
		}
		f, err := open(int(d.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		list, err := f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return err
		}
		for _, n := range list {
			if !seen[n] {
				seen[n] = true
				names = append(names, n)
			}
		}
	}
	sort.Strings(names)
	for _, n := range names {
		at := path.Join(p, n)
		if err := q.name(ctx, at, n, dirs, hidden); err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
	}
	return nil
}

func (q *squash) name(ctx context.Context, at, n string, dirs []*os.File, hidden bool) error {
	q.touched[at] = true
	var s squashName
	for i, d := range dirs {
		if d == nil {
			continue
		}
		var st unix.Stat_t
		err := unix.Fstatat(int(d.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return err
		}
		kind := st.Mode & unix.S_IFMT
		_, marks, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), n))
		if err != nil {
			return err
		}
		if kind == unix.S_IFCHR && st.Rdev == 0 || marks.whiteout && kind == unix.S_IFREG && st.Size == 0 {
			kind = 0
		}
		if kind != unix.S_IFDIR || marks.opaque || s.kind != unix.S_IFDIR {
			s.from = i // what lies below it does not show
		}
		s.hides = s.hides || kind != unix.S_IFDIR || marks.opaque
		s.kind = kind
	}
	var was uint32
	if !hidden {
		var err error
		if was, err = q.inBase(at); err != nil {
			return err
		}
	}
	switch {
	case s.kind == 0 && was != 0:
		q.gone = append(q.gone, at)
		return nil
	case s.kind != unix.S_IFDIR:
		return nil
	}
	if s.hides && was == unix.S_IFDIR {
		q.opaque[at] = true
	}
	below := make([]*os.File, len(dirs))
	defer func() {
		for _, f := range below {
			if f != nil {
				f.Close()
			}
		}
	}()
	for i := s.from; i < len(dirs); i++ {
		if dirs[i] == nil {
			continue
		}
		f, err := open(int(dirs[i].Fd()), n, unix.O_PATH|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		below[i] = f
	}
	return q.walk(ctx, at, below, hidden || s.hides || was != unix.S_IFDIR)
}

// inBase tells what type of file the base has at a path, 0 for none. No link is followed: what lies behind one is not below it.
func (q *squash) inBase(p string) (uint32, error) {
	if q.base == nil {
		return 0, nil
	}
	dir, err := safepath.OpenNoLinks(q.base, path.Dir("/"+p), unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	var st unix.Stat_t
	switch err := unix.Fstatat(int(dir.Fd()), path.Base(p), &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case nil:
		return st.Mode & unix.S_IFMT, nil
	case unix.ENOENT:
		return 0, nil
	default:
		return 0, err
	}
}

// write writes the touched files of the whole tree, and the marks of what is gone.
func (q *squash) write(w *Writer, all *os.File) error {
	if q.base == nil {
		if err := q.root(w, all); err != nil {
			return err
		}
	}
	dir, err := open(int(all.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	u := &treeWalk{
		write: w.WriteEntry, seen: map[[2]uint64]string{},
		exclude: func(p string) bool { return !q.touched[p] },
		opaque:  func(p string) bool { return q.opaque[p] },
	}
	if err := u.walk(dir, ""); err != nil {
		return err
	}
	for _, p := range q.gone {
		if err := u.whiteout(p, path.Base(p)); err != nil {
			return err
		}
	}
	return nil
}

// root writes the attributes of the root folder where they are not those that it has without an entry.
func (q *squash) root(w *Writer, all *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(all.Fd()), &st); err != nil {
		return err
	}
	x, _, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/.", all.Fd()))
	if err != nil || st.Mode&0o7777 == 0o755 && st.Uid == 0 && st.Gid == 0 && len(x) == 0 {
		return err
	}
	return w.WriteEntry(&tar.Header{
		Typeflag: tar.TypeDir, Name: "./", Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), PAXRecords: x,
	}, nil)
}
