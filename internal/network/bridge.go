package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// firstBridge is the default network's interface. A second root on one host gets conex1, and so on.
const firstBridge = "conex0"

// maxBridges bounds the search for a free interface name.
const maxBridges = 1000

// pools are the subnets tried for a new network, best first: high in 172.16/12, since Docker climbs it from 172.17.
func pools(yield func(netip.Prefix) bool) {
	for b := 30; b >= 20; b-- {
		if !yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(b), 0, 0}), 16)) {
			return
		}
	}
	for b := 250; b >= 200; b-- {
		if !yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(b), 0, 0}), 16)) {
			return
		}
	}
	for c := 240; c >= 16; c -= 16 {
		if !yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(c), 0}), 20)) {
			return
		}
	}
}

// place chooses interface and subnet of a network so that they collide with nothing on the host now.
func place(i *Info) error {
	i.Interface = ""
	for n := range maxBridges {
		name := fmt.Sprintf("conex%d", n)
		if _, err := net.InterfaceByName(name); err != nil {
			i.Interface = name
			break
		}
	}
	if i.Interface == "" {
		return errors.New("choose a bridge name: all are taken")
	}
	used, err := usedPrefixes()
	if err != nil {
		return err
	}
	for p := range pools {
		if !slices.ContainsFunc(used, p.Overlaps) {
			i.Subnet, i.Gateway = p, p.Addr().Next()
			return nil
		}
	}
	return errors.New("choose a subnet: every private range of conex overlaps a route of this host")
}

// usedPrefixes are the host's IPv4 routes in all tables, but the default one, and its name servers, which a container must be
// able to reach although no route names them.
func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := rtnetlink.RouteListFiltered(unix.AF_INET, &rtnetlink.Route{Table: unix.RT_TABLE_UNSPEC}, rtnetlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var used []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		if a, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok && ones > 0 {
			used = append(used, netip.PrefixFrom(a, ones).Masked())
		}
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil && a.Is4() {
				used = append(used, netip.PrefixFrom(a, 32))
			}
		}
	}
	return used, nil
}

// ensure sees to the network's bridge, forwarding and table. The caller holds the network's lock. The Info it returns differs
// from the one given when the network had to move since its interface's name or its subnet was taken by somebody else.
func (m *Manager) ensure(i Info) (Info, link, error) {
	br, ok, err := m.standing(i)
	if err != nil {
		return i, br, err
	}
	if !ok {
		if i, br, err = m.raise(i); err != nil {
			return i, br, err
		}
	}
	n, err := m.portNetwork(i)
	if err != nil {
		return i, br, err
	}
	on, err := forwarding()
	if err != nil {
		return i, br, err
	}
	if on {
		return i, br, portmap.Ensure(n)
	}
	// Switching forwarding on makes the host a router between all its interfaces. What did not pass before must not pass now,
	// so the table's guard stands first.
	guard, err := uplinks()
	if err != nil {
		return i, br, err
	}
	for _, name := range guard {
		if !slices.Contains(n.Guard, name) {
			n.Guard = append(n.Guard, name)
		}
	}
	if err := disk.WriteJSON(m.dir(i.ID, "guard.json"), n.Guard, disk.Volatile); err != nil {
		return i, br, err
	}
	if err := portmap.Rebuild(n); err != nil {
		return i, br, err
	}
	return i, br, setForwarding("1")
}

// standing checks the bridge in one round trip: it is ours (its MAC says so), up, and has its address.
func (m *Manager) standing(i Info) (link, bool, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return link{}, false, err
	}
	defer c.Close()
	res, err := c.Execute(getLink(i.Interface), localRoute(i.Gateway))
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
	return br, bytes.Equal(br.mac, i.mac()) && br.up && isLocal(res[1]), nil
}

// mac is the bridge's own MAC. It marks the interface as this network's, from the moment it exists.
func (i Info) mac() net.HardwareAddr { return hardwareAddr(i.ID, netip.Addr{}) }

