package netlink

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Socket is one that a network namespace has.
type Socket struct {
	// State is one of tcp's; see the constants.
	State byte
	// Local and Remote have mapped addresses as they are.
	Local, Remote netip.AddrPort
}

// States of sockets, include/net/tcp_states.h. One of udp without a peer is closed.
const (
	SocketClosed    = 7
	SocketListening = 10
	// SocketsAll is the set of all states.
	SocketsAll = 0xfff
)

// linux/inet_diag.h.
const (
	diagRequestLen = 56 // struct inet_diag_req_v2
	diagState      = 1  // in struct inet_diag_msg
	diagPorts      = 4
	diagSource     = 8
	diagRemote     = 24
)

// Sockets lists the sockets of a family (AF_INET, AF_INET6) and a protocol whose state is in a set of bits, over a connection to NETLINK_SOCK_DIAG.
func Sockets(c *Conn, family, proto byte, states uint32) ([]Socket, error) {
	req := make([]byte, diagRequestLen)
	req[0], req[1] = family, proto
	binary.NativeEndian.PutUint32(req[4:], states)
	replies, err := c.Dump(Message{Type: unix.SOCK_DIAG_BY_FAMILY, Data: req})
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	var out []Socket
	for _, s := range replies {
		if len(s) < diagRemote+16 || s[0] != family {
			continue
		}
		end := func(addr, port int) netip.AddrPort {
			a := netip.AddrFrom16([16]byte(s[addr:]))
			if family == unix.AF_INET {
				a = netip.AddrFrom4([4]byte(s[addr:]))
			}
			return netip.AddrPortFrom(a, binary.BigEndian.Uint16(s[port:]))
		}
		out = append(out, Socket{State: s[diagState], Local: end(diagSource, diagPorts), Remote: end(diagRemote, diagPorts+2)})
	}
	return out, nil
}
