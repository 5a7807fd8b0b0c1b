package build

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/resolver"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// spec is what the runtime gets: Docker's defaults and what the step and the command line ask for.
func (x *execution) spec(m *mounts) (*specs.Spec, error) {
	s := runtime.DefaultSpec()
	if x.op.Security == "insecure" {
		if err := runtime.Privileged(s); err != nil {
			return nil, err
		}
	}
	s.Hostname = x.hostname()
	s.Linux.CgroupsPath = x.owner.place.String()
	s.Linux.Resources.Memory, s.Linux.Resources.CPU = x.req.Memory, x.req.CPU
	s.Process.Cwd = x.op.Dir
	s.Process.Env = x.environment(m.env)
	s.Process.Rlimits = x.op.Ulimits
	if x.op.ShmSize > 0 {
		for i := range s.Mounts {
			if shm := &s.Mounts[i]; shm.Destination == "/dev/shm" {
				shm.Options = append(slices.Clone(shm.Options), fmt.Sprintf("size=%d", x.op.ShmSize)) // the last one counts
			}
		}
	}
	conf, err := resolver.Config(resolver.HostFile, x.b.DNS, x.b.DNSSearch, nil)
	if x.op.Network == "host" {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		s.Linux.Sysctl = nil // they are for a network of its own
		conf, err = os.ReadFile(resolver.HostFile)
	}
	if err != nil && !errors.Is(err, resolver.ErrNoNameserver) && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.WriteFile(x.file("resolv.conf"), conf, 0o644); err != nil {
		return nil, err
	}
	gateway := netip.Addr{}
	if x.op.Network == "host" {
		gateway = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if err := x.writeHosts(gateway); err != nil {
		return nil, err
	}
	own := func(from, to string) {
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: x.file(from), Destination: to, Options: []string{"bind", "ro"}})
	}
	own("resolv.conf", "/etc/resolv.conf")
	own("hosts", "/etc/hosts")
	if x.op.Script != "" {
		if err := os.MkdirAll(x.file("pipes"), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(x.file("pipes"), x.script), []byte(x.op.Script), 0o755); err != nil {
			return nil, err
		}
		own("pipes", "/dev/pipes")
	}
	s.Mounts = append(s.Mounts, m.specs...)
	return s, nil
}

func (x *execution) file(name string) string { return filepath.Join(x.dir, "files", name) }

func (x *execution) hostname() string { return cmp.Or(x.op.Hostname, hostname) }

// wantsGateway reports whether an --add-host needs the network's gateway, which is known when the container is on the network.
func (x *execution) wantsGateway() bool {
	return slices.ContainsFunc(x.op.Hosts, func(h string) bool { return strings.HasSuffix(h, resolver.HostGateway) })
}

// writeHosts writes /etc/hosts, in place: it may be mounted already. Without a gateway, what needs it is left out.
func (x *execution) writeHosts(gateway netip.Addr) error {
	hosts := x.op.Hosts
	if !gateway.IsValid() {
		hosts = slices.DeleteFunc(slices.Clone(hosts), func(h string) bool { return strings.HasSuffix(h, resolver.HostGateway) })
	}
	extra, err := resolver.ExpandHosts(hosts, gateway)
	if err != nil {
		return err
	}
	return os.WriteFile(x.file("hosts"), resolver.Hosts(x.hostname(), []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}, extra), 0o644)
}

// environment is the step's, with proxies, the agent's socket and the secrets that want to be variables.
func (x *execution) environment(secrets []string) []string {
	env := slices.Clone(x.op.Env)
	set := func(e string) {
		name, _, _ := strings.Cut(e, "=")
		env = slices.DeleteFunc(env, func(o string) bool { return strings.HasPrefix(o, name+"=") })
		env = append(env, e)
	}
	for _, e := range x.proxies {
		set(e) // over what ENV says, as in BuildKit
	}
	has := slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "SSH_AUTH_SOCK=") })
	if i := slices.IndexFunc(x.op.Mounts, func(m mountOp) bool { return m.Type == "ssh" }); i >= 0 && !has {
		set("SSH_AUTH_SOCK=" + x.op.Mounts[i].Target)
	}
	for _, e := range secrets {
		set(e)
	}
	return env
}
