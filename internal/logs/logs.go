// Package logs owns a container's log: written by the container's monitor alone, read by anybody, bounded by default.
//
// A log is a folder of numbered files, "00000001.json" and so on. The highest number is written to; when it is full the next one is
// begun, the full one compressed to "00000001.json.gz", and the lowest deleted. Numbers are never used again and files never renamed
// to another number, so that a reader can't lose its place while the writer goes on. The link "json.log" points to the file
// that is being written.
//
// The lines are those of Docker's json-file driver, so that its tools can read them:
//
//	{"log":"text\n","stream":"stdout","time":"2026-01-02T03:04:05.678901234Z"}
//
// A line longer than 16 KiB is split; all pieces but the last lack the \n. Text that isn't UTF-8 has its exact bytes in
// the additional key "raw" (base64), while "log" has U+FFFD in the place of what is wrong.
package logs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
)

// ErrUnsupported says that a driver or option doesn't exist here; the text names it.
var ErrUnsupported = errors.New("not supported")

// The names of the drivers.
const (
	JSONFile = "json-file"
	None     = "none"
)

// maxLine is where lines are split, as Docker splits them.
const maxLine = 16 << 10

// Driver takes a container's output.
type Driver interface {
	// Write logs output of a stream, "stdout" or "stderr", which came at t. It splits p into lines; what follows the last one is kept
	// until its line ends. A nil error promises that the complete lines are in the file (not that they are synced to disk).
	// After an error the lines of this call may be missing, and the next call goes on as if nothing was. It doesn't keep p.
	// The two streams may be written at the same time.
	Write(stream string, p []byte, t time.Time) error
	// Close logs incomplete lines and waits for compression to end, up to half a second: report the container's exit first.
	Close() error
}

// Options are a log's parsed options.
type Options struct {
	// Driver is JSONFile or None.
	Driver string
	// MaxSize is the size in bytes at which a file is full; negative means never.
	MaxSize int64
	// MaxFile is how many files there may be, the current one among them.
	MaxFile int
	// Compress says that full files are compressed.
	Compress bool
	// NonBlocking says that output which comes faster than it can be written is dropped, up to MaxBuffer bytes being held.
	NonBlocking bool
	MaxBuffer   int
}

// String describes the bounds for people.
func (o Options) String() string {
	switch {
	case o.Driver == None:
		return None
	case o.MaxSize < 0:
		return o.Driver + ", unbounded"
	}
	s := fmt.Sprintf("%s, at most %d files of %s", o.Driver, o.MaxFile, units.BytesSize(float64(o.MaxSize)))
	if o.Compress {
		s += ", full ones compressed"
	}
	return s
}

// ParseOptions checks a driver's name ("" is json-file) and Docker's --log-opt: max-size (20m unless given, -1 for no bound), max-file
// (5), compress (true), mode (blocking or non-blocking) and max-buffer-size (1m).
func ParseOptions(driver string, opts map[string]string) (Options, error) {
	o := Options{Driver: JSONFile, MaxSize: 20 << 20, MaxFile: 5, Compress: true, MaxBuffer: 1 << 20}
	switch driver {
	case "", JSONFile:
	case None:
		o.Driver = None
	default:
		return o, fmt.Errorf("log driver %q: %w, there are %s and %s", driver, ErrUnsupported, JSONFile, None)
	}
	for k, v := range opts {
		var err error
		switch {
		case k == "mode":
			if v != "blocking" && v != "non-blocking" {
				err = errors.New("must be blocking or non-blocking")
			}
			o.NonBlocking = v == "non-blocking"
		case k == "max-buffer-size":
			var n int64
			if n, err = units.RAMInBytes(v); err == nil && (n < maxLine || n > 1<<30) {
				err = errors.New("must be between 16k and 1g")
			}
			o.MaxBuffer = int(n)
		case o.Driver == None:
			err = fmt.Errorf("%w by the driver %s", ErrUnsupported, None)
		case k == "max-size":
			if v == "-1" {
				o.MaxSize = -1
			} else if o.MaxSize, err = units.RAMInBytes(v); err == nil && o.MaxSize <= 0 {
				err = errors.New("must be positive, or -1 for no bound")
			}
		case k == "max-file":
			if o.MaxFile, err = strconv.Atoi(v); err == nil && o.MaxFile < 1 {
				err = errors.New("must be at least 1")
			}
		case k == "compress":
			o.Compress, err = strconv.ParseBool(v)
		default:
			err = ErrUnsupported
		}
		if err != nil {
			return o, fmt.Errorf("log option %s=%s: %w", k, v, err)
		}
	}
	return o, nil
}

