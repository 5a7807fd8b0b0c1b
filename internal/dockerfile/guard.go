package dockerfile

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of a Dockerfile, far above what people write. Without them a few kilobytes could ask for hours of work or more memory than
// there is: the parser and the substitution underneath have none.
const (
	// MaxSize bounds a Dockerfile, in bytes.
	MaxSize = 16 << 20
	// MaxInstructions bounds the instructions of a file, MaxStages its stages.
	MaxInstructions = 10000
	MaxStages       = 1000
	// maxLine bounds an instruction with its continuation lines, without heredocs.
	maxLine = 1 << 20
	// maxMarks bounds what looks like a heredoc, and like a variable in the line of one.
	maxMarks = 1000
	// maxPairs bounds the variables and labels that a file sets.
	maxPairs = 5000
	// maxWord and maxText bound what the variables in a word and in a heredoc expand to.
	maxWord = 1 << 20
	maxText = MaxSize
	// maxTotal bounds what all words of a file expand to, each time that they are expanded.
	maxTotal = 128 << 20
	// maxDepth bounds how deep variables stand in each other, as in ${a:-${b:-c}}.
	maxDepth = 64
	// maxMatch bounds the product of a pattern's length and the value's that it is held against.
	maxMatch = 1 << 26
)

// checkLines refuses lines that are not to be given to the parser. It takes more for continued than the parser does (both escape
// characters, lines of heredocs), which does no harm.
func checkLines(src []byte) (Lines, error) {
	var size, heredocs, vars int
	first, no := 1, 0
	for len(src) > 0 {
		line, rest, _ := bytes.Cut(src, []byte("\n"))
		src = rest
		no++
		if trimmed := bytes.TrimSpace(line); size > 0 && (len(trimmed) == 0 || trimmed[0] == '#') {
			continue // between continued lines
		}
		if size == 0 {
			first = no
		}
		size += len(line) + 1
		heredocs += bytes.Count(line, []byte("<<"))
		vars += bytes.Count(line, []byte("${"))
		switch {
		case size > maxLine:
			return Lines{first, no}, fmt.Errorf("an instruction of more than %d bytes", maxLine)
		case heredocs > maxMarks:
			return Lines{first, no}, fmt.Errorf("an instruction with more than %d heredocs", maxMarks)
		case heredocs > 0 && vars > maxMarks:
			return Lines{first, no}, fmt.Errorf("an instruction with heredocs and more than %d variables", maxMarks)
		}
		if end := bytes.TrimRight(line, " \t\r"); len(end) == 0 || end[len(end)-1] != '\\' && end[len(end)-1] != '`' {
			size, heredocs, vars = 0, 0, 0
		}
	}
	return Lines{}, nil
}

var (
	errDeep = fmt.Errorf("variables stand more than %d deep in each other", maxDepth)
	errWide = errors.New("variables expand to too much")
)

// measure finds out, before anything is expanded, how much a word would expand to at most. It reads as package shell does.
type measure struct {
	s      string
	i      int
	escape rune
	quotes bool // quotes count
	env    Env
	limit  int
	depth  int
}

// bound is an error if word expands to more than limit bytes, or takes too long to.
func bound(word string, escape rune, quotes bool, env Env, limit int) error {
	if !strings.ContainsRune(word, '$') {
		return nil
	}
	m := &measure{s: word, escape: escape, quotes: quotes, env: env, limit: limit}
	_, err := m.until(0)
	if err == errWide {
		return fmt.Errorf("%q: variables expand to more than %d bytes", shorten(word), limit)
	}
	return err
}

