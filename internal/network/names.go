package network

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"conex/internal/disk"
	"conex/internal/dns"
)

// Names are what a container calls others, for its name service: who is on the networks that it is on, by the endpoints' records. They are
// read when somebody asks, and again whenever a network's folder has changed; until the first question there is nothing in memory.
type Names struct {
	m *Manager
	// Exists reports whether there is a container of a name, running or not: such a name is nobody else's business.
	Exists func(name string) bool
	// Links are other containers, by name or id, under a name of the container's own.
	Links map[string]string

	mu      sync.Mutex
	own     []*Endpoint
	rosters []*roster
	subnets struct {
		stamp disk.Stamp
		list  []netip.Prefix
	}
}

var _ dns.Names = (*Names)(nil)

// Names returns the names that a container knows who is nowhere yet.
func (m *Manager) Names() *Names { return &Names{m: m} }

// Join says where the container is now, the network with the way out first.
func (n *Names) Join(own []*Endpoint) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var rosters []*roster
	for _, ep := range own {
		k := slices.IndexFunc(n.rosters, func(r *roster) bool { return r.network == ep.NetworkID })
		if k >= 0 {
			rosters = append(rosters, n.rosters[k])
		} else {
			rosters = append(rosters, &roster{m: n.m, network: ep.NetworkID, name: strings.ToLower(ep.NetworkName)})
		}
	}
	n.own, n.rosters = slices.Clone(own), rosters
}

// gatewayNames stand for the host, as the container reaches it: Docker's and podman's.
var gatewayNames = []string{"host.docker.internal", "gateway.docker.internal", "host.containers.internal"}

// Addresses implements dns.Names.
func (n *Names) Addresses(name string) ([]netip.Addr, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Contains(gatewayNames, name) {
		return n.gateways(), true, nil
	}
	who, known, err := n.find(name)
	var out []netip.Addr
	for _, p := range who {
		out = append(out, p.addrs...)
	}
	return out, known, err
}

func (n *Names) gateways() []netip.Addr {
	var out []netip.Addr
	if len(n.own) > 0 {
		for _, a := range []netip.Addr{n.own[0].Gateway, n.own[0].Gateway6} {
			if a.IsValid() {
				out = append(out, a)
			}
		}
	}
	return out
}

// find returns who has a name: what the container itself calls so, containers' names and aliases on its networks in their order, the same with
// the network's name behind, and last host names, which need not be unique.
func (n *Names) find(name string) (who []*person, known bool, err error) {
	for alias, target := range n.Links {
		if strings.EqualFold(alias, name) {
			name = strings.ToLower(target)
			break
		}
	}
	for _, r := range n.rosters {
		if err := r.refresh(); err != nil {
			return nil, false, err
		}
		if who := r.names[name]; who != nil {
			return who, true, nil
		}
	}
	for _, r := range n.rosters {
		if base, ok := strings.CutSuffix(name, "."+r.name); ok {
			if who := r.names[base]; who != nil {
				return who, true, nil
			}
			known = known || n.exists(base)
		}
	}
	for _, r := range n.rosters {
		if who := r.hosts[name]; who != nil {
			return who, true, nil
		}
	}
	return nil, known || n.exists(name), nil
}

func (n *Names) exists(name string) bool { return n.Exists != nil && n.Exists(name) }

// Reverse implements dns.Names.
func (n *Names) Reverse(a netip.Addr) (string, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range n.rosters {
		if err := r.refresh(); err != nil {
			return "", false, err
		}
		if p := r.addrs[a]; p != nil {
			return p.name + "." + r.name, true, nil
		}
	}
	stamp, err := disk.StampOf(n.m.root.Path("networks"))
	if err != nil {
		return "", false, fmt.Errorf("look for networks: %w", err)
	}
	if !n.subnets.stamp.Still(stamp) {
		list, err := n.m.records()
		if err != nil {
			return "", false, err
		}
		n.subnets.stamp, n.subnets.list = stamp, nil
		for _, i := range list {
			// On somebody else's network others have names, too.
			if i.Driver == DriverBridge {
				n.subnets.list = append(n.subnets.list, i.IPv4.Subnet, i.IPv6.Subnet)
			}
		}
	}
	return "", slices.ContainsFunc(n.subnets.list, func(p netip.Prefix) bool { return p.IsValid() && p.Contains(a) }), nil
}

// Services implements dns.Names.
func (n *Names) Services(name, proto string, port uint16) ([]dns.Service, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	who, known, err := n.find(name)
	var out []dns.Service
	for _, p := range who {
		if slices.Contains(p.exposed, fmt.Sprintf("%d/%s", port, proto)) {
			out = append(out, dns.Service{Name: strings.ToLower(p.name), Port: port, Addrs: slices.Clone(p.addrs)})
		}
	}
	return out, known, err
}

// Outward implements dns.Names.
func (n *Names) Outward() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.own, func(ep *Endpoint) bool { return ep.DefaultRoute })
}

// roster is who is on one network.
type roster struct {
	m             *Manager
	network, name string

	stamp disk.Stamp
	files map[string]*person // by the name of the record's file
	names map[string][]*person
	hosts map[string][]*person
	addrs map[netip.Addr]*person
}

// person is a container on a network.
type person struct {
	stamp    disk.Stamp
	name     string
	called   []string // in lower case
	hostname string
	addrs    []netip.Addr
	exposed  []string
}

// refresh reads what has changed of the network's records.
func (r *roster) refresh() error {
	dir := r.m.dir(r.network, "ep")
	stamp, err := disk.StampInMemory(dir)
	if errors.Is(err, fs.ErrNotExist) {
		*r = roster{m: r.m, network: r.network, name: r.name}
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for endpoints: %w", err)
	}
	if r.stamp.Still(stamp) {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list endpoints: %w", err)
	}
	files := make(map[string]*person, len(entries))
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || disk.IsTemp(e.Name()) {
			continue
		}
		s, err := disk.StampOf(r.m.recordPath(r.network, id))
		if err == nil {
			if old := r.files[e.Name()]; old != nil && old.stamp.Still(s) {
				files[e.Name()] = old
				continue
			}
			var ep *Endpoint
			if ep, err = r.m.readEndpoint(r.network, id); err == nil {
				files[e.Name()] = newPerson(ep, s)
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.stamp = stamp
	if maps.Equal(files, r.files) {
		return nil
	}
	r.files, r.names, r.hosts, r.addrs = files, map[string][]*person{}, map[string][]*person{}, map[netip.Addr]*person{}
	for _, p := range files {
		for _, name := range p.called {
			r.names[name] = append(r.names[name], p)
		}
		if p.hostname != "" {
			r.hosts[p.hostname] = append(r.hosts[p.hostname], p)
		}
		for _, a := range p.addrs {
			r.addrs[a] = p
		}
	}
	return nil
}

func newPerson(ep *Endpoint, s disk.Stamp) *person {
	p := &person{stamp: s, name: ep.ContainerName, hostname: strings.ToLower(ep.Hostname), exposed: ep.Exposed}
	if p.name == "" {
		p.name = ep.ContainerID[:min(len(ep.ContainerID), 12)]
	}
	for _, name := range append([]string{p.name, ep.ContainerID, ep.ContainerID[:min(len(ep.ContainerID), 12)]}, ep.Aliases...) {
		if name = strings.ToLower(name); name != "" && !slices.Contains(p.called, name) {
			p.called = append(p.called, name)
		}
	}
	for _, a := range []netip.Prefix{ep.Address, ep.Address6} {
		if a.IsValid() {
			p.addrs = append(p.addrs, a.Addr())
		}
	}
	return p
}
