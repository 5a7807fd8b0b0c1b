package dns

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// headers are those of IPv4 and UDP, for which a datagram's buffer has room in front.
const headers = 20 + 8

// serveUDP answers datagrams, one after the other; what has to be asked elsewhere is handed on. It sleeps in the poller without a buffer.
func (s *Server) serveUDP() {
	defer s.all.Done()
	// The error is that of closing.
	_ = s.udpConn.Read(func(fd uintptr) bool {
		buf := s.buffers.Get().(*[headers + maxQuery]byte)
		defer s.buffers.Put(buf)
		for !s.closed.Load() {
			n, from, err := unix.Recvfrom(int(fd), buf[headers:], unix.MSG_TRUNC)
			switch {
			case err == unix.EAGAIN:
				return false
			case err != nil: // an error of a datagram that we sent; the next call has the next
				continue
			case n > maxQuery: // and cut off
				continue
			}
			if a, ok := from.(*unix.SockaddrInet4); ok {
				s.datagram(buf[:headers+n], netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)))
			}
		}
		return true
	})
}

// datagram answers one query. buf begins with room for headers, and is the caller's again after the call.
func (s *Server) datagram(buf []byte, from netip.AddrPort) {
	q, answer := parse(buf[headers:])
	if q == nil {
		if answer != nil {
			s.send(append(make([]byte, headers, headers+len(answer)), answer...), from)
		}
		return
	}
	q.limit = min(max(q.size, 512), 0xffff-headers)
	out, done := s.local(q, make([]byte, headers, headers+512))
	if done {
		s.send(out, from)
		return
	}
	select {
	case s.waiting <- struct{}{}:
	default:
		s.send(q.failure(make([]byte, headers, headers+len(q.msg)), rcodeServerFailure), from)
		return
	}
	q = q.clone()
	s.all.Add(1)
	go func() { // ends with the answer, in answerTime at the latest
		defer s.all.Done()
		defer func() { <-s.waiting }()
		s.send(s.forward(q, make([]byte, headers, headers+1024)), from)
	}()
}

// send sends an answer, in front of which there is room for headers. One that gets lost is asked for again.
func (s *Server) send(b []byte, to netip.AddrPort) {
	dst := &unix.SockaddrInet4{Addr: to.Addr().As4()}
	if s.raw < 0 {
		dst.Port = int(to.Port())
		s.udpConn.Control(func(fd uintptr) { _ = unix.Sendto(int(fd), b[headers:], unix.MSG_DONTWAIT, dst) })
		return
	}
	// The kernel fills in the checksum and the identification. UDP over IPv4 needs none of its own, and this never leaves the machine.
	from := Address.As4()
	ip := b[:headers]
	ip[0], ip[1] = 0x45, 0
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	clear(ip[4:8])
	ip[8], ip[9], ip[10], ip[11] = 64, unix.IPPROTO_UDP, 0, 0
	copy(ip[12:], from[:])
	copy(ip[16:], dst.Addr[:])
	binary.BigEndian.PutUint16(ip[20:], port)
	binary.BigEndian.PutUint16(ip[22:], to.Port())
	binary.BigEndian.PutUint16(ip[24:], uint16(len(b)-20))
	clear(ip[26:28])
	_ = unix.Sendto(s.raw, b, unix.MSG_DONTWAIT, dst)
}
