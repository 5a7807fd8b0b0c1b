package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"conex/internal/safepath"

	"github.com/docker/go-units"
	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"
)

// What a COPY takes out of the context and nobody needs is told at the end of a build in which that COPY ran, with what to add to
// .dockerignore. It must not cry wolf, so only these count:
//
//   - .git, unless a command of the stage may want it (git, go build, make and the like)
//   - folders whose files a later step of the stage writes anew, as npm ci does with node_modules, wasteMin and more
//   - files that a later step deletes, in a stage whose layers are the image's, wasteMin and more: a bind mount would do
//   - what .gitignore leaves out and the copy does not name itself, wasteMin and more, or a file of settings (.env)
//   - the Dockerfile and .dockerignore, if the COPY ran for no other reason than that they changed
const (
	wasteMin    = 1 << 20
	wasteGit    = 64 << 10
	wasteFiles  = 100_000 // as many files of a COPY are looked at
	wasteStats  = 20_000  // and as many in the stage's end
	wasteGroups = 5       // are named
)

// placed is a regular file of the context and where COPY put it.
type placed struct {
	from, to    string
	size, mtime int64 // mtime in seconds
}

// wasted is a file or folder of the context that nobody needs.
type wasted struct {
	path string
	size int64
	why  string
}

// remarkWaste warns of what the COPY instructions that ran took in for nothing. What goes wrong while it looks is no matter of the build's.
func (p *planner) remarkWaste(ctx context.Context, target *stage) {
	for _, n := range p.nodes {
		c := n.copies
		if c == nil || n.step.Instruction == nil || c.tree != p.trees[""] || len(n.vertex.record().Reasons) == 0 {
			continue
		}
		place := fmt.Sprintf("%s:%d: %s", p.file.Name, n.step.Lines.First, firstLine(n.title))
		if only := p.dockerfileAlone(n); only != "" {
			p.journal.emit(Event{Kind: Warning, Text: fmt.Sprintf("%s ran again only because %s changed. To leave that out, add to .dockerignore: %s", place, only, only)})
		}
		if len(c.placed) == 0 {
			continue
		}
		var list []wasted
		list = append(list, p.gitFolder(n, c)...)
		var deleted []wasted
		if s := p.stageOf(n); s != nil && s.tip != n && len(c.placed) <= wasteStats {
			var over []wasted
			over, deleted = p.redone(ctx, n, c, s, target)
			list = append(list, over...)
		}
		list = append(list, gitIgnored(c, list)...)
		p.tellWaste(place, list, "the image has no use for", "To leave it out, add to .dockerignore")
		p.tellWaste(place, deleted, "later steps delete, and that stays in a layer", "RUN --mount=type=bind reads without a copy")
	}
}

// tellWaste emits one warning for a list.
func (p *planner) tellWaste(place string, list []wasted, what, advice string) {
	if len(list) == 0 {
		return
	}
	slices.SortStableFunc(list, func(a, b wasted) int { return int(max(-1, min(1, b.size-a.size))) })
	var total int64
	var names, paths []string
	for i, w := range list {
		total += w.size
		if i < wasteGroups {
			why := ""
			if w.why != "" {
				why = ", " + w.why
			}
			names = append(names, fmt.Sprintf("%s (%s%s)", w.path, size(w.size), why))
			paths = append(paths, w.path)
		}
	}
	if more := len(list) - wasteGroups; more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	p.journal.emit(Event{Kind: Warning, Text: fmt.Sprintf("%s takes in %s that %s: %s. %s: %s", place, size(total), what, strings.Join(names, ", "), advice, strings.Join(paths, " "))})
}

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

func (p *planner) stageOf(n *node) *stage {
	for _, s := range p.stages {
		if s.label == n.vertex.stage && s.planned {
			return s
		}
	}
	return nil
}

// dockerfileAlone names the one file for which a COPY ran again, if that is the Dockerfile or .dockerignore.
func (p *planner) dockerfileAlone(n *node) string {
	why := n.vertex.record().Reasons
	if len(why) != 1 || why[0].Kind != ReasonFiles || len(why[0].Files) != 1 || why[0].More > 0 || why[0].Files[0].Change != "changed" {
		return ""
	}
	name := path.Base(p.file.Name)
	if f := why[0].Files[0].Path; slices.Contains([]string{name, name + ".dockerignore", ".dockerignore"}, path.Base(f)) {
		return f
	}
	return ""
}

// gitFolder is .git, if no command of the stage looks as if it wanted it.
func (p *planner) gitFolder(n *node, c *copier) []wasted {
	w := wasted{path: ".git"}
	for _, f := range c.placed {
		if strings.HasPrefix(f.from, ".git/") {
			w.size += f.size
		}
	}
	if w.size < wasteGit || c.names(".git") {
		return nil
	}
	for _, o := range p.nodes {
		if o.kind != kindRun || o.vertex.stage != n.vertex.stage {
			continue
		}
		for _, word := range []string{"git", "go build", "go install", "make", "cargo", "scm", "version", "gradle", "mvn"} {
			if strings.Contains(strings.ToLower(string(o.opJSON)), word) {
				return nil
			}
		}
	}
	return []wasted{w}
}

