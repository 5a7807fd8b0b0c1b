package portmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// Under the policy `host` a published port has to obey whatever filters the host's input, and yet the connection shall run as
// fast as one that is translated in prerouting. So only its first packet goes the way of a packet for the host:
//
//	client ── prerouting (not translated) ── input: ufw, firewalld, any chain ── our chain "input", behind all of them
//	                                                                                │ log group N, drop
//	                                                      the monitor's firsts ◄────┘
//	                                                                │ the same packet, by a raw socket
//	container ◄── postrouting ◄── output: dnat, a map element ◄─────┘
//
// What the firewall drops or rejects never comes here. The dropped packet's connection was not confirmed, so nothing is left of
// it; the one sent again makes the connection, translated from its beginning, and every further packet in both directions stays
// in the kernel. A connection costs its 25 µs once (decision 44), its bytes nothing.
//
// The source address that the raw socket sends is the client's own: the container sees it.

// firsts receives the first packets of connections to the ports of one reservation, and sends them on.
type firsts struct {
	group uint16
	log   *os.File // netlink, in the runtime's poller
	raw4  int
	raw6  int // -1 on a host without IPv6
	done  sync.WaitGroup
	// served says whether the container would answer an IPv6 packet to a port of the host. What it would not, the listener gets, whose
	// forwarder brings it to the container's IPv4 address: many servers listen there alone. May be nil: then it would.
	served func(dst netip.AddrPort, proto byte) bool
	local6 int // as raw6, for what the listener gets; -1 until one is needed
}

// markLocal is on packets that are not to be translated at output. It lives from there to the loopback device.
const markLocal = 0x636f6e78

// linux/netfilter/nfnetlink_log.h.
const (
	nfulMsgPacket   = 0
	nfulMsgConfig   = 1
	nfulaPayload    = 9
	nfulaCfgCmd     = 1
	nfulaCfgMode    = 2
	nfulaCfgQThresh = 5
	nfulCfgBind     = 1
	nfulCopyPacket  = 2
)

// groupTries bounds the search for a log group that nobody has. There are 64,512 to choose from.
const groupTries = 64

// openFirsts binds a log group of its own. It is an error on kernels without nfnetlink_log; then the ports stay with the listeners.
func openFirsts() (f *firsts, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open packet log: %w", err)
	}
	f = &firsts{log: os.NewFile(uintptr(fd), "packet log"), raw4: -1, raw6: -1, local6: -1}
	defer func() {
		if err != nil {
			f.close(func() {})
		}
	}()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("open packet log: %w", err)
	}
	for range groupTries {
		f.group = uint16(1024 + rand.N(1<<16-1024))
		if err = bindGroup(fd, f.group); !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EPERM) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("bind packet log: %w", err)
	}
	if f.raw4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW); err != nil {
		return nil, fmt.Errorf("open raw socket: %w", err)
	}
	f.raw6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		f.raw6, err = -1, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open raw socket: %w", err)
	}
	return f, nil
}

