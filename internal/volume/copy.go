package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// CopyOptions say how CopyTree copies.
type CopyOptions struct {
	// Live says that others may change the source meanwhile: what has gone when its turn comes is left out, and a file that is cut off ends
	// where it does.
	Live bool
	// Owner, unless nil, says whom a file belongs to in the copy.
	Owner func(uid, gid uint32) (newUID, newGID uint32)
	// Durable syncs what the files hold: once their names survive a power loss, so does that.
	Durable bool
}

// CopyTree makes dst, an existing empty folder of ours, a copy of the folder src (a readable handle): content, owners, modes, times,
// extended attributes, hard links, holes, devices. Blocks are shared where the file system can. Sockets are left out, as nobody listens
// on a copy. It follows no symbolic link, whatever is in src.
func CopyTree(ctx context.Context, dst string, src *os.File, o CopyOptions) error {
	d, err := os.OpenFile(dst, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	in, err := openAt(int(src.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY) // with an offset of its own
	if err != nil {
		return err
	}
	defer in.Close()
	t := &treeCopy{CopyOptions: o, ctx: ctx, root: d, links: map[[2]uint64]*linked{}, slots: make(chan struct{}, copyWorkers())}
	top := &copyFolder{src: int(in.Fd()), dst: int(d.Fd()), top: true}
	if err := unix.Fstat(top.src, &top.st); err != nil {
		return fmt.Errorf("stat %s: %w", src.Name(), err)
	}
	top.left.Store(1)
	t.folder(top, in)
	t.wg.Wait()
	if err := t.sync(); err != nil {
		return err
	}
	return ctx.Err()
}

// fewFiles is up to how many files are synced one by one, so that their copy waits for nothing else that the file system has to write.
const fewFiles = 16

// unsynced takes a file's handle for sync, unless there are too many, or nothing to sync. It reports whether it has taken it.
func (t *treeCopy) unsynced(fd int, st *unix.Stat_t) bool {
	if !t.Durable || st.Size == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.written) > fewFiles {
		return false
	}
	t.written = append(t.written, fd)
	return true
}

// sync writes to the disk what the files hold: without, an ext4 that has lost its power has their names soon, and their content only
// half a minute later. It closes the handles that unsynced took.
func (t *treeCopy) sync() error {
	err := t.err
	if err == nil && len(t.written) > fewFiles {
		err = unix.Syncfs(int(t.root.Fd()))
	}
	for _, fd := range t.written {
		if err == nil && len(t.written) <= fewFiles {
			err = unix.Fdatasync(fd)
		}
		unix.Close(fd)
	}
	return err
}

// copyWorkers is how many goroutines copy besides the first: some wait for the disk, and the kernel's own locks let no more than a few
// make names in one folder.
func copyWorkers() int { return min(2*runtime.GOMAXPROCS(0), 8) - 1 }

// copyChunk is how many names of a folder a worker takes at a time.
const copyChunk = 64

// treeCopy is one CopyTree.
type treeCopy struct {
	CopyOptions
	ctx     context.Context //nolint:containedctx // one CopyTree, which it spans
	root    *os.File        // the target
	wg      sync.WaitGroup
	slots   chan struct{}
	noClone atomic.Bool
	failed  atomic.Bool

	mu    sync.Mutex
	err   error
	links map[[2]uint64]*linked
	// written are the files that are to be synced; more than fewFiles stand for all that the file system has.
	written []int
}

// linked is the first name of a file with several.
type linked struct {
	made chan struct{} // closed when it is there, or could not be made
	path string
}

// copyFolder is a folder that is being copied. Its attributes come when nothing comes into it any more.
type copyFolder struct {
	src, dst int
	st       unix.Stat_t
	path     string // below the target
	parent   *copyFolder
	top      bool
	left     atomic.Int32 // pieces of work that are not done
}

func (t *treeCopy) fail(err error) {
	t.mu.Lock()
	if t.err == nil {
		t.err = err
	}
	t.mu.Unlock()
	t.failed.Store(true)
}

// stopped reports whether there is no point in going on.
func (t *treeCopy) stopped() bool { return t.failed.Load() || t.ctx.Err() != nil }

// spare runs f by a worker that has nothing to do, otherwise itself.
func (t *treeCopy) spare(f func()) {
	select {
	case t.slots <- struct{}{}:
		t.wg.Go(func() {
			f()
			<-t.slots
		})
	default:
		f()
	}
}

// done ends a piece of work in f. The last one gives it its attributes.
func (t *treeCopy) done(f *copyFolder) {
	for ; f != nil && f.left.Add(-1) == 0; f = f.parent {
		if !t.stopped() {
			if err := t.finish(f); err != nil {
				t.fail(fmt.Errorf("copy %s: %w", f.path, err))
			}
		}
		if !f.top {
			unix.Close(f.src)
			unix.Close(f.dst)
		}
	}
}

func (t *treeCopy) finish(f *copyFolder) error { return t.attributes(f.src, f.dst, &f.st) }

// folder copies what is in f. dir is f.src as a file.
func (t *treeCopy) folder(f *copyFolder, dir *os.File) {
	defer t.done(f)
	var files []os.DirEntry
	for !t.stopped() {
		entries, err := dir.ReadDir(1024)
		if err != nil {
			if err != io.EOF {
				t.fail(fmt.Errorf("read %s: %w", f.path, err))
			}
			break
		}
		for _, e := range entries {
			if e.IsDir() {
				t.subfolder(f, e.Name())
				continue
			}
			if files = append(files, e); len(files) == copyChunk {
				chunk := files
				files = nil
				f.left.Add(1)
				t.spare(func() { t.files(f, chunk) })
			}
		}
	}
	f.left.Add(1)
	t.files(f, files)
}

// subfolder makes a folder and has it filled.
func (t *treeCopy) subfolder(f *copyFolder, name string) {
	sub := &copyFolder{path: f.path + "/" + name, parent: f, dst: -1}
	err := func() (err error) {
		if sub.src, err = openFD(f.src, name, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
			return err
		}
		err = unix.Fstat(sub.src, &sub.st)
		if err == nil {
			err = unix.Mkdirat(f.dst, name, 0o700)
		}
		if err == nil {
			sub.dst, err = openFD(f.dst, name, unix.O_RDONLY|unix.O_DIRECTORY)
		}
		if err != nil {
			unix.Close(sub.src)
		}
		return err
	}()
	if err != nil {
		if !t.gone(err) {
			t.fail(fmt.Errorf("copy %s: %w", sub.path, err))
		}
		return
	}
	sub.left.Store(1)
	f.left.Add(1)
	t.spare(func() {
		fd, err := unix.FcntlInt(uintptr(sub.src), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.fail(fmt.Errorf("copy %s: %w", sub.path, err))
			t.done(sub)
			return
		}
		dir := os.NewFile(uintptr(fd), sub.path)
		defer dir.Close()
		t.folder(sub, dir)
	})
}

// gone reports whether an error only says that somebody has removed or replaced a file of the source since its folder was read.
func (t *treeCopy) gone(err error) bool {
	return t.Live && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EACCES))
}

