package build

import (
	"bytes"
	"os"
	"strings"
	"sync"
)

// Limits of what is kept of a step's output for its error.
const (
	tailBytes = 16 << 10
	tailLines = 40
)

// output carries what a command writes to the display and keeps its end.
type output struct {
	stdout, stderr *os.File // the command's ends
	readers        [2]*os.File
	vertex         *vertex
	done           sync.WaitGroup

	mu   sync.Mutex
	last []byte
}

func newOutput(v *vertex) (*output, error) {
	o := &output{vertex: v}
	var err error
	if o.readers[0], o.stdout, err = os.Pipe(); err != nil {
		return nil, err
	}
	if o.readers[1], o.stderr, err = os.Pipe(); err != nil {
		o.abort()
		return nil, err
	}
	for i, r := range o.readers {
		o.done.Go(func() { o.read(r, i == 1) })
	}
	return o, nil
}

// started closes our copies of the command's ends, so that the readers see the end.
func (o *output) started() {
	o.stdout.Close()
	o.stderr.Close()
}

// wait returns when everything was read. Call it after the command and all its children are dead.
func (o *output) wait() { o.done.Wait() }

// abort frees everything, whatever the state. Idempotent.
func (o *output) abort() {
	for _, f := range []*os.File{o.stdout, o.stderr, o.readers[0], o.readers[1]} {
		if f != nil {
			f.Close()
		}
	}
	o.done.Wait()
}

// read passes a stream on in whole lines where it can: a progress bar's carriage return counts as one.
func (o *output) read(r *os.File, stderr bool) {
	buf := make([]byte, 0, 8<<10)
	for {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		cut := bytes.LastIndexAny(buf, "\n\r") + 1
		if err != nil || len(buf) == cap(buf) && cut == 0 {
			cut = len(buf)
		}
		if cut > 0 {
			o.emit(buf[:cut], stderr)
			buf = buf[:copy(buf, buf[cut:])]
		}
		if err != nil {
			return // io.EOF, or abort closed the pipe
		}
	}
}

func (o *output) emit(b []byte, stderr bool) {
	o.vertex.output(string(b), stderr)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = append(o.last, b...)
	if len(o.last) > 2*tailBytes {
		o.last = append(o.last[:0], o.last[len(o.last)-tailBytes:]...)
	}
}

// tail is the end of what was written.
func (o *output) tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := string(o.last)
	if len(s) > tailBytes {
		s = s[len(s)-tailBytes:]
	}
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	if len(lines) > tailLines {
		lines = lines[len(lines)-tailLines:]
	}
	return strings.Join(lines, "\n")
}
