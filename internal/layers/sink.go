package layers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"conex/internal/ocispec"
)

// blockSize is how much of a tar is read, hashed and written at a time.
const blockSize = 1 << 20

// block is a buffer that several stages read at once; the last to let go gives it back.
type block struct {
	data []byte
	refs atomic.Int32
}

// sink stores a stream in a file and hashes it, both beside the caller's own work. What fits into one block is done in place, so
// that a small layer costs no goroutines.
type sink struct {
	f io.Writer
	// past allows writes past the page cache; direct is the file behind f while it is written so (see writePast).
	past   bool
	direct *os.File
	hash   hash.Hash
	crc    uint32 // CRC-32C of the stream, valid after finish
	n      int64
	cur    *block

	started bool
	free    chan *block
	made    int
	hashes  chan *block
	writes  chan *block
	wg      sync.WaitGroup // the two stages; finish waits for them
	err     atomic.Pointer[error]
}

func newSink(f io.Writer) *sink { return &sink{f: f, hash: sha256.New()} }

// sum adds to the digest and to the checksum that makes later readings cheap to verify (OpenVerified).
func (s *sink) sum(b []byte) {
	s.hash.Write(b)
	s.crc = crc32.Update(s.crc, castagnoli(), b)
}

// depth is how many blocks are on their way at most.
const depth = 6

func (s *sink) get() *block {
	if !s.started || s.made < depth {
		select {
		case b := <-s.free:
			return b
		default:
			s.made++
			return &block{data: alignedBlock()}
		}
	}
	return <-s.free
}

func (s *sink) put(b *block) {
	if b.refs.Add(-1) == 0 {
		b.data = b.data[:0]
		s.free <- b // never blocks: it has room for all
	}
}

// send hands a block to both stages. The caller keeps extra references.
func (s *sink) send(b *block, extra int32) {
	if !s.started {
		s.started = true
		s.writePast()
		s.free = make(chan *block, depth+1)
		s.hashes = make(chan *block, depth+1)
		s.writes = make(chan *block, depth+1)
		s.wg.Add(2)
		go func() {
			defer s.wg.Done()
			for b := range s.hashes {
				s.sum(b.data)
				s.put(b)
			}
		}()
		go func() {
			defer s.wg.Done()
			for b := range s.writes {
				if s.err.Load() == nil {
					if err := s.store(b.data); err != nil {
						s.err.Store(&err)
					}
				}
				s.put(b)
			}
		}()
	}
	b.refs.Store(2 + extra)
	s.hashes <- b
	s.writes <- b
}

func (s *sink) failed() error {
	if p := s.err.Load(); p != nil {
		return *p
	}
	return nil
}

// Write appends p.
func (s *sink) Write(p []byte) (int, error) {
	if err := s.failed(); err != nil {
		return 0, err
	}
	total := len(p)
	for len(p) > 0 {
		if s.cur == nil {
			s.cur = s.get()
		}
		room := min(blockSize-len(s.cur.data), len(p))
		s.cur.data = append(s.cur.data, p[:room]...)
		p = p[room:]
		if len(s.cur.data) == blockSize {
			s.send(s.cur, 0)
			s.cur = nil
		}
	}
	s.n += int64(total)
	return total, nil
}

// finish writes what is left and returns the digest of everything. It must be called, even to give up: it ends the stages.
func (s *sink) finish() (ocispec.Digest, error) {
	if s.started {
		close(s.hashes)
		close(s.writes)
		s.wg.Wait()
		s.started = false
	}
	if err := s.failed(); err != nil {
		return "", err
	}
	if s.cur != nil {
		s.sum(s.cur.data)
		if err := s.store(s.cur.data); err != nil {
			return "", err
		}
		s.cur = nil
	}
	return ocispec.Digest("sha256:" + hex.EncodeToString(s.hash.Sum(nil))), nil
}

// tee reads a stream block by block, passes each block to a sink and lets the caller read it: no byte is copied for what
// the caller only skips.
type tee struct {
	ctx  context.Context
	src  io.Reader
	sink *sink
	cur  *block
	off  int
	err  error // of the source, met after cur
}

// fill makes sure that there is something to read.
func (t *tee) fill() error {
	if t.cur != nil && t.off < len(t.cur.data) {
		return nil
	}
	t.release()
	if t.err != nil {
		return t.err
	}
	if err := t.ctx.Err(); err != nil {
		return err
	}
	if err := t.sink.failed(); err != nil {
		return err
	}
	b := t.sink.get()
	for len(b.data) < blockSize && t.err == nil {
		var n int
		n, t.err = t.src.Read(b.data[len(b.data):blockSize])
		b.data = b.data[:len(b.data)+n]
	}
	t.sink.n += int64(len(b.data))
	t.sink.send(b, 1)
	t.cur, t.off = b, 0
	if len(b.data) == 0 {
		return t.err
	}
	return nil
}

func (t *tee) release() {
	if t.cur != nil {
		t.sink.put(t.cur)
		t.cur = nil
	}
}

// Read gives the next bytes.
func (t *tee) Read(p []byte) (int, error) {
	if err := t.fill(); err != nil {
		return 0, err
	}
	n := copy(p, t.cur.data[t.off:])
	t.off += n
	return n, nil
}

// Discard skips n bytes.
func (t *tee) Discard(n int64) (int64, error) {
	var done int64
	for done < n {
		if err := t.fill(); err != nil {
			return done, err
		}
		k := min(int64(len(t.cur.data)-t.off), n-done)
		t.off += int(k)
		done += k
	}
	return done, nil
}

// spillFile is sparse.data, made at the first write.
type spillFile struct {
	path string
	f    *os.File
	buf  []byte
	n    int64
}

// Write appends p.
func (s *spillFile) Write(p []byte) (int, error) {
	s.buf = append(s.buf, p...)
	s.n += int64(len(p))
	if len(s.buf) >= blockSize {
		return len(p), s.flush()
	}
	return len(p), nil
}

func (s *spillFile) flush() error {
	if s.f == nil {
		f, err := os.OpenFile(s.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		s.f = f
	}
	_, err := s.f.Write(s.buf)
	s.buf = s.buf[:0]
	return err
}

// Close writes the rest.
func (s *spillFile) Close() error {
	var err error
	if len(s.buf) > 0 {
		err = s.flush()
	}
	if s.f != nil {
		if cerr := s.f.Close(); err == nil {
			err = cerr
		}
	}
	return err
}
