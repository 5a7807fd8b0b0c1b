package dockerfiles

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Failure is what a failed build's output says: the line that it blames, "-" for none, and the message. The wrapping that each program
// has of its own is taken off.
func Failure(output string) []string {
	line := "-"
	if m := regexp.MustCompile(`(?m)^ *(\d+) \| >>> `).FindStringSubmatch(output); m != nil {
		line = m[1]
	}
	msg := ""
	for l := range strings.Lines(output) {
		l = strings.TrimSuffix(l, "\n")
		for _, prefix := range []string{"error: failed to solve: ", "error: ", "conex: "} {
			if s, ok := strings.CutPrefix(l, prefix); ok {
				msg = s
				break
			}
		}
	}
	for _, wrap := range []string{
		`^failed to compute cache key: `, `^failed to calculate checksum of ref \S+: `, `^dockerfile parse error on line \d+: `,
		`^failed to process ("[^"]*"|'[^']*'): `, `^failed to load cache key: `, `^rpc error: code = \w+ desc = `, `^failed to copy files: copy file range failed: `,
	} {
		msg = regexp.MustCompile(wrap).ReplaceAllString(msg, "")
	}
	msg = regexp.MustCompile(`[^\s"]*/cachemounts/buildkit\d+`).ReplaceAllString(msg, "")
	return []string{fmt.Sprintf("error %s: %s", line, strings.ReplaceAll(msg, HTTPAddr, "SERVER"))}
}

// CompareFailures says how got differs from want, "" when it blames the same line and says what want says, perhaps in the words of the
// case's "% says".
func (c *Case) CompareFailures(want, got []string) string {
	if len(want) == 1 && len(got) == 1 {
		wline, wmsg, _ := strings.Cut(want[0], ": ")
		gline, gmsg, _ := strings.Cut(got[0], ": ")
		if c.says != "" {
			wmsg = c.says
		}
		if (wline == gline || wline == "error -") && strings.Contains(gmsg, wmsg) {
			return ""
		}
	}
	if slices.Equal(want, got) {
		return ""
	}
	return "- " + strings.Join(want, "\n- ") + "\n+ " + strings.Join(got, "\n+ ")
}
