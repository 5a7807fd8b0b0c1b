package compress

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// Streams are cut into blocks of these sizes, whatever machine compresses them, so that equal content gives equal bytes everywhere. A gzip
// block begins with its predecessor's last 32 KB as dictionary and loses nothing but a few bytes; a zstd block is a frame of its own
// and knows nothing of others, which costs 1 % at level 1 and 3 % at level 3 against one frame.
const (
	gzipBlock  = 1 << 20
	zstdBlock  = 2 << 20
	gzipWindow = 32 << 10
)

// maxWorkers bounds how many blocks are compressed at once, and with them the memory.
const maxWorkers = 8

// slots has room for as many as are compressed at once in this process, however many streams there are.
var slots = sync.OnceValue(func() chan struct{} { return make(chan struct{}, min(runtime.GOMAXPROCS(0), maxWorkers)) })

// pools keep what one stream has used for the next one: a *sync.Pool by encoderKey or, for blocks, by Kind. An image's layers
// would allocate hundreds of megabytes otherwise.
var pools sync.Map

func pool(key any) *sync.Pool {
	p, ok := pools.Load(key)
	if !ok {
		p, _ = pools.LoadOrStore(key, &sync.Pool{})
	}
	return p.(*sync.Pool)
}

// encoderKey names encoders that can take each other's place.
type encoderKey struct {
	kind  Kind
	level int
}

// ParseKind reads a kind that NewWriter knows, as people write it.
func ParseKind(s string) (Kind, error) {
	switch s {
	case "gzip", "zstd", "none":
		return Kind(s), nil
	case "uncompressed":
		return None, nil
	}
	return "", fmt.Errorf("compression %q is not known: use gzip, zstd or none", s)
}

// DefaultLevel is the level that pays for images, where a push waits for it: gzip's 5 makes files 3 to 6 % larger than gzip -6 at three
// times its speed, zstd's 1 files of the same size at twice the speed of that. zstd's 3 saves another 6 to 8 % for 1.5 times the time.
func DefaultLevel(kind Kind) int {
	switch kind {
	case Gzip:
		return 5
	case Zstd:
		return 1
	}
	return 0
}

// CheckLevel says whether kind has the level: gzip 0 to 9, zstd 1 to 22, which are four in truth (1, 3, 6 and 10), as klauspost/compress has
// them.
func CheckLevel(kind Kind, level int) error {
	low, high := 0, 0
	switch kind {
	case None:
	case Gzip:
		high = 9
	case Zstd:
		low, high = 1, 22
	default:
		return fmt.Errorf("writing %s: %w", kind, ErrUnsupported)
	}
	if level < low || level > high {
		if kind == None {
			return fmt.Errorf("compression level %d: there is none without compression", level)
		}
		return fmt.Errorf("compression level %d of %s: use %d to %d", level, kind, low, high)
	}
	return nil
}

// NewWriter returns a writer that compresses what is written to it into w, on all processors. The output depends on content, kind and
// level alone. Close writes what is left; it does not close w. It must be called, even to give up: it ends what NewWriter
// began. A gzip stream has one member; a zstd stream has a frame with a checksum for every 2 MB.
func NewWriter(w io.Writer, kind Kind, level int) (io.WriteCloser, error) {
	return newWriter(w, kind, level, min(runtime.GOMAXPROCS(0), maxWorkers))
}

func newWriter(w io.Writer, kind Kind, level, workers int) (io.WriteCloser, error) {
	if err := CheckLevel(kind, level); err != nil {
		return nil, err
	}
	p := &parallel{key: encoderKey{kind, level}, out: output{w: w}, free: make(chan *job, workers+1), ordered: make(chan *job, workers+1)}
	switch kind {
	case Gzip:
		p.size, p.window, p.begin, p.end = gzipBlock, gzipWindow, gzipHeader(level), gzipEnd
	case Zstd:
		p.size = zstdBlock
	default:
		return plain{w}, nil
	}
	return p, nil
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }

func newEncoder(key encoderKey) (encoder, error) {
	if key.kind == Zstd {
		return newZstdEncoder(key.level)
	}
	return newGzipEncoder(key.level)
}

// encoder compresses one block after the other, each by itself.
type encoder interface {
	// encode appends the compressed block to dst. window is what comes before the block in the stream.
	encode(dst, window, block []byte) ([]byte, error)
}

// job is a block on its way.
type job struct {
	window, block, packed []byte
	err                   error
	done                  chan struct{}
}

// parallel compresses blocks on several goroutines and writes them in order. What fits into one block is compressed in place.
type parallel struct {
	key          encoderKey
	size, window int
	begin        []byte
	end          func(sum, size uint32) []byte
	out          output

	cur     *job
	tail    []byte        // of the block before cur, as long as the window
	free    chan *job     // those that nobody works on
	made    int           // how many there are, up to what free has room for
	ordered chan *job     // in the order of the stream, to the goroutine that writes
	written chan struct{} // closed when the goroutine that writes has ended; nil: not begun
	sum, n  uint32        // of the content: CRC-32, length
	closed  bool
	err     error // what Close has returned
}

// Write compresses b. An error of the underlying writer may be told by a later Write, or by Close.
func (p *parallel) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		room, err := p.room()
		if err != nil {
			return total - len(b), err
		}
		n := copy(room, b)
		p.took(n)
		b = b[n:]
	}
	return total, nil
}

