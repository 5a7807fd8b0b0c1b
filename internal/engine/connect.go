package engine

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"slices"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/network"

	apic "github.com/moby/moby/api/types/container"
)

// errShared says why a container that has no network of its own can't be connected to one, in Docker's words.
const errShared = "container sharing network namespace with another container or host cannot be connected to any other network"

// errPrivate is the same for one that is on the network none.
const errPrivate = "container cannot be connected to multiple networks with one of the networks in private (none) mode"

// Connect connects a container to a further network, whether it runs or not. A nil error promises that it will be on it at its next starts too.
func (e *Engine) Connect(ctx context.Context, name string, at container.Attachment) error {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	rec := n.Record
	mode := rec.HostConfig.NetworkMode
	if mode.IsHost() || mode.IsContainer() {
		return invalid("%s", errShared)
	}
	i, err := e.resolveAttachment(ctx, &at)
	switch {
	case err != nil:
		return err
	case i.Name == network.Host:
		return invalid("cannot connect container to host network - container must be created in host network mode")
	case i.Name == network.None || mode.IsNone() && rec.Networks == nil:
		return invalid("%s", errPrivate)
	}
	return e.changeNetworks(ctx, rec.ID, func(c *control.Client) error { return c.Connect(ctx, at) }, func(ats []container.Attachment) ([]container.Attachment, error) {
		if k := slices.IndexFunc(ats, func(o container.Attachment) bool { return o.Same(&at) }); k >= 0 {
			return nil, conflict("container %s is already connected to network %s", rec.Name, at.Network)
		}
		return append(ats, at), nil
	})
}

// Disconnect takes a container off a network. With force also one whose network is gone.
func (e *Engine) Disconnect(ctx context.Context, networkName, name string, force bool) error {
	i, nerr := e.Networks().Network(ctx, networkName)
	if nerr != nil && !(force && errors.Is(nerr, network.ErrNotFound)) {
		return classify(nerr)
	}
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return err
	}
	rec := n.Record
	at := container.Attachment{Network: networkName}
	if nerr == nil {
		at.Network, at.NetworkID = i.Name, i.ID
	}
	mode := rec.HostConfig.NetworkMode
	missing := conflict("container %s is not connected to network %s", rec.ID, at.Network)
	switch {
	case at.Network == network.Host && mode.IsHost():
		return invalid("cannot disconnect container from host network - container was created in host network mode")
	case at.Network == network.None && mode.IsNone() && rec.Networks == nil:
		return e.changeNetworks(ctx, rec.ID, nil, func([]container.Attachment) ([]container.Attachment, error) { return nil, nil })
	}
	return e.changeNetworks(ctx, rec.ID, func(c *control.Client) error { return c.Disconnect(ctx, at) }, func(ats []container.Attachment) ([]container.Attachment, error) {
		k := slices.IndexFunc(ats, func(o container.Attachment) bool { return o.Same(&at) })
		if k < 0 {
			return nil, missing
		}
		return slices.Delete(ats, k, k+1), nil
	})
}

// changeNetworks is change for the networks in a container's record.
func (e *Engine) changeNetworks(ctx context.Context, id string, live func(*control.Client) error, idle func([]container.Attachment) ([]container.Attachment, error)) error {
	err := e.change(ctx, id, live, func() error { return e.setNetworks(id, idle) })
	var ce *control.Error
	if errors.As(err, &ce) && ce.Status == http.StatusConflict {
		return conflict("%w", err)
	}
	return classify(err)
}

// setNetworks changes the networks in a container's record.
func (e *Engine) setNetworks(id string, change func([]container.Attachment) ([]container.Attachment, error)) error {
	cs := e.Containers()
	rec, err := cs.Load(id)
	if err != nil {
		return err
	}
	ats, err := change(slices.Clone(rec.Attachments()))
	if err != nil {
		return err
	}
	_, err = cs.SetNetworks(id, ats)
	return err
}

