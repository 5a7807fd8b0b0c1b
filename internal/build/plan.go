package build

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sync/errgroup"
)

// planner turns stages into nodes. It plans a stage when something first needs it, so stages that nothing needs cost nothing.
type planner struct {
	b       *Builder
	req     *Request
	file    *dockerfile.File
	in      *input
	journal *journal
	gates   *gates
	// platform is the target's, local this machine's.
	platform, local ocispec.Platform
	global          dockerfile.List // ARGs before the first FROM, and the predefined ones
	grants          *grants
	proxies         []string // http_proxy and its like from the build arguments, for RUN's environment

	stages []*stage
	nodes  []*node // all, in planning order
	// trees are what COPY and bind mounts read, by the name of the context, "" for the main one.
	trees map[string]*tree
	// downloads are ADD's URLs, whose files are closed in the end.
	downloads []*download

	mu    sync.Mutex
	bases map[baseKey]*base
}

// baseKey says which image is meant.
type baseKey struct{ ref, platform string }

// base is an image that FROM, COPY --from or a mount names, resolved once.
type base struct {
	once sync.Once
	img  image.Image
	err  error
	node *node
}

// stage is a planned stage.
type stage struct {
	index  int
	spec   *dockerfile.Stage
	label  string // in titles: "build", "stage-1", "" when there is only one
	base   string // expanded
	parent *stage // the stage that FROM names, if any
	// platform is what the stage is for: FROM --platform's, else the target's.
	platform ocispec.Platform
	planned  bool

	cfg stageConfig
	tip *node
	// first is what a stage without a parent begins with.
	first result
	// args are the ARGs declared here and in the stages below, in order, with values; one of each name.
	args []dockerfile.ArgVar
	// vars is what variables mean at this point: ENV and ARG in order, the last of a name counts.
	vars dockerfile.List
	// count and total number the steps that do work, FROM among them.
	count, total int
}

// proxyArgs are build arguments that reach RUN without being declared, and then neither keys nor history.
var proxyArgs = []string{"http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"}

func isProxy(name string) bool { return slices.Contains(proxyArgs, strings.ToLower(name)) }

func newPlanner(b *Builder, req *Request, file *dockerfile.File, in *input, j *journal) *planner {
	return &planner{
		b: b, req: req, file: file, in: in, journal: j, gates: newGates(b.Parallel), platform: platform(), local: platform(), bases: map[baseKey]*base{},
		trees: map[string]*tree{"": mainTree(in)},
	}
}

// ended tells the trees that the build is over, err being why if it failed.
func (p *planner) ended(err error) error {
	var errs []error
	for _, t := range p.trees {
		errs = append(errs, t.ended(err))
	}
	return errors.Join(errs...)
}

// close frees what the plan held for its steps.
func (p *planner) close() error {
	var errs []error
	for _, t := range p.trees {
		errs = append(errs, t.close())
	}
	for _, d := range p.downloads {
		errs = append(errs, d.close())
	}
	return errors.Join(errs...)
}

// epoch is SOURCE_DATE_EPOCH, the time to give to everything; nil without one.
func (p *planner) epoch() (*time.Time, error) {
	v, ok := p.req.BuildArgs["SOURCE_DATE_EPOCH"]
	if !ok || v == nil || *v == "" {
		return nil, nil
	}
	n, err := strconv.ParseInt(*v, 10, 64)
	if err != nil || n < 0 || n > maxEpoch {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH=%s: it must be a number of seconds since 1970", *v)
	}
	t := time.Unix(n, 0).UTC()
	return &t, nil
}

// maxEpoch is the end of the year 9999: later times have no form in JSON.
const maxEpoch = 253402300799

