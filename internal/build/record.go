package build

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/ocispec"
)

// Outcomes of builds and of their steps.
const (
	OutcomeDone     = "done"
	OutcomeCached   = "cached"
	OutcomeFailed   = "failed"
	OutcomeCanceled = "canceled"
	OutcomeUnneeded = "unneeded" // what needs the step was cached
)

// BuildRecord is what the history keeps of one build.
type BuildRecord struct {
	// ID sorts by the build's begin; Project stands for context, Dockerfile and target.
	ID      string `json:"id"`
	Project string `json:"project"`
	// Context is the folder's path, a URL without credentials, or "-"; Dockerfile is as it was given. Args are --build-arg; of proxies the
	// credentials are left out.
	Context    string             `json:"context"`
	Dockerfile string             `json:"dockerfile,omitempty"`
	Target     string             `json:"target,omitempty"`
	Platform   string             `json:"platform,omitempty"`
	NoCache    bool               `json:"noCache,omitempty"`
	Args       map[string]*string `json:"args,omitempty"`

	Started time.Time     `json:"started"`
	Took    time.Duration `json:"took"`
	// Outcome is done, failed or canceled; Error and the place in the Dockerfile say why.
	Outcome string `json:"outcome"`
	Error   string `json:"error,omitempty"`
	Line    int    `json:"line,omitempty"`
	// Image is the image's id and Names are the references that it was given.
	Image ocispec.Digest `json:"image,omitempty"`
	Names []string       `json:"names,omitempty"`

	// Steps are the lines of the display, in its order: what loads and exports too.
	Steps []StepRecord `json:"steps"`
	// Warnings are the build's remarks.
	Warnings []string `json:"warnings,omitempty"`
	// Critical are the vertices of the steps that the build's length came from, in order.
	Critical []int `json:"critical,omitempty"`
}

// StepRecord is one step of a build.
type StepRecord struct {
	// Vertex is the step's number in the display, and Name its line there; Title is the instruction, as "RUN npm ci".
	Vertex int    `json:"vertex"`
	Name   string `json:"name"`
	Title  string `json:"title,omitempty"`
	// Stage is the stage's name or stage-N, "" when there is but one; Number counts its steps from 1, FROM being the first; Line is the
	// instruction's in the Dockerfile.
	Stage  string `json:"stage,omitempty"`
	Number int    `json:"number,omitempty"`
	Line   int    `json:"line,omitempty"`
	// LastLine is where the instruction ends.
	LastLine int `json:"lastLine,omitempty"`
	// Kind is that of the cache's Record, or image; "" for what is no step of the Dockerfile. Op is what the step says.
	Kind string          `json:"kind,omitempty"`
	Op   json.RawMessage `json:"op,omitempty"`
	// Key is the definition key, "" when the build did not come to it.
	Key string `json:"key,omitempty"`
	// Inputs are what the step stands on, the file system that it changes first.
	Inputs []InputRecord `json:"inputs,omitempty"`
	// Layers are an image's. Layer is what the step made, "" when it changed nothing or did not run.
	Layers []ocispec.Digest `json:"layers,omitempty"`
	Layer  ocispec.Digest   `json:"layer,omitempty"`
	// Config is what commands run with at this point of the stage.
	Config *StepConfig `json:"config,omitempty"`

	Outcome string        `json:"outcome"`
	Started time.Time     `json:"started,omitzero"`
	Ended   time.Time     `json:"ended,omitzero"`
	Took    time.Duration `json:"took,omitempty"`
	// Reasons say why the step was not cached, Origin where its result came from if it was.
	Reasons []Reason `json:"reasons,omitempty"`
	Origin  *Origin  `json:"origin,omitempty"`
	Error   string   `json:"error,omitempty"`
	// Unstable says that a file changed while the step read it, so that its result was not kept.
	Unstable bool `json:"unstable,omitempty"`
	// Text is what a step said in the end: an image's id, a digest.
	Text string `json:"text,omitempty"`
}

// StepConfig is the environment of a step.
type StepConfig struct {
	Env   []string `json:"env,omitempty"`
	Dir   string   `json:"dir,omitempty"`
	User  string   `json:"user,omitempty"`
	Shell []string `json:"shell,omitempty"`
}

// InputRecord is one thing that a step stands on or reads.
type InputRecord struct {
	// Kind is image, scratch, step, context (files of a folder), or the kind of a remote source, as url.
	Kind string `json:"kind"`
	// Name is the image's reference, the context's name ("" is the main one), the URL, the step's title.
	Name string `json:"name,omitempty"`
	// Value is the image's id, the fingerprint of the selected files, the digest of what the URL gave, the step's definition key.
	Value string `json:"value,omitempty"`
	// Files is the fingerprint of the files that a COPY --from selected, as far as it was computed.
	Files string `json:"files,omitempty"`
	// Step is the vertex of a step or image in the same build, 0 if it has none; Layers are the image's in that case.
	Step   int              `json:"step,omitempty"`
	Layers []ocispec.Digest `json:"layers,omitempty"`
}

// Reason is one ingredient of a step that changed since its nearest earlier run.
type Reason struct {
	// Kind says which: see the constants.
	Kind string `json:"kind"`
	// Text is the reason in one line.
	Text string `json:"text"`
	// Name is the argument, the image's reference, the URL, the step; Was and Is are its values, where there are such.
	Name string `json:"name,omitempty"`
	Was  string `json:"was,omitempty"`
	Is   string `json:"is,omitempty"`
	// Files are the files that differ, the first of them; More counts the others.
	Files []FileChange `json:"files,omitempty"`
	More  int          `json:"more,omitempty"`
	// Since is the build that this one was compared with.
	Since string `json:"since,omitempty"`
}

