package logs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
)

// jsonFile is the driver "json-file".
type jsonFile struct {
	dir string
	o   Options

	mu   sync.Mutex
	f    *os.File
	seq  uint64
	size int64
	// buf holds encoded lines within one call of Write.
	buf   []byte
	clock clock
	// rest holds each stream's incomplete line: index 0 is stdout's.
	rest [2]incomplete
	// compressed is closed when the compression that was started last has ended.
	compressed chan struct{}
	// background is the first error of compressing and deleting.
	background error
}

// incomplete is a line whose end has not come yet, and when its beginning came.
type incomplete struct {
	data []byte
	t    time.Time
}

func openJSON(dir string, o Options) (*jsonFile, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	seqs, err := sequence(dir)
	if err != nil {
		return nil, err
	}
	w := &jsonFile{dir: dir, o: o, seq: 1}
	if len(seqs) > 0 {
		w.seq = seqs[len(seqs)-1]
		if _, err := os.Lstat(fileName(dir, w.seq, suffix)); err != nil { // the last one was compressed: its writer died just then
			w.seq++
		}
	}
	if err := w.open(); err != nil {
		return nil, err
	}
	if err := w.endTornLine(); err != nil {
		return nil, errors.Join(err, w.f.Close())
	}
	w.tidy()
	return w, nil
}

// open begins or goes on with the file of the current number.
func (w *jsonFile) open() error {
	f, err := os.OpenFile(fileName(w.dir, w.seq, suffix), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open log: %w", errors.Join(err, f.Close()))
	}
	w.f, w.size = f, size
	// The link is for people and tools; replacing it is atomic.
	link, tmp := CurrentPath(w.dir), filepath.Join(w.dir, "."+linkName)
	target := filepath.Base(f.Name())
	if old, err := os.Readlink(link); err == nil && old == target {
		return nil
	}
	os.Remove(tmp) // left by a writer that died here
	err = os.Symlink(target, tmp)
	if err == nil {
		err = os.Rename(tmp, link)
	}
	if err != nil {
		return fmt.Errorf("open log: %w", errors.Join(err, f.Close()))
	}
	return nil
}

// endTornLine makes a line that an earlier writer could not finish a line of its own, which readers skip.
func (w *jsonFile) endTornLine() error {
	if w.size == 0 {
		return nil
	}
	var last [1]byte
	if _, err := w.f.ReadAt(last[:], w.size-1); err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	if last[0] == '\n' {
		return nil
	}
	if _, err := w.f.Write([]byte("\n")); err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	w.size++
	return nil
}

func (w *jsonFile) Write(stream string, p []byte, t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return os.ErrClosed
	}
	part := &w.rest[0]
	if stream == "stderr" {
		part = &w.rest[1]
	} else {
		stream = "stdout"
	}
	now := w.clock.format(t)
	var errs []error
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n') + 1
		whole := end > 0
		if !whole {
			end = len(p)
		}
		var line []byte
		if len(part.data) == 0 && whole && end <= maxLine {
			line, p = p[:end], p[end:] // the usual case: nothing is copied but into the encoded buffer
		} else {
			if len(part.data) == 0 {
				part.t = t
			}
			n := min(end, maxLine-len(part.data))
			part.data = append(part.data, p[:n]...)
			p = p[n:]
			whole = part.data[len(part.data)-1] == '\n'
			if !whole && len(part.data) < maxLine {
				break // its end is yet to come
			}
			line = part.data
			if !whole {
				line = line[:cut(line)]
			}
		}
		errs = append(errs, w.add(stream, line, now))
		if len(part.data) > 0 {
			part.data = append(part.data[:0], part.data[len(line):]...)
		}
	}
	errs = append(errs, w.flush())
	return errors.Join(errs...)
}

// cut returns where to split a long line: not within a UTF-8 character.
func cut(line []byte) int {
	for back := 1; back < utf8.UTFMax && back < len(line); back++ {
		if i := len(line) - back; utf8.RuneStart(line[i]) {
			if !utf8.FullRune(line[i:]) {
				return i
			}
			break
		}
	}
	return len(line)
}

