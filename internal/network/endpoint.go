package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/egress"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// AttachRequest asks for a container's place on a network.
type AttachRequest struct {
	// ContainerID names the endpoint's record.
	ContainerID string
	// Name is the container's name, for messages such as who holds a port, and for other containers' name service.
	Name string
	// Network is a network's name or id; empty means bridge.
	Network string
	// NetNS is the container's network namespace. It must have no interface of the settings' name.
	NetNS *os.File
	// Hostname and ExtraHosts are recorded with the endpoint; resolver.Hosts makes the file.
	Hostname   string
	ExtraHosts []string
	// Exposed are the ports that the container says it serves, such as 80/tcp.
	Exposed  []string
	Settings Settings
}

// Settings are what can be chosen of an endpoint. The zero value lets the network choose.
type Settings struct {
	// Interface is the interface's name inside; empty means eth0.
	Interface string
	// IPv4 and IPv6 are the addresses that it must have.
	IPv4, IPv6 netip.Addr
	// MAC is its hardware address, such as 02:42:ac:11:00:02.
	MAC string
	// LinkLocal are further addresses.
	LinkLocal []netip.Addr
	// Aliases are further names of the container on this network.
	Aliases []string
	// DriverOpts are options of the endpoint by their driver's names.
	DriverOpts map[string]string
	// NoDefaultRoute and NoDefaultRoute6 leave the way out of the container, by IPv4 and by IPv6, to another network of it.
	NoDefaultRoute, NoDefaultRoute6 bool
	// Egress bounds what the container may reach, nil does not.
	Egress *Egress
}

// Egress is what a container may reach on a network.
type Egress struct {
	List egress.List
	// Group is the log group that hears of what was denied; 0 for none.
	Group uint16
	// Learnt are names that were looked up before.
	Learnt egress.Learnt
}

// Endpoint is a container's place on a network, as its record holds it.
type Endpoint struct {
	ContainerID   string `json:"containerID"`
	ContainerName string `json:"containerName,omitempty"`
	NetworkID     string `json:"networkID"`
	NetworkName   string `json:"networkName"`
	Driver        string `json:"driver"`
	EndpointID    string `json:"endpointID"`
	HostInterface string `json:"hostInterface"`
	// Interface is the name inside.
	Interface string `json:"interface"`
	// Address and Gateway are IPv4's, Address6 and Gateway6 IPv6's; zero without.
	Address   netip.Prefix `json:"address,omitzero"`
	Gateway   netip.Addr   `json:"gateway,omitzero"`
	Address6  netip.Prefix `json:"address6,omitzero"`
	Gateway6  netip.Addr   `json:"gateway6,omitzero"`
	LinkLocal []netip.Addr `json:"linkLocal,omitempty"`
	MAC       string       `json:"mac"`
	MTU       int          `json:"mtu"`
	// DefaultRoute and DefaultRoute6 say that the container's way out is here, by IPv4 and by IPv6.
	DefaultRoute  bool              `json:"defaultRoute,omitempty"`
	DefaultRoute6 bool              `json:"defaultRoute6,omitempty"`
	Hostname      string            `json:"hostname,omitempty"`
	ExtraHosts    []string          `json:"extraHosts,omitempty"`
	Aliases       []string          `json:"aliases,omitempty"`
	DriverOpts    map[string]string `json:"driverOpts,omitempty"`
	Exposed       []string          `json:"exposed,omitempty"`
	// Ports are the published ports, since Publish.
	Ports []portmap.Mapping `json:"ports,omitempty"`
	// Filtered says that the host's end has a filter (package egress), which goes with the endpoint.
	Filtered bool `json:"filtered,omitempty"`
	// Filter is that filter, for who attached the container: it has to be closed before the endpoint is detached.
	Filter *egress.Filter `json:"-"`
}

