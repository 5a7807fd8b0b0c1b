package cli

import (
	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/spf13/pflag"

	"conex/internal/container"
)

// containerFlags are the flags that run and create share, in groups, a file each.
type containerFlags struct {
	meta       metaFlags
	process    processFlags
	namespaces namespaceFlags
	limits     limitFlags
	devices    deviceFlags
	mounts     mountFlags
	security   securityFlags
	health     healthFlags
	logs       logFlags
	network    networkFlags
}

// flagGroup is one group of containerFlags.
type flagGroup interface {
	register(f *pflag.FlagSet)
	// apply writes what was given into t. An error is a mistake in the flags.
	apply(t *flagTarget) error
}

// flagTarget is what the flags of a new container become.
type flagTarget struct {
	// set tells what was given at all.
	set     *pflag.FlagSet
	config  *apic.Config
	host    *apic.HostConfig
	options *container.Options
	// networks are the container's, in order; the first one's name is host.NetworkMode.
	networks []container.Attachment
}

func (c *containerFlags) groups() []flagGroup {
	return []flagGroup{&c.meta, &c.process, &c.namespaces, &c.limits, &c.devices, &c.mounts, &c.security, &c.health, &c.logs, &c.network}
}

func (c *containerFlags) register(f *pflag.FlagSet) {
	f.SetInterspersed(false)
	noShortHelp(f)
	for _, g := range c.groups() {
		g.register(f)
	}
}

// configs turns the flags into Docker's two structs and what these have no field for. args are the image and its command.
func (c *containerFlags) configs(f *pflag.FlagSet, args []string) (*flagTarget, error) {
	if err := checkPull(c.meta.pull); err != nil {
		return nil, err
	}
	t := &flagTarget{
		set:     f,
		config:  &apic.Config{ExposedPorts: network.PortSet{}, Image: args[0]},
		host:    &apic.HostConfig{PortBindings: network.PortMap{}},
		options: &container.Options{},
	}
	if len(args) > 1 {
		t.config.Cmd = args[1:]
	}
	for _, g := range c.groups() {
		if err := g.apply(t); err != nil {
			return nil, err
		}
	}
	return t, nil
}
