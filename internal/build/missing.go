package build

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"conex/internal/dockerfile"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// maxNames bounds the names of a folder that are looked through for one that was probably meant.
const maxNames = 500

// missing is ErrNotFound for a path that a COPY names, with why it is not found or what was probably meant.
func (v *view) missing(p string, why error) error {
	err := fmt.Errorf("%q: %w", "/"+p, ErrNotFound)
	if errors.Is(why, errIgnored) {
		return fmt.Errorf("%w: %q in the ignore file keeps it out", err, ignoredBy(v.ignore, p))
	}
	dir := ""
	parts := strings.Split(p, "/")
	for i, part := range parts {
		names := v.names(dir)
		if slices.Contains(names, part) {
			dir = path.Join(dir, part)
			continue
		}
		if near := dockerfile.Nearest(part, names); near != "" {
			return fmt.Errorf("%w (did you mean %q?)", err, path.Join(append([]string{"/", dir, near}, parts[i+1:]...)...))
		}
		break
	}
	return err
}

// names are some of the names in a folder, none of what can't be read.
func (v *view) names(dir string) []string {
	if v.root == nil {
		return nil
	}
	f, err := safepath.OpenNoLinks(v.root, path.Join(".", dir), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(maxNames)
	slices.Sort(names)
	return names
}
