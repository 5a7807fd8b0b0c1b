package dockerfile

import (
	"encoding/json"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/util/suggest"
)

// StageChecks are the checks of one stage that is planned, in the order of its steps.
type StageChecks struct {
	c *Checks
	// workdir says that a WORKDIR came, here or in the stage below.
	workdir bool
	// last are the latest of the instructions of which only one counts.
	last map[string]Step
}

// Stage begins the checks of a stage; below are those of the stage that its FROM names, nil for an image.
func (c *Checks) Stage(below *StageChecks) *StageChecks {
	s := &StageChecks{c: c, last: map[string]Step{}}
	if below != nil {
		s.workdir = below.workdir
	}
	return s
}

// From judges the variables of a FROM, which are looked up in global, the arguments before the first FROM; declared are the names of those,
// with a value or without. platform is what --platform expands to, "" if to nothing.
func (c *Checks) From(st *Stage, global Env, declared []string, platform string) {
	at, above := st.Lines, st.Comments
	report := func(word string) {
		w := &Watched{Env: global}
		_, _ = c.f.Word(word, w) // what fails is said by who expands it
		for _, name := range w.Unset {
			if slices.Contains(declared, name) {
				continue
			}
			near := Nearest(name, append(slices.Clone(declared), global.Keys()...))
			mend := "write ARG " + name + "=... before the first FROM"
			if l := c.f.declaredInStage(name); l > 0 {
				mend = "move ARG " + name + " of line " + strconv.Itoa(l) + " before the first FROM: FROM sees only the arguments there"
			} else if near != "" {
				mend = "write " + near + ", or ARG " + name + "=... before the first FROM"
			}
			c.report(&linter.RuleUndefinedArgInFrom, at, above, linter.RuleUndefinedArgInFrom.Format(name, near), "%s", mend)
		}
	}
	report(st.Base)
	if st.Platform == "" {
		return
	}
	report(st.Platform)
	if platform == "" {
		return
	}
	target, _ := global.Get("TARGETPLATFORM")
	variable := strings.NewReplacer("$", "", "{", "", "}", "", `"`, "").Replace(st.Platform)
	if variable == "TARGETPLATFORM" && platform == target {
		c.report(&linter.RuleRedundantTargetPlatform, at, above, linter.RuleRedundantTargetPlatform.Format(st.Platform), "leave --platform=%s out", st.Platform)
	}
	if strings.Contains(st.Platform, "$") {
		return
	}
	for part := range strings.SplitSeq(platform, "/") {
		if part != "" && strings.Contains(st.Name, part) {
			return // the name says that it is for this platform
		}
	}
	c.report(&linter.RuleFromPlatformFlagConstDisallowed, at, above, linter.RuleFromPlatformFlagConstDisallowed.Format(platform),
		"leave --platform out and build with --platform %s, or write --platform=$BUILDPLATFORM, or name the stage after the platform", platform)
}

// BadDefault reports a base whose name is no reference without build arguments.
func (c *Checks) BadDefault(st *Stage) {
	var names []string
	for _, a := range c.f.Args {
		for _, v := range a.Instruction.(*Arg).Args {
			if strings.Contains(st.Base, v.Key) && v.Value == nil {
				names = append(names, "ARG "+v.Key+"=...")
			}
		}
	}
	mend := "give the argument a default, as in ARG NAME=value, or one here, as in ${NAME:-value}"
	if len(names) > 0 {
		mend = "give a default: " + strings.Join(names, ", ")
	}
	c.report(&linter.RuleInvalidDefaultArgInFrom, st.Lines, st.Comments, linter.RuleInvalidDefaultArgInFrom.Format(st.Base), "%s", mend)
}

// Ignored reports a source that the ignore file keeps out; pattern is why, in the file called name.
func (c *Checks) Ignored(s Step, add bool, source, pattern, name string) {
	verb := "Copy"
	if add {
		verb = "Add"
	}
	c.report(&linter.RuleCopyIgnoredFile, s.Lines, s.Comments, linter.RuleCopyIgnoredFile.Format(verb, source),
		"remove %q from %s, or write !%s below it", pattern, name, source)
}

