package engine

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"conex/internal/analyze"
	"conex/internal/build"
	"conex/internal/image"
	"conex/internal/ocispec"
)

func (e *Engine) history() *build.History { return build.OpenHistory(e.root) }

// BuildHistory lists builds, the newest first, that fit all filters: status (completed, error, canceled), name (part of the context's
// path), tag, target, since and until (as with other commands).
func (e *Engine) BuildHistory(filters map[string][]string) ([]*build.BuildRecord, error) {
	var tests []func(*build.BuildRecord) bool
	for key, vals := range filters {
		var test func(r *build.BuildRecord, v string) bool
		switch key {
		case "status":
			for _, v := range vals {
				if !slices.Contains([]string{"completed", "error", "canceled"}, v) {
					return nil, invalid("invalid filter 'status=%s': there are completed, error and canceled", v)
				}
			}
			test = func(r *build.BuildRecord, v string) bool { return BuildStatus(r) == v }
		case "name":
			test = func(r *build.BuildRecord, v string) bool { return strings.Contains(r.Context, v) }
		case "tag", "ref":
			test = func(r *build.BuildRecord, v string) bool {
				ref, err := image.ParseReference(v)
				return err == nil && slices.Contains(r.Names, ref.String())
			}
		case "target":
			test = func(r *build.BuildRecord, v string) bool { return r.Target == v }
		case "since", "until":
			t, err := parseUntil(vals[len(vals)-1], time.Now())
			if err != nil {
				return nil, invalid("invalid filter '%s=%s': %w", key, vals[len(vals)-1], err)
			}
			test = func(r *build.BuildRecord, _ string) bool { return r.Started.Before(t) == (key == "until") }
		default:
			return nil, invalid("invalid filter '%s'", key)
		}
		tests = append(tests, func(r *build.BuildRecord) bool {
			return slices.ContainsFunc(vals, func(v string) bool { return test(r, v) })
		})
	}
	list, err := e.history().List()
	return slices.DeleteFunc(list, func(r *build.BuildRecord) bool {
		return slices.ContainsFunc(tests, func(ok func(*build.BuildRecord) bool) bool { return !ok(r) })
	}), err
}

// BuildStatus is a build's outcome in the words of buildx.
func BuildStatus(r *build.BuildRecord) string {
	return map[string]string{build.OutcomeDone: "completed", build.OutcomeFailed: "error"}[r.Outcome] + map[bool]string{true: "canceled"}[r.Outcome == build.OutcomeCanceled]
}

// FindBuild returns a build by what build.History.Find takes.
func (e *Engine) FindBuild(name string) (*build.BuildRecord, error) { return e.history().Find(name) }

// BuildLog returns what the steps of a build printed, those of one step if there is one.
func (e *Engine) BuildLog(r *build.BuildRecord, s *build.StepRecord) ([]build.LogEntry, error) {
	n := 0
	if s != nil {
		n = s.Vertex
	}
	return e.history().Log(r, n)
}

// ForgetBuilds removes builds from the history, and says which.
func (e *Engine) ForgetBuilds(names []string, all bool) (gone []string, err error) {
	h := e.history()
	var list []*build.BuildRecord
	if all {
		if list, err = h.List(); err != nil {
			return nil, err
		}
	}
	for _, n := range names {
		r, err := h.Find(n)
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	for _, r := range list {
		if err := h.Remove(r); err != nil {
			return gone, err
		}
		gone = append(gone, r.ID)
	}
	return gone, nil
}

// StepChange is a path that a step added, changed or removed.
type StepChange struct {
	Path   string         `json:"path"`
	Change analyze.Change `json:"change"`
	Type   string         `json:"type,omitempty"`
	// Size is that of a regular file, Was that of the one before.
	Size int64 `json:"size"`
	Was  int64 `json:"was,omitempty"`
}

// StepDiff is what a step of a build changed.
type StepDiff struct {
	Build   string           `json:"build"`
	Step    int              `json:"step"`
	Name    string           `json:"name"`
	Layer   ocispec.Digest   `json:"layer,omitempty"`
	Size    int64            `json:"size"`
	Changes []StepChange     `json:"changes"`
	Counts  map[string]int   `json:"counts"`
	Layers  []ocispec.Digest `json:"-"`
}

// DiffStep tells what a step of a build did to the file system below it.
func (e *Engine) DiffStep(ctx context.Context, step, name string) (*StepDiff, error) {
	h := e.history()
	r, err := h.Find(name)
	if err != nil {
		return nil, err
	}
	s, err := r.Step(step)
	if err != nil {
		return nil, err
	}
	d := &StepDiff{Build: r.ID, Step: s.Vertex, Name: s.Name, Changes: []StepChange{}, Counts: map[string]int{"added": 0, "changed": 0, "removed": 0}}
	if d.Layers, err = h.Layers(r, s); err != nil {
		return nil, err
	}
	below := 0
	if len(s.Layers) == 0 { // an image shows all that it has
		b, err := h.Below(r, s)
		if err != nil {
			return nil, err
		}
		below = len(b)
	}
	if len(d.Layers) == below {
		return d, nil
	}
	img, err := e.analyzeLayers(ctx, d.Layers)
	if err != nil {
		return nil, err
	}
	last := len(d.Layers) - 1
	if s.Layers != nil {
		return d, d.whole(img, last)
	}
	d.Layer, d.Size = d.Layers[last], img.Layers[last].Size
	img.EachChange(last, func(n *analyze.Node, c analyze.Change) {
		ch := StepChange{Path: "/" + n.Path(), Change: c}
		if st := n.Shown(last); st != nil {
			ch.Type = st.Type()
			if st.IsRegular() {
				ch.Size = st.Size
			}
		}
		if was := n.At(last - 1); c == analyze.Changed && was != nil && was.IsRegular() {
			ch.Was = was.Size
		}
		d.Counts[c.String()]++
		d.Changes = append(d.Changes, ch)
	})
	return d, nil
}

// whole lists all that an image shows.
func (d *StepDiff) whole(img *analyze.Image, last int) error {
	var walk func(n *analyze.Node)
	walk = func(n *analyze.Node) {
		for _, c := range n.Children() {
			if st := c.At(last); st != nil {
				ch := StepChange{Path: "/" + c.Path(), Change: analyze.Added, Type: st.Type()}
				if st.IsRegular() {
					ch.Size = st.Size
					d.Size += st.Size
				}
				d.Counts["added"]++
				d.Changes = append(d.Changes, ch)
				walk(c)
			}
		}
	}
	walk(img.Root())
	return nil
}

// analyzeLayers looks at a stack of layers that need not be an image's.
func (e *Engine) analyzeLayers(ctx context.Context, ids []ocispec.Digest) (*analyze.Image, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	img := image.Image{ID: ocispec.FromBytes([]byte("step"))}
	img.Config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: ids}
	found, err := s.Image(ctx, img)
	if err != nil {
		return nil, fmt.Errorf("the step's layers: %w", classify(err))
	}
	return found, nil
}

