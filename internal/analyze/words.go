package analyze

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Printable returns s as a terminal may have it: what is no visible character (escape sequences, newlines, marks that turn the direction of
// writing, bytes that are no UTF-8) as \n, \x1b or \u202e, and so a backslash as \\. What it returns for two different names differs.
func Printable(s string) string {
	clean := true
	for _, r := range s {
		if r == utf8.RuneError || r == '\\' || !visible(r) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r == '\\':
			b.WriteString(`\\`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case visible(r):
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

// visible reports whether r takes room on a screen and changes nothing beside it. Marks that combine with the letter before are left out:
// terminals do not agree on their width.
func visible(r rune) bool {
	switch r {
	case ' ', utf8.RuneError:
		return true
	case '\u115f', '\u1160', '\u3164', '\uffa0', '\u2800': // fillers that look like nothing
		return false
	}
	return unicode.IsPrint(r) && !unicode.Is(unicode.M, r)
}

// Line is Printable for text that people wrote over several lines: each run of white space is one space.
func Line(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	// Backslashes stand in many instructions and harm nobody.
	parts := strings.Split(s, `\`)
	for i, p := range parts {
		parts[i] = Printable(p)
	}
	return strings.Join(parts, `\`)
}

// Instruction is the line of a Dockerfile that an entry of a history stands for, as far as that can be told: builders write the shell
// that ran it.
func Instruction(createdBy string) string {
	s := Line(createdBy)
	s = strings.TrimSuffix(s, " # buildkit")
	const shell, nop = "/bin/sh -c ", "#(nop) "
	run := false
	if rest, ok := strings.CutPrefix(s, "RUN "); ok {
		s, run = rest, true
	}
	if strings.HasPrefix(s, "|") { // |2 A=1 B=2 /bin/sh -c ...: the build arguments, which may hold anything but are followed by the shell
		if _, rest, ok := strings.Cut(s, " "+shell); ok {
			s, run = shell+rest, true
		}
	}
	if rest, ok := strings.CutPrefix(s, shell); ok {
		if i, ok := strings.CutPrefix(rest, nop); ok {
			return strings.TrimSpace(i)
		}
		s, run = rest, true
	}
	if run {
		return "RUN " + s
	}
	return s
}
