package engine

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"conex/internal/resolver"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

func (e *Engine) validateNetwork(ctx context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.NetworkMode == "" || hc.NetworkMode.IsDefault():
		hc.NetworkMode = mnet.NetworkBridge
	case hc.NetworkMode.IsContainer():
		return invalid("--network container:… is not supported yet, use bridge, none or host")
	case hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone():
	default:
		if _, err := e.Networks().Network(ctx, string(hc.NetworkMode)); err != nil {
			return classify(err)
		}
	}
	for p, bindings := range hc.PortBindings {
		if p.Proto() != mnet.TCP && p.Proto() != mnet.UDP {
			return invalid("publish port %s: protocol %s is not supported, use tcp or udp", p, p.Proto())
		}
		for _, b := range bindings {
			first, last, isRange := strings.Cut(b.HostPort, "-")
			n, err := strconv.ParseUint(first, 10, 16)
			if err == nil && isRange {
				var m uint64
				if m, err = strconv.ParseUint(last, 10, 16); err == nil && m < n {
					err = fmt.Errorf("%d is less than %d", m, n)
				}
			}
			if err != nil && b.HostPort != "" {
				return invalid("invalid hostPort: %s", b.HostPort)
			}
		}
	}
	if _, err := resolver.ExpandHosts(hc.ExtraHosts, netip.AddrFrom4([4]byte{127, 0, 0, 1})); err != nil {
		return invalid("%w", err)
	}
	return nil
}
