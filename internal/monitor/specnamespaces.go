package monitor

import (
	"maps"
	"os"
	"slices"

	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// users gives the container a user namespace with its own ids.
func users(s *specs.Spec, ids *container.IDs) {
	if ids == nil {
		return
	}
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	m := []specs.LinuxIDMapping{{ContainerID: 0, HostID: ids.First, Size: ids.Size}}
	s.Linux.UIDMappings, s.Linux.GIDMappings = m, m
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
	// The engine has refused what the user set of a namespace that is the host's. Docker's defaults are for a network of its own.
	if shared[specs.NetworkNamespace] || hc.NetworkMode.IsContainer() {
		s.Linux.Sysctl = nil
	}
	if len(hc.Sysctls) > 0 && s.Linux.Sysctl == nil {
		s.Linux.Sysctl = map[string]string{}
	}
	maps.Copy(s.Linux.Sysctl, hc.Sysctls)
	if hc.IpcMode.IsNone() {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/shm" })
	}
	if shared[specs.IPCNamespace] {
		if _, err := os.Lstat("/dev/mqueue"); err != nil { // not every host mounts it
			s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/mqueue" })
		}
		for i, m := range s.Mounts {
			if m.Destination == "/dev/shm" || m.Destination == "/dev/mqueue" {
				s.Mounts[i] = specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Destination, Options: []string{"rbind", "rprivate"}}
			}
		}
	}
}
