package cdi

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// parseYAML reads the YAML that tools write into specs: block and flow collections and scalars on one line. What else there is in
// YAML (anchors, tags, text of several lines, further documents) is refused by its line, not guessed at. The result is what
// encoding/json makes of the same document.
func parseYAML(b []byte) (any, error) {
	p := &yamlReader{}
	for i, raw := range strings.Split(string(b), "\n") {
		text := strings.TrimRight(stripComment(raw), " \t\r")
		body := strings.TrimLeft(text, " ")
		if body == "" {
			continue
		}
		if body == "---" && len(p.lines) == 0 || body == "..." {
			continue
		}
		if strings.HasPrefix(body, "\t") {
			return nil, fmt.Errorf("line %d: a tab can't indent", i+1)
		}
		p.lines = append(p.lines, yamlLine{len(text) - len(body), body, i + 1})
	}
	if len(p.lines) == 0 {
		return nil, errors.New("it is empty")
	}
	v, err := p.block(p.lines[0].indent, 0)
	if err == nil && p.at < len(p.lines) {
		err = p.fail("unexpected indentation")
	}
	return v, err
}

type yamlLine struct {
	indent int
	text   string
	num    int
}

type yamlReader struct {
	lines []yamlLine
	at    int
}

// maxDepth bounds how deep collections lie in each other.
const maxDepth = 64

func (p *yamlReader) fail(format string, args ...any) error {
	n := p.lines[min(p.at, len(p.lines)-1)].num
	return fmt.Errorf("line %d: %s", n, fmt.Sprintf(format, args...))
}

func (p *yamlReader) more(indent int) bool {
	return p.at < len(p.lines) && p.lines[p.at].indent == indent
}

// block reads what begins at the present line, which is indented so far.
func (p *yamlReader) block(indent, depth int) (any, error) {
	if depth > maxDepth {
		return nil, p.fail("too deep")
	}
	l := p.lines[p.at]
	if isItem(l.text) {
		return p.sequence(indent, depth)
	}
	if _, _, ok, err := cutKey(l.text); err != nil {
		return nil, p.fail("%v", err)
	} else if ok {
		return p.mapping(indent, depth)
	}
	return p.value(l.text, depth)
}

func isItem(s string) bool { return s == "-" || strings.HasPrefix(s, "- ") }

