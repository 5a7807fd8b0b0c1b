package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"conex/internal/network"

	apic "github.com/moby/moby/api/types/container"
	mevents "github.com/moby/moby/api/types/events"
	mnet "github.com/moby/moby/api/types/network"
)

// NetworkDescription is the answer to `network inspect`: the Engine API's, whose Go types print an address that is not there as "invalid IP".
type NetworkDescription struct {
	Name                          string
	ID                            string `json:"Id"`
	Created                       time.Time
	Scope, Driver                 string
	EnableIPv4, EnableIPv6        bool
	IPAM                          NetworkIPAM
	Internal, Attachable, Ingress bool
	ConfigFrom                    mnet.ConfigReference
	ConfigOnly                    bool
	// Containers are those that run, by id.
	Containers      map[string]NetworkContainer
	Options, Labels map[string]string
}

// NetworkIPAM says where a network's addresses come from.
type NetworkIPAM struct {
	Driver  string
	Options map[string]string
	Config  []NetworkPool
}

// NetworkPool is one subnet of a network.
type NetworkPool struct {
	Subnet             string
	IPRange            string            `json:",omitempty"`
	Gateway            string            `json:",omitempty"`
	AuxiliaryAddresses map[string]string `json:",omitempty"`
}

// NetworkContainer is a container's place on a network.
type NetworkContainer struct {
	Name, EndpointID, MacAddress, IPv4Address, IPv6Address string
}

// RepairNetworks mends what other tools did to bridges, forwarding and nftables, and returns what it was, a line each.
func (e *Engine) RepairNetworks(ctx context.Context) ([]string, error) {
	done, err := e.Networks().Repair(ctx)
	return done, classify(err)
}

// CreateNetwork makes a network and returns its id. A nil error promises that it survives a power loss.
func (e *Engine) CreateNetwork(ctx context.Context, req mnet.CreateRequest) (string, error) {
	spec, err := networkSpec(&req)
	if err != nil {
		return "", err
	}
	i, err := e.Networks().Create(ctx, spec)
	if err != nil {
		return "", classify(err)
	}
	if !i.ConfigOnly() {
		e.networkEvent(mevents.ActionCreate, i)
	}
	return i.ID, nil
}

// networkSpec checks a request for what no network of this machine can be, and translates it.
func networkSpec(req *mnet.CreateRequest) (network.Spec, error) {
	s := network.Spec{
		Name: req.Name, Driver: req.Driver, IPv4: req.EnableIPv4, IPv6: req.EnableIPv6, Internal: req.Internal, Attachable: req.Attachable,
		ConfigOnly: req.ConfigOnly, Options: req.Options, Labels: req.Labels,
	}
	if err := checkNetworkName(req.Name); err != nil {
		return s, err
	}
	switch {
	case req.Driver == "overlay":
		return s, invalid("-d overlay is refused: an overlay network joins the nodes of a swarm, and conex is on one machine alone")
	case req.Ingress:
		return s, invalid("--ingress is refused: Ingress network can only be global scope network, of a swarm, which conex has not")
	case req.Scope == "swarm" || req.Scope == "global":
		return s, invalid("--scope %s is refused: cannot create a swarm scoped network when swarm is not active, and conex has none", req.Scope)
	case req.Scope != "" && req.Scope != "local":
		return s, invalid("invalid scope %q: it is local", req.Scope)
	case req.Driver == network.Host || req.Driver == network.DriverNull || req.Driver == network.None:
		return s, conflict("only one instance of %q network is allowed", req.Driver)
	}
	if req.ConfigFrom != nil && req.ConfigFrom.Network != "" {
		s.ConfigFrom = req.ConfigFrom.Network
		if req.ConfigOnly {
			return s, invalid("a configuration network can't depend on another configuration network")
		}
	}
	if req.IPAM == nil {
		return s, nil
	}
	if d := req.IPAM.Driver; d != "" && d != "default" {
		return s, invalid("--ipam-driver %s is refused: conex gives addresses out itself (the driver default)", d)
	}
	s.IPAMOptions = req.IPAM.Options
	for _, c := range req.IPAM.Config {
		s.Pools = append(s.Pools, network.Pool{Subnet: c.Subnet, Gateway: c.Gateway, Range: c.IPRange, Aux: c.AuxAddress})
	}
	return s, nil
}

// checkNetworkName refuses what can't name a network. Docker takes nearly everything; what would be a mode of --network or spoil a line of output
// is refused here.
func checkNetworkName(name string) error {
	mode := apic.NetworkMode(name)
	switch {
	case strings.TrimSpace(name) == "":
		return invalid("invalid name: name is empty")
	case !mode.IsUserDefined() && !mode.IsContainer():
		return conflict("operation is not permitted on predefined %s network", name)
	case mode.IsContainer():
		return invalid("invalid name: %s means another container's network", name)
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return invalid("invalid name: %q has control characters", name)
	}
	return nil
}