func (t *treeCopy) files(f *copyFolder, entries []os.DirEntry) {
	defer t.done(f)
	for _, e := range entries {
		if t.stopped() {
			return
		}
		if err := t.file(f, e); err != nil && !t.gone(err) {
			t.fail(fmt.Errorf("copy %s/%s: %w", f.path, e.Name(), err))
		}
	}
}

// file copies what is no folder.
func (t *treeCopy) file(f *copyFolder, e os.DirEntry) error {
	name := e.Name()
	var st unix.Stat_t
	if e.Type() == 0 {
		in, err := openFD(f.src, name, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return err
		}
		defer unix.Close(in)
		if err := unix.Fstat(in, &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return unix.ENOENT // it was one
		}
		return t.linked(f, name, &st, func() error { return t.regular(in, f.dst, name, &st) })
	}
	if err := unix.Fstatat(f.src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return t.linked(f, name, &st, func() error { return t.special(f, name, &st) })
}

// linked makes a file by make, or as a further name of a file that is there.
func (t *treeCopy) linked(f *copyFolder, name string, st *unix.Stat_t, make func() error) error {
	if st.Nlink < 2 {
		return make()
	}
	key := [2]uint64{st.Dev, st.Ino}
	t.mu.Lock()
	l, known := t.links[key]
	if !known {
		l = &linked{made: newSignal(), path: f.path + "/" + name}
		t.links[key] = l
	}
	t.mu.Unlock()
	if !known {
		defer close(l.made)
		return make()
	}
	<-l.made // its worker waits for nobody
	fd, err := safepath.OpenNoLinksFD(t.root, l.path, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		err = unix.Linkat(fd, "", f.dst, name, unix.AT_EMPTY_PATH)
		unix.Close(fd)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.EMLINK) {
		return make() // the first one was left out, or can't have this name too
	}
	return err
}

func newSignal() chan struct{} { return make(chan struct{}) }

// regular copies a regular file.
func (t *treeCopy) regular(in, dir int, name string, st *unix.Stat_t) error {
	out, err := openFD(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	err = t.data(in, out, st)
	if err == nil {
		err = t.attributes(in, out, st)
	}
	if err == nil && t.unsynced(out, st) {
		return nil
	}
	return errors.Join(err, unix.Close(out))
}

// special makes a link, device or pipe.
func (t *treeCopy) special(f *copyFolder, name string, st *unix.Stat_t) error {
	kind := st.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFSOCK:
		return nil
	case unix.S_IFDIR, unix.S_IFREG:
		return unix.ENOENT // somebody has replaced it
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(f.src, name, buf)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(string(buf[:n]), f.dst, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(f.dst, name, kind|0o600, int(st.Rdev)); err != nil {
			return err
		}
	}
	own := *st
	t.own(&own)
	return attributes(f.dst, name, fmt.Sprintf("/proc/self/fd/%d/%s", f.src, name), &own)
}

func (t *treeCopy) own(st *unix.Stat_t) {
	if t.Owner != nil {
		st.Uid, st.Gid = t.Owner(st.Uid, st.Gid)
	}
}

// attributes gives the open file or folder out what in has. The order is that of the function attributes.
func (t *treeCopy) attributes(in, out int, st *unix.Stat_t) error {
	own := *st
	t.own(&own)
	if err := unix.Fchown(out, int(own.Uid), int(own.Gid)); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	if err := unix.Fchmod(out, own.Mode&0o7777); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	n, err := unix.Flistxattr(in, nil)
	if err == nil && n > 0 {
		err = copyXattrs(fmt.Sprintf("/proc/self/fd/%d", out), fmt.Sprintf("/proc/self/fd/%d", in), true)
	}
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	times := [2]unix.Timespec{own.Atim, own.Mtim}
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(out), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("set times: %w", errno)
	}
	return nil
}

// smallFile is up to what length, in bytes, a read and a write are faster than asking the kernel to copy.
const smallFile = 128 << 10

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// data copies a file's content: as a clone, else what is no hole.
func (t *treeCopy) data(in, out int, st *unix.Stat_t) error {
	if st.Size == 0 {
		return nil
	}
	if !t.noClone.Load() {
		switch err := unix.IoctlFileClone(out, in); err {
		case nil:
			return nil
		case unix.ENOSPC, unix.EDQUOT, unix.EIO:
			return err
		case unix.EXDEV, unix.EOPNOTSUPP, unix.ENOTTY:
			t.noClone.Store(true)
		}
	}
	if st.Blocks*512 >= st.Size || st.Size <= 4096 {
		return t.extent(in, out, 0, st.Size)
	}
	for off := int64(0); off < st.Size; {
		data, err := unix.Seek(in, off, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && data >= st.Size {
			break // a hole to the end
		}
		end := st.Size
		if err != nil { // no holes on this file system
			data = off
		} else if end, err = unix.Seek(in, data, unix.SEEK_HOLE); err != nil || end > st.Size {
			end = st.Size
		}
		if err := t.extent(in, out, data, end); err != nil {
			return err
		}
		off = end
	}
	return unix.Ftruncate(out, st.Size)
}

// extent copies the bytes from off to end, or to the file's end.
func (t *treeCopy) extent(in, out int, off, end int64) error {
	for end-off > smallFile {
		if t.stopped() {
			return t.ctx.Err()
		}
		a, b := off, off
		n, err := unix.CopyFileRange(in, &a, out, &b, int(min(end-off, 8<<20)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			break // between these two it can't
		}
		off += int64(n)
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for off < end {
		if t.stopped() {
			return t.ctx.Err()
		}
		n, err := unix.Pread(in, (*buf)[:min(int64(len(*buf)), end-off)], off)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		for w := 0; w < n; {
			k, err := unix.Pwrite(out, (*buf)[w:n], off+int64(w))
			if err != nil && err != unix.EINTR {
				return err
			}
			w += max(k, 0)
		}
		off += int64(n)
	}
	return nil
}

func openFD(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
