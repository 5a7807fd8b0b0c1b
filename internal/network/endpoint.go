package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"
	"conex/internal/portmap"
)

// AttachRequest asks for a container's place on a network.
type AttachRequest struct {
	// ContainerID names the endpoint's record.
	ContainerID string
	// Name is the container's name, for messages such as who holds a port.
	Name string
	// Network is a network's name or id; empty means bridge.
	Network string
	// NetNS is the container's network namespace. It must have no eth0.
	NetNS *os.File
	// Hostname and ExtraHosts are recorded with the endpoint; resolver.Hosts makes the file.
	Hostname   string
	ExtraHosts []string
}

// Endpoint is a container's place on a network, as its record holds it.
type Endpoint struct {
	ContainerID   string       `json:"containerID"`
	ContainerName string       `json:"containerName,omitempty"`
	NetworkID     string       `json:"networkID"`
	NetworkName   string       `json:"networkName"`
	EndpointID    string       `json:"endpointID"`
	HostInterface string       `json:"hostInterface"`
	Address       netip.Prefix `json:"address"`
	Gateway       netip.Addr   `json:"gateway"`
	MAC           string       `json:"mac"`
	MTU           int          `json:"mtu"`
	Hostname      string       `json:"hostname,omitempty"`
	ExtraHosts    []string     `json:"extraHosts,omitempty"`
	// Ports are the published ports, since Publish.
	Ports []portmap.Mapping `json:"ports,omitempty"`
}

// Attach connects a container's network namespace to a network: address, default route, lo up. It makes or repairs the
// network's bridge and nftables table when needed. A record that an earlier, dead run of the container left is taken over,
// its address with it. On an error nothing stays.
func (m *Manager) Attach(ctx context.Context, r AttachRequest) (*Endpoint, error) {
	if r.Network == "" {
		r.Network = Bridge
	}
	ep, err := m.attach(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("attach container %s to network %s: %w", r.ContainerID, r.Network, err)
	}
	return ep, nil
}