// networkEvent announces what has happened to a network.
func (e *Engine) networkEvent(action mevents.Action, i network.Info) {
	e.announce(mevents.NetworkEventType, action, i.ID, map[string]string{"name": i.Name, "type": i.Driver})
}

// InspectNetwork describes a network in full.
func (e *Engine) InspectNetwork(ctx context.Context, name string) (NetworkDescription, error) {
	m := e.Networks()
	i, err := m.Network(ctx, name)
	if err != nil {
		return NetworkDescription{}, classify(err)
	}
	// What dead monitors left on it is gone before anybody looks.
	if err := e.Settle(ctx); err != nil {
		return NetworkDescription{}, err
	}
	out := NetworkDescription{
		Name: i.Name, ID: i.ID, Created: i.Created, Scope: i.Scope, Driver: i.Driver, EnableIPv4: i.IPv4.Valid(), EnableIPv6: i.IPv6.Valid(),
		IPAM: NetworkIPAM{Driver: "default", Options: orEmpty(i.IPAMOptions), Config: []NetworkPool{}}, Internal: i.Internal, Attachable: i.Attachable,
		ConfigFrom: mnet.ConfigReference{Network: i.ConfigFrom}, ConfigOnly: i.ConfigOnly(), Containers: map[string]NetworkContainer{},
		Options: orEmpty(i.Options), Labels: orEmpty(i.Labels),
	}
	for _, p := range []network.Pool{i.IPv4, i.IPv6} {
		if p.Valid() {
			out.IPAM.Config = append(out.IPAM.Config, describePool(p))
		}
	}
	if !i.HasEndpoints() {
		out.EnableIPv4 = true
		return out, e.modeContainers(ctx, &out)
	}
	eps, err := m.On(i.ID)
	if err != nil {
		return out, err
	}
	for _, ep := range eps {
		out.Containers[ep.ContainerID] = NetworkContainer{
			Name: ep.ContainerName, EndpointID: ep.EndpointID, MacAddress: ep.MAC, IPv4Address: prefixText(ep.Address), IPv6Address: prefixText(ep.Address6),
		}
	}
	return out, nil
}

// modeContainers lists the running containers of the networks host and none, which have no endpoints.
func (e *Engine) modeContainers(ctx context.Context, out *NetworkDescription) error {
	all, err := e.snapshots(ctx)
	if err != nil {
		return err
	}
	for _, n := range all {
		if n.Alive() != nil && string(n.Record.HostConfig.NetworkMode) == out.Name {
			out.Containers[n.Record.ID] = NetworkContainer{Name: n.Record.Name}
		}
	}
	return nil
}

func describePool(p network.Pool) NetworkPool {
	out := NetworkPool{Subnet: prefixText(p.Subnet), IPRange: prefixText(p.Range), Gateway: addrText(p.Gateway)}
	for name, a := range p.Aux {
		if out.AuxiliaryAddresses == nil {
			out.AuxiliaryAddresses = map[string]string{}
		}
		out.AuxiliaryAddresses[name] = a.String()
	}
	return out
}

