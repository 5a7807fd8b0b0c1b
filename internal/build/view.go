package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"conex/internal/layertar"
	"conex/internal/safepath"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"
)

// view is a tree of files that COPY reads: the context's folder or a mounted stage.
type view struct {
	// root is nil when there is nothing, as for a Dockerfile on stdin.
	root *os.File
	// ignore are .dockerignore's patterns; nil for a stage.
	ignore []string
	// stats knows files of a context folder from earlier builds; nil for what lives for one build only.
	stats *statCache
	// owners says that the files keep their owners when they are copied, so those count in a fingerprint.
	owners bool
	// lists keeps what selections consisted of.
	lists fileLists
}

// item is one file, folder or link that a COPY selected.
type item struct {
	// path is where it really lies in the view, without a leading slash, links on the way resolved.
	path string
	// rel is its place below the source that was named; "" for that source itself.
	rel string
	st  fileStat
	// known is what statCache.seen said.
	known int32
	// link is a symbolic link's target.
	link string
	// xattrs are what layertar keeps, "name\x00value" sorted.
	xattrs []string
}

func (i *item) kind() uint32 { return i.st.Mode & unix.S_IFMT }

// source is one path that a COPY's pattern led to.
type source struct {
	// name is the last element of the path as it was written, links not resolved.
	name string
	// dir says that the source is a folder, whose content is copied.
	dir bool
	// items are the source itself and what is in it, a folder before its content, names in byte order.
	items []item
}

// selectOptions narrow a selection.
type selectOptions struct {
	exclude []string
	// parents is COPY --parents: rel keeps the path from the root, or from a "/./" in the pattern, on.
	parents bool
}

// selection finds what patterns mean. A pattern without wildcards that leads nowhere is ErrNotFound; one with wildcards may find
// nothing, as in "COPY package.json package-lock.json* ./".
func (v *view) selection(ctx context.Context, patterns []string, opt selectOptions) ([]source, error) {
	exclude := opt.exclude
	if opt.parents {
		opt.exclude = nil // it speaks of the paths that are kept, which only withParents knows
	}
	w, err := newWalker(ctx, v, opt)
	if err != nil {
		return nil, err
	}
	var out []source
	for _, p := range patterns {
		clean := strings.TrimPrefix(path.Clean("/"+p), "/")
		paths := []string{clean}
		if hasWildcard(clean) {
			if paths, err = w.glob(clean, opt.parents); err != nil {
				return nil, err
			}
		}
		for _, one := range paths {
			s, err := w.source(one)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errIgnored) {
				return nil, v.missing(one, err)
			}
			if err != nil {
				return nil, err
			}
			if opt.parents {
				s = withParents(s, p, one)
				if s.items, err = without(s.items, exclude); err != nil {
					return nil, err
				}
				switch {
				case len(s.items) > 0:
				case hasWildcard(clean):
					continue
				default:
					return nil, fmt.Errorf("%q: %w", "/"+one, ErrNotFound)
				}
			}
			out = append(out, s)
		}
	}
	return out, nil
}

// without returns the items that no pattern excludes.
func without(items []item, exclude []string) ([]item, error) {
	if len(exclude) == 0 {
		return items, nil
	}
	m, err := patternmatcher.New(exclude)
	if err != nil {
		return nil, fmt.Errorf("--exclude: %w", err)
	}
	var kept []item
	for i := range items {
		out, err := m.MatchesOrParentMatches(items[i].rel)
		if err != nil {
			return nil, fmt.Errorf("--exclude: %w", err)
		}
		if !out {
			kept = append(kept, items[i])
		}
	}
	return kept, nil
}

// withParents turns a source into a folder whose items carry the path that --parents keeps.
func withParents(s source, pattern, found string) source {
	keep := found
	if before, _, ok := strings.Cut(strings.TrimPrefix(pattern, "/"), "/./"); ok {
		n := strings.Count(path.Clean(before), "/") + 1
		parts := strings.Split(found, "/")
		keep = strings.Join(parts[min(n, len(parts)-1):], "/")
	}
	for i := range s.items {
		s.items[i].rel = path.Join(keep, s.items[i].rel)
	}
	s.dir = true
	return s
}

