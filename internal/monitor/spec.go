package monitor

import (
	"cmp"
	"slices"
	"strings"

	"conex/internal/container"
	"conex/internal/linux/caps"
	"conex/internal/linux/cgroup"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// buildConfig turns a record into what the runtime takes. files is the folder of hosts, hostname and resolv.conf, "" when the
// container gets none (no network of its own to describe); place is its cgroup.
func buildConfig(r *container.Record, files string, place cgroup.Place, from sources) (*runtime.Config, error) {
	s := runtime.DefaultSpec()
	hc := r.HostConfig
	s.Process.Args = append([]string{r.Path}, r.Args...)
	s.Process.Env = environment(r.Config, r.Config.Hostname)
	s.Process.Terminal = r.Config.Tty
	s.Process.Cwd = cmp.Or(r.Config.WorkingDir, "/")
	s.Hostname, s.Domainname = r.Config.Hostname, r.Config.Domainname
	s.Process.User.Umask = hc.Umask
	s.Root.Readonly = hc.ReadonlyRootfs
	s.Annotations = hc.Annotations
	s.Linux.CgroupsPath = place.String()

	capNames, err := caps.Resolve(s.Process.Capabilities.Bounding, hc.CapAdd, hc.CapDrop, hc.Privileged)
	if err != nil {
		return nil, err
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: capNames, Permitted: capNames, Effective: capNames}
	if hc.Privileged {
		if err := runtime.Privileged(s); err != nil {
			return nil, err
		}
	}
	c := &runtime.Config{ID: r.ID, Spec: s, User: r.Config.User, GroupAdd: hc.GroupAdd, DefaultSeccomp: !hc.Privileged, SystemdCgroup: place.Unit != ""}
	c.Init = hc.Init != nil && *hc.Init
	if err := security(c, hc, capNames); err != nil {
		return nil, err
	}
	namespaces(s, hc)
	if err := devices(s, hc); err != nil {
		return nil, err
	}
	if err := resources(s, hc); err != nil {
		return nil, err
	}
	users(s, r.Options.Users)
	if err := mounts(c, r, files, from); err != nil {
		return nil, err
	}
	return c, nil
}

// environment returns the process's environment: Docker's defaults, replaced and followed by the container's.
func environment(c *apic.Config, hostname string) []string {
	env := []string{"PATH=" + runtime.DefaultPath, "HOSTNAME=" + hostname}
	if c.Tty {
		env = append(env, "TERM=xterm")
	}
	return mergeEnv(env, c.Env)
}

// mergeEnv sets each variable of more in env, in place where it exists. An entry without "=" removes the variable.
func mergeEnv(env, more []string) []string {
	out := slices.Clone(env)
	for _, e := range more {
		name, _, set := strings.Cut(e, "=")
		i := slices.IndexFunc(out, func(o string) bool { return strings.HasPrefix(o, name+"=") })
		switch {
		case set && i >= 0:
			out[i] = e
		case set:
			out = append(out, e)
		case i >= 0:
			out = slices.Delete(out, i, i+1)
		}
	}
	return out
}
