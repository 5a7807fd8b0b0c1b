package network

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// firstBridge is the default network's interface. A second root on one host gets conex1, and so on.
const firstBridge = "conex0"

// bridgePrefix begins the names of all other bridges.
const bridgePrefix = "cxb"

// maxBridges bounds the search for a free interface name.
const maxBridges = 1000

// ensure sees to the network's bridge, forwarding and table, and to the default network's bridge, which marks the table as ours. The
// caller holds the network's lock. The Info it returns differs from the one given when the network had to move since its interface's
// name or its subnet was taken by somebody else.
func (m *Manager) ensure(ctx context.Context, i Info) (Info, link, error) {
	i, br, err := m.provide(ctx, i)
	if err != nil {
		return i, br, err
	}
	_, err = m.speak(ctx)
	return i, br, err
}

// provide is ensure without a word to iptables.
func (m *Manager) provide(ctx context.Context, i Info) (Info, link, error) {
	if i.Driver != DriverBridge {
		parent, err := ensureParent(i)
		return i, parent, err
	}
	i, br, err := m.erect(ctx, i)
	if err != nil {
		return i, br, err
	}
	if i.Name != Bridge {
		d, err := m.lookup(ctx, Bridge)
		if err != nil {
			return i, br, err
		}
		if _, _, err := m.erect(ctx, d); err != nil {
			return i, br, err
		}
	}
	t, err := m.table(ctx)
	if err != nil {
		return i, br, err
	}
	ok, err := portmap.Standing(t, i.bridge())
	if err != nil {
		return i, br, err
	}
	if !ok {
		l, err := m.lockTable(ctx)
		if err != nil {
			return i, br, err
		}
		err = portmap.Ensure(t, i.bridge())
		l.Release()
		if err != nil {
			return i, br, err
		}
	}
	return i, br, m.forward(ctx, t, i)
}

// erect makes or repairs the network's bridge unless it stands.
func (m *Manager) erect(ctx context.Context, i Info) (Info, link, error) {
	br, ok, err := m.standing(i)
	if err != nil || ok {
		return i, br, err
	}
	return m.raise(ctx, i)
}

// standing checks the bridge in one round trip: it is ours (its MAC says so), up, and has its addresses.
func (m *Manager) standing(i Info) (link, bool, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return link{}, false, err
	}
	defer c.Close()
	ask := []netlink.Message{getLink(i.Interface)}
	for _, a := range i.hostAddresses() {
		ask = append(ask, localRoute(a.Addr()))
	}
	res, err := c.Execute(ask...)
	if err != nil {
		return link{}, false, err
	}
	br, err := linkOf(res[0])
	if errors.Is(err, unix.ENODEV) {
		return link{}, false, nil
	}
	if err != nil {
		return link{}, false, fmt.Errorf("look up %s: %w", i.Interface, err)
	}
	ok := bytes.Equal(br.mac, i.mac()) && br.up
	for _, r := range res[1:] {
		ok = ok && isLocal(r)
	}
	return br, ok, nil
}

// mac is the bridge's own MAC. It marks the interface as this network's, from the moment it exists.
func (i Info) mac() net.HardwareAddr { return hardwareAddr(i.ID, netip.Addr{}) }

// raise makes the bridge or repairs it: once per boot, or after somebody's hand.
func (m *Manager) raise(ctx context.Context, i Info) (Info, link, error) {
	fail := func(err error) (Info, link, error) {
		return i, link{}, fmt.Errorf("set up bridge %s: %w", i.Interface, err)
	}
	// Two roots may look for a name and a subnet at once, so this lock is the network namespace's own.
	l, err := lockNamespace()
	if err != nil {
		return fail(err)
	}
	defer l.Close()
	existing, err := rtnetlink.LinkByName(i.Interface)
	var missing rtnetlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return fail(err)
	}
	if err != nil || !bytes.Equal(existing.Attrs().HardwareAddr, i.mac()) {
		if i, err = m.settle(ctx, i, existing != nil); err != nil {
			return fail(err)
		}
		mtu, err := i.mtu()
		if err != nil {
			return fail(err)
		}
		attrs := rtnetlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = i.Interface, i.mac()
		br := &rtnetlink.Bridge{LinkAttrs: attrs}
		if err := rtnetlink.LinkAdd(br); err != nil {
			return fail(err)
		}
		// Set in one message with its creation it would be 1500 again when the last container goes: a bridge keeps only what it is told later.
		if err := rtnetlink.LinkSetMTU(br, mtu); err != nil {
			return fail(errors.Join(err, rtnetlink.LinkDel(br)))
		}
	}
	br, err := m.configure(i)
	if err != nil {
		return fail(err)
	}
	return i, br, nil
}

