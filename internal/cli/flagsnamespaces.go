package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// namespaceFlags say which namespaces the container shares, and what its own are called.
type namespaceFlags struct {
	hostname, domainname    string
	cgroupns, ipc, pid, uts string
	userns                  string
	sysctls                 sysctlFlag
}

func (c *namespaceFlags) register(f *pflag.FlagSet) {
	f.StringVar(&c.cgroupns, "cgroupns", "", `Cgroup namespace to use (host|private)`)
	f.StringVar(&c.domainname, "domainname", "", "Container NIS domain name")
	f.StringVarP(&c.hostname, "hostname", "h", "", "Container host name")
	f.StringVar(&c.ipc, "ipc", "", "IPC mode to use (none, private, shareable, host, container:NAME)")
	f.StringVar(&c.pid, "pid", "", "PID namespace to use (private|host|container:NAME)")
	f.Var(&c.sysctls, "sysctl", "Sysctl options")
	f.StringVar(&c.uts, "uts", "", "UTS namespace to use (host)")
	f.StringVar(&c.userns, "userns", "", "User namespace to use (host|auto[:size=NUMBER]|nomap)")
}

func (c *namespaceFlags) apply(t *flagTarget) error {
	t.config.Hostname, t.config.Domainname = c.hostname, c.domainname
	h := t.host
	h.CgroupnsMode, h.IpcMode, h.UTSMode = apic.CgroupnsMode(c.cgroupns), apic.IpcMode(c.ipc), apic.UTSMode(c.uts)
	if c.pid != "private" { // what it is without the flag
		h.PidMode = apic.PidMode(c.pid)
	}
	switch {
	case !h.PidMode.Valid():
		return errors.New("--pid: invalid PID mode")
	case !h.UTSMode.Valid():
		return errors.New("--uts: invalid UTS mode")
	case !slices.Contains([]string{"", "host", "nomap", "auto"}, c.userns) && !strings.HasPrefix(c.userns, "auto:"):
		return fmt.Errorf("--userns: invalid USER mode: %s: use auto[:size=NUMBER], nomap or host", c.userns)
	case !h.CgroupnsMode.Valid():
		return errors.New("--cgroupns: invalid CGROUP mode")
	}
	h.Sysctls, h.UsernsMode = c.sysctls, apic.UsernsMode(c.userns)
	return nil
}

// sysctlFlag are settings of the kernel that belong to a namespace.
type sysctlFlag map[string]string

// namespacedSysctls are Docker's: the kernel keeps these apart for each ipc namespace. net. and fs.mqueue. go besides.
var namespacedSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

func (s *sysctlFlag) Set(v string) error {
	key, value, ok := strings.Cut(v, "=")
	if !ok || !slices.Contains(namespacedSysctls, key) && !strings.HasPrefix(key, "net.") && !strings.HasPrefix(key, "fs.mqueue.") {
		return fmt.Errorf("sysctl '%s' is not allowed", v)
	}
	if *s == nil {
		*s = sysctlFlag{}
	}
	(*s)[key] = value
	return nil
}
func (s *sysctlFlag) Type() string   { return "map" }
func (s *sysctlFlag) String() string { return "" }
