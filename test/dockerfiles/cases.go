// Package dockerfiles owns the table of Dockerfiles that conex is held to: cases/*.txt say what to build, want/*.txt what BuildKit made of
// it. The test that builds them with conex is TestDockerfiles in the package above; record writes the expectations, and never from
// conex's own output.
//
// A case (see casefile) holds directives and files:
//
//	== copy-file-to-folder
//	What the case shows, in words.
//	% build --build-arg A=1
//	% symlink to/file link
//	-- Dockerfile --
//	FROM scratch
//	COPY file /folder/
//	-- file --
//	content
//
// Sections are files of the context. A prefix sends them elsewhere: "outside:NAME" lies beside the context, at $OUT/NAME for flags;
// "http:NAME" is served as http://127.0.0.1:18099/CASE/NAME; "tar:NAME" is an archive whose entries the section lists, compressed as
// its name says; "b64:NAME" is a file in base64; "raw:NAME" is a file without the section's last newline. Directives are lines that begin
// with "% " (see setup); the file's times are epoch, its modes 0644 and 0755 until one says otherwise.
//
// A difference that conex chose is written by hand where it is seen, below the row of docs/compat.md that states it:
//
//	% differs `COPY --link`
//	- /d/a file 0644 0:0 "a\n"
//	+ /e/a file 0644 0:0 "a\n"
//
// So both sides stay proven: BuildKit's by the recording, ours by the test. "- *" stands for all of BuildKit's lines. An error must
// blame the line that BuildKit blames and contain its message, or what stands behind "% says", where conex has words of its own.
package dockerfiles

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/tools/txtar"

	"conex/test/casefile"
)

// Case is a Dockerfile with its context and what is asked for.
type Case struct {
	casefile.Title
	// Flags are `build`'s, in conex's words. $OUT in them stands for the folder beside the context.
	Flags []string
	// Differs are the differences that are meant.
	Differs []Difference
	// Pending says what is missing, while it is: the case is not held against conex then.
	Pending string

	// says is what conex's error says instead of BuildKit's words, "" if it has those.
	says     string
	setup    []string
	sections []txtar.File
	input    string
}

// Difference replaces lines of BuildKit's result by conex's.
type Difference struct {
	// Row is the first cell of the row in docs/compat.md that states it.
	Row         string
	Docker, Own []string
}

// everywhere are differences that no case has to name.
var everywhere = []Difference{
	// The image specification: "should not be used by new image builders".
	{Row: "`ArgsEscaped`", Docker: []string{"ArgsEscaped true"}},
}

// Rows are the rows of docs/compat.md that the case's expectation relies on.
func (c *Case) Rows() []string {
	var rows []string
	for _, d := range slices.Concat(everywhere, c.Differs) {
		rows = append(rows, d.Row)
	}
	return rows
}

// Input identifies what is built: an expectation that was recorded for another input is stale.
func (c *Case) Input() string { return c.input }

// Load reads dir/cases/*.txt.
func Load(dir string) ([]*Case, error) {
	var all []*Case
	err := casefile.Read(dir, func(t casefile.Title, a *txtar.Archive) error {
		c, err := parse(t, a)
		all = append(all, c)
		return err
	})
	return all, err
}

func parse(t casefile.Title, a *txtar.Archive) (*Case, error) {
	c := &Case{Title: t, sections: a.Files}
	var diff *Difference
	for line := range strings.Lines(string(a.Comment)) {
		line = strings.TrimSuffix(line, "\n")
		if word, ok := strings.CutPrefix(line, "% differs "); ok {
			c.Differs = append(c.Differs, Difference{Row: word})
			diff = &c.Differs[len(c.Differs)-1]
			continue
		}
		if s, ok := strings.CutPrefix(line, "- "); ok && diff != nil {
			diff.Docker = append(diff.Docker, s)
			continue
		}
		if s, ok := strings.CutPrefix(line, "+ "); ok && diff != nil {
			diff.Own = append(diff.Own, s)
			continue
		}
		diff = nil
		if s, ok := strings.CutPrefix(line, "% build "); ok {
			words, err := fields(s)
			if err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
			c.Flags = append(c.Flags, words...)
		} else if s, ok := strings.CutPrefix(line, "% pending "); ok {
			c.Pending = s
		} else if s, ok := strings.CutPrefix(line, "% says "); ok {
			c.says = s
		} else if s, ok := strings.CutPrefix(line, "% "); ok {
			c.setup = append(c.setup, s)
		}
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q %q\n", c.Flags, c.setup)
	for _, f := range c.sections {
		fmt.Fprintf(h, "%q %q\n", f.Name, f.Data)
	}
	c.input = hex.EncodeToString(h.Sum(nil)[:6])
	return c, nil
}

// fields splits at spaces; what stands in double quotes, or between a word's quotes, is one word.
func fields(s string) ([]string, error) {
	var out []string
	var word strings.Builder
	in, quoted := false, false
	for _, r := range s {
		switch {
		case r == '"':
			in, quoted = true, !quoted
		case r == ' ' && !quoted:
			if in {
				out = append(out, word.String())
			}
			word.Reset()
			in = false
		default:
			in = true
			word.WriteRune(r)
		}
	}
	if quoted {
		return nil, fmt.Errorf("a quote is missing")
	}
	if in {
		out = append(out, word.String())
	}
	return out, nil
}

// Expect is what conex must make of the case: BuildKit's result with the differences that are meant.
func (c *Case) Expect(want []string) ([]string, error) {
	if len(want) == 0 || want[0] != "input "+c.input {
		return nil, fmt.Errorf("the expectation is not of this input: run test/dockerfiles/record")
	}
	out := slices.Clone(want[1:])
	for _, d := range everywhere {
		out = slices.DeleteFunc(out, func(l string) bool { return slices.Contains(d.Docker, l) })
	}
	for _, d := range c.Differs {
		at := len(out)
		for _, l := range d.Docker {
			if l == "*" {
				out, at = nil, 0
				continue
			}
			i := slices.IndexFunc(out, func(o string) bool { return withoutTime(o) == withoutTime(l) })
			if i < 0 {
				return nil, fmt.Errorf("BuildKit's result has no line %q, which the case says differs", l)
			}
			out = slices.Delete(out, i, i+1)
			at = i
		}
		out = slices.Insert(out, min(at, len(out)), d.Own...)
	}
	return out, nil
}