// prefixText is a prefix, or nothing where there is none.
func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// orEmpty is a map that JSON shows as one.
func orEmpty(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

// RemoveNetwork forgets a network that no running container is connected to.
func (e *Engine) RemoveNetwork(ctx context.Context, name string) error {
	m := e.Networks()
	i, err := m.Network(ctx, name)
	if err != nil {
		return classify(err)
	}
	err = m.Remove(ctx, i.ID)
	if errors.Is(err, network.ErrInUse) { // perhaps by what dead monitors left
		if err := e.Settle(ctx); err != nil {
			return err
		}
		err = m.Remove(ctx, i.ID)
	}
	if errors.Is(err, network.ErrInUse) {
		return conflict("error while removing network: %w", err)
	}
	if err != nil {
		return classify(err)
	}
	if !i.ConfigOnly() {
		e.networkEvent(mevents.ActionDestroy, i)
	}
	return nil
}

// ListNetworks lists networks by name. Filters are Docker's: dangling, driver, id, label, name, scope, type.
func (e *Engine) ListNetworks(ctx context.Context, filters map[string][]string) ([]mnet.Summary, error) {
	f, err := e.networkFilter(ctx, filters)
	if err != nil {
		return nil, err
	}
	all, err := e.Networks().Networks()
	if err != nil {
		return nil, err
	}
	out := []mnet.Summary{}
	for _, i := range all {
		ok, err := f(i)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		s := mnet.Summary{Network: mnet.Network{
			Name: i.Name, ID: i.ID, Created: i.Created, Scope: i.Scope, Driver: i.Driver, EnableIPv4: i.IPv4.Valid() || !i.HasEndpoints(), EnableIPv6: i.IPv6.Valid(),
			Internal: i.Internal, Attachable: i.Attachable, ConfigFrom: mnet.ConfigReference{Network: i.ConfigFrom}, ConfigOnly: i.ConfigOnly(),
			Options: orEmpty(i.Options), Labels: orEmpty(i.Labels), IPAM: mnet.IPAM{Driver: "default", Options: orEmpty(i.IPAMOptions)},
		}}
		for _, p := range []network.Pool{i.IPv4, i.IPv6} {
			if p.Valid() {
				s.IPAM.Config = append(s.IPAM.Config, mnet.IPAMConfig{Subnet: p.Subnet, IPRange: p.Range, Gateway: p.Gateway, AuxAddress: maps.Clone(p.Aux)})
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b mnet.Summary) int { return naturalOrder(a.Name, b.Name) })
	return out, nil
}

// naturalOrder compares names so that n2 comes before n12.
func naturalOrder(a, b string) int {
	for a != "" && b != "" {
		x, y := digits(a), digits(b)
		if x == 0 || y == 0 {
			if a[0] != b[0] {
				return int(a[0]) - int(b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		m, n := strings.TrimLeft(a[:x], "0"), strings.TrimLeft(b[:y], "0")
		if c := len(m) - len(n); c != 0 {
			return c
		}
		if c := strings.Compare(m, n); c != 0 {
			return c
		}
		if x != y {
			return x - y
		}
		a, b = a[x:], b[y:]
	}
	return len(a) - len(b)
}

// digits is how many digits s begins with.
func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// networkTest tells whether a network is wanted.
type networkTest func(network.Info) (bool, error)

// networkFilter compiles the filters of network ls.
func (e *Engine) networkFilter(ctx context.Context, filters map[string][]string) (networkTest, error) {
	var tests []networkTest
	for _, key := range slices.Sorted(maps.Keys(filters)) {
		t, err := e.networkTest(ctx, key, filters[key])
		if err != nil {
			return nil, err
		}
		tests = append(tests, t)
	}
	return func(i network.Info) (bool, error) {
		for _, t := range tests {
			if ok, err := t(i); !ok || err != nil {
				return false, err
			}
		}
		return true, nil
	}, nil
}

func (e *Engine) networkTest(ctx context.Context, key string, values []string) (networkTest, error) {
	one := func(f func(network.Info) bool) (networkTest, error) {
		return func(i network.Info) (bool, error) { return f(i), nil }, nil
	}
	switch key {
	case "driver":
		return one(func(i network.Info) bool { return slices.Contains(values, i.Driver) })
	case "scope":
		return one(func(i network.Info) bool { return slices.Contains(values, i.Scope) })
	case "label":
		return one(func(i network.Info) bool { return hasLabels(i.Labels, values) })
	case "name", "id":
		res, err := patterns(key, values)
		if err != nil {
			return nil, err
		}
		return one(func(i network.Info) bool {
			s := i.Name
			if key == "id" {
				s = i.ID
			}
			return res(s)
		})
	case "type":
		for _, v := range values {
			if v != "builtin" && v != "custom" {
				return nil, invalid("invalid filter: 'type'='%s': it must be 'builtin' or 'custom'", v)
			}
		}
		return one(func(i network.Info) bool {
			kind := "custom"
			if i.Builtin() {
				kind = "builtin"
			}
			return slices.Contains(values, kind)
		})
	case "dangling":
		want := values[len(values)-1] == "1" || values[len(values)-1] == "true"
		switch {
		case len(values) > 1:
			return nil, invalid(`got more than one value for filter key "dangling"`)
		case !want && values[0] != "0" && values[0] != "false":
			return nil, invalid(`invalid value for filter 'dangling', must be "true" (or "1"), or "false" (or "0")`)
		}
		if err := e.Settle(ctx); err != nil {
			return nil, err
		}
		m := e.Networks()
		return func(i network.Info) (bool, error) {
			eps, err := m.On(i.ID)
			return (!i.Builtin() && len(eps) == 0) == want, err
		}, nil
	}
	return nil, invalid("invalid filter '%s'", key)
}

// pruneNetworks removes networks that no running container is on.
func (e *Engine) pruneNetworks(ctx context.Context, f *pruneFilter, rep *PruneReport) error {
	all, err := e.Networks().Networks()
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b network.Info) int {
		switch {
		case a.ConfigOnly() == b.ConfigOnly():
			return naturalOrder(a.Name, b.Name)
		case a.ConfigOnly(): // after those that have their configuration from it
			return 1
		}
		return -1
	})
	for _, i := range all {
		if i.Builtin() || !f.match(i.Created, i.Labels) {
			continue
		}
		err := e.RemoveNetwork(ctx, i.ID)
		if errors.Is(err, ErrConflict) || errors.Is(err, ErrNotFound) {
			continue // in use, or somebody was faster
		}
		if err != nil {
			return fmt.Errorf("remove network %s: %w", i.Name, err)
		}
		rep.Networks = append(rep.Networks, i.Name)
	}
	return nil
}
