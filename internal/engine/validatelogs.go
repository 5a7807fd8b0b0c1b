package engine

import (
	"cmp"
	"context"
	"maps"
	"strings"

	"conex/internal/container"
	"conex/internal/logs"

	apic "github.com/moby/moby/api/types/container"
)

// validateLogs writes the configuration's driver and options down where a container names none, and checks them: the options of the
// configuration are for its driver, and those of copies ("cache-") for all.
func (e *Engine) validateLogs(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	def := cmp.Or(e.cfg.Log.Driver, logs.Local)
	driver := cmp.Or(hc.LogConfig.Type, def)
	opts := map[string]string{}
	for k, v := range e.cfg.Log.Options {
		if driver == def || driver != logs.None && strings.HasPrefix(k, "cache-") {
			opts[k] = v
		}
	}
	maps.Copy(opts, hc.LogConfig.Config)
	hc.LogConfig = apic.LogConfig{Type: driver, Config: opts}
	if _, err := logs.ParseOptions(driver, opts); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// logOptions are those that a container's log is written with.
func (e *Engine) logOptions(r *container.Record) (logs.Options, error) {
	c := r.HostConfig.LogConfig
	if c.Type == "" { // a record of before the driver was kept in it
		c = apic.LogConfig{Type: e.cfg.Log.Driver, Config: e.cfg.Log.Options}
	}
	return logs.ParseOptions(c.Type, c.Config)
}
