package build

import (
	"sync"
	"time"

	"conex/internal/dockerfile"
)

// Display receives what a build does, as it goes. The build calls it from one goroutine at a time and never after Build has
// returned. Nil: nobody looks.
type Display func(Event)

// EventKind says what an Event reports.
type EventKind int

const (
	// Queued announces a vertex before anything runs, in the Dockerfile's order, so that a display knows them all.
	Queued EventKind = iota
	// Started says that the vertex does work.
	Started
	// Output is a piece of what a RUN step wrote, lines whole but for progress bars and a last line without a newline.
	Output
	// Progress is a count of bytes (Current of Total) in a vertex that moves data.
	Progress
	// Cached ends a vertex whose result was there already. A Started event may be missing before it.
	Cached
	// Done ends a vertex that did its work.
	Done
	// Failed ends a vertex with Err; the build ends with the same error.
	Failed
	// Canceled ends a vertex that was stopped because another one failed or the user gave up.
	Canceled
	// Warning is a remark for the user (Text), not tied to a vertex when Vertex is 0.
	Warning
)

// String returns the kind in lower case, as the JSON and plain displays print it.
func (k EventKind) String() string {
	switch k {
	case Queued:
		return "queued"
	case Started:
		return "started"
	case Output:
		return "output"
	case Progress:
		return "progress"
	case Cached:
		return "cached"
	case Done:
		return "done"
	case Failed:
		return "failed"
	case Canceled:
		return "canceled"
	case Warning:
		return "warning"
	}
	return "unknown"
}

// Event is one thing that happened in a build.
type Event struct {
	Kind EventKind
	// Vertex numbers the step the event belongs to, from 1 in the order of the Queued events; 0 for the build as a whole.
	Vertex int
	// Name is the vertex's title, in every event of it: "[internal] load build definition from Dockerfile",
	// "[build 2/5] RUN npm ci", "exporting image", "naming to docker.io/library/app:latest".
	Name string
	// Stage is the name or number of the stage that a step belongs to, "" for the others.
	Stage string
	// Time is when it happened.
	Time time.Time
	// Duration is how long the vertex has worked, in Cached, Done, Failed and Canceled.
	Duration time.Duration
	// Text is the output of Output, the remark of Warning, the result of a Done where there is one to show (an image id, a digest).
	Text string
	// Stderr tells the stream of Output.
	Stderr bool
	// Current and Total count bytes in Progress; Total is 0 when unknown.
	Current, Total int64
	// Err is why, in Failed.
	Err error
	// Reasons say why a step was not cached, from Started on, and Origin where the result of a Cached one came from.
	Reasons []Reason
	Origin  *Origin
	// Finding is what a build check has found, in a Warning that Text tells in short; nil in others.
	Finding *dockerfile.Finding
}

// journal numbers vertices and hands events to a display and to the log one at a time.
type journal struct {
	mu       sync.Mutex
	display  Display
	log      *stepLog
	vertices []*vertex
	warnings []string
}

func newJournal(d Display, log *stepLog) *journal { return &journal{display: d, log: log} }

func (j *journal) emit(ev Event) {
	ev.Time = time.Now()
	j.mu.Lock()
	defer j.mu.Unlock()
	switch ev.Kind {
	case Output:
		j.log.add(&ev)
	case Warning:
		j.warnings = append(j.warnings, ev.Text)
	case Cached, Done, Failed, Canceled:
		j.log.end(ev.Vertex)
	}
	if j.display != nil {
		j.display(ev)
	}
}

// hide keeps a secret out of the log: what is on the screen is the user's, the history stays.
func (j *journal) hide(secret []byte) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.log.hide(secret)
}

// vertex announces a new vertex.
func (j *journal) vertex(stage, name string) *vertex {
	j.mu.Lock()
	v := &vertex{j: j, id: len(j.vertices) + 1, name: name, stage: stage}
	j.vertices = append(j.vertices, v)
	j.mu.Unlock()
	v.send(Event{Kind: Queued})
	return v
}

// vertex is one line of a display. Its methods may be called from any goroutine; what comes after its end is dropped.
type vertex struct {
	j           *journal
	id          int
	name, stage string

	mu      sync.Mutex
	started time.Time
	ended   bool
	reasons []Reason
	origin  *Origin
	last    Event // how it ended
}

func (v *vertex) send(ev Event) {
	ev.Vertex, ev.Name, ev.Stage, ev.Reasons, ev.Origin = v.id, v.name, v.stage, v.reasons, v.origin
	v.j.emit(ev)
}

func (v *vertex) start() {
	v.mu.Lock()
	again := !v.started.IsZero() || v.ended
	if !again {
		v.started = time.Now()
	}
	v.mu.Unlock()
	if !again {
		v.send(Event{Kind: Started})
	}
}

func (v *vertex) output(text string, stderr bool) {
	v.send(Event{Kind: Output, Text: text, Stderr: stderr})
}

func (v *vertex) progress(current, total int64) {
	v.send(Event{Kind: Progress, Current: current, Total: total})
}

func (v *vertex) end(kind EventKind, text string, err error) {
	v.mu.Lock()
	if v.ended {
		v.mu.Unlock()
		return
	}
	v.ended = true
	ev := Event{Kind: kind, Text: text, Err: err, Time: time.Now()}
	if !v.started.IsZero() {
		ev.Duration = ev.Time.Sub(v.started)
	}
	v.last = ev
	v.mu.Unlock()
	v.send(ev)
}

// explain says why the vertex will do work, before it starts.
func (v *vertex) explain(why []Reason) { v.reasons = why }

// over reports whether the vertex has ended.
func (v *vertex) over() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ended
}

// record is what the history keeps of the vertex. What has neither begun nor ended was cancelled.
func (v *vertex) record() StepRecord {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := StepRecord{Vertex: v.id, Name: v.name, Stage: v.stage, Outcome: OutcomeCanceled, Took: v.last.Duration, Reasons: v.reasons, Origin: v.origin}
	if !v.started.IsZero() {
		s.Started = v.started.UTC()
	}
	if v.ended {
		s.Ended, s.Text = v.last.Time.UTC(), v.last.Text
		switch v.last.Kind {
		case Cached:
			s.Outcome = OutcomeCached
		case Done:
			s.Outcome = OutcomeDone
		case Failed:
			s.Outcome = OutcomeFailed
			if v.last.Err != nil {
				s.Error = firstLine(v.last.Err.Error())
			}
		}
	}
	return s
}
