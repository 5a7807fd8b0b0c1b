package build

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Kinds of Reason.
const (
	ReasonNoCache     = "no-cache"    // --no-cache or --no-cache-filter
	ReasonNew         = "new"         // the step was in no earlier build
	ReasonInstruction = "instruction" // it says something else
	ReasonArg         = "arg"         // a build argument has another value
	ReasonEnv         = "env"         // a variable has another value
	ReasonImage       = "image"       // the base image is another
	ReasonStep        = "step"        // a step that it stands on gave something else
	ReasonFiles       = "files"       // files that it reads
	ReasonSource      = "source"      // a URL or repository that it reads
	ReasonFailed      = "failed"      // it failed last time
	ReasonUnstable    = "unstable"    // a file changed while it was read, so the result was not kept
	ReasonPruned      = "pruned"      // it was cached, and its entry or layer is gone
	ReasonVersion     = "version"     // another version of conex made it
)

// Kinds of Origin.
const (
	OriginDefinition = "definition" // the same step on the same inputs
	OriginContent    = "content"    // inputs that came about otherwise hold the same
	OriginConcurrent = "concurrent" // another build, or another step of this one, made it meanwhile
	OriginImport     = "import"     // an imported cache
	OriginImage      = "image"      // a base image
	OriginUnneeded   = "unneeded"   // what needs it is cached
)

const (
	// shownFiles is how many changed files a reason names; searched how many earlier builds are read to find a step's last run.
	shownFiles = 10
	searched   = 5
)

// explainer says why steps run and where results come from. It reads the history when the first step misses.
type explainer struct {
	story *chronicle
	lists fileLists
	cache *cache
	// planned are the steps of this build, by stage and title.
	planned map[[2]string]bool

	mu      sync.Mutex
	records []*BuildRecord // the newest first, as far as they were read
	ids     []string
	listed  bool
}

func newExplainer(c *cache, story *chronicle) *explainer {
	x := &explainer{story: story, cache: c, lists: fileLists{c.root}, planned: map[[2]string]bool{}}
	for _, n := range story.planner.nodes {
		if n.vertex != nil {
			x.planned[[2]string{n.vertex.stage, n.title}] = true
		}
	}
	return x
}

// record returns the i-th earlier build of the project, nil when there is none.
func (x *explainer) record(i int) *BuildRecord {
	x.mu.Lock()
	defer x.mu.Unlock()
	h, project := x.story.history, x.story.rec.Project
	if !x.listed {
		x.listed = true
		ids, err := h.ids(project)
		if err != nil {
			return nil // without a history there is less to say
		}
		x.ids = ids
	}
	for len(x.records) <= i && len(x.ids) > 0 && len(x.records) < searched {
		if r, err := h.load(project, x.ids[0]); err == nil {
			x.records = append(x.records, r)
		}
		x.ids = x.ids[1:]
	}
	if i >= len(x.records) {
		return nil
	}
	return x.records[i]
}

// earlier finds the nearest earlier run of a step: of that title in that stage, else of that title, else what stood at its place and is
// gone. Of several it takes the one that differs in the fewest things, and of those the last.
func (x *explainer) earlier(n *node) (*BuildRecord, *StepRecord) {
	for _, fits := range []func(*StepRecord) bool{
		func(s *StepRecord) bool { return s.Stage == n.vertex.stage && s.Title == n.title },
		func(s *StepRecord) bool { return s.Title == n.title },
		func(s *StepRecord) bool {
			return s.Stage == n.vertex.stage && s.Number == n.number && !x.planned[[2]string{s.Stage, s.Title}]
		},
	} {
		var in *BuildRecord
		var best *StepRecord
		least := 0
		for i := range searched {
			r := x.record(i)
			if r == nil {
				break
			}
			for k := range r.Steps {
				s := &r.Steps[k]
				if s.Kind != n.kind || s.Key == "" || !fits(s) {
					continue
				}
				if d := n.distance(s); best == nil || d < least {
					in, best, least = r, s, d
				}
			}
		}
		if best != nil {
			return in, best
		}
	}
	return nil, nil
}

// distance counts the ingredients in which a step differs from an earlier run.
func (n *node) distance(old *StepRecord) int {
	d := 0
	if !bytes.Equal(n.opJSON, old.Op) {
		d++
	}
	for i, in := range n.inputs {
		is := in.defKey
		switch {
		case in.isLeaf():
			is = in.value
		case in.kind == kindImage:
			is = in.source.Value
		case in.kind == kindScratch:
			continue
		}
		if i >= len(old.Inputs) || old.Inputs[i].Value != is {
			d++
		}
	}
	return d
}

