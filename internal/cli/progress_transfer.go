package cli

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/docker/go-units"

	"conex/internal/engine"
	"conex/internal/linux/tty"
)

// ttyTransfer shows a transfer on a terminal: a line for each layer, repainted in place, and below them the sum.
//
//	latest: Pulling from library/node
//	a2abf6c4d29d: Pull complete
//	a9edb18cadd1: Downloading [======>          ] 12.34MB/31.36MB  10.2MB/s      2s
//	589b7251471a: Waiting
//	Total                     [=====>           ] 43.70MB/92.10MB  22.8MB/s      3s
//
// Events only change what is known. A goroutine paints ten times a second at most, the whole picture by one write, in which the
// cursor is hidden and shown again: a terminal that is slow or stopped holds nothing up, and whatever ends the program, the terminal
// is left as it should be.
type ttyTransfer struct {
	out  io.Writer
	size func() (cols, rows int)
	now  func() time.Time

	mu    sync.Mutex
	begun time.Time // when the first byte came or went
	order []*ttyItem
	byID  map[string]*ttyItem
	sum   rate
	// said is what goes above the next picture and stays: remarks, and pictures of what is over.
	said string

	// drawn are the widths of the lines on the screen that belong to us, above the cursor. These two are the painter's alone.
	drawn []int
	shown string

	stop, stopped chan struct{} // nil until there is something to show
}

type ttyItem struct {
	id, action     string
	current, total int64 // of the action
	rate           rate
	// size are the bytes that have to come or go, have those that did, from those that had before we began.
	size, have, from int64
	carried          bool
}

const paintEvery = 100 * time.Millisecond

func newTTYTransfer(out io.Writer, term *os.File) *ttyTransfer {
	return &ttyTransfer{out: out, now: time.Now, byID: map[string]*ttyItem{}, size: func() (int, int) {
		if sz, err := tty.GetSize(int(term.Fd())); err == nil && sz.Cols > 0 && sz.Rows > 0 {
			return int(sz.Cols), int(sz.Rows)
		}
		return 80, 24
	}}
}

// paint is the goroutine that keeps the picture current; it ends with close.
func (d *ttyTransfer) paint(stop <-chan struct{}) {
	defer close(d.stopped)
	cont := make(chan os.Signal, 1)
	signal.Notify(cont, syscall.SIGCONT)
	defer signal.Stop(cont)
	t := time.NewTicker(paintEvery)
	defer t.Stop()
	for {
		select {
		case <-stop:
			d.draw(true)
			return
		case <-cont:
			d.drawn, d.shown = nil, "" // the shell has written below our picture meanwhile: the next one stands below that
		case <-t.C:
			d.draw(false)
		}
	}
}

func (d *ttyTransfer) event(ev engine.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stop == nil {
		d.stop, d.stopped = make(chan struct{}), make(chan struct{})
		go d.paint(d.stop)
	}
	if ev.ID == "" && ev.Message != "" {
		// Below what is over and above what is not.
		if !slices.ContainsFunc(d.order, func(it *ttyItem) bool { return open(it.action) }) {
			cols, rows := d.size()
			d.said += strings.Join(append(d.lines(cols, rows, true), ""), "\n")
			d.order, d.byID, d.sum, d.begun = nil, map[string]*ttyItem{}, rate{}, time.Time{}
		}
		d.said += clean(ev.Message) + "\n"
		return
	}
	it := d.byID[ev.ID]
	if it == nil {
		it = &ttyItem{id: ev.ID}
		d.byID[ev.ID] = it
		d.order = append(d.order, it)
	}
	it.take(ev, d.now())
	if it.carried && d.begun.IsZero() {
		d.begun = d.now()
		d.sum.add(d.begun, d.moved())
	}
}

func (it *ttyItem) take(ev engine.Event, now time.Time) {
	if ev.Action != it.action {
		it.rate = rate{}
		it.rate.add(now, ev.Current)
	}
	it.action, it.current, it.total = ev.Action, ev.Current, ev.Total
	done, moved := settled(ev.Action)
	switch {
	case moves(ev.Action):
		if !it.carried && ev.Action == "Downloading" {
			it.from = ev.Current // the first event says what was here before
		}
		it.carried = true
		it.have, it.size = ev.Current, max(ev.Total, 0)
	case done && !moved:
		it.have, it.size, it.from = 0, 0, 0
	case done && ev.Total > 0: // what was sent compressed is less than what was read for it
		it.have, it.size = ev.Total, ev.Total
	case done || it.carried:
		it.have = max(it.size, it.have)
	case ev.Total > 0 && open(ev.Action):
		it.size = ev.Total
	}
}

// moved is how many bytes came or went since we look.
func (d *ttyTransfer) moved() (n int64) {
	for _, it := range d.order {
		n += it.have - it.from
	}
	return n
}

// draw paints the picture as it is now, if that is another than the one on the screen.
func (d *ttyTransfer) draw(last bool) {
	cols, rows := d.size()
	d.mu.Lock()
	d.tick(d.now())
	lines, said := d.lines(cols, rows, last), d.said
	d.said = ""
	d.mu.Unlock()
	picture := strings.Join(lines, "\n")
	if picture == d.shown && said == "" {
		return
	}
	var b strings.Builder
	b.WriteString("\x1b[?25l")
	up := 0
	for _, w := range d.drawn {
		up += max(1, (w+cols-1)/cols) // a terminal made narrower has broken the line
	}
	if up > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", up)
	}
	b.WriteString("\r")
	d.drawn = d.drawn[:0]
	for l := range strings.Lines(said) {
		b.WriteString(strings.TrimSuffix(l, "\n") + "\x1b[K\r\n")
	}
	for _, l := range lines {
		b.WriteString(l + "\x1b[K\r\n") // cleared behind the text, not before: no flicker
		d.drawn = append(d.drawn, utf8.RuneCountInString(l))
	}
	b.WriteString("\x1b[J\x1b[?25h")
	d.shown = picture
	io.WriteString(d.out, b.String()) //nolint:errcheck // a terminal that is gone is noticed by what matters
}

