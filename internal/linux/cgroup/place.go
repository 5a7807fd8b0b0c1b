package cgroup

import (
	"fmt"
	"path"
	"strings"
)

// Place is where a cgroup is, and who makes it.
type Place struct {
	// Path is its folder, relative to each hierarchy's root.
	Path string
	// Slice and Unit name it to systemd, which makes it; both are empty where conex does.
	Slice, Unit string
}

// defaultSlice is systemd's for what the system runs.
const defaultSlice = "system.slice"

// Parse reads the cgroups path of an OCI spec: a folder, or with systemd "slice:prefix:name", as runc has it.
func Parse(spec string, systemd bool) (Place, error) {
	if !systemd {
		p := strings.TrimPrefix(path.Clean("/"+spec), "/")
		if p == "" {
			return Place{}, fmt.Errorf("cgroup path %q doesn't name a folder below the root", spec)
		}
		return Place{Path: p}, nil
	}
	parts := strings.Split(spec, ":")
	if len(parts) != 3 || parts[2] == "" {
		return Place{}, fmt.Errorf("cgroup path %q: systemd needs slice:prefix:name", spec)
	}
	slice, unit := parts[0], parts[2]
	if slice == "" {
		slice = defaultSlice
	}
	if !strings.HasSuffix(unit, ".slice") {
		if parts[1] != "" {
			unit = parts[1] + "-" + unit
		}
		unit += ".scope"
	}
	dir, err := SlicePath(slice)
	if err != nil {
		return Place{}, err
	}
	if !validUnit(unit) {
		return Place{}, fmt.Errorf("%q is not a name of a systemd unit", unit)
	}
	return Place{Path: strings.TrimPrefix(path.Join(dir, unit), "/"), Slice: slice, Unit: unit}, nil
}

// ForContainer says where a container's cgroup is: below parent, by default below conex's own folder or in system.slice.
func ForContainer(id, parent string, systemd bool) (Place, error) {
	if systemd {
		return Parse(parent+":conex:"+id, true)
	}
	if parent == "" {
		parent = "conex"
	}
	return Parse(parent+"/"+id, false)
}

// String is the form that Parse reads.
func (p Place) String() string {
	if p.Unit == "" {
		return "/" + p.Path
	}
	if prefix, name, ok := strings.Cut(strings.TrimSuffix(p.Unit, ".scope"), "-"); ok && strings.HasSuffix(p.Unit, ".scope") {
		return p.Slice + ":" + prefix + ":" + name
	}
	return p.Slice + "::" + strings.TrimSuffix(p.Unit, ".scope")
}

// SlicePath is a slice's folder: a-b.slice lies in a.slice.
func SlicePath(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || !validUnit(slice) {
		return "", fmt.Errorf("%q is not a slice of systemd, such as machine.slice", slice)
	}
	if name == "-" {
		return "/", nil
	}
	dir, whole := "/", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("%q is not a slice of systemd, such as machine.slice", slice)
		}
		if whole != "" {
			whole += "-"
		}
		whole += part
		dir = path.Join(dir, whole+".slice")
	}
	return dir, nil
}

// maxUnit is systemd's bound on the length of a name.
const maxUnit = 255

func validUnit(name string) bool {
	if name == "" || len(name) > maxUnit || strings.HasPrefix(name, ".") {
		return false
	}
	for _, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune(":-_.\\@", c):
		default:
			return false
		}
	}
	return true
}
