package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
)

// Spec asks for a new network.
type Spec struct {
	Name   string
	Driver string // empty means bridge
	Parent string // of macvlan and ipvlan
	// Pools are the subnets that were asked for, at most one a family; what they leave open is chosen.
	Pools []Pool
	// IPv4 and IPv6 say whether there are such addresses; nil lets conex decide.
	IPv4, IPv6           *bool
	Internal, Attachable bool
	Options, Labels      map[string]string
}

// Create records a new network. Its bridge is made when the first container comes. The error is ErrExists when the name is taken.
func (m *Manager) Create(ctx context.Context, s Spec) (Info, error) {
	if _, err := m.lookup(ctx, Bridge); err != nil { // the installation's first network, see table
		return Info{}, err
	}
	if err := m.finishRemovals(ctx); err != nil {
		return Info{}, err
	}
	l, err := m.lockRecords(ctx)
	if err != nil {
		return Info{}, err
	}
	defer l.Release()
	list, err := m.records()
	if err != nil {
		return Info{}, err
	}
	if slices.Contains([]string{Host, None, "default"}, s.Name) || slices.ContainsFunc(list, func(o Info) bool { return o.Name == s.Name }) {
		return Info{}, fmt.Errorf("network with name %s %w", s.Name, ErrExists)
	}
	i := Info{
		ID: disk.RandomID(), Name: s.Name, Driver: s.Driver, Scope: "local", Created: time.Now().UTC(), Parent: s.Parent,
		Internal: s.Internal, Attachable: s.Attachable, Options: s.Options, Labels: s.Labels, Chosen: len(s.Pools) == 0,
	}
	if i.Driver == "" {
		i.Driver = DriverBridge
	}
	if name := s.Options[OptionBridgeName]; name != "" && i.Driver == DriverBridge {
		if _, err := net.InterfaceByName(name); err == nil {
			return Info{}, fmt.Errorf("bridge name %s is taken by an interface of this host", name)
		}
		i.Interface, i.Chosen = name, false
	}
	if err := m.lay(&i, s, list); err != nil {
		return Info{}, err
	}
	if i.Driver != DriverBridge {
		i.Interface = ""
	}
	return i, m.save(i)
}

// lay gives a new network its pools: those asked for, completed and checked, and chosen ones.
func (m *Manager) lay(i *Info, s Spec, others []Info) error {
	used, err := m.used(*i, others)
	if err != nil {
		return err
	}
	if err := m.place(i, others); err != nil && i.Chosen {
		return err
	}
	var given4, given6 bool
	for _, p := range s.Pools {
		if !p.Subnet.IsValid() {
			continue
		}
		if err := p.complete(); err != nil {
			return err
		}
		// macvlan and ipvlan share their parent's subnet by nature.
		if k := slices.IndexFunc(used, p.Subnet.Overlaps); k >= 0 && i.Driver == DriverBridge {
			return fmt.Errorf("invalid pool request: Pool overlaps with other one on this address space: %s overlaps %s (%s)", p.Subnet, used[k], owner(used[k], others))
		}
		if p.Subnet.Addr().Is4() {
			i.IPv4, given4 = p, true
		} else {
			i.IPv6, given6 = p, true
		}
	}
	switch {
	case s.IPv4 != nil && !*s.IPv4 && given4, s.IPv6 != nil && !*s.IPv6 && given6:
		return errors.New("a subnet is given for a family that is switched off")
	case s.IPv4 != nil && !*s.IPv4:
		i.IPv4 = Pool{}
	case !i.IPv4.Valid():
		return errors.New("no IPv4 subnet is free: give one with --subnet")
	}
	switch {
	case s.IPv6 != nil && !*s.IPv6:
		i.IPv6 = Pool{}
	case s.IPv6 != nil && !i.IPv6.Valid():
		if err := m.placeIPv6(i, others); err != nil {
			return err
		}
	}
	if !i.IPv4.Valid() && !i.IPv6.Valid() {
		return errors.New("IPv4 or IPv6 must be enabled")
	}
	return nil
}

