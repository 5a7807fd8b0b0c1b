package tty

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrDetached is what a detach reader returns once the user has typed the detach keys.
var ErrDetached = errors.New("detached by the user's keys")

// DefaultDetachKeys are Docker's.
const DefaultDetachKeys = "ctrl-p,ctrl-q"

// ParseDetachKeys reads Docker's notation: keys separated by commas, each one a single character or ctrl-<x>, x being a letter
// or one of @ [ \ ] ^ _. Other words of several ASCII characters are refused. The empty string means that no keys detach.
func ParseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var keys []byte
	for k := range strings.SplitSeq(s, ",") {
		ctrl, ok := strings.CutPrefix(k, "ctrl-")
		switch {
		case ok && len(ctrl) == 1 && ctrl[0] >= 'a' && ctrl[0] <= 'z':
			keys = append(keys, ctrl[0]-'a'+1)
		case ok && len(ctrl) == 1 && strings.Contains(`@[\]^_`, ctrl):
			keys = append(keys, ctrl[0]-'@')
		case len(k) == 1 && k[0] < 0x80:
			keys = append(keys, k[0])
		default:
			return nil, fmt.Errorf("unknown key %q, expected one character or ctrl- with one of a-z @ [ \\ ] ^ _", k)
		}
	}
	return keys, nil
}

// NewDetachReader returns a reader of r that ends with ErrDetached once keys came in a row, however they are spread over reads. The
// keys themselves are not passed on; what only began like them is, as soon as it is clear that it isn't them (or r ends).
// Without keys it is r.
func NewDetachReader(r io.Reader, keys []byte) io.Reader {
	if len(keys) == 0 {
		return r
	}
	return &detachReader{r: r, keys: bytes.Clone(keys)}
}

type detachReader struct {
	r    io.Reader
	keys []byte
	// held is how many of keys came last, which are not passed on yet.
	held int
	// out is what may be passed on, buf the room that it was read into.
	out, buf []byte
	// err follows when out is empty.
	err error
}

// Read implements io.Reader.
func (d *detachReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(d.out) == 0 {
		if d.err != nil {
			return 0, d.err
		}
		if len(d.buf) < len(p) {
			d.buf = make([]byte, len(p))
		}
		n, err := d.r.Read(d.buf[:len(p)])
		d.feed(d.buf[:n])
		if err != nil && d.err == nil {
			d.out = append(d.out, d.keys[:d.held]...)
			d.held, d.err = 0, err
		}
	}
	n := copy(p, d.out)
	d.out = d.out[n:]
	return n, nil
}

// feed takes new input and makes out, which is empty, what it passes on.
func (d *detachReader) feed(in []byte) {
	out := d.out[:0]
	for _, c := range in {
		// Give up the oldest held keys until c goes on with the rest, as in the search for a word that can overlap itself.
		for d.held > 0 && d.keys[d.held] != c {
			next := d.shorter()
			out = append(out, d.keys[:d.held-next]...)
			d.held = next
		}
		if d.keys[d.held] != c {
			out = append(out, c)
			continue
		}
		if d.held++; d.held == len(d.keys) {
			d.held, d.err = 0, ErrDetached
			break
		}
	}
	d.out = out
}

// shorter returns the length of the longest beginning of keys, shorter than what is held, that what is held ends with.
func (d *detachReader) shorter() int {
	for n := d.held - 1; n > 0; n-- {
		if bytes.Equal(d.keys[:n], d.keys[d.held-n:d.held]) {
			return n
		}
	}
	return 0
}