// prepare evaluates what stands before the first FROM, and the FROM lines.
func (p *planner) prepare() (err error) {
	if p.grants, err = newGrants(p.req); err != nil {
		return err
	}
	if p.req.Platform != "" {
		if p.platform, err = p.parsePlatform(p.req.Platform); err != nil {
			return err
		}
	}
	target := p.req.Target
	if target == "" {
		target = p.file.Stages[len(p.file.Stages)-1].Name
	}
	if target == "" {
		target = "default"
	}
	for _, kv := range [][2]string{
		{"BUILDPLATFORM", platformString(p.local)}, {"BUILDOS", p.local.OS}, {"BUILDOSVERSION", ""}, {"BUILDARCH", p.local.Architecture},
		{"BUILDVARIANT", p.local.Variant}, {"TARGETPLATFORM", platformString(p.platform)}, {"TARGETOS", p.platform.OS}, {"TARGETOSVERSION", ""},
		{"TARGETARCH", p.platform.Architecture}, {"TARGETVARIANT", p.platform.Variant}, {"TARGETSTAGE", target},
	} {
		v := kv[1]
		if given, ok := p.req.BuildArgs[kv[0]]; ok && given != nil {
			v = *given
		}
		p.global = append(p.global, kv[0]+"="+v)
	}
	for _, s := range p.file.Args {
		in, err := p.file.Expand(s, p.global)
		if err != nil {
			return err
		}
		for _, a := range in.(*dockerfile.Arg).Args {
			if given, ok := p.req.BuildArgs[a.Key]; ok && given != nil {
				p.global = append(p.global, a.Key+"="+*given)
			} else if a.Value != nil {
				v, err := p.file.Word(*a.Value, p.global)
				if err != nil {
					return p.file.Errorf(s.Lines, "%w", err)
				}
				p.global = append(p.global, a.Key+"="+v)
			}
		}
	}
	for _, k := range slices.Sorted(maps.Keys(p.req.BuildArgs)) {
		// Programs differ in which case they read, so both are set; a case that was given itself goes before.
		if v := p.req.BuildArgs[k]; isProxy(k) && v != nil {
			p.proxies = append(p.proxies, k+"="+*v)
			for _, other := range []string{strings.ToLower(k), strings.ToUpper(k)} {
				if given := p.req.BuildArgs[other]; given == nil {
					p.proxies = append(p.proxies, other+"="+*v)
				}
			}
		}
	}
	for i := range p.file.Stages {
		if err := p.prepareStage(i); err != nil {
			return err
		}
	}
	return nil
}

func (p *planner) prepareStage(i int) error {
	spec := &p.file.Stages[i]
	s := &stage{index: i, spec: spec, label: spec.Name, total: 1}
	if s.label == "" && len(p.file.Stages) > 1 {
		s.label = fmt.Sprintf("stage-%d", i)
	}
	var err error
	if s.base, err = p.file.Word(spec.Base, p.global); err != nil {
		return p.file.Errorf(spec.Lines, "%w", err)
	}
	if s.base == "" {
		return p.file.Errorf(spec.Lines, "base name (%s) should not be blank", spec.Base)
	}
	s.parent = p.stageNamed(s.base)
	s.platform = p.platform
	if spec.Platform != "" {
		plat, err := p.file.Word(spec.Platform, p.global)
		if err != nil {
			return p.file.Errorf(spec.Lines, "%w", err)
		}
		if s.platform, err = p.parsePlatform(plat); err != nil {
			return p.file.Errorf(spec.Lines, "%w", err)
		}
	}
	p.stages = append(p.stages, s)
	return nil
}

// stageNamed finds a stage prepared so far by its name.
func (p *planner) stageNamed(name string) *stage {
	for i := len(p.stages) - 1; i >= 0; i-- {
		if n := p.stages[i].spec.Name; n != "" && strings.EqualFold(n, name) {
			return p.stages[i]
		}
	}
	return nil
}

// target finds the stage to build: --target by name or number, or the last.
func (p *planner) target() (*stage, error) {
	if p.req.Target == "" {
		return p.stages[len(p.stages)-1], nil
	}
	if s := p.stageNamed(p.req.Target); s != nil {
		return s, nil
	}
	if n, err := strconv.Atoi(p.req.Target); err == nil && n >= 0 && n < len(p.stages) {
		return p.stages[n], nil
	}
	var names []string
	for _, s := range p.stages {
		if s.spec.Name != "" {
			names = append(names, s.spec.Name)
		}
	}
	hint := "no stage has a name"
	if len(names) > 0 {
		hint = "the stages are " + strings.Join(names, ", ")
	}
	return nil, fmt.Errorf("%w %q could not be found: %s", ErrNoTarget, p.req.Target, hint)
}