// ReadFrom compresses what r has.
func (p *parallel) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	for {
		room, err := p.room()
		if err != nil {
			return total, err
		}
		n, err := r.Read(room)
		p.took(n)
		total += int64(n)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// room returns the free part of the present block.
func (p *parallel) room() ([]byte, error) {
	if p.closed {
		return nil, io.ErrClosedPipe
	}
	if err := p.out.failed(); err != nil {
		return nil, err
	}
	if p.cur != nil && len(p.cur.block) == p.size {
		p.dispatch()
	}
	if p.cur == nil {
		p.next()
	}
	return p.cur.block[len(p.cur.block):p.size], nil
}

// took says that n bytes of the room were filled.
func (p *parallel) took(n int) {
	b := p.cur.block
	p.cur.block = b[:len(b)+n]
}

// next begins a block.
func (p *parallel) next() {
	var j *job
	select {
	case j = <-p.free:
	default:
		if p.made == cap(p.free) {
			j = <-p.free
			break
		}
		p.made++
		if j, _ = pool(p.key.kind).Get().(*job); j == nil {
			j = &job{block: make([]byte, 0, p.size)}
		}
	}
	j.block = j.block[:0]
	j.window = append(j.window[:0], p.tail...)
	p.cur = j
}

// count adds the present block to the checksum.
func (p *parallel) count() {
	if p.end != nil {
		p.sum = crc32.Update(p.sum, crc32.IEEETable, p.cur.block)
		p.n += uint32(len(p.cur.block))
	}
}

// dispatch has the present block, which is full, compressed and written, and begins the next one.
func (p *parallel) dispatch() {
	if p.written == nil {
		p.written = make(chan struct{})
		p.out.write(p.begin)
		go func() {
			defer close(p.written)
			for j := range p.ordered {
				<-j.done
				if j.err != nil {
					p.out.fail(j.err)
				}
				p.out.write(j.packed)
				p.free <- j
			}
		}()
	}
	p.count()
	j := p.cur
	j.done = make(chan struct{})
	p.tail = append(p.tail[:0], j.block[max(0, len(j.block)-p.window):]...) // before the block can come back
	p.ordered <- j                                                          // never blocks: it has room for all
	go func() {
		defer close(j.done)
		j.err = p.encode(j)
	}()
	p.next()
}

func (p *parallel) encode(j *job) (err error) {
	slots() <- struct{}{}
	defer func() { <-slots() }()
	e, _ := pool(p.key).Get().(encoder)
	if e == nil {
		if e, err = newEncoder(p.key); err != nil {
			return err
		}
	}
	if j.packed, err = e.encode(j.packed[:0], j.window, j.block); err == nil {
		pool(p.key).Put(e)
	}
	return err
}

// Close writes what is left.
func (p *parallel) Close() error {
	if p.closed {
		return p.err
	}
	p.closed = true
	if p.cur == nil {
		p.next()
	}
	p.count()
	j := p.cur
	err := p.out.failed()
	if err == nil && (len(j.block) > 0 || p.written == nil) {
		err = p.encode(j)
	}
	if p.written != nil {
		close(p.ordered)
		<-p.written
	} else {
		p.out.write(p.begin)
	}
	if err == nil {
		p.out.write(j.packed)
		if p.end != nil {
			p.out.write(p.end(p.sum, p.n))
		}
		err = p.out.failed()
	}
	p.err = err
	// All others have come back by now.
	for pool(p.key.kind).Put(j); len(p.free) > 0; {
		pool(p.key.kind).Put(<-p.free)
	}
	return err
}

// output writes until the first error.
type output struct {
	w   io.Writer
	err atomic.Pointer[error]
}

func (o *output) write(b []byte) {
	if o.failed() != nil || len(b) == 0 {
		return
	}
	if _, err := o.w.Write(b); err != nil {
		o.fail(err)
	}
}

func (o *output) fail(err error) { o.err.CompareAndSwap(nil, &err) }

func (o *output) failed() error {
	if p := o.err.Load(); p != nil {
		return *p
	}
	return nil
}

type gzipEncoder struct {
	z   *flate.Writer
	buf bytes.Buffer
}

func newGzipEncoder(level int) (encoder, error) {
	ondemand.Compress()
	z, err := flate.NewWriter(nil, level)
	if err != nil {
		return nil, err
	}
	return &gzipEncoder{z: z}, nil
}

// encode makes deflate blocks of it that end at a byte, none of them the last one.
func (e *gzipEncoder) encode(dst, window, block []byte) ([]byte, error) {
	e.buf = *bytes.NewBuffer(dst)
	e.z.ResetDict(&e.buf, window)
	if _, err := e.z.Write(block); err != nil {
		return nil, err
	}
	if err := e.z.Flush(); err != nil {
		return nil, err
	}
	return e.buf.Bytes(), nil
}

// gzipHeader is that of a member without name and time, of an unknown system: nothing of the machine gets into it.
func gzipHeader(level int) []byte {
	h := []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}
	switch level {
	case 9:
		h[8] = 2
	case 1:
		h[8] = 4
	}
	return h
}

// gzipEnd is an empty block, the last one, and the trailer.
func gzipEnd(sum, size uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32([]byte{3, 0}, sum), size)
}

type zstdEncoder struct{ z *zstd.Encoder }

func newZstdEncoder(level int) (encoder, error) {
	ondemand.Compress()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(zstdBlock), zstd.WithEncoderCRC(true), zstd.WithZeroFrames(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, err
	}
	return zstdEncoder{z}, nil
}

func (e zstdEncoder) encode(dst, _, block []byte) ([]byte, error) {
	return e.z.EncodeAll(block, dst), nil
}
