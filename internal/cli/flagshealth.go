package cli

import (
	"errors"
	"fmt"
	"time"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// healthFlags say how the container's health is checked.
type healthFlags struct {
	cmd, onFailure                                string
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
	none                                          bool
}

func (c *healthFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.cmd, "health-cmd", "", "Command to run to check health, or a probe: http://:PORT/PATH, tcp://:PORT")
	f.DurationVar(&c.interval, "health-interval", 0, "Time between running the check (ms|s|m|h) (default 30s)")
	f.StringVar(&c.onFailure, "health-on-failure", "none", `What to do when the container becomes unhealthy ("none", "kill", "restart", "stop")`)
	f.IntVar(&c.retries, "health-retries", 0, "Consecutive failures needed to report unhealthy (default 3)")
	f.DurationVar(&c.startInterval, "health-start-interval", 0, "Time between running the check during the start period (ms|s|m|h) (default 5s)")
	f.DurationVar(&c.startPeriod, "health-start-period", 0, "Start period for the container to initialize before starting health-retries countdown (ms|s|m|h)")
	f.DurationVar(&c.timeout, "health-timeout", 0, "Maximum time to allow one check to run (ms|s|m|h) (default 30s)")
	f.BoolVar(&c.none, "no-healthcheck", false, "Disable any container-specified HEALTHCHECK")
}

func (c *healthFlags) apply(t *flagTarget) error {
	switch c.onFailure {
	case "none", "":
	case "kill", "restart", "stop":
		if c.none {
			return errors.New("--no-healthcheck conflicts with --health-on-failure")
		}
		t.options.HealthOnFailure = c.onFailure
	default:
		return fmt.Errorf("invalid --health-on-failure %q: must be one of \"none\", \"kill\", \"restart\" or \"stop\"", c.onFailure)
	}
	given := c.cmd != "" || c.interval != 0 || c.timeout != 0 || c.startPeriod != 0 || c.startInterval != 0 || c.retries != 0
	if c.none {
		if given {
			return errors.New("--no-healthcheck conflicts with --health-* options")
		}
		t.config.Healthcheck = &apic.HealthConfig{Test: []string{"NONE"}}
		return nil
	}
	if !given {
		return nil
	}
	for _, d := range []struct {
		name  string
		value int64
	}{
		{"interval", int64(c.interval)}, {"timeout", int64(c.timeout)}, {"retries", int64(c.retries)},
		{"start-period", int64(c.startPeriod)}, {"start-interval", int64(c.startInterval)},
	} {
		if d.value < 0 {
			return fmt.Errorf("--health-%s cannot be negative", d.name)
		}
	}
	h := &apic.HealthConfig{
		Interval: c.interval, Timeout: c.timeout, StartPeriod: c.startPeriod, StartInterval: c.startInterval, Retries: c.retries,
	}
	if c.cmd != "" {
		h.Test = []string{"CMD-SHELL", c.cmd}
	}
	t.config.Healthcheck = h
	return nil
}
