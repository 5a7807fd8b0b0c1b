package logs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/zstd"
)

// blocks are the blocks of a file of the driver "local".
type blocks interface {
	// count is how many there are now.
	count() (int64, error)
	// head reads the head of block k.
	head(k int64) (blockHead, error)
	// load fills buf, which has the first n bytes of block k already, and returns how many it has then.
	load(k int64, buf []byte, n int) (int, error)
}

// localSource is a file of the driver "local" for a reader.
type localSource struct {
	f      *os.File
	packed bool
	b      blocks
	// buf has the first n bytes of block k, of which pos have been read. Before the first use it is nil.
	buf  []byte
	k    int64
	n    int
	pos  int
	base int64
}

func openLocalSource(f *os.File, packed bool) (source, error) {
	s := &localSource{f: f, packed: packed, b: plainBlocks{f}}
	if packed {
		b, err := openPacked(f)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		s.b = b
	}
	return s, nil
}

func (s *localSource) grows() bool                  { return !s.packed }
func (s *localSource) modified() (time.Time, error) { return modified(s.f) }

func (s *localSource) close() {
	if p, ok := s.b.(*packedBlocks); ok && p.z != nil {
		p.z.Close()
	}
	s.f.Close()
}

// behind bounds how far before a line's place its beginning is looked for, in blocks: a line that is unfinished for longer loses it.
const behind = 64

// seek goes to block k, or so far before it that the lines are whole which are unfinished there. It returns the block's head.
func (s *localSource) seek(k int64) (blockHead, error) {
	h, err := s.b.head(k)
	if err != nil {
		return h, err
	}
	at := k * blockSize
	first := at
	for _, o := range h.open {
		if o > 0 {
			first = min(first, max(0, at-int64(o)))
		}
	}
	if b := first / blockSize; b < k && k-b <= behind {
		if h, err = s.b.head(b); err != nil {
			return h, err
		}
		k = b
	}
	s.k, s.n, s.pos = k, 0, 0
	return h, nil
}

// search returns the last block for which before holds, which it does for the first.
func (s *localSource) search(count int64, before func(blockHead) bool) (int64, error) {
	lo, hi := int64(0), count
	for hi-lo > 1 {
		mid := lo + (hi-lo)/2
		h, err := s.b.head(mid)
		switch {
		case errors.Is(err, errFormat): // a damaged one: the next one says it, or none is left
			k := mid + 1
			for ; k < hi; k++ {
				if h, err = s.b.head(k); !errors.Is(err, errFormat) {
					break
				}
			}
			if k == hi || err == nil && !before(h) {
				hi = mid
			} else if err == nil {
				lo = k
			}
			if err != nil && !errors.Is(err, errFormat) {
				return 0, err
			}
		case err != nil:
			return 0, err
		case before(h):
			lo = mid
		default:
			hi = mid
		}
	}
	return lo, nil
}

func (s *localSource) tail(n int) (found int, skip uint64, err error) {
	count, err := s.b.count()
	if err != nil || count == 0 {
		return 0, 0, err
	}
	// How many lines there are in all is what the last block whose head is whole says.
	var t tally
	for k := count - 1; ; k-- {
		if k < 0 {
			return 0, 0, nil
		}
		if t, err = s.tally(k); err == nil {
			break
		} else if !errors.Is(err, errFormat) {
			return 0, 0, err
		}
	}
	total := t.lines // what is unfinished comes on top
	if uint64(n) >= total {
		s.k, s.n, s.pos = 0, 0, 0
		return int(total), 0, nil
	}
	target := total - uint64(n)
	k, err := s.search(count, func(h blockHead) bool { return h.lines <= target })
	if err != nil {
		return 0, 0, err
	}
	h, err := s.seek(k)
	if errors.Is(err, errFormat) {
		s.k, s.n, s.pos = k, 0, 0
		return n, 0, nil
	}
	return n, target - h.lines, err
}

