package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"conex/internal/linux/bpf"
	"conex/internal/linux/netlink"
)

// Address is where containers find their name service, Docker's place for it.
var Address = netip.AddrFrom4([4]byte{127, 0, 0, 11})

const port = 53

// ownPort is where the sockets really stand, so that port 53 is the container's own, on every address: a socket of ours on it
// would keep the container from 0.0.0.0:53. Queries are steered here. The port is tcpmux's, which nobody has missed for thirty
// years; no ephemeral port and none of bindresvport's is ever one so low, so that it is nobody's by chance.
const ownPort = 1

// queueSize is how many bytes of queries may wait in the kernel, a few thousand of them: what comes while the processors are busy
// with something else. It takes memory only while they wait.
const queueSize = 4 << 20

// Sockets are what a server has inside a container's network namespace.
type Sockets struct {
	udp, tcp int
	// raw sends datagrams whose source port is 53, -1 when udp itself stands there.
	raw int
	// link keeps the program that steers queries to the sockets; -1 without.
	link int
}

// none is without any.
var none = Sockets{-1, -1, -1, -1}

// Open makes the sockets inside the network namespace netns, whose loopback interface need not be up yet.
//
// A program at the kernel's look-up of sockets hands what the namespace itself sends to 127.0.0.11:53 to sockets that stand
// elsewhere. It costs nothing but a few nanoseconds at each new connection and unconnected datagram. A kernel without it, older than
// 5.9, gets plain sockets on 127.0.0.11:53 instead: a container there that wants port 53 must name another address.
func Open(netns *os.File) (s *Sockets, err error) {
	err = netlink.In(netns, func() error {
		s, err = listen(netns)
		return err
	})
	return s, err
}

func listen(netns *os.File) (*Sockets, error) {
	s, err := open(ownPort)
	if err != nil {
		return nil, err
	}
	if err = s.steer(netns); err == nil {
		return s, nil
	}
	s.Close()
	s, perr := plain()
	if perr != nil {
		return nil, errors.Join(err, perr)
	}
	return s, nil
}

// plain makes sockets that stand on port 53 themselves.
func plain() (*Sockets, error) {
	s, err := open(port)
	if err != nil {
		return nil, err
	}
	unix.Close(s.raw)
	s.raw = -1
	return s, nil
}

func open(at int) (_ *Sockets, err error) {
	s := new(Sockets)
	*s = none
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.udp, err = bound(unix.SOCK_DGRAM, at); err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(s.udp, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueSize); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if s.tcp, err = bound(unix.SOCK_STREAM, at); err != nil {
		return nil, err
	}
	// Its connections are on port 53. They must not keep the container from listening there.
	if err := unix.SetsockoptInt(s.tcp, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Listen(s.tcp, 16); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	// Of its own it receives nothing: IPPROTO_RAW.
	if s.raw, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return s, nil
}

// bound makes a socket on 127.0.0.11.
func bound(kind, at int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	// The address is there with the loopback interface, which comes up at the same time.
	if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: at, Addr: Address.As4()}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind name service to port %d: %w", at, err)
	}
	return fd, nil
}

// steer attaches the program that finds the sockets for 127.0.0.11:53.
func (s *Sockets) steer(netns *os.File) error {
	sockets, err := bpf.Sockets(s.udp, s.tcp)
	if err != nil {
		return err
	}
	defer unix.Close(sockets)
	prog, err := bpf.Load(unix.BPF_PROG_TYPE_SK_LOOKUP, unix.BPF_SK_LOOKUP, "conex_dns", steering(sockets))
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	s.link, err = bpf.Link(prog, int(netns.Fd()), unix.BPF_SK_LOOKUP)
	return err
}

// steering is the program, of the kind BPF_PROG_TYPE_SK_LOOKUP: the kernel runs it in the container's network namespace when a
// packet is for no connected socket. Only the sockets that it names are chosen by it; everything else goes its usual way.
func steering(sockets int) []bpf.Instruction {
	const (
		result, ctx, arg2, arg3, kept, sock, stack = 0, 1, 2, 3, 6, 7, 10 // registers

		protocol, localAddr, localPort = 12, 40, 60 // in struct bpf_sk_lookup: its own order, the network's order, its own order

		mapLookup, release, assign = 1, 86, 124 // BPF_FUNC_map_lookup_elem, _sk_release, _sk_assign
	)
	addr := Address.As4()
	return []bpf.Instruction{
		bpf.Op(bpf.LoadWord, arg2|ctx<<4, localPort, 0),
		bpf.Op(bpf.IfNot, arg2, 20, port),
		bpf.Op(bpf.LoadWord, arg2|ctx<<4, localAddr, 0),
		bpf.Op(bpf.IfNot32, arg2, 18, int32(binary.NativeEndian.Uint32(addr[:]))),
		bpf.Op(bpf.MoveReg, kept|ctx<<4, 0, 0),
		// The key: datagrams have the first socket, connections the second.
		bpf.Op(bpf.StoreWord, stack, -4, 0),
		bpf.Op(bpf.LoadWord, arg2|ctx<<4, protocol, 0),
		bpf.Op(bpf.IfEqual, arg2, 1, unix.IPPROTO_UDP),
		bpf.Op(bpf.StoreWord, stack, -4, 1),
		bpf.Op(bpf.Load64, ctx|bpf.FromMap, 0, int32(sockets)), {},
		bpf.Op(bpf.MoveReg, arg2|stack<<4, 0, 0),
		bpf.Op(bpf.Add, arg2, 0, -4),
		bpf.Op(bpf.Call, 0, 0, mapLookup),
		bpf.Op(bpf.IfEqual, result, 7, 0),
		bpf.Op(bpf.MoveReg, sock|result<<4, 0, 0),
		bpf.Op(bpf.MoveReg, ctx|kept<<4, 0, 0),
		bpf.Op(bpf.MoveReg, arg2|result<<4, 0, 0),
		bpf.Op(bpf.Move, arg3, 0, 0),
		bpf.Op(bpf.Call, 0, 0, assign),
		bpf.Op(bpf.MoveReg, ctx|sock<<4, 0, 0),
		bpf.Op(bpf.Call, 0, 0, release),
		bpf.Op(bpf.Move, result, 0, 1), // SK_PASS
		bpf.Op(bpf.Exit, 0, 0, 0),
	}
}

// Close closes the sockets and takes the program away. A server that has them closes them itself.
func (s *Sockets) Close() {
	for _, fd := range []int{s.udp, s.tcp, s.raw, s.link} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	*s = none
}
