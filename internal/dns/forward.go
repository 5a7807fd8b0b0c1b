package dns

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// maxServers is how many servers are asked; resolv.conf(5) knows three, systemd-resolved's behind its stub come in addition.
const maxServers = 6

// domain returns the servers of the domain that a name lies in, and whether it lies in one.
func (c *Config) domain(name string) (servers []netip.AddrPort, ok bool) {
	if len(c.Given) > 0 {
		return nil, false
	}
	var best string
	for d, list := range c.Domains {
		if below(name, d) && len(d) >= len(best) {
			best, servers, ok = d, list, true
		}
	}
	return servers, ok
}

// servers are who is asked about a name, and whether from inside the container's network namespace. Without any, rcode is the answer.
func (s *Server) servers(cfg *Config, name string) (list []netip.AddrPort, inside bool, rcode dnsmessage.RCode) {
	var addrs []netip.Addr
	if len(cfg.Given) > 0 {
		// Whom the container can't reach it does not reach through us.
		addrs, inside = cfg.Given, true
	} else if !cfg.Names.Outward() {
		return nil, false, rcodeServerFailure
	} else if d, ok := cfg.domain(name); ok {
		if list = d; len(list) == 0 {
			return nil, false, dnsmessage.RCodeNameError
		}
	} else {
		var err error
		if addrs, err = cfg.Host(); err != nil {
			return nil, false, rcodeServerFailure
		}
	}
	for _, a := range addrs {
		list = append(list, netip.AddrPortFrom(a.Unmap(), port))
	}
	return s.order(list[:min(len(list), maxServers)]), inside, rcodeServerFailure
}

// order puts the servers that did not answer lately behind the others.
func (s *Server) order(list []netip.AddrPort) []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.late) == 0 || len(list) < 2 {
		return list
	}
	now := time.Now()
	late := func(a netip.AddrPort) bool { return now.Before(s.late[a]) }
	var out []netip.AddrPort
	for _, want := range []bool{false, true} {
		for _, a := range list {
			if late(a) == want {
				out = append(out, a)
			}
		}
	}
	return out
}

// note remembers whether a server answered.
func (s *Server) note(a netip.AddrPort, late bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !late {
		delete(s.late, a)
		return
	}
	if s.late == nil || len(s.late) > 4*maxServers { // the host's file had many others
		s.late = map[netip.AddrPort]time.Time{}
	}
	s.late[a] = time.Now().Add(lateTime)
}

// forward asks others, and returns their answer, or one of ours that says that they have none. out is what stands in front of it.
func (s *Server) forward(q *query, out []byte) []byte {
	cfg := s.cfg.Load()
	if cfg.Asks != nil && !cfg.Asks(q.name) {
		return q.failure(out, dnsmessage.RCodeNameError)
	}
	t := time.NewTimer(answerTime)
	defer t.Stop()
	select {
	case s.asked <- struct{}{}:
		defer func() { <-s.asked }()
	case <-t.C:
		return q.failure(out, rcodeServerFailure)
	case <-s.done:
		return q.failure(out, rcodeServerFailure)
	}
	list, inside, rcode := s.servers(cfg, q.name)
	if len(list) == 0 {
		return q.failure(out, rcode)
	}
	// Under a number of our own, so that the container can't help anybody to guess what an answer must look like.
	msg := slices.Clone(q.msg)
	id := msg[:2]
	binary.BigEndian.PutUint16(id, uint16(rand.Uint32()))
	e := exchange{s: s, netns: cfg.NetNS, msg: msg, end: q.end, limit: q.limit, list: list, inside: inside, tcp: q.tcp}
	answer := e.run()
	if answer == nil && q.tcp {
		e.tcp = false // by far not every server listens there
		answer = e.run()
	}
	// Whoever may be reached is asked of who bounds it by now.
	if learn := s.cfg.Load().Learn; answer != nil && learn != nil && learnt(learn, q.name, answer) != nil {
		return q.failure(out, rcodeServerFailure)
	}
	switch {
	case answer == nil:
		return q.failure(out, rcodeServerFailure)
	case len(answer) > q.limit:
		out = q.reply(out, dnsmessage.RCode(answer[3]&rcodeBits))
		out[len(out)-q.end+2] |= bitTruncated
		return out
	}
	copy(answer, q.msg[:2])
	return append(out, answer...)
}

// learnt passes on the addresses in an answer. What of it can't be read the container can't use to reach anybody.
func learnt(learn func(string, []netip.Addr, time.Duration) error, name string, answer []byte) error {
	var p dnsmessage.Parser
	if _, err := p.Start(answer); err != nil || p.SkipAllQuestions() != nil {
		return nil
	}
	var addrs []netip.Addr
	hold := uint32(0)
	for {
		h, err := p.AnswerHeader()
		if err != nil {
			break
		}
		switch h.Type {
		case dnsmessage.TypeA:
			r, err := p.AResource()
			if err != nil {
				return err
			}
			addrs = append(addrs, netip.AddrFrom4(r.A))
		case dnsmessage.TypeAAAA:
			r, err := p.AAAAResource()
			if err != nil {
				return err
			}
			addrs = append(addrs, netip.AddrFrom16(r.AAAA))
		default:
			if err := p.SkipAnswer(); err != nil {
				return err
			}
			continue
		}
		hold = max(hold, h.TTL)
	}
	if len(addrs) == 0 {
		return nil
	}
	return learn(name, addrs, time.Duration(hold)*time.Second)
}

