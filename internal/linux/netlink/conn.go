// Package netlink owns conex's raw netlink sockets: a batch of messages goes out in one system call and comes back with one
// verdict each.
//
// The kernel handles a netlink request inside the sender's system call, so when sendto returns, every acknowledgement is
// already queued: a batch of three changes costs two system calls. That is what the set-up of a container's network needs;
// the richer libraries, one round trip and several allocations per change, are kept for what is done once per boot.
package netlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a netlink socket, bound to the network namespace of the thread that opened it. One user at a time.
type Conn struct {
	fd  int
	seq uint32
	buf *[16 << 10]byte // for receiving, made at first use
	// roomy says that the socket was given room to send more at once.
	roomy bool
	home  *Kept // where Close puts it; nil closes it
}

// Message is one request: its type, extra NLM_F_ flags (NLM_F_REQUEST and NLM_F_ACK are added) and everything after the
// netlink header.
type Message struct {
	Type  uint16
	Flags uint16
	Data  []byte
}

// Result is the kernel's verdict on one Message: nil or an error wrapping a unix.Errno, and the payloads it sent back.
type Result struct {
	Err     error
	Replies [][]byte
}

// Dial opens a socket of the given protocol (unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER) in the caller's network namespace.
func Dial(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind netlink socket: %w", err)
	}
	// Both only make errors shorter and clearer; a kernel without them works the same.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	return &Conn{fd: fd}, nil
}

// Close closes the socket, or gives it back to who keeps it.
func (c *Conn) Close() error {
	if c.buf != nil {
		spare.Put(c.buf)
		c.buf = nil
	}
	if c.home.keep(c) {
		return nil
	}
	return unix.Close(c.fd)
}

// spare are the buffers of closed sockets: a container's start opens one after the other.
var spare sync.Pool

// CloseBehind is Close for one who deleted something of nf_tables and need not wait, see AfterGrace.
func (c *Conn) CloseBehind() {
	if c.home.keep(c) {
		return
	}
	// Nothing can be done about an error, and nobody waits for the end.
	go AfterGrace(func() { unix.Close(c.fd) })
}

// AfterGrace calls fn once the kernel has freed what was deleted of nf_tables before. That takes it some ten milliseconds, and whoever closes a
// netfilter socket meanwhile waits for it in the kernel, where all others' changes of nf_tables in the same network namespace wait behind him.
func AfterGrace(fn func()) {
	// The same wait, but nobody is behind. Kernels that refuse it (nohz_full) only make others wait.
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	fn()
}

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL: return when every processor has passed through a quiet state.
const membarrierGlobal = 1

// Kept keeps one socket open between its users, for a process that lives long and should wait for nobody when it is done with one (see
// AfterGrace). Its users must be in one network namespace. The zero value is ready; a nil one keeps nothing.
type Kept struct {
	mu   sync.Mutex
	idle *Conn
}

// Dial returns the kept socket, or a new one when that is in use.
func (k *Kept) Dial(protocol int) (*Conn, error) {
	if k == nil {
		return Dial(protocol)
	}
	k.mu.Lock()
	c := k.idle
	k.idle = nil
	k.mu.Unlock()
	if c != nil {
		return c, nil
	}
	c, err := Dial(protocol)
	if err == nil {
		c.home = k
	}
	return c, err
}

// keep takes a socket back unless there is one.
func (k *Kept) keep(c *Conn) bool {
	if k == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.idle != nil {
		return false
	}
	k.idle = c
	return true
}

const headerLen = unix.SizeofNlMsghdr

