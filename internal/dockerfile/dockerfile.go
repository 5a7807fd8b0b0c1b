// Package dockerfile owns the grammar of Dockerfiles: from bytes to stages of typed instructions, with the place of each.
//
// It is the only importer of BuildKit's parser, instructions and shell packages, so that conex reads every Dockerfile exactly as
// Docker does; what the instructions mean is package build's business. Variables are left as written until Expand is
// called, since their values depend on the instructions before.
package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"

	"conex/internal/ondemand"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// File is a parsed Dockerfile.
type File struct {
	// Name is what messages call the file, as in "Dockerfile".
	Name string
	// Source is the text.
	Source []byte
	// Args are the ARG instructions before the first FROM.
	Args []Step
	// Stages are in the file's order; there is at least one.
	Stages []Stage
	// Syntax is what the syntax directive names, "" without one. Line is where.
	Syntax     string
	SyntaxLine int

	escape rune
	// checks is the check directive, on line checksLine.
	checks     string
	checksLine int
	// spent is what variables have expanded to so far.
	spent atomic.Int64
	// starts are the offsets of the lines and of the end.
	startsOnce sync.Once
	starts     []int
	// continued are the ends of instructions with empty lines between continued ones.
	continued []Lines
}

// Lines is a range of lines, from 1, both ends included. The zero value is no place.
type Lines struct{ First, Last int }

// Stage is a FROM and what follows until the next.
type Stage struct {
	// Name is the stage's name in lower case, "" without AS.
	Name string
	// Written is the name as it stands there; As is the word before it.
	Written, As string
	// Description is what the comment above says of the stage: "# NAME description".
	Description string
	// Base and Platform are FROM's operands, variables not expanded.
	Base, Platform string
	// Code is the FROM instruction as written.
	Code string
	// Lines is FROM's place.
	Lines Lines
	// Comments are those right above it, without "#".
	Comments []string
	// Steps are the stage's instructions.
	Steps []Step
}

// Step is one instruction and where it stands.
type Step struct {
	Instruction Instruction
	// Code is the instruction as written, continuation lines joined.
	Code  string
	Lines Lines
	// Comments are those right above it, without "#".
	Comments []string
}

// Keyword is the instruction's word in capitals, as in "COPY".
func (s Step) Keyword() string { return strings.ToUpper(keyword(s.Code)) }

// keyword is an instruction's first word as written.
func keyword(code string) string {
	if i := strings.IndexFunc(code, unicode.IsSpace); i >= 0 {
		return code[:i]
	}
	return code
}

// ParseError is an error with a place in the file.
type ParseError struct {
	// File is the Dockerfile's name.
	File string
	// Lines is the place.
	Lines Lines
	// Excerpt shows the lines around the place, see File.Excerpt.
	Excerpt string
	// Err says what is wrong.
	Err error
}

// Error is a line in Docker's wording, then the place and the lines around it.
func (e *ParseError) Error() string {
	msg := fmt.Sprintf("dockerfile parse error on line %d: %v", e.Lines.First, e.Err)
	if e.Excerpt == "" {
		return msg
	}
	return fmt.Sprintf("%s\n%s:%d\n%s", msg, e.File, e.Lines.First, e.Excerpt)
}

// Unwrap returns the reason.
func (e *ParseError) Unwrap() error { return e.Err }

