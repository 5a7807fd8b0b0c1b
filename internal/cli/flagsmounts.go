package cli

import (
	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/spf13/pflag"
)

// mountFlags are what is mounted into the container, and its root.
type mountFlags struct {
	volumes, mounts, tmpfs list
	readOnly               bool
}

func (c *mountFlags) register(f *pflag.FlagSet) {
	f.Var(&c.mounts, "mount", "Attach a filesystem mount to the container")
	f.BoolVar(&c.readOnly, "read-only", false, "Mount the container's root filesystem as read only")
	f.Var(&c.tmpfs, "tmpfs", "Mount a tmpfs directory")
	f.VarP(&c.volumes, "volume", "v", "Bind mount a folder or file of the host, or a volume")
	refuseAll(f,
		"storage-opt",
		"volume-driver",
		"volumes-from",
	)
}

func (c *mountFlags) apply(t *flagTarget) error {
	cfg, host := t.config, t.host
	host.ReadonlyRootfs = c.readOnly
	for _, v := range c.volumes {
		bind, anonymous, err := parseVolume(v)
		if err != nil {
			return err
		}
		if anonymous != "" {
			if cfg.Volumes == nil {
				cfg.Volumes = map[string]struct{}{}
			}
			cfg.Volumes[anonymous] = struct{}{}
			continue
		}
		host.Binds = append(host.Binds, bind)
	}
	for _, v := range c.tmpfs {
		target, options, err := parseTmpfs(v)
		if err != nil {
			return err
		}
		addTmpfs(host, target, options)
	}
	for _, v := range c.mounts {
		m, tmpfs, err := parseMount(v)
		if err != nil {
			return err
		}
		if m.Type == mount.TypeTmpfs {
			addTmpfs(host, m.Target, tmpfs)
			continue
		}
		host.Mounts = append(host.Mounts, m)
	}
	return nil
}

func addTmpfs(host *apic.HostConfig, target, options string) {
	if host.Tmpfs == nil {
		host.Tmpfs = map[string]string{}
	}
	host.Tmpfs[target] = options
}
