// Package inflate decodes gzip (RFC 1952) and the deflate streams in it (RFC 1951), the same ones that the standard library's gzip
// does, at more than twice its speed: it is what a pull spends most of its time on. It owns no files.
package inflate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

var (
	// ErrHeader says that what should be a gzip header is none; it may be what follows a complete stream.
	ErrHeader = errors.New("gzip: invalid header")
	// ErrCorrupt says that the compressed data is damaged.
	ErrCorrupt = errors.New("gzip: corrupt data")
	// ErrChecksum says that the data was decoded but is not what was compressed.
	ErrChecksum = errors.New("gzip: checksum mismatch")
	// ErrTruncated says that the stream ends too early; it is an io.ErrUnexpectedEOF.
	ErrTruncated = truncated{}
)

type truncated struct{}

func (truncated) Error() string        { return "gzip: unexpected end of data" }
func (truncated) Is(target error) bool { return target == io.ErrUnexpectedEOF }

const (
	inSize  = 128 << 10
	window  = 32 << 10 // how far back a distance reaches
	outSize = 128 << 10
)

// Reader decodes one or more gzip members. It holds 300 KB, and reads its source in pieces of up to 128 KB, so possibly more of it
// than it has given out.
type Reader struct {
	src    io.Reader
	srcErr error // sticky; io.EOF too

	in      []byte
	ip, end int // in[ip:end] is what was read and not yet used
	bits    uint64
	nb      uint // so many of the lowest bits of bits count

	state   state
	final   bool
	stored  int  // bytes that are left of a stored block
	fixed   bool // lit and dist are the fixed code's
	lit     [litSize]uint32
	dist    [distSize]uint32
	symbols [numLit]uint32 // entries of literals and lengths, but for the code

	slab []byte // the window, and behind it what is decoded for small reads
	r, w int    // slab[r:w] is to be given out
	base int    // slab[base:w] is of this member

	crc, size uint32 // of this member so far
	err       error  // sticky
}

// NewReader returns a Reader of src, whose first header it reads.
func NewReader(src io.Reader) (*Reader, error) {
	d := newReader(src, make([]byte, inSize), make([]byte, window+outSize+outMargin))
	if err := d.member(); err != nil {
		return nil, err
	}
	return d, nil
}

func newReader(src io.Reader, in, slab []byte) *Reader {
	d := &Reader{src: src, in: in, slab: slab}
	for i := range d.symbols {
		switch {
		case i < endSymbol:
			d.symbols[i] = isLiteral | uint32(i)<<16
		case i == endSymbol:
			d.symbols[i] = isSpecial | isEnd
		default:
			d.symbols[i] = lengths[i-257]
		}
	}
	return d
}

// Read gives the next bytes. What fits into p beyond the window is decoded in place, so that large reads are cheaper; p is scratch space
// beyond what is returned.
func (d *Reader) Read(p []byte) (int, error) {
	if d.r < d.w {
		n := copy(p, d.slab[d.r:d.w])
		d.r += n
		return n, nil
	}
	if len(p) == 0 {
		return 0, d.err
	}
	for d.err == nil {
		if len(p) >= 2*window {
			if n := d.direct(p); n > 0 {
				return n, nil
			}
			continue
		}
		d.decode(outSize)
		if d.r < d.w {
			n := copy(p, d.slab[d.r:d.w])
			d.r += n
			return n, nil
		}
	}
	return 0, d.err
}

// WriteTo writes all that is left to w.
func (d *Reader) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if d.r < d.w {
			n, err := w.Write(d.slab[d.r:d.w])
			d.r += n
			total += int64(n)
			if err != nil {
				return total, err
			}
			if d.r < d.w {
				return total, io.ErrShortWrite
			}
		}
		if d.err == io.EOF {
			return total, nil
		}
		if d.err != nil {
			return total, d.err
		}
		d.decode(outSize)
	}
}

// direct decodes into p and returns how many bytes. The first ones come by way of the slab, as they need the window before them.
func (d *Reader) direct(p []byte) int {
	d.decode(window)
	n := copy(p, d.slab[d.r:d.w])
	d.r += n
	if n < window || d.r < d.w || d.err != nil || d.state == atEnd || len(p) < n+outMargin {
		return n
	}
	at, err := d.blocks(p, n, 0)
	d.sum(p[n:at])
	d.w = copy(d.slab, p[at-window:at])
	d.r, d.base = d.w, 0
	d.settle(err)
	return at
}

// decode decodes up to size bytes, and a few more, into the slab, whose bytes have all been given out.
func (d *Reader) decode(size int) {
	err := d.fill(size)
	d.sum(d.slab[d.r:d.w])
	d.settle(err)
}

