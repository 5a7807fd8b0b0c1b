// Package containers owns the table of command lines that conex is held to: cases/*.txt say what a user types, want/*.txt what a Docker
// answered. The test that types them to conex is TestContainers in the package above; record writes the expectations, and never from
// conex's own output.
//
// A case (see casefile) holds commands, and files that lie in the folder that these run in:
//
//	== env-file
//	What the case shows, in words.
//	$ docker run --rm --env-file vars busybox env
//	$ docker run --rm --env-file nosuch busybox true
//	-- vars --
//	A=1
//
// A command is a line for a shell; lines that begin with "> " go on with it. $PROBE is a program that asks the kernel (see probe), and two
// functions are there: `eventually COMMAND` runs it until it succeeds, `tty COMMAND` runs it on a terminal. What is looked for in vain has no
// hexadecimal name: some id may begin so. The answer to each command is what it printed ("| "), what came on standard error ("! "), and its
// exit code ("= ") if that is not 0, all with what no two runs have in common taken out (see normal). A line that is a JSON object is a line
// for each of its fields. Errors are compared by class and by words, see Compare.
//
// A difference is written by hand below the command where it is seen:
//
//	% differs `row`          conex's choice: the first cell of the row in docs/compat.md or docs/SECURITY.md that states it
//	% newer 25: reason       what a newer Docker does, and conex with it
//	- | a line of the recorded answer, or "*" for all of it, "| *", "! *" for all of a kind
//	+ | the line that stands there instead
//
// and "% says WORDS", where an error has words of conex's own. "% pending REASON" before the commands takes a case out until
// conex can do what it asks for; "% needs cgroup1" leaves it out where the machine has no such.
package containers

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/tools/txtar"

	"conex/test/casefile"
)

// Case is a short session at a terminal.
type Case struct {
	casefile.Title
	// Pending says what is missing, while it is.
	Pending string
	// Needs is "cgroup1" where the answers are those of a machine that has it.
	Needs string
	Steps []Step

	files []txtar.File
	input string
}

// Step is one command and how conex's answer is meant to differ from the recorded one.
type Step struct {
	Line    string
	Differs []Difference
	// Says is what conex's error says instead of Docker's words, "" if it has those.
	Says string
}

// Difference replaces lines of Docker's answer by conex's.
type Difference struct {
	// Row is the first cell of the row in the documents that states it, "" where a newer Docker does the same.
	Row string
	// Newer is the version and the reason, "" where conex alone differs.
	Newer       string
	Docker, Own []string
}

// Rows are the rows of the documents that the case's expectation relies on.
func (c *Case) Rows() []string {
	var rows []string
	for _, s := range c.Steps {
		for _, d := range s.Differs {
			if d.Row != "" {
				rows = append(rows, d.Row)
			}
		}
	}
	return rows
}