// reasons say why a step must run.
func (x *explainer) reasons(n *node) []Reason {
	if n.noCache {
		return []Reason{{Kind: ReasonNoCache, Text: "the cache is not to be used for it (--no-cache)"}}
	}
	r, old := x.earlier(n)
	if old == nil {
		text := "it is new in the Dockerfile"
		if x.record(0) == nil {
			text = "it was never built before"
		}
		return []Reason{{Kind: ReasonNew, Text: text}}
	}
	list := x.ops(n, old)
	for i, in := range n.inputs {
		if i == 0 && n.free {
			continue
		}
		var was InputRecord
		if i < len(old.Inputs) {
			was = old.Inputs[i]
		}
		if d, ok := x.input(n, i, in, was, old); ok {
			list = append(list, d)
		}
	}
	if len(list) == 0 {
		list = append(list, x.same(n, old))
	}
	for i := range list {
		list[i].Since = r.ID
	}
	return list
}

// same says why a step runs again though nothing about it changed.
func (x *explainer) same(n *node, old *StepRecord) Reason {
	switch {
	case old.Unstable:
		return Reason{Kind: ReasonUnstable, Text: "a file changed while the last build read it, so the result was not kept"}
	case old.Key != n.defKey:
		return Reason{Kind: ReasonVersion, Text: "another version of conex made it"}
	case old.Outcome == OutcomeFailed:
		return Reason{Kind: ReasonFailed, Text: "it failed last time"}
	case old.Outcome == OutcomeCanceled:
		return Reason{Kind: ReasonNew, Text: "the last build ended before it was done"}
	}
	var rec Record
	err := disk.ReadJSON(x.cache.path(byDefinition, n.defKey), &rec)
	if err == nil {
		return Reason{Kind: ReasonPruned, Text: "it was cached; its layer was removed since"}
	}
	if errors.Is(err, fs.ErrNotExist) || os.IsNotExist(err) {
		return Reason{Kind: ReasonPruned, Text: "it was cached; the cache was pruned since"}
	}
	return Reason{Kind: ReasonPruned, Text: "it was cached; its cache entry is damaged"}
}

// ops compares what a step says.
func (x *explainer) ops(n *node, old *StepRecord) []Reason {
	if bytes.Equal(n.opJSON, old.Op) {
		return nil
	}
	var was, is map[string]json.RawMessage
	if json.Unmarshal(old.Op, &was) != nil || json.Unmarshal(n.opJSON, &is) != nil {
		return []Reason{{Kind: ReasonInstruction, Text: "the instruction changed"}}
	}
	var list []Reason
	vars := x.vars(n, was["env"], is["env"])
	var fields []string
	for k := range maps.Keys(merged(was, is)) {
		if k != "env" && !bytes.Equal(was[k], is[k]) {
			fields = append(fields, k)
		}
	}
	slices.Sort(fields)
	// A title shows values of variables too: then they are the reason.
	if old.Title != n.title && (len(fields) > 0 || len(vars) == 0) {
		r := Reason{Kind: ReasonInstruction, Was: old.Title, Is: n.title}
		a, b := differing(old.Title, n.title)
		r.Text = "the instruction was " + a + ", is " + b
		list = append(list, r)
	}
	// What the title shows needs no second line.
	if len(fields) > 0 && len(list) == 0 {
		for _, k := range fields {
			r := Reason{Kind: ReasonInstruction, Name: k, Was: plain(was[k]), Is: plain(is[k])}
			word, ok := map[string]string{"dir": "the working folder", "user": "the user", "args": "the command", "dest": "the destination", "mounts": "a --mount"}[k]
			if !ok {
				word = k
			}
			a, b := differing(r.Was, r.Is)
			r.Text = fmt.Sprintf("%s was %s, is %s", word, a, b)
			list = append(list, r)
		}
	}
	return append(vars, list...)
}

func merged(a, b map[string]json.RawMessage) map[string]json.RawMessage {
	m := maps.Clone(a)
	if m == nil {
		m = map[string]json.RawMessage{}
	}
	maps.Copy(m, b)
	return m
}

