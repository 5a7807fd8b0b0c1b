package build

import (
	"cmp"
	"context"
	"path"
	"slices"

	"conex/internal/dockerfile"
)

// Outline is what a stage takes from outside, by line. The JSON is BuildKit's.
type Outline struct {
	Name        string        `json:"name,omitempty"`
	Description string        `json:"description,omitempty"`
	Args        []OutlineArg  `json:"args,omitempty"`
	Secrets     []OutlineNeed `json:"secrets,omitempty"`
	SSH         []OutlineNeed `json:"ssh,omitempty"`
	Sources     [][]byte      `json:"sources,omitempty"`
}

// OutlineArg is a build argument with the value that it has in this build.
type OutlineArg struct {
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	Value       string    `json:"value,omitempty"`
	Location    *Location `json:"location,omitempty"`
}

// OutlineNeed is a secret or an SSH agent.
type OutlineNeed struct {
	Name     string    `json:"name"`
	Required bool      `json:"required,omitempty"`
	Location *Location `json:"location,omitempty"`
}

// Targets are the stages of a Dockerfile. The JSON is BuildKit's.
type Targets struct {
	Targets []Target `json:"targets"`
	Sources [][]byte `json:"sources"`
}

// Target is a stage that can be built.
type Target struct {
	Name        string    `json:"name,omitempty"`
	Default     bool      `json:"default,omitempty"`
	Description string    `json:"description,omitempty"`
	Base        string    `json:"base,omitempty"`
	Platform    string    `json:"platform,omitempty"`
	Location    *Location `json:"location,omitempty"`
}

// Location is a place in the Dockerfile.
type Location struct {
	Ranges []Range `json:"ranges"`
}

// Range is some lines.
type Range struct {
	Start Position `json:"start"`
	End   Position `json:"end"`
}

// Position is a line.
type Position struct {
	Line int `json:"line"`
}

// LocationOf gives lines in this form.
func LocationOf(at dockerfile.Lines) *Location {
	return &Location{[]Range{{Position{at.First}, Position{at.Last}}}}
}

func (l *Location) line() int { return l.Ranges[0].Start.Line }

// Outline plans req's target without running anything and returns what it takes from outside.
func (b *Builder) Outline(ctx context.Context, req Request) (out Outline, err error) {
	err = b.planned(ctx, req, func(ctx context.Context, p *planner) error {
		if err := p.dry(ctx, false); err != nil {
			return err
		}
		target, err := p.target()
		if err != nil {
			return err
		}
		out = p.outline(target)
		return nil
	})
	return out, err
}

// Targets lists the stages of req's Dockerfile. It is only read.
func (b *Builder) Targets(ctx context.Context, req Request) (Targets, error) {
	in, file, err := b.load(ctx, &req, newJournal(nil, nil))
	if err != nil {
		return Targets{}, err
	}
	out := Targets{Sources: [][]byte{file.Source}}
	for i, s := range file.Stages {
		out.Targets = append(out.Targets, Target{
			Name: s.Name, Default: i == len(file.Stages)-1, Description: s.Description, Base: s.Base, Platform: s.Platform, Location: LocationOf(s.Lines),
		})
	}
	return out, in.close()
}

// globalArg is an ARG before the first FROM.
type globalArg struct {
	dockerfile.ArgVar
	lines dockerfile.Lines
	// uses are the variables in its default.
	uses []string
}

// definitions are what the instructions of one stage take from outside.
type definitions struct {
	args []definedArg
	// global are names of ARGs that have their value from before the first FROM.
	global       []string
	secrets, ssh []OutlineNeed
}

type definedArg struct {
	dockerfile.ArgVar
	lines dockerfile.Lines
}

func (d *definitions) arg(a dockerfile.ArgVar, at dockerfile.Lines, inherited bool) {
	if inherited {
		d.global = append(d.global, a.Key)
		return
	}
	d.args = slices.DeleteFunc(d.args, func(b definedArg) bool { return b.Key == a.Key })
	d.args = append(d.args, definedArg{a, at})
}

