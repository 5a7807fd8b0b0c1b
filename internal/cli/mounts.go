package cli

import (
	"encoding/csv"
	"errors"
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
// an absolute path, as HostConfig.Binds has it; target alone asks for an anonymous volume. own is what conex's own options say.
func parseVolume(s string) (bind, anonymous string, own ownOptions, err error) {
	fail := func(format string, args ...any) (string, string, ownOptions, error) {
		return "", "", ownOptions{}, fmt.Errorf(format, args...)
	}
	parts := strings.SplitN(s, ":", 3)
	switch {
	case s == "":
		return fail("invalid empty volume spec")
	case slices.Contains(parts, ""):
		return fail("invalid spec: %s: empty section between colons", s)
	case len(parts) == 3 && strings.Contains(parts[2], ":") && !strings.Contains(parts[2], "idmap="):
		return fail("invalid spec: %s: too many colons", s)
	case len(parts) == 1:
		if !path.IsAbs(s) {
			return fail("invalid volume specification: '%s': invalid mount config for type \"volume\": invalid mount path: '%s' mount path must be absolute", s, s)
		}
		if path.Clean(s) == "/" {
			return fail("invalid volume specification: '%s': invalid mount config for type \"volume\": invalid specification: destination can't be '/'", s)
		}
		return "", path.Clean(s), own, nil
	}
	if src := parts[0]; strings.HasPrefix(src, ".") || strings.HasPrefix(src, "/") {
		if parts[0], err = filepath.Abs(src); err != nil {
			return "", "", own, err
		}
	}
	if len(parts) == 3 {
		var rest []string
		for _, o := range strings.Split(parts[2], ",") {
			k, v, _ := strings.Cut(o, "=")
			switch {
			case k == "idmap":
				if own.idMap = v; v == "" {
					own.idMap = "auto"
				}
			case o == "U": // podman's, which changes owners; here they are shown as the container's instead
				own.idMap = "auto"
			case k == "overlay":
				if own.overlay = v; v == "" {
					own.overlay = "discard"
				}
			case o == "O": // podman's
				own.overlay = "discard"
			case k == "upperdir" || k == "workdir":
				return fail("invalid mode: %s: an overlay's changes lie with the container; overlay=keep keeps them until it is removed", parts[2])
			default:
				rest = append(rest, o)
			}
		}
		if parts = parts[:2]; len(rest) > 0 {
			parts = append(parts, strings.Join(rest, ","))
		}
	}
	return strings.Join(parts, ":"), "", own, nil
}

// parseTmpfs reads a value of --tmpfs: target[:options].
func parseTmpfs(s string) (target, options string, err error) {
	target, options, _ = strings.Cut(s, ":")
	if !path.IsAbs(target) {
		return "", "", fmt.Errorf("invalid tmpfs mount %q: the path must be absolute", s)
	}
	return path.Clean(target), options, nil
}

// ownOptions are those of a mount which Docker does not have: "" without.
type ownOptions struct{ idMap, overlay string }

// parseMount reads a value of --mount. own is what conex's own options say.
func parseMount(s string) (m mount.Mount, own ownOptions, err error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return m, own, err
	}
	m.Type = mount.TypeVolume
	for _, f := range fields {
		k, v, hasValue := strings.Cut(f, "=")
		switch {
		case strings.TrimSpace(k) != k:
			return m, own, fmt.Errorf("invalid option '%s' in '%s': option should not have whitespace", strings.TrimSpace(k), f)
		case hasValue && strings.TrimSpace(v) == "":
			return m, own, fmt.Errorf("invalid value for '%s': value is empty", k)
		case hasValue && strings.TrimSpace(v) != v:
			return m, own, fmt.Errorf("invalid value for '%s' in '%s': value should not have whitespace", k, f)
		}
		k = strings.ToLower(k)
		if !hasValue && !slices.Contains([]string{"readonly", "ro", "bind-nonrecursive", "bind-create-src", "volume-nocopy", "idmap", "overlay"}, k) {
			return m, own, fmt.Errorf("invalid field '%s' must be a key=value pair", f)
		}
		if k == "idmap" {
			if own.idMap = v; v == "" {
				own.idMap = "auto"
			}
			continue
		}
		if k == "overlay" {
			if own.overlay = v; v == "" {
				own.overlay = "discard"
			}
			continue
		}
		if err := mountField(&m, k, v, f, hasValue); err != nil {
			return m, own, err
		}
	}
	return m, own, checkMount(&m)
}

