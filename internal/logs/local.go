package logs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A file of the driver "local" is a row of blocks of blockSize bytes, of which the last may be shorter:
//
//	head   magic, version, time of the block, what went before it (see blockHead), CRC-32C
//	frames kind, length and time as varints, CRC-32C, and the output as it came: not cut into lines, which is the reader's work
//	zeros  where a frame has no room
//
// So a line's place is found by looking at a few heads, whatever the file's size, and damage ends at the next block. A full file is
// compressed block by block: each is a Zstandard frame of its own, and behind them is a skippable frame with all heads and
// lengths, so that zstdcat gives the plain file.
const (
	blockSize = 128 << 10
	headSize  = 48
	// frameHead is the longest head of a frame: kind, two varints, CRC.
	frameHead = 1 + 3 + binary.MaxVarintLen64 + 4

	blockMagic   = 0x78656e63 // "cnex"
	blockVersion = 1
)

// Kinds of frames.
const (
	framePad    = 0 // nothing more in this block
	frameStdout = 1
	frameStderr = 2
	frameEnd    = 3 // the writer was closed: what comes next doesn't go on with an unfinished line
)

// castagnoli is made with the first use, not at every start of the program.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// blockHead says what there was before a block, so that a reader can begin with it.
type blockHead struct {
	// base is when the block was begun, in nanoseconds since 1970: the frames' times count from it.
	base int64
	// newest is the latest time of everything before the block in this file.
	newest int64
	// lines is how many lines have ended before the block in this file.
	lines uint64
	// open says for stdout and stderr how many bytes before the block the frame is in which its unfinished line begins; 0: there is none.
	open [2]uint32
}

func (h *blockHead) append(b []byte) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, blockMagic)
	b = binary.LittleEndian.AppendUint32(b, blockVersion)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.base))
	b = binary.LittleEndian.AppendUint64(b, uint64(h.newest))
	b = binary.LittleEndian.AppendUint64(b, h.lines)
	b = binary.LittleEndian.AppendUint32(b, h.open[0])
	b = binary.LittleEndian.AppendUint32(b, h.open[1])
	b = binary.LittleEndian.AppendUint32(b, 0) // for later
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli()))
}

// errFormat is a file, or a block, that isn't one.
var errFormat = errors.New("not a log of the driver local")

func (h *blockHead) decode(b []byte) error {
	if len(b) < headSize || binary.LittleEndian.Uint32(b) != blockMagic || crc32.Checksum(b[:headSize-4], castagnoli()) != binary.LittleEndian.Uint32(b[headSize-4:]) {
		return errFormat
	}
	if v := binary.LittleEndian.Uint32(b[4:]); v != blockVersion {
		return fmt.Errorf("version %d of the log's format is not known, only %d", v, blockVersion)
	}
	h.base, h.newest, h.lines = int64(binary.LittleEndian.Uint64(b[8:])), int64(binary.LittleEndian.Uint64(b[16:])), binary.LittleEndian.Uint64(b[24:])
	h.open = [2]uint32{binary.LittleEndian.Uint32(b[32:]), binary.LittleEndian.Uint32(b[36:])}
	return nil
}

// frame is one piece of output.
type frame struct {
	kind byte
	time int64
	data []byte
}

// appendFrame appends a frame's head; the data goes behind it.
func appendFrame(b []byte, kind byte, base, t int64, data []byte) []byte {
	start := len(b)
	b = append(b, kind)
	b = binary.AppendUvarint(b, uint64(len(data)))
	b = binary.AppendVarint(b, t-base)
	sum := crc32.Update(crc32.Checksum(b[start:], castagnoli()), castagnoli(), data)
	return binary.LittleEndian.AppendUint32(b, sum)
}

// decodeFrame returns the frame that b begins with and its length; io.EOF where there is none, or not all of it, errFormat where it is
// damaged.
func decodeFrame(b []byte, base int64) (f frame, n int, err error) {
	if len(b) == 0 || b[0] == framePad {
		return f, 0, io.EOF
	}
	f.kind = b[0]
	size, i := binary.Uvarint(b[1:])
	if i <= 0 {
		return f, 0, varintError(i, len(b))
	}
	delta, j := binary.Varint(b[1+i:])
	if j <= 0 {
		return f, 0, varintError(j, len(b))
	}
	head := 1 + i + j
	if f.kind > frameEnd || size > blockSize {
		return f, 0, errFormat
	}
	if len(b) < head+4+int(size) {
		return f, 0, io.EOF
	}
	f.time, f.data = base+delta, b[head+4:head+4+int(size)]
	sum := crc32.Update(crc32.Checksum(b[:head], castagnoli()), castagnoli(), f.data)
	if sum != binary.LittleEndian.Uint32(b[head:]) {
		return f, 0, errFormat
	}
	return f, head + 4 + int(size), nil
}

// varintError is the error for a varint that can't be read: there is more to come of it, unless there are enough bytes.
func varintError(n, have int) error {
	if n < 0 || have > frameHead {
		return errFormat
	}
	return io.EOF
}

