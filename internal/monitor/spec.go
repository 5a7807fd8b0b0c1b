package monitor

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"conex/internal/container"
	"conex/internal/linux/caps"
	"conex/internal/linux/seccomp"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// cpuPeriod is the period that --cpus counts in, in microseconds; Docker's.
const cpuPeriod = 100000

// buildConfig turns a record into what the runtime takes. files is the folder of hosts, hostname and resolv.conf, "" when the
// container gets none (no network of its own to describe).
func buildConfig(r *container.Record, files string) (*runtime.Config, error) {
	s := runtime.DefaultSpec()
	hc := r.HostConfig
	s.Process.Args = append([]string{r.Path}, r.Args...)
	s.Process.Env = environment(r.Config, r.Config.Hostname)
	s.Process.Terminal = r.Config.Tty
	s.Process.Cwd = cmp.Or(r.Config.WorkingDir, "/")
	s.Hostname, s.Domainname = r.Config.Hostname, r.Config.Domainname
	s.Root.Readonly = hc.ReadonlyRootfs
	s.Annotations = hc.Annotations
	s.Linux.CgroupsPath = CgroupPath(r.ID)

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
	c := &runtime.Config{ID: r.ID, Spec: s, User: r.Config.User, GroupAdd: hc.GroupAdd, DefaultSeccomp: !hc.Privileged}
	c.Init = hc.Init != nil && *hc.Init
	if err := security(c, hc, capNames); err != nil {
		return nil, err
	}
	namespaces(s, hc)
	if err := devices(s, hc); err != nil {
		return nil, err
	}
	resources(s, hc)
	mounts(s, r, files)
	return c, nil
}

// CgroupPath is a container's cgroup, relative to each hierarchy's root.
func CgroupPath(id string) string { return "/conex/" + id }

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

// namespaces leaves out those that the container shares with the host.
func namespaces(s *specs.Spec, hc *apic.HostConfig) {
	shared := map[specs.LinuxNamespaceType]bool{
		specs.NetworkNamespace: hc.NetworkMode.IsHost(),
		specs.PIDNamespace:     hc.PidMode.IsHost(),
		specs.IPCNamespace:     hc.IpcMode.IsHost(),
		specs.UTSNamespace:     hc.UTSMode.IsHost(),
		specs.CgroupNamespace:  hc.CgroupnsMode.IsHost(),
	}
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return shared[n.Type] })
	if shared[specs.UTSNamespace] {
		s.Hostname, s.Domainname = "", ""
	}
	for k, v := range hc.Sysctls {
		if s.Linux.Sysctl == nil {
			s.Linux.Sysctl = map[string]string{}
		}
		s.Linux.Sysctl[k] = v
	}
	// A sysctl of a namespace that is the host's would change the host.
	for k := range s.Linux.Sysctl {
		if shared[specs.NetworkNamespace] && strings.HasPrefix(k, "net.") {
			delete(s.Linux.Sysctl, k)
		}
	}
	if shared[specs.IPCNamespace] {
		for i, m := range s.Mounts {
			if m.Destination == "/dev/shm" || m.Destination == "/dev/mqueue" {
				s.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Destination, Options: []string{"rbind", "rprivate"}}
			}
		}
	}
}

// devices adds --device.
func devices(s *specs.Spec, hc *apic.HostConfig) error {
	for _, d := range hc.Devices {
		dev, err := runtime.DeviceFromPath(d.PathOnHost)
		if err != nil {
			return fmt.Errorf("add device %s: %w", d.PathOnHost, err)
		}
		dev.Path = cmp.Or(d.PathInContainer, d.PathOnHost)
		s.Linux.Devices = append(s.Linux.Devices, dev)
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: cmp.Or(d.CgroupPermissions, "rwm"),
		})
	}
	return nil
}

