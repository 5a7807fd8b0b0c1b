package logs

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"conex/internal/disk"
)

// message is a line, or a piece of a long one, on its way to somewhere else.
type message struct {
	line   []byte // without its newline
	stderr bool
	t      time.Time
	// id is the same for all pieces of a line, empty for a whole one; ordinal counts them from 1. last says that the line ends with this one.
	id      string
	ordinal int
	last    bool
}

// sink is where messages go.
type sink interface {
	// send takes one message. It may keep it, but not its bytes, until flush.
	send(m message) error
	// flush sends what is kept.
	flush() error
	close() error
}

// remote is a driver that sends the output away, and keeps a copy.
type remote struct {
	mu   sync.Mutex
	sink sink
	copy *localFile // nil: none is kept
	rest [2]splitter
	// parts are the lines of which a piece has been sent.
	parts  [2]message
	closed bool
}

func openRemote(dir string, c Container, o Options) (Driver, error) {
	attrs, err := c.attributes(o)
	if err != nil {
		return nil, err
	}
	if o.Tag == "" {
		o.Tag = defaultTag
	}
	tag, err := c.tag(o.Tag)
	if err != nil {
		return nil, err
	}
	r := &remote{}
	if o.Driver == Syslog {
		r.sink, err = openSyslog(o.Syslog, tag)
	} else {
		r.sink, err = openJournal(c, tag, attrs)
	}
	if err != nil {
		return nil, err
	}
	if o.Cached() {
		if r.copy, err = openLocal(dir, o.Files); err != nil {
			return nil, errors.Join(err, r.sink.close())
		}
	}
	return r, nil
}

// Write implements Driver. The copy comes first: it is quick, and complete when the other side is not there.
func (r *remote) Write(stream string, p []byte, t time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return os.ErrClosed
	}
	var errs []error
	if r.copy != nil {
		errs = append(errs, r.copy.Write(stream, p, t))
	}
	i := 0
	if stream == "stderr" {
		i = 1
	}
	err := r.rest[i].split(p, t, func(line []byte) error { return r.send(i, line, t) })
	return errors.Join(append(errs, err, r.sink.flush())...)
}

// send sends a line or a piece.
func (r *remote) send(i int, line []byte, t time.Time) error {
	line, whole := bytes.CutSuffix(line, newline)
	part := &r.parts[i]
	if part.id == "" && !whole {
		part.id = disk.RandomID()
	}
	part.line, part.stderr, part.t, part.last = line, i == 1, t, whole
	if part.id != "" {
		part.ordinal++
	}
	m := *part
	if whole {
		*part = message{}
	}
	return r.sink.send(m)
}

// Close implements Driver.
func (r *remote) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	var errs []error
	for i := range r.rest {
		if s := &r.rest[i]; len(s.rest) > 0 {
			errs = append(errs, r.send(i, s.rest, s.t))
		}
	}
	errs = append(errs, r.sink.flush(), r.sink.close())
	if r.copy != nil {
		errs = append(errs, r.copy.Close())
	}
	return errors.Join(errs...)
}

// pid is the monitor's, which takes the place of Docker's daemon in messages.
var pid = strconv.Itoa(os.Getpid())

// How long the other side may keep a container waiting: to be connected, to take messages, and how long it is left alone when it
// didn't. Messages are lost meanwhile, from there; the copy has them.
var (
	dialTimeout = 3 * time.Second
	sendTimeout = 5 * time.Second
	firstPause  = time.Second
	maxPause    = 30 * time.Second
)

// patience is what is left of it with the other side.
type patience struct {
	// lost counts messages that could not be sent.
	lost int
	// From a failure on, nothing is tried before then; pause is how long that was after it.
	then  time.Time
	pause time.Duration
}

// over says that there is no use in trying now; the message is lost.
func (p *patience) over() bool {
	if p.pause == 0 || !time.Now().Before(p.then) {
		return false
	}
	p.lost++
	return true
}

// failed leaves the other side alone for a while, after n messages were lost.
func (p *patience) failed(n int) {
	p.lost += n
	p.pause = min(max(2*p.pause, firstPause), maxPause)
	p.then = time.Now().Add(p.pause)
}

// note says how much was lost since the last note, "" if nothing was.
func (p *patience) note() string {
	if p.lost == 0 {
		return ""
	}
	n := p.lost
	p.lost = 0
	return fmt.Sprintf("[conex: %d messages could not be sent]", n)
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}
