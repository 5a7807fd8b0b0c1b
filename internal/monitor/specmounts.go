package monitor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"conex/internal/container"
	lmount "conex/internal/linux/mount"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mounts adds the generated files and the record's mounts. A mount of the user's replaces a default one at the same place.
func mounts(c *runtime.Config, r *container.Record, files string, from sources) error {
	s := c.Spec
	var add []specs.Mount
	if files != "" {
		for name, dst := range generated {
			opts := []string{"rbind", "rprivate"}
			if r.HostConfig.ReadonlyRootfs {
				opts = append(opts, "ro")
			}
			if r.Options.Users != nil {
				opts = append(opts, "idmap")
			}
			add = append(add, specs.Mount{Destination: dst, Type: "bind", Source: files + "/" + name, Options: opts})
		}
	}
	for _, m := range r.Mounts {
		// The user's own /etc/hosts stands in for the generated one.
		add = slices.DeleteFunc(add, func(o specs.Mount) bool { return o.Destination == m.Destination })
		s.Mounts = slices.DeleteFunc(s.Mounts, func(o specs.Mount) bool {
			return o.Destination == m.Destination && strings.HasPrefix(o.Destination, "/dev")
		})
		more := r.More[m.Destination]
		om := specs.Mount{Destination: m.Destination, Source: m.Source, Type: "bind"}
		switch m.Type {
		case mount.TypeTmpfs:
			om.Type, om.Source = "tmpfs", "tmpfs"
			om.Options = []string{"noexec", "nosuid", "nodev"}
			if opts := cmp.Or(more.Options, m.Mode); opts != "" { // records of before have them in Mode
				for _, o := range strings.Split(opts, ",") {
					om.Options = setOption(om.Options, o)
				}
			}
			if !m.RW {
				om.Options = setOption(om.Options, "ro")
			}
		case mount.TypeImage:
			om.Options = []string{"rbind", "rprivate", "rro", "rnosuid", "rnodev"}
			source(c, m.Destination, func(src *runtime.Source) { src.Lower, src.Subpath = from.images[m.Destination], more.Subpath })
		default:
			if m.Type == mount.TypeVolume {
				om.Source = from.volumes[m.Name]
			}
			om.Options = bindOptions(r, m, more)
			if o, ok := from.overlays[m.Destination]; ok {
				source(c, m.Destination, func(src *runtime.Source) { src.Overlay = &o })
			}
			if more.Subpath != "" {
				source(c, m.Destination, func(src *runtime.Source) { src.Subpath = more.Subpath })
			}
			if o := more.Owner; o != nil {
				own, err := ownerOf(om.Source, o)
				if err != nil {
					return err
				}
				source(c, m.Destination, func(src *runtime.Source) { src.Owner = own })
			}
		}
		add = append(add, om)
	}
	// Parents before what is mounted in them.
	slices.SortStableFunc(add, func(a, b specs.Mount) int {
		return cmp.Or(cmp.Compare(strings.Count(a.Destination, "/"), strings.Count(b.Destination, "/")), cmp.Compare(a.Destination, b.Destination))
	})
	s.Mounts = append(s.Mounts, add...)
	return nil
}

// source changes what the runtime knows of the source of the mount at dst.
func source(c *runtime.Config, dst string, change func(*runtime.Source)) {
	src := c.Sources[dst]
	change(&src)
	if c.Sources == nil {
		c.Sources = map[string]runtime.Source{}
	}
	c.Sources[dst] = src
}

// makeSources sees to the sources of a container's binds before they are mounted.
func makeSources(r *container.Record) error {
	for _, m := range r.Mounts {
		if m.Type == mount.TypeBind {
			if err := bindable(m, r.More[m.Destination]); err != nil {
				return err
			}
		}
	}
	return nil
}

// bindable makes the source of a bind where Docker does, and sees whether its mount is what the propagation needs.
func bindable(m apic.MountPoint, more container.Mount) error {
	if !more.MustExist {
		if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(m.Source, 0o755); err != nil {
				return fmt.Errorf("error while creating mount source path '%s': %w", m.Source, err)
			}
		}
	}
	var slave bool
	switch m.Propagation {
	case mount.PropagationShared, mount.PropagationRShared:
	case mount.PropagationSlave, mount.PropagationRSlave:
		slave = true
	default:
		return nil
	}
	at, isShared, isSlave, err := lmount.Propagation(m.Source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the mount says so
	}
	switch {
	case err != nil:
		return err
	case slave && !isShared && !isSlave:
		return fmt.Errorf("path %s is mounted on %s but it is not a shared or slave mount", m.Source, at)
	case !slave && !isShared:
		return fmt.Errorf("path %s is mounted on %s but it is not a shared mount", m.Source, at)
	}
	return nil
}

func bindOptions(r *container.Record, m apic.MountPoint, more container.Mount) []string {
	opts := []string{"rbind", string(cmp.Or(m.Propagation, mount.PropagationRPrivate))}
	if more.NonRecursive {
		opts[0] = "bind"
	}
	switch {
	case m.RW:
	case more.WritableBelow:
		opts = append(opts, "ro")
	default:
		opts = append(opts, "rro")
	}
	if m.Type == mount.TypeVolume && r.Options.Users != nil {
		opts = append(opts, "idmap")
	}
	return opts
}

// ownerOf says whom files in a bind's source are to belong to.
func ownerOf(path string, o *container.Owner) (*runtime.Owner, error) {
	if !o.Source {
		return &runtime.Owner{UID: o.UID, GID: o.GID}, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("bind source path does not exist: %s: %w", path, err)
	}
	return &runtime.Owner{UID: st.Uid, GID: st.Gid}, nil
}

// generated are the files of the container's folder that are mounted over its own.
var generated = map[string]string{"hosts": "/etc/hosts", "hostname": "/etc/hostname", "resolv.conf": "/etc/resolv.conf"}

// setOption adds a mount option in the place of its opposite or of an older value.
func setOption(opts []string, opt string) []string {
	name, _, hasValue := strings.Cut(opt, "=")
	return append(slices.DeleteFunc(slices.Clone(opts), func(o string) bool {
		if hasValue {
			return strings.HasPrefix(o, name+"=")
		}
		return o == opt || o == "no"+opt || "no"+o == opt || opt == "ro" && o == "rw" || opt == "rw" && o == "ro"
	}), opt)
}
