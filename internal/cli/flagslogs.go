package cli

import "github.com/spf13/pflag"

// logFlags say where the container's output is kept.
type logFlags struct{}

func (c *logFlags) register(f *pflag.FlagSet) {
	refuseAll(f,
		"log-driver",
		"log-opt",
	)
}

func (c *logFlags) apply(*flagTarget) error { return nil }
