package layers

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"conex/internal/layertar"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// dirDriver keeps a layer unpacked. It works on any kernel that has overlayfs.
type dirDriver struct{}

func (dirDriver) name() string { return DriverDir }

// finish unpacks layer.tar into fs/, keeps in tar.split what is not in fs/, and drops the tar. Unpacking from the finished
// tree, not from the stream, means that nothing hostile is ever half unpacked.
func (dirDriver) finish(ctx context.Context, dir string, c content) (int64, error) {
	tarPath, spillPath := filepath.Join(dir, "layer.tar"), filepath.Join(dir, "sparse.data")
	u := &unpacker{ctx: ctx, first: map[*layertar.Inode]string{}}
	var err error
	if u.tar, err = os.Open(tarPath); err != nil {
		return 0, err
	}
	defer u.tar.Close()
	if c.spill > 0 {
		if u.spill, err = os.Open(spillPath); err != nil {
			return 0, err
		}
		defer u.spill.Close()
	}
	if err := u.unpack(filepath.Join(dir, "fs"), c.tree); err != nil {
		return 0, err
	}
	n, err := writeSplit(filepath.Join(dir, "tar.split"), u.tar, c.size, u.files)
	if err != nil {
		return 0, err
	}
	if err := os.Remove(tarPath); err != nil {
		return 0, err
	}
	if c.spill > 0 {
		if err := os.Remove(spillPath); err != nil {
			return 0, err
		}
	}
	return n + u.disk, nil
}

func (dirDriver) lower(_ context.Context, s *Store, m meta) (string, error) {
	return filepath.Join(s.dir(m.DiffID), "fs"), nil
}

func (d dirDriver) verify(ctx context.Context, dir string, m meta) error {
	r, err := d.openTar(dir)
	if err != nil {
		return err
	}
	defer r.Close()
	out := newSink(io.Discard)
	t := &tee{ctx: ctx, src: r, sink: out}
	defer t.release()
	tree, err := layertar.Scan(t, io.Discard)
	id, serr := out.finish()
	if errors.Is(err, errSplit) || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, layertar.ErrRefused) {
		return fmt.Errorf("%w: %w", ErrDigest, err)
	}
	if err == nil {
		err = serr
	}
	if err == nil && id != m.DiffID {
		err = fmt.Errorf("%w: the files give %s", ErrDigest, id)
	}
	if err == nil {
		err = compareTree(filepath.Join(dir, "fs"), tree)
	}
	return err
}

// ctxReader ends a copy when its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// stored is a file of the tar whose content can be read back from fs/.
type stored struct {
	path         string
	offset, size int64
}

// unpacker makes a tree's files. It goes from folder handle to folder handle and creates every name itself in a folder
// that nobody else can reach, so no link can lead it astray.
type unpacker struct {
	ctx   context.Context
	tar   *os.File
	spill *os.File
	root  *os.File
	first map[*layertar.Inode]string // where a file with several names was made
	files []stored
	disk  int64
}

func (u *unpacker) unpack(path string, t *layertar.Tree) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	root, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	u.root = root
	return u.fill(root, "", t.Root())
}

// fill makes what is in a folder and then gives the folder its attributes: making files changes its time.
func (u *unpacker) fill(dir *os.File, path string, d *layertar.Inode) error {
	if err := u.ctx.Err(); err != nil {
		return err
	}
	for _, name := range d.Names() {
		p := name
		if path != "" {
			p = path + "/" + name
		}
		if err := u.make(dir, name, p, d.Child(name)); err != nil {
			return fmt.Errorf("unpack %s: %w", p, err)
		}
	}
	fd := int(dir.Fd())
	if err := unix.Fchown(fd, int(d.UID), int(d.GID)); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, d.Mode&0o7777); err != nil {
		return err
	}
	list := d.Xattrs
	for _, m := range d.Marks() {
		list = append(list[:len(list):len(list)], layertar.Xattr{Name: overlayPrefix() + m.Name, Value: m.Value})
	}
	if err := setXattrs(list, func(name string, value []byte) error { return unix.Fsetxattr(fd, name, value, 0) }); err != nil {
		return err
	}
	return futimes(fd, d)
}

// overlayPrefix begins the marks that overlayfs reads: the trusted ones need privilege, the user ones the mount option
// userxattr.
func overlayPrefix() string {
	if os.Geteuid() == 0 {
		return "trusted.overlay."
	}
	return "user.overlay."
}

func times(i *layertar.Inode) []unix.Timespec {
	t := unix.Timespec{Sec: i.Sec, Nsec: int64(i.Nsec)}
	return []unix.Timespec{t, t}
}

func futimes(fd int, i *layertar.Inode) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), times(i), 0)
}

