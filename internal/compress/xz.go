package compress

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"conex/internal/ondemand"

	"github.com/ulikunitz/xz/lzma"
)

// xzReader undoes the xz container (The .xz File Format, 1.2.1) around LZMA2 data. It reads the container itself, because a decoder
// of the whole would allocate any dictionary that a block asks for, up to 4 GB: here MaxWindow bounds it.
type xzReader struct {
	src     *bufio.Reader
	in      counter // over src: containers are aligned to 4 bytes
	check   byte    // the stream's kind of checksum
	blocks  uint64  // of this stream so far
	block   io.Reader
	sum     hash.Hash
	size    int64 // of this block so far, uncompressed
	want    int64 // what its header says, -1 when it does not
	begin   int64 // where its compressed data begins
	comp    int64 // their length by the header, -1 when it does not say
	err     error // sticky
	scratch [1024]byte
}

// counter counts the bytes that are taken from a bufio.Reader, and takes no more than asked.
type counter struct {
	r *bufio.Reader
	n int64
	h hash.Hash32 // of the bytes read since it was set; nil: none
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.h != nil {
		c.h.Write(p[:n]) //nolint:errcheck // a hash never fails
	}
	return n, err
}

func (c *counter) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
		if c.h != nil {
			c.h.Write([]byte{b}) //nolint:errcheck // a hash never fails
		}
	}
	return b, err
}

var (
	errXz = errors.New("xz: damaged")
	// xzHead and xzFoot begin and end a stream.
	xzHead, xzFoot = []byte{0xfd, '7', 'z', 'X', 'Z', 0}, []byte("YZ")
)

func newXzReader(r *bufio.Reader) (*xzReader, error) {
	x := &xzReader{src: r, in: counter{r: r}}
	if err := x.header(); err != nil {
		return nil, err
	}
	return x, nil
}

// header reads a stream's header.
func (x *xzReader) header() error {
	b := x.scratch[:12]
	if _, err := io.ReadFull(&x.in, b); err != nil {
		return unexpected(err)
	}
	if !bytes.Equal(b[:6], xzHead) || b[6] != 0 || b[7]&0xf0 != 0 || crc32.ChecksumIEEE(b[6:8]) != binary.LittleEndian.Uint32(b[8:]) {
		return fmt.Errorf("%w: stream header", errXz)
	}
	x.check, x.blocks = b[7], 0
	return nil
}

