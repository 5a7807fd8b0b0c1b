package monitor

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"

	"conex/internal/cdi"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// devices adds --device.
func devices(s *specs.Spec, hc *apic.HostConfig) error {
	for _, d := range hc.Devices {
		devs, err := runtime.Devices(d.PathOnHost, cmp.Or(d.PathInContainer, d.PathOnHost))
		if err != nil {
			return fmt.Errorf("error gathering device information while adding custom device %q: %w", d.PathOnHost, reason(err))
		}
		for _, dev := range devs {
			addDevice(s, dev, cmp.Or(d.CgroupPermissions, "rwm"))
		}
	}
	return nil
}

// reason is an error of the file system without the path, which the message has already.
func reason(err error) error {
	if pe, ok := err.(*os.PathError); ok { //nolint:errorlint // not further in
		return pe.Err
	}
	return err
}

// addDevice adds a device, in the place of another of the same name.
func addDevice(s *specs.Spec, dev specs.LinuxDevice, access string) {
	s.Linux.Devices = slices.DeleteFunc(s.Linux.Devices, func(o specs.LinuxDevice) bool { return o.Path == dev.Path })
	s.Linux.Devices = append(s.Linux.Devices, dev)
	if dev.Type == "p" {
		return
	}
	s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
		Allow: true, Type: dev.Type, Major: &dev.Major, Minor: &dev.Minor, Access: access,
	})
}

// inject applies what CDI devices change. bundle is a folder for what their hooks want to read; it is made when there are hooks.
func inject(c *runtime.Config, e *cdi.Edits, bundle string) error {
	s := c.Spec
	s.Process.Env = mergeEnv(s.Process.Env, e.Env)
	for _, g := range e.AdditionalGIDs {
		if g != 0 {
			c.GroupAdd = append(slices.Clone(c.GroupAdd), strconv.Itoa(int(g)))
		}
	}
	for _, n := range e.DeviceNodes {
		dev := specs.LinuxDevice{Type: n.Type, Major: n.Major, Minor: n.Minor}
		if n.Type == "" || n.Type != "p" && n.Major == 0 {
			host, err := runtime.DeviceFromPath(cmp.Or(n.HostPath, n.Path))
			if err != nil {
				return fmt.Errorf("CDI device injection failed: device node %s: %w", n.Path, err)
			}
			if n.Type != "" && n.Type != host.Type {
				return fmt.Errorf("CDI device injection failed: device node %s is of type %s, not %s", n.Path, host.Type, n.Type)
			}
			dev = host
		}
		dev.Path = n.Path
		if n.FileMode != nil {
			mode := os.FileMode(*n.FileMode)
			dev.FileMode = &mode
		}
		dev.UID, dev.GID = cmp.Or(n.UID, dev.UID), cmp.Or(n.GID, dev.GID)
		addDevice(s, dev, cmp.Or(n.Permissions, "rwm"))
	}
	for _, m := range e.Mounts {
		om := specs.Mount{Destination: m.ContainerPath, Source: m.HostPath, Type: cmp.Or(m.Type, "bind"), Options: m.Options}
		if om.Type == "bind" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			om.Options = append([]string{"bind"}, m.Options...)
		}
		s.Mounts = append(s.Mounts, om)
	}
	if len(e.Hooks) == 0 {
		return nil
	}
	s.Hooks = &specs.Hooks{}
	for _, h := range e.Hooks {
		hook := specs.Hook{Path: h.Path, Args: h.Args, Env: h.Env, Timeout: h.Timeout}
		switch h.HookName {
		case "prestart":
			s.Hooks.Prestart = append(s.Hooks.Prestart, hook) //nolint:staticcheck // deprecated, and in use
		case "createRuntime":
			s.Hooks.CreateRuntime = append(s.Hooks.CreateRuntime, hook)
		case "createContainer":
			s.Hooks.CreateContainer = append(s.Hooks.CreateContainer, hook)
		default:
			return fmt.Errorf("CDI device injection failed: hook %s is not supported", h.HookName)
		}
	}
	return writeBundle(c, bundle)
}

// writeBundle writes what a hook expects to find of an OCI bundle: the spec, by which it finds the root file system.
func writeBundle(c *runtime.Config, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	spec := *c.Spec
	root := *spec.Root
	root.Path = c.Scratch
	spec.Root = &root
	b, err := json.Marshal(&spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/config.json", b, 0o600); err != nil {
		return err
	}
	id, annotations := c.ID, spec.Annotations
	c.State = func(status specs.ContainerState, pid int) *specs.State {
		return &specs.State{Version: specs.Version, ID: id, Status: status, Pid: pid, Bundle: dir, Annotations: annotations}
	}
	return nil
}