// tally is what the writer knows of the file up to a point, and a reader of the block that it reads.
type tally struct {
	newest int64
	lines  uint64
	// open is the place of the frame in which an unfinished line begins, -1 without one.
	open [2]int64
}

func (t *tally) add(f frame, at int64) {
	t.newest = max(t.newest, f.time)
	if f.kind == frameEnd {
		t.lines += t.unfinished()
		t.open = [2]int64{-1, -1}
		return
	}
	if len(f.data) == 0 {
		return
	}
	n := countLines(f.data)
	t.lines += n
	o := &t.open[f.kind-frameStdout]
	switch {
	case f.data[len(f.data)-1] == '\n':
		*o = -1
	case n > 0 || *o < 0:
		*o = at
	}
}

// unfinished is how many streams have begun a line.
func (t *tally) unfinished() (n uint64) {
	for _, o := range t.open {
		if o >= 0 {
			n++
		}
	}
	return n
}

// head is that of a block at that place.
func (t *tally) head(at, now int64) blockHead {
	h := blockHead{base: now, newest: t.newest, lines: t.lines}
	for i, o := range t.open {
		if o >= 0 {
			h.open[i] = uint32(min(max(at-o, 1), 1<<32-1))
		}
	}
	return h
}

// start is a head's tally, for a block at that place.
func (h *blockHead) start(at int64) tally {
	t := tally{newest: h.newest, lines: h.lines, open: [2]int64{-1, -1}}
	for i, o := range h.open {
		if o > 0 {
			t.open[i] = max(0, at-int64(o))
		}
	}
	return t
}

// localFile is the driver "local".
type localFile struct {
	mu sync.Mutex
	*folder
	// base is that of the block that is being written.
	base int64
	// written is what is in the file; with what is pending, pending.
	written, pending tally
	heads            []byte // of what is pending
	parts            [][]byte
	marks            []mark
	// lost is how much output could not be written, which the next that can be is told of.
	lost, noted int // noted is how much of it what is pending tells of
}

// mark is the end of a pending frame: how far a write must have come for it to count.
type mark struct {
	size  int64
	tally tally
	kind  byte
	n     int
}

func openLocal(dir string, o FileOptions) (*localFile, error) {
	d, err := openFolder(dir, &localFormat, o)
	if err != nil {
		return nil, err
	}
	w := &localFile{folder: d}
	if err := w.resume(); err != nil {
		return nil, errors.Join(fmt.Errorf("open log: %w", err), d.f.Close())
	}
	d.tidy()
	return w, nil
}

// resume finds out where the file stands. What an earlier writer could not finish is cut off, and lines that it left unfinished are
// ended.
func (w *localFile) resume() error {
	w.written = tally{open: [2]int64{-1, -1}}
	for w.size > 0 {
		at := (w.size - 1) / blockSize * blockSize
		block := make([]byte, w.size-at)
		if _, err := w.f.ReadAt(block, at); err != nil {
			return err
		}
		var h blockHead
		err := h.decode(block)
		if errors.Is(err, errFormat) { // not even the head came to be
			if err := w.f.Truncate(at); err != nil {
				return err
			}
			w.size = at
			continue
		}
		if err != nil {
			return err
		}
		w.base, w.written = h.base, h.start(at)
		n := headSize
		for {
			f, size, err := decodeFrame(block[n:], h.base)
			if err != nil {
				break
			}
			w.written.add(f, at+int64(n))
			n += size
		}
		if pad := len(block) == blockSize && n < len(block) && block[n] == framePad; !pad && n < len(block) {
			if err := w.f.Truncate(at + int64(n)); err != nil {
				return err
			}
			w.size = at + int64(n)
		}
		break
	}
	if w.written.unfinished() > 0 {
		return w.end()
	}
	return nil
}

func (w *localFile) Write(stream string, p []byte, t time.Time) error {
	kind := byte(frameStdout)
	if stream == "stderr" {
		kind = frameStderr
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return os.ErrClosed
	}
	w.pending = w.written
	now := t.UnixNano()
	size := w.size // with what is pending
	if w.lost > 0 {
		size = w.note(size, now)
	}
	var errs []error
	for len(p) > 0 {
		n := w.room(size, p)
		if n == 0 { // the file is full
			errs = append(errs, w.flush())
			if err := w.rotate(); err != nil {
				errs = append(errs, err)
				n = w.blockRoom(size, p) // go on in the old one
			} else {
				w.written = tally{open: w.carried()}
				w.pending = w.written
			}
			size = w.size
			if n == 0 {
				continue
			}
		}
		size = w.add(size, kind, now, p[:n])
		p = p[n:]
	}
	errs = append(errs, w.flush())
	return errors.Join(errs...)
}

// carried are the unfinished lines of a file that go on in the next: there they begin at its beginning.
func (w *localFile) carried() (open [2]int64) {
	for i, o := range w.written.open {
		open[i] = min(o, 0)
	}
	return open
}

// least is how much of a frame's data is worth a frame.
const least = 96