func shorten(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// until measures to the stop character, or to the end for 0.
func (m *measure) until(stop byte) (n int, err error) {
	for m.i < len(m.s) {
		c := m.s[m.i]
		switch {
		case stop != 0 && c == stop:
			m.i++
			return n, nil
		case c == '$':
			d, err := m.dollar()
			if err != nil {
				return 0, err
			}
			n += d
		case c == '\'' && m.quotes:
			end := strings.IndexByte(m.s[m.i+1:], '\'')
			if end < 0 {
				m.i = len(m.s)
				break
			}
			n += end + 2
			m.i += end + 2
		case c == '"' && m.quotes:
			d, err := m.double()
			if err != nil {
				return 0, err
			}
			n += d
		case rune(c) == m.escape:
			m.i += 2
			n += 2
		default:
			m.i++
			n++
		}
		if n > m.limit {
			return 0, errWide
		}
	}
	return n, nil
}

// double measures what stands in double quotes.
func (m *measure) double() (n int, err error) {
	for m.i++; m.i < len(m.s); {
		c := m.s[m.i]
		switch {
		case c == '"':
			m.i++
			return n + 2, nil
		case c == '$':
			d, err := m.dollar()
			if err != nil {
				return 0, err
			}
			n += d
		case rune(c) == m.escape && m.i+1 < len(m.s) && (m.s[m.i+1] == '"' || m.s[m.i+1] == '$' || rune(m.s[m.i+1]) == m.escape):
			m.i += 2
			n += 2
		default:
			m.i++
			n++
		}
		if n > m.limit {
			return 0, errWide
		}
	}
	return n, nil
}

// dollar measures a variable with what stands in its braces.
func (m *measure) dollar() (int, error) {
	m.i++
	if m.i >= len(m.s) || m.s[m.i] != '{' {
		v, _ := m.env.Get(m.name())
		return len(v) + 1, nil
	}
	if m.depth++; m.depth > maxDepth {
		return 0, errDeep
	}
	defer func() { m.depth-- }()
	m.i++
	v, _ := m.env.Get(m.name())
	if m.i < len(m.s) && m.s[m.i] == ':' {
		m.i++
	}
	if m.i >= len(m.s) {
		return len(v), nil
	}
	op := m.s[m.i]
	m.i++
	switch op {
	case '-', '+', '?':
		n, err := m.until('}')
		return len(v) + n, err
	case '#', '%':
		n, err := m.until('}')
		if n*len(v) > maxMatch {
			err = errWide
		}
		return len(v), err
	case '/':
		if m.i < len(m.s) && m.s[m.i] == '/' {
			m.i++
		}
		pattern, err := m.until('/')
		if err != nil {
			return 0, err
		}
		replacement, err := m.until('}')
		if pattern*len(v) > maxMatch {
			err = errWide
		}
		return len(v) + (len(v)+1)*replacement, err
	}
	return len(v), nil // "}", or what is refused when it is expanded
}

// name reads a variable's name.
func (m *measure) name() string {
	start, digits := m.i, false
	for m.i < len(m.s) {
		r, size := utf8.DecodeRuneInString(m.s[m.i:])
		if m.i == start {
			digits = unicode.IsDigit(r)
		}
		if digits && !unicode.IsDigit(r) {
			break
		}
		if m.i == start && !digits && strings.ContainsRune("@*#?-$!0", r) {
			m.i += size
			return m.s[start:m.i]
		}
		if !unicode.IsLetter(r) && !unicode.IsDigit(r) && r != '_' {
			break
		}
		m.i += size
	}
	return m.s[start:m.i]
}

// manyVars is how many variables in a word make an index of them worth while.
const manyVars = 16

// indexed makes looking many variables up quick.
func indexed(word string, env Env) Env {
	list, ok := env.(List)
	if !ok || len(list) < manyVars || strings.Count(word, "$") < manyVars {
		return env
	}
	x := index{list: list, values: make(map[string]string, len(list))}
	for _, s := range list {
		k, v, _ := strings.Cut(s, "=")
		x.values[k] = v
	}
	return x
}

type index struct {
	list   List
	values map[string]string
}

func (x index) Get(name string) (string, bool) { v, ok := x.values[name]; return v, ok }
func (x index) Keys() []string                 { return x.list.Keys() }

// Watched is an Env that keeps the names that were looked up in vain, each once.
type Watched struct {
	Env
	Unset []string
}

// Get returns the value of name.
func (w *Watched) Get(name string) (string, bool) {
	v, ok := w.Env.Get(name)
	if !ok && !slices.Contains(w.Unset, name) {
		w.Unset = append(w.Unset, name)
	}
	return v, ok
}
