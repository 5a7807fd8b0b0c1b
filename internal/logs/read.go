package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"

	"conex/internal/linux/inotify"
)

// ReadOptions choose what Read gives.
type ReadOptions struct {
	// Follow goes on with what is written later, until ctx or Done ends.
	Follow bool
	// Done is closed when the container has ended and its log is closed: Read gives the rest and returns. Nil means never.
	Done <-chan struct{}
	// Tail is how many of the last lines to begin with; negative means all.
	Tail int
	// Since and Until bound the time of the lines, if they are set. With Follow, Read returns at Until at the latest.
	Since, Until time.Time
	// Stdout and Stderr choose streams; neither means both.
	Stdout, Stderr bool
}

// errUntil ends a read at the first line after Until.
var errUntil = errors.New("until")

// Read calls fn for each record of the log in dir, oldest first, over all its files, and stops at fn's first error, which it returns.
// A folder that doesn't exist is an empty log. Lines that aren't records (torn by a crash) are left out. With Follow, it returns
// ctx's error when that ends.
func Read(ctx context.Context, dir string, o ReadOptions, fn func(Record) error) error {
	if o.Follow && !o.Until.IsZero() {
		var cancel context.CancelFunc
		parent := ctx
		ctx, cancel = context.WithDeadlineCause(ctx, o.Until, errUntil)
		defer cancel()
		err := read(ctx, dir, o, fn)
		if parent.Err() == nil && errors.Is(err, context.DeadlineExceeded) && context.Cause(ctx) == errUntil {
			return nil
		}
		return err
	}
	return read(ctx, dir, o, fn)
}

func read(ctx context.Context, dir string, o ReadOptions, fn func(Record) error) error {
	r := &reader{dir: dir, o: o, fn: fn}
	if o.Follow {
		// The watch comes first: what happens after the files were read must not be missed.
		// The folder is made if need be, so that a log can be followed before its container starts.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("follow log: %w", err)
		}
		// A container's removal deletes the link; a writer only replaces it.
		w, err := inotify.New(dir, linkName)
		if err != nil {
			return fmt.Errorf("follow log: %w", err)
		}
		defer w.Close()
		r.watch = w
	}
	err := r.run(ctx)
	if err == errUntil {
		err = nil
	}
	return err
}

// reader is one run of Read.
type reader struct {
	dir   string
	o     ReadOptions
	fn    func(Record) error
	watch *inotify.Watch
	text  []byte
	// open tells for stdout and stderr whether the last record was a partial one.
	open [2]bool
}

func (r *reader) run(ctx context.Context) error {
	seqs, err := sequence(r.dir)
	if err != nil {
		return err
	}
	skip := int64(0) // bytes of the first file
	if r.o.Tail >= 0 {
		if seqs, skip, err = tail(r.dir, seqs, r.o.Tail); err != nil {
			return err
		}
	}
	last, ended := uint64(0), false
	for {
		for len(seqs) > 0 {
			next, err := r.file(ctx, seqs[0], skip, len(seqs) == 1)
			if err != nil {
				return err
			}
			last, skip = seqs[0], 0
			if next != nil {
				seqs = next
			} else {
				seqs = seqs[1:]
			}
		}
		if r.watch == nil {
			return nil
		}
		if seqs, err = after(r.dir, last); err != nil {
			return err
		}
		if len(seqs) > 0 {
			continue
		}
		if ended {
			return nil
		}
		if ended, err = r.watch.Wait(ctx, r.o.Done); err != nil {
			return err
		}
	}
}

// after lists the files with higher numbers than seq.
func after(dir string, seq uint64) ([]uint64, error) {
	seqs, err := sequence(dir)
	if err != nil {
		return nil, err
	}
	i, found := slices.BinarySearch(seqs, seq)
	if found {
		i++
	}
	return seqs[i:], nil
}