// tick lets the rates know that time passes.
func (d *ttyTransfer) tick(now time.Time) {
	for _, it := range d.order {
		if counting(it.action) {
			it.rate.add(now, it.current)
		}
	}
	if !d.begun.IsZero() {
		d.sum.add(now, d.moved())
	}
}

// close paints the last picture, whole, and ends the display.
func (d *ttyTransfer) close() {
	d.mu.Lock()
	stop := d.stop
	d.mu.Unlock()
	if stop != nil {
		close(stop)
		<-d.stopped
	}
}

// lines is the picture for a screen of that size. While there are more layers than lines, those at work come first.
func (d *ttyTransfer) lines(cols, rows int, last bool) []string {
	show, more, foot := d.order, "", d.foot(cols, last)
	room := max(rows-1, 1)
	if foot != "" {
		room--
	}
	if !last && len(show) > room {
		show, more = d.busiest(max(room-1, 0))
	}
	var all []string
	for _, it := range show {
		all = append(all, it.line(cols, last))
	}
	if more != "" {
		all = append(all, ellipsis(more, cols-1))
	}
	if foot != "" {
		all = append(all, foot)
	}
	return all
}

// busiest picks n things, those at work before those that wait and these before those that are done, and shows them in their order.
// rest says how many are not shown.
func (d *ttyTransfer) busiest(n int) (show []*ttyItem, rest string) {
	rank := func(it *ttyItem) int {
		switch {
		case counting(it.action):
			return 0
		case open(it.action):
			return 1
		}
		return 2
	}
	at := make([]int, len(d.order))
	for i := range at {
		at[i] = i
	}
	slices.SortStableFunc(at, func(a, b int) int { return rank(d.order[a]) - rank(d.order[b]) })
	var hidden [3]int
	for _, i := range at[n:] {
		hidden[rank(d.order[i])]++
	}
	at = at[:n]
	slices.Sort(at)
	for _, i := range at {
		show = append(show, d.order[i])
	}
	var parts []string
	for i, what := range []string{"at work", "waiting", "done"} {
		if hidden[i] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", hidden[i], what))
		}
	}
	return show, "... and " + strings.Join(parts, ", ")
}

func (it *ttyItem) line(cols int, last bool) string {
	s := label(it.id) + clean(it.action)
	if !counting(it.action) || it.current <= 0 && it.total <= 0 {
		return ellipsis(s, cols-1)
	}
	r := &it.rate
	if last {
		r = nil
	}
	return gauge(s, it.current, it.total, r, cols)
}

// foot is the sum of all layers: while bytes move with a bar, afterwards what it took. "" says that there is no sum worth a line.
func (d *ttyTransfer) foot(cols int, last bool) string {
	if d.begun.IsZero() {
		return ""
	}
	var have, size int64
	summands, working, unknown := 0, false, false
	for _, it := range d.order {
		have, size = have+it.have, size+it.size
		if it.carried || it.size > 0 {
			summands++
		}
		working = working || open(it.action)
		unknown = unknown || it.carried && it.size == 0
	}
	if unknown {
		size = 0
	}
	if last {
		if working {
			return ""
		}
		took := d.now().Sub(d.begun)
		return ellipsis(fmt.Sprintf("Total %s in %.1fs, %s/s", units.HumanSizeWithPrecision(float64(d.moved()), 4), took.Seconds(),
			units.HumanSizeWithPrecision(float64(d.moved())/max(took.Seconds(), 0.001), 3)), cols-1)
	}
	if summands < 2 {
		return "" // it would say what the one line says
	}
	return gauge(fmt.Sprintf("%-*s", len("a9edb18cadd1: Downloading"), "Total"), have, size, &d.sum, cols)
}

// gauge puts a bar, the numbers, the rate and the time left behind a text, as many of them as there is room for. Without r there are
// no rate and time.
func gauge(s string, current, total int64, r *rate, cols int) string {
	width := cols - 1
	size := func(n int64) string { return units.HumanSizeWithPrecision(float64(n), 4) }
	numbers := fmt.Sprintf(" %7s", size(current))
	if total > 0 {
		numbers += fmt.Sprintf("/%-7s", size(total))
	}
	var speed, left string
	if r != nil {
		speed = strings.Repeat(" ", 10)
		if r.weight > 0 {
			speed = fmt.Sprintf(" %9s", units.HumanSizeWithPrecision(r.perSecond(), 3)+"/s")
		}
		if total > 0 {
			left = fmt.Sprintf(" %7s", "-")
			if d, ok := r.eta(total - current); ok {
				left = fmt.Sprintf(" %7s", brief(d))
			}
		}
	}
	const least = 10 // a bar that is shorter says nothing
	bar := ""
	free := width - utf8.RuneCountInString(s) - len(numbers) - len(speed) - len(left) - len(" []")
	if total > 0 && free >= least {
		n := min(free, 50)
		done := int(float64(min(max(current, 0), total)) / float64(total) * float64(n))
		bar = " [" + strings.Repeat("=", max(done-1, 0)) + ">" + strings.Repeat(" ", n-max(done, 1)) + "]"
	}
	for _, part := range []string{bar, numbers, speed, left} {
		if utf8.RuneCountInString(s)+len(part) <= width {
			s += part
		}
	}
	return ellipsis(strings.TrimRight(s, " "), width)
}
