package blobs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Download is a blob on its way here. What has come lies in downloads/<hex> and stays there when its process ends, however it ends: the
// next Download of the same blob goes on where this one stopped. downloads/<hex>.lock is held under flock meanwhile, so one process
// fetches and the others wait for it.
type Download struct {
	store *Store
	d     ocispec.Digest
	size  int64
	path  string
	f     *os.File
	lock  *disk.Lock
	have  int64
	src   error // the last error of the network's side
}

func (s *Store) downloadPath(d ocispec.Digest) (string, error) {
	hexa, ok := hexOf(d)
	if !ok {
		return "", fmt.Errorf("digest %q is not a sha256: %w", string(d), ErrNotFound)
	}
	return s.root.Path("downloads", hexa), nil
}

// Download begins or goes on with the download of d, of size bytes. While another process is at it, waiting (may be nil) is called and
// Download waits. Close it. The caller holds a lease on d, and looks again afterwards whether it still needs the blob.
func (s *Store) Download(ctx context.Context, d ocispec.Digest, size int64, waiting func()) (*Download, error) {
	path, err := s.downloadPath(d)
	if err != nil {
		return nil, err
	}
	take := func(acquire func() (*disk.Lock, error)) (*disk.Lock, error) {
		l, err := acquire()
		if errors.Is(err, fs.ErrNotExist) { // a root of before there was the folder
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return nil, err
			}
			l, err = acquire()
		}
		return l, err
	}
	l, err := take(func() (*disk.Lock, error) { return disk.TryAcquire(path + ".lock") })
	if errors.Is(err, disk.ErrLocked) {
		if waiting != nil {
			waiting()
		}
		l, err = take(func() (*disk.Lock, error) { return disk.AcquireContext(ctx, path+".lock") })
	}
	if err != nil {
		return nil, fmt.Errorf("download %s: %w", d, err)
	}
	dl := &Download{store: s, d: d, size: size, path: path, lock: l}
	if dl.f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		dl.release()
		return nil, fmt.Errorf("download %s: %w", d, err)
	}
	fi, err := dl.f.Stat()
	if err == nil && fi.Size() > size { // of another promise of the size
		err = dl.f.Truncate(0)
	} else if err == nil {
		dl.have = fi.Size()
	}
	if err != nil {
		dl.Close() // the first error counts
		return nil, fmt.Errorf("download %s: %w", d, err)
	}
	return dl, nil
}

// Have is how many bytes are here.
func (dl *Download) Have() int64 { return dl.have }

// Reader reads the whole blob, once: what is here from the file, the rest as it comes from what open returns for the offset at which it is
// to begin. A goroutine fetches and stores as fast as it can, however slowly the caller reads: what has come shall not wait in a
// socket, where a kill would lose it. Where others report io.EOF the reader reports ErrMismatch unless size and digest are right. Close
// ends the context of open and waits for the goroutine.
func (dl *Download) Reader(ctx context.Context, open func(ctx context.Context, off int64) (io.ReadCloser, error)) io.ReadCloser {
	ctx, cancel := context.WithCancel(ctx)
	r := &downloadReader{dl: dl, open: open, cancel: cancel, have: dl.have, done: make(chan struct{})}
	r.more.L = &r.mu
	go func() { // Close waits for it
		defer close(r.done)
		r.finish(r.fetch(ctx))
	}()
	return r
}

// Broken reports whether the last Reader was ended by its source rather than by what the bytes are or by who read them: then what has
// come is worth keeping.
func (dl *Download) Broken() bool { return dl.src != nil }

// Reset throws away what has come.
func (dl *Download) Reset() error {
	dl.have, dl.src = 0, nil
	if err := dl.f.Truncate(0); err != nil {
		return fmt.Errorf("download %s: %w", dl.d, err)
	}
	return nil
}

