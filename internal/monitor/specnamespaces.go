package monitor

import (
	"slices"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

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
