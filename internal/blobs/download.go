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
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
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

// Reader reads the whole blob, once: what is here from the file, the rest from what open returns for the offset at which it is to begin;
// that is stored on the way. Where others report io.EOF it reports ErrMismatch unless size and digest are right. Close ends what
// open began.
func (dl *Download) Reader(open func(off int64) (io.ReadCloser, error)) io.ReadCloser {
	return &downloadReader{dl: dl, open: open, h: sha256.New(), file: io.NewSectionReader(dl.f, 0, dl.have)}
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

// Keep makes a blob of a download that a Reader has read to its end and that a sync of the file system has covered since. It is no
// error when there is none any more.
func (s *Store) Keep(d ocispec.Digest) error {
	src, err := s.downloadPath(d)
	if err != nil {
		return err
	}
	dst, err := s.path(d)
	if err != nil {
		return err
	}
	won, err := disk.Publish(src, dst)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && !won {
		err = os.Remove(src)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("keep blob %s: %w", d, err)
	}
	return nil
}

// Settle ends the download of d, of size bytes, that a killed process left and that nobody needs to go on with: whole and right it becomes
// a blob, else it is removed. It is left alone while somebody is fetching it.
func (s *Store) Settle(d ocispec.Digest, size int64) error {
	path, err := s.downloadPath(d)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := disk.TryAcquire(path + ".lock")
	if errors.Is(err, disk.ErrLocked) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("settle download %s: %w", d, err)
	}
	whole, err := isWhole(path, d, size)
	if err == nil && whole {
		err = s.Keep(d)
	} else if err == nil {
		err = os.Remove(path)
	}
	os.Remove(path + ".lock")
	l.Release()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("settle download %s: %w", d, err)
	}
	return nil
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
	l, err := disk.TryAcquire(path + ".lock")
	if errors.Is(err, disk.ErrLocked) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("drop download %s: %w", d, err)
	}
	err = os.Remove(path)
	os.Remove(path + ".lock")
	l.Release()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("drop download %s: %w", d, err)
	}
	return nil
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
	dl   *Download
	open func(off int64) (io.ReadCloser, error)
	h    hash.Hash
	file *io.SectionReader // what was here before; nil when it is read
	net  io.ReadCloser
	err  error // sticky
}

func (r *downloadReader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, last, err := r.read(p)
	r.h.Write(p[:n])
	if last {
		err = io.EOF
		if got := ocispec.Digest("sha256:" + hex.EncodeToString(r.h.Sum(nil))); got != r.dl.d {
			err = fmt.Errorf("got %s, want %s: %w", got, r.dl.d, ErrMismatch)
		}
	}
	r.err = err
	return n, err
}

// read returns the next bytes; last says that the blob ends with them.
func (r *downloadReader) read(p []byte) (n int, last bool, err error) {
	dl := r.dl
	if r.file != nil {
		n, err := r.file.Read(p)
		if n > 0 || err != io.EOF {
			return n, false, err
		}
		r.file = nil
	}
	if dl.have == dl.size {
		return 0, true, nil
	}
	if r.net == nil {
		if r.net, err = r.open(dl.have); err != nil {
			dl.src = err
			return 0, false, err
		}
	}
	n, err = r.net.Read(p[:min(int64(len(p)), dl.size-dl.have)])
	if n > 0 {
		if _, werr := dl.f.WriteAt(p[:n], dl.have); werr != nil {
			return 0, false, fmt.Errorf("download %s: %w", dl.d, werr)
		}
		dl.have += int64(n)
	}
	if dl.have == dl.size && (err == nil || err == io.EOF) {
		return n, true, nil // what a source has beyond the size does not matter: the digest decides about what we took
	}
	if err == io.EOF {
		err = fmt.Errorf("ended after %d of %d bytes: %w", dl.have, dl.size, io.ErrUnexpectedEOF)
	}
	if err != nil {
		dl.src = err
	}
	return n, false, err
}

// Close ends the connection.
func (r *downloadReader) Close() error {
	if r.net == nil {
		return nil
	}
	err := r.net.Close()
	r.net = nil
	return err
}
