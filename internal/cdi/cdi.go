// Package cdi reads descriptions of devices for containers, as vendors put them into /etc/cdi and /var/run/cdi (Container Device
// Interface, versions 0.x and 1.x): by a name like nvidia.com/gpu=0, what a container must get to use the device.
package cdi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Dirs are where specs lie; what a later folder has stands above an earlier one's.
var Dirs = []string{"/etc/cdi", "/var/run/cdi"}

// Edits are what a device changes in a container.
type Edits struct {
	// Env are variables, KEY=value; they stand above the container's own.
	Env         []string     `json:"env,omitempty"`
	DeviceNodes []DeviceNode `json:"deviceNodes,omitempty"`
	Mounts      []Mount      `json:"mounts,omitempty"`
	Hooks       []Hook       `json:"hooks,omitempty"`
	// AdditionalGIDs are groups that the process joins.
	AdditionalGIDs []uint32 `json:"additionalGids,omitempty"`
	// NetDevices and IntelRdt are known, and refused by name.
	NetDevices json.RawMessage `json:"netDevices,omitempty"`
	IntelRdt   json.RawMessage `json:"intelRdt,omitempty"`
}

// DeviceNode is a device file. What is left open is taken from the host's, at HostPath or else Path.
type DeviceNode struct {
	Path        string  `json:"path"`
	HostPath    string  `json:"hostPath,omitempty"`
	Type        string  `json:"type,omitempty"`
	Major       int64   `json:"major,omitempty"`
	Minor       int64   `json:"minor,omitempty"`
	FileMode    *uint32 `json:"fileMode,omitempty"`
	Permissions string  `json:"permissions,omitempty"`
	UID         *uint32 `json:"uid,omitempty"`
	GID         *uint32 `json:"gid,omitempty"`
}

// Mount is a mount; without a type it is a bind of HostPath.
type Mount struct {
	HostPath      string   `json:"hostPath"`
	ContainerPath string   `json:"containerPath"`
	Options       []string `json:"options,omitempty"`
	Type          string   `json:"type,omitempty"`
}

// Hook is a program of the host that runs while the container is made.
type Hook struct {
	HookName string   `json:"hookName"`
	Path     string   `json:"path"`
	Args     []string `json:"args,omitempty"`
	Env      []string `json:"env,omitempty"`
	Timeout  *int     `json:"timeout,omitempty"`
}

// hookNames are the hooks that conex runs.
var hookNames = []string{"prestart", "createRuntime", "createContainer"}

type device struct {
	Name        string            `json:"name"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Edits       Edits             `json:"containerEdits"`
}

type spec struct {
	Version     string            `json:"cdiVersion"`
	Kind        string            `json:"kind"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Devices     []device          `json:"devices"`
	Edits       Edits             `json:"containerEdits"`
}

// maxSpec bounds a file, in bytes.
const maxSpec = 4 << 20

// Registry is what the folders held when they were read.
type Registry struct {
	devices map[string]found
	// clashes are names that two files of one folder have.
	clashes map[string]bool
	// errs are those of files that could not be read: they matter when a name is not found.
	errs []error
}

type found struct {
	spec *spec
	dev  *device
	dir  string
}

// Load reads the folders, of which none need exist. A file that makes no sense is no device's loss but its own: Resolve tells of it.
func Load(dirs []string) (*Registry, error) {
	r := &Registry{devices: map[string]found{}, clashes: map[string]bool{}}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read CDI specs: %w", err)
		}
		for _, e := range entries {
			if !slices.Contains([]string{".json", ".yaml", ".yml"}, filepath.Ext(e.Name())) {
				continue
			}
			path := filepath.Join(dir, e.Name())
			s, err := readSpec(path)
			if err != nil {
				r.errs = append(r.errs, fmt.Errorf("%s: %w", path, err))
				continue
			}
			for i := range s.Devices {
				d := &s.Devices[i]
				name := s.Kind + "=" + d.Name
				old, there := r.devices[name]
				r.clashes[name] = there && old.dir == dir
				r.devices[name] = found{s, d, dir}
			}
		}
	}
	return r, nil
}

func readSpec(path string) (*spec, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxSpec {
		return nil, errors.New("it is too large")
	}
	return parseSpec(b, filepath.Ext(path) == ".json")
}

func parseSpec(b []byte, isJSON bool) (*spec, error) {
	if !isJSON {
		v, err := parseYAML(b)
		if err != nil {
			return nil, err
		}
		if b, err = json.Marshal(v); err != nil {
			return nil, err
		}
	}
	s := &spec{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields() // what we don't know may be what keeps others away from a device
	if err := d.Decode(s); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("it goes on behind its end")
	}
	return s, s.check()
}

func (s *spec) check() error {
	major, _, ok := strings.Cut(s.Version, ".")
	if !ok || major != "0" && major != "1" {
		return fmt.Errorf("version %q of the specification is not known", s.Version)
	}
	if _, _, ok := cutKind(s.Kind); !ok {
		return fmt.Errorf("kind %q is not of the form vendor/class", s.Kind)
	}
	if len(s.Devices) == 0 {
		return errors.New("it has no devices")
	}
	if err := s.Edits.check(); err != nil {
		return err
	}
	seen := map[string]bool{}
	for i := range s.Devices {
		d := &s.Devices[i]
		if !deviceName(d.Name) || seen[d.Name] {
			return fmt.Errorf("device name %q is none, or there twice", d.Name)
		}
		seen[d.Name] = true
		if err := d.Edits.check(); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
	}
	return nil
}

