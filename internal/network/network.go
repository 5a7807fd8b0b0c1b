// Package network owns networks/ and the state folder's net/: the bridges, the addresses given out on them, and each
// container's endpoints, one a network.
//
// All of it runs in the process that starts or settles a container, in the host's network namespace. Nothing is kept in
// memory: bridge and nftables table are made when the first container needs them, checked at each Attach, and made again
// after a reboot or when somebody deleted them.
//
//	<root>/networks/<id>.json            a network: interface, pools. Survives a reboot. Written under networks/.lock
//	<state>/net/<id>/alloc.lock          the network's lock
//	<state>/net/<id>/addr/<address>      symlink to the container id: the address is taken
//	<state>/net/<id>/ep/<container>.json the endpoint's record, there before anything is made in the kernel
//	<state>/net/table.lock               whoever changes the nftables table; taken after a network's lock
//	<state>/net/guard.json               see guard; there when conex switched forwarding on
//	<state>/net/publish-policy           there when ports are published as Docker does it; see SetPolicy
package network

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/netlink"
	"conex/internal/plainjson"
	"conex/internal/portmap"
)

// Names of the networks that always exist.
const (
	Bridge = "bridge" // the default: NAT behind the interface conex0
	Host   = "host"   // the host's own namespace
	None   = "none"   // loopback only
)

var (
	// ErrNotFound says that there is no such network or endpoint.
	ErrNotFound = errors.New("not found")
	// ErrNoAddress says that a subnet has no free address.
	ErrNoAddress = errors.New("no free address")
	// ErrAddressTaken says that an address that was asked for is somebody else's.
	ErrAddressTaken = errors.New("address already in use")
	// ErrExists says that a network of that name exists.
	ErrExists = errors.New("already exists")
	// ErrInUse says that endpoints are left on a network.
	ErrInUse = errors.New("network has endpoints")
)

// Manager gives containers their place on a network. It holds no state: any number of processes may have one.
type Manager struct {
	root   *disk.Root
	state  string
	socket *netlink.Kept // nil: sockets are closed after use
}

// Open returns the manager of a root and a state folder such as /run/conex. It touches nothing.
func Open(root *disk.Root, state string) *Manager {
	return &Manager{root: root, state: filepath.Join(state, "net")}
}

// KeepSocket makes the manager of a process that lives as long as a container keep its netfilter socket; see netlink.AfterGrace.
func (m *Manager) KeepSocket() { m.socket = new(netlink.Kept) }

// Drivers of networks that have endpoints.
const (
	DriverBridge  = "bridge"
	DriverMacvlan = "macvlan"
	DriverIPvlan  = "ipvlan"
)

// DriverNull is the driver of the network none, and of those that only hold a configuration.
const DriverNull = "null"

