package engine

import (
	"conex/internal/credentials"
	"conex/internal/registry"
)

// registryClient returns a client that reaches registries as the configuration says, with what the user has logged in with. Close it.
func (e *Engine) registryClient() *registry.Client { return registry.New(e.registryOptions()) }

func (e *Engine) registryOptions() registry.Options {
	dirs := e.cfg.CertDirs
	if dirs == nil {
		dirs = registry.HostDirs()
	}
	return registry.Options{Registry: e.cfg.Registry, Credentials: credentials.Open(), HostDirs: dirs}
}