func (e *Edits) check() error {
	for _, v := range e.Env {
		if k, _, ok := strings.Cut(v, "="); !ok || k == "" || strings.ContainsRune(v, 0) {
			return fmt.Errorf("invalid environment variable: %s", v)
		}
	}
	for _, n := range e.DeviceNodes {
		if !filepath.IsAbs(n.Path) || n.HostPath != "" && !filepath.IsAbs(n.HostPath) {
			return fmt.Errorf("device node %q: its path must be absolute", n.Path)
		}
		if !slices.Contains([]string{"", "b", "c", "u", "p"}, n.Type) {
			return fmt.Errorf("device node %s: type %q is none of b, c, u, p", n.Path, n.Type)
		}
		if strings.Trim(n.Permissions, "rwm") != "" {
			return fmt.Errorf("device node %s: permissions %q are not of r, w, m", n.Path, n.Permissions)
		}
	}
	for _, m := range e.Mounts {
		if !filepath.IsAbs(m.ContainerPath) || m.HostPath == "" {
			return fmt.Errorf("mount %q: it needs a path of the host and an absolute one of the container", m.ContainerPath)
		}
	}
	for _, h := range e.Hooks {
		if !filepath.IsAbs(h.Path) {
			return fmt.Errorf("hook %q: its path must be absolute", h.Path)
		}
	}
	return nil
}

// refused says what of the edits conex can't do.
func (e *Edits) refused() error {
	for _, h := range e.Hooks {
		if !slices.Contains(hookNames, h.HookName) {
			return fmt.Errorf("its hook %s is of kind %s, which is not supported: there are %s", h.Path, h.HookName, strings.Join(hookNames, ", "))
		}
	}
	switch {
	case len(e.NetDevices) > 0 && string(e.NetDevices) != "null":
		return errors.New("it moves network devices, which is not supported")
	case len(e.IntelRdt) > 0 && string(e.IntelRdt) != "null":
		return errors.New("it needs intelRdt, which is not supported")
	}
	return nil
}

// Resolve returns what the devices of these names change, in the order of the names.
func (r *Registry) Resolve(names []string) (*Edits, error) {
	out := &Edits{}
	var missing []string
	done := map[any]bool{}
	for _, name := range names {
		f, ok := r.devices[name]
		if !ok {
			missing = append(missing, name)
			continue
		}
		if r.clashes[name] {
			return nil, fmt.Errorf("CDI device %s is in several files of %s", name, f.dir)
		}
		for _, e := range []*Edits{&f.spec.Edits, &f.dev.Edits} {
			if done[e] {
				continue // the same spec or device again
			}
			done[e] = true
			if err := e.refused(); err != nil {
				return nil, fmt.Errorf("CDI device %s: %w", name, err)
			}
			out.add(e)
		}
	}
	if len(missing) > 0 {
		return nil, errors.Join(append([]error{fmt.Errorf("unresolvable CDI devices %s", strings.Join(missing, ", "))}, r.errs...)...)
	}
	return out, nil
}

func (e *Edits) add(o *Edits) {
	e.Env = append(e.Env, o.Env...)
	e.DeviceNodes = append(e.DeviceNodes, o.DeviceNodes...)
	e.Mounts = append(e.Mounts, o.Mounts...)
	e.Hooks = append(e.Hooks, o.Hooks...)
	e.AdditionalGIDs = append(e.AdditionalGIDs, o.AdditionalGIDs...)
}

// HasKind reports whether there is a device of that kind, as in nvidia.com/gpu.
func (r *Registry) HasKind(kind string) bool {
	for name := range r.devices {
		if strings.HasPrefix(name, kind+"=") {
			return true
		}
	}
	return false
}

// IsName reports whether s is a device's full name, vendor/class=name.
func IsName(s string) bool {
	kind, name, ok := strings.Cut(s, "=")
	if !ok || !deviceName(name) {
		return false
	}
	_, _, ok = cutKind(kind)
	return ok
}

func cutKind(kind string) (vendor, class string, ok bool) {
	vendor, class, ok = strings.Cut(kind, "/")
	return vendor, class, ok && word(vendor, "_-.", letter) && word(class, "_-", letter)
}

func deviceName(s string) bool { return word(s, "_-.:", alnum) }

// word reports whether s is of letters, digits and others, begins with first and ends with a letter or digit.
func word(s, others string, first func(byte) bool) bool {
	if s == "" || !first(s[0]) || !alnum(s[len(s)-1]) {
		return false
	}
	for i := range len(s) {
		if !alnum(s[i]) && strings.IndexByte(others, s[i]) < 0 {
			return false
		}
	}
	return true
}

func letter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }

func alnum(c byte) bool { return letter(c) || c >= '0' && c <= '9' }
