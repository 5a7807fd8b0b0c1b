package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// loopbackIndex is the interface index of lo in every network namespace.
const loopbackIndex = 1

// vethInfoPeer is VETH_INFO_PEER of linux/veth.h.
const vethInfoPeer = 1

// linkMessage starts an RTM_*LINK request: struct ifinfomsg.
func linkMessage(index int32, up bool) netlink.Attrs {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	if up {
		binary.NativeEndian.PutUint32(b[8:], unix.IFF_UP)
		binary.NativeEndian.PutUint32(b[12:], unix.IFF_UP)
	}
	return b
}

// link is what the hot path needs to know about an interface.
type link struct {
	index int32
	up    bool
	mtu   int
	mac   net.HardwareAddr
}

func parseLink(b []byte) (link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return link{}, errors.New("short link message")
	}
	l := link{index: int32(binary.NativeEndian.Uint32(b[4:])), up: binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0}
	for typ, v := range netlink.Parse(b[unix.SizeofIfInfomsg:]) {
		switch {
		case typ == unix.IFLA_MTU && len(v) == 4:
			l.mtu = int(binary.NativeEndian.Uint32(v))
		case typ == unix.IFLA_ADDRESS:
			l.mac = net.HardwareAddr(v)
		}
	}
	return l, nil
}

// rtextFilterSkipStats is RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h.
const rtextFilterSkipStats = 1 << 3

// getLink asks for an interface by name. Leaving statistics out spares the kernel summing up counters.
func getLink(name string) netlink.Message {
	return netlink.Message{Type: unix.RTM_GETLINK, Data: linkMessage(0, false).String(unix.IFLA_IFNAME, name).Uint32(unix.IFLA_EXT_MASK, rtextFilterSkipStats)}
}

func linkOf(r netlink.Result) (link, error) {
	if r.Err != nil {
		return link{}, r.Err
	}
	if len(r.Replies) == 0 {
		return link{}, errors.New("no answer")
	}
	return parseLink(r.Replies[0])
}

// localRoute asks how the host would reach ip: one of its own addresses answers with type local.
func localRoute(ip netip.Addr) netlink.Message {
	a := ip.As4()
	b := make(netlink.Attrs, unix.SizeofRtMsg)
	b[0], b[1] = unix.AF_INET, 32
	return netlink.Message{Type: unix.RTM_GETROUTE, Data: b.Bytes(unix.RTA_DST, a[:])}
}

func isLocal(r netlink.Result) bool {
	return r.Err == nil && len(r.Replies) > 0 && len(r.Replies[0]) >= unix.SizeofRtMsg && r.Replies[0][7] == unix.RTN_LOCAL
}

