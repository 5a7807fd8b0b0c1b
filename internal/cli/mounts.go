package cli

import (
	"encoding/csv"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/mount"
)

// parseVolume reads a value of -v: source:target[:options], the source being a path or the name of a volume, comes back as bind with
// an absolute path, as HostConfig.Binds has it; target alone asks for an anonymous volume.
func parseVolume(s string) (bind, anonymous string, err error) {
	fail := func(format string, args ...any) (string, string, error) { return "", "", fmt.Errorf(format, args...) }
	parts := strings.Split(s, ":")
	switch {
	case slices.Contains(parts, ""):
		return fail("invalid spec: %s: empty section between colons", s)
	case len(parts) > 3:
		return fail("invalid spec: %s: too many colons", s)
	case len(parts) == 1:
		parts = []string{"", s}
	}
	if src := parts[0]; strings.HasPrefix(src, ".") || strings.HasPrefix(src, "/") {
		if parts[0], err = filepath.Abs(src); err != nil {
			return "", "", err
		}
	}
	if !path.IsAbs(parts[1]) {
		return fail("invalid volume specification: '%s': invalid mount path: '%s' mount path must be absolute", s, parts[1])
	}
	if path.Clean(parts[1]) == "/" {
		return fail("invalid volume specification: '%s': invalid specification: destination can't be '/'", s)
	}
	if parts[0] == "" {
		return "", path.Clean(s), nil
	}
	if len(parts) == 3 {
		for _, o := range strings.Split(parts[2], ",") {
			if !slices.Contains([]string{"ro", "rw", "z", "Z", "nocopy", "shared", "slave", "private", "rshared", "rslave", "rprivate"}, o) {
				return fail("invalid mode: %s", parts[2])
			}
		}
	}
	return strings.Join(parts, ":"), "", nil
}

// parseTmpfs reads a value of --tmpfs: target[:options].
func parseTmpfs(s string) (target, options string, err error) {
	target, options, _ = strings.Cut(s, ":")
	if !path.IsAbs(target) {
		return "", "", fmt.Errorf("invalid tmpfs mount %q: the path must be absolute", s)
	}
	return path.Clean(target), options, nil
}

// parseMount reads a value of --mount. A tmpfs comes back as target and options for HostConfig.Tmpfs, with m.Type tmpfs.
func parseMount(s string) (m mount.Mount, tmpfs string, err error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return m, "", fmt.Errorf("invalid argument %q for \"--mount\" flag: %w", s, err)
	}
	fail := func(format string, args ...any) (mount.Mount, string, error) {
		return mount.Mount{}, "", fmt.Errorf("invalid argument %q for \"--mount\" flag: "+format, append([]any{s}, args...)...)
	}
	m.Type = mount.TypeVolume
	var tmpfsOptions []string
	for _, f := range fields {
		k, v, hasValue := strings.Cut(f, "=")
		k = strings.ToLower(k)
		if !hasValue && !slices.Contains([]string{"readonly", "ro", "bind-nonrecursive", "volume-nocopy"}, k) {
			return fail("invalid field '%s' must be a key=value pair", f)
		}
		switch k {
		case "type":
			m.Type = mount.Type(strings.ToLower(v))
		case "source", "src":
			m.Source = v
		case "target", "dst", "destination":
			m.Target = v
		case "readonly", "ro":
			if m.ReadOnly, err = boolField(v, hasValue); err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
		case "bind-propagation":
			if !slices.Contains(mount.Propagations, mount.Propagation(v)) {
				return fail("invalid propagation: %s", v)
			}
			bindOptions(&m).Propagation = mount.Propagation(v)
		case "bind-nonrecursive":
			if bindOptions(&m).NonRecursive, err = boolField(v, hasValue); err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
		case "bind-recursive":
			switch v {
			case "enabled":
			case "disabled":
				bindOptions(&m).NonRecursive = true
			case "writable":
				bindOptions(&m).ReadOnlyNonRecursive = true
			case "readonly":
				bindOptions(&m).ReadOnlyForceRecursive = true
			default:
				return fail("invalid value for bind-recursive: %s (must be \"enabled\", \"disabled\", \"writable\", or \"readonly\")", v)
			}
		case "bind-create-src":
			on, err := boolField(v, hasValue)
			if err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
			bindOptions(&m).CreateMountpoint = on
		case "consistency":
			m.Consistency = mount.Consistency(v)
		case "tmpfs-size":
			n, err := units.RAMInBytes(v)
			if err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
			tmpfsOptions = append(tmpfsOptions, "size="+strconv.FormatInt(n, 10))
		case "tmpfs-mode":
			if _, err := strconv.ParseUint(v, 8, 32); err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
			tmpfsOptions = append(tmpfsOptions, "mode="+v)
		case "volume-nocopy":
			on, err := boolField(v, hasValue)
			if err != nil {
				return fail("invalid value for %s: %s", k, v)
			}
			m.VolumeOptions = &mount.VolumeOptions{NoCopy: on}
		case "volume-label", "volume-driver", "volume-opt", "volume-subpath", "image-subpath":
			return fail("%s is not supported yet", k)
		default:
			return fail("unexpected key '%s' in '%s'", k, f)
		}
	}
	if m.Target == "" {
		return fail("target is required")
	}
	if !path.IsAbs(m.Target) {
		return fail("invalid mount path: '%s' mount path must be absolute", m.Target)
	}
	if m.BindOptions != nil && m.Type != mount.TypeBind {
		return fail("cannot mix 'bind-*' options with mount type '%s'", m.Type)
	}
	if tmpfsOptions != nil && m.Type != mount.TypeTmpfs {
		return fail("cannot mix 'tmpfs-*' options with mount type '%s'", m.Type)
	}
	switch m.Type {
	case mount.TypeBind:
		if m.Source == "" {
			return fail("source is required when specifying type=bind")
		}
		if m.Source, err = filepath.Abs(m.Source); err != nil {
			return m, "", err
		}
		if !bindOptions(&m).CreateMountpoint {
			if _, err := os.Stat(m.Source); err != nil {
				return fail("bind source path does not exist: %s", m.Source)
			}
		}
	case mount.TypeTmpfs:
		if m.Source != "" {
			return fail("source can't be set for type=tmpfs")
		}
		if m.ReadOnly {
			tmpfsOptions = append(tmpfsOptions, "ro")
		}
	case mount.TypeVolume:
	default:
		return fail("mount type %s is not supported yet", m.Type)
	}
	return m, strings.Join(tmpfsOptions, ","), nil
}

func bindOptions(m *mount.Mount) *mount.BindOptions {
	if m.BindOptions == nil {
		m.BindOptions = &mount.BindOptions{}
	}
	return m.BindOptions
}

func boolField(v string, hasValue bool) (bool, error) {
	if !hasValue {
		return true, nil
	}
	return strconv.ParseBool(v)
}
