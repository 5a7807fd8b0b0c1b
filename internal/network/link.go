package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/egress"
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
	b := make(netlink.Attrs, unix.SizeofRtMsg)
	b[0], b[1] = family(ip), byte(ip.BitLen())
	return netlink.Message{Type: unix.RTM_GETROUTE, Data: b.Bytes(unix.RTA_DST, ip.AsSlice())}
}

func family(ip netip.Addr) byte {
	if ip.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func isLocal(r netlink.Result) bool {
	return r.Err == nil && len(r.Replies) > 0 && len(r.Replies[0]) >= unix.SizeofRtMsg && r.Replies[0][7] == unix.RTN_LOCAL
}

// plug connects a network namespace to the bridge: a veth pair whose peer is born inside, with its addresses and routes. One message
// makes both ends and puts one on the bridge; all in all it takes five round trips.
//
// It runs in the host's network namespace; a socket opened inside configures the peer.
//
// With a filter the host's end comes up last, so that no packet, were it of a container that runs already, passes before the filter stands.
func plug(ep *Endpoint, bridge link, netns *os.File, isolated bool, filter *egress.Options) error {
	inside, err := enter(ep, netns)
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
	peer := linkMessage(0, false).String(unix.IFLA_IFNAME, ep.Interface).Uint32(unix.IFLA_MTU, uint32(ep.MTU)).
		Bytes(unix.IFLA_ADDRESS, mac).Uint32(unix.IFLA_NET_NS_FD, uint32(netns.Fd()))
	info := netlink.Attrs{}.String(unix.IFLA_INFO_KIND, "veth").Nest(unix.IFLA_INFO_DATA, netlink.Attrs{}.Nest(vethInfoPeer, peer))
	pair := linkMessage(0, filter == nil).String(unix.IFLA_IFNAME, ep.HostInterface).Uint32(unix.IFLA_MTU, uint32(ep.MTU)).
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
	if filter != nil {
		filter.MAC = mac
		if ep.Filter, err = egress.Install(*filter); err != nil {
			return err
		}
		if err := host.Do(netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(outer.index, true)}); err != nil {
			return fmt.Errorf("bring %s up: %w", ep.HostInterface, err)
		}
	}
	if isolated {
		if err := host.Do(isolatePort(outer.index)); err != nil {
			return fmt.Errorf("isolate %s: %w", ep.HostInterface, err)
		}
	}
	// The bridge may still know this MAC on the port of the address's last owner, which the kernel takes down behind our back.
	if err := host.Do(forwardingEntry(outer.index, mac)); err != nil {
		return fmt.Errorf("teach bridge the address of %s: %w", ep.HostInterface, err)
	}

	res, err = inside.Execute(getLink(ep.Interface))
	if err != nil {
		return err
	}
	inner, err := linkOf(res[0])
	if err != nil {
		return fmt.Errorf("look up %s: %w", ep.Interface, err)
	}
	// The carrier comes up with the second end, but only the kernel's link watch, a work queue, lets packets pass then.
	// Asking for a link makes it catch up at once, at both ends and the bridge: else the first packets are lost, and TCP
	// tries again after a second.
	if err := inside.Do(append(address(ep, inner.index), getLink(ep.Interface))...); err != nil {
		return fmt.Errorf("configure %s: %w", ep.Interface, err)
	}
	if err := awaitLocal(inside, inner.index, ep.Address6.Addr()); err != nil {
		return fmt.Errorf("configure %s: %w", ep.Interface, err)
	}
	// The order counts: the bridge's carrier comes with the first port that forwards.
	if err := host.Do(getLink(ep.HostInterface), netlink.Message{Type: unix.RTM_GETLINK, Data: linkMessage(bridge.index, false)}); err != nil {
		return fmt.Errorf("look up %s: %w", ep.HostInterface, err)
	}
	return nil
}

