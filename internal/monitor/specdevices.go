package monitor

import (
	"cmp"
	"fmt"

	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

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
