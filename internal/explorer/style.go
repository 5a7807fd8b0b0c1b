package explorer

import (
	"strings"

	"github.com/charmbracelet/x/ansi"

	"conex/internal/analyze"
)

// style puts colour on text, or none.
type style struct{ color bool }

// Codes of "select graphic rendition". Those up to 9 are no colours and stay without them.
const (
	bold    = "1"
	dim     = "2"
	reverse = "7"
	red     = "31"
	green   = "32"
	yellow  = "33"
)

func (s style) with(code, text string) string {
	if len(code) > 1 && !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// change colours text by a change.
func (s style) change(c analyze.Change, text string) string {
	switch c {
	case analyze.Added:
		return s.with(green, text)
	case analyze.Changed:
		return s.with(yellow, text)
	case analyze.Removed:
		return s.with(red, text)
	}
	return text
}

// fit cuts or pads text without escape sequences to a width.
func fit(text string, width int) string {
	if width <= 0 {
		return ""
	}
	if w := ansi.StringWidth(text); w <= width {
		return text + strings.Repeat(" ", width-w)
	}
	text = ansi.Truncate(text, width, "…")
	return text + strings.Repeat(" ", max(0, width-ansi.StringWidth(text)))
}

// wrap breaks text into at most n lines of a width; what is left over is cut.
func wrap(text string, width, n int) []string {
	var lines []string
	for text != "" && width > 0 && len(lines) < n {
		if len(lines) == n-1 || ansi.StringWidth(text) <= width {
			return append(lines, fit(text, width))
		}
		head := ansi.Truncate(text, width, "")
		if i := strings.LastIndexByte(head, ' '); i > width/2 {
			head = head[:i+1]
		}
		if head == "" {
			break
		}
		lines = append(lines, fit(strings.TrimRight(head, " "), width))
		text = strings.TrimLeft(text[len(head):], " ")
	}
	return lines
}
