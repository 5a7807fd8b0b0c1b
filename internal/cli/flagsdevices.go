package cli

import "github.com/spf13/pflag"

// deviceFlags are the host's devices that the container may use.
type deviceFlags struct{}

func (c *deviceFlags) register(f *pflag.FlagSet) {
	refuseAll(f,
		"device",
		"gpus",
	)
}

func (c *deviceFlags) apply(*flagTarget) error { return nil }