// preload resolves, side by side, the images that the target is known to need. Triggers may still ask for more.
func (p *planner) preload(ctx context.Context, target *stage) error {
	g, ctx := errgroup.WithContext(ctx)
	seen := map[*stage]bool{}
	var visit func(s *stage)
	load := func(ref string, plat ocispec.Platform, at dockerfile.Lines) {
		g.Go(func() error {
			_, err := p.image(ctx, ref, plat, at)
			return err
		})
	}
	visit = func(s *stage) {
		if seen[s] {
			return
		}
		seen[s] = true
		switch {
		case s.parent != nil:
			visit(s.parent)
		case s.base != "scratch":
			load(s.base, s.platform, s.spec.Lines)
		}
		for _, st := range s.spec.Steps {
			var names []string
			switch c := st.Instruction.(type) {
			case *dockerfile.Copy:
				names = []string{c.From}
			case *dockerfile.Run:
				names = c.From
			}
			for _, name := range names {
				if p.tree(name) != nil {
					continue
				}
				// What is wrong with a reference is said when the step is planned.
				if from, err := p.fromStage(s, name); err == nil && from != nil {
					visit(from)
				} else if err == nil && name != "scratch" {
					load(name, p.platform, st.Lines)
				}
			}
		}
	}
	visit(target)
	return g.Wait()
}

// fromStage is the stage that --from means in s; nil when it is an image.
func (p *planner) fromStage(s *stage, from string) (*stage, error) {
	if strings.ContainsRune(from, '$') {
		return nil, errors.New("variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround")
	}
	if n, err := strconv.Atoi(from); err == nil {
		if n < 0 || n >= s.index {
			return nil, fmt.Errorf("invalid stage index %d: only stages before this one, number %d, can be copied from", n, s.index)
		}
		return p.stages[n], nil
	}
	for _, t := range p.stages {
		if t.spec.Name == "" || !strings.EqualFold(t.spec.Name, from) {
			continue
		}
		if t.index == s.index {
			return nil, fmt.Errorf("stage %q can't copy from itself", from)
		}
		if t.index > s.index {
			return nil, fmt.Errorf("cannot copy from stage %q, it needs to be defined before current stage %q", from, s.label)
		}
		return t, nil
	}
	return nil, nil
}

// image resolves a reference once for each platform.
func (p *planner) image(ctx context.Context, ref string, plat ocispec.Platform, at dockerfile.Lines) (*base, error) {
	key := baseKey{ref, platformString(plat)}
	p.mu.Lock()
	b, ok := p.bases[key]
	if !ok {
		b = &base{}
		p.bases[key] = b
	}
	p.mu.Unlock()
	b.once.Do(func() {
		name := ref
		if r, err := image.ParseReference(ref); err == nil {
			name = r.String()
		}
		v := p.journal.vertex("", "[internal] load metadata for "+name)
		v.start()
		b.img, b.err = p.b.Base(ctx, ref, plat, p.req.Pull, func(current, total int64) { v.progress(current, total) })
		if b.err == nil {
			b.err = fits(ref, b.img, plat)
		}
		if b.err != nil {
			kind := Failed
			if ctx.Err() != nil {
				kind = Canceled
			}
			v.end(kind, "", b.err)
			return
		}
		res := result{layers: b.img.Layers(), created: b.img.Created}
		b.node = &node{kind: kindImage, op: string(b.img.ID), fixed: &res, source: InputRecord{Kind: kindImage, Name: name, Value: string(b.img.ID)}}
		v.end(Done, "", nil)
	})
	if b.err != nil && ctx.Err() == nil {
		step := dockerfile.Step{Lines: at, Code: "FROM " + ref}
		return nil, stepError(p.file, step, step.Code, b.err)
	}
	return b, b.err
}

var scratchResult = result{}