// names reports whether the copy's own words name a path, or something in it.
func (c *copier) names(p string) bool {
	return slices.ContainsFunc(c.op.Sources, func(s string) bool {
		s = strings.TrimPrefix(path.Clean("/"+s), "/")
		return s == p || strings.HasPrefix(s, p+"/") || hasWildcard(s) && path.Dir(p) == path.Dir(s)
	})
}

// redone looks at what became of the copied files at the end of the stage: folders whose files were written anew, and, where it matters,
// what was deleted.
func (p *planner) redone(ctx context.Context, n *node, c *copier, s, target *stage) (over, deleted []wasted) {
	var total int64
	for _, f := range c.placed {
		total += f.size
	}
	if total < wasteMin || len(n.res.layers) == 0 || len(s.tip.res.layers) <= len(n.res.layers) {
		return nil, nil
	}
	after, err := openStage(ctx, p.b.Layers, s.tip.res.layers)
	if err != nil {
		return nil, nil
	}
	defer after.Close()
	matters := false // whether the stage's layers are the image's
	for t := target; t != nil; t = t.parent {
		matters = matters || t == s
	}
	anew, gone := map[string]int64{}, map[string]int64{}
	for _, f := range c.placed {
		var is unix.Stat_t
		if f.size == 0 {
			continue
		}
		top, _, inFolder := strings.Cut(f.from, "/")
		err := unix.Fstatat(int(after.Fd()), f.to, &is, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
			if inFolder && strings.Contains("/"+f.from, "/node_modules/") {
				anew[top] += f.size // npm ci has begun with a clean folder
			} else if matters {
				gone[top] += f.size
			}
		case err == nil && inFolder && (is.Size != f.size || time.Unix(is.Mtim.Unix()).Unix() != f.mtime):
			anew[top] += f.size
		}
	}
	for top, n := range anew {
		if n >= wasteMin {
			over = append(over, wasted{top, n, "written anew by a later step"})
		}
	}
	for top, n := range gone {
		if n >= wasteMin {
			deleted = append(deleted, wasted{path: top, size: n})
		}
	}
	return over, deleted
}

// gitIgnored is what .gitignore leaves out and .dockerignore does not, but for what known has.
func gitIgnored(c *copier, known []wasted) []wasted {
	if c.from == nil || c.from.root == nil {
		return nil // what was copied is in no folder: a repository, a download
	}
	raw, err := safepath.ReadFile(c.from.root, ".gitignore", 1<<20)
	if err != nil {
		return nil
	}
	m, err := patternmatcher.New(fromGitignore(raw))
	if err != nil {
		return nil
	}
	ignored := map[string]string{} // what of a folder's path is ignored, "" for nothing
	var root func(dir string) string
	root = func(dir string) string {
		if dir == "." || dir == "" {
			return ""
		}
		if r, ok := ignored[dir]; ok {
			return r
		}
		r := root(path.Dir(dir))
		if r == "" {
			if ok, err := m.MatchesOrParentMatches(dir); err == nil && ok {
				r = dir
			}
		}
		ignored[dir] = r
		return r
	}
	sizes := map[string]int64{}
	for _, f := range c.placed {
		r := root(path.Dir(f.from))
		if r == "" {
			if ok, err := m.MatchesOrParentMatches(f.from); err == nil && ok {
				r = f.from
			}
		}
		if r != "" {
			sizes[r] += f.size
		}
	}
	var list []wasted
	for p, n := range sizes {
		settings := path.Base(p) == ".env" || strings.HasPrefix(path.Base(p), ".env.")
		if n < wasteMin && !settings || c.names(p) || slices.ContainsFunc(known, func(w wasted) bool { return w.path == p || strings.HasPrefix(p, w.path+"/") }) {
			continue
		}
		why := "left out by .gitignore"
		if settings {
			why += ", may hold secrets"
		}
		list = append(list, wasted{p, n, why})
	}
	slices.SortFunc(list, func(a, b wasted) int { return strings.Compare(a.path, b.path) })
	return list
}

// fromGitignore turns .gitignore's lines into patterns of .dockerignore's kind: there a name without a slash means one at any depth.
func fromGitignore(raw []byte) []string {
	var out []string
	for l := range bytes.Lines(raw) {
		s := strings.TrimRight(string(l), " \t\r\n")
		if s == "" || s[0] == '#' {
			continue
		}
		s, not := strings.CutPrefix(s, "!")
		s = strings.TrimSuffix(s, "/")
		if s == "" {
			continue
		}
		if strings.Contains(s, "/") {
			s = strings.TrimPrefix(s, "/")
		} else {
			s = "**/" + s
		}
		if not {
			s = "!" + s
		}
		out = append(out, s)
		if len(out) == 500 {
			break
		}
	}
	return out
}
