package cli

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"conex/internal/build"
	"conex/internal/linux/tty"
)

// ttyDisplay shows a build on a terminal: finished steps as lines that stay, running ones below with their time and the last lines
// of their output, repainted in place.
//
//	[+] Building 3.2s (5/8)
//	 => CACHED [1/4] FROM docker.io/library/node:22                0.0s
//	 => [2/4] RUN npm ci                                           3.1s
//	 => => added 58 packages in 2s
type ttyDisplay struct {
	out  io.Writer
	term *os.File
	// explain shows why steps run and where cached ones come from; tail is how many lines of a running step's output are shown.
	explain bool
	tail    int

	mu    sync.Mutex
	begun time.Time
	steps []*ttyStep
	byID  map[int]*ttyStep
	warn  []string
	drawn int
	ended bool
	// paused says that the terminal is somebody else's.
	paused bool

	stop, stopped chan struct{}
}

type ttyStep struct {
	name    string
	state   build.EventKind
	started time.Time
	took    time.Duration
	output  []string // the last lines; the last one may still grow
	count   string
	why     []string
}

// ttyOutputLines is how much of a running step's output is shown, and maxTTYLines how much is kept for BUILDKIT_TTY_LOG_LINES.
const (
	ttyOutputLines = 6
	maxTTYLines    = 100
)

// logLines is what BUILDKIT_TTY_LOG_LINES says.
func logLines() int {
	if n, err := strconv.Atoi(os.Getenv("BUILDKIT_TTY_LOG_LINES")); err == nil && n > 0 {
		return min(n, maxTTYLines)
	}
	return ttyOutputLines
}

func newTTYDisplay(out io.Writer, term *os.File, explain bool) *ttyDisplay {
	d := &ttyDisplay{out: out, term: term, explain: explain, tail: logLines(), begun: time.Now(), byID: map[int]*ttyStep{}, stop: make(chan struct{}), stopped: make(chan struct{})}
	go func() { // ends with close
		defer close(d.stopped)
		t := time.NewTicker(100 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-d.stop:
				return
			case <-t.C:
				d.mu.Lock()
				if !d.paused {
					d.draw(time.Now())
				}
				d.mu.Unlock()
			}
		}
	}()
	return d
}

func (d *ttyDisplay) event(ev build.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ev.Kind == build.Warning {
		if ev.Finding != nil {
			return // told when the build is over
		}
		d.warn = append(d.warn, ev.Text)
		return
	}
	s := d.byID[ev.Vertex]
	if s == nil {
		name, _, _ := strings.Cut(ev.Name, "\n")
		s = &ttyStep{name: name}
		d.byID[ev.Vertex] = s
		d.steps = append(d.steps, s)
	}
	switch ev.Kind {
	case build.Output:
		s.write(ev.Text)
		return
	case build.Progress:
		s.count = progressText(ev)
		return
	case build.Started:
		s.started = ev.Time
	}
	s.state, s.took = ev.Kind, ev.Duration
	if d.explain && s.why == nil {
		s.why = whyLines(ev)
	}
}

// write adds output; a carriage return starts the line anew.
func (s *ttyStep) write(text string) {
	if len(s.output) == 0 {
		s.output = []string{""}
	}
	text = strings.ReplaceAll(text, "\r\n", "\n")
	for i, part := range strings.Split(text, "\n") {
		if i > 0 {
			s.output = append(s.output, "")
		}
		last := &s.output[len(s.output)-1]
		if j := strings.LastIndexByte(part, '\r'); j >= 0 {
			part, *last = part[j+1:], ""
		}
		*last += part
	}
	if n := len(s.output) - maxTTYLines - 1; n > 0 {
		s.output = append([]string(nil), s.output[n:]...)
	}
}

// draw repaints everything that still fits on the screen.
func (d *ttyDisplay) draw(now time.Time) {
	cols, rows := 80, 24
	if sz, err := tty.GetSize(int(d.term.Fd())); err == nil && sz.Cols > 0 && sz.Rows > 0 {
		cols, rows = int(sz.Cols), int(sz.Rows)
	}
	lines := d.lines(now, cols, rows)
	var b strings.Builder
	b.WriteString("\x1b[?25l")
	if d.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", d.drawn)
	}
	for _, l := range lines {
		b.WriteString("\r\x1b[K" + l + "\n")
	}
	b.WriteString("\x1b[J\x1b[?25h")
	d.drawn = len(lines)
	io.WriteString(d.out, b.String()) //nolint:errcheck // a terminal that is gone is noticed by what matters
}

// lines is the whole picture for a screen of that size: a title, the steps in order, below running ones their output. While the build
// runs, steps that wait are left out, and the oldest finished ones when there is too little room.
func (d *ttyDisplay) lines(now time.Time, cols, rows int) []string {
	finished, total := 0, 0
	var body []string
	for _, s := range d.steps {
		total++
		took := s.took
		mark := ""
		switch s.state {
		case build.Queued:
			continue
		case build.Started:
			took = now.Sub(s.started)
		case build.Cached:
			mark = "CACHED "
		case build.Failed:
			mark = "ERROR "
		case build.Canceled:
			mark = "CANCELED "
		}
		if s.state != build.Started {
			finished++
		}
		name := s.name
		if s.state == build.Started && s.count != "" {
			name += " " + s.count
		}
		body = append(body, timed(" => "+mark+clean(name), took, cols))
		for _, l := range s.why {
			body = append(body, ellipsis("    "+l, cols-1))
		}
		if s.state == build.Started || s.state == build.Failed {
			out := s.output
			if n := len(out); n > 0 && out[n-1] == "" {
				out = out[:n-1]
			}
			for _, l := range out[max(0, len(out)-cmp.Or(d.tail, ttyOutputLines)):] {
				body = append(body, ellipsis(" => => "+clean(l), cols-1))
			}
		}
	}
	if !d.ended && len(body) > rows-2 {
		body = body[len(body)-max(rows-2, 1):]
	}
	state := ""
	if d.ended {
		state = "FINISHED"
	}
	title := timed(strings.TrimRight(fmt.Sprintf("[+] Building %.1fs (%d/%d) %s", now.Sub(d.begun).Seconds(), finished, total, state), " "), -1, cols)
	return append([]string{title}, body...)
}

// timed puts a duration at the right edge; a negative one is left out.
func timed(s string, took time.Duration, cols int) string {
	if took < 0 {
		return ellipsis(s, cols-1)
	}
	t := fmt.Sprintf(" %.1fs", took.Seconds())
	width := max(cols-1-len(t), 10)
	s = ellipsis(s, width)
	return s + strings.Repeat(" ", width-len([]rune(s))) + t
}

// pause stops painting, after a last picture, and begins anew below what was written meanwhile.
func (d *ttyDisplay) pause(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if on && !d.paused {
		d.draw(time.Now())
	}
	d.paused, d.drawn = on, 0
}

// close paints the last picture and ends the display: idempotent.
func (d *ttyDisplay) close() {
	d.mu.Lock()
	if d.ended {
		d.mu.Unlock()
		return
	}
	d.ended = true
	d.draw(time.Now())
	for _, w := range d.warn {
		fmt.Fprintf(d.out, "WARNING: %s\n", cleanLines(w))
	}
	d.mu.Unlock()
	close(d.stop)
	<-d.stopped
}