func (p *yamlReader) sequence(indent, depth int) (any, error) {
	out := []any{}
	for p.more(indent) && isItem(p.lines[p.at].text) {
		l := &p.lines[p.at]
		rest := strings.TrimLeft(l.text[1:], " ")
		var v any
		var err error
		if rest == "" {
			v, err = p.nested(indent+1, depth)
		} else {
			// What stands behind the hyphen is a block of its own, that begins there.
			l.indent, l.text = indent+len(l.text)-len(rest), rest
			v, err = p.block(l.indent, depth+1)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func (p *yamlReader) mapping(indent, depth int) (any, error) {
	out := map[string]any{}
	for p.more(indent) && !isItem(p.lines[p.at].text) {
		key, rest, ok, err := cutKey(p.lines[p.at].text)
		if err != nil || !ok {
			return nil, p.fail("expected \"key: value\"")
		}
		if _, twice := out[key]; twice {
			return nil, p.fail("%q is there twice", key)
		}
		var v any
		if rest == "" {
			next := indent + 1
			if p.at+1 < len(p.lines) && p.lines[p.at+1].indent == indent && isItem(p.lines[p.at+1].text) {
				next = indent // a list may stand as far left as its key
			}
			v, err = p.nested(next, depth)
		} else {
			v, err = p.value(rest, depth)
		}
		if err != nil {
			return nil, err
		}
		out[key] = v
	}
	return out, nil
}

// nested reads the block below the present line, null when nothing is indented so far.
func (p *yamlReader) nested(least, depth int) (any, error) {
	p.at++
	if p.at == len(p.lines) || p.lines[p.at].indent < least {
		return nil, nil
	}
	return p.block(p.lines[p.at].indent, depth+1)
}

// value reads a scalar or a flow collection that begins in the present line.
func (p *yamlReader) value(text string, depth int) (any, error) {
	if text[0] == '[' || text[0] == '{' {
		for !balanced(text) {
			if p.at++; p.at == len(p.lines) {
				return nil, p.fail("a bracket is not closed")
			}
			text += " " + p.lines[p.at].text
		}
	}
	f := &flowReader{s: text}
	v, err := f.value("", depth)
	if err == nil && strings.TrimSpace(f.s) != "" {
		err = fmt.Errorf("unexpected %q", strings.TrimSpace(f.s))
	}
	if err != nil {
		return nil, p.fail("%v", err)
	}
	p.at++
	return v, nil
}

// flowReader reads values on one line.
type flowReader struct{ s string }

func (f *flowReader) blanks() { f.s = strings.TrimLeft(f.s, " \t") }

// value reads one; a plain scalar ends before one of the characters of end.
func (f *flowReader) value(end string, depth int) (any, error) {
	if depth > maxDepth {
		return nil, errors.New("too deep")
	}
	f.blanks()
	if f.s == "" {
		return nil, nil
	}
	switch c := f.s[0]; c {
	case '[':
		return f.list(depth)
	case '{':
		return f.object(depth)
	case '"', '\'':
		return f.quoted()
	case '&', '*', '!', '|', '>', '%', '@', '`', '?':
		return nil, fmt.Errorf("%c: this form of YAML is not supported", c)
	}
	n := len(f.s)
	if end != "" {
		if i := strings.IndexAny(f.s, end); i >= 0 {
			n = i
		}
	}
	text := strings.TrimSpace(f.s[:n])
	f.s = f.s[n:]
	return scalar(text), nil
}

func (f *flowReader) list(depth int) (any, error) {
	out := []any{}
	f.s = f.s[1:]
	for {
		if f.blanks(); strings.HasPrefix(f.s, "]") {
			f.s = f.s[1:]
			return out, nil
		}
		v, err := f.value(",]", depth+1)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
		if err := f.next(']'); err != nil {
			return nil, err
		}
	}
}

func (f *flowReader) object(depth int) (any, error) {
	out := map[string]any{}
	f.s = f.s[1:]
	for {
		if f.blanks(); strings.HasPrefix(f.s, "}") {
			f.s = f.s[1:]
			return out, nil
		}
		k, err := f.value(":,}", depth+1)
		if err != nil {
			return nil, err
		}
		key, ok := k.(string)
		if !ok {
			key = fmt.Sprint(k)
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("%q is there twice", key)
		}
		f.blanks()
		var v any
		if rest, ok := strings.CutPrefix(f.s, ":"); ok {
			f.s = rest
			if v, err = f.value(",}", depth+1); err != nil {
				return nil, err
			}
		}
		out[key] = v
		if err := f.next('}'); err != nil {
			return nil, err
		}
	}
}

// next steps over the comma behind a value; end may follow instead.
func (f *flowReader) next(end byte) error {
	f.blanks()
	if f.s == "" {
		return errors.New("a bracket is not closed")
	}
	if f.s[0] == ',' {
		f.s = f.s[1:]
		return nil
	}
	if f.s[0] == end {
		return nil
	}
	return fmt.Errorf("unexpected %q", f.s)
}

func (f *flowReader) quoted() (any, error) {
	n := quoteEnd(f.s)
	if n < 0 {
		return nil, errors.New("a quote is not closed")
	}
	text, q := f.s[1:n], f.s[0]
	f.s = f.s[n+1:]
	if q == '\'' {
		return strings.ReplaceAll(text, "''", "'"), nil
	}
	var s string
	if err := json.Unmarshal([]byte(`"`+text+`"`), &s); err != nil {
		return nil, fmt.Errorf("%q: %w", text, err)
	}
	return s, nil
}

// quoteEnd returns where the quoted text that s begins with ends, -1 if it does not.
func quoteEnd(s string) int {
	for i := 1; i < len(s); i++ {
		switch {
		case s[0] == '"' && s[i] == '\\':
			i++
		case s[i] == s[0] && s[0] == '\'' && i+1 < len(s) && s[i+1] == '\'':
			i++
		case s[i] == s[0]:
			return i
		}
	}
	return -1
}

// cutKey splits "key: rest"; ok is false when s is no such line.
func cutKey(s string) (key, rest string, ok bool, err error) {
	if s[0] == '"' || s[0] == '\'' {
		n := quoteEnd(s)
		if n < 0 {
			return "", "", false, errors.New("a quote is not closed")
		}
		after := s[n+1:]
		if after != ":" && !strings.HasPrefix(after, ": ") {
			return "", "", false, nil
		}
		v, err := (&flowReader{s: s[:n+1]}).quoted()
		if err != nil {
			return "", "", false, err
		}
		return v.(string), strings.TrimSpace(after[1:]), true, nil
	}
	if strings.ContainsRune("[{", rune(s[0])) {
		return "", "", false, nil
	}
	if k, found := strings.CutSuffix(s, ":"); found && !strings.Contains(k, ": ") {
		return k, "", true, checkPlain(k)
	}
	k, v, found := strings.Cut(s, ": ")
	if !found {
		return "", "", false, nil
	}
	return strings.TrimSpace(k), strings.TrimSpace(v), true, checkPlain(k)
}

// checkPlain refuses keys in forms of YAML that are not read.
func checkPlain(k string) error {
	if k == "" || strings.ContainsRune("&*!|>%@`?", rune(k[0])) {
		return errors.New("this form of YAML is not supported")
	}
	return nil
}

// balanced reports whether every bracket in s is closed.
func balanced(s string) bool {
	depth := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"', '\'':
			n := quoteEnd(s[i:])
			if n < 0 {
				return true // which the reader reports
			}
			i += n
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		}
	}
	return depth <= 0
}

// stripComment cuts what stands behind a # that begins a word outside of quotes.
func stripComment(s string) string {
	for i := 0; i < len(s); i++ {
		switch {
		case (s[i] == '"' || s[i] == '\'') && (i == 0 || strings.IndexByte(" [{,:", s[i-1]) >= 0):
			if n := quoteEnd(s[i:]); n > 0 {
				i += n
			}
		case s[i] == '#' && (i == 0 || s[i-1] == ' ' || s[i-1] == '\t'):
			return s[:i]
		}
	}
	return s
}

// scalar gives a plain word the type that YAML 1.1 gives it, as far as specs need it.
func scalar(s string) any {
	switch s {
	case "", "~", "null", "Null", "NULL":
		return nil
	case "true", "True", "TRUE":
		return true
	case "false", "False", "FALSE":
		return false
	}
	digits := strings.TrimLeft(s, "+-")
	if digits == "" || digits[0] < '0' || digits[0] > '9' || len(s)-len(digits) > 1 || strings.Contains(s, "_") {
		return s
	}
	if n, ok := new(big.Int).SetString(strings.TrimPrefix(s, "+"), 0); ok { // 0x1f, 0o17 and 017 too
		return json.Number(n.String())
	}
	if json.Valid([]byte(s)) {
		return json.Number(s)
	}
	return s
}