// exchange is one question to others.
type exchange struct {
	s      *Server
	netns  *os.File // where it is asked inside
	msg    []byte   // the query, of which header and question end at end
	end    int
	limit  int // how long an answer may be
	list   []netip.AddrPort
	inside bool
	tcp    bool
}

// attempt is what came of asking one server.
type attempt struct {
	server netip.AddrPort
	answer []byte
	err    error
}

// run asks the servers in turn, the next when one is silent for a while or fails, and returns the first good answer; a failure that somebody answered with, when there
// is none; nil when nobody answered.
func (e *exchange) run() []byte {
	s, list := e.s, e.list
	deadline := time.Now().Add(answerTime)
	plan := list
	if !e.tcp {
		plan = slices.Concat(list, list) // a datagram may get lost
	}
	results := make(chan attempt, len(plan))
	var conns []*os.File
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	running, next := 0, 0
	ask := func() {
		for next < len(plan) {
			server := plan[next]
			next++
			c, err := e.dial(server)
			if err != nil {
				s.note(server, true)
				continue
			}
			conns = append(conns, c)
			running++
			s.all.Add(1)
			go func() { // ends with its connection, at deadline at the latest
				defer s.all.Done()
				answer, err := e.speak(c, deadline)
				results <- attempt{server, answer, err}
			}()
			return
		}
	}
	var failure []byte
	wait := time.NewTimer(patience)
	defer wait.Stop()
	ask()
	for running > 0 {
		select {
		case <-s.done:
			return failure
		case r := <-results:
			running--
			if r.err == nil {
				s.note(r.server, false)
				if rcode := dnsmessage.RCode(r.answer[3] & rcodeBits); rcode != rcodeServerFailure && rcode != dnsmessage.RCodeRefused && rcode != dnsmessage.RCodeNotImplemented && binary.BigEndian.Uint16(r.answer[4:]) == 1 {
					return r.answer
				}
				if failure == nil {
					failure = r.answer
				}
				if next >= len(list) {
					next = len(plan) // who has failed once is not asked again
				}
			} else {
				s.note(r.server, true)
			}
			ask()
			wait.Reset(patience)
		case <-wait.C:
			if next <= len(list) {
				s.note(plan[next-1], true)
			}
			ask()
			wait.Reset(patience)
		}
	}
	return failure
}

// dial opens a socket to a server, under a port of the kernel's choice. It is connected, so that only that server's packets come.
func (e *exchange) dial(server netip.AddrPort) (c *os.File, err error) {
	if !e.inside {
		return connect(server, e.tcp)
	}
	err = netlink.In(e.netns, func() (err error) {
		c, err = connect(server, e.tcp)
		return err
	})
	return c, err
}

func connect(server netip.AddrPort, tcp bool) (*os.File, error) {
	kind, family := unix.SOCK_DGRAM, unix.AF_INET
	if tcp {
		kind = unix.SOCK_STREAM
	}
	var to unix.Sockaddr
	if a := server.Addr(); a.Is4() {
		to = &unix.SockaddrInet4{Addr: a.As4(), Port: int(server.Port())}
	} else {
		zone, err := zoneIndex(a.Zone())
		if err != nil {
			return nil, err
		}
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16(), Port: int(server.Port()), ZoneId: zone}
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, to); err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	return os.NewFile(uintptr(fd), "dns"), nil
}

func zoneIndex(zone string) (uint32, error) {
	if zone == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n), nil
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, err
	}
	return uint32(i.Index), nil
}

// speak sends the query and waits for its answer.
func (e *exchange) speak(c *os.File, deadline time.Time) ([]byte, error) {
	if err := c.SetDeadline(deadline); err != nil {
		return nil, err
	}
	msg := e.msg
	if e.tcp {
		msg = append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg))), msg...)
	}
	if _, err := c.Write(msg); err != nil {
		return nil, err
	}
	if e.tcp {
		b, err := readMessage(c, 0xffff)
		if err == nil && !answers(b, e.msg[:e.end]) {
			err = errors.New("an answer to something else")
		}
		return b, err
	}
	// One byte more tells of an answer that is longer than allowed, which is cut off for the container.
	b := make([]byte, max(e.limit, 1232)+1)
	for {
		n, err := c.Read(b)
		if err != nil && err != io.EOF { // an empty datagram
			return nil, err
		}
		if answers(b[:n], e.msg[:e.end]) { // else it is somebody's who guesses
			return b[:n], nil
		}
	}
}
