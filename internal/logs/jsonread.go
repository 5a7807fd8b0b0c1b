package logs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/gzip"
)

// jsonSource is a file of the driver "json-file".
type jsonSource struct {
	f      *os.File
	packed bool
	z      *gzip.Reader // made with the first use
	l      lines
	text   []byte
}

func (s *jsonSource) continued() bool              { return false }
func (s *jsonSource) grows() bool                  { return !s.packed }
func (s *jsonSource) modified() (time.Time, error) { return modified(s.f) }
func (s *jsonSource) close()                       { s.f.Close() }

// from makes the source begin there.
func (s *jsonSource) from(at int64) error {
	if _, err := s.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if !s.packed {
		s.l.r = s.f
		_, err := s.f.Seek(at, io.SeekStart)
		return err
	}
	var err error
	ondemand.Compress()
	if s.z, err = gzip.NewReader(s.f); err != nil {
		return err
	}
	s.l.r = s.z
	if _, err := io.CopyN(io.Discard, s.z, at); err != io.EOF {
		return err
	}
	return nil
}

func (s *jsonSource) tail(n int) (found int, skip uint64, err error) {
	var at int64
	if s.packed {
		found, at, err = tailCompressed(s.f, n)
	} else {
		var st os.FileInfo
		if st, err = s.f.Stat(); err == nil {
			found, at, err = tailPlain(s.f, st.Size(), n)
		}
	}
	if err == nil {
		err = s.from(at)
	}
	return found, 0, err
}

// since looks through the whole file if it is compressed; such a file is small.
func (s *jsonSource) since(t time.Time) error {
	if s.packed {
		return nil
	}
	st, err := s.f.Stat()
	if err != nil {
		return err
	}
	// The line that begins after lo is older than t; that after hi isn't, or there is none.
	lo, hi := int64(0), st.Size()
	for hi-lo > longest {
		mid := lo + (hi-lo)/2
		l := lines{r: io.NewSectionReader(s.f, mid, st.Size()-mid)}
		var r Record
		ok := false
		for range 2 { // the first one may be the end of one
			var line []byte
			if line, err = l.next(); err == nil {
				_, ok = decode(line, nil, &r)
			}
		}
		if !ok || !r.Time.Before(t) {
			hi = mid
		} else {
			lo = mid
		}
	}
	if lo == 0 {
		return nil
	}
	if err := s.from(lo); err != nil {
		return err
	}
	if _, err := s.l.next(); err != nil && err != io.EOF { // the end of one
		return err
	}
	return nil
}

func (s *jsonSource) drain(ctx context.Context, r *reader) error {
	if s.l.r == nil {
		if err := s.from(0); err != nil {
			return fmt.Errorf("read %s: %w", s.f.Name(), err)
		}
	}
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		line, err := s.l.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		var rec Record
		var ok bool
		if s.text, ok = decode(line, s.text[:0], &rec); !ok {
			continue
		}
		if err := r.record(rec, false); err != nil {
			return err
		}
	}
}

// tailPlain looks for the n-th last line from the end of a file; found is how many lines of the n it has.
func tailPlain(f io.ReaderAt, size int64, n int) (found int, at int64, err error) {
	buf := make([]byte, 64<<10)
	newlines := 0 // the first one ends the last line
	end := size
	for end > 0 {
		start := max(0, end-int64(len(buf)))
		b := buf[:end-start]
		if _, err := f.ReadAt(b, start); err != nil && err != io.EOF {
			return 0, 0, err
		}
		for i := bytes.LastIndexByte(b, '\n'); i >= 0; i = bytes.LastIndexByte(b[:i], '\n') {
			if newlines == n {
				return n, start + int64(i) + 1, nil
			}
			newlines++
		}
		end = start
	}
	return newlines, 0, nil
}

// tailCompressed is tailPlain for a stream that can't be read from its end: it remembers where the last n lines begin.
func tailCompressed(f io.Reader, n int) (found int, at int64, err error) {
	ondemand.Compress()
	z, err := gzip.NewReader(f)
	if err != nil {
		return 0, 0, err
	}
	defer z.Close()
	var starts []int64 // a ring of the last n line beginnings
	buf := make([]byte, 64<<10)
	pos, begin := int64(0), int64(0)
	count := 0
	for {
		k, err := z.Read(buf)
		for i := 0; i < k; {
			j := bytes.IndexByte(buf[i:k], '\n')
			if j < 0 {
				break
			}
			if n > 0 {
				if len(starts) < n {
					starts = append(starts, begin)
				} else {
					starts[count%n] = begin
				}
			}
			count++
			i += j + 1
			begin = pos + int64(i)
		}
		pos += int64(k)
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, 0, err
		}
	}
	switch {
	case n == 0:
		return 0, pos, nil
	case count < n:
		return count, 0, nil
	}
	return n, starts[count%n], nil
}

// lines splits a file that may still grow.
type lines struct {
	r          io.Reader
	buf        []byte
	start, end int
	// skipping is set within a line that is longer than any record, which is left out.
	skipping bool
}

// longest is more than the longest record takes: 16 KiB as \u0000 each, and base64.
const longest = 256 << 10

// next returns the next line without its newline, valid until the next call. io.EOF says that there is no complete line now; what there
// is of one is kept.
func (l *lines) next() ([]byte, error) {
	if l.buf == nil {
		l.buf = make([]byte, longest)
	}
	scanned := 0
	for {
		if i := bytes.IndexByte(l.buf[l.start+scanned:l.end], '\n'); i >= 0 {
			line := l.buf[l.start : l.start+scanned+i]
			l.start += scanned + i + 1
			if l.skipping {
				l.skipping, scanned = false, 0
				continue
			}
			return line, nil
		}
		scanned = l.end - l.start
		if l.start > 0 {
			copy(l.buf, l.buf[l.start:l.end])
			l.start, l.end = 0, scanned
		}
		if l.end == len(l.buf) {
			l.skipping, l.end, scanned = true, 0, 0
		}
		n, err := l.r.Read(l.buf[l.end:])
		l.end += n
		if n == 0 && err != nil {
			return nil, err
		}
	}
}