// raise makes the bridge or repairs it: once per boot, or after somebody's hand.
func (m *Manager) raise(i Info) (Info, link, error) {
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
	ours := err == nil && bytes.Equal(existing.Attrs().HardwareAddr, i.mac())
	if !ours {
		free, err := m.free(i)
		if err != nil {
			return fail(err)
		}
		if existing != nil || !free {
			// Somebody else has the name or the subnet. No endpoint is bound to them, so the network moves.
			eps, eerr := m.endpoints(i.ID)
			if eerr != nil {
				return fail(eerr)
			}
			if len(eps) > 0 {
				return fail(fmt.Errorf("its name or its subnet %s is used by another interface now: stop the %d containers on it first", i.Subnet, len(eps)))
			}
			if err := place(&i); err != nil {
				return fail(err)
			}
			if err := m.save(i); err != nil {
				return fail(err)
			}
		}
		mtu, err := uplinkMTU()
		if err != nil {
			return fail(err)
		}
		attrs := rtnetlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = i.Interface, i.mac(), mtu
		if err := rtnetlink.LinkAdd(&rtnetlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fail(err)
		}
	}
	// No IPv6 on the bridge: a container must not be able to send the host router advertisements (CVE-2020-13401).
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+i.Interface+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	res, err := c.Execute(getLink(i.Interface))
	if err != nil {
		return fail(err)
	}
	br, err := linkOf(res[0])
	if err != nil {
		return fail(err)
	}
	err = c.Do(
		netlink.Message{Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Data: addressMessage(br.index, netip.PrefixFrom(i.Gateway, i.Subnet.Bits()))},
		netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(br.index, true)},
	)
	if err != nil {
		return fail(err)
	}
	br.up = true
	// The veths of running containers lost their bridge with the old one.
	eps, err := m.endpoints(i.ID)
	if err != nil {
		return fail(err)
	}
	for _, ep := range eps {
		join := linkMessage(0, true).String(unix.IFLA_IFNAME, ep.HostInterface).Uint32(unix.IFLA_MASTER, uint32(br.index))
		err := c.Do(netlink.Message{Type: unix.RTM_SETLINK, Data: join})
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fail(fmt.Errorf("bring %s back: %w", ep.HostInterface, err))
		}
	}
	return i, br, nil
}

// free reports whether nothing on the host overlaps the network's subnet.
func (m *Manager) free(i Info) (bool, error) {
	used, err := usedPrefixes()
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(used, i.Subnet.Overlaps), nil
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

// uplinkMTU is the MTU of the interface behind the default route; 1500 without one.
func uplinkMTU() (int, error) {
	routes, err := rtnetlink.RouteListFiltered(unix.AF_INET, &rtnetlink.Route{Dst: nil}, rtnetlink.RT_FILTER_DST)
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

// uplinks are the interfaces that lead out of the host: all but lo, the bridges of container engines and virtual machines
// (whose owners want them forwarded), and what is a port of another.
func uplinks() ([]string, error) {
	links, err := rtnetlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	outward := make(map[int]bool) // bridges with a port that is no container's or machine's
	for _, l := range links {
		if t := l.Type(); l.Attrs().MasterIndex != 0 && t != "veth" && t != "tuntap" && t != "tun" {
			outward[l.Attrs().MasterIndex] = true
		}
	}
	names := []string{}
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.MasterIndex != 0 || l.Type() == "bridge" && !outward[a.Index] {
			continue
		}
		names = append(names, a.Name)
	}
	return names, nil
}

const forwardFile = "/proc/sys/net/ipv4/ip_forward"

func forwarding() (bool, error) {
	b, err := os.ReadFile(forwardFile)
	if err != nil {
		return false, fmt.Errorf("read forwarding: %w", err)
	}
	return string(bytes.TrimSpace(b)) != "0", nil
}

func setForwarding(v string) error {
	if err := os.WriteFile(forwardFile, []byte(v), 0); err != nil {
		return fmt.Errorf("set forwarding: %w", err)
	}
	return nil
}

// Cleanup removes the bridges, tables and allocation state of all networks of this root. A network with endpoints stays, and
// the error is ErrInUse. Forwarding is switched off again where conex switched it on and nothing that came since needs it.
// The networks' records stay.
func (m *Manager) Cleanup(ctx context.Context) error {
	list, err := m.records()
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range list {
		if err := m.cleanup(ctx, i); err != nil {
			errs = append(errs, fmt.Errorf("clean up network %s: %w", i.Name, err))
		}
	}
	return errors.Join(errs...)
}

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
	br, err := rtnetlink.LinkByName(i.Interface)
	var missing rtnetlink.LinkNotFoundError
	switch {
	case errors.As(err, &missing):
	case err != nil:
		return err
	case bytes.Equal(br.Attrs().HardwareAddr, i.mac()):
		if err := removePorts(br.Attrs().Index); err != nil {
			return err
		}
		if err := deleteLink(i.Interface); err != nil {
			return err
		}
	default:
		// Another root's bridge, and so its table too.
		return os.RemoveAll(m.dir(i.ID))
	}
	n, err := m.portNetwork(i)
	if err != nil {
		return err
	}
	if err := m.unforward(n.Guard); err != nil {
		return err
	}
	if err := portmap.Remove(n); err != nil {
		return err
	}
	return os.RemoveAll(m.dir(i.ID))
}

// removePorts deletes our veths that are still on the bridge: their namespace is on its way out, or somebody holds it.
func removePorts(bridge int) error {
	links, err := rtnetlink.LinkList()
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

// unforward switches forwarding off if conex switched it on, since the guard goes with the table. An interface that came after
// (another engine's bridge) may need it by now: then it stays.
func (m *Manager) unforward(guard []string) error {
	if guard == nil {
		return nil
	}
	links, err := rtnetlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		// Better a router too many than Docker's containers cut off.
		if l.Type() == "bridge" && !slices.Contains(guard, l.Attrs().Name) {
			return nil
		}
	}
	return setForwarding("0")
}
