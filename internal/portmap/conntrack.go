package portmap

import (
	"fmt"
	"net/netip"
	"slices"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// udpFlows matches the kernel's connection records that would send a UDP client to the wrong place. UDP has no end, so a
// client that keeps sending keeps its record alive: to a container that is gone, or past one that has just come.
type udpFlows struct {
	maps []Mapping
	gone bool // the containers of maps are gone
}

// MatchConntrackFlow says whether the record must go.
func (u udpFlows) MatchConntrackFlow(f *rtnetlink.ConntrackFlow) bool {
	if f.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	dst, _ := netip.AddrFromSlice(f.Forward.DstIP)
	src, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
	dst, src = dst.Unmap(), src.Unmap()
	for _, m := range u.maps {
		if m.Proto != "udp" {
			continue
		}
		if u.gone {
			if (src == m.IPv4 || src == m.IPv6) && f.Reverse.SrcPort == m.ContainerPort {
				return true
			}
			continue
		}
		ip := m.HostIP.Unmap()
		if f.Forward.DstPort == m.HostPort && src == dst && (!ip.IsValid() || ip.IsUnspecified() || ip == dst) {
			return true
		}
	}
	return false
}

// flushUDP forgets such records. Without a UDP port it costs nothing.
func flushUDP(ms []Mapping, gone bool) error {
	for _, f := range []struct {
		family  rtnetlink.InetFamily
		mapping func(Mapping) bool
	}{
		{unix.AF_INET, func(m Mapping) bool { return m.IPv4.IsValid() }},
		{unix.AF_INET6, func(m Mapping) bool { return m.IPv6.IsValid() }},
	} {
		if !slices.ContainsFunc(ms, func(m Mapping) bool { return m.Proto == "udp" && f.mapping(m) }) {
			continue
		}
		if _, err := rtnetlink.ConntrackDeleteFilters(rtnetlink.ConntrackTable, f.family, udpFlows{ms, gone}); err != nil {
			return fmt.Errorf("forget udp connections: %w", err)
		}
	}
	return nil
}