// Unset reports variables of a step that have no value. declared are the names of its stage's ARGs, env what variables there are.
func (s *StageChecks) Unset(st Step, unset, declared []string, env Env) {
	c := s.c
	for _, name := range unset {
		if slices.Contains(declared, name) || name == "BUILDKIT_SBOM_SCAN_CONTEXT" || name == "BUILDKIT_SBOM_SCAN_STAGE" {
			continue
		}
		near := Nearest(name, env.Keys())
		var mend string
		switch {
		case c.f.isGlobal(name) || predefined(name):
			mend = "write ARG " + name + " above, in this stage: without it an argument from before the first FROM, or a predefined one, has no value here"
		case near != "":
			mend = "write $" + near + ", or declare " + name + " above with ARG or ENV"
		default:
			mend = "declare it above with ARG or ENV, or write ${" + name + ":-} if it may be empty, \\$" + name + " if no variable is meant"
		}
		c.report(&linter.RuleUndefinedVar, st.Lines, st.Comments, linter.RuleUndefinedVar.Format(name, near), "%s", mend)
	}
}

// Step judges an instruction whose variables are expanded. hasShell says that a SHELL counts, dir is the working folder before.
func (s *StageChecks) Step(st Step, in Instruction, hasShell bool, dir string) {
	c := s.c
	switch i := in.(type) {
	case *EnvVars:
		c.blanks(st, i.Vars)
		for _, p := range i.Vars {
			c.secret(st, "ENV", p.Key)
		}
	case *Label:
		c.blanks(st, i.Labels)
	case *Arg:
		for _, a := range i.Args {
			c.secret(st, "ARG", a.Key)
		}
	case *Workdir:
		if !s.workdir && !path.IsAbs(i.Path) {
			c.report(&linter.RuleWorkdirRelativePath, st.Lines, st.Comments, linter.RuleWorkdirRelativePath.Format(i.Path), "write WORKDIR %s", path.Join("/", dir, i.Path))
		}
		s.workdir = true
	case *Cmd:
		s.once(st)
		c.shellForm(st, i.CommandLine, hasShell)
	case *Entrypoint:
		s.once(st)
		c.shellForm(st, i.CommandLine, hasShell)
	case *Healthcheck:
		s.once(st)
	case *Expose:
		for _, w := range i.Words {
			p, err := parsePort(w)
			if err != nil {
				continue
			}
			right := strconv.Itoa(p.first) + "/" + p.proto
			if p.last != p.first {
				right = strconv.Itoa(p.first) + "-" + strconv.Itoa(p.last) + "/" + p.proto
			}
			if p.upper {
				c.report(&linter.RuleExposeProtoCasing, st.Lines, st.Comments, linter.RuleExposeProtoCasing.Format(w), "write EXPOSE %s", right)
			}
			if p.host {
				c.report(&linter.RuleExposeInvalidFormat, st.Lines, st.Comments, linter.RuleExposeInvalidFormat.Format(w),
					"write EXPOSE %s; the host's side is said by run -p %s", right, w)
			}
		}
	}
}

// once reports the instruction of the same kind before, which has no effect.
func (s *StageChecks) once(st Step) {
	kw := st.Keyword()
	if before, ok := s.last[kw]; ok {
		s.c.report(&linter.RuleMultipleInstructionsDisallowed, before.Lines, st.Comments, linter.RuleMultipleInstructionsDisallowed.Format(keyword(st.Code)),
			"remove it: the %s of line %d counts", kw, st.Lines.First)
	}
	s.last[kw] = st
}

// blanks reports NAME VALUE without "=".
func (c *Checks) blanks(st Step, pairs []Pair) {
	for _, p := range pairs {
		if p.Blank {
			w := keyword(st.Code)
			c.report(&linter.RuleLegacyKeyValueFormat, st.Lines, st.Comments, linter.RuleLegacyKeyValueFormat.Format(w), "write %s %s=%s", w, p.Key, quoted(p.Value))
		}
	}
}

// quoted is a value as it may stand behind "=".
func quoted(v string) string {
	if v == "" || strings.ContainsAny(v, " \t\"'\\$#") {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "$", `\$`).Replace(v) + `"`
	}
	return v
}

