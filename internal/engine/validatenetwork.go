package engine

import (
	"context"
	"fmt"
	"net/netip"
	"path"
	"strconv"
	"strings"

	"conex/internal/container"
	"conex/internal/egress"
	"conex/internal/resolver"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

func (e *Engine) validateNetwork(ctx context.Context, conf *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.NetworkMode == "" || hc.NetworkMode.IsDefault():
		hc.NetworkMode = mnet.NetworkBridge
	case hc.NetworkMode == "container" || hc.NetworkMode.IsContainer():
		if err := e.validateJoinedNetwork(conf, hc); err != nil {
			return err
		}
	case hc.NetworkMode.IsHost() && len(hc.Links) > 0:
		return invalid("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
	case hc.NetworkMode.IsHost() || hc.NetworkMode.IsNone():
	default:
		if _, err := e.Networks().Network(ctx, string(hc.NetworkMode)); err != nil {
			return classify(err)
		}
	}
	for p, bindings := range hc.PortBindings {
		if p.Proto() != mnet.TCP && p.Proto() != mnet.UDP && p.Proto() != mnet.SCTP {
			return invalid("publish port %s: protocol %s is not supported, use tcp, udp or sctp", p, p.Proto())
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

// validateEgress checks --egress, which is about a container's own interfaces, and returns its values as they are kept.
func validateEgress(values []string, hc *apic.HostConfig) ([]string, error) {
	values, err := egress.Normal(values)
	if err != nil {
		return nil, invalid("%w", err)
	}
	if len(values) == 0 {
		return nil, nil
	}
	switch m := hc.NetworkMode; {
	case m.IsHost():
		return nil, invalid("conflicting options: --egress and --network host, whose packets are the host's own")
	case m.IsNone():
		return nil, invalid("conflicting options: --egress and --network none, which reaches nothing")
	case m.IsContainer():
		return nil, invalid("conflicting options: --egress and --network container:, whose owner's --egress counts")
	case hc.Privileged:
		return nil, invalid("conflicting options: --egress and --privileged, which may change the host's network")
	}
	return values, nil
}

// validateJoinedNetwork checks --network container:NAME, in Docker's words and order: who joins another container's network has
// its names and ports, and none of his own.
func (e *Engine) validateJoinedNetwork(conf *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.NetworkMode.ConnectedContainer() == "":
		return invalid("invalid network mode: invalid container format container:<name|id>")
	case conf.Hostname != "":
		return invalid("conflicting options: hostname and the network mode")
	case len(hc.Links) > 0:
		return invalid("conflicting options: container type network can't be used with links. This would result in undefined behavior")
	case len(hc.DNS) > 0:
		return invalid("conflicting options: dns and the network mode")
	case len(hc.ExtraHosts) > 0:
		return invalid("conflicting options: custom host-to-IP mapping and the network mode")
	case len(hc.PortBindings) > 0 || hc.PublishAllPorts:
		return invalid("conflicting options: port publishing and the container type network mode")
	case len(conf.ExposedPorts) > 0:
		return invalid("conflicting options: port exposing and the container type network mode")
	case hc.UTSMode.IsHost(): // whose name would it have?
		return invalid("conflicting options: the UTS mode and the network mode")
	}
	id, err := e.containerID(hc.NetworkMode.ConnectedContainer())
	if err != nil {
		return err
	}
	rec, err := e.Containers().Load(id)
	if err != nil {
		return classify(err)
	}
	hc.NetworkMode = apic.NetworkMode(containerPrefix + id)
	conf.Hostname, conf.Domainname = rec.Config.Hostname, rec.Config.Domainname
	return nil
}

// links finds the containers that --link names. One that has joined another's network stands for that one.
func (e *Engine) links(hc *apic.HostConfig) ([]container.Link, error) {
	var out []container.Link
	for _, l := range hc.Links {
		name, alias, ok := strings.Cut(strings.TrimPrefix(l, "/"), ":")
		if !ok {
			alias = name
		}
		alias = path.Base(alias) // "/other:/me/alias", as inspect shows it
		if name == "" || resolver.CheckName(alias) != nil {
			return nil, invalid("bad format for links: %s", l)
		}
		for {
			id, err := e.containerID(name)
			if err != nil {
				return nil, invalid("could not get container for %s: %w", name, err)
			}
			rec, err := e.Containers().Load(id)
			if err != nil {
				return nil, invalid("could not get container for %s: %w", name, classify(err))
			}
			if name = rec.HostConfig.NetworkMode.ConnectedContainer(); name != "" {
				continue
			}
			if rec.HostConfig.NetworkMode.IsHost() {
				return nil, invalid("conflicting options: host type networking can't be used with links. This would result in undefined behavior")
			}
			out = append(out, container.Link{ID: id, Alias: alias})
			break
		}
	}
	return out, nil
}