// Discard removes the download, whole or not, and closes it.
func (dl *Download) Discard() error {
	if dl.lock == nil {
		return nil
	}
	err := os.Remove(dl.path)
	if cerr := dl.Close(); err == nil || errors.Is(err, fs.ErrNotExist) {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("download %s: %w", dl.d, err)
	}
	return nil
}

// Close lets others go on. What has come stays.
func (dl *Download) Close() error {
	if dl.lock == nil {
		return nil
	}
	var err error
	if dl.f != nil {
		err = dl.f.Close()
	}
	dl.release()
	return err
}

func (dl *Download) release() {
	if fi, err := os.Lstat(dl.path); err == nil && fi.Size() == 0 {
		os.Remove(dl.path) // nothing came
	}
	os.Remove(dl.path + ".lock") // while it is locked: who waits for it finds that it has no name any more, and makes a new one
	dl.lock.Release()
	dl.lock = nil
}

// Keep makes a blob of the download of d, of size bytes, that a Reader has read to its end and that a sync of the file system has covered
// since. It is no error when there is none any more, or when somebody else fetches d again: whoever does that will keep it.
func (s *Store) Keep(d ocispec.Digest, size int64) error {
	path, err := s.downloadPath(d)
	if err != nil {
		return err
	}
	// Since the Reader's end others may have kept it, removed the blob and begun anew: what lies here need not be whole.
	return s.idle(d, path, func() error {
		if fi, err := os.Lstat(path); err != nil || fi.Size() != size {
			return err
		}
		return s.publish(d, path)
	})
}

// idle runs fn under the lock of a download, unless somebody is fetching it. A file that is not there is no error.
func (s *Store) idle(d ocispec.Digest, path string, fn func() error) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := disk.TryAcquire(path + ".lock")
	if errors.Is(err, disk.ErrLocked) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("download %s: %w", d, err)
	}
	err = fn()
	os.Remove(path + ".lock")
	l.Release()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("download %s: %w", d, err)
	}
	return nil
}

// publish makes the file of a download a blob.
func (s *Store) publish(d ocispec.Digest, path string) error {
	dst, err := s.path(d)
	if err != nil {
		return err
	}
	won, err := disk.Publish(path, dst)
	if err == nil && !won {
		err = os.Remove(path)
	}
	return err
}

// Settle ends the download of d, of size bytes, that a killed process left and that nobody needs to go on with: whole and right it becomes
// a blob, else it is removed. It is left alone while somebody is fetching it.
func (s *Store) Settle(d ocispec.Digest, size int64) error {
	path, err := s.downloadPath(d)
	if err != nil {
		return err
	}
	return s.idle(d, path, func() error {
		whole, err := isWhole(path, d, size)
		if err != nil {
			return err
		}
		if whole {
			return s.publish(d, path)
		}
		return os.Remove(path)
	})
}

// isWhole verifies a download, and sees to it that it is on the disk if it is whole.
func isWhole(path string, d ocispec.Digest, size int64) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != size {
		return false, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return false, err
	}
	if ocispec.Digest("sha256:"+hex.EncodeToString(h.Sum(nil))) != d {
		return false, nil
	}
	return true, f.Sync()
}

// DropDownload removes what has come of d, unless somebody is fetching it.
func (s *Store) DropDownload(d ocispec.Digest) error {
	path, err := s.downloadPath(d)
	if err != nil {
		return err
	}
	return s.idle(d, path, func() error { return os.Remove(path) })
}

// Partial is a download that may go on some day.
type Partial struct {
	Digest ocispec.Digest
	// Size is how many bytes are here, DiskSize what they take on the disk.
	Size, DiskSize int64
	// Used is when the last of them came.
	Used time.Time
}

