package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"

	"conex/internal/build"
)

// plainDisplay shows a build as lines, in BuildKit's words: "#5 [2/4] RUN make", "#5 0.312 output", "#5 DONE 0.4s".
type plainDisplay struct {
	out io.Writer
	// explain shows why steps run and where cached ones come from.
	explain bool
	// last is the step whose line was printed last: when another one speaks, an empty line and its title say so.
	last  int
	steps map[int]*plainStep
}

type plainStep struct {
	started time.Time
	// partial are the ends of the step's two streams that have no newline yet.
	partial [2]string
	// explained says that the reasons were printed.
	explained bool
	// told is when a count of bytes was last printed.
	told time.Time
}

func newPlainDisplay(out io.Writer, explain bool) *plainDisplay {
	return &plainDisplay{out: out, explain: explain, steps: map[int]*plainStep{}}
}

func (d *plainDisplay) event(ev build.Event) {
	if ev.Kind == build.Warning && ev.Finding != nil {
		fmt.Fprintf(d.out, "#%d WARN: %s\n", ev.Vertex, ev.Text)
		return
	}
	if ev.Kind == build.Warning {
		fmt.Fprintf(d.out, "WARNING: %s\n", cleanLines(ev.Text))
		return
	}
	s := d.steps[ev.Vertex]
	if s == nil {
		s = &plainStep{started: ev.Time}
		d.steps[ev.Vertex] = s
	}
	switch ev.Kind {
	case build.Queued: // printed when it runs
	case build.Started:
		s.started = ev.Time
		d.turn(ev)
		d.why(ev, s)
	case build.Output:
		d.turn(ev)
		i := 0
		if ev.Stderr {
			i = 1
		}
		text := s.partial[i] + ev.Text
		for {
			line, rest, ok := strings.Cut(text, "\n")
			if !ok {
				break
			}
			d.line(ev, s, line)
			text = rest
		}
		s.partial[i] = text
	case build.Progress:
		if ev.Time.Sub(s.told) < 5*time.Second && ev.Current != ev.Total || s.told.IsZero() && ev.Time.Sub(s.started) < 5*time.Second {
			return // what is quick needs no count
		}
		s.told = ev.Time
		d.turn(ev)
		fmt.Fprintf(d.out, "#%d %s\n", ev.Vertex, progressText(ev))
	case build.Cached, build.Done, build.Failed, build.Canceled:
		d.turn(ev)
		for i, p := range s.partial {
			if p != "" {
				d.line(ev, s, p)
				s.partial[i] = ""
			}
		}
		d.why(ev, s)
		if ev.Text != "" && (ev.Kind != build.Cached || !s.explained) { // the origin says it
			fmt.Fprintf(d.out, "#%d %s\n", ev.Vertex, clean(ev.Text))
		}
		switch ev.Kind {
		case build.Cached:
			fmt.Fprintf(d.out, "#%d CACHED\n", ev.Vertex)
		case build.Done:
			fmt.Fprintf(d.out, "#%d DONE %.1fs\n", ev.Vertex, ev.Duration.Seconds())
		case build.Failed:
			fmt.Fprintf(d.out, "#%d ERROR: %s\n", ev.Vertex, clean(firstLine(ev.Err)))
		case build.Canceled:
			fmt.Fprintf(d.out, "#%d CANCELED\n", ev.Vertex)
		}
		delete(d.steps, ev.Vertex)
	}
}

// why prints the reasons or the origin of a step, once.
func (d *plainDisplay) why(ev build.Event, s *plainStep) {
	if !d.explain || s.explained {
		return
	}
	for _, l := range whyLines(ev) {
		s.explained = true
		fmt.Fprintf(d.out, "#%d %s\n", ev.Vertex, l)
	}
}

// turn prints the step's title when the lines before were another's.
func (d *plainDisplay) turn(ev build.Event) {
	if d.last == ev.Vertex {
		return
	}
	if d.last != 0 {
		fmt.Fprintln(d.out)
	}
	d.last = ev.Vertex
	name, _, _ := strings.Cut(ev.Name, "\n")
	fmt.Fprintf(d.out, "#%d %s\n", ev.Vertex, clean(name))
}

func (d *plainDisplay) line(ev build.Event, s *plainStep, line string) {
	line = strings.TrimSuffix(line, "\r")
	if i := strings.LastIndexByte(line, '\r'); i >= 0 {
		line = line[i+1:] // of a progress bar only its last state
	}
	fmt.Fprintf(d.out, "#%d %.3f %s\n", ev.Vertex, max(0, ev.Time.Sub(s.started)).Seconds(), line)
}

func progressText(ev build.Event) string {
	if ev.Total > 0 {
		return units.HumanSizeWithPrecision(float64(ev.Current), 4) + " / " + units.HumanSizeWithPrecision(float64(ev.Total), 4)
	}
	return units.HumanSizeWithPrecision(float64(ev.Current), 4)
}

// firstLine is an error's first line; the whole text stands at the end of the output.
func firstLine(err error) string {
	if err == nil {
		return "unknown"
	}
	s, _, _ := strings.Cut(err.Error(), "\n")
	return s
}
