package engine

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"

	"conex/internal/container"
	"conex/internal/linux/caps"
	"conex/internal/linux/seccomp"
	"conex/internal/resolver"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// minMemory is Docker's least --memory, in bytes: below it nothing starts.
const minMemory = 6 << 20

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
	if len(conf.Hostname) > 64 || strings.ContainsAny(conf.Hostname, " /\x00\n") {
		return nil, invalid("invalid hostname: %q", conf.Hostname)
	}
	for _, check := range []func(context.Context, *apic.Config, *apic.HostConfig) error{
		e.validateNetwork, validateModes, validateLimits, validateRestart, validateSecurity,
	} {
		if err := check(ctx, conf, hc); err != nil {
			return nil, err
		}
	}
	e.fill(hc)
	if (hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone()) && (len(hc.PortBindings) > 0 || hc.PublishAllPorts) {
		warnings = append(warnings, fmt.Sprintf("Published ports are discarded when using %s network mode", hc.NetworkMode))
	}
	return warnings, nil
}

// defaultShmSize is /dev/shm's, in bytes; Docker's.
const defaultShmSize = 64 << 20

// fill writes down the defaults that the container runs by, where Docker writes them: `inspect` shows them, and a later change of
// the configuration does not reach containers that exist.
func (e *Engine) fill(hc *apic.HostConfig) {
	if hc.LogConfig.Type == "" {
		opts := maps.Clone(e.cfg.Log.Options)
		if opts == nil {
			opts = map[string]string{}
		}
		maps.Copy(opts, hc.LogConfig.Config)
		hc.LogConfig = apic.LogConfig{Type: e.cfg.Log.Driver, Config: opts}
	}
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

func (e *Engine) validateNetwork(ctx context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.NetworkMode == "" || hc.NetworkMode.IsDefault():
		hc.NetworkMode = mnet.NetworkBridge
	case hc.NetworkMode.IsContainer():
		return invalid("--network container:… is not supported yet, use bridge, none or host")
	case hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone():
	default:
		if _, err := e.Networks().Network(ctx, string(hc.NetworkMode)); err != nil {
			return classify(err)
		}
	}
	for p, bindings := range hc.PortBindings {
		if p.Proto() != mnet.TCP && p.Proto() != mnet.UDP {
			return invalid("publish port %s: protocol %s is not supported, use tcp or udp", p, p.Proto())
		}
		for _, b := range bindings {
			first, last, isRange := strings.Cut(b.HostPort, "-")
			n, err := strconv.ParseUint(first, 10, 16)
			if err == nil && isRange {
				var m uint64
				if m, err = strconv.ParseUint(last, 10, 16); err == nil && m < n {
					err = fmt.Errorf("%d is less than %d", m, n)
				}
			}
			if err != nil && b.HostPort != "" {
				return invalid("invalid hostPort: %s", b.HostPort)
			}
		}
	}
	if _, err := resolver.ExpandHosts(hc.ExtraHosts, netip.AddrFrom4([4]byte{127, 0, 0, 1})); err != nil {
		return invalid("%w", err)
	}
	return nil
}

// validateModes refuses to share namespaces in ways that are not there, by name.
func validateModes(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	bad := func(flag, val string) error { return invalid("--%s %s is not supported yet", flag, val) }
	switch {
	case hc.PidMode != "" && hc.PidMode != "private" && !hc.PidMode.IsHost():
		return bad("pid", string(hc.PidMode))
	case !hc.IpcMode.IsEmpty() && !hc.IpcMode.IsPrivate() && !hc.IpcMode.IsShareable() && !hc.IpcMode.IsHost():
		return bad("ipc", string(hc.IpcMode))
	case !hc.UTSMode.Valid():
		return bad("uts", string(hc.UTSMode))
	case !hc.CgroupnsMode.Valid():
		return bad("cgroupns", string(hc.CgroupnsMode))
	case hc.UsernsMode != "" && !hc.UsernsMode.IsHost():
		return bad("userns", string(hc.UsernsMode))
	case len(hc.VolumesFrom) > 0:
		return bad("volumes-from", hc.VolumesFrom[0])
	case len(hc.Links) > 0:
		return bad("link", hc.Links[0])
	case hc.Runtime != "" && hc.Runtime != "conex" && hc.Runtime != "runc":
		return bad("runtime", hc.Runtime)
	case len(hc.DeviceRequests) > 0:
		return bad("gpus", "")
	}
	return nil
}

func validateLimits(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.Memory < 0 || hc.Memory > 0 && hc.Memory < minMemory:
		return invalid("Minimum memory limit allowed is 6MB")
	case hc.MemorySwap > 0 && hc.Memory == 0:
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case hc.MemorySwap > 0 && hc.MemorySwap < hc.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case hc.MemoryReservation > 0 && hc.Memory > 0 && hc.Memory < hc.MemoryReservation:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case hc.NanoCPUs < 0 || hc.NanoCPUs > int64(runtime.NumCPU())*1e9:
		return invalid("range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", runtime.NumCPU(), runtime.NumCPU())
	case hc.NanoCPUs > 0 && (hc.CPUPeriod > 0 || hc.CPUQuota > 0):
		return invalid("Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set.")
	case hc.OomScoreAdj < -1000 || hc.OomScoreAdj > 1000:
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", hc.OomScoreAdj)
	case hc.ShmSize < 0:
		return invalid("SHM size can not be less than 0")
	}
	return nil
}

func validateRestart(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	p := hc.RestartPolicy
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
	if hc.AutoRemove && p.Name != "" && p.Name != apic.RestartPolicyDisabled {
		return invalid("can't create 'AutoRemove' container with restart policy")
	}
	return nil
}

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
		case "apparmor", "label":
			// Accepted and without effect: conex relies on namespaces, capabilities and seccomp alone.
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