// Parse reads a Dockerfile. Every error is a *ParseError.
func Parse(name string, src []byte) (*File, error) {
	ondemand.Dockerfile()
	f := &File{Name: name, Source: src}
	fail := func(at Lines, err error) (*File, error) {
		at.First = max(at.First, 1)
		at.Last = max(at.Last, at.First)
		return nil, &ParseError{File: name, Lines: at, Excerpt: f.Excerpt(at), Err: err}
	}
	if len(src) > MaxSize {
		return fail(Lines{}, fmt.Errorf("file has %d bytes, at most %d are allowed", len(src), MaxSize))
	}
	if len(bytes.TrimSpace(src)) == 0 {
		return fail(Lines{}, errors.New("file is empty"))
	}
	f.directives()
	if at, err := checkLines(src); err != nil {
		return fail(at, err)
	}
	res, err := parser.Parse(bytes.NewReader(src))
	if err != nil {
		return fail(place(err), f.foreign(bare(err)))
	}
	f.escape = res.EscapeToken
	for _, w := range res.Warnings {
		f.continued = append(f.continued, Lines{w.Location.Start.Line, w.Location.End.Line})
	}
	if n := len(res.AST.Children); n > MaxInstructions {
		last := res.AST.Children[MaxInstructions]
		return fail(Lines{last.StartLine, last.EndLine}, fmt.Errorf("a file of %d instructions, at most %d are allowed", n, MaxInstructions))
	}
	pairs, quiet := 0, linter.New(&linter.Config{}) // none at all, and it panics at a comment like "check=skip=all"
	for _, n := range res.AST.Children {
		at := Lines{n.StartLine, n.EndLine}
		in, err := instructions.ParseInstructionWithLinter(n, quiet)
		if err != nil {
			return fail(at, f.foreign(bare(err)))
		}
		if st, ok := in.(*instructions.Stage); ok {
			if len(f.Stages) == MaxStages {
				return fail(at, fmt.Errorf("more than %d stages", MaxStages))
			}
			stage := Stage{
				Name: st.Name, Description: st.DocComment, Base: st.BaseName, Platform: st.Platform, Code: st.SourceCode, Lines: at, Comments: n.PrevComment,
			}
			if words := strings.Fields(stage.Code); st.Name != "" && len(words) > 2 {
				stage.As, stage.Written = words[len(words)-2], words[len(words)-1]
			}
			f.Stages = append(f.Stages, stage)
			continue
		}
		s := Step{Lines: at, Code: strings.TrimSpace(n.Original), Comments: n.PrevComment}
		if s.Instruction, err = convert(in); err != nil {
			return fail(at, err)
		}
		if pairs += variables(s.Instruction); pairs > maxPairs {
			return fail(at, fmt.Errorf("more than %d variables and labels", maxPairs))
		}
		if len(f.Stages) > 0 {
			last := &f.Stages[len(f.Stages)-1]
			last.Steps = append(last.Steps, s)
			continue
		}
		if _, ok := s.Instruction.(*Arg); !ok {
			return fail(at, fmt.Errorf("no build stage in current context: %s stands before the first FROM", s.Keyword()))
		}
		f.Args = append(f.Args, s)
	}
	if len(f.Stages) == 0 {
		return fail(Lines{}, errors.New("no stage to build: FROM is missing"))
	}
	return f, nil
}

// ParseTrigger reads one instruction that an image's ONBUILD left, as if it stood at the lines at of f.
func (f *File) ParseTrigger(expr string, at Lines) (Step, error) {
	fail := func(err error) (Step, error) {
		return Step{}, f.Errorf(at, "ONBUILD trigger %q: %w", shorten(expr), err)
	}
	if len(expr) > MaxSize {
		return fail(fmt.Errorf("longer than %d bytes", MaxSize))
	}
	if _, err := checkLines([]byte(expr)); err != nil {
		return fail(err)
	}
	res, err := parser.Parse(strings.NewReader(expr))
	if err != nil {
		return fail(bare(err))
	}
	if len(res.AST.Children) != 1 {
		return fail(errors.New("not a single instruction"))
	}
	n := res.AST.Children[0]
	c, err := instructions.ParseInstructionWithLinter(n, linter.New(&linter.Config{}))
	if err != nil {
		return fail(bare(err))
	}
	in, err := convert(c)
	if err != nil {
		return fail(err)
	}
	if _, ok := in.(*OnBuild); ok {
		return fail(errors.New("ONBUILD in an ONBUILD"))
	}
	return Step{Instruction: in, Code: strings.TrimSpace(n.Original), Lines: at}, nil
}

// Errorf makes a *ParseError at lines at.
func (f *File) Errorf(at Lines, format string, args ...any) *ParseError {
	return &ParseError{File: f.Name, Lines: at, Excerpt: f.Excerpt(at), Err: fmt.Errorf(format, args...)}
}

// Excerpt shows the lines at with up to two around them, numbered, the ones meant marked with ">>>". It ends without a newline; it is
// empty when at is no place in the file.
func (f *File) Excerpt(at Lines) string {
	count := f.lines()
	if at.First < 1 || at.First > count {
		return ""
	}
	first, last := max(at.First-2, 1), min(at.Last+2, count)
	const most = 24 // of a long heredoc the beginning tells enough
	var b strings.Builder
	for i := first; i <= last; i++ {
		if i > first {
			b.WriteByte('\n')
		}
		if i-first >= most {
			b.WriteString("     | ...")
			break
		}
		mark := "   "
		if i >= at.First && i <= at.Last {
			mark = ">>>"
		}
		line := strings.TrimRight(f.line(i), "\r")
		if len(line) > 200 {
			line = line[:200] + "..."
		}
		fmt.Fprintf(&b, "%4d | %s %s", i, mark, line)
	}
	return b.String()
}

// lines counts the lines, but for empty ones at the end. The first time it notes where each begins, for files with many excerpts.
func (f *File) lines() int {
	f.startsOnce.Do(func() {
		src := bytes.TrimRight(f.Source, "\n")
		f.starts = append(make([]int, 0, bytes.Count(src, []byte("\n"))+2), 0)
		for i, c := range src {
			if c == '\n' {
				f.starts = append(f.starts, i+1)
			}
		}
		f.starts = append(f.starts, len(src)+1)
	})
	return len(f.starts) - 1
}

// line is a line, from 1.
func (f *File) line(n int) string { return string(f.Source[f.starts[n-1] : f.starts[n]-1]) }

