package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headers are those of IPv4 and UDP, for which a datagram's buffer has room in front.
const headers = 20 + 8

// buffers are for one datagram and its answer.
type buffers struct {
	in  [headers + maxQuery]byte
	out [headers + 512]byte
}

// serveUDP answers datagrams, one after the other; what has to be asked elsewhere is handed on. It sleeps in the poller without a buffer.
func (s *Server) serveUDP() {
	defer s.all.Done()
	// The error is that of closing.
	_ = s.udpConn.Read(func(fd uintptr) bool {
		b := s.buffers.Get().(*buffers)
		defer s.buffers.Put(b)
		for k := 0; !s.closed.Load(); k++ {
			busy := k >= unseen
			n, from, err := receive(fd, b.in[headers:], busy)
			switch {
			case err == unix.EAGAIN:
				return false
			case err != nil: // an error of a datagram that we sent, or not IPv4's; the next call has the next
				continue
			case n > maxQuery: // and cut off
				continue
			}
			s.datagram(b.in[:headers+n], b.out[:headers], from, busy)
		}
		return true
	})
}

// unseen is how many datagrams in a row are answered without a word to Go's scheduler. More than that, and the monitor's other work wants its turn.
const unseen = 32

// receive and transmit wait for nothing, so the scheduler is not told of the calls: it would wake a thread to watch over each, which costs more
// than they do. seen tells it. Unlike x/sys's, receive does not ask for the socket's protocol either.
func receive(fd uintptr, b []byte, seen bool) (int, netip.AddrPort, error) {
	var from unix.RawSockaddrInet4
	size := uint32(unsafe.Sizeof(from))
	const flags = unix.MSG_DONTWAIT | unix.MSG_TRUNC
	var n uintptr
	var errno syscall.Errno
	if seen {
		n, _, errno = syscall.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
	} else {
		n, _, errno = syscall.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)))
	}
	if errno != 0 {
		return 0, netip.AddrPort{}, errno
	}
	if from.Family != unix.AF_INET {
		return 0, netip.AddrPort{}, errNotIPv4
	}
	p := (*[2]byte)(unsafe.Pointer(&from.Port))
	return int(n), netip.AddrPortFrom(netip.AddrFrom4(from.Addr), binary.BigEndian.Uint16(p[:])), nil
}

var errNotIPv4 = errors.New("not from an IPv4 address")

func transmit(fd uintptr, b []byte, to *unix.RawSockaddrInet4, seen bool) {
	const flags = unix.MSG_DONTWAIT
	if seen {
		_, _, _ = syscall.Syscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, uintptr(unsafe.Pointer(to)), unsafe.Sizeof(*to))
	} else {
		_, _, _ = syscall.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, uintptr(unsafe.Pointer(to)), unsafe.Sizeof(*to))
	}
}

// datagram answers one query. buf and out begin with room for headers, and are the caller's again after the call.
func (s *Server) datagram(buf, out []byte, from netip.AddrPort, busy bool) {
	q, answer := parse(buf[headers:])
	if q == nil {
		if answer != nil {
			s.send(append(out, answer...), from, busy)
		}
		return
	}
	q.limit = min(max(q.size, 512), 0xffff-headers)
	if answer, done := s.local(q, out); done {
		s.send(answer, from, busy)
		return
	}
	select {
	case s.waiting <- struct{}{}:
	default:
		s.send(q.failure(out, rcodeServerFailure), from, busy)
		return
	}
	q = q.clone()
	s.all.Add(1)
	go func() { // ends with the answer, in answerTime at the latest
		defer s.all.Done()
		defer func() { <-s.waiting }()
		s.send(s.forward(q, make([]byte, headers, headers+1024)), from, true)
	}()
}

// send sends an answer, in front of which there is room for headers. One that gets lost is asked for again.
func (s *Server) send(b []byte, to netip.AddrPort, seen bool) {
	dst := &unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	if s.raw < 0 {
		binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&dst.Port))[:], to.Port())
		s.udpConn.Control(func(fd uintptr) { transmit(fd, b[headers:], dst, seen) })
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
	transmit(uintptr(s.raw), b, dst, seen)
}
