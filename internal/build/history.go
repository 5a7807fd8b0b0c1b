package build

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Bounds of the history.
const (
	maxBuilds   = 50                  // of one project
	maxBuildAge = 30 * 24 * time.Hour // of any
)

// ErrNoBuild says that the history has no such build, or that a build has no such step.
var ErrNoBuild = errors.New("not in the history")

// History is builds/, the record of what was built:
//
//	builds/<project>/<id>/record.json   BuildRecord, written once when the build has ended
//	builds/<project>/<id>/log           what its steps printed, see stepLog; missing when they printed nothing
//	builds/swept                        empty; its mtime is when all projects were last looked through
//
// A folder without record.json is of a build that is just being written down, or was killed at that.
type History struct{ root *disk.Root }

// OpenHistory opens the history of a root.
func OpenHistory(root *disk.Root) *History { return &History{root} }

// projectOf is a request's folder in the history: context, Dockerfile and target make a project.
func projectOf(req *Request) string {
	h := sha256.New()
	dockerfile := req.Dockerfile
	if dockerfile != "" && dockerfile != "-" {
		if abs, err := filepath.Abs(dockerfile); err == nil {
			dockerfile = abs
		}
	}
	for _, s := range []string{contextName(req.Context), dockerfile, req.Target} {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// contextName is a context as the history has it: a folder's full path, a URL without what authorizes.
func contextName(c string) string {
	if c == "-" || strings.Contains(c, "://") || strings.HasPrefix(c, "git@") {
		return redact(c)
	}
	real, err := realPath(c)
	if err != nil { // removed, or never there: as it was given
		if real, err = filepath.Abs(c); err != nil {
			return c
		}
	}
	return real
}

// redact takes user and password out of a URL.
func redact(s string) string {
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok {
		return s
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	if at := strings.LastIndexByte(rest[:end], '@'); at >= 0 {
		return scheme + "://" + rest[at+1:]
	}
	return s
}

// buildID makes a name that sorts by time and is unique.
func buildID(t time.Time) string {
	const digits = "0123456789abcdefghjkmnpqrstvwxyz"
	var b [13]byte
	ms := t.UnixMilli()
	for i := 8; i >= 0; i-- {
		b[i] = digits[ms&31]
		ms >>= 5
	}
	for i, c := range []byte(disk.RandomID()[:4]) {
		b[9+i] = c
	}
	return string(b[:])
}

// validID keeps names that are no build's away from paths.
func validID(id string) bool {
	return len(id) > 0 && len(id) <= 32 && !strings.ContainsFunc(id, func(r rune) bool { return (r < '0' || r > '9') && (r < 'a' || r > 'z') })
}

// Dir is a build's folder.
func (h *History) dir(r *BuildRecord) string { return h.root.Path("builds", r.Project, r.ID) }

// write puts a build down. log may be nil.
func (h *History) write(r *BuildRecord, log *stepLog) error {
	dir := h.dir(r)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("build history: %w", err)
	}
	if log != nil {
		if err := log.link(filepath.Join(dir, "log")); err != nil {
			return fmt.Errorf("build history: %w", err)
		}
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("build history: %w", err)
	}
	if err := disk.WriteFile(filepath.Join(dir, "record.json"), append(raw, '\n'), 0o600, disk.Volatile); err != nil {
		return fmt.Errorf("build history: %w", err)
	}
	return h.sweep(r.Project)
}

// sweep drops the oldest builds of a project, and once a day what is too old anywhere.
func (h *History) sweep(project string) error {
	var errs []error
	var st unix.Stat_t
	// Most file systems count the folders in a folder as its links, so nobody has to list them.
	if err := unix.Stat(h.root.Path("builds", project), &st); err != nil || st.Nlink < 2 || st.Nlink-2 > maxBuilds {
		ids, err := h.ids(project)
		if err != nil {
			return err
		}
		for _, id := range ids[min(len(ids), maxBuilds):] {
			errs = append(errs, h.drop(project, id))
		}
	}
	mark := h.root.Path("builds", "swept")
	if st, err := os.Lstat(mark); err == nil && time.Since(st.ModTime()) < 24*time.Hour {
		return errors.Join(errs...)
	}
	errs = append(errs, disk.WriteFile(mark, nil, 0o600, disk.Volatile))
	projects, err := h.projects()
	if err != nil {
		return err
	}
	oldest := buildID(time.Now().Add(-maxBuildAge))
	for _, p := range projects {
		ids, err := h.ids(p)
		errs = append(errs, err)
		for _, id := range ids {
			if id < oldest {
				errs = append(errs, h.drop(p, id))
			}
		}
		os.Remove(h.root.Path("builds", p)) //nolint:errcheck // goes when it is empty
	}
	return errors.Join(errs...)
}

func (h *History) drop(project, id string) error {
	return dropBuild(h.root.Path("builds", project, id))
}

// dropBuild removes a build's folder. The record goes first: the rest is nothing without it.
func dropBuild(dir string) error {
	if err := os.Remove(filepath.Join(dir, "record.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("build history: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("build history: %w", err)
	}
	return nil
}

// entries adds the builds to what Entries lists.
func (h *History) entries(byID map[string]*Entry, m *disk.Meter) error {
	projects, err := h.projects()
	if err != nil {
		return err
	}
	for _, p := range projects {
		ids, err := h.ids(p)
		if err != nil {
			return err
		}
		for _, id := range ids {
			dir := h.root.Path("builds", p, id)
			st, err := os.Lstat(dir)
			if errors.Is(err, fs.ErrNotExist) || err == nil && time.Since(st.ModTime()) < time.Minute {
				continue // it is just being written
			}
			if err == nil {
				err = addPath(byID, m, Entry{ID: "build-" + id, Kind: KindHistory, Created: st.ModTime()}, dir, st.ModTime())
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// projects lists the projects that have builds.
func (h *History) projects() ([]string, error) {
	return h.names(h.root.Path("builds"))
}

// ids lists a project's builds, the newest first.
func (h *History) ids(project string) ([]string, error) {
	ids, err := h.names(h.root.Path("builds", project))
	slices.Reverse(ids)
	return ids, err
}

func (h *History) names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("build history: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && validID(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// load reads a build. The error is ErrNoBuild when it is not there, half written, or damaged.
func (h *History) load(project, id string) (*BuildRecord, error) {
	var r BuildRecord
	err := disk.ReadJSON(h.root.Path("builds", project, id, "record.json"), &r)
	if err == nil && (r.ID != id || r.Project != project) {
		err = errors.New("record of another build")
	}
	if err != nil {
		return nil, fmt.Errorf("build %s: %w: %w", id, ErrNoBuild, err)
	}
	return &r, nil
}

// List returns all builds, the newest first. Damaged records are left out.
func (h *History) List() ([]*BuildRecord, error) {
	projects, err := h.projects()
	if err != nil {
		return nil, err
	}
	var list []*BuildRecord
	for _, p := range projects {
		ids, err := h.ids(p)
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			if r, err := h.load(p, id); err == nil {
				list = append(list, r)
			}
		}
	}
	slices.SortFunc(list, func(a, b *BuildRecord) int { return cmp.Compare(b.ID, a.ID) })
	return list, nil
}

// Find returns the build that a name means: an id or the begin or end of one, ^N for the Nth before the last, "" for the last; or the
// newest build of an image, by its id or reference.
func (h *History) Find(name string) (*BuildRecord, error) {
	list, err := h.List()
	if err != nil {
		return nil, err
	}
	back, ok := strings.CutPrefix(name, "^")
	if name == "" || ok {
		n := 0
		if ok {
			if n, err = strconv.Atoi(back); err != nil || n < 0 {
				return nil, fmt.Errorf("build %q: ^ wants a number: ^1 is the build before the last", name)
			}
		}
		if n >= len(list) {
			return nil, fmt.Errorf("build %q: %w, which has %d builds", name, ErrNoBuild, len(list))
		}
		return list[n], nil
	}
	var found []*BuildRecord
	for _, r := range list {
		if r.ID == name {
			return r, nil
		}
		if len(name) >= 4 && (strings.HasPrefix(r.ID, name) || strings.HasSuffix(r.ID, name)) {
			found = append(found, r)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
	default:
		return nil, fmt.Errorf("build %q: there are %d builds whose ids are like that", name, len(found))
	}
	ref, err := image.ParseReference(name)
	for _, r := range list {
		if len(name) >= 12 && strings.HasPrefix(r.Image.Encoded(), strings.TrimPrefix(name, "sha256:")) || err == nil && slices.Contains(r.Names, ref.String()) {
			return r, nil
		}
	}
	return nil, fmt.Errorf("build %q: %w: conex build history ls shows what is there", name, ErrNoBuild)
}

// Remove forgets builds.
func (h *History) Remove(records ...*BuildRecord) error {
	var errs []error
	for _, r := range records {
		errs = append(errs, h.drop(r.Project, r.ID))
		os.Remove(h.root.Path("builds", r.Project)) //nolint:errcheck // goes when it is empty
	}
	return errors.Join(errs...)
}

// Layers are the layers that a step of a build ended with, from the base up. A step that was not needed in that build has what the cache
// has. The layers may be gone: layers.Store says so.
func (h *History) Layers(r *BuildRecord, s *StepRecord) ([]ocispec.Digest, error) {
	return h.layersOf(r, s, 0)
}

func (h *History) layersOf(r *BuildRecord, s *StepRecord, depth int) ([]ocispec.Digest, error) {
	if depth > len(r.Steps) {
		return nil, fmt.Errorf("build %s: the record goes in a circle", r.ID)
	}
	switch {
	case s.Kind == "":
		return nil, fmt.Errorf("%s is no step of the Dockerfile", s.Name)
	case s.Kind == kindImage:
		return s.Layers, nil
	case s.Outcome == OutcomeFailed || s.Outcome == OutcomeCanceled:
		return nil, fmt.Errorf("%s has no result: it %s", s.Name, map[string]string{OutcomeFailed: "failed", OutcomeCanceled: "was canceled"}[s.Outcome])
	}
	below, err := h.below(r, s, depth)
	if err != nil {
		return nil, err
	}
	layer := s.Layer
	if s.Outcome == OutcomeUnneeded && ocispec.Validate(ocispec.Digest("sha256:"+s.Key)) == nil {
		var rec Record
		if err := disk.ReadJSON(h.root.Path("buildcache", byDefinition, s.Key[:2], s.Key), &rec); err != nil {
			return nil, fmt.Errorf("%s was not needed in this build, and the cache has it no more", s.Name)
		}
		layer = rec.Layer
	}
	if layer != "" {
		below = append(slices.Clip(below), layer)
	}
	return below, nil
}

// Below are the layers of the file system that a step changes.
func (h *History) Below(r *BuildRecord, s *StepRecord) ([]ocispec.Digest, error) {
	return h.below(r, s, 0)
}

func (h *History) below(r *BuildRecord, s *StepRecord, depth int) ([]ocispec.Digest, error) {
	if len(s.Inputs) == 0 {
		return nil, nil
	}
	return h.input(r, &s.Inputs[0], depth+1)
}

// Input are the layers that an input of a step shows, nil for what is none of layers.
func (h *History) Input(r *BuildRecord, in *InputRecord) ([]ocispec.Digest, error) {
	return h.input(r, in, 0)
}

func (h *History) input(r *BuildRecord, in *InputRecord, depth int) ([]ocispec.Digest, error) {
	if in.Step == 0 || in.Kind != kindImage && in.Kind != "step" {
		return in.Layers, nil
	}
	s := r.vertex(in.Step)
	if s == nil {
		return nil, fmt.Errorf("build %s: step #%d is not in the record", r.ID, in.Step)
	}
	return h.layersOf(r, s, depth+1)
}

// chronicle makes the record of a build that runs.
type chronicle struct {
	discard bool // nothing is written
	history *History
	rec     BuildRecord
	journal *journal
	planner *planner // nil until there is one
}

func newChronicle(root *disk.Root, req *Request, j *journal, began time.Time) *chronicle {
	c := &chronicle{history: OpenHistory(root), journal: j, discard: req.Discard}
	c.rec = BuildRecord{
		ID: buildID(began), Project: projectOf(req), Context: contextName(req.Context), Dockerfile: req.Dockerfile, Target: req.Target,
		Platform: req.Platform, NoCache: req.NoCache, Names: req.Names, Started: began.UTC(),
	}
	if len(req.BuildArgs) > 0 {
		c.rec.Args = make(map[string]*string, len(req.BuildArgs))
	}
	for k, v := range req.BuildArgs {
		if v != nil && isProxy(k) {
			s := redact(*v)
			v = &s
		}
		c.rec.Args[k] = v
	}
	return c
}

// finish writes the record. A build of which not even the Dockerfile was found leaves none.
func (c *chronicle) finish(id ocispec.Digest, err error) error {
	var parse *dockerfile.ParseError
	if c.discard || c.planner == nil && !errors.As(err, &parse) {
		return c.journal.log.close()
	}
	r := &c.rec
	r.Took, r.Outcome = time.Since(r.Started), OutcomeDone
	var se *StepError
	switch {
	case err == nil:
		r.Image = id
	case errors.Is(err, context.Canceled):
		r.Outcome = OutcomeCanceled
	default:
		r.Outcome, r.Error = OutcomeFailed, firstLine(err.Error())
		if errors.As(err, &se) {
			r.Line = se.Line
		} else if parse != nil {
			r.Line = parse.Lines.First
		}
	}
	if err != nil {
		r.Names = nil
	}
	c.steps()
	r.Critical, r.Warnings = r.critical(), c.journal.warnings
	log := c.journal.log
	werr := log.finish()
	if werr == nil {
		if log.empty() {
			log = nil
		}
		werr = c.history.write(r, log)
	}
	return errors.Join(werr, c.journal.log.close())
}

// steps puts down what the vertices were.
func (c *chronicle) steps() {
	nodes := map[*vertex]*node{}
	if c.planner != nil {
		for _, n := range c.planner.nodes {
			if n.vertex != nil {
				nodes[n.vertex] = n
			}
		}
	}
	for _, v := range c.journal.vertices {
		s := v.record()
		if n := nodes[v]; n != nil {
			n.describe(&s)
		}
		c.rec.Steps = append(c.rec.Steps, s)
	}
}

// describe adds to a step's record what the node knows. The build is over.
func (n *node) describe(s *StepRecord) {
	s.Kind, s.Title, s.Line, s.Number = n.kind, n.title, n.step.Lines.First, n.number
	s.Unstable = n.unstable
	s.LastLine = n.step.Lines.Last
	s.Key, s.Op, s.Config = n.defKey, n.opJSON, n.config
	if n.unneeded {
		s.Outcome = OutcomeUnneeded
	}
	if n.kind == kindImage {
		s.Title, s.Op = "FROM "+n.source.Name, nil
		s.Inputs = []InputRecord{n.source}
		s.Layers = n.fixed.layers
		return
	}
	for i, in := range n.inputs {
		r := in.source
		switch {
		case in.isLeaf():
			r.Value = in.value
		case in.vertex != nil:
			r = InputRecord{Kind: "step", Name: in.title, Value: in.defKey, Step: in.vertex.id}
			if in.kind == kindImage {
				r.Kind, r.Name, r.Value = kindImage, in.source.Name, in.source.Value
			}
		case in.kind == kindScratch:
			r.Kind = kindScratch
		case in.fixed != nil:
			r.Layers = in.fixed.layers
		}
		if i == 1 && n.selects != nil {
			r.Files = n.selected
		}
		s.Inputs = append(s.Inputs, r)
	}
	if n.res.added {
		s.Layer = n.res.layers[len(n.res.layers)-1]
	}
}
