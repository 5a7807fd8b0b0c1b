package logs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

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
	// CaughtUp, if set, is called with Follow before Read waits for more. Its error ends Read.
	CaughtUp func() error
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
	if o.Tail == 0 && !o.Follow {
		return nil
	}
	if o.Follow {
		// The watch comes first: what happens after the files were read must not be missed.
		// The folder is made if need be, so that a log can be followed before its container starts.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("follow log: %w", err)
		}
		// A container's removal deletes the link; a writer only replaces it.
		w, err := inotify.New(dir, localFormat.link, jsonFormat.link)
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
	// open tells for stdout and stderr whether the last record was a partial one.
	open [2]bool
	// lines cut what comes in pieces of any size.
	lines [2]splitter
	// skip is how many of the next lines to leave out.
	skip uint64
}

// source is one file of a log, for a reader.
type source interface {
	// tail goes to where the last n lines begin, and returns how many there are of them: fewer than n when all of the file is wanted.
	// skip says how many lines to leave out from there.
	tail(n int) (found int, skip uint64, err error)
	// continued says that a line which isn't ended yet where the source is begins before the file.
	continued() bool
	// since goes to where lines of that time begin at the latest.
	since(t time.Time) error
	// drain gives the reader what there is up to the end that the file has now. It can be called again.
	drain(ctx context.Context, r *reader) error
	// grows says that there may be more later.
	grows() bool
	// modified is the time of the last change.
	modified() (time.Time, error)
	close()
}

func (r *reader) run(ctx context.Context) error {
	seqs, err := sequence(r.dir)
	if err != nil {
		return err
	}
	var first source // opened already
	if r.o.Tail >= 0 {
		if seqs, first, err = r.tail(seqs); err != nil {
			return err
		}
	}
	last, ended := uint64(0), false
	for {
		for len(seqs) > 0 {
			s := first
			first = nil
			if s == nil {
				if s, err = r.opened(seqs[0]); err != nil {
					return err
				}
			}
			last = seqs[0]
			next := seqs[1:]
			if s != nil {
				next, err = r.file(ctx, s, seqs)
				s.close()
				if err != nil {
					return err
				}
			}
			seqs = next
		}
		if r.watch == nil {
			return r.rest()
		}
		if seqs, err = after(r.dir, last); err != nil {
			return err
		}
		if len(seqs) > 0 {
			continue
		}
		if ended {
			return r.rest()
		}
		if ended, err = r.wait(ctx); err != nil {
			return err
		}
	}
}

// wait waits for something to change in the log's folder; ended says that the log has ended.
func (r *reader) wait(ctx context.Context) (ended bool, err error) {
	if r.o.CaughtUp != nil {
		if err := r.o.CaughtUp(); err != nil {
			return false, err
		}
	}
	return r.watch.Wait(ctx, r.o.Done)
}

// tail returns the files in which the last lines are, and the first of them where they begin in it.
func (r *reader) tail(seqs []uint64) ([]uint64, source, error) {
	n := r.o.Tail
	for i := len(seqs) - 1; i >= 0; i-- {
		s, err := openSource(r.dir, seqs[i])
		if errors.Is(err, os.ErrNotExist) {
			return seqs[i+1:], nil, nil // older ones are gone as well
		}
		if err != nil {
			return nil, nil, err
		}
		found, skip, err := s.tail(n)
		if err != nil {
			s.close()
			return nil, nil, fmt.Errorf("read log: %w", err)
		}
		if n -= found; n > 0 {
			s.close()
			continue
		}
		r.skip = skip
		return r.before(seqs, i, s)
	}
	return seqs, nil, nil
}

// before begins as many files before the i-th as there must be for its first lines to be whole, within reason.
func (r *reader) before(seqs []uint64, i int, s source) ([]uint64, source, error) {
	for first := i; i > 0 && first-i < maxBefore && s.continued(); i-- {
		p, err := openSource(r.dir, seqs[i-1])
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		s.close()
		if err != nil {
			return nil, nil, err
		}
		_, skip, err := p.tail(0)
		if err != nil {
			p.close()
			return nil, nil, fmt.Errorf("read log: %w", err)
		}
		r.skip += skip
		s = p
	}
	return seqs[i:], s, nil
}

// maxBefore bounds for how many files an unfinished line's beginning is looked for.
const maxBefore = 10