// FileChange says how a file that a step reads differs from what it was.
type FileChange struct {
	Path string `json:"path"`
	// Change is added, removed, changed, mode, or type.
	Change string `json:"change"`
}

// Origin says where the result of a cached step came from.
type Origin struct {
	// Kind says how it was found: see the constants.
	Kind string `json:"kind"`
	// From is the image's id, or the cache that it was imported from.
	From string `json:"from,omitempty"`
	// Build made the result at Made, which took Took. Zero where that is not known.
	Build string        `json:"build,omitempty"`
	Made  time.Time     `json:"made,omitzero"`
	Took  time.Duration `json:"took,omitempty"`
}

// Step finds the step that a name means: "3" or "build:3" is a step by its number in the stage (of the last stage without one), "#7" the
// number in the display, "L12" the instruction at that line of the Dockerfile, "build" alone a stage's last step, and anything else a piece
// of the title. A name that fits several steps is an error that lists them.
func (r *BuildRecord) Step(name string) (*StepRecord, error) {
	var steps []*StepRecord // of the Dockerfile
	for i := range r.Steps {
		if r.Steps[i].Kind != "" {
			steps = append(steps, &r.Steps[i])
		}
	}
	pick := func(ok func(*StepRecord) bool) (*StepRecord, error) {
		var found []*StepRecord
		for _, s := range steps {
			if ok(s) {
				found = append(found, s)
			}
		}
		if len(found) == 1 {
			return found[0], nil
		}
		if len(found) == 0 {
			found = steps
		}
		list := make([]string, 0, len(found))
		for _, s := range found {
			list = append(list, fmt.Sprintf("  #%d %s", s.Vertex, firstLine(s.Name)))
		}
		word := "means several steps"
		if len(found) == len(steps) {
			word = "is no step"
		}
		return nil, fmt.Errorf("%q %s of build %s:\n%s", name, word, r.ID, strings.Join(list, "\n"))
	}
	if n, err := strconv.Atoi(strings.TrimPrefix(name, "#")); err == nil && strings.HasPrefix(name, "#") {
		return pick(func(s *StepRecord) bool { return s.Vertex == n })
	}
	if n, err := strconv.Atoi(strings.TrimPrefix(name, "L")); err == nil && strings.HasPrefix(name, "L") {
		var at *StepRecord // an instruction may have several lines
		for _, s := range steps {
			if s.Line > 0 && s.Line <= n && (at == nil || s.Line > at.Line) {
				at = s
			}
		}
		return pick(func(s *StepRecord) bool { return at != nil && s.Line == at.Line && (s.Line == n || s.LastLine >= n) })
	}
	stage, number, ok := strings.Cut(name, ":")
	if !ok {
		stage, number = "", name
	}
	if n, err := strconv.Atoi(number); err == nil {
		if !ok && len(steps) > 0 {
			stage = steps[len(steps)-1].Stage
		}
		return pick(func(s *StepRecord) bool { return strings.EqualFold(s.Stage, stage) && s.Number == n })
	}
	var last *StepRecord
	for _, s := range steps {
		if s.Stage != "" && strings.EqualFold(s.Stage, name) {
			last = s
		}
	}
	if last != nil {
		return last, nil
	}
	exact := func(s *StepRecord) bool { return s.Title == name || s.Name == name }
	if slices.ContainsFunc(steps, exact) {
		return pick(exact)
	}
	return pick(func(s *StepRecord) bool {
		return name != "" && strings.Contains(strings.ToLower(s.Title), strings.ToLower(name))
	})
}

// vertex finds a step by its number in the display.
func (r *BuildRecord) vertex(n int) *StepRecord {
	if i := slices.IndexFunc(r.Steps, func(s StepRecord) bool { return s.Vertex == n }); i >= 0 {
		return &r.Steps[i]
	}
	return nil
}

// critical is the path of steps that ended last, each with what it waited for longest.
func (r *BuildRecord) critical() []int {
	var last *StepRecord
	for i := range r.Steps {
		if s := &r.Steps[i]; s.Kind != "" && !s.Ended.IsZero() && (last == nil || s.Ended.After(last.Ended)) {
			last = s
		}
	}
	var path []int
	for s := last; s != nil; {
		if s.Took > 0 {
			path = append(path, s.Vertex)
		}
		var next *StepRecord
		for _, in := range s.Inputs {
			if t := r.vertex(in.Step); t != nil && t != s && !t.Ended.IsZero() && !t.Ended.After(s.Ended) && (next == nil || t.Ended.After(next.Ended)) {
				next = t
			}
		}
		s = next
	}
	slices.Reverse(path)
	for i := range r.Steps { // exporting comes after everything
		if s := &r.Steps[i]; last != nil && s.Kind == "" && s.Took > 0 && !s.Started.Before(last.Ended) {
			path = append(path, s.Vertex)
		}
	}
	return path
}

// HasResult reports whether a step came to its end, so that there is a file system after it.
func (s *StepRecord) HasResult() bool {
	return s.Outcome != OutcomeFailed && s.Outcome != OutcomeCanceled
}
