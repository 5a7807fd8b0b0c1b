// Package dns owns the name service of a container: it answers at 127.0.0.11 inside the container's network namespace, from its
// monitor, what the containers on the networks around are called, and passes other questions on to the host's name servers.
//
//	container: query to 127.0.0.11:53 ──► lo ──► the program at the look-up of sockets ──► our sockets in the namespace
//	monitor:   one of our names        ──► the answer, at once
//	           any other name          ──► copied, under another number, to the servers of the moment; their answer
//	                                        comes back byte by byte
//
// What comes from the container is hostile. It has bounds in memory and goroutines, and knows of nobody but the container itself. What is
// ours never leaves: container names, names without a dot, reverse zones of our networks.
package dns

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Names are what one container may know of others. Names come in lower case and without the dot at the end. An error is one of reading
// who is there; the container sees a failure of its name server.
type Names interface {
	// Addresses returns who has a name. A name that is known without any address is nobody's at the moment, and not asked for elsewhere.
	Addresses(name string) (addrs []netip.Addr, known bool, err error)
	// Reverse returns who has an address. ours says that it belongs to a network of ours, whether or not anybody has it.
	Reverse(a netip.Addr) (name string, ours bool, err error)
	// Services returns who offers a port, "tcp" or "udp", under a name.
	Services(name, proto string, port uint16) (found []Service, known bool, err error)
	// Outward reports whether the container may speak to the world; else the host's servers are not asked for it.
	Outward() bool
}

// Service is where a port is offered.
type Service struct {
	Name  string
	Port  uint16
	Addrs []netip.Addr
}

// Config says whom a server asks.
type Config struct {
	Names Names
	// NetNS is the container's network namespace. It stays the caller's, who closes it after the server.
	NetNS *os.File
	// Given are the servers that the container's owner has chosen. They are asked from inside NetNS, and nobody else is.
	Given []netip.Addr
	// Host returns the servers that are asked without Given, from the host's network namespace.
	Host func() ([]netip.Addr, error)
	// Domains are other servers for what lies in some domains; of several that hold a name, the longest counts. Without a server, the
	// domain has no names. They are asked from the host's network namespace.
	Domains map[string][]netip.AddrPort

	// Asks, unless nil, says which names may be asked for elsewhere; of others it is told by the call, and they don't exist. Learn,
	// unless nil, gets the addresses of each name, and for how long they hold, before the container has them: without its nil the
	// container's look-up fails.
	Asks  func(name string) bool
	Learn func(name string, addrs []netip.Addr, hold time.Duration) error

	// idle is how long a connection may say nothing, or take to say or read a message; idleTime by default.
	idle time.Duration
}

const (
	// ttl is the time that our answers may be kept, in seconds: a container that is made again has another address.
	ttl = 5
	// maxQuery is the longest query that is read: one question with options.
	maxQuery = 4096
	// maxAsked is how many queries are on their way to other servers at a time, maxWaiting how many wait for that.
	maxAsked, maxWaiting = 256, 1024
	// maxConns is how many connections a container has; others wait in the kernel.
	maxConns = 32
	// idleTime is Config.idle's default.
	idleTime = 10 * time.Second
	// patience is how long a server has before the next is asked as well, answerTime how long they all have: what asks us
	// usually gives up after 5 s.
	patience, answerTime = time.Second, 4500 * time.Millisecond
	// lateTime is how long a server that did not answer is asked after the others.
	lateTime = 20 * time.Second
)

// Server is a running name service. It costs two goroutines that sleep, and no buffers, as long as nobody asks.
type Server struct {
	cfg atomic.Pointer[Config]
	// raw and link are as in Sockets.
	raw, link int
	udp       *os.File
	udpConn   syscall.RawConn
	tcp       net.Listener

	buffers sync.Pool
	waiting chan struct{}
	asked   chan struct{}
	conns   chan struct{}
	// done is closed when the server ends; all counts its goroutines.
	done   chan struct{}
	closed atomic.Bool
	all    sync.WaitGroup

	mu   sync.Mutex
	late map[netip.AddrPort]time.Time
	open map[net.Conn]struct{}
}

// Start makes a server of sockets, which are its own from then on.
func Start(s *Sockets, cfg Config) (_ *Server, err error) {
	srv := &Server{
		raw: s.raw, link: s.link,
		waiting: make(chan struct{}, maxWaiting), asked: make(chan struct{}, maxAsked), conns: make(chan struct{}, maxConns), done: make(chan struct{}),
	}
	srv.Change(cfg)
	srv.buffers.New = func() any { return new(buffers) }
	srv.udp = os.NewFile(uintptr(s.udp), "dns")
	tcp := os.NewFile(uintptr(s.tcp), "dns")
	*s = none
	defer tcp.Close() // the listener is a copy
	if srv.udpConn, err = srv.udp.SyscallConn(); err == nil {
		srv.tcp, err = net.FileListener(tcp)
	}
	if err != nil {
		srv.udp.Close()
		srv.closeRest()
		return nil, err
	}
	srv.all.Add(2)
	go srv.serveUDP()
	go srv.serveTCP()
	return srv, nil
}

// Change says whom the server asks from now on. What is on its way goes on as it was, with the namespace that it was asked from: the caller closes
// none before the server.
func (s *Server) Change(cfg Config) {
	if cfg.idle == 0 {
		cfg.idle = idleTime
	}
	s.cfg.Store(&cfg)
}

// Close ends the service and waits for its goroutines.
func (s *Server) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	close(s.done)
	err := errors.Join(s.udp.Close(), s.tcp.Close())
	s.mu.Lock()
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.all.Wait()
	s.closeRest()
	return err
}

func (s *Server) closeRest() {
	for _, fd := range []int{s.raw, s.link} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// shuffle mixes addresses: those who take the first one share the load.
func shuffle[T any](list []T) {
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}
