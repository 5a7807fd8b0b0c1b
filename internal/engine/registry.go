package engine

import "conex/internal/registry"

// registryClient returns a client that reaches registries as the configuration says. Close it.
func (e *Engine) registryClient() *registry.Client { return registry.New(e.cfg.Registry) }