// blockRoom is how much of p the next frame takes, if the file may grow.
func (w *localFile) blockRoom(size int64, p []byte) int {
	left := int(blockSize - size%blockSize)
	switch {
	case left == blockSize || left < frameHead+least:
		left = blockSize - headSize
	}
	return min(len(p), left-frameHead)
}

// room is how much of p the next frame takes; 0 when the file is full. A file ends with a line's end, if that is possible.
func (w *localFile) room(size int64, p []byte) int {
	n := w.blockRoom(size, p)
	if w.o.MaxSize < 0 {
		return n
	}
	left := w.o.MaxSize - size - headSize - frameHead
	if size%blockSize != 0 && blockSize-size%blockSize < frameHead+least {
		left -= blockSize - size%blockSize
	}
	if int64(n) <= left {
		return n
	}
	n = int(max(left, 0))
	if i := lastLine(p[:n]); i > 0 {
		return i
	}
	switch {
	case size == 0: // a file has something, however small it is
		return min(max(n, least), len(p))
	case n < least || w.pending.unfinished() == 0:
		return 0
	}
	return n
}

// add puts a frame behind what is pending, and before it what there must be; it returns the size with it.
func (w *localFile) add(size int64, kind byte, now int64, data []byte) int64 {
	left := int(blockSize - size%blockSize)
	if left != blockSize && left < frameHead+least {
		w.parts = append(w.parts, zeros[:left])
		size += int64(left)
		left = blockSize
	}
	start := len(w.heads)
	if left == blockSize {
		h := w.pending.head(size, now)
		w.base = now
		w.heads = h.append(w.heads)
	}
	at := size + int64(len(w.heads)-start)
	w.heads = appendFrame(w.heads, kind, w.base, now, data)
	w.parts = append(w.parts, w.heads[start:])
	if len(data) > 0 {
		w.parts = append(w.parts, data)
	}
	size += int64(len(w.heads)-start) + int64(len(data))
	w.pending.add(frame{kind: kind, time: now, data: data}, at)
	w.marks = append(w.marks, mark{size, w.pending, kind, len(data)})
	return size
}

// note puts a line into the log that tells what is missing, in the same write as what comes next: where there is no room for that, there
// would be for many notes.
func (w *localFile) note(size, now int64) int64 {
	text := fmt.Appendf(nil, "[conex: %d bytes of output could not be written here]\n", w.lost)
	w.noted = w.lost
	size = w.add(size, frameStderr, now, text)
	w.marks[len(w.marks)-1].n = 0
	return size
}

var zeros [frameHead + least]byte

// flush writes what is pending. After a failed write the file is cut back to where its last line ends, or to where it was.
func (w *localFile) flush() error {
	if len(w.parts) == 0 {
		return nil
	}
	parts, marks, noted := w.parts, w.marks, w.noted
	w.heads, w.parts, w.marks, w.noted = w.heads[:0], w.parts[:0], w.marks[:0], 0
	n, err := writev(w.f, parts)
	clear(parts) // they are the caller's
	if err == nil {
		w.size, w.written = marks[len(marks)-1].size, w.pending
		w.lost -= noted
		return nil
	}
	err = fmt.Errorf("write log: %w", err)
	end := w.size + n
	lost := 0
	for _, m := range marks {
		lost += m.n
		if m.size <= end && m.n > 0 && m.tally.open[m.kind-frameStdout] < 0 {
			w.size, w.written, lost = m.size, m.tally, 0
			w.lost -= noted
			noted = 0
		}
	}
	w.lost += lost
	w.pending = w.written
	if w.size < end {
		if terr := w.f.Truncate(w.size); terr != nil {
			err = errors.Join(err, terr)
		}
	}
	return w.rebase(err)
}

// rebase finds the base of the block in which the file ends after a write that failed.
func (w *localFile) rebase(err error) error {
	if w.size%blockSize == 0 {
		return err
	}
	var head [headSize]byte
	var h blockHead
	if _, rerr := w.f.ReadAt(head[:], w.size/blockSize*blockSize); rerr != nil {
		return errors.Join(err, rerr)
	}
	if derr := h.decode(head[:]); derr != nil {
		return errors.Join(err, derr)
	}
	w.base = h.base
	return err
}

// writev writes all parts; n is how much came to be.
func writev(f *os.File, parts [][]byte) (n int64, err error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	const most = 1024 // IOV_MAX
	cerr := rc.Control(func(fd uintptr) {
		for len(parts) > 0 {
			var k int
			k, err = unix.Writev(int(fd), parts[:min(len(parts), most)])
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return
			}
			n += int64(k)
			for len(parts) > 0 && k >= len(parts[0]) {
				k -= len(parts[0])
				parts = parts[1:]
			}
			if k > 0 {
				parts[0] = parts[0][k:]
			}
		}
	})
	return n, errors.Join(err, cerr)
}

// end ends what is unfinished.
func (w *localFile) end() error {
	w.pending = w.written
	w.add(w.size, frameEnd, max(w.written.newest, w.base), nil)
	return w.flush()
}

// Close implements Driver.
func (w *localFile) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	var err error
	if w.written.unfinished() > 0 {
		err = w.end()
	}
	return errors.Join(err, w.folder.close())
}
