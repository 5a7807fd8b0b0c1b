package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/undo"
	"conex/internal/volume"

	apic "github.com/moby/moby/api/types/container"
	mevents "github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/mount"
)

// addMounts turns -v, --mount, --tmpfs and the image's VOLUMEs into the record's mounts. It makes the volumes that are new, and
// registers how to take that back.
func (e *Engine) addMounts(ctx context.Context, rec *container.Record, back *undo.Stack) error {
	taken := map[string]bool{}
	add := func(m apic.MountPoint) error {
		if !path.IsAbs(m.Destination) {
			return invalid("invalid mount path: '%s' mount path must be absolute", m.Destination)
		}
		m.Destination = path.Clean(m.Destination)
		if m.Destination == "/" {
			return invalid("invalid specification: destination can't be '/'")
		}
		if taken[m.Destination] {
			return invalid("Duplicate mount point: %s", m.Destination)
		}
		taken[m.Destination] = true
		rec.Mounts = append(rec.Mounts, m)
		return nil
	}
	hc := rec.HostConfig
	var all []apic.MountPoint
	for i, b := range hc.Binds {
		if slices.Contains(hc.Binds[:i], b) {
			continue // said twice; Docker's client drops it as well
		}
		m, err := parseBind(b)
		if err != nil {
			return err
		}
		all = append(all, m)
	}
	for _, m := range hc.Mounts {
		p, err := mountPoint(m)
		if err != nil {
			return err
		}
		all = append(all, p)
	}
	for dst, opts := range hc.Tmpfs {
		if err := checkTmpfs(opts); err != nil {
			return err
		}
		all = append(all, apic.MountPoint{Type: mount.TypeTmpfs, Destination: dst, Mode: opts, RW: true})
	}
	for _, m := range all {
		if err := add(m); err != nil {
			return err
		}
	}
	// The image's and -v's volumes without a name, where nothing else is mounted.
	var anonymous []string
	for dst := range rec.Config.Volumes {
		if !taken[path.Clean(dst)] {
			anonymous = append(anonymous, dst)
		}
	}
	slices.Sort(anonymous)
	for _, dst := range anonymous {
		if err := add(apic.MountPoint{Type: mount.TypeVolume, Destination: dst, RW: true}); err != nil {
			return err
		}
	}
	vols := volume.Open(e.root)
	for i := range rec.Mounts {
		m := &rec.Mounts[i]
		if m.Type == mount.TypeVolume {
			if err := e.makeVolume(ctx, vols, rec, m, back); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeVolume fills in a volume's name and folder, and makes it when it does not exist, with what the image has in its place.
func (e *Engine) makeVolume(ctx context.Context, vols *volume.Store, rec *container.Record, m *apic.MountPoint, back *undo.Stack) error {
	v := volume.Volume{Name: m.Name, Created: time.Now().UTC()}
	if v.Name == "" {
		v.Name, v.Anonymous = disk.RandomID(), true
		rec.Anonymous = append(rec.Anonymous, v.Name)
	}
	m.Name, m.Driver, m.Source = v.Name, "local", vols.Data(v.Name)
	made, err := vols.Create(v, func(data string) error { return e.copyUp(ctx, rec, m.Destination, data) })
	if made {
		e.volumeEvent(mevents.ActionCreate, v.Name)
	}
	if err != nil {
		return err
	}
	if made {
		// A volume is easily made again; one that stays behind is only found by looking.
		back.Add(func() { _ = vols.Remove(v.Name) })
	}
	return nil
}

// parseBind reads -v's "source:destination[:options]". A source that is no path is a volume's name.
func parseBind(spec string) (apic.MountPoint, error) {
	parts := strings.Split(spec, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return apic.MountPoint{}, invalid("invalid volume specification: '%s'", spec)
	}
	m := apic.MountPoint{Type: mount.TypeBind, Source: parts[0], Destination: parts[1], RW: true, Propagation: mount.PropagationRPrivate}
	if len(parts) == 3 {
		m.Mode = parts[2]
		for _, o := range strings.Split(parts[2], ",") {
			switch o {
			case "ro":
				m.RW = false
			case "rw", "z", "Z", "nocopy", "cached", "delegated", "consistent", "":
				// SELinux labels and macOS's hints mean nothing here.
			default:
				if !slices.Contains(mount.Propagations, mount.Propagation(o)) {
					return m, invalid("invalid mode: %s", o)
				}
				m.Propagation = mount.Propagation(o)
			}
		}
	}
	if !path.IsAbs(m.Source) {
		if err := volume.CheckName(m.Source); err != nil {
			return m, invalid("%w. If you intended to pass a host directory, use absolute path", err)
		}
		m.Type, m.Name, m.Source, m.Propagation = mount.TypeVolume, m.Source, "", ""
		return m, nil
	}
	m.Source = path.Clean(m.Source)
	// Docker makes a missing folder for -v; for --mount it is an error.
	if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(m.Source, 0o755); err != nil {
			return m, fmt.Errorf("create bind mount source: %w", err)
		}
	}
	return m, nil
}

// mountPoint reads --mount.
func mountPoint(s mount.Mount) (apic.MountPoint, error) {
	m := apic.MountPoint{Type: s.Type, Source: s.Source, Destination: s.Target, RW: !s.ReadOnly}
	if s.Target == "" {
		return m, invalid("invalid mount config for type %q: field Target must not be empty", s.Type)
	}
	switch s.Type {
	case mount.TypeBind:
		if s.Source == "" || !path.IsAbs(s.Source) {
			return m, invalid("invalid mount config for type \"bind\": invalid mount path: '%s' mount path must be absolute", s.Source)
		}
		m.Propagation = mount.PropagationRPrivate
		if s.BindOptions != nil && s.BindOptions.Propagation != "" {
			m.Propagation = s.BindOptions.Propagation
		}
		if _, err := os.Stat(s.Source); err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				return m, err
			}
			if s.BindOptions == nil || !s.BindOptions.CreateMountpoint {
				return m, invalid("invalid mount config for type \"bind\": bind source path does not exist: %s", s.Source)
			}
			if err := os.MkdirAll(s.Source, 0o755); err != nil {
				return m, err
			}
		}
	case mount.TypeTmpfs:
		if s.Source != "" {
			return m, invalid("invalid mount config for type \"tmpfs\": field Source must not be specified")
		}
		m.Source = ""
		if o := s.TmpfsOptions; o != nil {
			var opts []string
			if o.SizeBytes > 0 {
				opts = append(opts, "size="+strconv.FormatInt(o.SizeBytes, 10))
			}
			if o.Mode != 0 {
				opts = append(opts, fmt.Sprintf("mode=%o", o.Mode))
			}
			for _, kv := range o.Options {
				opts = append(opts, strings.Join(kv, "="))
			}
			m.Mode = strings.Join(opts, ",")
			if err := checkTmpfs(m.Mode); err != nil {
				return m, err
			}
		}
	case mount.TypeVolume:
		if s.Source != "" {
			if err := volume.CheckName(s.Source); err != nil {
				return m, invalid("%w", err)
			}
		}
		m.Name, m.Source = s.Source, ""
	default:
		return m, invalid("--mount type=%s is not supported yet, use bind, volume or tmpfs", s.Type)
	}
	return m, nil
}

// checkTmpfs refuses options of --tmpfs that the kernel's tmpfs or mount(2) doesn't have.
func checkTmpfs(opts string) error {
	if opts == "" {
		return nil
	}
	flags := []string{"ro", "rw", "exec", "noexec", "suid", "nosuid", "dev", "nodev", "atime", "noatime", "diratime", "nodiratime",
		"relatime", "norelatime", "strictatime", "nostrictatime", "sync", "async", "huge", "private", "rprivate"}
	keys := []string{"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol", "huge"}
	for _, o := range strings.Split(opts, ",") {
		k, _, hasValue := strings.Cut(o, "=")
		if hasValue && slices.Contains(keys, k) || !hasValue && slices.Contains(flags, k) {
			continue
		}
		return invalid("invalid tmpfs option: %q", o)
	}
	return nil
}
