package network

import (
	"bytes"
	"conex/internal/linux/netlink"
	"crypto/sha256"
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
)

// ranges are where subnets come from, best first: high in 172.16/12, since Docker climbs it from 172.17.
func ranges(yield func(netip.Prefix) bool) {
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

// Sizes of the subnets that conex chooses: the default network's, which all simple containers share, and the others'.
const (
	defaultBits = 20
	networkBits = 24
	subnet6Bits = 64
)

// freeSubnet returns the first subnet of a size that overlaps none of used.
func freeSubnet(bits int, used []netip.Prefix) (netip.Prefix, bool) {
	for r := range ranges {
		for p := netip.PrefixFrom(r.Addr(), max(bits, r.Bits())); r.Contains(p.Addr()); {
			i := slices.IndexFunc(used, p.Overlaps)
			if i < 0 {
				return p, true
			}
			// Behind what is in the way, if that is larger.
			next := lastAddr(p)
			if used[i].Bits() < p.Bits() {
				next = lastAddr(used[i])
			}
			p = netip.PrefixFrom(next.Next(), p.Bits())
			if !p.Addr().IsValid() {
				break
			}
		}
	}
	return netip.Prefix{}, false
}

// place chooses interface and subnets of a network so that they collide with nothing on the host and no other network now: what
// is set already stays. IPv6 is added where the host has it.
func (m *Manager) place(i *Info, others []Info) error {
	if i.Interface == "" {
		if err := i.nameBridge(); err != nil {
			return err
		}
	}
	used, err := m.used(*i, others)
	if err != nil {
		return err
	}
	bits := networkBits
	if i.Name == Bridge {
		bits = defaultBits
	}
	p, ok := freeSubnet(bits, used)
	if !ok {
		return errors.New("choose a subnet: every private range of conex overlaps a route of this host or another network: give one with --subnet, or remove networks that nobody uses (conex network prune)")
	}
	i.IPv4 = Pool{Subnet: p, Gateway: p.Addr().Next()}
	i.IPv6 = Pool{}
	if hostHasIPv6() {
		return m.placeIPv6(i, others)
	}
	return nil
}

// nameBridge chooses a name for the network's bridge.
func (i *Info) nameBridge() error {
	if i.Name != Bridge {
		i.Interface = bridgePrefix + i.ID[:8]
		return nil
	}
	for n := range maxBridges {
		name := fmt.Sprintf("conex%d", n)
		if _, err := net.InterfaceByName(name); err != nil {
			i.Interface = name
			return nil
		}
	}
	return errors.New("choose a bridge name: all are taken")
}

// placeIPv6 chooses a /64 in the installation's own unique local /48 (RFC 4193), which the random id of its default network makes.
func (m *Manager) placeIPv6(i *Info, others []Info) error {
	home := i.ID
	for _, o := range others {
		if o.Name == Bridge {
			home = o.ID
		}
	}
	used, err := m.used(*i, others)
	if err != nil {
		return err
	}
	h := sha256.Sum256([]byte("conex unique local prefix " + home))
	a := [16]byte{0xfd}
	copy(a[1:6], h[:])
	for n := range 1 << 16 {
		a[6], a[7] = byte(n>>8), byte(n)
		p := netip.PrefixFrom(netip.AddrFrom16(a), subnet6Bits)
		if !slices.ContainsFunc(used, p.Overlaps) {
			i.IPv6 = Pool{Subnet: p, Gateway: p.Addr().Next()}
			return nil
		}
	}
	return errors.New("choose an IPv6 subnet: all are taken")
}

// hostHasIPv6 reports whether the host speaks IPv6 with anybody: an interface that is up, and none of ours, has an address beyond its link.
func hostHasIPv6() bool {
	if v, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6"); err != nil || string(bytes.TrimSpace(v)) != "0" {
		return false
	}
	links, err := net.Interfaces()
	if err != nil {
		return false
	}
	for _, l := range links {
		if l.Flags&net.FlagLoopback != 0 || l.Flags&net.FlagUp == 0 || ours(l.Name) {
			continue
		}
		addrs, err := l.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsGlobalUnicast() {
				return true
			}
		}
	}
	return false
}

// ours reports whether an interface has one of conex's names.
func ours(name string) bool {
	return strings.HasPrefix(name, "conex") || strings.HasPrefix(name, bridgePrefix) || strings.HasPrefix(name, linkPrefix)
}

// used are the prefixes that a network must keep away from: the host's, and those of other networks, whose bridges need not exist now.
func (m *Manager) used(i Info, others []Info) ([]netip.Prefix, error) {
	used, err := usedPrefixes()
	if err != nil {
		return nil, err
	}
	for _, o := range others {
		if o.ID == i.ID || o.ConfigOnly() {
			continue
		}
		for _, p := range []Pool{o.IPv4, o.IPv6} {
			if p.Valid() {
				used = append(used, p.Subnet.Masked())
			}
		}
	}
	return used, nil
}

// usedPrefixes are the host's routes in all tables, but the default ones and those that every host has, and its name servers, which a
// container must be able to reach although no route names them.
func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := netlink.Dump(func() ([]rtnetlink.Route, error) {
		return rtnetlink.RouteListFiltered(unix.AF_UNSPEC, &rtnetlink.Route{Table: unix.RT_TABLE_UNSPEC}, rtnetlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var used []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		if a = a.Unmap(); !ok || ones == 0 || a.Is6() && (a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsLoopback()) {
			continue
		}
		used = append(used, netip.PrefixFrom(a, ones).Masked())
	}
	b, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil {
				a = a.WithZone("")
				used = append(used, netip.PrefixFrom(a, a.BitLen()))
			}
		}
	}
	return used, nil
}
