package engine

import (
	"os/exec"
	"path/filepath"

	"conex/internal/config"

	apic "github.com/moby/moby/api/types/container"
)

// RuntimeInfo describes a runtime; the path is empty for the built-in one.
type RuntimeInfo struct {
	Path string `json:"path"`
}

// knownRuntimes are looked for in $PATH without a word in the configuration.
var knownRuntimes = []string{"runc", "crun", "youki", "runsc"}

// runtimePath is the program of the runtime that --runtime names: "" for the built-in one.
func (e *Engine) runtimePath(name string) (string, error) {
	switch {
	case name == "" || name == config.BuiltinRuntime:
		return "", nil
	case e.cfg.Runtimes[name] != "":
		return e.cfg.Runtimes[name], nil
	case filepath.IsAbs(name):
		if _, err := exec.LookPath(name); err != nil {
			return "", invalid("runtime %s: %w", name, err)
		}
		return name, nil
	}
	for _, known := range knownRuntimes {
		if name != known {
			continue
		}
		path, err := exec.LookPath(name)
		if err != nil {
			return "", invalid("runtime %s is not installed: not found in $PATH", name)
		}
		return filepath.Abs(path)
	}
	return "", invalid("unknown or invalid runtime name: %s (name it in [runtimes] of %s, or give its path)", name, config.Path())
}

// validateRuntime refuses at create what runtimes of other programs are not asked for (runtime.External).
func (e *Engine) validateRuntime(hc *apic.HostConfig) error {
	path, err := e.runtimePath(hc.Runtime)
	if err != nil || path == "" {
		return err
	}
	if hc.Init != nil && *hc.Init {
		return invalid("--init needs the runtime conex")
	}
	return nil
}

// runtimes lists what --runtime takes by name.
func (e *Engine) runtimes() map[string]RuntimeInfo {
	out := map[string]RuntimeInfo{config.BuiltinRuntime: {}}
	for _, name := range knownRuntimes {
		if path, err := exec.LookPath(name); err == nil {
			out[name] = RuntimeInfo{path}
		}
	}
	for name, path := range e.cfg.Runtimes {
		out[name] = RuntimeInfo{path}
	}
	return out
}
