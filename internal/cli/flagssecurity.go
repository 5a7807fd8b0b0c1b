package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// securityFlags are what the container's processes may do.
type securityFlags struct {
	capAdd, capDrop, secOpt list
	privileged              bool
}

func (c *securityFlags) register(f *pflag.FlagSet) {
	f.Var(&c.capAdd, "cap-add", "Add Linux capabilities")
	f.Var(&c.capDrop, "cap-drop", "Drop Linux capabilities")
	f.BoolVar(&c.privileged, "privileged", false, "Give extended privileges to this container")
	f.Var(&c.secOpt, "security-opt", "Security Options")
}

func (c *securityFlags) apply(t *flagTarget) error {
	t.host.CapAdd, t.host.CapDrop, t.host.Privileged = c.capAdd, c.capDrop, c.privileged
	return c.setSecurity(t.host)
}

// setSecurity reads --security-opt. A seccomp profile is read here, where the user's path means something, and handed on as text.
func (c *securityFlags) setSecurity(host *apic.HostConfig) error {
	for _, o := range c.secOpt {
		k, v, ok := strings.Cut(o, "=")
		if !ok {
			k, v, ok = strings.Cut(o, ":") // Docker's old form
		}
		switch {
		case (k == "no-new-privileges" || k == "writable-cgroups") && !ok:
		case !ok || v == "":
			return fmt.Errorf("invalid --security-opt: %q", o)
		case k == "systempaths" && v == "unconfined":
			host.MaskedPaths, host.ReadonlyPaths = []string{}, []string{}
			continue
		case k == "seccomp" && v != "unconfined" && v != "builtin":
			raw, err := os.ReadFile(v)
			if err != nil {
				return fmt.Errorf("opening seccomp profile (%s) failed: %w", v, err)
			}
			var compact bytes.Buffer
			if err := json.Compact(&compact, raw); err != nil {
				return fmt.Errorf("compacting json for seccomp profile (%s) failed: %w", v, err)
			}
			o = "seccomp=" + compact.String()
		case k == "seccomp", k == "no-new-privileges", k == "apparmor", k == "label", k == "writable-cgroups":
			o = k + "=" + v
		default:
			return fmt.Errorf("invalid --security-opt: %q", o)
		}
		host.SecurityOpt = append(host.SecurityOpt, o)
	}
	return nil
}