// bindGroup makes the socket the receiver of a log group: whole packets, each at once.
func bindGroup(fd int, group uint16) error {
	a := netlink.Attrs{unix.AF_UNSPEC, 0, byte(group >> 8), byte(group)}.
		Bytes(nfulaCfgCmd, []byte{nfulCfgBind}).
		Bytes(nfulaCfgMode, []byte{0, 0, 0xff, 0xff, nfulCopyPacket, 0}).
		Bytes(nfulaCfgQThresh, []byte{0, 0, 0, 1})
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(a)))
	m = binary.NativeEndian.AppendUint16(m, unix.NFNL_SUBSYS_ULOG<<8|nfulMsgConfig)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = append(m, make([]byte, 8)...) // sequence and port
	m = append(m, a...)
	if err := unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	// The answer is queued before sendto returns, and the group has logged nothing yet: nobody knows its number.
	b := make([]byte, 4<<10)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR {
		return errors.New("unexpected answer")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// start serves until close.
func (f *firsts) start() error {
	raw, err := f.log.SyscallConn()
	if err != nil {
		return err
	}
	f.done.Go(func() {
		for f.receive(raw) == nil {
		}
	})
	return nil
}

// receive waits for packets and sends on what is queued.
func (f *firsts) receive(raw syscall.RawConn) error {
	return raw.Read(func(fd uintptr) bool {
		bp := datagrams.Get().(*[]byte)
		defer datagrams.Put(bp)
		got := false
		for range 64 { // a bounded burst, so that close is noticed under load
			n, from, err := unix.Recvfrom(int(fd), *bp, unix.MSG_DONTWAIT)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				// ENOBUFS: more came than was read, and is lost; whoever sent it sends again.
				return got || err != unix.EAGAIN
			}
			got = true
			if nl, ok := from.(*unix.SockaddrNetlink); ok && nl.Pid == 0 { // the kernel's alone
				logged((*bp)[:n], f.pass)
			}
		}
		return true
	})
}

// logged calls fn for every packet in a datagram of the kernel's packet log.
func logged(b []byte, fn func(packet []byte)) {
	const header = unix.SizeofNlMsghdr + 4 // and struct nfgenmsg
	for len(b) >= header {
		l := int(binary.NativeEndian.Uint32(b))
		if l < header || l > len(b) {
			return
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NFNL_SUBSYS_ULOG<<8|nfulMsgPacket {
			netlink.Each(b[header:l], func(typ uint16, data []byte) {
				if typ == nfulaPayload {
					fn(data)
				}
			})
		}
		b = b[min((l+3)&^3, len(b)):]
	}
}

// pass sends one packet on. What can't be sent is lost, as on any wire.
func (f *firsts) pass(p []byte) {
	k, ok := readPacket(p)
	if !ok {
		return
	}
	k.settle()
	if k.dst.Addr().Is4() {
		_ = unix.Sendto(f.raw4, k.b, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: k.dst.Addr().As4()})
		return
	}
	raw := f.raw6
	if raw >= 0 && f.served != nil && !f.served(k.dst, k.proto) {
		raw = f.untranslated()
	}
	if raw < 0 {
		return
	}
	to := &unix.SockaddrInet6{Addr: k.dst.Addr().As16()}
	for piece := range k.pieces {
		if err := unix.Sendto(raw, piece, unix.MSG_DONTWAIT, to); err != nil {
			return
		}
	}
}

// untranslated is the socket for what the listener gets; -1 when there can be none.
func (f *firsts) untranslated() int {
	if f.local6 >= 0 {
		return f.local6
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return -1
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, markLocal); err != nil {
		unix.Close(fd)
		return -1
	}
	f.local6 = fd
	return fd
}

// close ends the receiving. finished is called behind it, when no packet is in hand any more; nobody waits for that, see netlink.AfterGrace.
func (f *firsts) close(finished func()) {
	go netlink.AfterGrace(func() {
		f.log.Close()
		f.done.Wait()
		for _, fd := range []int{f.raw4, f.raw6, f.local6} {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
		finished()
	})
}

// packet is one IP packet that an outsider made and the kernel has looked at.
type packet struct {
	b     []byte // the whole
	at    int    // of the transport header
	proto byte
	dst   netip.AddrPort
}

// readPacket finds the transport header; false for what is no whole packet of tcp, udp or sctp.
func readPacket(b []byte) (k packet, ok bool) {
	if len(b) < 20 {
		return k, false
	}
	var addr netip.Addr
	size := 0
	switch b[0] >> 4 {
	case 4:
		k.at, k.proto, size = int(b[0]&15)*4, b[9], int(binary.BigEndian.Uint16(b[2:]))
		if k.at < 20 || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 { // a fragment
			return k, false
		}
		addr = netip.AddrFrom4([4]byte(b[16:20]))
	case 6:
		if len(b) < 40 {
			return k, false
		}
		size = 40 + int(binary.BigEndian.Uint16(b[4:]))
		addr = netip.AddrFrom16([16]byte(b[24:40]))
		if k.at, k.proto, ok = skipExtensions(b); !ok {
			return k, false
		}
	default:
		return k, false
	}
	if size > len(b) || size < k.at {
		return k, false
	}
	k.b = b[:size]
	least := map[byte]int{unix.IPPROTO_TCP: 20, unix.IPPROTO_UDP: 8, unix.IPPROTO_SCTP: 12}[k.proto]
	if least == 0 || size < k.at+least {
		return k, false
	}
	k.dst = netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[k.at+2:]))
	return k, true
}

