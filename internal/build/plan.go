package build

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"

	"github.com/moby/patternmatcher"
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
	debugging       sync.Mutex // held while a step's failure is looked at
	proxies         []string   // http_proxy and its like from the build arguments, for RUN's environment
	// defaults is global without build arguments, declared the names that global's ARGs declare, with or without a value.
	defaults dockerfile.List
	declared []string
	// globalArgs are the ARGs before the first FROM.
	globalArgs []globalArg
	checks     *dockerfile.Checks
	ignore     *patternmatcher.PatternMatcher // the ignore file's, for a check

	stages []*stage
	nodes  []*node // all, in planning order
	steps  int     // instructions planned
	// contexts are --build-context's, by contextKey.
	contexts map[string]*named
	// trees are what COPY and bind mounts read, by the name of the context, "" for the main one.
	trees map[string]*tree

	// imports are caches that are elsewhere.
	imports *importer

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
	tree   bool   // base is a context of files
	// platform is what the stage is for: FROM --platform's, else the target's.
	platform ocispec.Platform
	planned  bool
	err      error // why it could not be planned

	cfg stageConfig
	tip *node
	// first is what a stage without a parent begins with, from the image if it is one.
	first  result
	from   image.Image
	checks *dockerfile.StageChecks
	// defined are the ARGs and RUN mounts of the stage itself, for its outline.
	defined definitions
	// args are the ARGs declared here and in the stages below, in order, with values; one of each name.
	args []dockerfile.ArgVar
	// vars is what variables mean at this point: ENV and ARG in order, the last of a name counts.
	vars dockerfile.List
	// envList is what env makes of the first envOf of vars.
	envList []string
	envOf   int
	// count and total number the steps that do work, FROM among them.
	count, total int
}

func newPlanner(b *Builder, req *Request, file *dockerfile.File, in *input, j *journal) (*planner, error) {
	checks, err := file.Check(req.BuildArgs["BUILDKIT_DOCKERFILE_CHECK"])
	if err != nil {
		return nil, err
	}
	return &planner{
		b: b, req: req, file: file, in: in, journal: j, gates: newGates(b.Parallel), platform: platform(), local: platform(), bases: map[baseKey]*base{},
		trees: map[string]*tree{"": mainTree(in)}, checks: checks, imports: newImporter(b, req, j),
	}, nil
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
	return errors.Join(errs...)
}

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
	if err := p.globals(); err != nil {
		return err
	}
	if err := p.readContexts(); err != nil {
		return err
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
		p.checkFrom(s, "")
		return p.file.Errorf(spec.Lines, "base name (%s) should not be blank", spec.Base)
	}
	s.parent = p.stageNamed(s.base)
	s.platform = p.platform
	plat := ""
	if spec.Platform != "" {
		if plat, err = p.file.Word(spec.Platform, p.global); err != nil {
			return p.file.Errorf(spec.Lines, "%w", err)
		}
		if plat == "" {
			p.checkFrom(s, "")
			return p.file.Errorf(spec.Lines, "empty platform value from expression %s", spec.Platform)
		}
		if s.platform, err = p.parsePlatform(plat); err != nil {
			return p.file.Errorf(spec.Lines, "%w", err)
		}
	}
	p.checkFrom(s, plat)
	if err := p.replace(s); err != nil {
		return p.file.Errorf(spec.Lines, "%w", err)
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
	return nil, fmt.Errorf("%w %q could not be found%s: %s", ErrNoTarget, p.req.Target, dockerfile.DidYouMean(p.req.Target, names), hint)
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
		case s.base != "scratch" && !s.tree:
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
				} else if err == nil && p.imageName(name) != "scratch" {
					load(p.imageName(name), p.platform, st.Lines)
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
	if c := p.context(from); c != nil && c.stage != "" {
		if t := p.stageNamed(c.stage); t != nil && t.index < s.index {
			return t, nil
		}
		return nil, fmt.Errorf("build context %s: there is no stage %s before this one", from, c.stage)
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
		return nil, stepError(p.file, step, step.Code, p.suggest(ref, b.err))
	}
	return b, b.err
}