// Names are what the container is called on the network: its name, its aliases, the short id, the host name.
func (ep *Endpoint) Names() []string {
	var names []string
	for _, n := range append([]string{ep.ContainerName}, append(slices.Clone(ep.Aliases), ep.ContainerID[:min(len(ep.ContainerID), 12)], ep.Hostname)...) {
		if n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// Attach connects a container's network namespace to a network: addresses, default route, lo up. It makes or repairs the
// network's bridge and nftables table when needed. A record that an earlier, dead run of the container left is taken over,
// its addresses with it. On an error nothing stays.
func (m *Manager) Attach(ctx context.Context, r AttachRequest) (*Endpoint, error) {
	if r.Network == "" {
		r.Network = Bridge
	}
	i, err := m.lookup(ctx, r.Network)
	var ep *Endpoint
	if err == nil {
		r.Network = i.Name
		ep, err = m.attach(ctx, i, r)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to network %s: %w", r.Network, err)
	}
	return ep, nil
}

func (m *Manager) attach(ctx context.Context, i Info, r AttachRequest) (*Endpoint, error) {
	switch {
	case !validID(r.ContainerID):
		return nil, fmt.Errorf("container id %q is not usable as a file name", r.ContainerID)
	case i.ConfigOnly():
		return nil, fmt.Errorf("cannot create endpoint on configuration-only network %s", i.Name)
	case !i.HasEndpoints():
		return nil, fmt.Errorf("a container on network %s has no endpoint", i.Name)
	case r.Settings.Egress != nil && i.Driver != DriverBridge:
		return nil, boundable(i.Driver, i.Name)
	}
	l, err := m.lock(ctx, i.ID)
	if err != nil {
		return nil, err
	}
	defer l.Release()
	// It may have been removed meanwhile.
	if i, err = m.lookup(ctx, i.ID); err != nil {
		return nil, err
	}
	i, bridge, err := m.ensure(ctx, i)
	if err != nil {
		return nil, err
	}
	old, err := m.readEndpoint(i.ID, r.ContainerID)
	if err == nil {
		err = m.drop(ctx, i, old, nil)
	} else if errors.Is(err, fs.ErrNotExist) {
		old, err = new(Endpoint), nil
	}
	if err != nil {
		return nil, err
	}
	ep := newEndpoint(i, r)
	ep.MTU = bridge.mtu
	if err := m.assign(i, bridge, ep, r.Settings, old); err != nil {
		return nil, errors.Join(err, m.release(i, ep))
	}
	if err := m.writeEndpoint(ep); err != nil {
		return nil, errors.Join(err, m.release(i, ep))
	}
	l.Release() // the address is ours and the record stands: others need not wait for the kernel
	if i.Driver == DriverBridge {
		err = plug(ep, bridge, r.NetNS, !i.flag(OptionICC, true), i.filter(ep, r.Settings.Egress))
	} else {
		err = hang(i, ep, bridge, r.NetNS)
	}
	if err == nil {
		err = applySysctls(ep, r.NetNS)
	}
	if err != nil {
		if ep.Filter != nil {
			err = errors.Join(err, ep.Filter.Close())
		}
		return nil, errors.Join(err, deleteLink(ep.HostInterface), m.DetachFrom(context.WithoutCancel(ctx), r.ContainerID, i.ID))
	}
	return ep, nil
}

func newEndpoint(i Info, r AttachRequest) *Endpoint {
	id := disk.RandomID()
	ep := &Endpoint{
		ContainerID: r.ContainerID, ContainerName: r.Name, NetworkID: i.ID, NetworkName: i.Name, Driver: i.Driver, EndpointID: id,
		Interface: cmp.Or(r.Settings.Interface, "eth0"),
		Hostname:  r.Hostname, ExtraHosts: r.ExtraHosts, Exposed: r.Exposed, Aliases: r.Settings.Aliases, DriverOpts: r.Settings.DriverOpts,
		LinkLocal: r.Settings.LinkLocal, DefaultRoute: !i.Internal && !r.Settings.NoDefaultRoute && i.IPv4.Valid(),
		DefaultRoute6: !i.Internal && !r.Settings.NoDefaultRoute6 && i.IPv6.Valid(),
	}
	if i.Driver == DriverBridge {
		ep.HostInterface = linkPrefix + id[:8]
		ep.Filtered = r.Settings.Egress != nil
	}
	return ep
}

// assign claims the endpoint's addresses: those that are wanted, else those of the endpoint before, else free ones. The caller releases
// them after an error, and holds the network's lock.
func (m *Manager) assign(i Info, bridge link, ep *Endpoint, s Settings, old *Endpoint) error {
	for _, a := range []struct {
		pool   Pool
		wanted netip.Addr
		before netip.Addr
		addr   *netip.Prefix
		gw     *netip.Addr
	}{
		{i.IPv4, s.IPv4, old.Address.Addr(), &ep.Address, &ep.Gateway},
		{i.IPv6, s.IPv6, old.Address6.Addr(), &ep.Address6, &ep.Gateway6},
	} {
		ip := a.wanted
		var err error
		switch {
		case !a.pool.Valid() && ip.IsValid():
			return fmt.Errorf("address %s is not in a subnet of network %s (%s)", ip, i.Name, i.subnets())
		case !a.pool.Valid():
			continue
		case ip.IsValid():
			err = m.want(i, a.pool, ep.ContainerID, ip)
		default:
			ip, err = m.allocate(i, a.pool, ep.ContainerID, a.before)
		}
		if err != nil {
			return err
		}
		*a.addr, *a.gw = netip.PrefixFrom(ip, a.pool.Subnet.Bits()), a.pool.Gateway
		if i.layer3() {
			*a.gw = netip.Addr{} // the way out is the interface itself
		}
	}
	if i.sharesMAC() {
		ep.MAC = bridge.mac.String()
	} else if ep.MAC = s.MAC; ep.MAC == "" {
		first := ep.Address.Addr()
		if !first.IsValid() {
			first = ep.Address6.Addr()
		}
		ep.MAC = hardwareAddr(i.ID, first).String()
	}
	return nil
}

// linkPrefix begins the name of every veth on the host's side.
const linkPrefix = "cxv"

// Detach forgets a container's endpoints: table elements, address, record. Idempotent, also for what a dead monitor left.
// The veth goes with the container's network namespace; the caller sees to it that no process is left in there, since
// the address is free for others from now on.
func (m *Manager) Detach(ctx context.Context, containerID string) error {
	return m.Leave(ctx, containerID, nil)
}

// Leave is Detach by who has the container's reservation, which is closed between: while the listeners stand nobody else can have the ports, and
// while the address is the container's the forwarders reach nobody else. r may be nil.
func (m *Manager) Leave(ctx context.Context, containerID string, r *portmap.Reservation) error {
	err := m.leave(ctx, containerID, r)
	if r != nil {
		err = errors.Join(err, r.Close()) // whatever the records say
	}
	return err
}

func (m *Manager) leave(ctx context.Context, containerID string, r *portmap.Reservation) error {
	nets, err := m.attached()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range nets {
		if _, err := os.Lstat(m.recordPath(id, containerID)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, m.detach(ctx, id, containerID, r))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach container %s: %w", containerID, err)
	}
	return nil
}

// DetachFrom is Detach from one network, by its id.
func (m *Manager) DetachFrom(ctx context.Context, containerID, networkID string) error {
	if err := m.detach(ctx, networkID, containerID, nil); err != nil {
		return fmt.Errorf("detach container %s from network %s: %w", containerID, networkID, err)
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

func (m *Manager) detach(ctx context.Context, networkID, containerID string, r *portmap.Reservation) error {
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
	return m.drop(ctx, i, ep, r)
}

// drop withdraws an endpoint's ports and gives record and addresses back. The caller holds the network's lock.
func (m *Manager) drop(ctx context.Context, i Info, ep *Endpoint, r *portmap.Reservation) error {
	if len(ep.Ports) > 0 {
		t, err := m.table(ctx)
		if err != nil {
			return err
		}
		// Whoever makes the table anew meanwhile would take the ports from the record.
		l, err := m.lockTable(ctx)
		if err != nil {
			return err
		}
		defer l.Release()
		if r != nil && r.Active() {
			err = r.Close()
		} else {
			err = portmap.Withdraw(ctx, t, ep.Ports)
		}
		if err != nil {
			return err
		}
	}
	if ep.Filtered {
		if err := egress.Remove(ep.HostInterface); err != nil {
			return err
		}
	}
	// The record goes first: a claim without a record is reaped when addresses run out, but a record whose address somebody
	// else has would be wrong at once.
	if err := os.Remove(m.recordPath(i.ID, ep.ContainerID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove endpoint record: %w", err)
	}
	return m.release(i, ep)
}

// Unplug deletes an endpoint's interface when its network namespace outlives the endpoint: the container runs on, or somebody holds it
// open. It takes the kernel 24 ms; keep it off the hot path.
func (m *Manager) Unplug(ep *Endpoint, netns *os.File) error {
	if ep.HostInterface != "" || netns == nil {
		return deleteLink(ep.HostInterface)
	}
	c, err := netlink.DialIn(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return err
	}
	defer c.Close()
	return deleteInside(c, ep.Interface)
}

// On returns the endpoints on a network, by its id.
func (m *Manager) On(networkID string) ([]*Endpoint, error) { return m.endpoints(networkID) }

// Endpoints returns a container's endpoints, the one with its default route first.
func (m *Manager) Endpoints(containerID string) ([]*Endpoint, error) {
	nets, err := m.attached()
	if err != nil {
		return nil, err
	}
	var out []*Endpoint
	for _, id := range nets {
		ep, err := m.readEndpoint(id, containerID)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, ep)
	}
	slices.SortStableFunc(out, func(a, b *Endpoint) int {
		return cmp.Or(cmp.Compare(btoi(b.DefaultRoute), btoi(a.DefaultRoute)), cmp.Compare(btoi(b.DefaultRoute6), btoi(a.DefaultRoute6)), cmp.Compare(a.Interface, b.Interface))
	})
	return out, nil
}

// attached lists the ids of networks that have a state folder.
func (m *Manager) attached() ([]string, error) {
	entries, err := os.ReadDir(m.state)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network state: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && !disk.IsTemp(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, disk.RemoveLeft(m.state, entries)
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

// rewriteEndpoint is writeEndpoint for an endpoint that stood before. The container may have another name by now.
func (m *Manager) rewriteEndpoint(ep *Endpoint) error {
	switch now, err := m.readEndpoint(ep.NetworkID, ep.ContainerID); {
	case err == nil:
		ep.ContainerName = now.ContainerName
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return m.writeEndpoint(ep)
}

// Rename records a container's new name in its endpoints, so that others find it by that.
func (m *Manager) Rename(ctx context.Context, containerID, name string) error {
	eps, err := m.Endpoints(containerID)
	if err != nil {
		return err
	}
	for _, ep := range eps {
		err := func() error {
			l, err := m.lock(ctx, ep.NetworkID)
			if err != nil {
				return err
			}
			defer l.Release()
			ep, err := m.readEndpoint(ep.NetworkID, containerID)
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it has ended meanwhile
			}
			if err != nil {
				return err
			}
			ep.ContainerName = name
			return m.writeEndpoint(ep)
		}()
		if err != nil {
			return fmt.Errorf("rename container %s on network %s: %w", containerID, ep.NetworkName, err)
		}
	}
	return nil
}

// validID keeps ids inside their folder.
func validID(id string) bool {
	return id != "" && id != "." && id != ".." && filepath.Base(id) == id && !strings.HasPrefix(id, ".")
}

// Route makes the default routes of a running container lead by four and by six (nil: by none), two of its endpoints eps. A route is replaced,
// so that there is no moment without one. The records follow.
func (m *Manager) Route(eps []*Endpoint, four, six *Endpoint, netns *os.File) error {
	var change, drop []netlink.Message
	var changed []*Endpoint
	for _, ep := range eps {
		if ep.DefaultRoute == (ep == four) && ep.DefaultRoute6 == (ep == six) {
			continue
		}
		changed = append(changed, ep)
	}
	if len(changed) == 0 {
		return nil
	}
	c, err := netlink.DialIn(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, ep := range changed {
		res, err := c.Execute(getLink(ep.Interface))
		if err != nil {
			return err
		}
		l, err := linkOf(res[0])
		if err != nil {
			return fmt.Errorf("look up %s: %w", ep.Interface, err)
		}
		was, is := *ep, *ep
		was.DefaultRoute, was.DefaultRoute6 = ep.DefaultRoute && ep != four, ep.DefaultRoute6 && ep != six
		is.DefaultRoute, is.DefaultRoute6 = ep == four, ep == six
		change = append(change, defaultRoutes(&is, l.index, unix.RTM_NEWROUTE)...)
		drop = append(drop, defaultRoutes(&was, l.index, unix.RTM_DELROUTE)...)
	}
	if err := c.Do(change...); err != nil {
		return fmt.Errorf("change default routes: %w", err)
	}
	for _, msg := range drop { // those that no other has replaced
		if err := c.Do(msg); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove default route: %w", err)
		}
	}
	for _, ep := range changed {
		ep.DefaultRoute, ep.DefaultRoute6 = ep == four, ep == six
		if err := m.rewriteEndpoint(ep); err != nil {
			return err
		}
	}
	return nil
}
