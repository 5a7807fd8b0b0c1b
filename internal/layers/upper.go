package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"time"

	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// WriteUpper makes a layer of an overlay's upper folder: what a RUN step changed. Only this folder is walked. Overlayfs's
// whiteouts and opaque folders become OCI's, hard links stay links, extended attributes stay (without overlayfs's own), and
// sockets are left out. exclude, which may be nil, gets a path without leading slash and leaves it out, with all
// that is in it. Nobody may change the folder meanwhile. An empty folder gives a layer too, an empty tar.
//
// The overlay must have been mounted without redirect_dir and metacopy: with them a folder or file in upper may borrow from
// another place, and is an error here.
func (s *Store) WriteUpper(ctx context.Context, upper string, exclude func(path string) bool) (Info, error) {
	w, err := s.NewWriter(ctx)
	if err != nil {
		return Info{}, err
	}
	defer w.Close() // without effect after Commit
	if err := w.AddUpper(upper, exclude); err != nil {
		return Info{}, fmt.Errorf("layer of %s: %w", upper, err)
	}
	return w.Commit()
}

// AddUpper appends what WriteUpper says to a layer in the making.
func (w *Writer) AddUpper(upper string, exclude func(path string) bool) error {
	return w.addUpper(&treeWalk{exclude: exclude}, upper)
}

// AddLiveUpper is AddUpper for a folder that may change meanwhile, as WriteTree has it.
func (w *Writer) AddLiveUpper(upper string, exclude func(path string) bool, changed func(path string)) error {
	return w.addUpper(&treeWalk{exclude: exclude, changed: changed}, upper)
}