// plug connects a network namespace to the bridge: a veth pair whose peer is born inside, as eth0, with address and default
// route. One message makes both ends and puts one on the bridge; all in all it takes five round trips.
//
// It runs in the host's network namespace; a socket opened inside configures the peer.
func plug(ep *Endpoint, bridge link, netns *os.File) error {
	var inside *netlink.Conn
	err := netlink.In(netns, func() (err error) {
		// The endpoint has no IPv6 address, so the interface speaks no IPv6 at all; lo, which exists already, keeps ::1.
		err = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		inside, err = netlink.Dial(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return err
	}
	defer inside.Close()
	host, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer host.Close()

	mac, err := net.ParseMAC(ep.MAC)
	if err != nil {
		return err
	}
	// The peer can't be born up: its other end does not exist yet.
	peer := linkMessage(0, false).String(unix.IFLA_IFNAME, insideName).Uint32(unix.IFLA_MTU, uint32(ep.MTU)).
		Bytes(unix.IFLA_ADDRESS, mac).Uint32(unix.IFLA_NET_NS_FD, uint32(netns.Fd()))
	info := netlink.Attrs{}.String(unix.IFLA_INFO_KIND, "veth").Nest(unix.IFLA_INFO_DATA, netlink.Attrs{}.Nest(vethInfoPeer, peer))
	pair := linkMessage(0, true).String(unix.IFLA_IFNAME, ep.HostInterface).Uint32(unix.IFLA_MTU, uint32(ep.MTU)).
		Uint32(unix.IFLA_MASTER, uint32(bridge.index)).Nest(unix.IFLA_LINKINFO, info)
	res, err := host.Execute(
		netlink.Message{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Data: pair},
		getLink(ep.HostInterface),
	)
	if err != nil {
		return err
	}
	if res[0].Err != nil {
		return fmt.Errorf("make veth %s: %w", ep.HostInterface, res[0].Err)
	}
	outer, err := linkOf(res[1])
	if err != nil {
		return fmt.Errorf("look up %s: %w", ep.HostInterface, err)
	}
	// The bridge may still know this MAC on the port of the address's last owner, which the kernel takes down behind our back.
	if err := host.Do(forwardingEntry(outer.index, mac)); err != nil {
		return fmt.Errorf("teach bridge the address of %s: %w", ep.HostInterface, err)
	}

	res, err = inside.Execute(getLink(insideName))
	if err != nil {
		return err
	}
	inner, err := linkOf(res[0])
	if err != nil {
		return fmt.Errorf("look up %s: %w", insideName, err)
	}
	// The carrier comes up with the second end, but only the kernel's link watch, a work queue, lets packets pass then.
	// Asking for a link makes it catch up at once, at both ends and the bridge: else the first packets are lost, and TCP
	// tries again after a second.
	err = inside.Do(
		netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(loopbackIndex, true)},
		netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(inner.index, true)},
		netlink.Message{Type: unix.RTM_NEWADDR, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Data: addressMessage(inner.index, ep.Address)},
		netlink.Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Data: defaultRoute(inner.index, ep.Gateway)},
		getLink(insideName),
	)
	if err != nil {
		return fmt.Errorf("configure %s: %w", insideName, err)
	}
	// The order counts: the bridge's carrier comes with the first port that forwards.
	if err := host.Do(getLink(ep.HostInterface), netlink.Message{Type: unix.RTM_GETLINK, Data: linkMessage(bridge.index, false)}); err != nil {
		return fmt.Errorf("look up %s: %w", ep.HostInterface, err)
	}
	return nil
}

// insideName is the interface's name inside the container.
const insideName = "eth0"

// addressMessage is struct ifaddrmsg with the interface's address.
func addressMessage(index int32, p netip.Prefix) netlink.Attrs {
	b := make(netlink.Attrs, unix.SizeofIfAddrmsg)
	b[0], b[1], b[3] = unix.AF_INET, byte(p.Bits()), unix.RT_SCOPE_UNIVERSE
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	a, bc := p.Addr().As4(), lastAddr(p).As4()
	return b.Bytes(unix.IFA_LOCAL, a[:]).Bytes(unix.IFA_ADDRESS, a[:]).Bytes(unix.IFA_BROADCAST, bc[:])
}

// defaultRoute is struct rtmsg for 0.0.0.0/0 via gateway.
func defaultRoute(index int32, gateway netip.Addr) netlink.Attrs {
	b := make(netlink.Attrs, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[6], b[7] = unix.AF_INET, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	a := gateway.As4()
	return b.Bytes(unix.RTA_GATEWAY, a[:]).Uint32(unix.RTA_OIF, uint32(index))
}

// forwardingEntry is struct ndmsg: a static entry (a learnt one needs a port that forwards already) that mac is behind
// the port. It goes with the port.
func forwardingEntry(port int32, mac net.HardwareAddr) netlink.Message {
	b := make(netlink.Attrs, unix.SizeofNdMsg)
	b[0] = unix.AF_BRIDGE
	binary.NativeEndian.PutUint32(b[4:], uint32(port))
	binary.NativeEndian.PutUint16(b[8:], unix.NUD_NOARP)
	b[10] = unix.NTF_MASTER
	return netlink.Message{Type: unix.RTM_NEWNEIGH, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Data: b.Bytes(unix.NDA_LLADDR, mac)}
}

// Loopback brings lo up in a network namespace, all that network none has.
func (m *Manager) Loopback(netns *os.File) error {
	c, err := netlink.DialIn(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	defer c.Close()
	if err := c.Do(netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(loopbackIndex, true)}); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	return nil
}

// deleteLink removes an interface of the host; no error when there is none. It waits for the kernel, 24 ms for a veth.
func deleteLink(name string) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.Do(netlink.Message{Type: unix.RTM_DELLINK, Data: linkMessage(0, false).String(unix.IFLA_IFNAME, name)})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete interface %s: %w", name, err)
	}
	return nil
}
