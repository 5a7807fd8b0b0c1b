package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/spf13/pflag"

	"conex/internal/engine"
)

// progressFlag adds --progress to a command that moves images; out is where its progress goes. The command shows its events by
// transferProgress and prints its last word by (*transfer).result.
func (a *app) progressFlag(f *pflag.FlagSet, out io.Writer) {
	f.Var(&progressValue{a, out}, "progress", `Type of progress output ("auto", "tty", "plain", "json", "quiet")`)
}

// progressValue is the value of --progress.
type progressValue struct {
	a   *app
	out io.Writer
}

func (v *progressValue) Set(s string) error {
	switch s {
	case "auto", "plain", "json", "quiet":
	case "tty":
		if _, ok := terminal(v.out); !ok {
			return &refusal{"progress tty", "needs a terminal to show it on"}
		}
	default:
		return fmt.Errorf(`must be one of "auto", "tty", "plain", "json" or "quiet"`)
	}
	v.a.progress = s
	v.a.errJSON = nil
	if s == "json" {
		v.a.errJSON = v.out
	}
	return nil
}
func (v *progressValue) Type() string   { return "string" }
func (v *progressValue) String() string { return "" }

// transfer shows what happens to an image on its way to or from this machine. Its methods may be called from several goroutines.
type transfer struct {
	out  io.Writer
	mode string // tty, plain, json or quiet

	mu   sync.Mutex
	view transferView
	done bool
}

// transferView is one way to show events. Close paints what is left to paint; nothing follows it.
type transferView interface {
	event(engine.Event)
	close()
}

// transferProgress returns the display that --progress, or without it the kind of out, asks for. quiet shows nothing.
func (a *app) transferProgress(out io.Writer, quiet bool) *transfer {
	mode := a.progress
	term, isTTY := terminal(out)
	if mode == "" || mode == "auto" {
		mode = "plain"
		if isTTY && os.Getenv("TERM") != "dumb" {
			mode = "tty"
		}
	}
	t := &transfer{out: out, mode: mode}
	switch {
	case quiet:
		t.view = quietTransfer{}
	case mode == "json":
		t.view = &jsonTransfer{out: out, now: time.Now, items: map[string]*jsonItem{}}
	case mode == "plain":
		t.view = &plainTransfer{out: out, last: map[string]string{}}
	case mode == "tty" && term != nil:
		t.view = newTTYTransfer(out, term)
	default:
		t.view = quietTransfer{}
	}
	return t
}

// pullProgress is transferProgress for commands without --progress.
func (a *app) pullProgress(out io.Writer, quiet bool) *transfer {
	return a.transferProgress(out, quiet)
}

// event takes one event; nothing is shown after close.
func (t *transfer) event(ev engine.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.done {
		t.view.event(ev)
	}
}

// close ends the display: idempotent.
func (t *transfer) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.done {
		t.done = true
		t.view.close()
	}
}

// result ends the display and prints the command's last word as a line, in JSON as {"aux":{key:text}}.
func (t *transfer) result(key, text string) {
	t.close()
	if t.mode == "json" {
		t.aux(map[string]any{key: clean(text)})
		return
	}
	fmt.Fprintln(t.out, clean(text))
}

// aux prints what only programs want to know: nothing but in JSON.
func (t *transfer) aux(facts map[string]any) {
	if t.mode == "json" {
		writeJSON(t.out, jsonMessage{Aux: facts})
	}
}

type quietTransfer struct{}

func (quietTransfer) event(engine.Event) {}
func (quietTransfer) close()             {}

// plainTransfer prints a line for every change of what happens to a layer, and no numbers: they would flood a file.
type plainTransfer struct {
	out  io.Writer
	last map[string]string // what happened to each thing last
}

func (p *plainTransfer) event(ev engine.Event) {
	if ev.ID == "" && ev.Message != "" {
		clear(p.last)
		fmt.Fprintln(p.out, clean(ev.Message))
		return
	}
	old, known := p.last[ev.ID]
	p.last[ev.ID] = ev.Action
	if (!known || old != ev.Action) && !counting(ev.Action) {
		fmt.Fprintln(p.out, label(ev.ID)+clean(ev.Action))
	}
}

func (p *plainTransfer) close() {}

