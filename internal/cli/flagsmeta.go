package cli

import (
	"errors"
	"os"
	"strconv"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// metaFlags say what a container is called and when it comes and goes.
type metaFlags struct {
	name, platform, pull, cidfile, restart string
	quiet, rm                              bool
	label                                  list
}

func (c *metaFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.cidfile, "cidfile", "", "Write the container ID to the file")
	f.VarP(&c.label, "label", "l", "Set meta data on a container")
	f.StringVar(&c.name, "name", "", "Assign a name to the container")
	f.StringVar(&c.platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "Set the platform of the image to pull")
	f.StringVar(&c.pull, "pull", "missing", `Pull image before running ("always", "missing", "never")`)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "Suppress the pull output")
	f.StringVar(&c.restart, "restart", "no", "Restart policy to apply when a container exits")
	f.BoolVar(&c.rm, "rm", false, "Automatically remove the container when it exits")
	refuseAll(f,
		"annotation",
		"disable-content-trust?",
		"isolation",
		"label-file",
		"runtime",
		"use-api-socket?",
	)
}

func (c *metaFlags) apply(t *flagTarget) error {
	t.config.Labels = keyValues(c.label)
	t.host.ContainerIDFile, t.host.AutoRemove = c.cidfile, c.rm
	return c.setRestart(t.host)
}

func (c *metaFlags) setRestart(host *apic.HostConfig) error {
	name, n, limited := strings.Cut(c.restart, ":")
	p := apic.RestartPolicy{Name: apic.RestartPolicyMode(name)}
	if limited {
		count, err := strconv.Atoi(n)
		if err != nil {
			return errors.New("invalid restart policy format: maximum retry count must be an integer")
		}
		p.MaximumRetryCount = count
	}
	if err := apic.ValidateRestartPolicy(p); err != nil {
		return err
	}
	if c.rm && !p.IsNone() {
		return errors.New("conflicting options: cannot specify both --restart and --rm")
	}
	host.RestartPolicy = p
	return nil
}