// file reads one file. The newest one is followed, if that is asked for, until there is a newer one; next then says how to go on.
func (r *reader) file(ctx context.Context, seq uint64, skip int64, newest bool) (next []uint64, err error) {
	f, size, err := openLog(r.dir, seq)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // deleted meanwhile: the log is bounded
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && !r.o.Since.IsZero() && st.ModTime().Before(r.o.Since) && !(newest && r.watch != nil) {
		return nil, nil // the last line is older than that
	}
	var src io.Reader = f
	if size < 0 {
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		defer z.Close()
		if _, err := io.CopyN(io.Discard, z, skip); err != nil && err != io.EOF {
			return nil, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		src = z
	} else if skip > 0 {
		if _, err := f.Seek(skip, io.SeekStart); err != nil {
			return nil, fmt.Errorf("read log: %w", err)
		}
	}
	l := lines{r: src}
	for {
		if err := r.drain(ctx, &l); err != nil {
			return nil, err
		}
		if !newest || r.watch == nil || size < 0 {
			return nil, nil
		}
		if next, err = after(r.dir, seq); err != nil {
			return nil, err
		}
		if len(next) > 0 {
			// The writer has turned to the next file after its last write to this one; read what came since the drain above.
			return next, r.drain(ctx, &l)
		}
		ended, err := r.watch.Wait(ctx, r.o.Done)
		if err != nil {
			return nil, err
		}
		if ended {
			if err := r.drain(ctx, &l); err != nil {
				return nil, err
			}
			next, err := after(r.dir, seq)
			if len(next) == 0 {
				r.watch.Close()
				r.watch = nil // run ends after this file
				return nil, err
			}
			return next, err
		}
	}
}

// drain gives the records up to the end that the file has now.
func (r *reader) drain(ctx context.Context, l *lines) error {
	for n := 0; ; n++ {
		if n%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		line, err := l.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		var rec Record
		var ok bool
		if r.text, ok = decode(line, r.text[:0], &rec); !ok {
			continue
		}
		i := 0
		if rec.Stream == "stderr" {
			i = 1
		}
		rec.Partial = len(rec.Line) == 0 || rec.Line[len(rec.Line)-1] != '\n'
		rec.Continued = r.open[i]
		r.open[i] = rec.Partial
		switch {
		case !r.o.Until.IsZero() && rec.Time.After(r.o.Until):
			return errUntil
		case rec.Time.Before(r.o.Since),
			(r.o.Stdout || r.o.Stderr) && (i == 0 && !r.o.Stdout || i == 1 && !r.o.Stderr):
			continue
		}
		if err := r.fn(rec); err != nil {
			return err
		}
	}
}

// openLog opens a file, compressed or not; size is negative for a compressed one.
func openLog(dir string, seq uint64) (f *os.File, size int64, err error) {
	for range 2 { // it may be compressed between the two looks, but never becomes plain again
		f, err = os.Open(fileName(dir, seq, suffix))
		if err == nil {
			st, err := f.Stat()
			if err != nil {
				return nil, 0, errors.Join(fmt.Errorf("read log: %w", err), f.Close())
			}
			return f, st.Size(), nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, 0, fmt.Errorf("read log: %w", err)
		}
		if f, err = os.Open(fileName(dir, seq, gzSuffix)); err == nil {
			return f, -1, nil
		}
	}
	return nil, 0, fmt.Errorf("read log: %w", err)
}

// tail returns the files in which the last n lines are, and where in the first of them they begin.
func tail(dir string, seqs []uint64, n int) (_ []uint64, skip int64, err error) {
	for i := len(seqs) - 1; i >= 0; i-- {
		f, size, err := openLog(dir, seqs[i])
		if errors.Is(err, os.ErrNotExist) {
			return seqs[i+1:], 0, nil // older ones are gone as well
		}
		if err != nil {
			return nil, 0, err
		}
		var found int
		var at int64
		if size < 0 {
			found, at, err = tailCompressed(f, n)
		} else {
			found, at, err = tailPlain(f, size, n)
		}
		f.Close()
		if err != nil {
			return nil, 0, fmt.Errorf("read %s: %w", f.Name(), err)
		}
		if n -= found; n <= 0 {
			return seqs[i:], at, nil
		}
	}
	return seqs, 0, nil
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