// NewWriter opens the log in dir, which is made if need be, for its only writer. It goes on after what an earlier writer left, in
// whatever state that one died.
func NewWriter(dir string, opts map[string]string, driver string) (Driver, error) {
	o, err := ParseOptions(driver, opts)
	if err != nil {
		return nil, err
	}
	if o.Driver == None {
		return discard{}, nil
	}
	w, err := openJSON(dir, o)
	if err != nil {
		return nil, err
	}
	if o.NonBlocking {
		return newBuffered(w, o.MaxBuffer), nil
	}
	return w, nil
}

// discard is the driver "none".
type discard struct{}

func (discard) Write(string, []byte, time.Time) error { return nil }
func (discard) Close() error                          { return nil }

// Copy logs what r gives until its end. Errors of the log don't stop it, since a container whose output nobody takes would
// stand still: they are joined to what is returned, the first ones at least. Each read becomes one Write, so that output reaches the file
// as soon as it is there, and in large pieces when there is much.
func Copy(d Driver, stream string, r io.Reader) error {
	buf := make([]byte, 64<<10)
	var errs []error
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if werr := d.Write(stream, buf[:n], time.Now()); werr != nil && len(errs) < 3 {
				errs = append(errs, werr)
			}
		}
		if err == io.EOF {
			return errors.Join(errs...)
		}
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("read %s: %w", stream, err))...)
		}
	}
}

// CurrentPath is where the current file of a log is found: inspect's LogPath.
func CurrentPath(dir string) string { return filepath.Join(dir, linkName) }

const (
	linkName = "json.log"
	suffix   = ".json"
	gzSuffix = ".json.gz"
	// tmpSuffix marks a compressed file that isn't complete.
	tmpSuffix = ".json.gz.tmp"
)

func fileName(dir string, seq uint64, suffix string) string {
	return filepath.Join(dir, fmt.Sprintf("%08d%s", seq, suffix))
}

// sequence lists the numbers of a log's files, lowest first, each once. A folder that isn't there has none.
func sequence(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list log: %w", err)
	}
	var seqs []uint64
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".gz")
		num, ok := strings.CutSuffix(name, suffix)
		if n, err := strconv.ParseUint(num, 10, 64); ok && err == nil {
			seqs = append(seqs, n)
		}
	}
	slices.Sort(seqs)
	return slices.Compact(seqs), nil
}

// buffered is a driver in front of another one, for mode=non-blocking: it never waits for the disk, and drops what doesn't fit.
type buffered struct {
	next Driver
	max  int

	mu      sync.Mutex
	wake    sync.Cond
	queue   []chunk
	size    int
	dropped uint64
	closed  bool
	err     error
	done    chan struct{}
}

type chunk struct {
	stream string
	data   []byte
	t      time.Time
}

func newBuffered(next Driver, max int) *buffered {
	b := &buffered{next: next, max: max, done: make(chan struct{})}
	b.wake.L = &b.mu
	go b.run() // ends in Close, which waits for it
	return b
}

// Write queues a copy of p. The error is that of an earlier write.
func (b *buffered) Write(stream string, p []byte, t time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	err := b.err
	b.err = nil
	if b.size+len(p) > b.max {
		b.dropped += uint64(len(p))
		return err
	}
	b.size += len(p)
	b.queue = append(b.queue, chunk{stream, slices.Clone(p), t})
	b.wake.Signal()
	return err
}

func (b *buffered) run() {
	defer close(b.done)
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		for len(b.queue) == 0 {
			if b.closed {
				return
			}
			b.wake.Wait()
		}
		queue, dropped := b.queue, b.dropped
		b.queue, b.dropped = nil, 0
		b.mu.Unlock()
		var errs []error
		n := 0
		for _, c := range queue {
			n += len(c.data)
			errs = append(errs, b.next.Write(c.stream, c.data, c.t))
		}
		if dropped > 0 {
			note := fmt.Sprintf("[conex: %d bytes of output were dropped, the log was too slow]\n", dropped)
			errs = append(errs, b.next.Write("stderr", []byte(note), time.Now()))
		}
		b.mu.Lock()
		b.size -= n
		if err := errors.Join(errs...); err != nil {
			b.err = err
		}
	}
}

// Close writes what is queued and closes the log.
func (b *buffered) Close() error {
	b.mu.Lock()
	b.closed = true
	b.wake.Signal()
	b.mu.Unlock()
	<-b.done
	return errors.Join(b.err, b.next.Close())
}