// resources translates limits.
func resources(s *specs.Spec, hc *apic.HostConfig) {
	res := s.Linux.Resources
	if hc.Memory > 0 || hc.MemoryReservation > 0 {
		m := &specs.LinuxMemory{}
		if hc.Memory > 0 {
			m.Limit = &hc.Memory
			// Docker's rule: as much swap as memory unless it is said otherwise; the value counts both.
			swap := cmp.Or(hc.MemorySwap, 2*hc.Memory)
			m.Swap = &swap
		}
		if hc.MemoryReservation > 0 {
			m.Reservation = &hc.MemoryReservation
		}
		if hc.MemorySwappiness != nil && *hc.MemorySwappiness >= 0 {
			v := uint64(*hc.MemorySwappiness)
			m.Swappiness = &v
		}
		m.DisableOOMKiller = hc.OomKillDisable
		res.Memory = m
	}
	cpu := &specs.LinuxCPU{Cpus: hc.CpusetCpus, Mems: hc.CpusetMems}
	if hc.CPUShares > 0 {
		v := uint64(hc.CPUShares)
		cpu.Shares = &v
	}
	if hc.CPUPeriod > 0 {
		v := uint64(hc.CPUPeriod)
		cpu.Period = &v
	}
	if hc.CPUQuota > 0 {
		cpu.Quota = &hc.CPUQuota
	}
	if hc.NanoCPUs > 0 {
		period, quota := uint64(cpuPeriod), hc.NanoCPUs*cpuPeriod/1e9
		cpu.Period, cpu.Quota = &period, &quota
	}
	if *cpu != (specs.LinuxCPU{}) {
		res.CPU = cpu
	}
	if hc.PidsLimit != nil && *hc.PidsLimit > 0 {
		res.Pids = &specs.LinuxPids{Limit: hc.PidsLimit}
	}
	if hc.OomScoreAdj != 0 {
		s.Process.OOMScoreAdj = &hc.OomScoreAdj
	}
	for _, u := range hc.Ulimits {
		s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{
			Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard),
		})
	}
	if hc.ShmSize > 0 {
		for i, m := range s.Mounts {
			if m.Destination == "/dev/shm" && m.Type == "tmpfs" {
				s.Mounts[i].Options = setOption(m.Options, "size="+strconv.FormatInt(hc.ShmSize, 10))
			}
		}
	}
}

// mounts adds the generated files and the record's mounts. A mount of the user's replaces a default one at the same place.
func mounts(s *specs.Spec, r *container.Record, files string) {
	var add []specs.Mount
	if files != "" {
		for name, dst := range generated {
			opts := []string{"rbind", "rprivate"}
			if r.HostConfig.ReadonlyRootfs {
				opts = append(opts, "ro")
			}
			add = append(add, specs.Mount{Destination: dst, Type: "bind", Source: files + "/" + name, Options: opts})
		}
	}
	for _, m := range r.Mounts {
		// The user's own /etc/hosts stands in for the generated one.
		add = slices.DeleteFunc(add, func(o specs.Mount) bool { return o.Destination == m.Destination })
		s.Mounts = slices.DeleteFunc(s.Mounts, func(o specs.Mount) bool {
			return o.Destination == m.Destination && strings.HasPrefix(o.Destination, "/dev")
		})
		om := specs.Mount{Destination: m.Destination, Source: m.Source, Type: "bind"}
		switch m.Type {
		case mount.TypeTmpfs:
			om.Type, om.Source = "tmpfs", "tmpfs"
			om.Options = []string{"noexec", "nosuid", "nodev"}
			if m.Mode != "" {
				for _, o := range strings.Split(m.Mode, ",") {
					om.Options = setOption(om.Options, o)
				}
			}
			if !m.RW {
				om.Options = setOption(om.Options, "ro")
			}
		default:
			om.Options = []string{"rbind", string(cmp.Or(m.Propagation, mount.PropagationRPrivate))}
			if !m.RW {
				om.Options = append(om.Options, "ro")
			}
		}
		add = append(add, om)
	}
	// Parents before what is mounted in them.
	slices.SortStableFunc(add, func(a, b specs.Mount) int {
		return cmp.Or(cmp.Compare(strings.Count(a.Destination, "/"), strings.Count(b.Destination, "/")), cmp.Compare(a.Destination, b.Destination))
	})
	s.Mounts = append(s.Mounts, add...)
}

// generated are the files of the container's folder that are mounted over its own.
var generated = map[string]string{"hosts": "/etc/hosts", "hostname": "/etc/hostname", "resolv.conf": "/etc/resolv.conf"}

// setOption adds a mount option in the place of its opposite or of an older value.
func setOption(opts []string, opt string) []string {
	name, _, hasValue := strings.Cut(opt, "=")
	return append(slices.DeleteFunc(slices.Clone(opts), func(o string) bool {
		if hasValue {
			return strings.HasPrefix(o, name+"=")
		}
		return o == opt || o == "no"+opt || "no"+o == opt || opt == "ro" && o == "rw" || opt == "rw" && o == "ro"
	}), opt)
}
