package egress

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// snapLen is how much of a denied packet is looked at: headers with a few options.
const snapLen = 128

// Numbers of linux/netfilter/nfnetlink_log.h.
const (
	ulogPacket, ulogConfig   = 0, 1
	ulogCfgCmd, ulogCfgMode  = 1, 2
	ulogCmdBind              = 1
	ulogCopyPacket           = 2
	ulogPayload, ulogHWProto = 9, 1 // NFULA_PAYLOAD, NFULA_PACKET_HDR
)

// Told hears of what filters deny, from a log group of its own in this network namespace.
type Told struct {
	f     *os.File
	group uint16
}

// Listen takes a free group. It costs one socket, and a goroutine that sleeps where Next is called.
func Listen() (*Told, error) {
	for range 64 {
		group := uint16(1024 + rand.IntN(1<<16-1024))
		t, err := bind(group)
		if !errors.Is(err, unix.EBUSY) {
			return t, err
		}
	}
	return nil, errors.New("listen to what is denied: no netfilter log group is free")
}

func bind(group uint16) (*Told, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("listen to what is denied: %w", err)
	}
	f := os.NewFile(uintptr(fd), "netfilter log")
	fail := func(err error) (*Told, error) {
		f.Close()
		return nil, fmt.Errorf("listen to what is denied: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fail(err)
	}
	mode := append(be32(snapLen), ulogCopyPacket, 0)
	for i, attrs := range []netlink.Attrs{netlink.Attrs{}.Bytes(ulogCfgCmd, []byte{ulogCmdBind}), netlink.Attrs{}.Bytes(ulogCfgMode, mode)} {
		b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+4+len(attrs)))
		b = binary.NativeEndian.AppendUint16(b, unix.NFNL_SUBSYS_ULOG<<8|ulogConfig)
		b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
		b = binary.NativeEndian.AppendUint32(b, uint32(i+1))
		b = append(b, 0, 0, 0, 0, unix.AF_UNSPEC, 0, byte(group>>8), byte(group))
		if err := unix.Sendto(fd, append(b, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return fail(err)
		}
		// The answer is there when sendto returns.
		ack := make([]byte, 512)
		n, _, err := unix.Recvfrom(fd, ack, 0)
		if err != nil {
			return fail(err)
		}
		if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(ack[4:]) != unix.NLMSG_ERROR {
			continue // a packet already
		}
		if errno := -int32(binary.NativeEndian.Uint32(ack[unix.SizeofNlMsghdr:])); errno != 0 {
			return fail(unix.Errno(errno))
		}
	}
	return &Told{f: f, group: group}, nil
}

// Group is what filters are told in Options.
func (t *Told) Group() uint16 { return t.group }

// Next waits for the next denied packets. It ends with an error when t is closed.
func (t *Told) Next() ([]Attempt, error) {
	b := make([]byte, 8<<10)
	n, err := t.f.Read(b)
	if errors.Is(err, unix.ENOBUFS) {
		return nil, nil // more than the socket holds: the sets have counted them
	}
	if err != nil {
		return nil, err
	}
	return parse(b[:n]), nil
}

// Close ends Next.
func (t *Told) Close() error { return t.f.Close() }

// parse reads log messages.
func parse(b []byte) []Attempt {
	var out []Attempt
	for len(b) >= unix.SizeofNlMsghdr {
		l := int(binary.NativeEndian.Uint32(b))
		if l < unix.SizeofNlMsghdr+4 || l > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NFNL_SUBSYS_ULOG<<8|ulogPacket {
			if a, ok := parsePacket(netlink.Parse(b[unix.SizeofNlMsghdr+4 : l])[ulogPayload]); ok {
				out = append(out, a)
			}
		}
		b = b[min((l+3)&^3, len(b)):]
	}
	return out
}

// parsePacket reads where an IP packet was to go. The container wrote it.
func parsePacket(p []byte) (Attempt, bool) {
	if len(p) < 20 {
		return Attempt{}, false
	}
	var proto byte
	var rest []byte
	var a Attempt
	switch p[0] >> 4 {
	case 4:
		n := int(p[0]&15) * 4
		if n < 20 {
			return a, false
		}
		a.Addr, proto, rest = netip.AddrFrom4([4]byte(p[16:20])), p[9], p[min(n, len(p)):]
	case 6:
		if len(p) < 40 {
			return a, false
		}
		a.Addr, proto, rest = netip.AddrFrom16([16]byte(p[24:40])), p[6], p[40:]
	default:
		return a, false
	}
	a.Proto, a.Packets = protoName(proto), 1
	if protocols[a.Proto] != 0 && len(rest) >= 4 {
		a.Port = binary.BigEndian.Uint16(rest[2:])
	}
	return a, true
}
