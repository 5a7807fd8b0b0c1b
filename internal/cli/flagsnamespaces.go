package cli

import "github.com/spf13/pflag"

// namespaceFlags say which namespaces the container shares, and what its own are called.
type namespaceFlags struct {
	hostname string
}

func (c *namespaceFlags) register(f *pflag.FlagSet) {
	f.StringVarP(&c.hostname, "hostname", "h", "", "Container host name")
	refuseAll(f,
		"cgroupns",
		"domainname",
		"ipc",
		"pid",
		"sysctl",
		"userns",
		"uts",
	)
}

func (c *namespaceFlags) apply(t *flagTarget) error {
	t.config.Hostname = c.hostname
	return nil
}
