package portmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reservation holds host ports by listening on them, from before the container starts until Close. The process that made it
// must stay: when it dies the kernel frees the ports, and Withdraw removes the rest.
type Reservation struct {
	maps   []Mapping
	others []Mapping // what sctp ports must not collide with
	held   []held

	mu     sync.Mutex
	table  Table
	active bool
	closed bool
	target Target
	ctx    context.Context // of the forwarders, since Activate
	cancel context.CancelFunc
	firsts *firsts // nil under the policy docker
	inside *inside // nil when nobody has said where
	done   sync.WaitGroup
	// conns are the forwarders' connections. Those that are true lead to the target, and end when it is another.
	conns map[io.Closer]bool
}

// held is one listener: tcp or udp.
type held struct {
	of  Mapping // as it was reserved
	tcp *net.TCPListener
	udp *net.UDPConn
	// sctp is bound and no more: only nftables brings sctp to a container.
	sctp *os.File
}

// The range that Reserve picks from when the host port is 0, Linux's default ephemeral range as in Docker.
const (
	ephemeralFirst = 32768
	ephemeralLast  = 60999
)

// Reserve binds a listener for every mapping, so that a taken port is an error (*TakenError) before anything starts. On an
// error nothing stays bound. Connections that come before Activate wait.
func Reserve(ctx context.Context, m []Mapping) (*Reservation, error) {
	return ReserveBeside(ctx, m, nil)
}

// ReserveBeside is Reserve for a host where others are published: no listener keeps two containers off one sctp port.
func ReserveBeside(ctx context.Context, m, others []Mapping) (*Reservation, error) {
	r := &Reservation{maps: append([]Mapping(nil), m...), others: others, conns: make(map[io.Closer]bool)}
	next := uint16(ephemeralFirst)
	for i := range r.maps {
		if err := r.reserve(ctx, i, &next); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return r, nil
}

func (r *Reservation) reserve(ctx context.Context, i int, next *uint16) error {
	m := &r.maps[i]
	switch {
	case m.Proto != "tcp" && m.Proto != "udp" && m.Proto != "sctp":
		return fmt.Errorf("publish port %d: protocol %q is not supported, use tcp, udp or sctp", m.ContainerPort, m.Proto)
	case m.Proto == "sctp" && m.HostIP.IsLoopback():
		return fmt.Errorf("publish port %d/sctp on %s: nothing forwards sctp from the loopback; it can be published on other addresses alone", m.ContainerPort, m.HostIP)
	}
	if m.ContainerPort == 0 {
		return errors.New("publish port: container port 0 is not valid")
	}
	asked := *m
	first, last := m.HostPort, max(m.HostPort, m.HostPortEnd)
	ephemeral := first == 0
	if ephemeral {
		first, last = *next, ephemeralLast
	}
	for port := int(first); port <= int(last); port++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		m.HostPort, m.HostPortEnd = uint16(port), 0
		err := error(syscall.EADDRINUSE)
		if m.Proto != "sctp" || !slices.ContainsFunc(r.others, m.Collides) && !slices.ContainsFunc(r.maps[:i], m.Collides) {
			err = r.listen(ctx, i)
		}
		if err == nil {
			if ephemeral {
				*next = uint16(port) + 1
			}
			return nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("bind for %s: %w", m.hostAddr(), err)
		}
	}
	if ephemeral {
		return fmt.Errorf("publish port %d: no free port in %d-%d: %w", m.ContainerPort, ephemeralFirst, ephemeralLast, ErrPortTaken)
	}
	return &TakenError{Mapping: asked}
}

// listen binds all listeners of mapping i or none.
func (r *Reservation) listen(ctx context.Context, i int) error {
	m := r.maps[i]
	type bind struct {
		family   string
		ip       netip.Addr
		optional bool
	}
	var binds []bind
	switch {
	case !m.HostIP.IsValid():
		// A host without IPv6 publishes on IPv4 alone, as Docker does.
		binds = []bind{{"4", netip.IPv4Unspecified(), false}, {"6", netip.IPv6Unspecified(), true}}
	case m.HostIP.Unmap().Is4():
		binds = []bind{{"4", m.HostIP.Unmap(), false}}
	default:
		binds = []bind{{"6", m.HostIP, false}}
	}
	n := len(r.held)
	for _, b := range binds {
		h := held{of: m}
		addr := netip.AddrPortFrom(b.ip, m.HostPort).String()
		var err error
		if m.Proto == "sctp" {
			h.sctp, err = bindSCTP(b.ip, m.HostPort)
			if errors.Is(err, syscall.EPROTONOSUPPORT) || errors.Is(err, syscall.ESOCKTNOSUPPORT) {
				continue // no socket of the host can have the port either; other containers are kept off by the records
			}
		} else if m.Proto == "tcp" {
			// Keep-alive stays as the two ends set it; the forwarder adds none.
			lc := net.ListenConfig{KeepAlive: -1}
			lc.SetMultipathTCP(false) // plain TCP sockets are smaller, and splice without copies
			var l net.Listener
			if l, err = lc.Listen(ctx, "tcp"+b.family, addr); err == nil {
				h.tcp = l.(*net.TCPListener)
			}
		} else {
			lc := net.ListenConfig{Control: wantPacketInfo}
			var c net.PacketConn
			if c, err = lc.ListenPacket(ctx, "udp"+b.family, addr); err == nil {
				h.udp = c.(*net.UDPConn)
			}
		}
		if err != nil {
			if b.optional && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
				continue
			}
			for _, h := range r.held[n:] {
				h.close()
			}
			r.held = r.held[:n]
			return err
		}
		r.held = append(r.held, h)
	}
	return nil
}