// AddTree appends what is in the folder root, a readable handle, which may change meanwhile, to a layer in the making.
func (w *Writer) AddTree(root *os.File) error {
	dir, err := open(int(root.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	u := &treeWalk{write: w.WriteEntry, layer: true, changed: func(string) {}, seen: map[[2]uint64]string{}}
	return u.walk(dir, "")
}

func (w *Writer) addUpper(u *treeWalk, upper string) error {
	dir, err := os.OpenFile(upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	u.write, u.upper, u.seen = w.WriteEntry, true, map[[2]uint64]string{}
	return u.walk(dir, "")
}

// treeWalk turns a folder into entries.
type treeWalk struct {
	write func(h *tar.Header, content io.Reader) error
	// upper says that the folder is an overlay's upper one: overlayfs's marks become OCI's.
	upper bool
	// layer says that the entries become a layer's.
	layer bool
	// exclude leaves a path out; nil: nothing.
	exclude func(string) bool
	// changed is told of each file that was cut off while it was read; nil: nobody may change anything.
	changed func(path string)
	// opaque marks folders that hide what lies below them, besides those that overlayfs has marked; nil: none.
	opaque func(path string) bool
	seen   map[[2]uint64]string // device and inode of files with several names, and their first name
}

// gone reports whether err only says that somebody else removed or replaced what a live tree had there.
func (u *treeWalk) gone(err error) bool {
	return u.changed != nil && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESTALE))
}

// walk writes what is in a folder, in byte order. It opens every name relative to the folder's handle and follows no link:
// what ran in the container chose the names.
func (u *treeWalk) walk(dir *os.File, path string) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	sort.Strings(names)
	for _, name := range names {
		p := name
		if path != "" {
			p = path + "/" + name
		}
		if u.exclude != nil && u.exclude(p) {
			continue
		}
		if err := u.entry(dir, name, p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

func (u *treeWalk) entry(dir *os.File, name, path string) error {
	fd := int(dir.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if u.gone(err) {
			return nil
		}
		return err
	}
	h := &tar.Header{
		Name: path, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK {
		return nil
	}
	if kind == unix.S_IFCHR && st.Rdev == 0 && u.upper {
		return u.whiteout(path, name)
	}
	if strings.HasPrefix(name, layertar.WhiteoutPrefix) && (u.upper || u.layer) {
		return fmt.Errorf("a file name in a layer can't begin with %q, which marks deleted files there", layertar.WhiteoutPrefix)
	}
	x, mark, err := readXattrs(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
	if err != nil {
		if u.gone(err) {
			return nil
		}
		return err
	}
	if !u.upper {
		mark = marks{} // overlayfs's own, of a folder that is looked at past it
	}
	if mark.whiteout && kind == unix.S_IFREG && st.Size == 0 {
		return u.whiteout(path, name)
	}
	if mark.borrows != "" {
		return fmt.Errorf("it carries %s: mount the overlay with redirect_dir=off,metacopy=off", mark.borrows)
	}
	h.PAXRecords = x
	if kind == unix.S_IFDIR {
		return u.folder(fd, name, path, h, mark.opaque)
	}
	key := [2]uint64{st.Dev, st.Ino}
	if st.Nlink > 1 {
		if first, ok := u.seen[key]; ok {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			return u.write(h, nil)
		}
		u.seen[key] = path
	}
	switch kind {
	case unix.S_IFREG:
		f, err := u.open(fd, name)
		if err != nil || f == nil {
			if err == nil || u.gone(err) {
				delete(u.seen, key)
				return nil
			}
			return err
		}
		defer f.Close()
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		if u.changed != nil {
			return u.live(f, h, path)
		}
		return u.write(h, f)
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(fd, name, buf)
		if err != nil {
			if u.gone(err) || u.changed != nil && err == unix.EINVAL {
				return nil
			}
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(buf[:n])
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
		if kind == unix.S_IFCHR {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return fmt.Errorf("unknown file type %o", kind)
	}
	return u.write(h, nil)
}

func (u *treeWalk) folder(fd int, name, path string, h *tar.Header, opaque bool) error {
	h.Typeflag = tar.TypeDir
	if err := u.write(h, nil); err != nil {
		return err
	}
	if opaque || u.opaque != nil && u.opaque(path) {
		if err := u.write(&tar.Header{Typeflag: tar.TypeReg, Name: path + "/" + layertar.OpaqueName}, nil); err != nil {
			return err
		}
	}
	sub, err := open(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		if u.gone(err) {
			return nil
		}
		return err
	}
	defer sub.Close()
	return u.walk(sub, path)
}

// open opens a regular file. In a live tree something else may have taken its name: nil then, and it has not been opened, since opening a
// device is an order to it.
func (u *treeWalk) open(dir int, name string) (*os.File, error) {
	if u.changed == nil {
		return open(dir, name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	h, err := open(dir, name, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(h.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, err
	}
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", h.Fd()), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}

// live writes a file that somebody may be writing to: as long as it is when it is opened, and with zeros for what was cut off since. One
// that says to be empty is read to see whether that is true, since those of /proc say so.
func (u *treeWalk) live(f *os.File, h *tar.Header, path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	h.Size = st.Size
	var content io.Reader = f
	if st.Size == 0 {
		b, err := io.ReadAll(io.LimitReader(f, maxUnsized))
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
		h.Size, content = int64(len(b)), bytes.NewReader(b)
	}
	p := &padded{r: content, left: h.Size}
	if err := u.write(h, p); err != nil {
		return err
	}
	if p.short {
		u.changed(path)
	}
	return nil
}

// maxUnsized bounds what is read of a file that says to be empty.
const maxUnsized = 1 << 20

// padded reads left bytes, zeros once r has ended.
type padded struct {
	r     io.Reader
	left  int64
	short bool
}

func (p *padded) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.left)]
	if !p.short {
		n, err := p.r.Read(b)
		p.left -= int64(n)
		if n > 0 || err != io.EOF {
			return n, err
		}
		p.short = true
	}
	clear(b)
	p.left -= int64(len(b))
	return len(b), nil
}

func (u *treeWalk) whiteout(path, name string) error {
	p := strings.TrimSuffix(path, name) + layertar.WhiteoutPrefix + name
	return u.write(&tar.Header{Typeflag: tar.TypeReg, Name: p}, nil)
}

// marks are overlayfs's own extended attributes of a file.
type marks struct {
	opaque   bool
	whiteout bool
	borrows  string // name of the attribute that makes the file depend on another place
}

// readXattrs returns a file's extended attributes as PAX records, and overlayfs's apart.
func readXattrs(path string) (map[string]string, marks, error) {
	var m marks
	names, err := listXattrs(path)
	if err != nil || len(names) == 0 {
		return nil, m, err
	}
	var out map[string]string
	for _, name := range names {
		rest, ours := strings.CutPrefix(name, "trusted.overlay.")
		if !ours {
			rest, ours = strings.CutPrefix(name, "user.overlay.")
		}
		if !ours && !layertar.KeepXattr(name) {
			continue
		}
		value, err := getXattr(path, name)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, m, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		if !ours {
			if out == nil {
				out = map[string]string{}
			}
			out["SCHILY.xattr."+name] = value
			continue
		}
		switch rest {
		case "opaque":
			m.opaque = value == "y"
		case "whiteout":
			m.whiteout = true
		case "redirect", "metacopy":
			m.borrows = name
		}
	}
	return out, m, nil
}

func listXattrs(path string) ([]string, error) {
	var small [512]byte
	buf := small[:]
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ERANGE {
		buf = make([]byte, 64<<10) // the kernel's limit
		n, err = unix.Llistxattr(path, buf)
	}
	if err == unix.ENOTSUP {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	return strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 }), nil
}

func getXattr(path, name string) (string, error) {
	var small [512]byte
	n, err := unix.Lgetxattr(path, name, small[:])
	if err == nil {
		return string(small[:n]), nil
	}
	if err != unix.ERANGE {
		return "", err
	}
	buf := make([]byte, 64<<10)
	n, err = unix.Lgetxattr(path, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
