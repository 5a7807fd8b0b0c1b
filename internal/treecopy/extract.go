package treecopy

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"conex/internal/layertar"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// Extract puts what is in a tar below the folder dir of root, a handle: as Copy would with what tar says. Links that are there, in dir
// or on the way to an entry, are followed inside root, as by a tar that runs there; names with ".." are refused. Folders that the tar
// does not name are made. What was made before an error stays.
func Extract(ctx context.Context, r io.Reader, root *os.File, dir string, o Options) (size int64, err error) {
	x := &extractor{copier: copier{Options: o, ctx: ctx, root: root}, dir: strings.TrimRight(dir, "/")}
	defer x.close()
	end := &endReader{r: r}
	tr := tar.NewReader(end)
	for {
		if err := ctx.Err(); err != nil {
			return x.size, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return x.size, damaged(x.last, err)
		}
		if err := x.entry(h, tr); err != nil {
			return x.size, err
		}
		x.last = h.Name
	}
	if err := x.whole(end); err != nil {
		return x.size, err
	}
	if err := x.folderTimes(); err != nil {
		return x.size, err
	}
	// Behind the end comes padding, whose writer must not find a closed pipe.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return x.size, damaged(x.last, err)
	}
	return x.size + tarEnd, nil
}

// whole checks a tar that has been read to its end.
func (x *extractor) whole(end *endReader) error {
	switch {
	case !x.Complete:
		return nil
	case x.last == "":
		return errors.New("the archive is empty: it has no entry, not even one for its top")
	case !end.zeros():
		return damaged(x.last, errors.New("it ends without a mark of its end: it was cut off"))
	}
	return nil
}

// endReader knows the last block of what was read from it.
type endReader struct {
	r    io.Reader
	last []byte
}

func (e *endReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	const block = 512
	e.last = append(e.last, p[max(0, n-block):n]...)
	e.last = append(e.last[:0], e.last[max(0, len(e.last)-block):]...)
	return n, err
}

// zeros reports whether that is all zeros.
func (e *endReader) zeros() bool { return len(bytes.Trim(e.last, "\x00")) == 0 }

func damaged(last string, err error) error {
	if last == "" {
		return fmt.Errorf("no tar, or damaged at its beginning: %w", err)
	}
	return fmt.Errorf("tar damaged after entry %q: %w", last, err)
}

// extractor is a copier whose source is a tar.
type extractor struct {
	copier
	dir  string // below root, where the tar begins
	last string // the entry before
	// parent is the folder of the last entry, open.
	parent     *os.File
	parentName string
	folders    []folderTime
	buf        []byte
}

// folderTime is a folder's modification time, to be set when nothing comes into it any more.
type folderTime struct {
	path string
	a    attributes
}

func (x *extractor) close() {
	if x.parent != nil {
		x.parent.Close()
	}
}

func (x *extractor) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := x.name(h.Name)
	if err != nil {
		return err
	}
	if name == "" {
		return x.topFolder(h)
	}
	at := x.dir + "/" + name
	if err := x.enter(path.Dir(name)); err != nil {
		return fail(at, err)
	}
	dir, as := int(x.parent.Fd()), path.Base(name)
	x.count(at)
	a, err := headerAttributes(h)
	if err != nil {
		return fail(at, err)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = x.makeDir(dir, as, at, a)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		err = x.makeRegular(dir, as, at, h.Size, a, r)
	case tar.TypeSymlink:
		if h.Linkname == "" || strings.IndexByte(h.Linkname, 0) >= 0 {
			return fail(at, errors.New("a symbolic link that leads nowhere"))
		}
		err = x.symlink(h.Linkname, a, dir, as, at)
	case tar.TypeLink:
		err = x.hardlink(h.Linkname, dir, as, at)
	case tar.TypeFifo:
		err = x.node(unix.S_IFIFO, 0, a, dir, as, at)
	case tar.TypeChar, tar.TypeBlock:
		kind := uint32(unix.S_IFCHR)
		if h.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		const major, minor = 1<<12 - 1, 1<<20 - 1
		if h.Devmajor < 0 || h.Devmajor > major || h.Devminor < 0 || h.Devminor > minor {
			return fail(at, errors.New("a device number that no device has"))
		}
		err = x.node(kind, unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)), a, dir, as, at)
	default:
		err = fmt.Errorf("unknown type %q of tar entry", h.Typeflag)
	}
	return fail(at, err)
}

// topFolder gives the folder that everything goes into its attributes, if it is to have them.
func (x *extractor) topFolder(h *tar.Header) error {
	if !x.Top || h.Typeflag != tar.TypeDir {
		return nil
	}
	a, err := headerAttributes(h)
	if err != nil {
		return fail("/", err)
	}
	dir, err := safepath.Open(x.root, x.dir+"/.", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fail("/", err)
	}
	defer dir.Close()
	x.folders = append(x.folders, folderTime{x.dir + "/.", a})
	return fail("/", x.apply(int(dir.Fd()), a))
}