// Info describes a network.
type Info struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Driver  string    `json:"driver"`
	Scope   string    `json:"scope"`
	Created time.Time `json:"created"`
	// Interface is the bridge's name on the host; empty for drivers without one.
	Interface string `json:"interface,omitempty"`
	// Parent is the host's interface that macvlan and ipvlan hang on.
	Parent string `json:"parent,omitempty"`
	// IPv4 and IPv6 are where the containers' addresses come from; zero where there is no such address.
	IPv4 Pool `json:"ipv4,omitzero"`
	IPv6 Pool `json:"ipv6,omitzero"`
	// Chosen says that the subnets and the bridge's name are conex's choice: the network may move when somebody else takes them.
	Chosen bool `json:"chosen,omitempty"`
	// Internal networks lead nowhere else; Attachable is recorded alone, as there is no swarm.
	Internal   bool              `json:"internal,omitempty"`
	Attachable bool              `json:"attachable,omitempty"`
	Options    map[string]string `json:"options,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	// IPAMOptions are recorded alone: conex has nothing that they could mean.
	IPAMOptions map[string]string `json:"ipamOptions,omitempty"`
	// Config is what other networks are made from, of a network that is nothing else. ConfigFrom names the one that this was made from.
	Config     *Spec  `json:"config,omitempty"`
	ConfigFrom string `json:"configFrom,omitempty"`
	// Removed says that Remove is at work, or was killed: the network is none any more, and what is left of it will go.
	Removed bool `json:"removed,omitempty"`
}

// ConfigOnly reports whether the network only holds a configuration for others.
func (i Info) ConfigOnly() bool { return i.Config != nil }

// Builtin reports whether the network always exists.
func (i Info) Builtin() bool { return i.Name == Bridge || i.Name == Host || i.Name == None }

// Pool is a network's addresses of one family.
type Pool struct {
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
	// Range is the part of Subnet that addresses are taken from by themselves; zero means all of it.
	Range netip.Prefix `json:"range,omitzero"`
	// Aux are addresses that belong to something else, by name.
	Aux map[string]netip.Addr `json:"aux,omitempty"`
}

// Valid reports whether there is such a pool.
func (p Pool) Valid() bool { return p.Subnet.IsValid() }

// HasEndpoints reports whether containers have a place of their own on the network.
func (i Info) HasEndpoints() bool { return i.Name != Host && i.Name != None }

// Networks lists bridge, host and none, and what else is recorded. The default network is recorded by this if it isn't yet;
// its bridge is not made.
func (m *Manager) Networks() ([]Info, error) {
	if err := m.finishRemovals(context.Background()); err != nil {
		return nil, err
	}
	if _, err := m.lookup(context.Background(), Bridge); err != nil {
		return nil, err
	}
	list, err := m.records()
	if err != nil {
		return nil, err
	}
	return append(list, builtin(Host), builtin(None)), nil
}

// Network returns one network by name, id, or an id's unambiguous beginning. "" and "default" mean the bridge.
func (m *Manager) Network(ctx context.Context, name string) (Info, error) { return m.lookup(ctx, name) }

func builtin(name string) Info {
	driver := name
	if name == None {
		driver = DriverNull
	}
	h := sha256.Sum256([]byte("conex network " + name))
	return Info{ID: hex.EncodeToString(h[:]), Name: name, Driver: driver, Scope: "local"}
}

// records reads networks/*.json, less what is being removed.
func (m *Manager) records() ([]Info, error) {
	list, err := m.allRecords()
	return slices.DeleteFunc(list, func(i Info) bool { return i.Removed }), err
}

// mentions reports whether a JSON text may hold a string.
func mentions(text []byte, s string) bool {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || strings.ContainsRune(`"\<>&`, r) }) {
		return true // it is spelled otherwise there
	}
	return bytes.Contains(text, []byte(`"`+s+`"`))
}

func (m *Manager) allRecords() ([]Info, error) {
	var list []Info
	_, err := m.record(func(string, []byte) bool { return true }, func(i Info) bool {
		list = append(list, i)
		return false
	})
	return list, err
}

// record decodes the records that may be meant, by their id and text, until one is; nil without one.
func (m *Manager) record(may func(id string, text []byte) bool, chosen func(Info) bool) (*Info, error) {
	entries, err := os.ReadDir(m.root.Path("networks"))
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || disk.IsTemp(e.Name()) {
			continue
		}
		text, err := os.ReadFile(m.root.Path("networks", e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read network: %w", err)
		}
		if !may(id, text) {
			continue
		}
		var i Info
		if err := plainjson.Unmarshal(text, &i); err != nil {
			return nil, fmt.Errorf("read network: decode %s: %w", e.Name(), err)
		}
		if chosen(i) {
			return &i, nil
		}
	}
	return nil, nil
}

func (m *Manager) lookup(ctx context.Context, name string) (Info, error) {
	if name == "" || name == "default" {
		name = Bridge
	}
	var byPrefix []Info
	for _, b := range []string{Host, None} {
		switch i := builtin(b); {
		case name == b || name == i.ID:
			return i, nil
		case strings.HasPrefix(i.ID, name):
			byPrefix = append(byPrefix, i)
		}
	}
	// Each start asks several times, so only the record that is meant is decoded, until it turns out that there is none.
	may := func(id string, text []byte) bool { return id == name || mentions(text, name) }
	switch i, err := m.record(may, func(i Info) bool { return !i.Removed && (i.Name == name || i.ID == name) }); {
	case err != nil:
		return Info{}, err
	case i != nil && i.blank():
		return m.define(ctx)
	case i != nil:
		return *i, nil
	}
	list, err := m.records()
	if err != nil {
		return Info{}, err
	}
	for _, i := range list {
		if strings.HasPrefix(i.ID, name) {
			byPrefix = append(byPrefix, i)
		}
	}
	switch {
	case len(byPrefix) == 1:
		return byPrefix[0], nil
	case len(byPrefix) > 1:
		return Info{}, fmt.Errorf("network %s is ambiguous: %d ids begin so", name, len(byPrefix))
	case name == Bridge:
		return m.define(ctx)
	}
	return Info{}, fmt.Errorf("network %s %w", name, ErrNotFound)
}

// blank reports whether a record is of a time when networks had other fields.
func (i Info) blank() bool { return i.Name == Bridge && !i.IPv4.Valid() && !i.IPv6.Valid() }

