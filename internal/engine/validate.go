package engine

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"strings"

	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
)

// validate checks a request against this engine and normalises it. It returns Docker-like warnings.
func (e *Engine) validate(ctx context.Context, conf *apic.Config, hc *apic.HostConfig) (warnings []string, err error) {
	if conf.WorkingDir != "" {
		if !path.IsAbs(conf.WorkingDir) {
			return nil, invalid("the working directory '%s' is invalid, it needs to be an absolute path", conf.WorkingDir)
		}
		conf.WorkingDir = path.Clean(conf.WorkingDir)
	}
	if conf.StopSignal != "" {
		if _, err := container.ParseSignal(conf.StopSignal); err != nil {
			return nil, invalid("%w", err)
		}
	}
	for _, env := range conf.Env {
		if name, _, _ := strings.Cut(env, "="); name == "" || strings.ContainsRune(env, 0) {
			return nil, invalid("invalid environment variable: %s", env)
		}
	}
	if len(conf.Hostname) > 64 {
		return nil, invalid("hostname %q is too long (maximum 64 bytes)", conf.Hostname)
	}
	if strings.ContainsAny(conf.Domainname, " /\x00\n") || len(conf.Domainname) > 64 {
		return nil, invalid("invalid domainname: %q", conf.Domainname)
	}
	if strings.ContainsAny(conf.Hostname, " /\x00\n") {
		return nil, invalid("invalid hostname: %q", conf.Hostname)
	}
	for _, check := range []func(context.Context, *apic.Config, *apic.HostConfig) error{
		e.validateNetwork,
		e.validateModes,
		validateUsers,
		e.validateStorage,
		validateRestart,
		validateSecurity,
		validateDevices,
		validateHealth,
		e.validateLogs,
	} {
		if err := check(ctx, conf, hc); err != nil {
			return nil, err
		}
	}
	if warnings, err = e.validateLimits(hc); err != nil {
		return warnings, err
	}
	fill(hc)
	if (hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone()) && (len(hc.PortBindings) > 0 || hc.PublishAllPorts) {
		warnings = append(warnings, fmt.Sprintf("Published ports are discarded when using %s network mode", hc.NetworkMode))
	}
	return append(warnings, ulimitWarnings(hc.Ulimits)...), nil
}

// defaultShmSize is /dev/shm's, in bytes; Docker's.
const defaultShmSize = 64 << 20

// fill writes down the defaults that the container runs by, where Docker writes them: `inspect` shows them, and a later change of
// the configuration does not reach containers that exist.
func fill(hc *apic.HostConfig) {
	if hc.Memory > 0 && hc.MemorySwap == 0 {
		hc.MemorySwap = 2 * hc.Memory
	}
	if hc.ShmSize == 0 {
		hc.ShmSize = defaultShmSize
	}
	hc.IpcMode = cmp.Or(hc.IpcMode, apic.IPCModePrivate)
	hc.CgroupnsMode = cmp.Or(hc.CgroupnsMode, apic.CgroupnsModePrivate)
	hc.Runtime = cmp.Or(hc.Runtime, "conex")
	hc.CapAdd, hc.CapDrop = capNames(hc.CapAdd), capNames(hc.CapDrop)
}

func validateRestart(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	p := hc.RestartPolicy
	if err := checkRestartPolicy(p); err != nil {
		return err
	}
	if hc.AutoRemove && p.Name != "" && p.Name != apic.RestartPolicyDisabled {
		return invalid("can't create 'AutoRemove' container with restart policy")
	}
	return nil
}

func checkRestartPolicy(p apic.RestartPolicy) error {
	switch p.Name {
	case "", apic.RestartPolicyDisabled, apic.RestartPolicyAlways, apic.RestartPolicyUnlessStopped:
		if p.MaximumRetryCount != 0 {
			return invalid("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		}
	case apic.RestartPolicyOnFailure:
		if p.MaximumRetryCount < 0 {
			return invalid("invalid restart policy: maximum retry count cannot be negative")
		}
	default:
		return invalid("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", p.Name)
	}
	return nil
}