// plain is a JSON value as people write it.
func plain(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		return s
	}
	var list []string
	if json.Unmarshal(raw, &list) == nil {
		return strings.Join(list, " ")
	}
	return string(raw)
}

// vars compares the variables of a step.
func (x *explainer) vars(n *node, rawWas, rawIs json.RawMessage) []Reason {
	read := func(raw json.RawMessage) map[string]string {
		var l []string
		_ = json.Unmarshal(raw, &l) // nothing, or a list
		m := map[string]string{}
		for _, e := range l {
			k, v, _ := strings.Cut(e, "=")
			m[k] = v
		}
		return m
	}
	was, is := read(rawWas), read(rawIs)
	var names []string
	for k := range was {
		names = append(names, k)
	}
	for k := range is {
		if _, ok := was[k]; !ok {
			names = append(names, k)
		}
	}
	slices.Sort(names)
	var list []Reason
	for _, k := range names {
		a, had := was[k]
		b, has := is[k]
		if had && has && a == b {
			continue
		}
		r := Reason{Kind: ReasonEnv, Name: k, Was: a, Is: b}
		word := "variable "
		if slices.Contains(n.args, k) {
			r.Kind, word = ReasonArg, "build arg "
		}
		q1, q2 := differing(a, b)
		switch {
		case !had:
			r.Text = word + k + " is new: " + q2
		case !has:
			r.Text = word + k + " is gone, was " + q1
		default:
			r.Text = word + k + " was " + q1 + ", is " + q2
		}
		list = append(list, r)
	}
	return list
}

// input compares one thing that a step stands on; ok is false when it is the same, as far as is known.
func (x *explainer) input(n *node, i int, in *node, was InputRecord, old *StepRecord) (r Reason, ok bool) {
	switch {
	case in.isLeaf():
		return x.leaf(in, was)
	case in.kind == kindImage:
		is := in.source
		if was.Kind != kindImage || was.Name != is.Name {
			from := was.Name
			if was.Kind != kindImage {
				from = "something else"
			}
			return Reason{Kind: ReasonImage, Name: is.Name, Was: was.Name, Is: is.Name, Text: fmt.Sprintf("the image was %s, is %s", from, is.Name)}, true
		}
		if was.Value != is.Value {
			return Reason{Kind: ReasonImage, Name: is.Name, Was: was.Value, Is: is.Value,
				Text: fmt.Sprintf("image %s was %s, is %s", is.Name, shortID(was.Value), shortID(is.Value))}, true
		}
		return r, false
	case i == 1 && n.selects != nil:
		if was.Files == "" { // it was cached then
			var rec Record
			if ocispec.Validate(ocispec.Digest("sha256:"+old.Key)) == nil && disk.ReadJSON(x.cache.path(byDefinition, old.Key), &rec) == nil {
				was.Files = rec.Files
			}
		}
		if was.Files != "" && n.selected != "" && was.Files == n.selected {
			return r, false
		}
		if was.Kind == "step" && was.Value == in.defKey && !in.fresh {
			return r, false
		}
		if was.Files != "" && n.selected != "" {
			if files, more, ok := x.lists.compare(was.Files, n.selected, shownFiles); ok && len(files) > 0 {
				return Reason{Kind: ReasonFiles, Name: in.title, Was: was.Files, Is: n.selected, Files: files, More: more, Text: filesText(files, more)}, true
			}
		}
		return Reason{Kind: ReasonStep, Name: in.title, Text: "what it copies comes from " + quoted(in.name()) + ", which changed"}, true
	case in.kind == kindScratch:
		if was.Kind != kindScratch && was.Kind != "" {
			return Reason{Kind: ReasonImage, Was: was.Name, Is: "scratch", Text: fmt.Sprintf("the image was %s, is scratch", was.Name)}, true
		}
		return r, false
	}
	if was.Kind == "step" && was.Value == in.defKey && !in.fresh {
		return r, false
	}
	word := "which changed"
	if was.Value == in.defKey {
		word = "which ran again and gave something else"
	}
	return Reason{Kind: ReasonStep, Name: in.title, Text: "it follows " + quoted(in.name()) + ", " + word}, true
}