// plan plans a stage with all that it needs.
func (p *planner) plan(ctx context.Context, s *stage) error {
	if s.planned {
		return nil
	}
	s.planned = true
	steps := s.spec.Steps
	triggers := 0
	switch {
	case s.parent != nil:
		if err := p.plan(ctx, s.parent); err != nil {
			return err
		}
		s.cfg, s.tip = s.parent.cfg.clone(), s.parent.tip
		s.args, s.vars = slices.Clone(s.parent.args), slices.Clone(s.parent.vars)
	case s.base == "scratch":
		s.tip = &node{kind: kindScratch, op: "", fixed: &scratchResult}
		s.first = scratchResult
		s.cfg.image.OS, s.cfg.image.Architecture, s.cfg.image.Variant = s.platform.OS, s.platform.Architecture, s.platform.Variant
		s.cfg.image.Config.WorkingDir = "/"
		s.cfg.image.Config.Env = []string{"PATH=" + defaultPath}
	default:
		b, err := p.image(ctx, s.base, s.platform, s.spec.Lines)
		if err != nil {
			return err
		}
		s.cfg = stageConfig{image: b.img.Config}
		for _, h := range b.img.Config.History {
			s.cfg.history = append(s.cfg.history, history{entry: h, inherited: true})
		}
		s.cfg = s.cfg.clone()
		s.tip, s.first = b.node, *b.node.fixed
	}
	if !slices.ContainsFunc(s.cfg.image.Config.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		s.cfg.image.Config.Env = append(s.cfg.image.Config.Env, "PATH="+defaultPath)
	}
	if s.parent == nil {
		s.vars = slices.Clone(s.cfg.image.Config.Env)
	}
	if on := s.cfg.image.Config.OnBuild; len(on) > 0 {
		var extra []dockerfile.Step
		for _, expr := range on {
			st, err := p.file.ParseTrigger(expr, s.spec.Lines)
			if err != nil {
				return err
			}
			extra = append(extra, st)
		}
		triggers = len(extra)
		steps = append(extra, steps...)
		s.cfg.image.Config.OnBuild = nil
	}
	for _, st := range steps {
		switch st.Instruction.(type) {
		case *dockerfile.Run, *dockerfile.Copy, *dockerfile.Workdir:
			s.total++
		}
	}
	s.count = 1
	if s.parent == nil && s.base != "scratch" {
		name := s.base
		if r, err := image.ParseReference(s.base); err == nil {
			name = r.String()
		}
		// A node of its own, so that two stages on one image show a line each.
		s.tip = &node{
			kind: s.tip.kind, op: s.tip.op, fixed: s.tip.fixed, vertex: p.journal.vertex(s.label, p.number(s)+"FROM "+name),
			number: 1, config: s.config(), source: s.tip.source, step: dockerfile.Step{Lines: s.spec.Lines},
		}
		p.nodes = append(p.nodes, s.tip)
	}
	for i, st := range steps {
		if err := p.step(ctx, s, st, i < triggers); err != nil {
			return stepError(p.file, st, st.Code, err)
		}
	}
	return nil
}

// number is the prefix of a step's title, "[build 2/5] ".
func (p *planner) number(s *stage) string {
	label := s.label
	if label != "" {
		label += " "
	}
	return fmt.Sprintf("[%s%*d/%d] ", label, len(strconv.Itoa(s.total)), s.count, s.total)
}

// step plans one instruction.
func (p *planner) step(ctx context.Context, s *stage, st dockerfile.Step, trigger bool) error {
	env := s.vars
	in, err := p.file.Expand(st, env)
	if err != nil {
		return err
	}
	if handled, err := s.cfg.fold(in); handled || err != nil {
		if e, ok := in.(*dockerfile.EnvVars); ok {
			for _, v := range e.Vars {
				s.vars = append(s.vars, v.String())
			}
		}
		return err
	}
	title := st.Code
	if _, ok := in.(*dockerfile.Run); ok || strings.ContainsRune(title, '$') {
		title = p.file.Title(title, env)
	}
	if kw, rest, ok := strings.Cut(title, " "); ok {
		title = strings.ToUpper(kw) + " " + rest
	}
	if trigger {
		title = "ONBUILD " + title
	}
	n := &node{step: st, title: title, inputs: []*node{s.tip}, noCache: p.req.NoCache || s.filtered(p.req.NoCacheFilter)}
	var created string
	switch i := in.(type) {
	case *dockerfile.Arg:
		return s.declare(p, i)
	case *dockerfile.Workdir:
		s.count++
		if s.cfg.image.Config.WorkingDir, err = absolute(s.cfg.workdir(), i.Path); err != nil {
			return err
		}
		created = "WORKDIR " + s.cfg.workdir()
		if s.cfg.workdir() == "/" {
			s.cfg.note(created)
			return nil
		}
		p.planMkdir(n, s)
	case *dockerfile.Copy:
		s.count++
		if created, err = p.planCopy(ctx, n, s, i); err != nil {
			return err
		}
	case *dockerfile.Run:
		s.count++
		if created, err = p.planRun(ctx, n, s, i); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s is not known to the builder", st.Keyword())
	}
	n.fresh = n.noCache || slices.ContainsFunc(n.depends(), func(in *node) bool { return in.fresh })
	n.vertex, n.number, n.config = p.journal.vertex(s.label, p.number(s)+title), s.count, s.config()
	p.nodes = append(p.nodes, n)
	s.cfg.noteNode(created, n)
	s.tip = n
	return nil
}