// bindSCTP takes a port of a kernel that has sctp sockets.
func bindSCTP(ip netip.Addr, port uint16) (*os.File, error) {
	family, addr := unix.AF_INET, unix.Sockaddr(nil)
	if ip.Is4() {
		addr = &unix.SockaddrInet4{Port: int(port), Addr: ip.As4()}
	} else {
		family, addr = unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: ip.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "sctp port")
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, addr)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// wantPacketInfo asks for the local address of each datagram: the answer must leave from the address that the client asked,
// which a socket bound to all addresses doesn't know otherwise.
func wantPacketInfo(network, _ string, c syscall.RawConn) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if network == "udp4" {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	})
	return errors.Join(cerr, err)
}

func (h held) close() error {
	switch {
	case h.tcp != nil:
		return h.tcp.Close()
	case h.sctp != nil:
		return h.sctp.Close()
	}
	return h.udp.Close()
}

// Mappings returns what is reserved, with the host ports that were picked and, after Activate, the container's address.
func (r *Reservation) Mappings() []Mapping {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Mapping(nil), r.maps...)
}

// Obey prepares the ports for a table that has the host's input chains asked: the mappings get a log group. A kernel that has no packet
// log is no error: there the forwarder serves outsiders, who obey as well, but are seen as the gateway. It comes before Activate.
func (r *Reservation) Obey() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.active || r.firsts != nil || !r.outward() {
		return nil
	}
	return r.obey()
}

// Inside says how the container's network namespace is opened, so that IPv6 connections to what listens on IPv4 alone can be forwarded. It
// comes before Obey.
func (r *Reservation) Inside(netns func() (*os.File, error)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inside = &inside{netns: netns}
}

// served reports whether the container answers an IPv6 packet to a port of the host. It is called by firsts alone.
func (r *Reservation) served(dst netip.AddrPort, proto byte) bool {
	for _, m := range r.Mappings() {
		if m.HostPort == dst.Port() && protoNumber(m.Proto) == proto && (!m.HostIP.IsValid() || m.HostIP.IsUnspecified() || m.HostIP == dst.Addr()) {
			return r.inside.listens(m.Proto, m.ContainerPort)
		}
	}
	return true
}

func (r *Reservation) obey() error {
	f, err := openFirsts()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if err != nil {
		return err
	}
	r.firsts = f
	if r.inside != nil {
		f.served = r.served
	}
	for i := range r.maps {
		r.maps[i].Group = f.group
	}
	return nil
}

// outward reports whether somebody outside could use one of the ports.
func (r *Reservation) outward() bool {
	return slices.ContainsFunc(r.maps, func(m Mapping) bool { return !m.HostIP.IsLoopback() })
}

// Active reports whether the table has the ports' elements, which Close removes.
func (r *Reservation) Active() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.active && !r.closed
}

// Activate makes the ports reach a container: map elements in the table, which is made when it is missing, and forwarders. It may be called
// once, by who holds the table's lock. network.Manager.Publish calls it with the endpoint's data and records the ports for the case that
// this process dies.
func (r *Reservation) Activate(ctx context.Context, t Table, containerID string, to Target) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.active {
		return fmt.Errorf("activate ports of %s: reservation is closed or active already", containerID)
	}
	if !to.reach().IsValid() {
		return fmt.Errorf("activate ports of %s: the container has no address", containerID)
	}
	for i := range r.maps {
		r.maps[i].Target = to
	}
	if err := add(t, r.maps); err != nil {
		return fmt.Errorf("activate ports of %s: %w", containerID, err)
	}
	if r.firsts != nil {
		if err := r.firsts.start(); err != nil {
			return errors.Join(err, Withdraw(ctx, t, r.maps))
		}
	}
	r.table, r.active = t, true
	r.target = to
	r.ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx)) // the forwarders live until Close, not until ctx ends
	r.serve(r.held)
	return nil
}

// serve starts the forwarders of listeners. The caller holds r.mu.
func (r *Reservation) serve(hs []held) {
	for _, h := range hs {
		if h.tcp != nil {
			r.done.Go(func() { r.serveTCP(r.ctx, h.tcp, h.of.ContainerPort) })
		} else if h.udp != nil {
			r.done.Go(func() { r.serveUDP(h.udp, h.of.ContainerPort) })
		}
	}
}

