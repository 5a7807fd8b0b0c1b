package engine

import (
	"context"
	"os"
	"strings"

	"conex/internal/linux/caps"
	"conex/internal/linux/seccomp"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
)

// validateSecurity checks capabilities and --security-opt, and puts a seccomp profile's content in the place of its file name:
// the container must not depend on a file that may go.
func validateSecurity(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	names, err := caps.Resolve(caps.Default(), hc.CapAdd, hc.CapDrop, hc.Privileged)
	if err != nil {
		return invalid("%w", err)
	}
	opts := make([]string, len(hc.SecurityOpt))
	for i, opt := range hc.SecurityOpt {
		opts[i] = opt
		key, val, ok := strings.Cut(opt, "=")
		if !ok {
			key, val, ok = strings.Cut(opt, ":")
		}
		switch key {
		case "no-new-privileges":
			if ok && val != "true" && val != "false" {
				return invalid("invalid --security-opt 2: %q", opt)
			}
		case "systempaths":
			if val != "unconfined" {
				return invalid("invalid --security-opt: %q", opt)
			}
		case "apparmor":
			if val != "unconfined" && !runtime.AppArmor() {
				return invalid("--security-opt %s: this kernel has no AppArmor; only apparmor=unconfined is possible", opt)
			}
			if val == "" || strings.ContainsAny(val, "\x00\n ") {
				return invalid("invalid --security-opt: %q", opt)
			}
		case "label":
			if val != "disable" {
				return invalid("--security-opt %s: conex has no SELinux labels; only label=disable is possible", opt)
			}
		case "writable-cgroups":
			if ok && val != "true" && val != "false" {
				return invalid("invalid --security-opt 2: %q", opt)
			}
		case "seccomp":
			switch {
			case val == "unconfined" || val == "builtin" || val == "default":
			case val == "":
				return invalid("invalid --security-opt: %q", opt)
			default:
				profile := []byte(val)
				if !strings.HasPrefix(strings.TrimSpace(val), "{") {
					if profile, err = os.ReadFile(val); err != nil {
						return invalid("opening seccomp profile (%s) failed: %w", val, err)
					}
				}
				if _, err := seccomp.Parse(profile, names); err != nil {
					return invalid("seccomp profile: %w", err)
				}
				opts[i] = "seccomp=" + string(profile)
			}
		default:
			return invalid("invalid --security-opt: %q", opt)
		}
	}
	if len(opts) > 0 {
		hc.SecurityOpt = opts
	}
	return nil
}

// capNames spells capabilities as Docker keeps them: ALL, or CAP_ and capitals.
func capNames(names []string) []string {
	var out []string
	for _, n := range names {
		if n = strings.ToUpper(n); n != "ALL" && !strings.HasPrefix(n, "CAP_") {
			n = "CAP_" + n
		}
		out = append(out, n)
	}
	return out
}
