package build

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// traceEvent is one of Chrome's trace events: "X" is a span, "M" names a track.
type traceEvent struct {
	Name     string         `json:"name"`
	Category string         `json:"cat,omitempty"`
	Phase    string         `json:"ph"`
	Start    int64          `json:"ts"` // microseconds
	Duration int64          `json:"dur"`
	Process  int            `json:"pid"`
	Track    int            `json:"tid"`
	Args     map[string]any `json:"args,omitempty"`
}

// Trace is the build in Chrome's trace format, as chrome://tracing, Perfetto and speedscope read it. Steps that ran side by side lie on
// tracks of their own.
func (r *BuildRecord) Trace() ([]byte, error) {
	name := r.Context
	if len(r.Names) > 0 {
		name = r.Names[0]
	}
	events := []traceEvent{
		{Name: "process_name", Phase: "M", Process: 1, Args: map[string]any{"name": "build " + r.ID + " of " + name}},
		{Name: "build", Category: "build", Phase: "X", Duration: r.Took.Microseconds(), Process: 1, Args: map[string]any{"outcome": r.Outcome, "image": r.Image}},
	}
	steps := slices.Clone(r.Steps)
	for i := range steps {
		if steps[i].Started.IsZero() {
			steps[i].Started = steps[i].Ended
		}
	}
	slices.SortStableFunc(steps, func(a, b StepRecord) int { return a.Started.Compare(b.Started) })
	var busy []time.Time // when each track is free again
	for _, s := range steps {
		if s.Started.IsZero() {
			continue // it did not come to it
		}
		track := slices.IndexFunc(busy, func(t time.Time) bool { return !t.After(s.Started) })
		if track < 0 {
			track = len(busy)
			busy = append(busy, time.Time{})
			events = append(events, traceEvent{Name: "thread_name", Phase: "M", Process: 1, Track: track + 1, Args: map[string]any{"name": fmt.Sprintf("track %d", track+1)}})
		}
		busy[track] = s.Started.Add(s.Took)
		args := map[string]any{"outcome": s.Outcome, "step": s.Vertex}
		if slices.Contains(r.Critical, s.Vertex) {
			args["critical"] = true
		}
		if s.Layer != "" {
			args["layer"] = s.Layer
		}
		if len(s.Reasons) > 0 {
			args["reasons"] = s.Reasons
		}
		if s.Origin != nil {
			args["origin"] = s.Origin
		}
		if s.Error != "" {
			args["error"] = s.Error
		}
		category := s.Kind
		if category == "" {
			category = "internal"
		}
		events = append(events, traceEvent{
			Name: firstLine(s.Name), Category: category, Phase: "X", Start: s.Started.Sub(r.Started).Microseconds(), Duration: s.Took.Microseconds(),
			Process: 1, Track: track + 1, Args: args,
		})
	}
	return json.Marshal(map[string]any{"traceEvents": events, "displayTimeUnit": "ms"})
}