func (d *definitions) mounts(ms []dockerfile.Mount, at dockerfile.Lines) {
	for _, m := range ms {
		list, id := &d.secrets, m.ID
		switch m.Type {
		case "secret":
			if m.Source != "" {
				id = m.Source
			}
			if id == "" {
				id = path.Base(m.Target)
			}
		case "ssh":
			if list = &d.ssh; id == "" {
				id = "default"
			}
		default:
			continue
		}
		if !slices.ContainsFunc(*list, func(n OutlineNeed) bool { return n.Name == id }) {
			*list = append(*list, OutlineNeed{id, m.Required, LocationOf(at)})
		}
	}
}

// usedVars is an Env that keeps the names that were found.
type usedVars struct {
	dockerfile.Env
	names []string
}

// Get returns the value of name.
func (u *usedVars) Get(name string) (string, bool) {
	v, ok := u.Env.Get(name)
	if ok && !slices.Contains(u.names, name) {
		u.names = append(u.names, name)
	}
	return v, ok
}

// outline collects what a planned stage and those that it needs take.
func (p *planner) outline(target *stage) Outline {
	out := Outline{Name: target.spec.Name, Description: target.spec.Description, Sources: [][]byte{p.file.Source}}
	seen := map[*stage]bool{}
	globals := map[string]bool{}
	var use func(names []string)
	use = func(names []string) {
		for _, n := range names {
			if globals[n] {
				continue
			}
			globals[n] = true
			for _, g := range p.globalArgs {
				if g.Key == n {
					use(g.uses)
				}
			}
		}
	}
	arg := func(a dockerfile.ArgVar, at dockerfile.Lines) {
		if slices.ContainsFunc(out.Args, func(o OutlineArg) bool { return o.Name == a.Key }) {
			return
		}
		o := OutlineArg{Name: a.Key, Description: a.Description, Location: LocationOf(at)}
		if a.Value != nil {
			o.Value = *a.Value
		}
		out.Args = append(out.Args, o)
	}
	needs := func(list *[]OutlineNeed, more []OutlineNeed) {
		for _, n := range more {
			if !slices.ContainsFunc(*list, func(o OutlineNeed) bool { return o.Name == n.Name }) {
				*list = append(*list, n)
			}
		}
	}
	var visit func(s *stage)
	visit = func(s *stage) {
		if s == nil || seen[s] {
			return
		}
		seen[s] = true
		for _, word := range []string{s.spec.Base, s.spec.Platform} {
			used := &usedVars{Env: p.global}
			_, _ = p.file.Word(word, used)
			use(used.names)
		}
		use(s.defined.global)
		for _, a := range s.defined.args {
			arg(a.ArgVar, a.lines)
		}
		needs(&out.Secrets, s.defined.secrets)
		needs(&out.SSH, s.defined.ssh)
		visit(s.parent)
		for _, from := range s.sources(p) {
			visit(from)
		}
	}
	visit(target)
	for _, g := range slices.Backward(p.globalArgs) { // the last of a name counts
		if globals[g.Key] {
			arg(g.ArgVar, g.lines)
		}
	}
	slices.SortStableFunc(out.Args, func(a, b OutlineArg) int { return cmp.Compare(a.Location.line(), b.Location.line()) })
	for _, list := range [][]OutlineNeed{out.Secrets, out.SSH} {
		slices.SortStableFunc(list, func(a, b OutlineNeed) int { return cmp.Compare(a.Location.line(), b.Location.line()) })
	}
	return out
}

// sources are the stages that the instructions of a stage take files from.
func (s *stage) sources(p *planner) []*stage {
	var out []*stage
	add := func(from string) {
		if from == "" {
			return
		}
		if t, err := p.fromStage(s, from); err == nil && t != nil {
			out = append(out, t)
		}
	}
	for _, st := range s.spec.Steps {
		switch i := st.Instruction.(type) {
		case *dockerfile.Copy:
			add(i.From)
		case *dockerfile.Run:
			in, err := p.file.Expand(st, s.vars)
			if err != nil {
				continue
			}
			for _, m := range in.(*dockerfile.Run).Mounts {
				add(m.From)
			}
		}
	}
	return out
}
