package cli

import (
	"fmt"
	"path"
	"strings"

	"github.com/moby/moby/api/types/mount"
	"github.com/spf13/pflag"
)

// mountFlags are what is mounted into the container, and its root.
type mountFlags struct {
	volumes, mounts, tmpfs  list
	volumesFrom, storageOpt list
	volumeDriver            string
	readOnly                bool
}

func (c *mountFlags) register(f *pflag.FlagSet) {
	f.Var(&c.mounts, "mount", "Attach a filesystem mount to the container")
	f.BoolVar(&c.readOnly, "read-only", false, "Mount the container's root filesystem as read only")
	f.Var(&c.storageOpt, "storage-opt", "Storage driver options for the container (size=BYTES)")
	f.Var(&c.tmpfs, "tmpfs", "Mount a tmpfs directory")
	f.VarP(&c.volumes, "volume", "v", "Bind mount a folder or file of the host, or a volume")
	f.StringVar(&c.volumeDriver, "volume-driver", "", "Optional volume driver for the container")
	f.Var(&c.volumesFrom, "volumes-from", "Mount volumes from the specified container(s)")
}

func (c *mountFlags) apply(t *flagTarget) error {
	cfg, host := t.config, t.host
	host.ReadonlyRootfs, host.VolumeDriver, host.VolumesFrom = c.readOnly, c.volumeDriver, c.volumesFrom
	ownOptions := func(target string, own ownOptions) {
		if own.idMap != "" {
			t.options.IDMap = with(t.options.IDMap, path.Clean(target), own.idMap)
		}
		if own.overlay != "" {
			t.options.Overlay = with(t.options.Overlay, path.Clean(target), own.overlay)
		}
	}
	for _, v := range c.volumes {
		bind, anonymous, own, err := parseVolume(v)
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
		ownOptions(strings.SplitN(bind, ":", 3)[1], own)
	}
	for _, v := range c.tmpfs {
		target, options, err := parseTmpfs(v)
		if err != nil {
			return err
		}
		if host.Tmpfs == nil {
			host.Tmpfs = map[string]string{}
		}
		host.Tmpfs[target] = options
	}
	for _, v := range c.mounts {
		m, own, err := parseMount(v)
		if err != nil {
			return fmt.Errorf("invalid argument %q for \"--mount\" flag: %w", v, err)
		}
		if m.Type != mount.TypeBind && m.Type != mount.TypeVolume {
			for name, val := range map[string]string{"idmap": own.idMap, "overlay": own.overlay} {
				if val != "" {
					return fmt.Errorf("invalid argument %q for \"--mount\" flag: cannot mix '%s' with mount type '%s'", v, name, m.Type)
				}
			}
		}
		ownOptions(m.Target, own)
		host.Mounts = append(host.Mounts, m)
	}
	for _, o := range c.storageOpt {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			return fmt.Errorf("invalid storage option")
		}
		if host.StorageOpt == nil {
			host.StorageOpt = map[string]string{}
		}
		host.StorageOpt[k] = v
	}
	return nil
}

// with sets a key in a map that may be nil.
func with(in map[string]string, key, val string) map[string]string {
	if in == nil {
		in = map[string]string{}
	}
	in[key] = val
	return in
}
