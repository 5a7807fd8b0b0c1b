package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/docker/go-units"

	"conex/internal/engine"
	"conex/internal/linux/tty"
)

// pullProgress shows the events of a pull or an import: on a terminal a line for every layer that changes in place, else a line
// for every change of what happens to a layer.
type pullProgress struct {
	mu    sync.Mutex
	out   io.Writer
	tty   *os.File // nil without a terminal
	quiet bool
	done  bool
	order []string
	lines map[string]engine.Event
	drawn int // lines on the screen that belong to us, above the cursor
}

func (a *app) pullProgress(out io.Writer, quiet bool) *pullProgress {
	p := &pullProgress{out: out, quiet: quiet, lines: map[string]engine.Event{}}
	if f, ok := terminal(out); ok {
		p.tty = f
	}
	return p
}

// event takes one event; nothing is shown after close.
func (p *pullProgress) event(ev engine.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done || p.quiet {
		return
	}
	if ev.ID == "" && ev.Message != "" {
		// A remark stands below what has been, and what follows below it.
		p.order, p.lines, p.drawn = nil, map[string]engine.Event{}, 0
		fmt.Fprintln(p.out, ev.Message)
		return
	}
	old, known := p.lines[ev.ID]
	p.lines[ev.ID] = ev
	if !known {
		p.order = append(p.order, ev.ID)
	}
	if p.tty != nil {
		p.draw()
		return
	}
	if (!known || old.Action != ev.Action) && !counting(ev) {
		fmt.Fprintln(p.out, label(ev)+ev.Action)
	}
}

// counting reports whether the event's point is its numbers, which would flood a file.
func counting(ev engine.Event) bool {
	return ev.Action == "Downloading" || ev.Action == "Extracting" || ev.Action == "Importing"
}

func label(ev engine.Event) string {
	if ev.ID == "" {
		return ""
	}
	return ev.ID + ": "
}

// draw repaints all lines. Those that scrolled off the top can't be reached, so only the last screenful is painted again.
func (p *pullProgress) draw() {
	cols, rows := 80, 24
	if sz, err := tty.GetSize(int(p.tty.Fd())); err == nil && sz.Cols > 0 && sz.Rows > 0 {
		cols, rows = int(sz.Cols), int(sz.Rows)
	}
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	show := p.order
	if len(show) > rows-1 {
		show = show[len(show)-(rows-1):]
	}
	for _, id := range show {
		b.WriteString("\r\x1b[K" + ellipsis(pullLine(p.lines[id], cols), cols-1) + "\n")
	}
	p.drawn = len(show)
	io.WriteString(p.out, b.String()) //nolint:errcheck // a terminal that is gone is noticed by what matters
}

func pullLine(ev engine.Event, cols int) string {
	s := label(ev) + ev.Action
	if !counting(ev) {
		return s
	}
	size := func(n int64) string { return units.HumanSizeWithPrecision(float64(n), 4) }
	if ev.Total <= 0 {
		return s + " " + size(ev.Current)
	}
	if cols > 80 {
		const width = 50
		n := int(min(ev.Current, ev.Total) * width / ev.Total)
		s += " [" + strings.Repeat("=", max(n-1, 0)) + ">" + strings.Repeat(" ", width-max(n, 1)) + "]"
	}
	return s + fmt.Sprintf(" %8s/%s", size(ev.Current), size(ev.Total))
}

// close ends the display: idempotent.
func (p *pullProgress) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = true
}
