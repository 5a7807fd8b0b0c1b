package build

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// glob lists the paths that match a pattern, in byte order. What stands before the first wildcard must be there, and links in it are
// followed; none are behind it, but for one that a whole path leads to. With deep, as --parents has it, "**" stands for any number of
// folders, nothing needs to be there, and no link is followed.
func (w *walker) glob(pattern string, deep bool) ([]string, error) {
	parts := strings.Split(pattern, "/")
	for _, part := range parts {
		if _, err := path.Match(part, ""); err != nil {
			return nil, fmt.Errorf("pattern %q: %w", pattern, err)
		}
	}
	first := slices.IndexFunc(parts, hasWildcard)
	top := path.Join(parts[:first]...)
	if first > 0 && !deep {
		var err error
		if top, err = w.real(top); err != nil {
			return nil, err
		}
	}
	found := []string{top}
	for _, part := range parts[first:] {
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
			if notThere(err) {
				continue
			}
			if err != nil {
				return nil, err
			}
			for _, n := range names {
				if ok, _ := path.Match(part, n); ok {
					next = append(next, join(dir, n))
				}
			}
		}
		found = next
	}
	slices.Sort(found)
	found = slices.Compact(found)
	return slices.DeleteFunc(found, func(p string) bool { return !w.meant(p, !deep) }), nil
}

// real is where a folder lies that a pattern begins with.
func (w *walker) real(dir string) (string, error) {
	if w.v.root == nil {
		return "", fmt.Errorf("%q: %w", "/"+dir, ErrNotFound)
	}
	f, err := safepath.Open(w.v.root, dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if notThere(err) {
		return "", fmt.Errorf("%q: %w", "/"+dir, ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	return w.v.realPath(f)
}

// meant reports whether a path that a pattern leads to is there. What a literal part after a wildcard leads to may not exist; what is
// ignored does not count. A link that leads nowhere was meant, though: leaving it out in silence would hide that.
func (w *walker) meant(p string, follow bool) bool {
	if w.v.root == nil {
		return false
	}
	if dir := path.Dir(p); follow && dir != "." {
		f, err := safepath.OpenNoLinks(w.v.root, dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return false
		}
		f.Close()
	}
	_, err := w.source1(p, follow)
	return err == nil || errors.Is(err, fs.ErrNotExist) && w.isLink(p)
}

// folders lists the folders below dir, links not followed.
func (w *walker) folders(dir string) ([]string, error) {
	if err := w.ctx.Err(); err != nil {
		return nil, err
	}
	names, err := w.names(dir)
	if notThere(err) {
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

// names lists what is in a folder, in byte order.
func (w *walker) names(dir string) ([]string, error) {
	if w.v.root == nil {
		return nil, fs.ErrNotExist
	}
	f, err := safepath.OpenNoLinks(w.v.root, dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ELOOP) {
		err = errLink
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}