// owner says whose a prefix is, for a message.
func owner(p netip.Prefix, others []Info) string {
	for _, o := range others {
		if o.IPv4.Valid() && o.IPv4.Subnet.Masked() == p || o.IPv6.Valid() && o.IPv6.Subnet.Masked() == p {
			return "network " + o.Name
		}
	}
	return "a route or a name server of this host"
}

// complete checks a pool and gives it a gateway, the first address of its range or subnet.
func (p *Pool) complete() error {
	if p.Subnet != p.Subnet.Masked() {
		return fmt.Errorf("invalid network config: invalid subnet %s: it should be %s", p.Subnet, p.Subnet.Masked())
	}
	if p.Range.IsValid() && (!p.Subnet.Contains(p.Range.Addr()) || p.Range.Bits() < p.Subnet.Bits()) {
		return fmt.Errorf("invalid network config: invalid ip-range %s: parent subnet is %s", p.Range, p.Subnet)
	}
	if p.Gateway.IsValid() && !p.Subnet.Contains(p.Gateway) {
		return fmt.Errorf("invalid network config: invalid gateway %s: parent subnet is %s", p.Gateway, p.Subnet)
	}
	for name, a := range p.Aux {
		if !p.Subnet.Contains(a) {
			return fmt.Errorf("invalid network config: invalid auxiliary address %s (%s): parent subnet is %s", a, name, p.Subnet)
		}
	}
	if !p.Gateway.IsValid() {
		p.Gateway = p.Subnet.Addr().Next()
		for slices.Contains(auxAddrs(p.Aux), p.Gateway) {
			p.Gateway = p.Gateway.Next()
		}
		if !p.Subnet.Contains(p.Gateway) {
			return fmt.Errorf("invalid network config: subnet %s has no room for a gateway", p.Subnet)
		}
	}
	return nil
}

func auxAddrs(aux map[string]netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range aux {
		out = append(out, a)
	}
	return out
}

// Remove forgets a network and removes its bridge. The error is ErrInUse when containers are connected, ErrNotFound when there is no
// such network. The default networks stay.
func (m *Manager) Remove(ctx context.Context, name string) error {
	i, err := m.lookup(ctx, name)
	if err != nil {
		return err
	}
	if i.Name == Bridge || !i.HasEndpoints() {
		return fmt.Errorf("%s is a pre-defined network and cannot be removed", i.Name)
	}
	if err := m.condemn(ctx, i); err != nil {
		return err
	}
	return m.finish(ctx, i)
}

// condemn marks a network without endpoints as one that goes.
func (m *Manager) condemn(ctx context.Context, i Info) error {
	l, err := m.lock(ctx, i.ID)
	if err != nil {
		return err
	}
	defer l.Release()
	eps, err := m.endpoints(i.ID)
	if err != nil {
		return err
	}
	if len(eps) > 0 {
		var who []string
		for _, ep := range eps {
			who = append(who, cmp.Or(ep.ContainerName, ep.ContainerID))
		}
		return fmt.Errorf("network %s has active endpoints (%s): %w", i.Name, strings.Join(who, ", "), ErrInUse)
	}
	if _, err := m.lookup(ctx, i.ID); err != nil {
		return err // somebody else was first
	}
	i.Removed = true
	return m.save(i)
}

// finish removes what is left of a condemned network, its record last.
func (m *Manager) finish(ctx context.Context, i Info) error {
	if err := m.cleanup(ctx, i); err != nil {
		return fmt.Errorf("remove network %s: %w", i.Name, err)
	}
	if err := os.Remove(m.root.Path("networks", i.ID+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network %s: %w", i.Name, err)
	}
	return nil
}

// finishRemovals ends what a killed Remove began.
func (m *Manager) finishRemovals(ctx context.Context) error {
	list, err := m.allRecords()
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range list {
		if i.Removed {
			errs = append(errs, m.finish(ctx, i))
		}
	}
	return errors.Join(errs...)
}
