package engine

import (
	"context"
	"strconv"

	"conex/internal/container"
	"conex/internal/portmap"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// Port lists the ports that a running container publishes. A container that doesn't run publishes none.
func (e *Engine) Port(ctx context.Context, name string) (mnet.PortMap, error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return nil, err
	}
	return portMap(n), nil
}

func binding(s apic.PortSummary) mnet.PortBinding {
	return mnet.PortBinding{HostIP: s.IP, HostPort: strconv.Itoa(int(s.PublicPort))}
}

// AuditPorts says from where published ports can be reached and why: those of one container, or with an empty name of all that run.
func (e *Engine) AuditPorts(ctx context.Context, name string) ([]portmap.Reach, error) {
	var list []*container.Snapshot
	if name != "" {
		n, err := e.snapshot(ctx, name)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	} else {
		var err error
		if list, err = e.snapshots(ctx); err != nil {
			return nil, err
		}
	}
	out := []portmap.Reach{}
	for _, n := range list {
		a := n.Alive()
		if a == nil {
			continue
		}
		r, err := e.Networks().Reaches(ctx, n.Record.Name, a.Ports())
		if err != nil {
			return nil, err
		}
		out = append(out, r...)
	}
	return out, nil
}
