package engine

import (
	"context"
	"strconv"

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