// secret reports a variable whose name says that its value is one.
func (c *Checks) secret(st Step, kind, name string) {
	deny := []string{"apikey", "auth", "credential", "credentials", "key", "password", "pword", "passwd", "secret", "token"}
	allow := []string{"public", "file", "version"}
	found := false
	for word := range strings.SplitSeq(strings.ToLower(name), "_") {
		if slices.Contains(allow, word) {
			return
		}
		found = found || slices.Contains(deny, word)
	}
	if found {
		c.report(&linter.RuleSecretsUsedInArgOrEnv, st.Lines, st.Comments, linter.RuleSecretsUsedInArgOrEnv.Format(kind, name),
			"give it to the RUN that needs it, with RUN --mount=type=secret,id=%s,env=%s ..., and build with --secret id=%[1]s: it is in no layer and no history then", strings.ToLower(name), name)
	}
}

// shellForm reports a CMD or ENTRYPOINT that a shell stands before, which keeps signals from it.
func (c *Checks) shellForm(st Step, l CommandLine, hasShell bool) {
	if !l.Shell || hasShell {
		return
	}
	words := strings.Fields(strings.Join(l.Args, " "))
	exec := words
	mend := "write %s %s"
	if strings.ContainsAny(strings.Join(l.Args, " "), "$`\"'\\|&;<>()*?[]{}~#=!\n") {
		exec = []string{"/bin/sh", "-c", "exec " + strings.Join(l.Args, " ")}
		if strings.ContainsAny(strings.Join(l.Args, " "), "|&;\n") {
			exec[2] = strings.Join(l.Args, " ")
			mend = "write %s %s with exec before the last command, or a SHELL instruction above to say that a shell is meant"
		}
	}
	list, err := json.Marshal(exec)
	if err != nil || len(words) == 0 {
		list, mend = []byte(`["program", "argument"]`), "write %s %s"
	}
	kw := keyword(st.Code)
	text := strings.NewReplacer(`\u0026`, "&", `\u003c`, "<", `\u003e`, ">", `","`, `", "`).Replace(string(list))
	c.report(&linter.RuleJSONArgsRecommended, st.Lines, st.Comments, linter.RuleJSONArgsRecommended.Format(kw), mend, kw, text)
}

// declaredInStage is the line of an ARG of that name after the first FROM, 0 if there is none.
func (f *File) declaredInStage(name string) int {
	for _, st := range f.Stages {
		for _, s := range st.Steps {
			a, ok := s.Instruction.(*Arg)
			if ok && slices.ContainsFunc(a.Args, func(v ArgVar) bool { return v.Key == name }) {
				return s.Lines.First
			}
		}
	}
	return 0
}

// isGlobal reports whether an ARG before the first FROM declares a name.
func (f *File) isGlobal(name string) bool {
	return slices.ContainsFunc(f.Args, func(s Step) bool {
		return slices.ContainsFunc(s.Instruction.(*Arg).Args, func(v ArgVar) bool { return v.Key == name })
	})
}

// predefined reports whether a name is one of the arguments that are there without ARG, for FROM.
func predefined(name string) bool {
	for _, side := range []string{"BUILD", "TARGET"} {
		if rest, ok := strings.CutPrefix(name, side); ok {
			return slices.Contains([]string{"PLATFORM", "OS", "OSVERSION", "ARCH", "VARIANT"}, rest) || name == "TARGETSTAGE"
		}
	}
	return false
}

// Nearest is the name that was probably meant, "" if none is near.
func Nearest(name string, names []string) string {
	if len(name) > 64 || len(names) > 500 {
		return ""
	}
	names = slices.DeleteFunc(slices.Clone(names), func(s string) bool { return len(s) > 64 })
	match, _ := suggest.Search(name, names, true)
	return match
}

// DidYouMean is " (did you mean X?)" for the name that was probably meant, "" if none is near.
func DidYouMean(name string, names []string) string {
	if near := Nearest(name, names); near != "" {
		return " (did you mean " + near + "?)"
	}
	return ""
}
