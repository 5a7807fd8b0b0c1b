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
	// follow follows a link that is named though parents is set, which copies it as a link otherwise.
	follow bool
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
	count := 0
	for _, p := range patterns {
		clean := strings.TrimPrefix(path.Clean("/"+p), "/")
		paths := []string{clean}
		if hasWildcard(clean) {
			if paths, err = w.glob(clean, opt.parents); err != nil {
				return nil, err
			}
		}
		for _, one := range paths {
			s, err := w.source(one, !opt.parents || opt.follow)
			if notThere(err) || errors.Is(err, errIgnored) {
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
			if count += len(s.items); count > layertar.MaxEntries {
				return nil, fmt.Errorf("more than %d files and folders, which is all that a layer takes: exclude some in the ignore file", layertar.MaxEntries)
			}
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

// notThere reports whether an error says that there is nothing at a path, or a link where none is followed.
func notThere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, errLink)
}

var errLink = errors.New("a link, which is not followed")

// source1 resolves one path to its first item. Links are followed, the last too, as Docker does for a source that is named; without
// follow, as --parents has it, one on the way is an error and the last is the item itself.
func (w *walker) source1(p string, follow bool) (item, error) {
	if w.v.root == nil {
		return item{}, fs.ErrNotExist
	}
	open, flags := safepath.Open, unix.O_PATH
	if !follow {
		open, flags = safepath.OpenNoLinks, unix.O_PATH|unix.O_NOFOLLOW
	}
	f, err := open(w.v.root, p, flags, 0)
	if !follow && errors.Is(err, unix.ELOOP) {
		err = errLink
	}
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
	if it.kind() == unix.S_IFLNK {
		at := f.Name()
		if it.link, err = readlinkAt(f); err != nil {
			return item{}, &fs.PathError{Op: "readlink", Path: at, Err: err}
		}
	} else if it.xattrs, err = xattrs(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), true); err != nil {
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

// readlinkAt reads the link that f is a handle of.
func readlinkAt(f *os.File) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(int(f.Fd()), "", buf[:])
	return string(buf[:max(n, 0)]), err
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
func (w *walker) source(p string, follow bool) (source, error) {
	top, err := w.source1(p, follow)
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