// jsonMessage is one line of --progress json. The names are those of Docker's API; rate, in bytes a second, is conex's own.
type jsonMessage struct {
	ID     string         `json:"id,omitempty"`
	Status string         `json:"status,omitempty"`
	Detail *jsonDetail    `json:"progressDetail,omitempty"`
	Error  string         `json:"error,omitempty"`
	Why    *jsonError     `json:"errorDetail,omitempty"`
	Aux    map[string]any `json:"aux,omitempty"`
}

type jsonDetail struct {
	Current int64 `json:"current"`
	Total   int64 `json:"total,omitempty"`
	Rate    int64 `json:"rate,omitempty"`
}

type jsonError struct {
	Code    int    `json:"code,omitempty"`
	Message string `json:"message"`
}

// jsonTransfer prints every event as an object on a line of its own.
type jsonTransfer struct {
	out   io.Writer
	now   func() time.Time
	items map[string]*jsonItem
}

type jsonItem struct {
	action  string
	rate    rate
	printed time.Time
}

func (j *jsonTransfer) event(ev engine.Event) {
	m := jsonMessage{ID: clean(ev.ID), Status: clean(ev.Action)}
	if ev.ID == "" && ev.Message != "" {
		writeJSON(j.out, jsonMessage{Status: clean(ev.Message)})
		return
	}
	if ev.Current > 0 || ev.Total > 0 || counting(ev.Action) {
		it := j.items[ev.ID]
		if it == nil || it.action != ev.Action {
			it = &jsonItem{action: ev.Action}
			j.items[ev.ID] = it
		}
		m.Detail = &jsonDetail{Current: ev.Current, Total: ev.Total}
		if now := j.now(); counting(ev.Action) {
			it.rate.add(now, ev.Current)
			if now.Sub(it.printed) < paintEvery {
				return // as often as a terminal is painted: a step that ends says so by another action
			}
			it.printed = now
			m.Detail.Rate = int64(it.rate.perSecond())
		}
	}
	writeJSON(j.out, m)
}

func (j *jsonTransfer) close() {}

// writeJSON prints one object; a reader that has gone is noticed by what matters.
func writeJSON(out io.Writer, m jsonMessage) {
	b, err := json.Marshal(m)
	if err != nil {
		b = []byte(`{"error":"message can't be encoded"}`)
	}
	out.Write(append(b, '\n')) //nolint:errcheck // see above
}

// counting reports whether an action's point is its numbers.
func counting(action string) bool {
	switch action {
	case "Downloading", "Extracting", "Importing", "Pushing", "Compressing", "Loading layer", "Saving layer", "Verifying Checksum", "Mounting":
		return true
	}
	return false
}

// open reports whether more will happen to a thing of which this was said last.
func open(action string) bool {
	switch action {
	case "Pulling fs layer", "Waiting", "Preparing", "Download complete":
		return true
	}
	return counting(action) || strings.HasPrefix(action, "Retrying") || strings.HasPrefix(action, "Copying from")
}

// moves reports whether an action's bytes are those that come or go: what the total line adds up.
func moves(action string) bool {
	switch action {
	case "Downloading", "Importing", "Pushing", "Loading layer", "Saving layer":
		return true
	}
	return false
}

// settled reports whether nothing more will happen to a thing. moved tells whether its bytes came or went for that.
func settled(action string) (done, moved bool) {
	switch action {
	case "Pull complete", "Pushed", "Loaded", "Saved":
		return true, true
	case "Already exists", "Layer already exists":
		return true, false
	}
	return strings.HasPrefix(action, "Mounted from"), false
}

func label(id string) string {
	if id == "" {
		return ""
	}
	return clean(id) + ": "
}

// clean makes a text that others wrote (a registry, the output of a build) harmless in a line of ours: escape sequences, control
// characters and marks that turn the direction of writing go, tabs become spaces.
func clean(s string) string {
	var b strings.Builder
	esc := 0 // 1 behind an escape character, 2 inside of a sequence
	for _, r := range strings.ToValidUTF8(s, "?") {
		switch {
		case esc == 1:
			esc = 0
			if r == '[' {
				esc = 2
			}
		case esc == 2:
			if r >= 0x40 && r <= 0x7e {
				esc = 0
			}
		case r == 0x1b:
			esc = 1
		case r == '\t':
			b.WriteString("    ")
		case unicode.IsControl(r), unicode.Is(unicode.Bidi_Control, r), r == '\u2028', r == '\u2029':
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// cleanLines is clean for a text of several lines.
func cleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = clean(l)
	}
	return strings.Join(lines, "\n")
}
