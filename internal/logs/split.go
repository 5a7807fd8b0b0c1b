package logs

import (
	"bytes"
	"time"
	"unicode/utf8"
)

// maxLine is where lines are split, as Docker splits them.
const maxLine = 16 << 10

// splitter cuts a stream's output into lines, and long lines into pieces.
type splitter struct {
	// rest is a line whose end has not come yet, t when its beginning came.
	rest []byte
	t    time.Time
}

// split calls fn for each line that p ends, with its newline, and for each piece of maxLine bytes of a longer one. What is left is kept for
// the next call. fn's argument is only valid until it returns; its error ends the call.
func (s *splitter) split(p []byte, t time.Time, fn func(line []byte) error) error {
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n') + 1
		whole := end > 0
		if !whole {
			end = len(p)
		}
		if len(s.rest) == 0 && whole && end <= maxLine { // the usual case: nothing is copied
			line := p[:end]
			p = p[end:]
			if err := fn(line); err != nil {
				return err
			}
			continue
		}
		if len(s.rest) == 0 {
			s.t = t
		}
		n := min(end, maxLine-len(s.rest))
		s.rest = append(s.rest, p[:n]...)
		p = p[n:]
		line := s.rest
		if line[len(line)-1] != '\n' {
			if len(line) < maxLine {
				break // its end is yet to come
			}
			line = line[:cut(line)]
		}
		err := fn(line)
		s.rest = append(s.rest[:0], s.rest[len(line):]...)
		if err != nil {
			return err
		}
	}
	if len(s.rest) == 0 {
		s.rest = nil // most programs write whole lines
	}
	return nil
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

func countLines(p []byte) uint64 { return uint64(bytes.Count(p, newline)) }

// lastLine returns how much of p is whole lines.
func lastLine(p []byte) int { return bytes.LastIndexByte(p, '\n') + 1 }

var newline = []byte{'\n'}