// fill is decode up to the point where the deflate stream ends.
func (d *Reader) fill(size int) error {
	if d.w+size+outMargin > len(d.slab) {
		cut := d.w - window
		copy(d.slab, d.slab[cut:d.w])
		d.w = window
		d.base = max(0, d.base-cut)
	}
	d.r = d.w
	var err error
	d.w, err = d.blocks(d.slab[:d.w+size+outMargin], d.w, d.base)
	return err
}

func (d *Reader) sum(p []byte) {
	d.crc = crc32.Update(d.crc, crc32.IEEETable, p)
	d.size += uint32(len(p))
}

// settle ends the member when its deflate stream has ended, and begins the next one.
func (d *Reader) settle(err error) {
	if err == nil && d.state == atEnd {
		if err = d.trailer(); err == nil {
			err = d.member()
		}
	}
	d.err = err
}

// trailer checks what follows a member's data.
func (d *Reader) trailer() error {
	d.drop()
	var b [8]byte
	if err := d.full(b[:]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(b[:]) != d.crc || binary.LittleEndian.Uint32(b[4:]) != d.size {
		return ErrChecksum
	}
	return nil
}

// member reads the header of a member; io.EOF when the source has ended before it.
func (d *Reader) member() error {
	if d.ip == d.end {
		d.more()
		if d.ip == d.end {
			return d.srcErr
		}
	}
	var b [10]byte
	if err := d.full(b[:]); err != nil {
		return err
	}
	if b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 {
		return ErrHeader
	}
	flags := b[3]
	sum := crc32.ChecksumIEEE(b[:])
	if flags&4 != 0 { // extra fields
		if err := d.full(b[:2]); err != nil {
			return err
		}
		sum = crc32.Update(sum, crc32.IEEETable, b[:2])
		for n := int(binary.LittleEndian.Uint16(b[:])); n > 0; {
			k := min(n, len(b))
			if err := d.full(b[:k]); err != nil {
				return err
			}
			sum = crc32.Update(sum, crc32.IEEETable, b[:k])
			n -= k
		}
	}
	for _, flag := range []byte{8, 16} { // name, comment
		if flags&flag == 0 {
			continue
		}
		for n := 0; ; n++ {
			if n == 512 { // as the standard library has it
				return ErrHeader
			}
			if err := d.full(b[:1]); err != nil {
				return err
			}
			sum = crc32.Update(sum, crc32.IEEETable, b[:1])
			if b[0] == 0 {
				break
			}
		}
	}
	if flags&2 != 0 {
		if err := d.full(b[:2]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b[:]) != uint16(sum) {
			return ErrHeader
		}
	}
	d.state, d.crc, d.size, d.base = atBlock, 0, 0, d.w
	return nil
}

// more reads from the source until there are inMargin unused bytes or it ends. The 8 bytes before them stay, since the bit
// buffer may give them back.
func (d *Reader) more() {
	keep := max(0, d.ip-8)
	n := copy(d.in, d.in[keep:d.end])
	d.ip, d.end = d.ip-keep, n
	for tries := 0; d.end-d.ip < inMargin && d.srcErr == nil; tries++ {
		n, err := d.src.Read(d.in[d.end:])
		if n < 0 || n > len(d.in)-d.end {
			n, err = 0, errors.New("gzip: the source returns an impossible count")
		}
		d.end += n
		d.srcErr = err
		if n > 0 {
			tries = 0
		} else if tries == 100 {
			d.srcErr = io.ErrNoProgress
		}
	}
}

// need makes n bits be there, or as many as there are.
func (d *Reader) need(n uint) bool {
	for d.nb < n {
		if d.ip == d.end {
			d.more()
			if d.ip == d.end {
				return false
			}
		}
		d.bits |= uint64(d.in[d.ip]) << d.nb
		d.ip++
		d.nb += 8
	}
	return true
}

// take returns the next n bits, which are there.
func (d *Reader) take(n uint) uint {
	v := uint(d.bits & (1<<n - 1))
	d.bits >>= n
	d.nb -= n
	return v
}

// drop gives the bit buffer's whole bytes back and forgets the rest of the present one.
func (d *Reader) drop() {
	d.ip -= int(d.nb / 8)
	d.bits, d.nb = 0, 0
}

// full reads len(b) bytes.
func (d *Reader) full(b []byte) error {
	for len(b) > 0 {
		if d.ip == d.end {
			d.more()
			if d.ip == d.end {
				return d.truncated()
			}
		}
		n := copy(b, d.in[d.ip:d.end])
		b = b[n:]
		d.ip += n
	}
	return nil
}

// truncated is the error for input that ended where more was needed.
func (d *Reader) truncated() error {
	if d.srcErr != nil && d.srcErr != io.EOF {
		return d.srcErr
	}
	return ErrTruncated
}
