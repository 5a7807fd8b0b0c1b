package monitor

import (
	"cmp"
	"slices"
	"strings"

	"conex/internal/container"

	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// mounts adds the generated files and the record's mounts. A mount of the user's replaces a default one at the same place.
func mounts(s *specs.Spec, r *container.Record, files string) {
	var add []specs.Mount
	if files != "" {
		for name, dst := range generated {
			opts := []string{"rbind", "rprivate"}
			if r.HostConfig.ReadonlyRootfs {
				opts = append(opts, "ro")
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
		om := specs.Mount{Destination: m.Destination, Source: m.Source, Type: "bind"}
		switch m.Type {
		case mount.TypeTmpfs:
			om.Type, om.Source = "tmpfs", "tmpfs"
			om.Options = []string{"noexec", "nosuid", "nodev"}
			if m.Mode != "" {
				for _, o := range strings.Split(m.Mode, ",") {
					om.Options = setOption(om.Options, o)
				}
			}
			if !m.RW {
				om.Options = setOption(om.Options, "ro")
			}
		default:
			om.Options = []string{"rbind", string(cmp.Or(m.Propagation, mount.PropagationRPrivate))}
			if !m.RW {
				om.Options = append(om.Options, "rro")
			}
		}
		add = append(add, om)
	}
	// Parents before what is mounted in them.
	slices.SortStableFunc(add, func(a, b specs.Mount) int {
		return cmp.Or(cmp.Compare(strings.Count(a.Destination, "/"), strings.Count(b.Destination, "/")), cmp.Compare(a.Destination, b.Destination))
	})
	s.Mounts = append(s.Mounts, add...)
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