// Add publishes further ports. record is called with all mappings before the kernel has the new ones; an error, its own too, leaves
// everything as it was. The caller holds the table's lock.
func (r *Reservation) Add(ctx context.Context, ms []Mapping, record func([]Mapping) error) (err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !r.active {
		return errors.New("publish ports: the container does not run")
	}
	n, h := len(r.maps), len(r.held)
	defer func() {
		if err != nil {
			for _, x := range r.held[h:] {
				err = errors.Join(err, x.close())
			}
			r.held = r.held[:h]
			if r.maps = r.maps[:n]; record != nil {
				err = errors.Join(err, record(slices.Clone(r.maps)))
			}
		}
	}()
	next := uint16(ephemeralFirst)
	if r.table.Live != nil {
		if r.others, err = r.table.Live(); err != nil {
			return err
		}
	}
	r.maps = append(r.maps, ms...)
	for i := n; i < len(r.maps); i++ {
		if err := r.reserve(ctx, i, &next); err != nil {
			record = nil // nothing was
			return err
		}
		r.maps[i].Target = r.target
	}
	if !r.table.Docker && r.outward() && r.firsts == nil {
		if err := r.obey(); err != nil {
			return err
		}
		if r.firsts != nil {
			if err := r.firsts.start(); err != nil {
				return err
			}
		}
	}
	if r.firsts != nil {
		for i := n; i < len(r.maps); i++ {
			r.maps[i].Group = r.firsts.group
		}
	}
	if err := record(slices.Clone(r.maps)); err != nil {
		return err
	}
	if err := add(r.table, r.maps[n:]); err != nil {
		return errors.Join(err, Withdraw(ctx, r.table, r.maps[n:]))
	}
	r.serve(r.held[h:])
	return nil
}

// Drop takes ports back that match. Connections that are up stay. record is called with what is left once the kernel has let go. The
// caller holds the table's lock.
func (r *Reservation) Drop(ctx context.Context, match func(Mapping) bool, record func([]Mapping) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !r.active {
		return errors.New("take ports back: the container does not run")
	}
	var gone, left []Mapping
	for _, m := range r.maps {
		if match(m) {
			gone = append(gone, m)
		} else {
			left = append(left, m)
		}
	}
	if err := Withdraw(ctx, r.table, gone); err != nil {
		return err
	}
	var errs []error
	r.held = slices.DeleteFunc(r.held, func(h held) bool {
		if !slices.ContainsFunc(gone, h.of.Same) {
			return false
		}
		errs = append(errs, h.close())
		return true
	})
	r.maps = left
	return errors.Join(append(errs, record(slices.Clone(left)))...)
}

// Move makes the ports lead to another address of the container, in one transaction: the host's ports stay held, and no packet finds them
// leading nowhere. Forwarded connections to the address before end. record is called with the mappings as they will be before the kernel has
// them; after an error, its own too, the ports lead where they led. The caller holds the table's lock.
func (r *Reservation) Move(to Target, record func([]Mapping) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !r.active {
		return errors.New("move ports: the container does not run")
	}
	if !to.reach().IsValid() {
		return errors.New("move ports: the container has no address there")
	}
	was, is := r.maps, slices.Clone(r.maps)
	for k := range is {
		is[k].Target = to
	}
	if err := record(slices.Clone(is)); err != nil {
		return err
	}
	if err := move(r.table, was, is); err != nil {
		return err
	}
	r.maps, r.target = is, to
	for c, leads := range r.conns {
		if leads {
			c.Close()
		}
	}
	return nil
}

// Same reports whether two mappings are of one port of the host and one of the container.
func (m Mapping) Same(o Mapping) bool {
	return m.Proto == o.Proto && m.HostIP == o.HostIP && m.HostPort == o.HostPort && m.ContainerPort == o.ContainerPort
}

// Close stops the forwarders, removes the elements, frees the ports, and waits until no goroutine is left. Safe to call twice.
func (r *Reservation) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	var err error
	if r.active {
		// Elements first: while the listener stands, nobody else can have the port.
		err = Withdraw(context.Background(), r.table, r.maps)
		r.cancel()
	}
	for _, h := range r.held {
		h.close()
	}
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.done.Wait()
	if r.firsts != nil {
		r.firsts.close(func() {
			if r.inside != nil {
				r.inside.close()
			}
		})
	}
	return err
}

// track registers a connection that Close must close; false when Close was called already.
func (r *Reservation) track(c io.Closer) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.conns[c] = false
	return true
}

// leads is track for a connection to an address of the container; false too when it is not the target any more.
func (r *Reservation) leads(c io.Closer, to netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.target.reach() != to {
		return false
	}
	r.conns[c] = true
	return true
}

// to is where a port of the container is found now.
func (r *Reservation) to(port uint16) netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	return netip.AddrPortFrom(r.target.reach(), port)
}

// over reports whether Close was called.
func (r *Reservation) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed
}

func (r *Reservation) untrack(c io.Closer) {
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
}