// add encodes one line into the buffer; before it, it writes the buffer when that is large, and begins a new file when the
// current one has no room for the line.
func (w *jsonFile) add(stream string, line, now []byte) error {
	var err error
	mark := len(w.buf)
	w.buf = appendRecord(w.buf, stream, line, now)
	if w.o.MaxSize >= 0 && w.size+int64(len(w.buf)) > w.o.MaxSize && w.size+int64(mark) > 0 {
		last := bytes.Clone(w.buf[mark:])
		w.buf = w.buf[:mark]
		if err = w.flush(); err == nil {
			err = w.rotate()
		}
		w.buf = append(w.buf, last...)
	}
	if len(w.buf) > 256<<10 {
		err = errors.Join(err, w.flush())
	}
	return err
}

// flush writes the buffer. After a failed write the file is cut back to its last whole line.
func (w *jsonFile) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	n, err := w.f.Write(w.buf)
	w.buf = w.buf[:0]
	if err != nil {
		err = fmt.Errorf("write log: %w", err)
		if n > 0 {
			if terr := w.f.Truncate(w.size); terr != nil {
				w.size += int64(n)
				err = errors.Join(err, terr, w.endTornLine())
			}
		}
		return err
	}
	w.size += int64(n)
	return nil
}

// rotate begins the next file.
func (w *jsonFile) rotate() error {
	old, oldSize := w.f, w.size
	w.seq++
	if err := w.open(); err != nil { // go on in the old one
		w.seq--
		w.f, w.size = old, oldSize
		return err
	}
	err := old.Close()
	w.tidy()
	return err
}

// tidy deletes the files that are too many, and compresses those that are full, in the background. A second call waits for the
// first one's work: the writer must not outrun the compression, or there would be more files than allowed.
func (w *jsonFile) tidy() {
	w.waitTidy()
	seqs, err := sequence(w.dir)
	if err != nil {
		w.background = errors.Join(w.background, err)
		return
	}
	var errs []error
	for len(seqs) > w.o.MaxFile {
		for _, s := range []string{suffix, gzSuffix, tmpSuffix} {
			if err := os.Remove(fileName(w.dir, seqs[0], s)); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		seqs = seqs[1:]
	}
	if len(errs) > 0 {
		w.background = errors.Join(w.background, fmt.Errorf("bound log: %w", errors.Join(errs...)))
	}
	if !w.o.Compress || len(seqs) < 2 {
		return
	}
	done := make(chan struct{})
	w.compressed = done
	go func() { // joined by waitTidy
		defer close(done)
		var errs []error
		for _, seq := range seqs[:len(seqs)-1] {
			if err := compress(w.dir, seq); err != nil {
				errs = append(errs, err)
			}
		}
		if err := errors.Join(errs...); err != nil {
			w.background = err // read after done only
		}
	}()
}

// waitTidy waits for the background work.
func (w *jsonFile) waitTidy() {
	if w.compressed != nil {
		<-w.compressed
		w.compressed = nil
	}
}

// compress replaces a full file by a compressed one, which appears whole or not at all and has the old one's time of last change.
// If both are there, the compressed one is whole.
func compress(dir string, seq uint64) error {
	plain, packed, tmp := fileName(dir, seq, suffix), fileName(dir, seq, gzSuffix), fileName(dir, seq, tmpSuffix)
	in, err := os.Open(plain)
	if errors.Is(err, os.ErrNotExist) {
		return nil // compressed already
	}
	if err != nil {
		return fmt.Errorf("compress log: %w", err)
	}
	defer in.Close()
	if _, err := os.Lstat(packed); err == nil {
		return os.Remove(plain)
	}
	st, err := in.Stat()
	if err != nil {
		return fmt.Errorf("compress log: %w", err)
	}
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("compress log: %w", err)
	}
	// The fastest level: log text shrinks to a tenth with it already, and the container's CPU time is not ours to spend.
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err == nil {
		_, err = io.Copy(z, in)
	}
	if err == nil {
		err = z.Close()
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Chtimes(tmp, st.ModTime(), st.ModTime())
	}
	if err == nil {
		err = os.Rename(tmp, packed)
	}
	if err != nil {
		os.Remove(tmp)
		return fmt.Errorf("compress log: %w", err)
	}
	return os.Remove(plain)
}

// Close implements Driver.
func (w *jsonFile) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	var errs []error
	for i, stream := range []string{"stdout", "stderr"} {
		if part := w.rest[i]; len(part.data) > 0 {
			errs = append(errs, w.add(stream, part.data, w.clock.format(part.t)))
		}
	}
	errs = append(errs, w.flush(), w.f.Close())
	w.f = nil
	w.waitTidy()
	return errors.Join(append(errs, w.background)...)
}
