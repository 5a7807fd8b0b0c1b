package ocicli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/disk"
	"conex/internal/linux/caps"
	"conex/internal/plainjson"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxConfig bounds a bundle's config.json, in bytes.
const maxConfig = 16 << 20

// readConfig reads the bundle's config.json.
func readConfig(bundle string) ([]byte, error) {
	path := filepath.Join(bundle, "config.json")
	b, err := disk.ReadAtMost(path, maxConfig)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("JSON specification file config.json not found in %s", bundle)
	}
	return b, err
}

// parseSpec decodes a configuration and refuses what has no meaning on Linux. What the runtime can't do it says itself.
func parseSpec(b []byte) (*specs.Spec, error) {
	var s specs.Spec
	if err := plainjson.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("config.json: %w", err)
	}
	switch {
	case !strings.HasPrefix(s.Version, "1."):
		return nil, fmt.Errorf("config.json: ociVersion %q: want one of 1.x", s.Version)
	case s.Windows != nil || s.Solaris != nil || s.VM != nil || s.ZOS != nil || s.FreeBSD != nil:
		return nil, errors.New("config.json: parts for another platform than linux")
	case s.Process == nil:
		return nil, errors.New("config.json: process is missing")
	case s.Root == nil || s.Root.Path == "":
		return nil, errors.New("config.json: root.path is missing")
	case s.Process.Cwd == "" || !filepath.IsAbs(s.Process.Cwd):
		return nil, fmt.Errorf("config.json: process.cwd %q is not an absolute path", s.Process.Cwd)
	case len(s.Process.Args) == 0:
		return nil, errors.New("config.json: process.args must not be empty")
	}
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	seen := map[specs.LinuxNamespaceType]bool{}
	for _, n := range s.Linux.Namespaces {
		if seen[n.Type] {
			return nil, fmt.Errorf("config.json: linux.namespaces has %q twice", n.Type)
		}
		seen[n.Type] = true
	}
	for i, m := range s.Mounts {
		if m.Destination == "" {
			return nil, fmt.Errorf("config.json: mounts[%d] has no destination", i)
		}
	}
	if h := s.Hooks; h != nil {
		for kind, list := range map[string][]specs.Hook{
			"prestart": h.Prestart, "createRuntime": h.CreateRuntime, "createContainer": h.CreateContainer, //nolint:staticcheck // deprecated, and used by Docker
			"startContainer": h.StartContainer, "poststart": h.Poststart, "poststop": h.Poststop,
		} {
			for i, hook := range list {
				if !filepath.IsAbs(hook.Path) {
					return nil, fmt.Errorf("config.json: hooks.%s[%d].path %q is not absolute", kind, i, hook.Path)
				}
				if hook.Timeout != nil && *hook.Timeout <= 0 {
					return nil, fmt.Errorf("config.json: hooks.%s[%d].timeout must be greater than zero", kind, i)
				}
			}
		}
	}
	return &s, nil
}

// completeSpec writes down what a spec leaves to the runtime: the cgroup's path, the devices that every container may use, and
// relative paths, which mean the bundle's folder.
func completeSpec(s *specs.Spec, id, bundle string, systemd bool) {
	switch {
	case s.Linux.CgroupsPath != "":
	case systemd:
		s.Linux.CgroupsPath = "system.slice:conex:" + id
	default:
		s.Linux.CgroupsPath = "/" + Name + "/" + id
	}
	if !filepath.IsAbs(s.Root.Path) {
		s.Root.Path = filepath.Join(bundle, s.Root.Path)
	}
	for i, m := range s.Mounts {
		s.Mounts[i].Destination = filepath.Join("/", m.Destination)
		if m.Source != "" && !filepath.IsAbs(m.Source) && isBind(m) {
			s.Mounts[i].Source = filepath.Join(bundle, m.Source)
		}
	}
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	if r := s.Linux.Resources; len(r.Devices) > 0 {
		r.Devices = append(r.Devices, defaultDevices()...)
	}
}

// heldCapabilities takes out of a process's capabilities those that this host does not have, and returns them: a caller asks for all
// that it knows.
func heldCapabilities(c *specs.LinuxCapabilities) (lacking []string) {
	if c == nil {
		return nil
	}
	held := caps.All()
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted, &c.Inheritable, &c.Ambient} {
		*set = slices.DeleteFunc(slices.Clone(*set), func(name string) bool {
			if slices.Contains(held, name) {
				return false
			}
			if !slices.Contains(lacking, name) {
				lacking = append(lacking, name)
			}
			return true
		})
	}
	return lacking
}

func isBind(m specs.Mount) bool {
	if m.Type == "bind" {
		return true
	}
	for _, o := range m.Options {
		if o == "bind" || o == "rbind" {
			return true
		}
	}
	return false
}

// defaultDevices allows the devices that the specification gives every container, and making nodes.
func defaultDevices() []specs.LinuxDeviceCgroup {
	n := func(v int64) *int64 { return &v }
	rules := []specs.LinuxDeviceCgroup{
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Access: "m"},
		{Allow: true, Type: "c", Major: n(136), Access: "rwm"}, // /dev/pts/*
	}
	for _, d := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 1}, {5, 2}} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: n(d[0]), Minor: n(d[1]), Access: "rwm"})
	}
	return rules
}