// hasWildcard reports whether a path is a pattern in the sense of path.Match.
func hasWildcard(p string) bool { return strings.ContainsAny(p, `*?[\`) }

var errIgnored = errors.New("ignored")

// glob lists the paths that match a pattern, in byte order. With deep, as --parents has it, "**" stands for any number of folders.
func (w *walker) glob(pattern string, deep bool) ([]string, error) {
	found := []string{""}
	for _, part := range strings.Split(pattern, "/") {
		if _, err := path.Match(part, ""); err != nil {
			return nil, fmt.Errorf("pattern %q: %w", pattern, err)
		}
		var next []string
		for _, dir := range found {
			switch {
			case deep && part == "**":
				below, err := w.folders(dir)
				if err != nil {
					return nil, err
				}
				next = append(append(next, dir), below...)
				continue
			case !hasWildcard(part):
				next = append(next, path.Join(dir, part))
				continue
			}
			names, err := w.names(dir)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
				continue
			}
			if err != nil {
				return nil, err
			}
			for _, n := range names {
				if ok, _ := path.Match(part, n); ok {
					next = append(next, path.Join(dir, n))
				}
			}
		}
		found = next
	}
	slices.Sort(found)
	found = slices.Compact(found)
	// What a literal part after a wildcard leads to may not exist; what is ignored does not count. A link that leads nowhere was
	// meant, though: leaving it out in silence would hide that.
	return slices.DeleteFunc(found, func(p string) bool {
		_, err := w.source1(p)
		return err != nil && !(errors.Is(err, fs.ErrNotExist) && w.isLink(p))
	}), nil
}

// folders lists the folders below dir, links not followed.
func (w *walker) folders(dir string) ([]string, error) {
	if err := w.ctx.Err(); err != nil {
		return nil, err
	}
	names, err := w.names(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []string
	for _, n := range names {
		p := join(dir, n)
		f, err := safepath.Open(w.v.root, p, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue // no folder, or gone
		}
		f.Close()
		below, err := w.folders(p)
		if err != nil {
			return nil, err
		}
		out = append(append(out, p), below...)
	}
	return out, nil
}

// isLink reports whether p, which is not ignored, is a symbolic link.
func (w *walker) isLink(p string) bool {
	if w.v.root == nil {
		return false
	}
	f, err := safepath.Open(w.v.root, p, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return false
	}
	if w.ignore == nil {
		return true
	}
	ignored, err := w.ignore.MatchesOrParentMatches(p)
	return err == nil && !ignored
}

func (w *walker) names(dir string) ([]string, error) {
	if w.v.root == nil {
		return nil, fs.ErrNotExist
	}
	f, err := safepath.Open(w.v.root, dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// source1 resolves one path to its first item. The last link is followed, as Docker does for a source that is named.
func (w *walker) source1(p string) (item, error) {
	if w.v.root == nil {
		return item{}, fs.ErrNotExist
	}
	f, err := safepath.Open(w.v.root, p, unix.O_PATH, 0)
	if err != nil {
		return item{}, err
	}
	defer f.Close()
	real, err := w.v.realPath(f)
	if err != nil {
		return item{}, err
	}
	it := item{path: real}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return item{}, &fs.PathError{Op: "stat", Path: p, Err: err}
	}
	it.st = statOf(&st)
	it.known, _ = w.v.stats.seen(real, &it.st)
	if it.xattrs, err = xattrs(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), true); err != nil {
		return item{}, err
	}
	if real == "" || w.ignore == nil {
		return it, nil
	}
	ignored, err := w.ignore.MatchesOrParentMatches(real)
	if err == nil && ignored && !(it.kind() == unix.S_IFDIR && mayInclude(w.ignore.all(), real)) {
		err = errIgnored
	}
	return it, err
}

// realPath says where in the view the handle f lies.
func (v *view) realPath(f *os.File) (string, error) {
	at, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return "", err
	}
	root, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", v.root.Fd()))
	if err != nil {
		return "", err
	}
	rel, ok := strings.CutPrefix(at, strings.TrimSuffix(root, "/"))
	if !ok || rel != "" && rel[0] != '/' {
		return "", fmt.Errorf("%s moved while it was read", at)
	}
	return strings.TrimPrefix(rel, "/"), nil
}

// source walks what a path leads to.
func (w *walker) source(p string) (source, error) {
	top, err := w.source1(p)
	if err != nil {
		return source{}, err
	}
	s := source{name: path.Base("/" + p), dir: top.kind() == unix.S_IFDIR}
	if top.kind() == unix.S_IFSOCK {
		return source{}, fmt.Errorf("%q is a socket, which can't be copied", "/"+p)
	}
	s.items = []item{top}
	if !s.dir {
		return s, nil
	}
	dir, err := safepath.OpenNoLinks(w.v.root, top.path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return source{}, err
	}
	defer dir.Close()
	var info patternmatcher.MatchInfo
	if w.ignore != nil && top.path != "" {
		// Parent results start at the root, so ask for every folder on the way.
		for i := range top.path {
			if top.path[i] == '/' {
				if _, info, err = w.ignore.MatchesUsingParentResults(top.path[:i], info); err != nil {
					return source{}, err
				}
			}
		}
		if _, info, err = w.ignore.MatchesUsingParentResults(top.path, info); err != nil {
			return source{}, err
		}
	}
	b, err := w.walk(dir, top.path, info)
	if err != nil {
		return source{}, err
	}
	s.items = b.flat(top)
	return s, nil
}

// mayInclude reports whether a "!" pattern could bring back something below an ignored folder.
func mayInclude(m *patternmatcher.PatternMatcher, dir string) bool {
	if m == nil || !m.Exclusions() {
		return false
	}
	for _, p := range m.Patterns() {
		if p.Exclusion() && couldMatchBelow(strings.TrimPrefix(p.String(), "/"), dir) {
			return true
		}
	}
	return false
}

func couldMatchBelow(pattern, dir string) bool {
	parts := strings.Split(dir, "/")
	for i, p := range strings.Split(pattern, "/") {
		if i >= len(parts) || hasWildcard(p) {
			return true
		}
		if p != parts[i] {
			return false
		}
	}
	return true
}

// join is path.Join for parts that are clean.
func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// xattrs reads the extended attributes that a layer keeps. A file system without them has none.
func xattrs(p string, follow bool) ([]string, error) {
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow {
		list, get = unix.Listxattr, unix.Getxattr
	}
	var small [256]byte
	buf := small[:]
	n, err := list(p, buf)
	if err == unix.ERANGE {
		buf = make([]byte, 64<<10)
		n, err = list(p, buf)
	}
	if err == unix.ENOTSUP || err == unix.ENOENT || err == unix.EPERM {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: p, Err: err}
	}
	var out []string
	for _, name := range strings.Split(string(buf[:n]), "\x00") {
		if name == "" || !layertar.KeepXattr(name) {
			continue
		}
		val := make([]byte, 64<<10)
		k, err := get(p, name, val)
		if err == unix.ENODATA || err == unix.ENOTSUP {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: p, Err: err}
		}
		out = append(out, name+"\x00"+string(val[:k]))
	}
	slices.Sort(out)
	return out, nil
}