// opened opens a file where the wanted lines begin; nil when it has none, or is gone.
func (r *reader) opened(seq uint64) (source, error) {
	s, err := openSource(r.dir, seq)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil // deleted meanwhile: the log is bounded
	}
	if err != nil || r.o.Since.IsZero() {
		return s, err
	}
	m, err := s.modified()
	if err == nil && m.Before(r.o.Since) && !(s.grows() && r.watch != nil) {
		s.close()
		return nil, nil // the last line is older than that
	}
	if err == nil {
		err = s.since(r.o.Since)
	}
	if err != nil {
		s.close()
		return nil, fmt.Errorf("read log: %w", err)
	}
	return s, nil
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

// file reads the first of some files, s. The newest one is followed, if that is asked for, until there is a newer one. It returns those to go
// on with.
func (r *reader) file(ctx context.Context, s source, seqs []uint64) (next []uint64, err error) {
	for {
		if err := s.drain(ctx, r); err != nil {
			return nil, err
		}
		if len(seqs) > 1 || r.watch == nil || !s.grows() {
			return seqs[1:], nil
		}
		if next, err = after(r.dir, seqs[0]); err != nil {
			return nil, err
		}
		if len(next) > 0 {
			// The writer has turned to the next file after its last write to this one; read what came since the drain above.
			return next, s.drain(ctx, r)
		}
		ended, err := r.wait(ctx)
		if err != nil {
			return nil, err
		}
		if ended {
			if err := s.drain(ctx, r); err != nil {
				return nil, err
			}
			next, err := after(r.dir, seqs[0])
			if len(next) == 0 {
				r.watch.Close()
				r.watch = nil // run ends after this file
			}
			return next, err
		}
	}
}

// stream is a kind of frame as an index.
func stream(kind byte) int { return int(kind - frameStdout) }

var streamNames = [2]string{"stdout", "stderr"}

// chunk takes output as it came.
func (r *reader) chunk(i int, p []byte, t int64) error {
	at := time.Unix(0, t)
	return r.lines[i].split(p, at, func(line []byte) error {
		return r.record(Record{Line: line, Stream: streamNames[i], Time: at}, false)
	})
}

// endLines ends unfinished lines: what comes next doesn't go on with them.
func (r *reader) endLines() error {
	for i := range r.lines {
		s := &r.lines[i]
		rest := s.rest
		s.rest = nil
		var err error
		if len(rest) > 0 || r.open[i] {
			err = r.record(Record{Line: rest, Stream: streamNames[i], Time: s.t}, true)
		}
		r.open[i] = false
		if err != nil {
			return err
		}
	}
	return nil
}

// rest gives the unfinished lines at the log's end.
func (r *reader) rest() error {
	for i := range r.lines {
		if s := &r.lines[i]; len(s.rest) > 0 {
			if err := r.record(Record{Line: s.rest, Stream: streamNames[i], Time: s.t}, true); err != nil {
				return err
			}
		}
	}
	return nil
}

// record passes on what the options choose. ends says that the line ends here, whatever it looks like.
func (r *reader) record(rec Record, ends bool) error {
	i := 0
	if rec.Stream == "stderr" {
		i = 1
	}
	rec.Partial = len(rec.Line) == 0 || rec.Line[len(rec.Line)-1] != '\n'
	rec.Continued = r.open[i]
	r.open[i] = rec.Partial
	if r.skip > 0 {
		if !rec.Partial || ends {
			r.skip--
		}
		return nil
	}
	switch {
	case len(rec.Line) == 0: // only a line's end, which nothing shows
		return nil
	case !r.o.Until.IsZero() && rec.Time.After(r.o.Until):
		return errUntil
	case rec.Time.Before(r.o.Since),
		(r.o.Stdout || r.o.Stderr) && (i == 0 && !r.o.Stdout || i == 1 && !r.o.Stderr):
		return nil
	}
	return r.fn(rec)
}

// openSource opens a file, compressed or not.
func openSource(dir string, seq uint64) (source, error) {
	for range 2 { // it may be compressed between the two looks, but never becomes plain again
		for _, f := range formats {
			for _, suffix := range []string{f.suffix, f.packed} {
				file, err := os.Open(fileName(dir, seq, suffix))
				if errors.Is(err, os.ErrNotExist) {
					continue
				}
				if err != nil {
					return nil, fmt.Errorf("read log: %w", err)
				}
				packed := suffix == f.packed
				if f == &jsonFormat {
					return &jsonSource{f: file, packed: packed}, nil
				}
				return openLocalSource(file, packed)
			}
		}
	}
	return nil, os.ErrNotExist
}

// modified is when a file was last changed.
func modified(f *os.File) (time.Time, error) {
	st, err := f.Stat()
	if err != nil {
		return time.Time{}, err
	}
	return st.ModTime(), nil
}
