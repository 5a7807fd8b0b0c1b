package cli

import (
	"errors"
	"fmt"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// logFlags say where the container's output is kept.
type logFlags struct {
	driver string
	opts   list
}

func (c *logFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.driver, "log-driver", "", "Logging driver for the container")
	f.Var(&c.opts, "log-opt", "Log driver options")
}

func (c *logFlags) apply(t *flagTarget) error {
	if c.driver == "none" && len(c.opts) > 0 {
		return errors.New("invalid logging opts for driver none")
	}
	t.host.LogConfig = apic.LogConfig{Type: c.driver, Config: map[string]string{}}
	for _, o := range c.opts {
		k, v, ok := strings.Cut(o, "=")
		if !ok || k == "" {
			return fmt.Errorf("invalid argument %q for \"--log-opt\" flag: expected name=value", o)
		}
		t.host.LogConfig.Config[k] = v
	}
	return nil
}
