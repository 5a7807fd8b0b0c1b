package containers

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Class is what came on standard error: "" nothing, "text" what the container or the client printed there, "warning", "error", and
// "usage", an error that names --help.
func Class(block []string) string {
	class := ""
	for _, l := range block {
		s, ok := strings.CutPrefix(l, "! ")
		if !ok {
			continue
		}
		c := "text"
		switch {
		case helpLine(s) && !strings.HasPrefix(s, "Run 'docker run --help'"):
			// Newer clients name run's help below every error of run.
			c = "usage"
		case helpLine(s), errorLine(s):
			c = "error"
		case strings.HasPrefix(s, "WARNING"):
			c = "warning"
		}
		if order := []string{"", "text", "warning", "error", "usage"}; slices.Index(order, c) > slices.Index(order, class) {
			class = c
		}
	}
	return class
}

func helpLine(s string) bool {
	return strings.HasPrefix(s, "See 'docker") || strings.HasPrefix(s, "Run 'docker") || strings.HasPrefix(s, "Usage:")
}

func errorLine(s string) bool {
	for _, p := range []string{"docker: ", "Error", "error", "invalid argument", "unknown flag", "unknown shorthand", "Failed", "conflicting options", "Conflicting options",
		"flag needs", "\"docker ", "cannot ", "template", "failed ", "OCI runtime", "You cannot", "you cannot", "you must ", "the input device", "must specify", "invalid ", "open ",
		"unable to ", "container name ", "container ID ", "unknown ", "destination ", "copying between ", "no such ", "lstat ", "bad format", "filename ", "\"--", "every ", "no matching ", "multiple "} {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

// Compare says how conex's answer differs from the one that is expected, "" for not at all. Standard output and the exit code must
// be the same. So must standard error, unless it is the engine's own: then its class counts, and three fifths of
// Docker's words must be in it, or what the step says instead.
func (s *Step) Compare(want, got []string) string {
	wantClass, gotClass := Class(want), Class(got)
	own := gotClass != "text" && gotClass != "" || wantClass != "text" && wantClass != ""
	var diff []string
	a, b := want, got
	if i := slices.Index(want, "= 1 or 125"); i >= 0 {
		a = slices.Clone(want)
		a[i] = "= 1"
		if slices.Contains(got, "= 125") {
			a[i] = "= 125"
		}
	}
	if own {
		keep := func(l string) bool { return strings.HasPrefix(l, "!") }
		a, b = slices.DeleteFunc(slices.Clone(a), keep), slices.DeleteFunc(slices.Clone(got), keep)
		switch {
		case wantClass != gotClass && (wantClass != "error" || gotClass != "usage"):
			diff = append(diff, fmt.Sprintf("class of standard error: %q, want %q", gotClass, wantClass))
		case s.Says != "":
			if !strings.Contains(message(got), s.Says) {
				diff = append(diff, fmt.Sprintf("the case says that the error says %q", s.Says))
			}
		default:
			if missing := missingWords(message(want), message(got)); missing != "" {
				diff = append(diff, "words missing: "+missing)
			}
		}
	}
	if s.Differs != nil { // where its own lines stand, a difference does not say
		a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	}
	if !slices.Equal(a, b) {
		diff = append(diff, lineDiff(a, b))
	}
	if diff != nil && own {
		for _, l := range want {
			if strings.HasPrefix(l, "! ") {
				diff = append(diff, "- "+l)
			}
		}
		for _, l := range got {
			if strings.HasPrefix(l, "! ") {
				diff = append(diff, "+ "+l)
			}
		}
	}
	return strings.Join(diff, "\n")
}

// lineDiff names the lines that one has and the other has not; both in full where they have the same in another order.
func lineDiff(want, got []string) string {
	var out []string
	rest := slices.Clone(got)
	for _, l := range want {
		if i := slices.Index(rest, l); i >= 0 {
			rest = slices.Delete(rest, i, i+1)
		} else {
			out = append(out, "- "+l)
		}
	}
	for _, l := range rest {
		out = append(out, "+ "+l)
	}
	if out == nil {
		out = append(out, "in another order:")
		for _, l := range want {
			out = append(out, "- "+l)
		}
		for _, l := range got {
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}

// message is the text of standard error without what points to help.
func message(block []string) string {
	var out []string
	for _, l := range block {
		s, ok := strings.CutPrefix(l, "! ")
		if !ok {
			continue
		}
		if strings.HasPrefix(s, "Usage:") {
			break
		}
		if helpLine(s) {
			continue
		}
		out = append(out, s)
	}
	return strings.Join(out, "\n")
}

var (
	word = regexp.MustCompile(`[A-Za-z0-9_./-]+`)
	// wrapping is what Docker's runtime puts around its reasons.
	wrapping = regexp.MustCompile(`docker: |conex: |Error response from daemon: |Error: |OCI runtime \w+ failed: |failed to create shim task: |runc (create|run) failed: |unable to start container process: |` +
		`container_linux\.go:\d+: |process_linux\.go:\d+: |rootfs_linux\.go:\d+: |starting container process caused: |container init caused: |: unknown\b|rpc error: code = \w+ desc = |failed to create task for container: |failed to create shim: |` +
		`[Ee]rror (during|while) [a-z ]+: |invalid argument ".*" for ".*" flag: |template: |failed to (start containers|rename container named).*|\(via /proc/self/fd/\d+\), flags: 0x\d+|` +
		// Go's names for what is wrong with a number
		`strconv\.\w+: parsing "[^"]*": (invalid syntax|value out of range)`)
)

// everywhere are the differences that no case has to name: rule changes Docker's answer to a command into conex's.
var everywhere = []struct {
	// row is the first cell of the row in docs/compat.md.
	row  string
	rule func(line string, block []string) []string
}{
	{"a mistake in flags that Docker's daemon finds", func(line string, block []string) []string {
		if i := slices.Index(block, "= 1"); i >= 0 && mistakes.MatchString(line) && errorClass(block) {
			block = slices.Clone(block)
			block[i] = "= 1 or 125"
		}
		return block
	}},
	{"an error of `exec`", func(line string, block []string) []string {
		if !strings.Contains(line, "docker exec ") {
			return block
		}
		out := slices.Clone(block)
		for i, l := range block {
			s, ok := strings.CutPrefix(l, "| ")
			if !ok || !strings.HasPrefix(s, "OCI runtime exec failed") && !strings.HasPrefix(s, "unable to find user ") {
				continue
			}
			out[i] = "! Error: " + s
			// Docker ends with 126 here until version 22.
			if j := slices.Index(out, "= 126"); j >= 0 && (strings.Contains(s, "executable file not found") || strings.Contains(s, "no such file or directory")) {
				out[j] = "= 127"
			}
		}
		return out
	}},
	{"`stop --time`, `restart --time`", func(_ string, block []string) []string {
		return slices.DeleteFunc(slices.Clone(block), func(l string) bool { return strings.HasPrefix(l, "| Flag --time has been deprecated") })
	}},
}

// EverywhereRows are the rows of the documents that state the differences which no case names.
func EverywhereRows() []string {
	var rows []string
	for _, e := range everywhere {
		rows = append(rows, e.row)
	}
	return rows
}

// mistakes are commands whose flags conex checks before it does anything.
var mistakes = regexp.MustCompile(`docker (container )?(create|exec|logs|update|events|stats|cp|ps|stop|restart)\b`)

func errorClass(block []string) bool {
	c := Class(block)
	return c == "error" || c == "usage"
}

// missingWords are those of want that got has not, "" if it has three fifths of them.
func missingWords(want, got string) string {
	words := func(s string) []string {
		out := word.FindAllString(strings.ToLower(wrapping.ReplaceAllString(s, "")), -1)
		for i, w := range out {
			out[i] = strings.Trim(w, ".-")
		}
		slices.Sort(out)
		return slices.Compact(out)
	}
	has := words(got)
	var missing []string
	all := words(want)
	for _, w := range all {
		if !slices.Contains(has, w) {
			missing = append(missing, w)
		}
	}
	if len(missing)*5 <= len(all)*2 {
		return ""
	}
	return strings.Join(missing, " ")
}

// Differences holds answers against what was recorded; nil when there are none.
func (c *Case) Differences(want []string, answers [][]string) ([]string, error) {
	expected, err := c.Expect(want)
	if err != nil {
		return nil, err
	}
	var out []string
	for i := range c.Steps {
		s := &c.Steps[i]
		if diff := s.Compare(expected[i], answers[i]); diff != "" {
			out = append(out, "$ "+s.Line, diff)
		}
	}
	return out, nil
}