// settle sees that nobody else has the network's name of a bridge (taken) or its subnets; a network that chose them itself moves.
func (m *Manager) settle(ctx context.Context, i Info, taken bool) (Info, error) {
	used, err := usedPrefixes()
	if err != nil {
		return i, err
	}
	free := !taken
	for _, p := range []Pool{i.IPv4, i.IPv6} {
		free = free && !(p.Valid() && slices.ContainsFunc(used, p.Subnet.Overlaps))
	}
	if free {
		return i, nil
	}
	eps, err := m.endpoints(i.ID)
	if err != nil {
		return i, err
	}
	switch {
	case len(eps) > 0:
		return i, fmt.Errorf("its name or its subnet %s is used by another interface now: stop the %d containers on it first", i.subnets(), len(eps))
	case !i.Chosen:
		return i, fmt.Errorf("its name or its subnet %s is used by another interface or route of this host now", i.subnets())
	}
	l, err := m.lockRecords(ctx)
	if err != nil {
		return i, err
	}
	defer l.Release()
	list, err := m.records()
	if err != nil {
		return i, err
	}
	if taken {
		i.Interface = ""
	}
	if err := m.place(&i, list); err != nil {
		return i, err
	}
	return i, m.save(i)
}

// subnets are the network's subnets for a message.
func (i Info) subnets() string {
	var s []string
	for _, p := range []Pool{i.IPv4, i.IPv6} {
		if p.Valid() {
			s = append(s, p.Subnet.String())
		}
	}
	return strings.Join(s, ", ")
}

// configure gives the bridge its addresses, brings it up, and brings the veths of running containers back, which lost their bridge
// with the old one.
func (m *Manager) configure(i Info) (link, error) {
	// Without a subnet there is no IPv6 on the bridge, and with one no container can make itself the host's router (CVE-2020-13401).
	// Its link-local address, with which the host looks for containers, counts at once: nobody else on the link can have it. The kernel's own
	// would come with the first container, a little later than that container's first packets.
	settings := [][2]string{{"disable_ipv6", "1"}}
	if i.IPv6.Valid() {
		settings = [][2]string{{"accept_ra", "0"}, {"accept_dad", "0"}, {"disable_ipv6", "0"}}
	}
	for _, s := range settings {
		if err := writeSysctl("ipv6/conf/"+i.Interface+"/"+s[0], s[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return link{}, err
		}
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return link{}, err
	}
	defer c.Close()
	res, err := c.Execute(getLink(i.Interface))
	if err != nil {
		return link{}, err
	}
	br, err := linkOf(res[0])
	if err != nil {
		return br, err
	}
	addrs := i.hostAddresses()
	if i.IPv6.Valid() {
		addrs = append(addrs, netip.PrefixFrom(linkLocal(br.mac), 64))
	}
	var change []netlink.Message
	var local []netip.Addr
	for _, a := range addrs {
		local = append(local, a.Addr())
		change = append(change, netlink.Message{Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Data: addressMessage(br.index, a)})
	}
	change = append(change, netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(br.index, true)})
	if err := c.Do(change...); err != nil {
		return br, err
	}
	if err := awaitLocal(c, br.index, local...); err != nil {
		return br, err
	}
	br.up = true
	eps, err := m.endpoints(i.ID)
	if err != nil {
		return br, err
	}
	for _, ep := range eps {
		join := linkMessage(0, true).String(unix.IFLA_IFNAME, ep.HostInterface).Uint32(unix.IFLA_MASTER, uint32(br.index))
		err := c.Do(netlink.Message{Type: unix.RTM_SETLINK, Data: join})
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return br, fmt.Errorf("bring %s back: %w", ep.HostInterface, err)
		}
	}
	return br, nil
}

