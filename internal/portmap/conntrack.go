package portmap

import (
	"fmt"
	"net/netip"

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
			if src == m.ContainerIP && f.Reverse.SrcPort == m.ContainerPort {
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
	any := false
	for _, m := range ms {
		_, _, ok := m.key()
		any = any || ok && m.Proto == "udp"
	}
	if !any {
		return nil
	}
	if _, err := rtnetlink.ConntrackDeleteFilters(rtnetlink.ConntrackTable, unix.AF_INET, udpFlows{ms, gone}); err != nil {
		return fmt.Errorf("forget udp connections: %w", err)
	}
	return nil
}
