package cgroup

import (
	"path/filepath"
	"strings"
)

// frozen reports whether everything below was told to stop.
func (u unified) frozen() (bool, error) {
	s, err := readFile(filepath.Join(u.dir, "cgroup.freeze"))
	return s == "1", missing(err)
}

// Frozen implements Manager.
func (v *v2) Frozen() (bool, error) { return v.unified.frozen() }

// Frozen implements Manager.
func (v *v1) Frozen() (bool, error) {
	if v.uni != nil {
		if frozen, err := v.uni.frozen(); frozen || err != nil {
			return frozen, err
		}
	}
	dir, err := v.dir("freezer")
	if err != nil {
		return false, nil // nothing could have frozen it
	}
	s, err := readFile(filepath.Join(dir, "freezer.state"))
	return strings.HasPrefix(s, "FR"), missing(err) // FREEZING is on its way
}