// skipExtensions walks IPv6's extension headers as far as a first packet may have them.
func skipExtensions(b []byte) (at int, proto byte, ok bool) {
	at, proto = 40, b[6]
	for range 8 {
		switch proto {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if at+8 > len(b) {
				return 0, 0, false
			}
			proto, at = b[at], at+8+int(b[at+1])*8
		default:
			return at, proto, at <= len(b)
		}
	}
	return 0, 0, false
}

// settle counts the hop, as routing the packet would have, and completes its checksum: a packet from a neighbour on this machine
// may have left that to a network card that it never met.
func (k packet) settle() {
	pseudo := uint32(k.proto) + uint32(len(k.b)-k.at)
	if k.b[0]>>4 == 4 {
		k.b[8] = max(k.b[8], 2) - 1 // the kernel makes the header's checksum
		pseudo = sum(k.b[12:20], pseudo)
	} else {
		k.b[7] = max(k.b[7], 2) - 1
		pseudo = sum(k.b[8:40], pseudo)
	}
	t := k.b[k.at:]
	switch k.proto {
	case unix.IPPROTO_TCP:
		binary.BigEndian.PutUint16(t[16:], 0)
		binary.BigEndian.PutUint16(t[16:], fold(sum(t, pseudo)))
	case unix.IPPROTO_UDP:
		if k.b[0]>>4 == 4 && t[6] == 0 && t[7] == 0 {
			return // its sender wants none
		}
		binary.BigEndian.PutUint16(t[6:], 0)
		c := fold(sum(t, pseudo))
		if c == 0 {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(t[6:], c)
	case unix.IPPROTO_SCTP:
		binary.LittleEndian.PutUint32(t[8:], 0)
		binary.LittleEndian.PutUint32(t[8:], crc32.Checksum(t, crc32.MakeTable(crc32.Castagnoli)))
	}
}

// piece is how much of an IPv6 packet a fragment carries: what every IPv6 network passes, in steps of eight bytes.
const piece = (1280 - 40 - 8) &^ 7

// pieces yields the packet, or its fragments when it was put together from some: a host sends no large IPv6 packet in one.
func (k packet) pieces(yield func([]byte) bool) {
	if len(k.b) <= 1280 || k.at != 40 || k.proto == unix.IPPROTO_TCP {
		yield(k.b)
		return
	}
	id := rand.Uint32()
	data := k.b[k.at:]
	for off := 0; off < len(data); off += piece {
		part := data[off:min(off+piece, len(data))]
		more := uint16(0)
		if off+len(part) < len(data) {
			more = 1
		}
		p := append(make([]byte, 0, 48+len(part)), k.b[:40]...)
		binary.BigEndian.PutUint16(p[4:], uint16(8+len(part)))
		p[6] = unix.IPPROTO_FRAGMENT
		p = append(p, k.proto, 0)
		p = binary.BigEndian.AppendUint16(p, uint16(off)|more)
		p = binary.BigEndian.AppendUint32(p, id)
		if !yield(append(p, part...)) {
			return
		}
	}
}

// sum adds b's 16-bit words to s, the Internet checksum before its folding.
func sum(b []byte, s uint32) uint32 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}