// tally counts what there is up to the end of block k.
func (s *localSource) tally(k int64) (tally, error) {
	h, err := s.b.head(k)
	if err != nil {
		return tally{}, err
	}
	s.k, s.n, s.pos = k, 0, 0
	t := h.start(k * blockSize)
	for {
		at := s.pos
		f, err := s.frame()
		if err == io.EOF || errors.Is(err, errFormat) {
			return t, nil
		}
		if err != nil {
			return t, err
		}
		t.add(f, k*blockSize+int64(at))
	}
}

func (s *localSource) continued() bool {
	if s.k > 0 {
		return false
	}
	h, err := s.b.head(0)
	return err == nil && h.open != [2]uint32{}
}

func (s *localSource) since(t time.Time) error {
	count, err := s.b.count()
	if err != nil || count == 0 {
		return err
	}
	ns := t.UnixNano()
	k, err := s.search(count, func(h blockHead) bool { return h.newest < ns })
	if err != nil {
		return err
	}
	if _, err = s.seek(k); errors.Is(err, errFormat) {
		s.k, s.n, s.pos = k, 0, 0
		return nil
	}
	return err
}

// frame returns the next frame of the block; io.EOF says that there is none now.
func (s *localSource) frame() (frame, error) {
	if s.buf == nil {
		s.buf = make([]byte, blockSize)
	}
	for again := false; ; again = true {
		if s.pos == 0 && s.n >= headSize {
			var h blockHead
			if err := h.decode(s.buf[:s.n]); err != nil {
				s.n = 0
				return frame{}, err
			}
			s.base, s.pos = h.base, headSize
		}
		if s.pos > 0 {
			f, n, err := decodeFrame(s.buf[s.pos:s.n], s.base)
			if err == nil {
				s.pos += n
				return f, nil
			}
			if again || s.n == len(s.buf) && err == io.EOF {
				return f, err
			}
			// What was read while it was written, or before it was cut off, is read again.
			s.n = s.pos
		}
		n, err := s.b.load(s.k, s.buf, s.n)
		if err != nil {
			return frame{}, err
		}
		s.n = n
		if s.pos == 0 && s.n < headSize {
			return frame{}, io.EOF
		}
	}
}

// next returns the file's next frame, leaving out what is damaged; io.EOF says that there is none now.
func (s *localSource) next() (frame, error) {
	for last := false; ; {
		f, err := s.frame()
		if err == nil || err != io.EOF && !errors.Is(err, errFormat) {
			return f, err
		}
		if last {
			s.k, s.n, s.pos, last = s.k+1, 0, 0, false
			continue
		}
		count, err := s.b.count()
		if err != nil {
			return f, err
		}
		if s.k+1 >= count {
			return f, io.EOF
		}
		last = true // there is a next block; what came to this one since it was read comes first
	}
}

func (s *localSource) drain(ctx context.Context, r *reader) error {
	for n := 0; ; n++ {
		if n%64 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		f, err := s.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if f.kind == frameEnd {
			err = r.endLines()
		} else {
			err = r.chunk(stream(f.kind), f.data, f.time)
		}
		if err != nil {
			return err
		}
	}
}

// plainBlocks are those of a file that isn't compressed, and may grow.
type plainBlocks struct{ f *os.File }

func (p plainBlocks) count() (int64, error) {
	st, err := p.f.Stat()
	if err != nil {
		return 0, err
	}
	return (st.Size() + blockSize - 1) / blockSize, nil
}

func (p plainBlocks) head(k int64) (h blockHead, err error) {
	var b [headSize]byte
	if _, err := p.f.ReadAt(b[:], k*blockSize); err != nil && err != io.EOF {
		return h, err
	}
	return h, h.decode(b[:])
}

func (p plainBlocks) load(k int64, buf []byte, n int) (int, error) {
	m, err := p.f.ReadAt(buf[n:], k*blockSize+int64(n))
	if err == io.EOF {
		err = nil
	}
	return n + m, err
}

// Behind the compressed blocks is a skippable frame: its head, for each block the head and the compressed length, and packedTail.
const (
	skippable  = 0x184d2a5c
	skipHead   = 8
	entrySize  = headSize + 4
	packedTail = 16 // count of blocks, CRC-32C of the entries, magic
	packMagic  = 0x7864696c786e6f63
	// maxBlocks is far above what a file has: 32 TB.
	maxBlocks = 1 << 28
)

