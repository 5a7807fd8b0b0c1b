package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"
)

// Spec asks for a new network.
type Spec struct {
	Name   string `json:"-"`
	Driver string `json:"-"` // empty means bridge
	// Pools are the subnets that were asked for, at most one a family; what they leave open is chosen.
	Pools []Pool `json:"pools,omitempty"`
	// IPv4 and IPv6 say whether there are such addresses; nil lets conex decide.
	IPv4       *bool             `json:"ipv4,omitempty"`
	IPv6       *bool             `json:"ipv6,omitempty"`
	Internal   bool              `json:"internal,omitempty"`
	Attachable bool              `json:"-"`
	Options    map[string]string `json:"-"`
	Labels     map[string]string `json:"-"`
	// IPAMOptions are recorded alone.
	IPAMOptions map[string]string `json:"ipamOptions,omitempty"`
	// ConfigOnly makes a network that nobody can use: ConfigFrom of others names it, and takes pools, options and labels from it.
	ConfigOnly bool   `json:"-"`
	ConfigFrom string `json:"-"`
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
	if s.ConfigFrom != "" {
		if err := s.take(list); err != nil {
			return Info{}, err
		}
	}
	i := Info{
		ID: disk.RandomID(), Name: s.Name, Driver: cmp.Or(s.Driver, DriverBridge), Scope: "local", Created: time.Now().UTC(), Internal: s.Internal,
		Attachable: s.Attachable, Options: s.Options, Labels: s.Labels, IPAMOptions: s.IPAMOptions, ConfigFrom: s.ConfigFrom,
	}
	if s.ConfigOnly {
		return i.config(s, m)
	}
	if !slices.Contains(drivers(), i.Driver) {
		return Info{}, fmt.Errorf("plugin %q %w: conex has the drivers %s", i.Driver, ErrNotFound, strings.Join(drivers(), ", "))
	}
	if i.Driver == DriverBridge {
		if i.Interface = s.Options[OptionBridgeName]; i.Interface != "" {
			if k := slices.IndexFunc(list, func(o Info) bool { return o.Interface == i.Interface }); k >= 0 {
				return Info{}, fmt.Errorf("cannot create network %s (%s): conflicts with network %s: networks have same bridge name", i.Name, i.Interface, list[k].Name)
			}
		}
	} else {
		i.Parent = s.Options[OptionParent]
	}
	if err := checkOptions(&i); err != nil {
		return Info{}, err
	}
	i.Chosen = len(s.Pools) == 0 && i.Interface == ""
	if err := m.lay(&i, s, list); err != nil {
		return Info{}, err
	}
	if err := checkDriver(&i, list); err != nil {
		return Info{}, err
	}
	if i.Driver != DriverBridge {
		i.Interface = ""
	}
	return i, m.save(i)
}

// take completes a request with the configuration that it names.
func (s *Spec) take(list []Info) error {
	k := slices.IndexFunc(list, func(o Info) bool { return o.ConfigOnly() && (o.Name == s.ConfigFrom || o.ID == s.ConfigFrom) })
	switch {
	case k < 0:
		return fmt.Errorf("configuration network %q does not exist", s.ConfigFrom)
	case len(s.Pools)+len(s.Options)+len(s.Labels)+len(s.IPAMOptions) > 0 || s.IPv4 != nil || s.IPv6 != nil || s.Internal:
		return errors.New("user specified configurations are not supported if the network depends on a configuration network")
	}
	o := list[k]
	s.ConfigFrom = o.Name
	s.Pools, s.IPv4, s.IPv6, s.Internal, s.IPAMOptions = o.Config.Pools, o.Config.IPv4, o.Config.IPv6, o.Config.Internal, o.Config.IPAMOptions
	s.Options, s.Labels = o.Options, o.Labels
	return nil
}

// config records a network that only holds a configuration: what it says is checked when another network takes it.
func (i Info) config(s Spec, m *Manager) (Info, error) {
	i.Driver, i.Config = DriverNull, &s
	for _, p := range s.Pools {
		if q := p; q.complete() != nil {
			return i, q.complete()
		}
		if p.Subnet.Addr().Is4() {
			i.IPv4 = p
		} else {
			i.IPv6 = p
		}
	}
	return i, m.save(i)
}