// Downloads lists what lies in downloads/, fetched by somebody at this moment or not.
func (s *Store) Downloads() ([]Partial, error) {
	entries, err := os.ReadDir(s.root.Path("downloads"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list downloads: %w", err)
	}
	var list []Partial
	for _, e := range entries {
		if !isHex64(e.Name()) {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list downloads: %w", err)
		}
		list = append(list, Partial{ocispec.Digest("sha256:" + e.Name()), fi.Size(), disk.Allocated(fi), fi.ModTime()})
	}
	return list, nil
}

// downloadReader is Download.Reader's.
type downloadReader struct {
	dl     *Download
	open   func(ctx context.Context, off int64) (io.ReadCloser, error)
	cancel context.CancelFunc
	done   chan struct{} // closed when the goroutine has ended
	off    int64         // what was read

	mu     sync.Mutex
	more   sync.Cond // have or err has changed
	have   int64     // what may be read
	err    error     // how it ended, io.EOF for well
	closed bool
}

// Read gives what is there, and waits if nothing is.
func (r *downloadReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	for r.off == r.have && r.err == nil {
		r.more.Wait()
	}
	have, err := r.have, r.err
	r.mu.Unlock()
	if r.off == have {
		return 0, err
	}
	n, err := r.dl.f.ReadAt(p[:min(int64(len(p)), have-r.off)], r.off)
	r.off += int64(n)
	if err != nil {
		return n, fmt.Errorf("download %s: %w", r.dl.d, err)
	}
	return n, nil
}

// Close ends the download where it is.
func (r *downloadReader) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	<-r.done
	return nil
}

// finish tells the reader how the goroutine ended.
func (r *downloadReader) finish(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	r.more.Broadcast()
}

// chunk is how much is taken from the network at a time, flushEvery how much is left to the kernel before it is told to write it out: so
// the sync at the end of a pull finds little to do. In bytes.
const (
	chunk      = 256 << 10
	flushEvery = 8 << 20
)

// fetch gets what is missing. It returns io.EOF when all is there and right.
func (r *downloadReader) fetch(ctx context.Context) error {
	dl, h, buf := r.dl, sha256.New(), make([]byte, chunk)
	if dl.have > 0 {
		if _, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(dl.f, 0, dl.have)}, buf); err != nil {
			return fmt.Errorf("download %s: %w", dl.d, err)
		}
	}
	if dl.have < dl.size {
		if err := r.copy(ctx, h, buf); err != nil {
			return err
		}
	}
	if got := ocispec.Digest("sha256:" + hex.EncodeToString(h.Sum(nil))); got != dl.d {
		return fmt.Errorf("got %s, want %s: %w", got, dl.d, ErrMismatch)
	}
	return io.EOF
}

// copy stores and hashes what comes from the network until the blob is whole.
func (r *downloadReader) copy(ctx context.Context, h hash.Hash, buf []byte) error {
	dl := r.dl
	src, err := r.open(ctx, dl.have)
	if err != nil {
		return r.broken(err)
	}
	defer src.Close() // only read from
	flushed := dl.have
	for dl.have < dl.size { // what a source has beyond the size does not matter: the digest decides about what we took
		n, err := src.Read(buf[:min(int64(len(buf)), dl.size-dl.have)])
		if n > 0 {
			if _, werr := dl.f.WriteAt(buf[:n], dl.have); werr != nil {
				return fmt.Errorf("download %s: %w", dl.d, werr)
			}
			h.Write(buf[:n])
			dl.have += int64(n)
			r.mu.Lock()
			r.have = dl.have
			r.more.Signal()
			r.mu.Unlock()
			if dl.have-flushed >= flushEvery {
				// Only a hint: the sync at the end writes what this did not.
				_ = unix.SyncFileRange(int(dl.f.Fd()), flushed, dl.have-flushed, unix.SYNC_FILE_RANGE_WRITE)
				flushed = dl.have
			}
		}
		if err == io.EOF && dl.have < dl.size {
			err = fmt.Errorf("ended after %d of %d bytes: %w", dl.have, dl.size, io.ErrUnexpectedEOF)
		}
		if err != nil && err != io.EOF {
			return r.broken(err)
		}
	}
	return nil
}

// broken notes that the source failed, unless it did because nobody wants to read any more.
func (r *downloadReader) broken(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.dl.src = err
	}
	return err
}