// packedBlocks are those of a compressed file.
type packedBlocks struct {
	f     *os.File
	heads []blockHead
	ends  []int64 // where each one ends
	z     *zstd.Decoder
	in    []byte
}

func openPacked(f *os.File) (*packedBlocks, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var tail [packedTail]byte
	at := st.Size() - packedTail
	if at < skipHead {
		return nil, errFormat
	}
	if _, err := f.ReadAt(tail[:], at); err != nil {
		return nil, err
	}
	count := int64(binary.LittleEndian.Uint32(tail[:]))
	if binary.LittleEndian.Uint64(tail[8:]) != packMagic || count > maxBlocks || count*entrySize > at-skipHead {
		return nil, errFormat
	}
	index := make([]byte, count*entrySize)
	at -= int64(len(index))
	if _, err := f.ReadAt(index, at); err != nil {
		return nil, err
	}
	if crc32.Checksum(index, castagnoli()) != binary.LittleEndian.Uint32(tail[4:]) {
		return nil, errFormat
	}
	p := &packedBlocks{f: f, heads: make([]blockHead, count), ends: make([]int64, count)}
	end := int64(0)
	for i := range p.heads {
		e := index[i*entrySize:]
		// A damaged head is that of a block which readers leave out.
		if err := p.heads[i].decode(e); err != nil && !errors.Is(err, errFormat) {
			return nil, err
		} else if err != nil {
			p.heads[i].base = damaged
		}
		end += int64(binary.LittleEndian.Uint32(e[headSize:]))
		p.ends[i] = end
	}
	if end > at-skipHead {
		return nil, errFormat
	}
	return p, nil
}

// damaged marks the head of a block that is damaged.
const damaged = -1 << 63

func (p *packedBlocks) count() (int64, error) { return int64(len(p.heads)), nil }

func (p *packedBlocks) head(k int64) (blockHead, error) {
	if p.heads[k].base == damaged {
		return blockHead{}, errFormat
	}
	return p.heads[k], nil
}

func (p *packedBlocks) load(k int64, buf []byte, n int) (int, error) {
	if n > 0 || k >= int64(len(p.heads)) {
		return n, nil // it doesn't change
	}
	start := int64(0)
	if k > 0 {
		start = p.ends[k-1]
	}
	size := int(p.ends[k] - start)
	if size > 2*blockSize {
		return 0, nil // no block is as long: damaged
	}
	if cap(p.in) < size {
		p.in = make([]byte, size)
	}
	in := p.in[:size]
	if _, err := p.f.ReadAt(in, start); err != nil {
		return 0, err
	}
	if p.z == nil {
		var err error
		ondemand.Compress()
		if p.z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(blockSize), zstd.WithDecoderMaxWindow(blockSize)); err != nil {
			return 0, err
		}
	}
	out, err := p.z.DecodeAll(in, buf[:0])
	if err != nil || len(out) > len(buf) {
		return 0, nil // damaged: left out, as a plain one is
	}
	return len(out), nil
}

// packLocal compresses block by block.
func packLocal(out io.Writer, in *os.File, stop <-chan struct{}) error {
	ondemand.Compress()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(blockSize))
	if err != nil {
		return err
	}
	defer z.Close()
	buf := make([]byte, blockSize)
	var packed, index []byte
	src := &stopper{in, stop}
	for {
		n, err := io.ReadFull(src, buf)
		if n == 0 && err == io.EOF {
			break
		}
		if err != nil && err != io.ErrUnexpectedEOF {
			return err
		}
		packed = z.EncodeAll(buf[:n], packed[:0])
		if _, err := out.Write(packed); err != nil {
			return err
		}
		clear(buf[n:])
		index = append(index, buf[:headSize]...)
		index = binary.LittleEndian.AppendUint32(index, uint32(len(packed)))
	}
	b := binary.LittleEndian.AppendUint32(nil, skippable)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(index)+packedTail))
	b = append(b, index...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(index)/entrySize))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(index, castagnoli()))
	b = binary.LittleEndian.AppendUint64(b, packMagic)
	_, err = out.Write(b)
	return err
}
