package build

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sync/atomic"

	"conex/internal/safepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The hash of a file's content in fingerprints is the sha256 of its bytes, or of a file longer than a chunk that of the chunks' hashes one
// after the other: so several processors can work on one large file.
const chunk = 4 << 20

// contentHash computes it from a stream.
type contentHash struct {
	chunk, chunks hash.Hash
	n             int // bytes in chunk
	long          bool
}

func newContentHash() *contentHash { return &contentHash{chunk: sha256.New(), chunks: sha256.New()} }

// Write never fails.
func (c *contentHash) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		if c.n == chunk {
			c.next()
		}
		k := min(chunk-c.n, len(p))
		c.chunk.Write(p[:k])
		c.n += k
		p = p[k:]
	}
	return total, nil
}

func (c *contentHash) next() {
	var sum [sha256.Size]byte
	c.chunks.Write(c.chunk.Sum(sum[:0]))
	c.chunk.Reset()
	c.n, c.long = 0, true
}

// sum ends the stream and begins another.
func (c *contentHash) sum() (sum [sha256.Size]byte) {
	if !c.long {
		c.chunk.Sum(sum[:0])
	} else {
		c.next()
		c.chunks.Sum(sum[:0])
	}
	c.chunk.Reset()
	c.chunks.Reset()
	c.n, c.long = 0, false
	return sum
}

// regular is an open file without what *os.File does for pipes and terminals: of a context there are many.
type regular struct {
	fd   int
	path string
}

// Read is io.Reader's.
func (r *regular) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(r.fd, p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

func (r *regular) close() { unix.Close(r.fd) }

// stat is what the kernel says of the file now.
func (r *regular) stat() (fileStat, error) {
	var st unix.Stat_t
	if err := unix.Fstat(r.fd, &st); err != nil {
		return fileStat{}, fmt.Errorf("stat %s: %w", r.path, err)
	}
	return statOf(&st), nil
}

// open opens a regular file of a selection and brings its stat up to date: it may have changed since the walk.
func (v *view) open(it *item) (*regular, error) {
	// O_NONBLOCK: should it be a pipe by now, nobody waits for a writer.
	fd, err := safepath.OpenNoLinksFD(v.root, it.path, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %q: it was there and is gone: the files must stay while they are copied", "/"+it.path)
	}
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", "/"+it.path, err)
	}
	r := &regular{fd, it.path}
	st, err := r.stat()
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("read %q: it was a file and is none any more", "/"+it.path)
	}
	if err != nil {
		r.close()
		return nil, err
	}
	it.st = st
	return r, nil
}

// openFile is open for who seeks in the file.
func (v *view) openFile(it *item) (*os.File, error) {
	r, err := v.open(it)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(r.fd), it.path), nil
}

// hashFile hashes as much of a file as its stat says that there is. short says that there was less.
func (v *view) hashFile(ctx context.Context, it *item, h *contentHash) (sum [sha256.Size]byte, short bool, err error) {
	r, err := v.open(it)
	if err != nil {
		return sum, false, err
	}
	defer r.close()
	if it.st.Size > chunk {
		sum, short, err = r.hashChunks(ctx, it.st.Size)
	} else {
		var n int64
		n, err = copyUpTo(h, r, it.st.Size)
		sum, short = h.sum(), n < it.st.Size
		if it.st.Size == 0 { // what can't be read says so, though nothing of it would be copied
			if _, rerr := r.Read(make([]byte, 1)); rerr != io.EOF {
				err, short = rerr, true
			}
		}
	}
	if err != nil {
		return sum, false, fmt.Errorf("read %s: %w", it.path, err)
	}
	return sum, short, nil
}

// hashChunks hashes a file of more than one chunk, side by side.
func (r *regular) hashChunks(ctx context.Context, size int64) (sum [sha256.Size]byte, short bool, err error) {
	count := (size + chunk - 1) / chunk
	sums := make([]byte, count*sha256.Size)
	var next, read atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range min(int64(runtime.GOMAXPROCS(0)), count) {
		g.Go(func() error {
			h := sha256.New()
			for {
				k := next.Add(1) - 1
				if k >= count {
					return nil
				}
				if err := ctx.Err(); err != nil {
					return err
				}
				h.Reset()
				at := k * chunk
				n, err := copyUpTo(h, &readAt{r.fd, at}, min(chunk, size-at))
				if err != nil {
					return err
				}
				read.Add(n)
				h.Sum(sums[k*sha256.Size : k*sha256.Size])
			}
		})
	}
	if err := g.Wait(); err != nil {
		return sum, false, err
	}
	return sha256.Sum256(sums), read.Load() < size, nil
}

// readAt reads a file from a place on.
type readAt struct {
	fd int
	at int64
}

// Read is io.Reader's.
func (r *readAt) Read(p []byte) (int, error) {
	for {
		n, err := unix.Pread(r.fd, p, r.at)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		r.at += int64(n)
		return n, nil
	}
}
