package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"conex/internal/egress"
	"conex/internal/linux/netlink"
)

// linux/netfilter/nfnetlink_conntrack.h: the attributes of a request for the flows whose answers come from one address.
const (
	conntrackGet      = 1 // IPCTNL_MSG_CT_GET
	ctTupleReply      = 2
	ctFilter          = 25
	ctFilterReplyFlag = 2
	ctFilterOrigFlag  = 1
	ctFilterSource    = 1 << 0
	ctTupleIP         = 1
	ctTupleProto      = 2
	ctSource4         = 1
	ctDestination4    = 2
	ctSource6         = 3
	ctDestination6    = 4
	ctProtoNumber     = 1
	ctSourcePort      = 2
	ctDestinationPort = 3
)

// begunByOthers are the flows of a running container that others began. For what passes the host's IP layer its connection tracking knows. What
// stays on the bridge nobody tracks: there a connection counts as another container's doing if its port in the container is listened on.
func begunByOthers(ep *Endpoint, netns *os.File) ([]egress.Flow, error) {
	var out []egress.Flow
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	for _, p := range []netip.Prefix{ep.Address, ep.Address6} {
		if !p.IsValid() {
			continue
		}
		flows, err := tracked(c, p.Addr())
		if err != nil {
			return nil, err
		}
		out = append(out, flows...)
	}
	near, err := served(ep, netns)
	if err != nil {
		return nil, err
	}
	return append(out, near...), nil
}

// tracked are the flows in the host's connection tracking that an address answers.
func tracked(c *netlink.Conn, a netip.Addr) ([]egress.Flow, error) {
	family, src, dst := byte(unix.AF_INET), uint16(ctSource4), uint16(ctDestination4)
	if a.Is6() {
		family, src, dst = unix.AF_INET6, ctSource6, ctDestination6
	}
	data := []byte{family, 0, 0, 0}
	if a.Is4() { // for IPv6 the kernel gives all others (ctnetlink_filter_match_tuple takes "equal" for "different")
		tuple := netlink.Attrs{}.Nest(ctTupleIP, netlink.Attrs{}.Bytes(src, a.AsSlice()))
		filter := netlink.Attrs{}.Uint32(ctFilterOrigFlag, 0).Uint32(ctFilterReplyFlag, ctFilterSource)
		data = append(data, netlink.Attrs{}.Nest(ctTupleReply, tuple).Nest(ctFilter, filter)...)
	}
	var out []egress.Flow
	err := c.Walk(netlink.Message{Type: unix.NFNL_SUBSYS_CTNETLINK<<8 | conntrackGet, Data: data}, func(r []byte) {
		if len(r) < 4 {
			return
		}
		t := netlink.Parse(netlink.Parse(r[4:])[ctTupleReply])
		ip, proto := netlink.Parse(t[ctTupleIP]), netlink.Parse(t[ctTupleProto])
		own, _ := netip.AddrFromSlice(ip[src])
		remote, ok := netip.AddrFromSlice(ip[dst])
		n, from, to := proto[ctProtoNumber], proto[ctSourcePort], proto[ctDestinationPort]
		if ok && own == a && len(n) == 1 && len(from) == 2 && len(to) == 2 {
			out = append(out, egress.Flow{Proto: n[0], Remote: netip.AddrPortFrom(remote, binary.BigEndian.Uint16(to)), Own: binary.BigEndian.Uint16(from)})
		}
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil, nil // without connection tracking, or with one that can't be asked, nothing is known
	}
	if err != nil {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	return out, nil
}

// served are the TCP connections of a container with others on its bridge, on ports that it listens on.
func served(ep *Endpoint, netns *os.File) ([]egress.Flow, error) {
	c, err := netlink.DialIn(unix.NETLINK_SOCK_DIAG, netns)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	listened := map[uint16]bool{}
	var found []egress.Flow
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		socks, err := netlink.Sockets(c, family, unix.IPPROTO_TCP, netlink.SocketsAll)
		if errors.Is(err, unix.ENOENT) { // a kernel without inet_diag
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		for _, s := range socks {
			if s.State == netlink.SocketListening {
				listened[s.Local.Port()] = true
				continue
			}
			remote, self := s.Remote.Addr().Unmap(), s.Local.Addr().Unmap()
			for _, p := range []netip.Prefix{ep.Address, ep.Address6} {
				if p.IsValid() && self == p.Addr() && p.Contains(remote) && remote != ep.Gateway && remote != ep.Gateway6 {
					found = append(found, egress.Flow{Proto: unix.IPPROTO_TCP, Remote: netip.AddrPortFrom(remote, s.Remote.Port()), Own: s.Local.Port()})
				}
			}
		}
	}
	var out []egress.Flow
	for _, f := range found {
		if listened[f.Own] {
			out = append(out, f)
		}
	}
	return out, nil
}