// define records the default network.
func (m *Manager) define(ctx context.Context) (Info, error) {
	l, err := m.lockRecords(ctx)
	if err != nil {
		return Info{}, err
	}
	defer l.Release()
	list, err := m.records()
	if err != nil {
		return Info{}, err
	}
	i := Info{ID: disk.RandomID(), Name: Bridge, Driver: DriverBridge, Scope: "local", Created: time.Now().UTC(), Chosen: true}
	for _, o := range list {
		switch {
		case o.blank():
			i.ID, i.Created = o.ID, o.Created
		case o.Name == Bridge:
			return o, nil // another process was first
		}
	}
	if err := m.place(&i, list); err != nil {
		return Info{}, err
	}
	return i, m.save(i)
}

// lockRecords locks the list of networks. Whoever writes a record holds it, so that what a killed writer left is swept here.
func (m *Manager) lockRecords(ctx context.Context) (*disk.Lock, error) {
	l, err := disk.AcquireContext(ctx, m.root.Path("networks", ".lock"))
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(m.root.Path("networks"))
	for _, e := range entries {
		if disk.IsTemp(e.Name()) {
			err = errors.Join(err, os.Remove(m.root.Path("networks", e.Name())))
		}
	}
	if err != nil {
		l.Release()
		return nil, fmt.Errorf("sweep networks: %w", err)
	}
	return l, nil
}

func (m *Manager) save(i Info) error {
	if err := disk.WriteJSON(m.root.Path("networks", i.ID+".json"), i, disk.Durable); err != nil {
		return fmt.Errorf("save network %s: %w", i.Name, err)
	}
	return nil
}

// dir is a network's folder in the state folder.
func (m *Manager) dir(id string, elem ...string) string {
	return filepath.Join(append([]string{m.state, id}, elem...)...)
}

// lock takes the network's lock, making its folders first when they are missing.
func (m *Manager) lock(ctx context.Context, id string) (*disk.Lock, error) {
	for { // again while somebody removes them
		l, err := disk.AcquireContext(ctx, m.dir(id, "alloc.lock"))
		if !errors.Is(err, fs.ErrNotExist) {
			return l, err
		}
		if err := m.mkdirs(id); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) { // gone or there for a moment
			return nil, err
		}
	}
}

func (m *Manager) mkdirs(id string) error {
	for _, d := range []string{"ep", "addr"} {
		if err := os.MkdirAll(m.dir(id, d), 0o711); err != nil {
			return fmt.Errorf("make network state: %w", err)
		}
	}
	return nil
}

// lockTable locks the installation's nftables table.
func (m *Manager) lockTable(ctx context.Context) (*disk.Lock, error) {
	return disk.AcquireContext(ctx, filepath.Join(m.state, "table.lock"))
}

// table is the installation's nftables table: "conex" beside conex0, and beside conex1, when a second root has containers on
// the same host, "conex1". So the default bridge marks whose the table is; it stands before any other network is used.
func (m *Manager) table(ctx context.Context) (portmap.Table, error) {
	d, err := m.lookup(ctx, Bridge)
	if err != nil {
		return portmap.Table{}, err
	}
	t := portmap.Table{Name: d.Interface, Bridges: m.bridges, Live: m.live, Socket: m.socket}
	if d.Interface == firstBridge {
		t.Name = "conex"
	}
	if t.Docker, err = m.dockerPolicy(); err != nil {
		return t, err
	}
	g, err := m.readGuard()
	t.Guard = g.Interfaces
	return t, err
}

// bridges are what the table knows about the networks of this root.
func (m *Manager) bridges() ([]portmap.Bridge, error) {
	list, err := m.records()
	if err != nil {
		return nil, err
	}
	var out []portmap.Bridge
	for _, i := range list {
		if i.Driver == DriverBridge {
			out = append(out, i.bridge())
		}
	}
	return out, nil
}

// bridge is what the table knows about a network.
func (i Info) bridge() portmap.Bridge {
	b := portmap.Bridge{Name: i.Interface, Internal: i.Internal, Apart: !i.flag(OptionICC, true)}
	if !i.flag(OptionMasquerade, true) {
		return b
	}
	for _, p := range []Pool{i.IPv4, i.IPv6} {
		if p.Valid() {
			b.Masquerade = append(b.Masquerade, p.Subnet.Masked())
		}
	}
	return b
}

// live gathers the published ports of all endpoints from their records.
func (m *Manager) live() ([]portmap.Mapping, error) {
	nets, err := m.attached()
	if err != nil {
		return nil, err
	}
	var out []portmap.Mapping
	for _, id := range nets {
		eps, err := m.endpoints(id)
		if err != nil {
			return nil, err
		}
		for _, e := range eps {
			out = append(out, e.Ports...)
		}
	}
	return out, nil
}
