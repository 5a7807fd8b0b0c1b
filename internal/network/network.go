// Package network owns networks/ and the state folder's net/: the bridges, the addresses given out on them, and each
// container's endpoint.
//
// All of it runs in the process that starts or settles a container, in the host's network namespace. Nothing is kept in
// memory: bridge and nftables table are made when the first container needs them, checked at each Attach, and made again
// after a reboot or when somebody deleted them.
//
//	<root>/networks/<id>.json            a network: interface, subnet. Survives a reboot. Written under networks/.lock
//	<state>/net/<id>/alloc.lock          the network's lock
//	<state>/net/<id>/addr/<address>      symlink to the container id: the address is taken
//	<state>/net/<id>/ep/<container>.json the endpoint's record, there before anything is made in the kernel
//	<state>/net/<id>/guard.json          see portmap.Network.Guard; there when conex switched ip_forward on
package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/disk"
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
	// ErrInUse says that endpoints are left on a network.
	ErrInUse = errors.New("network has endpoints")
)

// Manager gives containers their place on a network. It holds no state: any number of processes may have one.
type Manager struct {
	root  *disk.Root
	state string
}

// Open returns the manager of a root and a state folder such as /run/conex. It touches nothing.
func Open(root *disk.Root, state string) *Manager {
	return &Manager{root: root, state: filepath.Join(state, "net")}
}

// Info describes a network.
type Info struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Driver  string    `json:"driver"`
	Scope   string    `json:"scope"`
	Created time.Time `json:"created"`
	// Interface is the bridge's name on the host; empty for host and none, as are Subnet and Gateway.
	Interface string       `json:"interface,omitempty"`
	Subnet    netip.Prefix `json:"subnet,omitzero"`
	Gateway   netip.Addr   `json:"gateway,omitzero"`
}

// table is the nftables table of the installation that owns the bridge: "conex" beside conex0, and beside conex1, when a
// second root has containers on the same host, "conex1".
func (i Info) table() string {
	if i.Interface == firstBridge {
		return "conex"
	}
	return i.Interface
}

// Networks lists bridge, host and none, and what else is recorded. The default network is recorded by this if it isn't yet;
// its bridge is not made.
func (m *Manager) Networks() ([]Info, error) {
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
		driver = "null"
	}
	h := sha256.Sum256([]byte("conex network " + name))
	return Info{ID: hex.EncodeToString(h[:]), Name: name, Driver: driver, Scope: "local"}
}

// records reads networks/*.json.
func (m *Manager) records() ([]Info, error) {
	entries, err := os.ReadDir(m.root.Path("networks"))
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	var list []Info
	for _, e := range entries {
		if disk.IsTemp(e.Name()) || filepath.Ext(e.Name()) != ".json" {
			continue
		}
		var i Info
		if err := disk.ReadJSON(m.root.Path("networks", e.Name()), &i); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			return nil, fmt.Errorf("read network: %w", err)
		}
		list = append(list, i)
	}
	return list, nil
}

func (m *Manager) lookup(ctx context.Context, name string) (Info, error) {
	if name == "" || name == "default" {
		name = Bridge
	}
	if name == Host || name == None {
		return builtin(name), nil
	}
	list, err := m.records()
	if err != nil {
		return Info{}, err
	}
	var byPrefix []Info
	for _, i := range list {
		if i.Name == name || i.ID == name {
			return i, nil
		}
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

// define records the default network.
func (m *Manager) define(ctx context.Context) (Info, error) {
	l, err := disk.AcquireContext(ctx, m.root.Path("networks", ".lock"))
	if err != nil {
		return Info{}, err
	}
	defer l.Release()
	list, err := m.records()
	if err != nil {
		return Info{}, err
	}
	for _, i := range list {
		if i.Name == Bridge {
			return i, nil // another process was first
		}
	}
	i := Info{ID: disk.RandomID(), Name: Bridge, Driver: "bridge", Scope: "local", Created: time.Now().UTC()}
	if err := place(&i); err != nil {
		return Info{}, err
	}
	return i, m.save(i)
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
	l, err := disk.AcquireContext(ctx, m.dir(id, "alloc.lock"))
	if !errors.Is(err, fs.ErrNotExist) {
		return l, err
	}
	if err := m.mkdirs(id); err != nil {
		return nil, err
	}
	return disk.AcquireContext(ctx, m.dir(id, "alloc.lock"))
}

func (m *Manager) mkdirs(id string) error {
	for _, d := range []string{"ep", "addr"} {
		if err := os.MkdirAll(m.dir(id, d), 0o711); err != nil {
			return fmt.Errorf("make network state: %w", err)
		}
	}
	return nil
}

// portNetwork is what portmap needs to know about a network.
func (m *Manager) portNetwork(i Info) (portmap.Network, error) {
	n := portmap.Network{Table: i.table(), Bridge: i.Interface, Subnet: i.Subnet, Live: func() ([]portmap.Mapping, error) { return m.live(i.ID) }}
	err := disk.ReadJSON(m.dir(i.ID, "guard.json"), &n.Guard)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return n, fmt.Errorf("read guard: %w", err)
	}
	return n, nil
}

// live gathers the published ports of a network's endpoints from their records.
func (m *Manager) live(id string) ([]portmap.Mapping, error) {
	eps, err := m.endpoints(id)
	if err != nil {
		return nil, err
	}
	var out []portmap.Mapping
	for _, e := range eps {
		out = append(out, e.Ports...)
	}
	return out, nil
}

// Audit reports what on the host keeps a network's containers from being reached or from reaching out. See portmap.Audit.
func (m *Manager) Audit(ctx context.Context, name string) ([]portmap.Finding, error) {
	i, err := m.lookup(ctx, name)
	if err != nil || i.Interface == "" {
		return nil, err
	}
	n, err := m.portNetwork(i)
	if err != nil {
		return nil, err
	}
	return portmap.Audit(ctx, n)
}