// config is what commands run with at this point of the stage.
func (s *stage) config() *StepConfig {
	c := &StepConfig{Dir: s.cfg.workdir(), User: s.cfg.image.Config.User, Shell: s.cfg.image.Config.Shell}
	for _, k := range s.vars.Keys() {
		v, _ := s.vars.Get(k)
		c.Env = append(c.Env, k+"="+v)
	}
	return c
}

// filtered reports whether --no-cache-filter names the stage.
func (s *stage) filtered(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool {
		return strings.EqualFold(n, s.spec.Name) || n == strconv.Itoa(s.index)
	})
}

// baseLayers counts the layers of the image that the stage begins with, through the stages that it is built on.
func (s *stage) baseLayers() int {
	for s.parent != nil {
		s = s.parent
	}
	return len(s.first.layers)
}

// absolute resolves a WORKDIR against the one before.
func absolute(dir, p string) (string, error) {
	if p == "" {
		return "", errors.New("WORKDIR can't be empty")
	}
	if path.IsAbs(p) {
		return path.Clean(p), nil
	}
	return path.Join(dir, p), nil
}

// declare adds ARGs to a stage: the value given, else the default here, else the global one. As in BuildKit an ARG hides an ENV that
// stands above it, and reaches the stages that are built on this one.
func (s *stage) declare(p *planner, a *dockerfile.Arg) error {
	msg := "ARG"
	for _, v := range a.Args {
		given, ok := p.req.BuildArgs[v.Key]
		switch {
		case ok && given != nil:
			v.Value = given
		case v.Value != nil:
			val, err := p.file.Word(*v.Value, s.vars)
			if err != nil {
				return err
			}
			v.Value = &val
		default:
			if val, ok := p.global.Get(v.Key); ok {
				v.Value = &val
			}
		}
		msg += " " + v.Key
		if v.Value != nil {
			s.vars = append(s.vars, v.Key+"="+*v.Value)
			msg += "=" + *v.Value
		}
		if i := slices.IndexFunc(s.args, func(a dockerfile.ArgVar) bool { return a.Key == v.Key }); i < 0 {
			s.args = append(s.args, v)
		} else if v.Value != nil {
			s.args[i] = v
		}
	}
	s.cfg.note(msg)
	return nil
}

// unconsumed names the build arguments that no ARG declares: most often a misspelling.
func (p *planner) unconsumed() []string {
	known := map[string]bool{"SOURCE_DATE_EPOCH": true}
	for _, k := range p.global.Keys() {
		known[k] = true
	}
	steps := p.file.Args
	for _, s := range p.file.Stages {
		steps = append(slices.Clip(steps), s.Steps...)
	}
	for _, st := range steps {
		if a, ok := st.Instruction.(*dockerfile.Arg); ok {
			for _, v := range a.Args {
				known[v.Key] = true
			}
		}
	}
	for _, s := range p.stages { // ONBUILD brings ARGs too
		for _, a := range s.args {
			known[a.Key] = true
		}
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(p.req.BuildArgs)) {
		if !known[k] && !isProxy(k) && !strings.HasPrefix(k, "BUILDKIT_") {
			out = append(out, k)
		}
	}
	return out
}