// leaf compares files or a remote source.
func (x *explainer) leaf(in *node, was InputRecord) (r Reason, ok bool) {
	is := in.source
	is.Value = in.value
	if was.Kind == "" {
		return r, false // the instruction changed, and says so
	}
	if was.Value == is.Value || was.Value == "" {
		return r, false
	}
	if is.Kind == kindContext && was.Kind == kindContext {
		files, more, known := x.lists.compare(was.Value, is.Value, shownFiles)
		r = Reason{Kind: ReasonFiles, Name: is.Name, Was: was.Value, Is: is.Value, Files: files, More: more}
		switch {
		case !known:
			r.Text = "files of the context changed (which ones is not recorded)"
		case len(files) == 0:
			r.Text = "attributes of files in the context changed"
		default:
			r.Text = filesText(files, more)
		}
		return r, true
	}
	name := is.Name
	if name == "" {
		name = "the source"
	}
	return Reason{Kind: ReasonSource, Name: is.Name, Was: was.Value, Is: is.Value, Text: fmt.Sprintf("%s was %s, is %s", name, shortID(was.Value), shortID(is.Value))}, true
}

// filesText lists changes: "src/app.js changed, x added, and 17 more".
func filesText(files []FileChange, more int) string {
	var parts []string
	for _, f := range files {
		word := map[string]string{"mode": "has another mode", "type": "is of another type"}[f.Change]
		if word == "" {
			word = f.Change
		}
		parts = append(parts, f.Path+" "+word)
	}
	if more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

// name is a step's line in the display.
func (n *node) name() string {
	if n.vertex != nil {
		return firstLine(n.vertex.name)
	}
	if n.title != "" {
		return n.title
	}
	return n.source.Name
}

// shortID cuts a digest, wherever it stands in s, to what people compare.
func shortID(s string) string {
	if i := strings.LastIndex(s, "sha256:"); i >= 0 {
		s = s[i+len("sha256:"):]
	}
	if s == "" {
		return "unknown"
	}
	return s[:min(len(s), 12)]
}

const shownText = 60

// quoted puts s in quotes, shortened.
func quoted(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > shownText {
		s = string(r[:shownText-1]) + "…"
	}
	return `"` + s + `"`
}

// differing quotes two texts; of long ones only the words that differ, with a word before and behind.
func differing(was, is string) (string, string) {
	if len(was) <= shownText && len(is) <= shownText {
		return quoted(was), quoted(is)
	}
	a, b := strings.Fields(was), strings.Fields(is)
	head := 0
	for head < min(len(a), len(b)) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < min(len(a), len(b))-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	from, behind := max(0, head-1), max(0, tail-1)
	cut := func(w []string) string {
		s := strings.Join(w[from:len(w)-behind], " ")
		if from > 0 {
			s = "… " + s
		}
		if behind > 0 {
			s += " …"
		}
		return quoted(s)
	}
	return cut(a), cut(b)
}

// origin says where a cached step's result came from.
func (s *solver) origin(kind string, rec Record) *Origin {
	o := &Origin{Kind: kind, Build: rec.Build, Made: rec.Made, Took: rec.Took, From: rec.Import}
	switch {
	case rec.Import != "":
		o.Kind = OriginImport
	case rec.Build != "" && (rec.Build == s.build || rec.Made.After(s.began)):
		o.Kind = OriginConcurrent
	}
	return o
}

// Words are the origin in a line, seen from now.
func (o *Origin) Words(now time.Time) string {
	switch o.Kind {
	case OriginImage:
		return "image " + shortID(o.From)
	case OriginUnneeded:
		return "not needed: what uses it is cached"
	}
	by := ""
	if o.Build != "" {
		by = "build " + o.Build
	}
	if !o.Made.IsZero() {
		by = strings.TrimSpace(by + " " + since(now.Sub(o.Made)) + " ago")
	}
	if by == "" {
		by = "an earlier build"
	}
	took := ""
	if o.Took >= time.Millisecond {
		took = ", where it took " + seconds(o.Took)
	}
	switch o.Kind {
	case OriginImport:
		return "imported from " + o.From
	case OriginConcurrent:
		return "made meanwhile by " + by + took
	case OriginContent:
		return "equal inputs in " + by + took
	}
	return "from " + by + took
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// since is a span in the unit that fits.
func since(d time.Duration) string {
	for _, u := range []struct {
		name string
		d    time.Duration
	}{{"day", 24 * time.Hour}, {"hour", time.Hour}, {"minute", time.Minute}} {
		if n := int(d / u.d); n == 1 {
			return "1 " + u.name
		} else if n > 1 {
			return fmt.Sprintf("%d %ss", n, u.name)
		}
	}
	return "less than a minute"
}