func (x *xzReader) Read(p []byte) (int, error) {
	for x.err == nil {
		if x.block == nil {
			if x.err = x.next(); x.err != nil {
				break
			}
			continue
		}
		n, err := x.block.Read(p)
		x.sum.Write(p[:n]) //nolint:errcheck // a hash never fails
		if x.size += int64(n); x.want >= 0 && x.size > x.want {
			x.err = fmt.Errorf("%w: a block is longer than it says", errXz)
			break
		}
		switch {
		case err == io.EOF:
			x.err = x.endBlock()
		case err != nil:
			x.err = fmt.Errorf("xz: %w", unexpected(err))
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

// next begins a block, or ends the stream and begins the one behind it; io.EOF when there is none.
func (x *xzReader) next() error {
	size, err := x.in.ReadByte()
	if err != nil {
		return unexpected(err)
	}
	if size == 0 {
		if err := x.index(); err != nil {
			return err
		}
		return x.following()
	}
	b := x.scratch[:(int(size)+1)*4]
	b[0] = size
	if _, err := io.ReadFull(&x.in, b[1:]); err != nil {
		return unexpected(err)
	}
	body := b[:len(b)-4]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(b[len(body):]) {
		return fmt.Errorf("%w: block header", errXz)
	}
	flags, r := body[1], bytes.NewReader(body[2:])
	x.comp, x.want = -1, -1
	if flags&0x40 != 0 {
		if x.comp, err = vli(r); err != nil {
			return err
		}
	}
	if flags&0x80 != 0 {
		if x.want, err = vli(r); err != nil {
			return err
		}
	}
	id, err := vli(r)
	if err != nil {
		return err
	}
	props, err := vli(r)
	if err != nil {
		return err
	}
	if flags&3 != 0 || id != 0x21 || props != 1 {
		return fmt.Errorf("xz with filters besides LZMA2: %w", ErrUnsupported)
	}
	code, err := r.ReadByte()
	if err != nil || code > 40 {
		return fmt.Errorf("%w: dictionary size", errXz)
	}
	dict := int64(2|code&1) << (code/2 + 11)
	if dict > MaxWindow {
		return fmt.Errorf("xz: a dictionary of %d MB is asked for, at most %d are allowed: %w", dict>>20, MaxWindow>>20, ErrUnsupported)
	}
	switch x.check {
	case 1:
		x.sum = crc32.NewIEEE()
	case 4:
		x.sum = crc64.New(crc64.MakeTable(crc64.ECMA))
	case 10:
		x.sum = sha256.New()
	case 0:
		x.sum = noSum{}
	default:
		return fmt.Errorf("xz with checksum %d: %w", x.check, ErrUnsupported)
	}
	x.begin, x.size = x.in.n, 0
	x.blocks++
	ondemand.Compress()
	x.block, err = lzma.Reader2Config{DictCap: int(max(dict, lzma.MinDictCap))}.NewReader2(&x.in)
	return err
}

// endBlock reads what follows a block's data.
func (x *xzReader) endBlock() error {
	x.block = nil
	if x.want >= 0 && x.size != x.want || x.comp >= 0 && x.in.n-x.begin != x.comp {
		return fmt.Errorf("%w: a block's length is not what it says", errXz)
	}
	if err := x.padding(x.begin); err != nil {
		return err
	}
	n := [...]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[x.check]
	got := x.scratch[:n]
	if _, err := io.ReadFull(&x.in, got); err != nil {
		return unexpected(err)
	}
	sum := x.sum.Sum(nil)
	if x.check != 10 { // CRCs are stored little endian
		for i, j := 0, len(sum)-1; i < j; i, j = i+1, j-1 {
			sum[i], sum[j] = sum[j], sum[i]
		}
	}
	if !bytes.Equal(sum, got) {
		return fmt.Errorf("%w: checksum", errXz)
	}
	return nil
}

// padding reads zeros up to a multiple of 4 bytes after from.
func (x *xzReader) padding(from int64) error {
	for (x.in.n-from)%4 != 0 {
		b, err := x.in.ReadByte()
		if err != nil {
			return unexpected(err)
		}
		if b != 0 {
			return fmt.Errorf("%w: padding", errXz)
		}
	}
	return nil
}

// index reads a stream's index, whose first byte was taken, and its footer.
func (x *xzReader) index() error {
	begin := x.in.n - 1
	x.in.h = crc32.NewIEEE()
	x.in.h.Write([]byte{0}) //nolint:errcheck // a hash never fails
	n, err := vli(&x.in)
	if err != nil {
		return err
	}
	if uint64(n) != x.blocks {
		return fmt.Errorf("%w: index", errXz)
	}
	for range 2 * n {
		if _, err := vli(&x.in); err != nil {
			return err
		}
	}
	if err := x.padding(begin); err != nil {
		return err
	}
	sum := x.in.h.Sum32()
	x.in.h = nil
	b := x.scratch[:16]
	if _, err := io.ReadFull(&x.in, b); err != nil {
		return unexpected(err)
	}
	length := (int64(binary.LittleEndian.Uint32(b[8:])) + 1) * 4
	if sum != binary.LittleEndian.Uint32(b) || crc32.ChecksumIEEE(b[8:14]) != binary.LittleEndian.Uint32(b[4:]) ||
		length != x.in.n-12-begin || b[12] != 0 || b[13] != x.check || !bytes.Equal(b[14:], xzFoot) {
		return fmt.Errorf("%w: index or footer", errXz)
	}
	return nil
}

// following looks for one more stream, behind padding in words of 4 zeros.
func (x *xzReader) following() error {
	for {
		b, err := x.src.Peek(4)
		if len(b) == 0 && err == io.EOF {
			return io.EOF
		}
		if err != nil && (err != io.EOF || len(b) < 4) {
			return unexpected(err)
		}
		if !bytes.Equal(b, []byte{0, 0, 0, 0}) {
			return x.header()
		}
		if _, err := x.src.Discard(4); err != nil {
			return err
		}
	}
}

// vli reads a number of up to 63 bits, 7 a byte.
func vli(r io.ByteReader) (int64, error) {
	var v int64
	for i := range 9 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, unexpected(err)
		}
		v |= int64(b&0x7f) << (7 * i)
		if b&0x80 == 0 {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: number", errXz)
}

func unexpected(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("xz: %w", err)
}

// noSum is the checksum of streams without one.
type noSum struct{}

func (noSum) Write(p []byte) (int, error) { return len(p), nil }
func (noSum) Sum(b []byte) []byte         { return b }
func (noSum) Reset()                      {}
func (noSum) Size() int                   { return 0 }
func (noSum) BlockSize() int              { return 1 }