// lay gives a new network its pools: those asked for, completed and checked, and chosen ones.
func (m *Manager) lay(i *Info, s Spec, others []Info) error {
	want4, want6 := wanted(s.IPv4, i.Options[OptionIPv4]), wanted(s.IPv6, i.Options[OptionIPv6])
	used, err := m.used(*i, others)
	if err != nil {
		return err
	}
	if err := m.place(i, others); err != nil && i.Chosen {
		return err
	}
	if i.Driver != DriverBridge { // nobody routes a prefix of ours on the parent's link
		i.IPv6 = Pool{}
	}
	var given4, given6 bool
	for _, p := range s.Pools {
		if err := p.complete(); err != nil {
			return err
		}
		// macvlan and ipvlan share their parent's subnet by nature.
		if k := slices.IndexFunc(used, p.Subnet.Overlaps); k >= 0 && i.Driver == DriverBridge {
			return fmt.Errorf("invalid pool request: Pool overlaps with other one on this address space: %s overlaps %s (%s)", p.Subnet, used[k], owner(used[k], others))
		}
		to, given := &i.IPv4, &given4
		if p.Subnet.Addr().Is6() {
			to, given = &i.IPv6, &given6
		}
		if *given {
			return fmt.Errorf("%s driver doesn't support multiple subnets of one family: %s and %s", i.Driver, to.Subnet, p.Subnet)
		}
		*to, *given = p, true
	}
	switch {
	case want4 != nil && !*want4 && given4, want6 != nil && !*want6 && given6:
		return errors.New("a subnet is given for a family that is switched off")
	case want4 != nil && !*want4:
		i.IPv4 = Pool{}
	case !i.IPv4.Valid():
		return errors.New("no IPv4 subnet is free: give one with --subnet")
	}
	switch {
	case want6 != nil && !*want6:
		i.IPv6 = Pool{}
	case want6 != nil && !i.IPv6.Valid():
		if err := m.placeIPv6(i, others); err != nil {
			return err
		}
	}
	if !i.IPv4.Valid() && !i.IPv6.Valid() {
		return errors.New("IPv4 or IPv6 must be enabled")
	}
	return nil
}

// wanted is a switch as a flag says it, or else an option; nil where neither does.
func wanted(flag *bool, option string) *bool {
	if flag != nil {
		return flag
	}
	if v, err := strconv.ParseBool(option); err == nil {
		return &v
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
	a := p.Subnet.Addr()
	if a.Is4In6() || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast() && a.Is6() {
		return fmt.Errorf("invalid network config: invalid subnet %s: such addresses are not for networks", p.Subnet)
	}
	if p.Subnet != p.Subnet.Masked() {
		return fmt.Errorf("invalid network config: invalid subnet %s: it should be %s", p.Subnet, p.Subnet.Masked())
	}
	if p.Range.IsValid() && (!p.Subnet.Contains(p.Range.Addr()) || p.Range.Bits() < p.Subnet.Bits()) {
		return fmt.Errorf("invalid network config: invalid ip-range %s: parent subnet is %s", p.Range, p.Subnet)
	}
	if p.Gateway.IsValid() && p.reserved(p.Gateway) {
		return fmt.Errorf("invalid network config: invalid gateway %s: it stands for subnet %s as a whole", p.Gateway, p.Subnet)
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

// Remove forgets a network and removes its bridge. The error is ErrInUse when containers are connected or other networks have their
// configuration from it, ErrNotFound when there is no such network. The default networks stay.
func (m *Manager) Remove(ctx context.Context, name string) error {
	i, err := m.lookup(ctx, name)
	if err != nil {
		return err
	}
	if i.Builtin() {
		return fmt.Errorf("%s is a pre-defined network and cannot be removed", i.Name)
	}
	list, err := m.records()
	if err != nil {
		return err
	}
	if i.ConfigOnly() && slices.ContainsFunc(list, func(o Info) bool { return o.ConfigFrom == i.Name }) {
		return &configInUseError{i.Name}
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
		slices.Sort(who)
		return &inUseError{i.Name, who}
	}
	list, err := m.lockRecords(ctx)
	if err != nil {
		return err
	}
	defer list.Release()
	if _, err := m.lookup(ctx, i.ID); err != nil {
		return err // somebody else was first
	}
	i.Removed = true
	return m.save(i)
}

// inUseError is ErrInUse, in Docker's words.
type inUseError struct {
	network string
	who     []string
}

func (e *inUseError) Error() string {
	return fmt.Sprintf("network %s has active endpoints (%s)", e.network, strings.Join(e.who, ", "))
}

// Is makes errors.Is(err, ErrInUse) true.
func (e *inUseError) Is(target error) bool { return target == ErrInUse }

// configInUseError is ErrInUse of a network that others have their configuration from.
type configInUseError struct{ network string }

func (e *configInUseError) Error() string {
	return fmt.Sprintf("configuration network %q is in use", e.network)
}

// Is makes errors.Is(err, ErrInUse) true.
func (e *configInUseError) Is(target error) bool { return target == ErrInUse }

// finish removes what is left of a condemned network, its record last.
func (m *Manager) finish(ctx context.Context, i Info) error {
	if err := m.cleanup(ctx, i); err != nil {
		return fmt.Errorf("remove network %s: %w", i.Name, err)
	}
	list, err := m.records()
	if err == nil {
		err = dropParent(i, list)
	}
	if err != nil {
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
	_, err = m.attached() // which removes what the removal of a folder left
	errs := []error{err}
	for _, i := range list {
		if i.Removed {
			errs = append(errs, m.finish(ctx, i))
		}
	}
	return errors.Join(errs...)
}
