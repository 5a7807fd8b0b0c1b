package logs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/gzip"
)

// jsonFile is the driver "json-file".
type jsonFile struct {
	mu sync.Mutex
	*folder
	// attrs is the member of each line that carries the container's attributes; empty without any.
	attrs []byte
	// buf holds encoded lines within one call of Write.
	buf   []byte
	clock clock
	// rest holds each stream's incomplete line: index 0 is stdout's.
	rest [2]splitter
}

func openJSON(dir string, o FileOptions, attrs map[string]string) (*jsonFile, error) {
	d, err := openFolder(dir, &jsonFormat, o)
	if err != nil {
		return nil, err
	}
	w := &jsonFile{folder: d}
	if len(attrs) > 0 {
		b, err := json.Marshal(attrs)
		if err != nil {
			return nil, errors.Join(err, d.f.Close())
		}
		w.attrs = append([]byte(`,"attrs":`), b...)
	}
	if err := w.endTornLine(); err != nil {
		return nil, errors.Join(err, d.f.Close())
	}
	d.tidy()
	return w, nil
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
	err := part.split(p, t, func(line []byte) error {
		if err := w.add(stream, line, now); err != nil {
			errs = append(errs, err)
		}
		return nil
	})
	return errors.Join(append(errs, err, w.flush())...)
}

// add encodes one line into the buffer; before it, it writes the buffer when that is large, and begins a new file when the
// current one has no room for the line.
func (w *jsonFile) add(stream string, line, now []byte) error {
	var err error
	mark := len(w.buf)
	w.buf = appendRecord(w.buf, stream, line, now, w.attrs)
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
	if w.buf = w.buf[:0]; cap(w.buf) > 64<<10 {
		w.buf = nil // after a flood
	}
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

// Close implements Driver.
func (w *jsonFile) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	var errs []error
	for i, stream := range []string{"stdout", "stderr"} {
		if part := &w.rest[i]; len(part.rest) > 0 {
			errs = append(errs, w.add(stream, part.rest, w.clock.format(part.t)))
		}
	}
	return errors.Join(append(errs, w.flush(), w.folder.close())...)
}

// packJSON compresses at the fastest level: log text shrinks to a tenth with it already, and the CPU time is not ours to spend.
func packJSON(out io.Writer, in *os.File, stop <-chan struct{}) error {
	ondemand.Compress()
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if _, err := io.Copy(z, &stopper{in, stop}); err != nil {
		return err
	}
	return z.Close()
}
