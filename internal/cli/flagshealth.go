package cli

import "github.com/spf13/pflag"

// healthFlags say how the container's health is checked.
type healthFlags struct{}

func (c *healthFlags) register(f *pflag.FlagSet) {
	refuseAll(f,
		"health-cmd",
		"health-interval",
		"health-retries",
		"health-start-interval",
		"health-start-period",
		"health-timeout",
		"no-healthcheck?",
	)
}

func (c *healthFlags) apply(*flagTarget) error { return nil }
