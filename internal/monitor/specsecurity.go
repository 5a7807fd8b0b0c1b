package monitor

import (
	"fmt"
	"slices"
	"strings"

	"conex/internal/linux/seccomp"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
)

// security applies --security-opt. The engine has checked the options and put a profile's content in the place of its file name.
func security(c *runtime.Config, hc *apic.HostConfig, capNames []string) error {
	for _, opt := range hc.SecurityOpt {
		key, val, ok := strings.Cut(opt, "=")
		if !ok {
			key, val, _ = strings.Cut(opt, ":")
		}
		switch key {
		case "no-new-privileges":
			c.Spec.Process.NoNewPrivileges = val == "" || val == "true"
		case "apparmor":
			c.Spec.Process.ApparmorProfile = val
		case "writable-cgroups":
			if val == "false" {
				continue
			}
			for i, m := range c.Spec.Mounts {
				if m.Type == "cgroup" {
					c.Spec.Mounts[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
				}
			}
		case "seccomp":
			switch val {
			case "unconfined":
				c.DefaultSeccomp = false
			case "builtin", "default":
			default:
				p, err := seccomp.Parse([]byte(val), capNames)
				if err != nil {
					return fmt.Errorf("seccomp profile: %w", err)
				}
				c.DefaultSeccomp, c.Spec.Linux.Seccomp = false, p
			}
		case "systempaths":
			if val == "unconfined" {
				c.Spec.Linux.MaskedPaths, c.Spec.Linux.ReadonlyPaths = nil, nil
			}
		}
	}
	if hc.MaskedPaths != nil {
		c.Spec.Linux.MaskedPaths = hc.MaskedPaths
	}
	if hc.ReadonlyPaths != nil {
		c.Spec.Linux.ReadonlyPaths = hc.ReadonlyPaths
	}
	return nil
}