// lockNamespace locks this network namespace against other conex processes, whatever their root: flock(2) on the
// namespace's file. Close it to unlock.
func lockNamespace() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock network namespace: %w", err)
	}
	return f, nil
}

// mtu is what the network's packets may have: as its options say, else the uplink's.
func (i Info) mtu() (int, error) {
	if v, err := strconv.Atoi(i.Options[OptionMTU]); err == nil && v != 0 {
		return v, nil
	}
	return uplinkMTU()
}

// uplinkMTU is the MTU of the interface behind the default route; 1500 without one.
func uplinkMTU() (int, error) {
	routes, err := netlink.Dump(func() ([]rtnetlink.Route, error) {
		return rtnetlink.RouteListFiltered(unix.AF_INET, &rtnetlink.Route{Dst: nil}, rtnetlink.RT_FILTER_DST)
	})
	if err != nil {
		return 0, fmt.Errorf("list default routes: %w", err)
	}
	for _, r := range routes {
		if r.LinkIndex == 0 {
			continue
		}
		l, err := rtnetlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			return 0, fmt.Errorf("look up uplink: %w", err)
		}
		return l.Attrs().MTU, nil
	}
	return 1500, nil
}

// Cleanup removes the bridges, the table and the allocation state of all networks of this root. A network with endpoints stays, and
// with it the default network's bridge and the table, and the error is ErrInUse. Forwarding is switched off again where conex switched
// it on and nothing that came since needs it. The networks' records stay.
func (m *Manager) Cleanup(ctx context.Context) error {
	list, err := m.records()
	if err != nil {
		return err
	}
	// The default network comes last: its bridge says whose the table is.
	slices.SortStableFunc(list, func(a, b Info) int { return cmp.Compare(btoi(a.Name == Bridge), btoi(b.Name == Bridge)) })
	var errs []error
	for _, i := range list {
		if i.Name == Bridge && len(errs) > 0 {
			break
		}
		if err := m.cleanup(ctx, i); err != nil {
			errs = append(errs, fmt.Errorf("clean up network %s: %w", i.Name, err))
		}
	}
	return errors.Join(errs...)
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// cleanup removes what there is of one network beside its record.
func (m *Manager) cleanup(ctx context.Context, i Info) error {
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
		return fmt.Errorf("%d left: %w", len(eps), ErrInUse)
	}
	t, err := m.table(ctx)
	if err != nil {
		return err
	}
	br, err := rtnetlink.LinkByName(i.Interface)
	var missing rtnetlink.LinkNotFoundError
	switch {
	case i.Interface == "" || errors.As(err, &missing):
	case err != nil:
		return err
	case bytes.Equal(br.Attrs().HardwareAddr, i.mac()):
		if err := removePorts(br.Attrs().Index); err != nil {
			return err
		}
		if err := deleteLink(i.Interface); err != nil {
			return err
		}
		if err := errors.Join(portmap.Unpass(i.Interface), unspeakLegacy(ctx, i.Interface)); err != nil {
			return err
		}
	default:
		// Another root's bridge, and so its table too.
		return disk.RemoveLocked(m.dir(i.ID))
	}
	tl, err := m.lockTable(ctx)
	if err != nil {
		return err
	}
	defer tl.Release()
	if i.Name != Bridge {
		if err := portmap.RemoveBridge(t, i.bridge()); err != nil {
			return err
		}
		return disk.RemoveLocked(m.dir(i.ID))
	}
	if err := m.unforward(); err != nil {
		return err
	}
	if err := portmap.Remove(t); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(m.guardPath()), os.RemoveAll(m.policyPath()), os.RemoveAll(filepath.Join(m.state, "repair.lock")), disk.RemoveLocked(m.dir(i.ID)))
}

// removePorts deletes our veths that are still on the bridge: their namespace is on its way out, or somebody holds it.
func removePorts(bridge int) error {
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().MasterIndex == bridge && strings.HasPrefix(l.Attrs().Name, linkPrefix) {
			if err := deleteLink(l.Attrs().Name); err != nil {
				return err
			}
		}
	}
	return nil
}
