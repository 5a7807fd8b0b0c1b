package portmap

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// udpIdle is how long a client's session lives without a datagram in either direction, the measure of Docker's proxy.
const udpIdle = 90 * time.Second

// maxSessions bounds the sockets of one published UDP port: a client that changes its port with every datagram must not eat
// the monitor's descriptors. Beyond it datagrams are dropped, as a full queue would.
const maxSessions = 1024

// datagrams lends buffers of the largest IP packet and what the kernel's log says of it, only while one is in hand: an idle port holds none.
var datagrams = sync.Pool{New: func() any { b := make([]byte, 65<<10); return &b }}

// client names a session: who asks, and which address of the host was asked.
type client struct {
	from netip.AddrPort
	zone uint32
	to   netip.Addr
}

// udpPort is one published UDP listener.
type udpPort struct {
	r    *Reservation
	conn *net.UDPConn
	raw  syscall.RawConn
	v4   bool
	port uint16 // of the container
	idle time.Duration

	mu       sync.Mutex
	sessions map[client]*net.UDPConn
}

// serveUDP forwards datagrams that arrive on conn until it is closed.
func (r *Reservation) serveUDP(conn *net.UDPConn, port uint16) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return // closed already
	}
	p := &udpPort{r: r, conn: conn, raw: raw, port: port, idle: udpIdle, sessions: make(map[client]*net.UDPConn)}
	p.v4 = conn.LocalAddr().(*net.UDPAddr).IP.To4() != nil
	p.serve()
}

// serve runs until the listener is closed: what a datagram may do wrong is consumed in receive.
func (p *udpPort) serve() {
	for p.receive() == nil {
	}
}

// receive waits for the socket to be readable and forwards what is queued.
func (p *udpPort) receive() error {
	return p.raw.Read(func(fd uintptr) bool {
		bp := datagrams.Get().(*[]byte)
		defer datagrams.Put(bp)
		var oob [64]byte
		got := false
		// A bounded burst, so that Close is noticed under load.
		for range 64 {
			n, oobn, _, from, err := unix.Recvmsg(int(fd), *bp, oob[:], unix.MSG_DONTWAIT)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				// EAGAIN with nothing done: wait. Anything else (an ICMP error that came back) is consumed by reading it.
				return got || err != unix.EAGAIN
			}
			got = true
			c, ok := clientOf(from, oob[:oobn])
			if ok {
				p.forward(c, (*bp)[:n])
			}
		}
		return true
	})
}

// clientOf reads sender and local address of a datagram.
func clientOf(from unix.Sockaddr, oob []byte) (client, bool) {
	var c client
	switch sa := from.(type) {
	case *unix.SockaddrInet4:
		c.from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		c.from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		c.zone = sa.ZoneId
	default:
		return c, false
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return c, false
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			// ifindex, spec_dst, addr: spec_dst is the local address to answer from, also for a broadcast.
			c.to = netip.AddrFrom4([4]byte(m.Data[4:8]))
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			c.to = netip.AddrFrom16([16]byte(m.Data[:16]))
		}
	}
	return c, true
}

// forward sends one datagram on the client's session.
func (p *udpPort) forward(c client, b []byte) {
	for range 2 {
		s := p.session(c)
		if s == nil {
			return // datagrams may be lost; the client sends again
		}
		// Another error is a lost datagram, or a closed port that the next read reports.
		if _, err := s.Write(b); !errors.Is(err, net.ErrClosed) {
			return
		}
		p.forget(c, s) // it led to where the container was before
	}
}

// session is the client's, opened when there is none; nil when there can't be one.
func (p *udpPort) session(c client) *net.UDPConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.sessions[c]
	if s == nil {
		if len(p.sessions) >= maxSessions {
			return nil
		}
		to := p.r.to(p.port)
		conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return nil
		}
		if !p.r.leads(conn, to.Addr()) {
			conn.Close()
			return nil
		}
		s = conn
		p.sessions[c] = s
		p.r.done.Go(func() { p.answer(c, s) })
	}
	s.SetReadDeadline(time.Now().Add(p.idle))
	return s
}

func (p *udpPort) forget(c client, s *net.UDPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sessions[c] == s {
		delete(p.sessions, c)
	}
}

// answer sends the container's datagrams back to the client until the session is idle or closed.
func (p *udpPort) answer(c client, s *net.UDPConn) {
	defer p.r.untrack(s)
	defer s.Close()
	raw, err := s.SyscallConn()
	for err == nil {
		err = raw.Read(func(fd uintptr) bool {
			bp := datagrams.Get().(*[]byte)
			defer datagrams.Put(bp)
			got := false
			for range 64 {
				n, _, err := unix.Recvfrom(int(fd), *bp, unix.MSG_DONTWAIT)
				if err == unix.EINTR {
					continue
				}
				if err != nil {
					// ECONNREFUSED: nobody listens in the container yet. The session stays, UDP has no better answer.
					return got || err != unix.EAGAIN
				}
				got = true
				p.reply(c, (*bp)[:n])
			}
			return true
		})
		if err == nil {
			s.SetReadDeadline(time.Now().Add(p.idle))
		}
	} // ends when idle (deadline) or closed
	p.forget(c, s)
}

// reply sends b to the client from the address that it asked.
func (p *udpPort) reply(c client, b []byte) {
	var to unix.Sockaddr
	var oob []byte
	if p.v4 {
		to = &unix.SockaddrInet4{Port: int(c.from.Port()), Addr: c.from.Addr().As4()}
		if c.to.Is4() {
			oob = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: c.to.As4()})
		}
	} else {
		to = &unix.SockaddrInet6{Port: int(c.from.Port()), Addr: c.from.Addr().As16(), ZoneId: c.zone}
		if c.to.Is6() {
			oob = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: c.to.As16(), Ifindex: c.zone})
		}
	}
	// Control rather than Write: a full send buffer means a lost datagram, not a blocked session.
	p.raw.Control(func(fd uintptr) {
		unix.Sendmsg(int(fd), b, oob, to, unix.MSG_DONTWAIT)
	})
}
