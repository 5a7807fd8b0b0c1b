package portmap

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// inside asks a container's kernel which sockets it has. The socket is opened at the first question.
type inside struct {
	netns func() (*os.File, error)
	c     *netlink.Conn
}

// listens reports whether something answers IPv6 on a port of the container. What can't be known counts as yes.
func (i *inside) listens(proto string, port uint16) bool {
	number, states := byte(unix.IPPROTO_TCP), uint32(1<<netlink.SocketListening)
	switch proto {
	case "udp":
		number, states = unix.IPPROTO_UDP, 1<<netlink.SocketClosed
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
	socks, err := netlink.Sockets(i.c, unix.AF_INET6, number, states)
	return err != nil || slices.ContainsFunc(socks, func(s netlink.Socket) bool {
		return s.Local.Port() == port && !s.Local.Addr().Is4In6() && !s.Local.Addr().IsLoopback()
	})
}

func (i *inside) close() {
	if i.c != nil {
		i.c.Close()
	}
}
