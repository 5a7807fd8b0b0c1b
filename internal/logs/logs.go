// Package logs owns a container's log: written by the container's monitor alone, read by anybody, bounded by default.
//
// A log is a folder of numbered files, "00000001.log" and so on. The highest number is written to; when it is full the next one is
// begun, the lowest deleted, and full ones are compressed to "00000001.log.zst" when there is time. Numbers are never used again and
// files never renamed to another number, so that a reader can't lose its place while the writer goes on. A link, "local.log" or
// "json.log", points to the file that is being written.
//
// The driver "local", the default, has a compact format of its own (see localFile). The files of "json-file" are Docker's, so that its tools
// can read them, and have the suffixes ".json" and ".json.gz":
//
//	{"log":"text\n","stream":"stdout","time":"2026-01-02T03:04:05.678901234Z"}
//
// There a line longer than 16 KiB is split; all pieces but the last lack the \n. Text that isn't UTF-8 has its exact bytes in
// the additional key "raw" (base64), while "log" has U+FFFD in the place of what is wrong.
//
// "syslog" and "journald" send the output away, and keep a copy in the format of "local", so that it can be read here.
package logs

import (
	"fmt"
	"time"
)

// Record is one line of output, or a piece of a long one.
type Record struct {
	// Line is the text with its newline, if it has one. It is the reader's buffer: copy it to keep it.
	Line []byte
	// Stream is "stdout" or "stderr".
	Stream string
	Time   time.Time
	// Partial says that the line doesn't end here: there is no newline, and the stream's next record goes on.
	Partial bool
	// Continued says that this record goes on with the line of the stream's previous one, so that no time-stamp or prefix belongs
	// in front of it.
	Continued bool
}

// Driver takes a container's output.
type Driver interface {
	// Write logs output of a stream, "stdout" or "stderr", which came at t, in pieces of any size. A nil error promises that the lines
	// which p ends are in the file (not that they are synced to disk), or sent.
	// After an error the lines of this call may be missing, and the next call goes on as if nothing was. It doesn't keep p.
	// The two streams may be written at the same time.
	Write(stream string, p []byte, t time.Time) error
	// Close logs incomplete lines. It is quick: call Compress when the container's exit has been reported.
	Close() error
}

// Open opens the log in dir, which is made if need be, for its only writer. It goes on after what an earlier writer left, in
// whatever state that one died.
func Open(dir string, c Container, o Options) (Driver, error) {
	var d Driver
	var err error
	switch o.Driver {
	case None:
		return discard{}, nil
	case JSONFile:
		var attrs map[string]string
		if attrs, err = c.attributes(o); err == nil {
			d, err = openJSON(dir, o.Files, attrs)
		}
	case Local:
		d, err = openLocal(dir, o.Files)
	case Syslog, Journald:
		d, err = openRemote(dir, c, o)
	default:
		err = fmt.Errorf("log driver %q: %w", o.Driver, ErrUnsupported)
	}
	if err != nil {
		return nil, err
	}
	if o.NonBlocking {
		d = newBuffered(d, o.MaxBuffer)
	}
	return d, nil
}

// discard is the driver "none".
type discard struct{}

func (discard) Write(string, []byte, time.Time) error { return nil }
func (discard) Close() error                          { return nil }