// mountField takes one key of --mount.
func mountField(m *mount.Mount, k, v, field string, hasValue bool) (err error) {
	switch k {
	case "type":
		m.Type = mount.Type(strings.ToLower(v))
	case "source", "src":
		m.Source = v
		if strings.HasPrefix(v, ".") {
			m.Source, err = filepath.Abs(v)
		}
	case "target", "dst", "destination":
		m.Target = v
	case "readonly", "ro":
		m.ReadOnly, err = boolField(k, v, hasValue)
	case "consistency":
		m.Consistency = mount.Consistency(strings.ToLower(v))
	case "bind-propagation":
		bindOptions(m).Propagation = mount.Propagation(strings.ToLower(v))
	case "bind-nonrecursive": // what bind-recursive=disabled was called before
		bindOptions(m).NonRecursive, err = boolField(k, v, hasValue)
	case "bind-recursive":
		switch v {
		case "enabled":
		case "disabled":
			bindOptions(m).NonRecursive = true
		case "writable":
			bindOptions(m).ReadOnlyNonRecursive = true
		case "readonly":
			bindOptions(m).ReadOnlyForceRecursive = true
		default:
			return fmt.Errorf("invalid value for bind-recursive: %s (must be \"enabled\", \"disabled\", \"writable\", or \"readonly\")", v)
		}
	case "bind-create-src":
		bindOptions(m).CreateMountpoint, err = boolField(k, v, hasValue)
	case "volume-subpath":
		volumeOptions(m).Subpath = v
	case "volume-nocopy":
		volumeOptions(m).NoCopy, err = boolField(k, v, hasValue)
	case "volume-label":
		o := volumeOptions(m)
		o.Labels = setPair(o.Labels, v)
	case "volume-driver":
		volumeDriver(m).Name = v
	case "volume-opt":
		d := volumeDriver(m)
		d.Options = setPair(d.Options, v)
	case "image-subpath":
		if m.ImageOptions == nil {
			m.ImageOptions = &mount.ImageOptions{}
		}
		m.ImageOptions.Subpath = v
	case "tmpfs-size":
		n, err := units.RAMInBytes(v)
		if err != nil {
			return fmt.Errorf("invalid value for %s: %s", k, v)
		}
		tmpfsOptions(m).SizeBytes = n
	case "tmpfs-mode":
		n, err := strconv.ParseUint(v, 8, 32)
		if err != nil {
			return fmt.Errorf("invalid value for %s: %s", k, v)
		}
		tmpfsOptions(m).Mode = os.FileMode(n)
	default:
		return fmt.Errorf("unknown option '%s' in '%s'", k, field)
	}
	return err
}

// checkMount refuses options that don't go together.
func checkMount(m *mount.Mount) error {
	if m.Target == "" {
		return errors.New("target is required")
	}
	for _, o := range []struct {
		of  mount.Type
		set bool
	}{
		{mount.TypeBind, m.BindOptions != nil}, {mount.TypeVolume, m.VolumeOptions != nil}, {mount.TypeImage, m.ImageOptions != nil}, {mount.TypeTmpfs, m.TmpfsOptions != nil},
	} {
		if o.set && m.Type != o.of {
			return fmt.Errorf("cannot mix '%s-*' options with mount type '%s'", o.of, m.Type)
		}
	}
	o := m.BindOptions
	switch {
	case m.Type == "":
		return errors.New("type is required")
	case m.Target == "":
		return errors.New("target is required")
	case o == nil:
	case o.ReadOnlyNonRecursive && !m.ReadOnly:
		return errors.New("option 'bind-recursive=writable' requires 'readonly' to be specified in conjunction")
	case o.ReadOnlyForceRecursive && !m.ReadOnly:
		return errors.New("option 'bind-recursive=readonly' requires 'readonly' to be specified in conjunction")
	case o.ReadOnlyForceRecursive && o.Propagation != mount.PropagationRPrivate:
		return errors.New("option 'bind-recursive=readonly' requires 'bind-propagation=rprivate' to be specified in conjunction")
	}
	return nil
}

func bindOptions(m *mount.Mount) *mount.BindOptions {
	if m.BindOptions == nil {
		m.BindOptions = &mount.BindOptions{}
	}
	return m.BindOptions
}

func volumeOptions(m *mount.Mount) *mount.VolumeOptions {
	if m.VolumeOptions == nil {
		m.VolumeOptions = &mount.VolumeOptions{}
	}
	return m.VolumeOptions
}

func volumeDriver(m *mount.Mount) *mount.Driver {
	o := volumeOptions(m)
	if o.DriverConfig == nil {
		o.DriverConfig = &mount.Driver{}
	}
	return o.DriverConfig
}

func tmpfsOptions(m *mount.Mount) *mount.TmpfsOptions {
	if m.TmpfsOptions == nil {
		m.TmpfsOptions = &mount.TmpfsOptions{}
	}
	return m.TmpfsOptions
}

// setPair sets key=value in a map that may be nil.
func setPair(in map[string]string, pair string) map[string]string {
	k, v, _ := strings.Cut(pair, "=")
	if k == "" {
		return in
	}
	if in == nil {
		in = map[string]string{}
	}
	in[k] = v
	return in
}

func boolField(key, v string, hasValue bool) (bool, error) {
	if !hasValue {
		return true, nil
	}
	switch v {
	case "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	}
	return false, fmt.Errorf(`invalid value for '%s': invalid boolean value (%q): must be one of "true", "1", "false", or "0" (default "true")`, key, v)
}