// Input identifies what is typed: an expectation that was recorded for another input is stale.
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
	c := &Case{Title: t, files: a.Files}
	var diff *Difference
	for line := range strings.Lines(string(a.Comment)) {
		line = strings.TrimSuffix(line, "\n")
		if s, ok := strings.CutPrefix(line, "$ "); ok {
			c.Steps = append(c.Steps, Step{Line: s})
			diff = nil
			continue
		}
		if s, ok := strings.CutPrefix(line, "% pending "); ok && len(c.Steps) == 0 {
			c.Pending = s
			continue
		}
		if s, ok := strings.CutPrefix(line, "% needs "); ok && len(c.Steps) == 0 {
			c.Needs = s
			continue
		}
		if len(c.Steps) == 0 {
			if strings.HasPrefix(line, "%") {
				return nil, fmt.Errorf("%q stands before any command", line)
			}
			continue // words
		}
		step := &c.Steps[len(c.Steps)-1]
		word, value, _ := strings.Cut(line, " ")
		switch {
		case word == ">":
			step.Line += "\n" + value
		case strings.HasPrefix(line, "% differs "):
			step.Differs = append(step.Differs, Difference{Row: strings.TrimPrefix(line, "% differs ")})
			diff = &step.Differs[len(step.Differs)-1]
		case strings.HasPrefix(line, "% newer "):
			step.Differs = append(step.Differs, Difference{Newer: strings.TrimPrefix(line, "% newer ")})
			diff = &step.Differs[len(step.Differs)-1]
		case strings.HasPrefix(line, "% says "):
			step.Says = strings.TrimPrefix(line, "% says ")
		case word == "-" && diff != nil:
			diff.Docker = append(diff.Docker, value)
		case word == "+" && diff != nil:
			diff.Own = append(diff.Own, value)
		case line == "":
		default:
			return nil, fmt.Errorf("%q: no command, no difference", line)
		}
	}
	if len(c.Steps) == 0 {
		return nil, errors.New("no command")
	}
	h := sha256.New()
	for _, s := range c.Steps {
		fmt.Fprintf(h, "%q\n", s.Line)
	}
	for _, f := range c.files {
		fmt.Fprintf(h, "%q %q\n", f.Name, f.Data)
	}
	c.input = hex.EncodeToString(h.Sum(nil)[:6])
	return c, nil
}

// Expect is what conex must answer: Docker's answers with the differences that are meant, one list of lines for each step.
func (c *Case) Expect(want []string) ([][]string, error) {
	if len(want) == 0 || want[0] != "input "+c.input {
		return nil, fmt.Errorf("the expectation is not of this input: run test/containers/record")
	}
	blocks := Blocks(want[1:])
	if len(blocks) != len(c.Steps) {
		return nil, fmt.Errorf("%d answers were recorded for %d commands", len(blocks), len(c.Steps))
	}
	for i, s := range c.Steps {
		for _, e := range everywhere {
			blocks[i] = e.rule(s.Line, blocks[i])
		}
		for _, d := range s.Differs {
			var err error
			if blocks[i], err = d.apply(blocks[i]); err != nil {
				return nil, fmt.Errorf("$ %s: %w", s.Line, err)
			}
		}
	}
	return blocks, nil
}

func (d *Difference) apply(block []string) ([]string, error) {
	out, at := slices.Clone(block), len(block)
	for _, l := range d.Docker {
		if kind, ok := strings.CutSuffix(l, "*"); ok && (kind == "" || kind == "| " || kind == "! ") {
			i := slices.IndexFunc(out, func(o string) bool { return strings.HasPrefix(o, kind) })
			if i < 0 {
				return nil, fmt.Errorf("the recorded answer has nothing like %q, which the case says differs", l)
			}
			out = slices.DeleteFunc(out, func(o string) bool { return strings.HasPrefix(o, kind) })
			at = i
			continue
		}
		i := slices.Index(out, l)
		if i < 0 && l == "= 1" {
			i = slices.Index(out, "= 1 or 125")
		}
		if i < 0 {
			return nil, fmt.Errorf("the recorded answer has no line %q, which the case says differs", l)
		}
		out = slices.Delete(out, i, i+1)
		at = i
	}
	return slices.Insert(out, min(at, len(out)), d.Own...), nil
}

// Blocks splits a case's answers, each of which begins with "$ " and the command.
func Blocks(lines []string) [][]string {
	var out [][]string
	for _, l := range lines {
		if strings.HasPrefix(l, "$ ") {
			out = append(out, nil)
			continue
		}
		if len(out) > 0 && !strings.HasPrefix(l, "> ") {
			out[len(out)-1] = append(out[len(out)-1], l)
		}
	}
	return out
}

// Format writes answers as they are kept.
func (c *Case) Format(answers [][]string) []string {
	lines := []string{"input " + c.input}
	for i, s := range c.Steps {
		lines = append(lines, "$ "+strings.ReplaceAll(s.Line, "\n", "\n> "))
		lines = append(lines, answers[i]...)
	}
	return strings.Split(strings.Join(lines, "\n"), "\n")
}