// resolveAttachment finds the network that an attachment names, writes down what it is, and checks what is wanted of it.
func (e *Engine) resolveAttachment(ctx context.Context, at *container.Attachment) (network.Info, error) {
	i, err := e.Networks().Network(ctx, at.Network)
	if err != nil {
		return i, classify(err)
	}
	if i.ConfigOnly() {
		return i, invalid("cannot create endpoint on configuration-only network %s", i.Name)
	}
	at.Network, at.NetworkID = i.Name, i.ID
	given := at.IPv4.IsValid() || at.IPv6.IsValid()
	switch {
	case i.Builtin() && given:
		return i, invalid("user specified IP address is supported on user defined networks only")
	case i.Builtin() && len(at.Aliases) > 0:
		return i, invalid("network-scoped alias is supported only for containers in user defined networks")
	case at.IPv4.IsValid() && !at.IPv4.Is4():
		return i, invalid("invalid IPv4 address: %s", at.IPv4)
	case at.IPv6.IsValid() && !at.IPv6.Is6():
		return i, invalid("invalid IPv6 address: %s", at.IPv6)
	case i.Chosen && given:
		return i, invalid("user specified IP address is supported only when connecting to networks with user configured subnets")
	}
	for _, a := range []struct {
		ip   netip.Addr
		pool network.Pool
	}{{at.IPv4, i.IPv4}, {at.IPv6, i.IPv6}} {
		switch {
		case a.ip.IsValid() && !a.pool.Valid():
			return i, invalid("user specified IP address is supported only when connecting to networks with user configured subnets: network %s has none for %s", i.Name, a.ip)
		case a.ip.IsValid() && !a.pool.Subnet.Contains(a.ip):
			return i, invalid("invalid address %s: it does not belong to any of this network's subnets (%s)", a.ip, a.pool.Subnet)
		}
	}
	for _, a := range at.LinkLocal {
		if !a.IsLinkLocalUnicast() {
			return i, invalid("invalid link-local IP address: %s", a)
		}
	}
	if err := network.CheckEndpointOptions(at.DriverOpts); err != nil {
		return i, invalid("%w", err)
	}
	return i, nil
}

// attachments are the networks of a new container, by what their names mean now.
func (e *Engine) attachments(ctx context.Context, rec *container.Record) ([]container.Attachment, error) {
	mode := rec.HostConfig.NetworkMode
	if mode.IsHost() || mode.IsNone() || mode.IsContainer() {
		for i := range rec.Networks {
			if err := checkModeSettings(mode, &rec.Networks[i]); err != nil {
				return nil, err
			}
		}
		if len(rec.Networks) > 1 {
			return nil, invalid("conflicting options: cannot attach both user-defined and non-user-defined network-modes")
		}
		return nil, nil
	}
	ats := slices.Clone(rec.Attachments())
	published := len(rec.HostConfig.PortBindings) > 0 || rec.HostConfig.PublishAllPorts
	bridges := 0
	for k := range ats {
		i, err := e.resolveAttachment(ctx, &ats[k])
		if err != nil {
			return nil, err
		}
		switch {
		case !i.HasEndpoints():
			return nil, invalid("conflicting options: cannot attach both user-defined and non-user-defined network-modes")
		case slices.ContainsFunc(ats[:k], func(o container.Attachment) bool { return o.Same(&ats[k]) }):
			return nil, invalid("network %q is specified multiple times", i.Name)
		case i.Driver == network.DriverBridge:
			bridges++
		}
		if mode := string(rec.HostConfig.NetworkMode); k == 0 && mode != i.Name && mode != i.ID {
			rec.HostConfig.NetworkMode = apic.NetworkMode(i.ID) // it was the beginning of an id
		}
	}
	if published && bridges == 0 {
		return nil, invalid("port publishing: none of the container's networks has published ports: those of macvlan and ipvlan are reached at their own addresses")
	}
	return ats, nil
}

// checkModeSettings refuses what a container can't have that has no place of its own on a network.
func checkModeSettings(mode apic.NetworkMode, at *container.Attachment) error {
	switch {
	case at.IPv4.IsValid() || at.IPv6.IsValid():
		return invalid("user specified IP address is supported on user defined networks only")
	case at.MAC != "":
		return invalid("conflicting options: mac-address and the network mode")
	case len(at.Aliases) > 0:
		return invalid("network-scoped aliases are only supported for user-defined networks")
	case len(at.LinkLocal) > 0 || len(at.DriverOpts) > 0 || at.GwPriority != 0:
		return invalid("conflicting options: settings of a network and the network mode %s", mode)
	}
	return nil
}
