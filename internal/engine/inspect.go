package engine

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/logs"
	"conex/internal/runtime"

	"github.com/moby/moby/api/types/blkiodev"
	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"
)

// zeroTime is how Docker writes a time that never was.
const zeroTime = "0001-01-01T00:00:00Z"

// InspectContainer describes a container in full; with size also what it takes on disk.
func (e *Engine) InspectContainer(ctx context.Context, name string, size bool) (ContainerDetail, error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return ContainerDetail{}, err
	}
	r, cs := n.Record, e.Containers()
	files := cs.Dir(e.networkOwner(r), "files")
	host, err := e.shownHost(r)
	if err != nil {
		return ContainerDetail{}, err
	}
	out := ContainerDetail{InspectResponse: apic.InspectResponse{
		ID: r.ID, Created: r.Created.Format(time.RFC3339Nano), Path: r.Path, Args: r.Args, State: stateOf(n), Image: string(r.ImageID),
		ResolvConfPath: files + "/resolv.conf", HostnamePath: files + "/hostname", HostsPath: files + "/hosts",
		Name: "/" + r.Name, Driver: r.Driver, Platform: strings.SplitN(r.Platform, "/", 2)[0], HostConfig: host, Config: r.Config, Mounts: shownMounts(r),
		GraphDriver: &storage.DriverData{Name: r.Driver, Data: map[string]string{
			"UpperDir": cs.Dir(r.ID, "upper"), "WorkDir": cs.Dir(r.ID, "work"),
		}},
		AppArmorProfile: appArmor(r.HostConfig),
	}, NetworkSettings: networkDetail(portMap(n), networks(n)), Egress: r.Options.Egress}
	if out.Args == nil {
		out.Args = []string{}
	}
	if path := logs.CurrentPath(cs.Dir(r.ID, "log")); exists(path) {
		out.LogPath = path
	}
	if a := n.Alive(); a != nil {
		out.RestartCount, out.ExecIDs = a.Restarts, a.ExecIDs
		if a.Pid != 0 && !r.HostConfig.NetworkMode.IsContainer() {
			// What `ip netns` and nsenter want; Docker has a file of its own there.
			out.NetworkSettings.SandboxID, out.NetworkSettings.SandboxKey = r.ID, "/proc/"+strconv.Itoa(a.Pid)+"/ns/net"
		}
	} else if n.Exit != nil {
		out.RestartCount = n.Exit.Restarts
	}
	if size {
		rw, total, err := e.sizes(r)
		if err != nil {
			return out, err
		}
		out.SizeRw, out.SizeRootFs = &rw, &total
	}
	return out, nil
}

// networkOwner is whose network a container is in, and so whose names: another one's with --network container:NAME.
func (e *Engine) networkOwner(r *container.Record) string {
	id := r.ID
	for r != nil && r.HostConfig.NetworkMode.IsContainer() {
		id = r.HostConfig.NetworkMode.ConnectedContainer()
		r, _ = e.Containers().Load(id) // one that is gone had its own
	}
	return id
}

// shownHost is HostConfig as Docker shows it: with defaults that the record leaves out, and lists that are there though empty.
func (e *Engine) shownHost(r *container.Record) (*apic.HostConfig, error) {
	h := *r.HostConfig
	for _, list := range []*[]*blkiodev.ThrottleDevice{&h.BlkioDeviceReadBps, &h.BlkioDeviceReadIOps, &h.BlkioDeviceWriteBps, &h.BlkioDeviceWriteIOps} {
		*list = present(*list)
	}
	h.BlkioWeightDevice, h.Devices, h.Ulimits = present(h.BlkioWeightDevice), present(h.Devices), present(h.Ulimits)
	h.DNS, h.DNSOptions, h.DNSSearch = present(h.DNS), present(h.DNSOptions), present(h.DNSSearch)
	if !h.Privileged {
		if h.MaskedPaths == nil {
			h.MaskedPaths = runtime.MaskedPaths()
		}
		if h.ReadonlyPaths == nil {
			h.ReadonlyPaths = runtime.ReadonlyPaths()
		}
	}
	if h.SecurityOpt == nil && (h.Privileged || h.PidMode.IsHost() || h.IpcMode.IsHost()) {
		h.SecurityOpt = []string{"label=disable"}
	}
	if len(r.Options.Links) == 0 {
		return &h, nil
	}
	h.Links = nil
	for _, l := range r.Options.Links {
		other, err := e.Containers().Load(l.ID)
		if errors.Is(err, container.ErrNotFound) {
			continue // gone, and its link with it
		}
		if err != nil {
			return nil, err
		}
		h.Links = append(h.Links, "/"+other.Name+":/"+r.Name+"/"+l.Alias)
	}
	return &h, nil
}

// shownMounts are the mounts that Docker lists: all but those of --tmpfs.
func shownMounts(r *container.Record) []apic.MountPoint {
	out := []apic.MountPoint{}
	for _, m := range r.Mounts {
		if !r.More[m.Destination].Flag {
			out = append(out, m)
		}
	}
	return out
}

// present is a list that JSON shows as one.
func present[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// appArmor is the profile that a container was given.
func appArmor(h *apic.HostConfig) string {
	for _, o := range h.SecurityOpt {
		if p, ok := strings.CutPrefix(o, "apparmor="); ok {
			return p
		}
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// stateOf is Docker's State.
func stateOf(n *container.Snapshot) *apic.State {
	s := &apic.State{Status: n.Status(), StartedAt: zeroTime, FinishedAt: zeroTime}
	x := n.Exit
	a := n.Alive()
	if a != nil && a.Exit != nil {
		x = a.Exit
	}
	if x != nil {
		s.ExitCode, s.OOMKilled, s.Error = x.Code, x.OOM, x.Error
		s.StartedAt, s.FinishedAt = timeText(x.Started), timeText(x.Finished)
		if x.Started.IsZero() {
			s.FinishedAt = zeroTime // it never ran
		}
		if x.Health != nil && (a == nil || a.Status == container.Restarting) {
			// What does not run is not healthy; Docker says so with the last results too.
			h := *x.Health
			h.Status = apic.Unhealthy
			s.Health = &h
		}
	}
	if a == nil {
		return s
	}
	s.Running, s.Paused, s.Restarting, s.Pid = true, a.Paused, a.Status == container.Restarting, a.Pid
	if a.Status == container.Running {
		s.ExitCode, s.OOMKilled, s.Error, s.StartedAt, s.Health = 0, false, "", timeText(a.Started), a.Health
	}
	if s.Health != nil && s.Health.Log == nil {
		h := *s.Health
		h.Log = []*apic.HealthcheckResult{}
		s.Health = &h
	}
	return s
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return zeroTime
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// portMap lists what a running container publishes; ports that are only exposed have no bindings.
func portMap(n *container.Snapshot) mnet.PortMap {
	out := mnet.PortMap{}
	a := n.Alive()
	if a == nil || len(a.Endpoints) == 0 {
		return out
	}
	for p := range n.Record.Config.ExposedPorts {
		out[p] = nil
	}
	for _, s := range portSummaries(n) {
		p, ok := mnet.PortFrom(s.PrivatePort, mnet.IPProtocol(s.Type))
		if ok && s.PublicPort != 0 {
			out[p] = append(out[p], binding(s))
		}
	}
	return out
}
