package build

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"conex/internal/dockerfile"
	"conex/internal/image"

	"github.com/moby/patternmatcher"
)

// CheckResult is what the build checks found in a Dockerfile.
type CheckResult struct {
	// File is the parsed Dockerfile.
	File *dockerfile.File
	// Findings are by line.
	Findings []dockerfile.Finding
	// Err is why the file can't be built at all, for what plans it; the findings are those up to there. A *StepError or
	// *dockerfile.ParseError where a place is to blame.
	Err error
}

// Check plans a build, of all stages if req names none, and returns what the build checks found. Nothing runs; base images need a
// config only. An error is one of the request; of a file that has no grammar it is a *dockerfile.ParseError.
func (b *Builder) Check(ctx context.Context, req Request) (res CheckResult, err error) {
	err = b.planned(ctx, req, func(ctx context.Context, p *planner) error {
		res.Err = p.dry(ctx, req.Target == "")
		res.File, res.Findings = p.file, p.checks.Findings()
		return ctx.Err()
	})
	return res, err
}

// planned calls f with a planner that has planned nothing yet, and shows of it what is no step.
func (b *Builder) planned(ctx context.Context, req Request, f func(context.Context, *planner) error) (err error) {
	display := req.Display
	req.Display = func(ev Event) {
		if display != nil && strings.HasPrefix(ev.Name, "[internal] load metadata") {
			display(ev)
		}
	}
	j := newJournal(req.Display, nil)
	in, file, err := b.load(ctx, &req, j)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	p, err := newPlanner(b, &req, file, in, j)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	return f(ctx, p)
}

// dry plans the target, or every stage, for nothing to be run. A stage that can't be planned keeps no other from it; the error is the
// first one's.
func (p *planner) dry(ctx context.Context, every bool) error {
	if err := p.prepare(); err != nil {
		return err
	}
	target, err := p.target()
	if err != nil {
		return err
	}
	stages := []*stage{target}
	if every {
		stages = p.stages
	}
	var first error
	for _, s := range stages {
		if err := p.plan(ctx, s); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// findings shows what the checks found so far and returns an error if that shall be one.
func (p *planner) findings(v *vertex) error {
	for _, f := range p.checks.Findings() {
		v.send(Event{Kind: Warning, Text: fmt.Sprintf("%s: %s (%s:%d)", f.Rule, f.Detail, p.file.Name, f.Lines.First), Finding: &f})
	}
	return p.checks.Err()
}

// checkFrom judges a FROM; platform is what its --platform expands to.
func (p *planner) checkFrom(s *stage, platform string) {
	if base, err := p.file.Word(s.spec.Base, p.defaults); err == nil {
		if _, err := image.ParseReference(base); err != nil {
			p.checks.BadDefault(s.spec)
		}
	}
	p.checks.From(s.spec, p.global, p.declared, platform)
}

// check judges a step and notes what an outline wants to know of it.
func (s *stage) check(p *planner, st dockerfile.Step, in dockerfile.Instruction, unset []string) {
	if len(unset) > 0 {
		s.checks.Unset(st, unset, s.argNames(), s.vars)
	}
	s.checks.Step(st, in, len(s.cfg.image.Config.Shell) > 0, s.cfg.workdir())
	switch i := in.(type) {
	case *dockerfile.Run:
		s.defined.mounts(i.Mounts, st.Lines)
	case *dockerfile.Copy:
		if i.From == "" {
			p.checkIgnored(st, i)
		}
	}
}

func (s *stage) argNames() []string {
	names := make([]string, len(s.args))
	for i, a := range s.args {
		names[i] = a.Key
	}
	return names
}

// checkIgnored reports sources that the ignore file keeps out. One with "!" says nothing: what it brings back only the files tell.
func (p *planner) checkIgnored(st dockerfile.Step, c *dockerfile.Copy) {
	patterns := p.in.view.ignore
	if len(patterns) == 0 {
		return
	}
	if p.ignore == nil {
		m, err := patternmatcher.New(patterns)
		if err != nil {
			return // said when the context was opened
		}
		p.ignore = m
	}
	if p.ignore.Exclusions() {
		return
	}
	for _, src := range c.Sources {
		if c.Add && IsRemote(src) {
			continue
		}
		src = path.Clean(src)
		if src == "." || src == "/" {
			if i := slices.IndexFunc(patterns, func(s string) bool { return s == "*" || s == "**" || s == "**/*" }); i >= 0 {
				p.checks.Ignored(st, c.Add, src, patterns[i], p.in.ignoreName)
			}
			continue
		}
		if ok, err := p.ignore.MatchesOrParentMatches(src); err == nil && ok {
			p.checks.Ignored(st, c.Add, src, ignoredBy(patterns, src), p.in.ignoreName)
		}
	}
}

// ignoredBy is the first pattern that matches a path.
func ignoredBy(patterns []string, src string) string {
	for _, s := range patterns {
		if m, err := patternmatcher.New([]string{s}); err == nil {
			if ok, err := m.MatchesOrParentMatches(src); err == nil && ok {
				return s
			}
		}
	}
	return ""
}
