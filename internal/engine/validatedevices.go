package engine

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"conex/internal/cdi"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
)

// validateDevices checks devices and requests for some. Whether they are there is seen at the start, as with Docker:
// they may come and go.
func validateDevices(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	for _, d := range hc.Devices {
		if !path.IsAbs(d.PathOnHost) || d.PathInContainer != "" && !path.IsAbs(d.PathInContainer) {
			return invalid("device %s: its paths must be absolute", d.PathOnHost)
		}
		if d.CgroupPermissions != "" && !DevicePermissions(d.CgroupPermissions) {
			return invalid("bad mode specified: %s", d.CgroupPermissions)
		}
	}
	for _, r := range hc.DeviceRequests {
		if _, err := requested(r, &cdi.Registry{}); err != nil {
			return invalid("%w", err)
		}
	}
	return nil
}

// DevicePermissions reports whether s is made of r, w and m, each once.
func DevicePermissions(s string) bool { return runtime.DevicePermissions(s) }

// IsCDIName reports whether a device is named by vendor/class=name instead of a path.
func IsCDIName(s string) bool { return cdi.IsName(s) }

// gpuKinds are the kinds of CDI devices that --gpus means, the first that there is.
var gpuKinds = []string{"nvidia.com/gpu", "amd.com/gpu"}

// requested returns the names of CDI devices that a request means.
func requested(r apic.DeviceRequest, reg *cdi.Registry) ([]string, error) {
	if r.Driver == "cdi" {
		if r.Count != 0 || len(r.Options) > 0 {
			return nil, fmt.Errorf("a request for CDI devices has names and nothing else")
		}
		for _, n := range r.DeviceIDs {
			if !cdi.IsName(n) {
				return nil, fmt.Errorf("%q is not a CDI device's name, vendor/class=name", n)
			}
		}
		return r.DeviceIDs, nil
	}
	kind := gpuKinds[0]
	for _, k := range gpuKinds {
		if r.Driver == "" && reg.HasKind(k) || r.Driver != "" && r.Driver+".com/gpu" == k {
			kind = k
			break
		}
	}
	gpu := slices.ContainsFunc(r.Capabilities, func(all []string) bool { return slices.Contains(all, "gpu") })
	switch {
	case !gpu, r.Driver != "" && r.Driver+".com/gpu" != kind:
		return nil, fmt.Errorf("could not select device driver %q with capabilities: %v", r.Driver, r.Capabilities)
	case r.Count != 0 && len(r.DeviceIDs) > 0:
		return nil, fmt.Errorf("cannot set both Count and DeviceIDs on device request")
	case r.Count < -1:
		return nil, fmt.Errorf("invalid count of GPUs: %d", r.Count)
	case r.Count == -1:
		return []string{kind + "=all"}, nil
	}
	var names []string
	for i := range r.Count {
		names = append(names, kind+"="+strconv.Itoa(i))
	}
	for _, id := range r.DeviceIDs {
		if !cdi.IsName(kind + "=" + id) {
			return nil, fmt.Errorf("%q is no name of a GPU", id)
		}
		names = append(names, kind+"="+id)
	}
	return names, nil
}

// deviceEdits finds out what the requested devices change in a container; nil without requests.
func (e *Engine) deviceEdits(hc *apic.HostConfig) (*cdi.Edits, error) {
	if len(hc.DeviceRequests) == 0 {
		return nil, nil
	}
	dirs := e.cfg.CDISpecDirs
	if len(dirs) == 0 {
		dirs = cdi.Dirs
	}
	reg, err := cdi.Load(dirs)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range hc.DeviceRequests {
		n, err := requested(r, reg)
		if err != nil {
			return nil, err
		}
		if r.Driver != "cdi" && len(n) > 0 {
			if kind, _, _ := strings.Cut(n[0], "="); !reg.HasKind(kind) {
				return nil, fmt.Errorf("could not select device driver %q with capabilities: %v: no CDI spec for %s in %s (nvidia-ctk cdi generate makes one)",
					r.Driver, r.Capabilities, strings.Join(gpuKinds, " or "), strings.Join(dirs, " or "))
			}
		}
		names = append(names, n...)
	}
	edits, err := reg.Resolve(names)
	if err != nil {
		return nil, fmt.Errorf("CDI device injection failed: %w", err)
	}
	return edits, nil
}