// setXattrs sets what the file system and our privileges allow. What a kernel without the security module, or a file system
// without the namespace, can't keep is left out, as every engine does; a refusal of a file capability is an error.
func setXattrs(list []layertar.Xattr, set func(name string, value []byte) error) error {
	for _, x := range list {
		err := set(x.Name, []byte(x.Value))
		switch {
		case err == nil, err == unix.ENOTSUP:
		case err == unix.EPERM && strings.HasPrefix(x.Name, "security.") && x.Name != "security.capability":
		default:
			return fmt.Errorf("extended attribute %s: %w", x.Name, err)
		}
	}
	return nil
}

func (u *unpacker) make(dir *os.File, name, path string, i *layertar.Inode) error {
	fd := int(dir.Fd())
	if i.IsDir() {
		if err := unix.Mkdirat(fd, name, 0o700); err != nil {
			return err
		}
		sub, err := open(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		u.disk += 4096
		err = u.fill(sub, path, i)
		if cerr := sub.Close(); err == nil {
			err = cerr
		}
		return err
	}
	if i.Nlink > 1 {
		if old, ok := u.first[i]; ok {
			return u.link(old, fd, name)
		}
		u.first[i] = path
	}
	switch i.Type() {
	case unix.S_IFREG:
		return u.file(fd, name, path, i)
	case unix.S_IFLNK:
		if err := unix.Symlinkat(i.Target, fd, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(fd, name, i.Mode, int(unix.Mkdev(i.Major, i.Minor))); err != nil {
			return err
		}
		if i.IsWhiteout() {
			return nil
		}
	}
	if err := unix.Fchownat(fd, name, int(i.UID), int(i.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if i.Type() != unix.S_IFLNK {
		if err := unix.Fchmodat(fd, name, i.Mode&0o7777, 0); err != nil { // no link: we made it, nobody else is here
			return err
		}
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
	if err := setXattrs(i.Xattrs, func(n string, v []byte) error { return unix.Lsetxattr(at, n, v, 0) }); err != nil {
		return err
	}
	return unix.UtimesNanoAt(fd, name, times(i), unix.AT_SYMLINK_NOFOLLOW)
}

func open(dir int, name string, flags int, mode uint32) (*os.File, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

func (u *unpacker) link(old string, dir int, name string) error {
	parent, base := filepath.Split(old)
	p, err := safepath.OpenNoLinks(u.root, parent, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer p.Close()
	return unix.Linkat(int(p.Fd()), base, dir, name, 0)
}

func (u *unpacker) file(dir int, name, path string, i *layertar.Inode) error {
	f, err := open(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = u.write(f, i)
	if err == nil {
		// The owner first: changing it takes set-user-ID bits and capabilities away.
		err = f.Chown(int(i.UID), int(i.GID))
	}
	fd := int(f.Fd())
	if err == nil {
		err = unix.Fchmod(fd, i.Mode&0o7777)
	}
	if err == nil {
		err = setXattrs(i.Xattrs, func(n string, v []byte) error { return unix.Fsetxattr(fd, n, v, 0) })
	}
	if err == nil {
		err = futimes(fd, i)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if !i.Sparse && i.Size > 0 {
		u.files = append(u.files, stored{path, i.Offset, i.Size})
	}
	return err
}

func (u *unpacker) write(f *os.File, i *layertar.Inode) error {
	if !i.Sparse {
		u.disk += (i.Size + 4095) &^ 4095
		return copyRange(f, u.tar, i.Offset, i.Size)
	}
	if err := f.Truncate(i.Size); err != nil {
		return err
	}
	buf := make([]byte, layertar.SparseChunk)
	for _, e := range i.Extents {
		if _, err := u.spill.ReadAt(buf, e.At); err != nil {
			return err
		}
		n := min(int64(len(buf)), i.Size-e.Off)
		if _, err := f.WriteAt(buf[:n], e.Off); err != nil {
			return err
		}
		u.disk += layertar.SparseChunk
	}
	return nil
}

// copyRange appends a range of src to dst, inside the kernel where that is possible.
func copyRange(dst, src *os.File, off, size int64) error {
	for size > 0 {
		n, err := unix.CopyFileRange(int(src.Fd()), &off, int(dst.Fd()), nil, int(min(size, 1<<30)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			_, err := io.Copy(dst, io.NewSectionReader(src, off, size))
			return err
		}
		size -= int64(n)
	}
	return nil
}

// tar.split is a gzip stream of a signature and then pairs: a number of bytes and the bytes, which stand in the tar as they
// are; then the length of a path and the path, and the size of that file in fs/, whose content follows in the tar. The
// last pair has an empty path. Numbers are unsigned varints.
const splitSignature = "conex tar.split 1\n"

var errSplit = errors.New("damaged tar.split")

func writeSplit(path string, tar *os.File, size int64, files []stored) (int64, error) {
	sort.Slice(files, func(a, b int) bool { return files[a].offset < files[b].offset })
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close() // closed once more below, where the error counts
	w, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return 0, err
	}
	b := bufio.NewWriterSize(w, 64<<10)
	if _, err := b.WriteString(splitSignature); err != nil {
		return 0, err
	}
	var num [binary.MaxVarintLen64]byte
	number := func(n int64) error {
		_, err := b.Write(num[:binary.PutUvarint(num[:], uint64(n))])
		return err
	}
	at := int64(0)
	for _, file := range append(files, stored{offset: size}) {
		err := number(file.offset - at)
		if err == nil {
			_, err = io.Copy(b, io.NewSectionReader(tar, at, file.offset-at))
		}
		if err == nil {
			err = number(int64(len(file.path)))
		}
		if err == nil {
			_, err = b.WriteString(file.path)
		}
		if err == nil {
			err = number(file.size)
		}
		if err != nil {
			return 0, err
		}
		at = file.offset + file.size
	}
	if err := b.Flush(); err != nil {
		return 0, err
	}
	if err := w.Close(); err != nil {
		return 0, err
	}
	n, err := f.Seek(0, io.SeekCurrent)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return n, err
}

func (dirDriver) openTar(dir string) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(dir, "tar.split"))
	if err != nil {
		return nil, err
	}
	j := &joiner{file: f}
	if j.root, err = safepath.OpenRoot(filepath.Join(dir, "fs")); err == nil {
		var z *gzip.Reader
		if z, err = gzip.NewReader(f); err == nil {
			j.split = bufio.NewReader(z)
			sig := make([]byte, len(splitSignature))
			if _, err = io.ReadFull(j.split, sig); err == nil && string(sig) != splitSignature {
				err = errSplit
			}
		}
		if err == nil {
			err = j.next()
		}
	}
	if err != nil {
		j.Close()
		return nil, err
	}
	return j, nil
}

// joiner puts a tar together from tar.split and fs/.
type joiner struct {
	file  *os.File
	root  *os.File
	split *bufio.Reader
	raw   int64    // left of the bytes in tar.split
	in    bool     // a file's content comes now
	path  string   // of that file
	cur   *os.File // nil until somebody reads it
	left  int64
	last  bool
}

// number reads a varint below a sane limit.
func (j *joiner) number() (int64, error) {
	n, err := binary.ReadUvarint(j.split)
	if err != nil || n > 1<<42 {
		return 0, errSplit
	}
	return int64(n), nil
}

func (j *joiner) next() (err error) {
	j.raw, err = j.number()
	return err
}

// Read gives the tar's next bytes.
func (j *joiner) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := j.piece(); err != nil {
		return 0, err
	}
	if j.raw > 0 {
		n, err := j.split.Read(p[:min(int64(len(p)), j.raw)])
		j.raw -= int64(n)
		if err != nil {
			return n, errSplit
		}
		return n, nil
	}
	if err := j.seek(0); err != nil {
		return 0, err
	}
	n, err := j.cur.Read(p[:min(int64(len(p)), j.left)])
	j.left -= int64(n)
	if err == io.EOF {
		return n, fmt.Errorf("%s is too short: %w", j.cur.Name(), errSplit)
	}
	return n, err
}

// Discard skips n bytes, fewer at the end only, which is io.EOF. Files that are skipped as a whole are not even opened.
func (j *joiner) Discard(n int64) (int64, error) {
	var done int64
	for done < n {
		if err := j.piece(); err != nil {
			return done, err
		}
		if j.raw > 0 {
			k, err := j.split.Discard(int(min(n-done, j.raw, 1<<30)))
			j.raw -= int64(k)
			done += int64(k)
			if err != nil {
				return done, errSplit
			}
			continue
		}
		k := min(n-done, j.left)
		if j.cur != nil || k < j.left { // the rest of it may be read after all
			if err := j.seek(k); err != nil {
				return done, err
			}
		}
		j.left -= k
		done += k
	}
	return done, nil
}

// seek opens the file, if it is not open, and skips k bytes of it.
func (j *joiner) seek(k int64) error {
	if j.cur == nil {
		var err error
		if j.cur, err = safepath.OpenNoLinks(j.root, j.path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
	}
	if k == 0 {
		return nil
	}
	_, err := j.cur.Seek(k, io.SeekCurrent)
	return err
}

// piece goes on to a piece with something left in it: raw bytes if raw is above 0, else a file. The end is io.EOF.
func (j *joiner) piece() error {
	for j.raw == 0 && (!j.in || j.left == 0) {
		if j.in {
			j.in = false
			if j.cur != nil {
				err := j.cur.Close()
				if j.cur = nil; err != nil {
					return err
				}
			}
			if err := j.next(); err != nil {
				return err
			}
			continue
		}
		if j.last {
			return io.EOF
		}
		n, err := j.number()
		if err != nil || n > layertar.MaxPath {
			return errSplit
		}
		path := make([]byte, n)
		if _, err := io.ReadFull(j.split, path); err != nil {
			return errSplit
		}
		if j.left, err = j.number(); err != nil {
			return err
		}
		if n == 0 {
			j.last = true
			continue
		}
		j.in, j.path = true, string(path)
	}
	return nil
}

// Close releases the files.
func (j *joiner) Close() error {
	for _, f := range []*os.File{j.root, j.cur} {
		if f != nil {
			f.Close() // only read
		}
	}
	return j.file.Close()
}