// suggest adds to the error of an image that is not there what was probably meant: a stage, or an image of a name that many know.
func (p *planner) suggest(ref string, err error) error {
	names := []string{"alpine", "busybox", "debian", "fedora", "golang", "nginx", "node", "python", "ubuntu"}
	for _, s := range p.stages {
		names = append(names, s.spec.Name)
	}
	if near := dockerfile.DidYouMean(ref, names); near != "" {
		return fmt.Errorf("%w%s", err, near)
	}
	return err
}

var scratchResult = result{}

// maxSteps bounds the instructions that are planned: many stages may stand on one with many triggers.
const maxSteps = 50_000

// plan plans a stage with all that it needs.
func (p *planner) plan(ctx context.Context, s *stage) (err error) {
	if s.planned {
		return s.err
	}
	s.planned = true
	defer func() { s.err = err }()
	steps := s.spec.Steps
	triggers := 0
	switch {
	case s.parent != nil:
		if err := p.plan(ctx, s.parent); err != nil {
			return err
		}
		s.cfg, s.tip = s.parent.cfg.clone(), s.parent.tip
		s.args, s.vars = slices.Clone(s.parent.args), slices.Clone(s.parent.vars)
	case s.base == "scratch" || s.tree:
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
		s.tip, s.first, s.from = b.node, *b.node.fixed, b.img
		if dir := &s.cfg.image.Config.WorkingDir; *dir != "" && !path.IsAbs(*dir) {
			*dir = path.Join("/", *dir)
		}
	}
	if !slices.ContainsFunc(s.cfg.image.Config.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		s.cfg.image.Config.Env = append(s.cfg.image.Config.Env, "PATH="+defaultPath)
	}
	if s.parent == nil {
		s.vars = slices.Clone(s.cfg.image.Config.Env)
	}
	s.checks = p.checks.Stage(nil)
	if s.parent != nil {
		s.checks = p.checks.Stage(s.parent.checks)
	}
	if p.steps += len(steps) + len(s.cfg.image.Config.OnBuild); p.steps > maxSteps {
		return p.file.Errorf(s.spec.Lines, "more than %d steps, with those that ONBUILD brings", maxSteps)
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
	switch {
	case s.tree:
		if err := p.planTree(ctx, s); err != nil {
			return err
		}
	case s.parent == nil && s.base != "scratch":
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
	watched := &dockerfile.Watched{Env: env}
	in, err := p.file.Expand(st, watched)
	if err != nil {
		s.checks.Unset(st, watched.Unset, s.argNames(), env)
		return err
	}
	s.check(p, st, in, watched.Unset)
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
		return s.declare(p, st, i)
	case *dockerfile.Workdir:
		s.count++
		s.cfg.image.Config.WorkingDir = absolute(s.cfg.workdir(), i.Path)
		created = "WORKDIR " + s.cfg.image.Config.WorkingDir
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
	for _, a := range s.args {
		n.args = append(n.args, a.Key)
	}
	p.nodes = append(p.nodes, n)
	s.cfg.noteNode(created, n)
	if s.cfg.size > maxConfig {
		return errConfigSize
	}
	s.tip = n
	return nil
}

// config is what commands run with at this point of the stage.
func (s *stage) config() *StepConfig {
	return &StepConfig{Dir: s.cfg.workdir(), User: s.cfg.image.Config.User, Shell: s.cfg.image.Config.Shell, Env: s.env()}
}

// env are the variables as commands have them, one of each name. The list is not to be changed.
func (s *stage) env() []string {
	if s.envOf != len(s.vars) {
		s.envList, s.envOf = slices.Clip(s.vars.Unique()), len(s.vars)
	}
	return s.envList
}

// filtered reports whether --no-cache-filter names the stage.
func (s *stage) filtered(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool {
		return strings.EqualFold(n, s.spec.Name) || n == strconv.Itoa(s.index)
	})
}

// baseLayers counts the layers of the image that the stage begins with, through the stages that it is built on.
func (s *stage) baseLayers() int { return len(s.root().first.layers) }

// baseImage is that image.
func (s *stage) baseImage() image.Image { return s.root().from }

// root is the stage without a parent that s is built on.
func (s *stage) root() *stage {
	for s.parent != nil {
		s = s.parent
	}
	return s
}

// absolute resolves a WORKDIR against the one before, which an empty one leaves. An absolute one stays as written, as in BuildKit; who
// goes there cleans it.
func absolute(dir, p string) string {
	if path.IsAbs(p) {
		return p
	}
	return path.Join(dir, p)
}