// Which says which step made a file of an image.
type Which struct {
	Path string `json:"path"`
	// Change is what the step did last: added, changed or removed.
	Change analyze.Change `json:"change"`
	Type   string         `json:"type,omitempty"`
	Size   int64          `json:"size"`
	// Layer is the layer's digest, Index its place in the image, CreatedBy the history's entry of it.
	Layer     ocispec.Digest `json:"layer"`
	Index     int            `json:"index"`
	CreatedBy string         `json:"createdBy,omitempty"`
	Created   time.Time      `json:"created,omitzero"`
	// Build, Step, Name and Line are those of the newest build here that has such a layer; Base says that it came with the base image From.
	Build string `json:"build,omitempty"`
	Step  int    `json:"step,omitempty"`
	Name  string `json:"name,omitempty"`
	File  string `json:"file,omitempty"`
	Line  int    `json:"line,omitempty"`
	Base  bool   `json:"base,omitempty"`
	From  string `json:"from,omitempty"`
	// Before are the earlier layers that had it, the newest first.
	Before []Which `json:"before,omitempty"`
}

// errNoPath says that no layer of an image ever had a path.
var errNoPath = errors.New("no layer of the image has it")

// WhichStep finds the step that a file of an image comes from.
func (e *Engine) WhichStep(ctx context.Context, file, name, platform string) (*Which, error) {
	img, err := e.AnalyzeImage(ctx, name, platform)
	if err != nil {
		return nil, err
	}
	clean := strings.TrimPrefix(path.Clean("/"+file), "/")
	n := img.Lookup(clean)
	last := len(img.Layers) - 1
	if n == nil || n.Parent() == nil || len(n.States()) == 0 {
		return nil, fmt.Errorf("%s in %s: %w", path.Clean("/"+file), name, errNoPath)
	}
	builds, err := e.history().List()
	if err != nil {
		return nil, err
	}
	var list []Which
	for i := last; i >= 0; i-- {
		c := n.Change(i)
		if c == analyze.Unchanged {
			continue
		}
		l := img.Layers[i]
		w := Which{Path: "/" + n.Path(), Change: c, Layer: l.DiffID, Index: i, CreatedBy: l.CreatedBy, Created: l.Created}
		if st := n.Shown(i); st != nil {
			w.Type, w.Size = st.Type(), st.Size
		}
		w.find(builds, img.ID)
		list = append(list, w)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s in %s: %w", path.Clean("/"+file), name, errNoPath)
	}
	list[0].Before = list[1:]
	return &list[0], nil
}

// find looks a layer up in the history: in builds of the image first, then in those that made it.
func (w *Which) find(builds []*build.BuildRecord, id ocispec.Digest) {
	for _, try := range []struct{ mine, base bool }{{true, false}, {true, true}, {false, false}, {false, true}} {
		for _, r := range builds {
			if (r.Image == id) != try.mine {
				continue
			}
			for i := range r.Steps {
				s := &r.Steps[i]
				base := slices.Contains(s.Layers, w.Layer)
				if !try.base && s.Layer != w.Layer || try.base && !base {
					continue
				}
				w.Build, w.Step, w.Name, w.Line, w.Base = r.ID, s.Vertex, s.Name, s.Line, base
				if w.File = r.Dockerfile; w.File == "" {
					w.File = "Dockerfile"
				}
				if base && len(s.Inputs) > 0 {
					w.From = s.Inputs[0].Name
				}
				return
			}
		}
	}
}