// place finds the lines that BuildKit attached to an error.
func place(err error) Lines {
	var le *parser.LocationError
	if !errors.As(err, &le) {
		return Lines{}
	}
	var l Lines
	for _, group := range le.Locations {
		for _, r := range group {
			if l.First == 0 || r.Start.Line < l.First {
				l.First = r.Start.Line
			}
			l.Last = max(l.Last, r.End.Line)
		}
	}
	return l
}

// bare strips BuildKit's stack traces and prefixes: our own ParseError says the line.
func bare(err error) error {
	msg := err.Error()
	if rest, ok := strings.CutPrefix(msg, "dockerfile parse error on line "); ok {
		if _, m, ok := strings.Cut(rest, ": "); ok {
			msg = m
		}
	}
	// What the substitution's parser says where the text ends: the modifier is no character.
	if rest, ok := strings.CutSuffix(msg, "unsupported modifier (\uFFFD) in substitution"); ok {
		msg = rest + "the closing } is missing"
	}
	if len(msg) > 600 { // it quotes what it doesn't like
		msg = msg[:300] + "..." + msg[len(msg)-300:]
	}
	return errors.New(msg)
}

// Env looks a variable up.
type Env interface {
	Get(name string) (value string, ok bool)
	Keys() []string
}

// List is an Env over "name=value" strings; the last of a name counts.
type List []string

// Get returns the value of name.
func (l List) Get(name string) (string, bool) {
	for i := len(l) - 1; i >= 0; i-- {
		if k, v, _ := strings.Cut(l[i], "="); k == name {
			return v, true
		}
	}
	return "", false
}

// Keys lists the names.
func (l List) Keys() []string {
	keys := make([]string, len(l))
	for i, s := range l {
		keys[i], _, _ = strings.Cut(s, "=")
	}
	return keys
}

// Unique has one string of each name: at the place of its first, with the value of its last.
func (l List) Unique() List {
	at := make(map[string]int, len(l))
	out := make(List, 0, len(l))
	for _, s := range l {
		k, _, _ := strings.Cut(s, "=")
		if i, ok := at[k]; ok {
			out[i] = s
			continue
		}
		at[k] = len(out)
		out = append(out, s)
	}
	return out
}

// Word expands variables and removes quotes in one word, by the Dockerfile's rules.
func (f *File) Word(word string, env Env) (string, error) {
	if !strings.ContainsAny(word, `$'"`) && !strings.ContainsRune(word, f.escape) {
		return word, nil
	}
	out := ""
	err := f.expand(word, f.escape, true, env, maxWord, func(env Env) (err error) {
		out, _, err = shell.NewLex(f.escape).ProcessWord(word, env)
		return err
	})
	f.spent.Add(int64(len(out)))
	return out, err
}

// words is Word that splits the result at blanks.
func (f *File) words(word string, env Env) ([]string, error) {
	var out []string
	err := f.expand(word, f.escape, true, env, maxWord, func(env Env) (err error) {
		out, err = shell.NewLex(f.escape).ProcessWords(word, env)
		return err
	})
	return out, err
}

// Text expands variables in running text, such as a heredoc's, where quotes mean nothing.
func (f *File) Text(text string, env Env) (string, error) {
	out := ""
	err := f.expand(text, '\\', false, env, maxText, func(env Env) (err error) {
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		out, _, err = lex.ProcessWord(text, env)
		return err
	})
	f.spent.Add(int64(len(out)))
	return out, err
}

// expand calls do when it is sure that it will not take long, with a quick env.
func (f *File) expand(word string, escape rune, quotes bool, env Env, limit int, do func(Env) error) error {
	watched, _ := env.(*Watched)
	if watched != nil {
		env = watched.Env
	}
	quick := indexed(word, env)
	if err := bound(word, escape, quotes, quick, max(limit, 2*len(word))); err != nil {
		return err
	}
	if f.spent.Load() > maxTotal {
		return fmt.Errorf("the variables of the file expand to more than %d bytes", maxTotal)
	}
	if watched != nil {
		w := &Watched{quick, watched.Unset}
		defer func() { watched.Unset = w.Unset }()
		quick = w
	}
	if err := do(quick); err != nil {
		return bare(err)
	}
	return nil
}

// maxTitle bounds the code that is worth showing with its variables.
const maxTitle = 64 << 10

// Title expands the variables of a step's code for display; what is unset stays as written.
func (f *File) Title(code string, env Env) string {
	if len(code) > maxTitle {
		return code[:maxTitle]
	}
	out := code
	err := f.expand(code, f.escape, true, env, maxTitle, func(env Env) (err error) {
		lex := shell.NewLex(f.escape)
		lex.RawQuotes, lex.RawEscapes, lex.SkipUnsetEnv = true, true, true
		out, _, err = lex.ProcessWord(code, env)
		return err
	})
	if err != nil {
		return code
	}
	f.spent.Add(int64(len(out)))
	return out
}