// enter opens a socket in the container's network namespace, where the interface that is to come will have IPv6 as the endpoint has.
func enter(ep *Endpoint, netns *os.File) (inside *netlink.Conn, err error) {
	err = netlink.In(netns, func() (err error) {
		// Without an IPv6 address the interface speaks no IPv6 at all; lo, which exists already, keeps ::1. With one its routes are
		// ours to say, not a neighbour's, and its addresses count at once.
		settings := [][2]string{{"disable_ipv6", "1"}}
		if ep.Address6.IsValid() {
			settings = [][2]string{{"accept_ra", "0"}, {"accept_dad", "0"}, {"disable_ipv6", "0"}}
		}
		for _, s := range settings {
			if err := writeSysctl("ipv6/conf/default/"+s[0], s[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		inside, err = netlink.Dial(unix.NETLINK_ROUTE)
		return err
	})
	return inside, err
}

// address configures the interface inside: lo up, addresses, routes.
func address(ep *Endpoint, index int32) []netlink.Message {
	up := func(i int32) netlink.Message {
		return netlink.Message{Type: unix.RTM_SETLINK, Data: linkMessage(i, true)}
	}
	const create = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	msgs := []netlink.Message{up(loopbackIndex), up(index)}
	for _, a := range []netip.Prefix{ep.Address, ep.Address6} {
		if a.IsValid() {
			msgs = append(msgs, netlink.Message{Type: unix.RTM_NEWADDR, Flags: create, Data: addressMessage(index, a)})
		}
	}
	for _, a := range ep.LinkLocal {
		msgs = append(msgs, netlink.Message{Type: unix.RTM_NEWADDR, Flags: create, Data: addressMessage(index, netip.PrefixFrom(a, linkLocalBits(a)))})
	}
	if ep.DefaultRoute || ep.DefaultRoute6 {
		return append(msgs, defaultRoutes(ep, index, unix.RTM_NEWROUTE)...)
	}
	return msgs
}

// linkLocal is the IPv6 address that the kernel gives to an interface with a hardware address.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

func linkLocalBits(a netip.Addr) int {
	if a.Is4() {
		return 16
	}
	return 64
}

// defaultRoutes adds (RTM_NEWROUTE) or removes (RTM_DELROUTE) the endpoint's default routes. One more than there is, at its place, is
// replaced.
func defaultRoutes(ep *Endpoint, index int32, typ uint16) []netlink.Message {
	var flags uint16
	if typ == unix.RTM_NEWROUTE {
		flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	}
	var msgs []netlink.Message
	for _, a := range []struct {
		here bool
		own  netip.Prefix
		gw   netip.Addr
	}{{ep.DefaultRoute, ep.Address, ep.Gateway}, {ep.DefaultRoute6, ep.Address6, ep.Gateway6}} {
		if a.here && a.own.IsValid() {
			msgs = append(msgs, netlink.Message{Type: typ, Flags: flags, Data: defaultRoute(index, a.own.Addr(), a.gw)})
		}
	}
	return msgs
}

// addressMessage is struct ifaddrmsg with the interface's address. An IPv6 address is used at once: nobody else can have it.
func addressMessage(index int32, p netip.Prefix) netlink.Attrs {
	b := make(netlink.Attrs, unix.SizeofIfAddrmsg)
	b[0], b[1], b[3] = family(p.Addr()), byte(p.Bits()), unix.RT_SCOPE_UNIVERSE
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	if p.Addr().IsLinkLocalUnicast() {
		b[3] = unix.RT_SCOPE_LINK
	}
	a := p.Addr().AsSlice()
	if p.Addr().Is6() {
		b[2] = unix.IFA_F_NODAD
		return b.Bytes(unix.IFA_LOCAL, a).Bytes(unix.IFA_ADDRESS, a)
	}
	return b.Bytes(unix.IFA_LOCAL, a).Bytes(unix.IFA_ADDRESS, a).Bytes(unix.IFA_BROADCAST, lastAddr(p).AsSlice())
}

// defaultRoute is struct rtmsg for everything via gateway; without one (ipvlan's l3) everything is on the link.
func defaultRoute(index int32, own, gateway netip.Addr) netlink.Attrs {
	b := make(netlink.Attrs, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[6], b[7] = family(own), unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	if !gateway.IsValid() {
		b[6] = unix.RT_SCOPE_LINK
		return b.Uint32(unix.RTA_OIF, uint32(index))
	}
	return b.Bytes(unix.RTA_GATEWAY, gateway.AsSlice()).Uint32(unix.RTA_OIF, uint32(index))
}

// localLimit bounds a wait that ends within a millisecond, unless rules of somebody else's hide the kernel's table of local addresses.
const localLimit = time.Second

// awaitLocal returns when the kernel has made IPv6 addresses its own: even without the search for duplicates a work queue puts the route to a
// new one into place, and has it listen for neighbours who look for it. Until then what comes for it is dropped, the neighbour's answer as
// well, and asked for again a second later. Addresses that are not valid, or IPv4's, need no wait.
func awaitLocal(c *netlink.Conn, index int32, addrs ...netip.Addr) error {
	deadline := time.Now().Add(localLimit)
	for _, a := range addrs {
		if !a.Is6() {
			continue
		}
		for wait := 10 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) {
			res, err := c.Execute(netlink.Message{Type: unix.RTM_GETROUTE, Data: routeTo(index, a)})
			if err != nil {
				return err
			}
			if r := res[0].Replies; len(r) > 0 && len(r[0]) >= unix.SizeofRtMsg && r[0][7] == unix.RTN_LOCAL || time.Now().After(deadline) {
				break
			}
			time.Sleep(wait)
		}
	}
	return nil
}

// routeTo is struct rtmsg that asks for the route to an address of an interface.
func routeTo(index int32, a netip.Addr) netlink.Attrs {
	b := make(netlink.Attrs, unix.SizeofRtMsg)
	b[0], b[1] = family(a), byte(a.BitLen())
	return b.Bytes(unix.RTA_DST, a.AsSlice()).Uint32(unix.RTA_OIF, uint32(index))
}

// isolatePort keeps a bridge's port from the other ones that are isolated: IFLA_BRPORT_ISOLATED of linux/if_link.h.
func isolatePort(port int32) netlink.Message {
	b := linkMessage(port, false)
	b[0] = unix.AF_BRIDGE
	return netlink.Message{Type: unix.RTM_SETLINK, Data: b.Nest(unix.IFLA_PROTINFO, netlink.Attrs{}.Bytes(brportIsolated, []byte{1}))}
}

// brportIsolated is IFLA_BRPORT_ISOLATED.
const brportIsolated = 33

// forwardingEntry is struct ndmsg: a static entry (a learnt one needs a port that forwards already) that mac is behind the port. It goes with
// the port, and sticks to it (ntfSticky, where the kernel is not older than 4.20): whatever the address's last owner, which has the same mac and
// which the kernel has not taken down yet, answers on its own port, packets come here.
func forwardingEntry(port int32, mac net.HardwareAddr) netlink.Message {
	b := make(netlink.Attrs, unix.SizeofNdMsg)
	b[0] = unix.AF_BRIDGE
	binary.NativeEndian.PutUint32(b[4:], uint32(port))
	binary.NativeEndian.PutUint16(b[8:], unix.NUD_NOARP)
	b[10] = unix.NTF_MASTER | ntfSticky
	return netlink.Message{Type: unix.RTM_NEWNEIGH, Flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, Data: b.Bytes(unix.NDA_LLADDR, mac)}
}

// ntfSticky is NTF_STICKY of linux/neighbour.h.
const ntfSticky = 1 << 6

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
	if name == "" {
		return nil
	}
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
