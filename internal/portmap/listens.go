package portmap

import (
	"encoding/binary"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// inside asks a container's kernel which sockets it has. The socket is opened at the first question.
type inside struct {
	netns func() (*os.File, error)
	c     *netlink.Conn
}

// linux/inet_diag.h.
const (
	diagRequestLen = 56 // struct inet_diag_req_v2
	diagSourcePort = 4  // in struct inet_diag_msg
	diagSource     = 8
	stateListen    = 10
	stateClose     = 7 // an unconnected udp socket's
)

// listens reports whether something answers IPv6 on a port of the container. What can't be known counts as yes.
func (i *inside) listens(proto string, port uint16) bool {
	number, states := byte(unix.IPPROTO_TCP), uint32(1<<stateListen)
	switch proto {
	case "udp":
		number, states = unix.IPPROTO_UDP, 1<<stateClose
	case "sctp":
		return true
	}
	if i.c == nil {
		ns, err := i.netns()
		if err != nil {
			return true
		}
		defer ns.Close()
		if i.c, err = netlink.DialIn(unix.NETLINK_SOCK_DIAG, ns); err != nil {
			i.c = nil
			return true
		}
	}
	req := make([]byte, diagRequestLen)
	req[0], req[1] = unix.AF_INET6, number
	binary.NativeEndian.PutUint32(req[4:], states)
	socks, err := i.c.Dump(netlink.Message{Type: unix.SOCK_DIAG_BY_FAMILY, Data: req})
	if err != nil {
		return true
	}
	for _, s := range socks {
		if len(s) < diagSource+16 || s[0] != unix.AF_INET6 || binary.BigEndian.Uint16(s[diagSourcePort:]) != port {
			continue
		}
		a := netip.AddrFrom16([16]byte(s[diagSource:]))
		if !a.Is4In6() && !a.IsLoopback() {
			return true
		}
	}
	return false
}

func (i *inside) close() {
	if i.c != nil {
		i.c.Close()
	}
}