// name checks an entry's name and returns it without what does not count; "" is the top.
func (x *extractor) name(name string) (string, error) {
	parts, err := layertar.Split(strings.TrimLeft(name, "/"))
	if err == nil {
		return strings.Join(parts, "/"), nil
	}
	if clean := path.Clean("/" + x.dir + "/" + name); clean != path.Clean("/"+x.dir) && !strings.HasPrefix(clean, strings.TrimRight(path.Clean("/"+x.dir), "/")+"/") {
		return "", fmt.Errorf("tar entry %q is outside of %q", name, "/"+strings.TrimLeft(x.dir, "/"))
	}
	return "", &layertar.EntryError{Name: name, Err: err}
}

// enter opens the folder of an entry and makes it where it is missing.
func (x *extractor) enter(name string) error {
	if x.parent != nil && x.parentName == name {
		return nil
	}
	x.close()
	x.parent = nil
	p := x.dir + "/" + name
	f, err := safepath.Open(x.root, p, unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = safepath.MkdirAll(x.root, p, 0o755)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return &ConflictError{Path: p}
	}
	if err != nil {
		return err
	}
	x.parent, x.parentName = f, name
	return nil
}

func headerAttributes(h *tar.Header) (attributes, error) {
	const maxID = 1<<32 - 2 // the last one means "leave it"
	if h.Uid < 0 || h.Uid > maxID || h.Gid < 0 || h.Gid > maxID {
		return attributes{}, fmt.Errorf("owner %d:%d, which nobody has", h.Uid, h.Gid)
	}
	a := attributes{mode: uint32(h.Mode) & 0o7777, uid: h.Uid, gid: h.Gid, mtime: timespec(h.ModTime)}
	a.atime = a.mtime
	if !h.AccessTime.IsZero() {
		a.atime = timespec(h.AccessTime)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && layertar.KeepXattr(name) && strings.IndexByte(name, 0) < 0 {
			if a.xattrs == nil {
				a.xattrs = map[string]string{}
			}
			a.xattrs[name] = v
		}
	}
	return a, nil
}

// timespec holds a time within what every file system takes.
func timespec(t time.Time) unix.Timespec {
	const first, last = -1 << 31, 1<<34 - 1 // ext4's range
	return unix.Timespec{Sec: max(first, min(t.Unix(), last)), Nsec: int64(t.Nanosecond())}
}

func (x *extractor) makeDir(dir int, as, at string, a attributes) error {
	fd, err := x.makeFolder(dir, as, at)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	x.folders = append(x.folders, folderTime{at, a})
	return x.apply(fd, a)
}

// folderTimes gives the folders their times, the last ones first. One that somebody has replaced meanwhile keeps its own.
func (x *extractor) folderTimes() error {
	for i := len(x.folders) - 1; i >= 0; i-- {
		t := &x.folders[i]
		f, err := safepath.Open(x.root, t.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		err = futimes(int(f.Fd()), t.a)
		f.Close()
		if err != nil {
			return fail(t.path, fmt.Errorf("set times: %w", err))
		}
	}
	return nil
}

// makeRegular writes a file's content; blocks of zeros become holes.
func (x *extractor) makeRegular(dir int, as, at string, size int64, a attributes, r io.Reader) error {
	fd, mounted, err := x.create(dir, as, at)
	if err != nil {
		return err
	}
	err = x.pour(fd, size, r)
	if err == nil && !mounted {
		err = x.apply(fd, a)
	}
	return errors.Join(err, unix.Close(fd))
}

var zeros [64 << 10]byte

func (x *extractor) pour(fd int, size int64, r io.Reader) error {
	if x.buf == nil {
		x.buf = make([]byte, 256<<10)
	}
	off, hole := int64(0), false
	for off < size {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, x.buf[:min(int64(len(x.buf)), size-off)])
		if err != nil {
			return fmt.Errorf("the tar ends in it: %w", err)
		}
		for b := x.buf[:n]; len(b) > 0; {
			k := min(len(b), len(zeros))
			hole = k == len(zeros) && bytes.Equal(b[:k], zeros[:])
			if !hole {
				if err := pwriteAll(fd, b[:k], off); err != nil {
					return err
				}
			}
			off += int64(k)
			b = b[k:]
		}
		x.content(int64(n))
	}
	x.size += (tarBlock - size%tarBlock) % tarBlock
	if hole {
		return unix.Ftruncate(fd, size)
	}
	return nil
}

func pwriteAll(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// hardlink makes a further name of an entry before, or of a file that is there.
func (x *extractor) hardlink(target string, dir int, as, at string) error {
	name, err := x.name(target)
	if err != nil {
		return err
	}
	if name == "" {
		return errors.New("a hard link to a folder")
	}
	f, err := safepath.Open(x.root, x.dir+"/"+name, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", target, errors.Unwrap(err))
	}
	defer f.Close()
	return x.linkTo(int(f.Fd()), dir, as, at)
}
