package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"conex/internal/build"
	"conex/internal/dockerfile"
	"conex/internal/engine"
)

// buildView shows a build as --progress asks for.
type buildView struct {
	event build.Display
	// close ends it: idempotent.
	close func()
	mode  string
	json  *jsonBuild
	tty   *ttyDisplay

	mu     sync.Mutex
	paused bool
	kept   []build.Event // what happened during a pause
}

// show shows an event, or keeps it until the pause is over: nobody who builds waits for the reader.
func (v *buildView) show(ev build.Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.paused {
		v.kept = append(v.kept, ev)
		return
	}
	v.event(ev)
}

// pause leaves the terminal to others until resume.
func (v *buildView) pause() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = true
	if v.tty != nil {
		v.tty.pause(true)
	}
}

func (v *buildView) resume() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = false
	for _, ev := range v.kept {
		v.event(ev)
	}
	v.kept = nil
	if v.tty != nil {
		v.tty.pause(false)
	}
}

// buildView chooses how a build is shown.
func (a *app) buildView(mode string, quiet, explain bool) (*buildView, error) {
	if quiet {
		if mode != "" && mode != "auto" && mode != "quiet" && mode != os.Getenv("BUILDKIT_PROGRESS") {
			return nil, fmt.Errorf("--progress %s and --quiet can't be used together", mode)
		}
		mode = "quiet"
	}
	out, isTTY := terminal(a.err)
	if mode == "auto" || mode == "" {
		mode = "plain"
		if isTTY && os.Getenv("TERM") != "dumb" {
			mode = "tty"
		}
	}
	v := &buildView{mode: mode, close: func() {}}
	switch mode {
	case "quiet":
		v.event = func(build.Event) {}
	case "plain":
		v.event = newPlainDisplay(a.err, explain).event
	case "json":
		v.json = &jsonBuild{out: a.err, began: time.Now()}
		v.event = v.json.event
		a.errJSON, a.lastJSON = a.err, v.json.failed
	case "tty":
		if !isTTY {
			return nil, errors.New("--progress tty needs a terminal on standard error")
		}
		d := newTTYDisplay(a.err, out, explain)
		v.event, v.close, v.tty = d.event, d.close, d
	case "rawjson":
		return nil, errors.New("--progress rawjson is refused: it is BuildKit's own protocol; --progress json has the same facts, one object a line")
	default:
		return nil, fmt.Errorf("invalid progress mode %s: must be one of \"auto\", \"plain\", \"tty\", \"json\" or \"quiet\"", mode)
	}
	return v, nil
}

// talks reports whether people read along.
func (v *buildView) talks() bool { return v.mode == "plain" || v.mode == "tty" }

// result prints the last object of a build that went well, with json.
func (v *buildView) result(res engine.BuildResult, tags []string) {
	if v.json != nil {
		v.json.write(jsonEvent{Event: "result", Time: time.Now(), Image: string(res.ID), Tags: tags, Build: res.Ref, Duration: seconds(time.Since(v.json.began))})
	}
}

// whyLines are the reasons or the origin of a step, a line each.
func whyLines(ev build.Event) []string {
	var lines []string
	for _, r := range ev.Reasons {
		lines = append(lines, "not cached: "+clean(r.Text))
	}
	if ev.Origin != nil && ev.Kind == build.Cached {
		lines = append(lines, clean(ev.Origin.Words(ev.Time)))
	}
	return lines
}

// jsonEvent is a line of a build's --progress json. docs/compat.md describes it.
type jsonEvent struct {
	Event    string         `json:"event"`
	Time     time.Time      `json:"time"`
	Vertex   int            `json:"vertex,omitempty"`
	Name     string         `json:"name,omitempty"`
	Stage    string         `json:"stage,omitempty"`
	Stream   string         `json:"stream,omitempty"`
	Text     string         `json:"text,omitempty"`
	Current  int64          `json:"current,omitempty"`
	Total    int64          `json:"total,omitempty"`
	Duration *float64       `json:"duration,omitempty"`
	Reasons  []build.Reason `json:"reasons,omitempty"`
	Origin   *build.Origin  `json:"origin,omitempty"`
	// Error and what follows tell why a step or, in the last line, the build failed.
	Error    string `json:"error,omitempty"`
	File     string `json:"file,omitempty"`
	Line     int    `json:"line,omitempty"`
	Step     string `json:"step,omitempty"`
	Output   string `json:"output,omitempty"`
	ExitCode int    `json:"exitCode,omitempty"`
	// Rule is the build check that a warning comes from, and Mend what to do.
	Rule string `json:"rule,omitempty"`
	Mend string `json:"mend,omitempty"`
	// Code is the program's exit code.
	Code  int      `json:"code,omitempty"`
	Image string   `json:"image,omitempty"`
	Tags  []string `json:"tags,omitempty"`
	Build string   `json:"build,omitempty"`
}

// jsonBuild prints every event of a build as an object on a line of its own.
type jsonBuild struct {
	out   io.Writer
	began time.Time

	mu    sync.Mutex
	shown map[int]time.Time
}

func seconds(d time.Duration) *float64 {
	s := d.Seconds()
	return &s
}

func (j *jsonBuild) event(ev build.Event) {
	m := jsonEvent{
		Event: ev.Kind.String(), Time: ev.Time, Vertex: ev.Vertex, Name: ev.Name, Stage: ev.Stage, Text: ev.Text, Current: ev.Current, Total: ev.Total,
		Reasons: ev.Reasons, Origin: ev.Origin,
	}
	switch ev.Kind {
	case build.Warning:
		if f := ev.Finding; f != nil {
			m.Rule, m.Line, m.Mend = f.Rule, f.Lines.First, f.Mend
		}
	case build.Output:
		m.Stream, m.Reasons = "stdout", nil
		if ev.Stderr {
			m.Stream = "stderr"
		}
	case build.Progress:
		if j.shown == nil {
			j.shown = map[int]time.Time{}
		}
		if ev.Time.Sub(j.shown[ev.Vertex]) < paintEvery && ev.Current != ev.Total {
			return
		}
		j.shown[ev.Vertex], m.Reasons = ev.Time, nil
	case build.Cached, build.Done, build.Canceled:
		m.Duration = seconds(ev.Duration)
	case build.Failed:
		m.Duration = seconds(ev.Duration)
		m.fail(ev.Err)
	}
	j.write(m)
}

// fail takes over what is known of an error.
func (m *jsonEvent) fail(err error) {
	var se *build.StepError
	var pe *dockerfile.ParseError
	switch {
	case err == nil:
	case errors.As(err, &se):
		m.Error, m.File, m.Line, m.Step, m.Output, m.ExitCode = se.Err.Error(), se.File, se.Line, se.Instruction, se.Output, se.ExitCode
	case errors.As(err, &pe):
		m.Error, m.File, m.Line = pe.Err.Error(), pe.File, pe.Lines.First
	default:
		m.Error = strings.TrimRight(err.Error(), "\n")
	}
}

// failed prints the last object of a build that failed.
func (j *jsonBuild) failed(err error, code int) {
	m := jsonEvent{Event: "error", Time: time.Now(), Code: code, Duration: seconds(time.Since(j.began))}
	m.fail(err)
	j.write(m)
}

func (j *jsonBuild) write(m jsonEvent) {
	b, err := json.Marshal(m)
	if err != nil {
		b = []byte(`{"event":"error","error":"event can't be encoded"}`)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.out.Write(append(b, '\n')) //nolint:errcheck // a reader that has gone is noticed by what matters
}