// append adds one message with its header to buf.
func (c *Conn) append(buf []byte, m Message, flags uint16) ([]byte, uint32) {
	c.seq++
	buf = binary.NativeEndian.AppendUint32(buf, uint32(headerLen+len(m.Data)))
	buf = binary.NativeEndian.AppendUint16(buf, m.Type)
	buf = binary.NativeEndian.AppendUint16(buf, m.Flags|flags)
	buf = binary.NativeEndian.AppendUint32(buf, c.seq)
	buf = binary.NativeEndian.AppendUint32(buf, 0)
	buf = append(buf, m.Data...)
	return pad(buf), c.seq
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// send makes room for what is larger than a socket may send at once: thousands of ports are one transaction.
func (c *Conn) send(buf []byte) error {
	for {
		err := unix.Sendto(c.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == unix.EMSGSIZE && !c.roomy {
			c.roomy = true
			if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(buf)) == nil {
				continue
			}
		}
		if err != unix.EINTR {
			return err
		}
	}
}

// Execute sends the messages in one go; the kernel handles them in order and does not stop at an error. The results are in
// the same order. The error is that of the transport; use Do when any refusal is an error.
func (c *Conn) Execute(msgs ...Message) ([]Result, error) {
	var buf []byte
	first := c.seq + 1
	for _, m := range msgs {
		buf, _ = c.append(buf, m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	}
	if err := c.send(buf); err != nil {
		return nil, fmt.Errorf("send netlink batch: %w", err)
	}
	res := make([]Result, len(msgs))
	done := make([]bool, len(msgs))
	left := len(msgs)
	for left > 0 {
		n, err := c.receive(0)
		if err != nil {
			return nil, err
		}
		err = each(c.buf[:n], func(typ, flags uint16, seq uint32, data []byte) error {
			i := int(seq - first)
			if i < 0 || i >= len(msgs) || done[i] {
				return nil
			}
			switch typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				res[i].Err = verdict(flags, data)
				done[i] = true
				left--
			default:
				res[i].Replies = append(res[i].Replies, append([]byte(nil), data...))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return res, nil
}

// Do is Execute for messages that must all succeed: it returns the first refusal.
func (c *Conn) Do(msgs ...Message) error {
	res, err := c.Execute(msgs...)
	if err != nil {
		return err
	}
	for i := range res {
		if res[i].Err != nil {
			return fmt.Errorf("netlink message %d of %d: %w", i+1, len(res), res[i].Err)
		}
	}
	return nil
}

// Dump sends one request with NLM_F_DUMP and returns all payloads.
func (c *Conn) Dump(m Message) (out [][]byte, err error) {
	err = c.Walk(m, func(data []byte) { out = append(out, append([]byte(nil), data...)) })
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Walk is Dump for what may be much: fn gets one payload after the other, each for the time of the call.
func (c *Conn) Walk(m Message, fn func(data []byte)) error {
	buf, want := c.append(nil, m, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := c.send(buf); err != nil {
		return fmt.Errorf("send netlink dump: %w", err)
	}
	for done := false; !done; {
		n, err := c.receive(0)
		if err != nil {
			return err
		}
		err = each(c.buf[:n], func(typ, flags uint16, seq uint32, data []byte) error {
			switch {
			case seq != want:
			case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
				done = true
				return verdict(flags, data)
			default:
				fn(data)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Transaction sends the messages as one nfnetlink batch for the given subsystem (unix.NFNL_SUBSYS_NFTABLES): all of them
// take effect, or none and the first refusal is returned.
func (c *Conn) Transaction(subsystem uint16, msgs ...Message) error {
	if len(msgs) == 0 {
		return nil
	}
	marker := []byte{unix.AF_UNSPEC, 0, byte(subsystem >> 8), byte(subsystem)} // struct nfgenmsg, res_id big endian
	buf, first := c.append(nil, Message{Type: unix.NFNL_MSG_BATCH_BEGIN, Data: marker}, unix.NLM_F_REQUEST)
	var last uint32
	for i, m := range msgs {
		flags := uint16(unix.NLM_F_REQUEST)
		if i == len(msgs)-1 {
			flags |= unix.NLM_F_ACK // one proof that the batch was run; refusals come unasked
		}
		buf, last = c.append(buf, m, flags)
	}
	buf, end := c.append(buf, Message{Type: unix.NFNL_MSG_BATCH_END, Data: marker}, unix.NLM_F_REQUEST)
	if err := c.send(buf); err != nil {
		return fmt.Errorf("send netlink transaction: %w", err)
	}
	var refused error
	acked := false
	for {
		n, err := c.receive(unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			break // everything is queued before sendto returns
		}
		if err != nil {
			return err
		}
		err = each(c.buf[:n], func(typ, flags uint16, seq uint32, data []byte) error {
			if typ != unix.NLMSG_ERROR || seq < first || seq > end {
				return nil
			}
			if v := verdict(flags, data); v != nil && refused == nil {
				refused = v
			}
			acked = acked || seq == last
			return nil
		})
		if err != nil {
			return err
		}
	}
	if refused != nil {
		return refused
	}
	if !acked {
		return errors.New("netlink transaction: no answer from the kernel")
	}
	return nil
}

// receive reads one datagram into c.buf. The kernel fits its datagrams to 8 KiB, or to the larger buffer that it has seen.
func (c *Conn) receive(flags int) (int, error) {
	if c.buf == nil {
		b, _ := spare.Get().(*[16 << 10]byte)
		if b == nil {
			b = new([16 << 10]byte)
		}
		c.buf = b
	}
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf[:], flags)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("receive netlink: %w", err)
		}
		// Another process could send to this socket; only the kernel, port 0, is heard.
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue
		}
		return n, nil
	}
}

// each calls fn for every message in a datagram.
func each(b []byte, fn func(typ, flags uint16, seq uint32, data []byte) error) error {
	for len(b) >= headerLen {
		l := int(binary.NativeEndian.Uint32(b))
		if l < headerLen || l > len(b) {
			return fmt.Errorf("netlink: message of %d bytes in %d", l, len(b))
		}
		err := fn(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:]), b[headerLen:l])
		if err != nil {
			return err
		}
		b = b[min((l+3)&^3, len(b)):]
	}
	return nil
}

// verdict reads the errno of an NLMSG_ERROR or NLMSG_DONE, and the kernel's words when it gave some.
func verdict(flags uint16, data []byte) error {
	if len(data) < 4 {
		return nil
	}
	code := int32(binary.NativeEndian.Uint32(data))
	if code == 0 {
		return nil
	}
	errno := unix.Errno(-code)
	// With NETLINK_CAP_ACK the original header follows the code, then the extended attributes.
	if flags&unix.NLM_F_ACK_TLVS != 0 && len(data) > 4+headerLen {
		at := 4 + headerLen
		if flags&unix.NLM_F_CAPPED == 0 {
			at = 4 + (int(binary.NativeEndian.Uint32(data[4:]))+3)&^3
		}
		if at < len(data) {
			if msg := Parse(data[at:])[unix.NLMSGERR_ATTR_MSG]; len(msg) > 1 {
				return fmt.Errorf("%w (%s)", errno, msg[:len(msg)-1])
			}
		}
	}
	return errno
}

// In runs fn on a thread that is inside the network namespace netns, and returns its error. Sockets that fn opens stay there
// for their life; /proc/sys/net shows that namespace meanwhile.
func In(netns *os.File, fn func() error) error {
	ch := make(chan error, 1)
	go func() {
		// Unlocked again only when the thread is back where it was; otherwise it dies with this goroutine.
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			ch <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			ch <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = fn()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		ch <- err
	}()
	return <-ch
}

// DialIn is Dial inside another network namespace.
func DialIn(protocol int, netns *os.File) (c *Conn, err error) {
	err = In(netns, func() error {
		c, err = Dial(protocol)
		return err
	})
	return c, err
}
