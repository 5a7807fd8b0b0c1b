package engine

import (
	"maps"
	"slices"
	"strings"

	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// mergeImage fills what the request leaves open from the image's config, by Docker's rules. It replaces conf's maps and
// slices instead of changing them, since they are the caller's.
func mergeImage(conf *apic.Config, img ocispec.ImageConfig) {
	if conf.User == "" {
		conf.User = img.User
	}
	if conf.WorkingDir == "" {
		conf.WorkingDir = img.WorkingDir
	}
	if conf.StopSignal == "" {
		conf.StopSignal = img.StopSignal
	}
	if len(conf.Shell) == 0 {
		conf.Shell = img.Shell
	}
	if len(conf.Entrypoint) == 0 {
		if len(conf.Cmd) == 0 {
			conf.Cmd = img.Cmd
		}
		if conf.Entrypoint == nil {
			conf.Entrypoint = img.Entrypoint
		}
	}
	// --entrypoint "" takes the image's away.
	if len(conf.Entrypoint) == 1 && conf.Entrypoint[0] == "" {
		conf.Entrypoint = nil
	}
	conf.Env = mergeEnv(img.Env, conf.Env)
	conf.Labels = union(img.Labels, conf.Labels)
	conf.Volumes = union(img.Volumes, conf.Volumes)
	conf.OnBuild = nil
	ports := maps.Clone(conf.ExposedPorts)
	for p := range img.ExposedPorts {
		port, err := mnet.ParsePort(p)
		if err != nil {
			continue // an image's mistake: nothing can be published by such a name
		}
		if ports == nil {
			ports = mnet.PortSet{}
		}
		ports[port] = struct{}{}
	}
	conf.ExposedPorts = ports
	mergeHealth(conf, img.Healthcheck)
}

func mergeHealth(conf *apic.Config, img *ocispec.Healthcheck) {
	if img == nil {
		return
	}
	if conf.Healthcheck == nil {
		conf.Healthcheck = img
		return
	}
	h := *conf.Healthcheck
	if len(h.Test) == 0 {
		h.Test = img.Test
	}
	if h.Interval == 0 {
		h.Interval = img.Interval
	}
	if h.Timeout == 0 {
		h.Timeout = img.Timeout
	}
	if h.StartPeriod == 0 {
		h.StartPeriod = img.StartPeriod
	}
	if h.StartInterval == 0 {
		h.StartInterval = img.StartInterval
	}
	if h.Retries == 0 {
		h.Retries = img.Retries
	}
	conf.Healthcheck = &h
}

// mergeEnv is base with each variable of more set, in place where it exists. An entry of more without "=" takes the variable away.
func mergeEnv(base, more []string) []string {
	out := slices.Clone(base)
	for _, e := range more {
		name, _, set := strings.Cut(e, "=")
		out = slices.DeleteFunc(out, func(o string) bool { return !set && strings.HasPrefix(o, name+"=") })
		if !set {
			continue
		}
		if i := slices.IndexFunc(out, func(o string) bool { return strings.HasPrefix(o, name+"=") }); i >= 0 {
			out[i] = e
		} else {
			out = append(out, e)
		}
	}
	return out
}

func union[V any](a, b map[string]V) map[string]V {
	if len(a)+len(b) == 0 {
		return b
	}
	m := make(map[string]V, len(a)+len(b))
	maps.Copy(m, a)
	maps.Copy(m, b)
	return m
}

// command joins entrypoint and cmd.
func command(conf *apic.Config) (path string, args []string, err error) {
	all := slices.Concat([]string(conf.Entrypoint), []string(conf.Cmd))
	if len(all) == 0 {
		return "", nil, invalid("no command specified")
	}
	return all[0], all[1:], nil
}
