// Package portmap owns published ports: conex's nftables table, the listeners that reserve host ports, and the forwarder for
// what nftables cannot do.
//
// A port published on an address of the host reaches the container in one of these ways:
//
//	client                       way                                                     source the container sees
//	another machine              its first packet past the host's input chains, then     the client's address
//	                             dnat, a map element (see firsts); under the policy
//	                             docker dnat in prerouting
//	another network's container  the same                                                the client's address
//	the host, by own address     dnat in output, the same element                        the host's address
//	the host, by 127.0.0.1, ::1  the forwarder                                           the bridge's gateway
//	the same bridge, itself      the forwarder (hairpin)                                 the bridge's gateway
//	IPv6, container without it   the forwarder                                           the bridge's gateway
//	IPv6, server on IPv4 alone   its first packet as above, then the forwarder           the bridge's gateway
//	IPv6, link-local address     the forwarder                                           the bridge's gateway
//
// Containers of the bridge itself are kept off the dnat on purpose: a reply between two of them would cross the bridge without
// passing the host's connection tracking, so the client would see it come from the wrong address. Loopback is kept off it because that
// would need route_localnet, which lets the network reach services that listen on 127.0.0.1 only.
//
// The table never accepts on behalf of others: an accept in it ends only its own chain, so what the host's firewall drops
// stays dropped. Audit says where that keeps published ports from working.
package portmap

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// Mapping publishes one port of a container on the host.
type Mapping struct {
	// Proto is "tcp", "udp" or "sctp".
	Proto string `json:"proto"`
	// HostIP is the host's address; the zero value means all of them, IPv4 and IPv6. 0.0.0.0 and :: mean all of one family.
	HostIP netip.Addr `json:"hostIP"`
	// HostPort is the host's port; 0 lets Reserve pick one from the ephemeral range.
	HostPort uint16 `json:"hostPort"`
	// HostPortEnd, when above HostPort, lets Reserve take the first free port of HostPort..HostPortEnd. It is 0 in what
	// Reservation.Mappings returns.
	HostPortEnd uint16 `json:"hostPortEnd,omitempty"`
	// Target is filled in by Activate.
	Target
	// Group is the packet log's group that first packets come by, filled in by Obey; 0 without.
	Group uint16 `json:"group,omitempty"`
	// ContainerPort is the port inside the container.
	ContainerPort uint16 `json:"containerPort"`
}

// Target is where a container is found.
type Target struct {
	// Bridge is the interface of its network on the host.
	Bridge string `json:"bridge,omitempty"`
	// IPv4 and IPv6 are its addresses there; one of them may be missing.
	IPv4 netip.Addr `json:"ipv4,omitzero"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
}

// reach is the address that the forwarder uses.
func (t Target) reach() netip.Addr {
	if t.IPv4.IsValid() {
		return t.IPv4
	}
	return t.IPv6
}

// String returns "0.0.0.0:8080->80/tcp".
func (m Mapping) String() string {
	return fmt.Sprintf("%s->%d/%s", m.hostAddr(), m.ContainerPort, m.Proto)
}

// hostAddr is the host side as Docker words it: all addresses are 0.0.0.0.
func (m Mapping) hostAddr() string {
	ip := m.HostIP
	if !ip.IsValid() {
		ip = netip.IPv4Unspecified()
	}
	return netip.AddrPortFrom(ip, m.HostPort).String()
}

// Table is an installation's nftables table.
type Table struct {
	// Name is the table's name (family inet).
	Name string
	// Docker translates what comes from outside before any filter of the host's input sees it, as Docker does; without it the host's
	// input chains are asked, see firsts.
	Docker bool
	// Guard lists interfaces between which the host did not forward before conex switched forwarding on; new connections from
	// one of them to another stay dropped.
	Guard []string
	// Bridges and Live return all networks and the mappings of all endpoints, for making a table that somebody removed. May be nil.
	Bridges func() ([]Bridge, error)
	Live    func() ([]Mapping, error)
	// Socket keeps the netfilter socket of a process that needs one again and again. May be nil.
	Socket *netlink.Kept
}

func (t Table) dial() (*netlink.Conn, error) { return t.Socket.Dial(unix.NETLINK_NETFILTER) }

// Bridge is what the table must know about a bridge network.
type Bridge struct {
	// Name is the bridge interface's name.
	Name string
	// Internal keeps its containers from everything else.
	Internal bool
	// Apart keeps its containers from each other through the host as well.
	Apart bool
	// Masquerade lists the subnets whose packets leave the host with its own address.
	Masquerade []netip.Prefix
}

// ErrPortTaken says that a host port is in use. The error that carries it is a *TakenError.
var ErrPortTaken = errors.New("port is already allocated")

// TakenError is Docker's message for a host port that is in use.
type TakenError struct {
	// Mapping is the one that could not be had.
	Mapping Mapping
	// Holder names the container that has the port, when known.
	Holder string
}

// Error returns "Bind for 0.0.0.0:8080 failed: port is already allocated", with the holder when known.
func (e *TakenError) Error() string {
	s := "Bind for " + e.Mapping.hostAddr() + " failed: " + ErrPortTaken.Error()
	if end := e.Mapping.HostPortEnd; end > e.Mapping.HostPort {
		s = "Bind for " + e.Mapping.hostAddr() + "-" + strconv.Itoa(int(end)) + " failed: all ports are allocated"
	}
	if e.Holder != "" {
		s += " (by container " + e.Holder + ")"
	}
	return s
}

// Unwrap makes errors.Is(err, ErrPortTaken) true.
func (e *TakenError) Unwrap() error { return ErrPortTaken }

// Collides reports whether two mappings want the same host port on overlapping addresses.
func (m Mapping) Collides(o Mapping) bool {
	if m.Proto != o.Proto || m.HostPort != o.HostPort || m.HostPort == 0 {
		return false
	}
	any := func(a netip.Addr) bool { return !a.IsValid() }
	a, b := m.HostIP, o.HostIP
	if any(a) || any(b) {
		return true
	}
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}

func protoNumber(p string) byte {
	switch p {
	case "udp":
		return unix.IPPROTO_UDP
	case "sctp":
		return unix.IPPROTO_SCTP
	}
	return unix.IPPROTO_TCP
}
