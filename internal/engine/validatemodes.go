package engine

import (
	"context"
	"slices"
	"strings"

	apic "github.com/moby/moby/api/types/container"
)

// containerPrefix begins the modes that name another container.
const containerPrefix = "container:"

// validateModes checks which namespaces are shared, and with whom. Containers that are named become ids, since names can move.
func (e *Engine) validateModes(_ context.Context, conf *apic.Config, hc *apic.HostConfig) error {
	switch {
	case !hc.IpcMode.Valid():
		return invalid("invalid IPC mode: %s", hc.IpcMode)
	case !hc.PidMode.Valid():
		return invalid("invalid PID mode: %s", hc.PidMode)
	case !hc.UTSMode.Valid():
		return invalid("invalid UTS mode: %s", hc.UTSMode)
	case !hc.CgroupnsMode.Valid():
		return invalid("invalid cgroup namespace mode: %s", hc.CgroupnsMode)
	case hc.UTSMode.IsHost() && conf.Hostname != "":
		return invalid("conflicting options: hostname and the UTS mode")
	case hc.UTSMode.IsHost() && conf.Domainname != "":
		return invalid("conflicting options: domainname and the UTS mode")
	case !hc.Isolation.IsDefault():
		return invalid("invalid isolation %q: linux only supports 'default'", hc.Isolation)
	}
	if err := e.validateRuntime(hc); err != nil {
		return err
	}
	if _, empty := hc.Annotations[""]; empty {
		return invalid("invalid Annotations: the empty string is not permitted as an annotation key")
	}
	if err := validateSysctls(hc); err != nil {
		return err
	}
	if name := hc.PidMode.Container(); name != "" {
		id, err := e.containerID(name)
		if err != nil {
			return err
		}
		hc.PidMode = apic.PidMode(containerPrefix + id)
	}
	if hc.IpcMode.IsContainer() {
		id, err := e.containerID(hc.IpcMode.Container())
		if err != nil {
			return err
		}
		hc.IpcMode = apic.IpcMode(containerPrefix + id)
	}
	return nil
}

// containerID finds a container that a flag names.
func (e *Engine) containerID(name string) (string, error) {
	id, err := e.Containers().Resolve(name)
	if err != nil {
		return "", classify(err)
	}
	return id, nil
}

// namespacedSysctls are the settings, beside those that begin with net. and fs.mqueue., that the kernel keeps apart for each
// namespace of a container; Docker's list.
var namespacedSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

// validateSysctls refuses what would change the host.
func validateSysctls(hc *apic.HostConfig) error {
	for k := range hc.Sysctls {
		net := strings.HasPrefix(k, "net.")
		ipc := strings.HasPrefix(k, "fs.mqueue.") || slices.Contains(namespacedSysctls, k)
		switch {
		case !net && !ipc, strings.Contains(k, ".."), strings.ContainsRune(k, 0):
			return invalid("sysctl '%s' is not allowed", k)
		case net && hc.NetworkMode.IsHost():
			return invalid("sysctl %q not allowed in host network namespace", k)
		case ipc && hc.IpcMode.IsHost():
			return invalid("sysctl %q is not allowed in the hosts ipc namespace", k)
		}
	}
	return nil
}
