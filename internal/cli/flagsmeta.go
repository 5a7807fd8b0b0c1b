package cli

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// metaFlags say what a container is called and when it comes and goes.
type metaFlags struct {
	name, platform, pull, cidfile, restart, runtime string
	quiet, rm, trustless                            bool
	isolation                                       string
	label, labelFile, annotation                    list
}

func (c *metaFlags) register(f *pflag.FlagSet) {
	f.Var(&c.annotation, "annotation", "Add an annotation to the container (passed through to the OCI runtime)")
	f.StringVar(&c.cidfile, "cidfile", "", "Write the container ID to the file")
	f.BoolVar(&c.trustless, "disable-content-trust", true, "Skip image verification")
	f.StringVar(&c.isolation, "isolation", "", "Container isolation technology")
	f.VarP(&c.label, "label", "l", "Set meta data on a container")
	f.Var(&c.labelFile, "label-file", "Read in a line delimited file of labels")
	f.StringVar(&c.name, "name", "", "Assign a name to the container")
	f.StringVar(&c.platform, "platform", os.Getenv("DOCKER_DEFAULT_PLATFORM"), "Set the platform of the image to pull")
	f.StringVar(&c.pull, "pull", "missing", `Pull image before running ("always", "missing", "never")`)
	f.BoolVarP(&c.quiet, "quiet", "q", false, "Suppress the pull output")
	f.StringVar(&c.restart, "restart", "no", "Restart policy to apply when a container exits")
	f.StringVar(&c.runtime, "runtime", "", "Runtime to use for this container: conex, runc, crun, a name from the configuration, or a path")
	f.BoolVar(&c.rm, "rm", false, "Automatically remove the container when it exits")
	refuse(f, "use-api-socket", "", "bool", "there is no API socket to mount: conex has no daemon")
}

func (c *metaFlags) apply(t *flagTarget) error {
	if !c.trustless {
		return errors.New("--disable-content-trust=false is refused: conex does not verify signatures of images")
	}
	if !apic.Isolation(c.isolation).IsDefault() {
		return fmt.Errorf("invalid isolation %q: linux only supports 'default'", c.isolation)
	}
	t.host.Isolation = apic.Isolation(c.isolation)
	if err := c.setLabels(t); err != nil {
		return err
	}
	t.host.ContainerIDFile, t.host.AutoRemove, t.host.Runtime = c.cidfile, c.rm, c.runtime
	return c.setRestart(t.host)
}

// setLabels reads --label-file, --label, which stands above it, and --annotation.
func (c *metaFlags) setLabels(t *flagTarget) error {
	var labels []string
	for _, name := range c.labelFile {
		lines, err := readKeyFile(name, nil)
		if err != nil {
			return err
		}
		labels = append(labels, lines...)
	}
	for _, l := range c.label {
		if err := checkLabel(l, "-l, --label"); err != nil {
			return err
		}
	}
	t.config.Labels = keyValues(append(labels, c.label...))
	if len(c.annotation) == 0 {
		return nil
	}
	t.host.Annotations = keyValues(c.annotation)
	if _, empty := t.host.Annotations[""]; empty {
		return errors.New("invalid Annotations: the empty string is not permitted as an annotation key")
	}
	return nil
}

// parseRestart reads a restart policy: NAME or on-failure:COUNT.
func parseRestart(s string) (apic.RestartPolicy, error) {
	name, n, limited := strings.Cut(s, ":")
	p := apic.RestartPolicy{Name: apic.RestartPolicyMode(name)}
	if limited {
		count, err := strconv.Atoi(n)
		if err != nil {
			return p, errors.New("invalid restart policy format: maximum retry count must be an integer")
		}
		p.MaximumRetryCount = count
	}
	return p, apic.ValidateRestartPolicy(p)
}

func (c *metaFlags) setRestart(host *apic.HostConfig) error {
	p, err := parseRestart(c.restart)
	if err != nil {
		return err
	}
	if c.rm && !p.IsNone() {
		return errors.New("conflicting options: cannot specify both --restart and --rm")
	}
	host.RestartPolicy = p
	return nil
}
