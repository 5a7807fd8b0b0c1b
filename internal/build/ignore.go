package build

import (
	"fmt"
	"path"
	"strings"

	"github.com/moby/patternmatcher"
)

// Bounds of an ignore file, which may be a stranger's. A pattern with wildcards is an expression that every name is held against, so of
// these there may be few; real files have some hundred patterns.
const (
	maxIgnore       = 16 << 20 // bytes of the file
	maxPatterns     = 100_000
	maxPattern      = 4096      // bytes of one
	maxWildcardText = 256 << 10 // bytes of all with wildcards
)

// checkPatterns refuses what would take hours to match.
func checkPatterns(patterns []string) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("%d patterns, at most %d are taken", len(patterns), maxPatterns)
	}
	wild := 0
	for _, p := range patterns {
		if len(p) > maxPattern {
			return fmt.Errorf("a pattern of %d bytes, at most %d are taken: it begins with %.40q", len(p), maxPattern, p)
		}
		if hasWildcard(p) {
			wild += len(p)
		}
	}
	if wild > maxWildcardText {
		return fmt.Errorf("%d bytes of patterns with wildcards, at most %d are taken", wild, maxWildcardText)
	}
	return nil
}

// ignoreMatcher is patternmatcher's, which looks at every pattern for every name, with a map for the patterns that are plain names. Where
// a "!" brings something back the order of patterns counts, and patternmatcher has them all.
type ignoreMatcher struct {
	*patternmatcher.PatternMatcher
	names map[string]bool
}

func newIgnoreMatcher(patterns []string) (*ignoreMatcher, error) {
	all, err := patternmatcher.New(patterns)
	if err != nil || all.Exclusions() {
		return &ignoreMatcher{PatternMatcher: all}, err
	}
	m := &ignoreMatcher{names: map[string]bool{}}
	var rest []string
	for _, p := range patterns {
		if p = strings.TrimSpace(p); hasWildcard(p) {
			rest = append(rest, p)
		} else if p != "" {
			m.names[path.Clean(p)] = true
		}
	}
	m.PatternMatcher, err = patternmatcher.New(rest)
	return m, err
}

// MatchesOrParentMatches reports whether a pattern matches p or a folder that it is in.
func (m *ignoreMatcher) MatchesOrParentMatches(p string) (bool, error) {
	for at := p; len(m.names) > 0 && at != "." && at != "/"; at = path.Dir(at) {
		if m.names[at] {
			return true, nil
		}
	}
	return m.PatternMatcher.MatchesOrParentMatches(p)
}

// MatchesUsingParentResults is MatchesOrParentMatches for a name in a folder that is not ignored, of which parent tells.
func (m *ignoreMatcher) MatchesUsingParentResults(p string, parent patternmatcher.MatchInfo) (bool, patternmatcher.MatchInfo, error) {
	if m.names == nil {
		return m.PatternMatcher.MatchesUsingParentResults(p, parent)
	}
	if m.names[p] {
		return true, parent, nil
	}
	ok, err := m.PatternMatcher.MatchesUsingParentResult(p, false) //nolint:staticcheck // nothing above matched, and nothing brings back
	return ok, parent, err
}

// all is the matcher of the patterns whose order counts; m may be nil.
func (m *ignoreMatcher) all() *patternmatcher.PatternMatcher {
	if m == nil {
		return nil
	}
	return m.PatternMatcher
}
