package dockerfile

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// Finding is what one of Docker's build checks says about a place.
type Finding struct {
	// Rule is the check's name, Description what it asks of every Dockerfile, URL where Docker explains it.
	Rule, Description, URL string
	// Detail is what is wrong here, in Docker's words, and Mend what to do about it.
	Detail, Mend string
	Lines        Lines
}

// Checks holds a Dockerfile against the build checks while it is planned. What the text alone tells is found at once, the rest by the
// methods, which are called for each FROM and each step. It is for one goroutine.
type Checks struct {
	f    *File
	lint *linter.Linter
	// list is in the order found.
	list []Finding
	at   Lines
	mend string
}

// Check begins to check a file. options are those of the check directive, "skip=A,B;error=true;experimental=C", which they replace; nil
// takes the directive's. The error has the place of a directive that is wrong.
func (f *File) Check(options *string) (*Checks, error) {
	given := f.checks
	if options != nil {
		given = *options
	}
	cfg, err := linter.ParseLintOptions(given)
	switch {
	case err != nil && options == nil:
		return nil, f.Errorf(Lines{f.checksLine, f.checksLine}, "check directive: %w", errors.New(err.Error()))
	case err != nil:
		return nil, fmt.Errorf("BUILDKIT_DOCKERFILE_CHECK: %s", err)
	}
	c := &Checks{f: f}
	cfg.Warn = func(rule, description, url, detail string, _ []parser.Range) {
		c.list = append(c.list, Finding{rule, description, url, detail, c.mend, c.at})
	}
	c.lint = linter.New(cfg)
	c.text()
	return c, nil
}

// report makes a finding unless the options or the comments above the instruction turn the rule off. The mend is a format.
func (c *Checks) report(rule linter.LinterRuleI, at Lines, comments []string, detail, mend string, args ...any) {
	lint := c.lint
	if slices.ContainsFunc(comments, func(s string) bool { return strings.Contains(strings.ToLower(s), "check") }) {
		lint = lint.WithMergedConfigFromComments(comments)
	}
	c.at, c.mend = at, fmt.Sprintf(mend, args...)
	lint.Run(rule, nil, detail)
}

// Findings are those so far, by line.
func (c *Checks) Findings() []Finding {
	list := slices.Clone(c.list)
	slices.SortStableFunc(list, func(a, b Finding) int { return cmp.Compare(a.Lines.First, b.Lines.First) })
	return list
}

// Err is an error when there are findings and the options make them one.
func (c *Checks) Err() error {
	if !c.lint.ReturnAsError || len(c.list) == 0 {
		return nil
	}
	var rules []string
	for _, f := range c.list {
		rules = append(rules, f.Rule)
	}
	slices.Sort(rules)
	return fmt.Errorf("lint violation found for rules: %s", strings.Join(slices.Compact(rules), ", "))
}

// text finds what needs no variables.
func (c *Checks) text() {
	f := c.f
	for _, at := range f.continued {
		c.report(&linter.RuleNoEmptyContinuation, at, nil, linter.RuleNoEmptyContinuation.Format(), "remove the empty lines in this instruction, or begin them with #")
	}
	lower, upper := 0, 0
	count := func(code string) {
		switch w := keyword(code); w {
		case strings.ToLower(w):
			lower++
		case strings.ToUpper(w):
			upper++
		}
	}
	seen := map[string]Lines{}
	for i := range f.Stages {
		st := &f.Stages[i]
		count(st.Code)
		for _, s := range st.Steps {
			count(s.Code)
		}
		if st.Name != "" {
			c.stageName(st, seen)
		}
	}
	for i := range f.Args {
		c.describedArgs(&f.Args[i])
	}
	for i := range f.Stages {
		st := &f.Stages[i]
		c.casing(st.Code, st.Lines, st.Comments, lower > upper)
		for j := range st.Steps {
			s := &st.Steps[j]
			c.casing(s.Code, s.Lines, s.Comments, lower > upper)
			switch in := s.Instruction.(type) {
			case *Maintainer:
				c.report(&linter.RuleMaintainerDeprecated, s.Lines, s.Comments, linter.RuleMaintainerDeprecated.Format(),
					"write LABEL org.opencontainers.image.authors=%q", in.Name)
			case *Arg:
				c.describedArgs(s)
			}
		}
	}
}

// stageName judges the name that a FROM gives; seen are the names before.
func (c *Checks) stageName(st *Stage, seen map[string]Lines) {
	at, above := st.Lines, st.Comments
	if st.Written != strings.ToLower(st.Written) {
		c.report(&linter.RuleStageNameCasing, at, above, linter.RuleStageNameCasing.Format(st.Written), "write %s %s", st.As, strings.ToLower(st.Written))
	}
	from := keyword(st.Code)
	want := strings.ToUpper(st.As)
	if from == strings.ToLower(from) {
		want = strings.ToLower(st.As)
	}
	if st.As != want && (from == strings.ToLower(from) || from == strings.ToUpper(from)) {
		c.report(&linter.RuleFromAsCasing, at, above, linter.RuleFromAsCasing.Format(from, st.As), "write %s ... %s %s", from, want, st.Written)
	}
	c.described("FROM", []string{st.Name}, at, above)
	if st.Name == "context" || st.Name == "scratch" {
		c.report(&linter.RuleReservedStageName, at, above, linter.RuleReservedStageName.Format(st.Name), "give the stage another name: %q means something else in FROM and --from", st.Name)
	}
	if before, ok := seen[st.Name]; ok {
		c.report(&linter.RuleDuplicateStageName, at, above, linter.RuleDuplicateStageName.Format(st.Name),
			"give this stage or that of line %d another name: after this line %q means this one", before.First, st.Name)
	}
	seen[st.Name] = at
}

func (c *Checks) casing(code string, at Lines, above []string, lower bool) {
	w := keyword(code)
	want, name := strings.ToUpper(w), "uppercase"
	if lower {
		want, name = strings.ToLower(w), "lowercase"
	}
	if w != want {
		c.report(&linter.RuleConsistentInstructionCasing, at, above, linter.RuleConsistentInstructionCasing.Format(w, name), "write %s", want)
	}
}

func (c *Checks) describedArgs(s *Step) {
	var names []string
	for _, a := range s.Instruction.(*Arg).Args {
		names = append(names, a.Key)
	}
	c.described("ARG", names, s.Lines, s.Comments)
}

// described judges the comment above a definition, which is its description.
func (c *Checks) described(kind string, names []string, at Lines, above []string) {
	if len(above) == 0 || len(names) == 0 {
		return
	}
	word, rest, _ := strings.Cut(above[len(above)-1], " ")
	if slices.Contains(names, word) {
		return
	}
	name := names[0]
	if len(names) > 1 {
		name = "<arg_key>"
	}
	c.report(&linter.RuleInvalidDefinitionDescription, at, above, linter.RuleInvalidDefinitionDescription.Format(kind, name),
		"write \"# %s %s\", or put a line with # alone between if the comment is no description", name, strings.TrimSpace(word+" "+rest))
}
