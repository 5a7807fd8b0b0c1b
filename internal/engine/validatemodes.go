package engine

import (
	"context"

	apic "github.com/moby/moby/api/types/container"
)

// validateModes refuses to share namespaces in ways that are not there, by name.
func validateModes(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	bad := func(flag, val string) error { return invalid("--%s %s is not supported yet", flag, val) }
	switch {
	case hc.PidMode != "" && hc.PidMode != "private" && !hc.PidMode.IsHost():
		return bad("pid", string(hc.PidMode))
	case !hc.IpcMode.IsEmpty() && !hc.IpcMode.IsPrivate() && !hc.IpcMode.IsShareable() && !hc.IpcMode.IsHost():
		return bad("ipc", string(hc.IpcMode))
	case !hc.UTSMode.Valid():
		return bad("uts", string(hc.UTSMode))
	case !hc.CgroupnsMode.Valid():
		return bad("cgroupns", string(hc.CgroupnsMode))
	case hc.UsernsMode != "" && !hc.UsernsMode.IsHost():
		return bad("userns", string(hc.UsernsMode))
	case len(hc.VolumesFrom) > 0:
		return bad("volumes-from", hc.VolumesFrom[0])
	case len(hc.Links) > 0:
		return bad("link", hc.Links[0])
	case hc.Runtime != "" && hc.Runtime != "conex" && hc.Runtime != "runc":
		return bad("runtime", hc.Runtime)
	case len(hc.DeviceRequests) > 0:
		return bad("gpus", "")
	}
	return nil
}