func (m *Manager) attach(ctx context.Context, r AttachRequest) (*Endpoint, error) {
	if !validID(r.ContainerID) {
		return nil, fmt.Errorf("container id %q is not usable as a file name", r.ContainerID)
	}
	i, err := m.lookup(ctx, r.Network)
	if err != nil {
		return nil, err
	}
	if i.Interface == "" {
		return nil, fmt.Errorf("a container on network %s has no endpoint", i.Name)
	}
	l, err := m.lock(ctx, i.ID)
	if err != nil {
		return nil, err
	}
	defer l.Release()
	i, bridge, err := m.ensure(i)
	if err != nil {
		return nil, err
	}
	var before netip.Addr
	if old, err := m.readEndpoint(i.ID, r.ContainerID); err == nil {
		before = old.Address.Addr()
		if err := m.drop(ctx, i, old); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ip, err := m.allocate(i, r.ContainerID, before)
	if err != nil {
		return nil, err
	}
	id := disk.RandomID()
	ep := &Endpoint{
		ContainerID: r.ContainerID, ContainerName: r.Name, NetworkID: i.ID, NetworkName: i.Name, EndpointID: id,
		HostInterface: linkPrefix + id[:8], Address: netip.PrefixFrom(ip, i.Subnet.Bits()), Gateway: i.Gateway,
		MAC: hardwareAddr(i.ID, ip).String(), MTU: bridge.mtu, Hostname: r.Hostname, ExtraHosts: r.ExtraHosts,
	}
	if err := m.writeEndpoint(ep); err != nil {
		return nil, errors.Join(err, m.release(i, r.ContainerID, ip))
	}
	l.Release() // the address is ours and the record stands: others need not wait for the kernel
	if err := plug(ep, bridge, r.NetNS); err != nil {
		return nil, errors.Join(err, deleteLink(ep.HostInterface), m.Detach(context.WithoutCancel(ctx), r.ContainerID))
	}
	return ep, nil
}

// linkPrefix begins the name of every veth on the host's side.
const linkPrefix = "cxv"

// Reserve is portmap.Reserve whose error for a taken port names the container that has it, when it is one of this root's.
func (m *Manager) Reserve(ctx context.Context, ports []portmap.Mapping) (*portmap.Reservation, error) {
	r, err := portmap.Reserve(ctx, ports)
	var taken *portmap.TakenError
	if !errors.As(err, &taken) {
		return r, err
	}
	nets, nerr := m.attached()
	if nerr != nil {
		return nil, err // the holder's name is a courtesy
	}
	for _, id := range nets {
		eps, nerr := m.endpoints(id)
		if nerr != nil {
			return nil, err
		}
		for _, e := range eps {
			for _, p := range e.Ports {
				if p.Collides(taken.Mapping) {
					taken.Holder = e.ContainerName
					if taken.Holder == "" {
						taken.Holder = e.ContainerID
					}
				}
			}
		}
	}
	return nil, err
}

// Publish makes reserved ports reach the endpoint and records them in it, so that whoever settles a dead monitor can withdraw
// them. The reservation stays the caller's: Close it when the container ends, before Detach.
func (m *Manager) Publish(ctx context.Context, ep *Endpoint, r *portmap.Reservation) error {
	i, err := m.lookup(ctx, ep.NetworkID)
	if err != nil {
		return err
	}
	n, err := m.portNetwork(i)
	if err != nil {
		return err
	}
	l, err := m.lock(ctx, i.ID)
	if err != nil {
		return err
	}
	defer l.Release()
	ports := r.Mappings()
	if len(ports) == 0 {
		return nil
	}
	for k := range ports {
		ports[k].ContainerIP = ep.Address.Addr()
	}
	ep.Ports = ports
	// The record first: elements without one would be nobody's after a crash.
	if err := m.writeEndpoint(ep); err != nil {
		return err
	}
	return r.Activate(ctx, n, ep.ContainerID, ep.Address.Addr())
}

// Detach forgets a container's endpoints: table elements, address, record. Idempotent, also for what a dead monitor left.
// The veth goes with the container's network namespace; the caller sees to it that no process is left in there, since
// the address is free for others from now on.
func (m *Manager) Detach(ctx context.Context, containerID string) error {
	nets, err := m.attached()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range nets {
		if _, err := os.Lstat(m.recordPath(id, containerID)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, m.detach(ctx, id, containerID))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach container %s: %w", containerID, err)
	}
	return nil
}

// DetachDead is Detach for what a dead process was attaching or detaching: an address that it had claimed and not recorded yet, or not any
// more, comes free too.
func (m *Manager) DetachDead(ctx context.Context, containerID string) error {
	if err := m.Detach(ctx, containerID); err != nil {
		return err
	}
	nets, err := m.attached()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range nets {
		errs = append(errs, func() error {
			l, err := m.lock(ctx, id)
			if err != nil {
				return err
			}
			defer l.Release()
			return errors.Join(m.reap(Info{ID: id}), disk.RemoveTemps(m.recordPath(id, containerID)))
		}())
	}
	return errors.Join(errs...)
}

func (m *Manager) detach(ctx context.Context, networkID, containerID string) error {
	l, err := m.lock(ctx, networkID)
	if err != nil {
		return err
	}
	defer l.Release()
	ep, err := m.readEndpoint(networkID, containerID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody else settled it meanwhile
	}
	if err != nil {
		return err
	}
	i, err := m.lookup(ctx, networkID)
	if errors.Is(err, ErrNotFound) {
		// The root was removed under its state: no table is known for it.
		i, ep.Ports, err = Info{ID: networkID}, nil, nil
	}
	if err != nil {
		return err
	}
	return m.drop(ctx, i, ep)
}

// drop withdraws an endpoint's ports and gives record and address back. The caller holds the network's lock.
func (m *Manager) drop(ctx context.Context, i Info, ep *Endpoint) error {
	if len(ep.Ports) > 0 {
		n, err := m.portNetwork(i)
		if err != nil {
			return err
		}
		if err := portmap.Withdraw(ctx, n, ep.Ports); err != nil {
			return err
		}
	}
	// The record goes first: a claim without a record is reaped when addresses run out, but a record whose address somebody
	// else has would be wrong at once.
	if err := os.Remove(m.recordPath(i.ID, ep.ContainerID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove endpoint record: %w", err)
	}
	return m.release(i, ep.ContainerID, ep.Address.Addr())
}

// Unplug deletes an endpoint's veth when its network namespace outlives the endpoint (somebody holds it open). It takes the
// kernel 24 ms; keep it off the hot path.
func (m *Manager) Unplug(ep *Endpoint) error { return deleteLink(ep.HostInterface) }

// Endpoint returns a container's endpoint, or an error that is ErrNotFound.
func (m *Manager) Endpoint(containerID string) (*Endpoint, error) {
	nets, err := m.attached()
	if err != nil {
		return nil, err
	}
	for _, id := range nets {
		ep, err := m.readEndpoint(id, containerID)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return ep, err
	}
	return nil, fmt.Errorf("endpoint of container %s %w", containerID, ErrNotFound)
}

// attached lists the ids of networks that have a state folder.
func (m *Manager) attached() ([]string, error) {
	entries, err := os.ReadDir(m.state)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network state: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// endpoints reads a network's endpoint records.
func (m *Manager) endpoints(id string) ([]*Endpoint, error) {
	entries, err := os.ReadDir(m.dir(id, "ep"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list endpoints: %w", err)
	}
	var out []*Endpoint
	for _, e := range entries {
		cid, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || disk.IsTemp(e.Name()) {
			continue
		}
		ep, err := m.readEndpoint(id, cid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, ep)
	}
	return out, nil
}

func (m *Manager) recordPath(networkID, containerID string) string {
	return m.dir(networkID, "ep", containerID+".json")
}

func (m *Manager) readEndpoint(networkID, containerID string) (*Endpoint, error) {
	if !validID(containerID) {
		return nil, fmt.Errorf("endpoint of container %q: %w", containerID, fs.ErrNotExist)
	}
	ep := new(Endpoint)
	if err := disk.ReadJSON(m.recordPath(networkID, containerID), ep); err != nil {
		return nil, fmt.Errorf("read endpoint: %w", err)
	}
	return ep, nil
}

func (m *Manager) writeEndpoint(ep *Endpoint) error {
	if err := disk.WriteJSON(m.recordPath(ep.NetworkID, ep.ContainerID), ep, disk.Volatile); err != nil {
		return fmt.Errorf("record endpoint: %w", err)
	}
	return nil
}

// validID keeps ids inside their folder.
func validID(id string) bool {
	return id != "" && id != "." && id != ".." && filepath.Base(id) == id && !strings.HasPrefix(id, ".")
}
