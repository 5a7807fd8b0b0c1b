package monitor

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"conex/internal/container"
	"conex/internal/control"

	"golang.org/x/sys/unix"
)

const (
	// chunk is how much output is moved at once, in bytes; flood is how much when there is more than that.
	chunk = 16 << 10
	flood = 256 << 10
	// pipeSize is the size of a pipe through which more has come than the kernel lets through at once: fewer turns for both sides.
	pipeSize = 1 << 20
	// maxQueue is how much output waits for a slow client, besides what its socket takes, before the container is made to wait.
	maxQueue = 256 << 10
	// sendBuffer is how much a client's socket takes.
	sendBuffer = 1 << 20
)

// client is one attached connection. A goroutine of its own writes to it what its socket doesn't take at once, so that a slow one delays
// neither the log nor the end of the run.
type client struct {
	conn   net.Conn
	raw    syscall.RawConn // nil: conn isn't a socket of the kernel's
	framed bool            // frames, and an end frame; otherwise plain bytes, as Docker's clients expect with a terminal
	end    bool            // wants an end frame
	skip   [3]bool         // streams that it does not want, by frame type

	mu      sync.Mutex
	cond    sync.Cond
	queue   []byte
	spare   []byte // a queue that has been written
	writing bool   // serve writes
	loose   bool   // the process has ended: what is left of its output is finite, and queued without waiting
	closing bool   // close when the queue is empty
	dead    bool   // closed
}

func newClient(conn net.Conn, framed, end bool) *client {
	c := &client{conn: conn, framed: framed, end: end}
	c.cond.L = &c.mu
	if u, ok := conn.(*net.UnixConn); ok {
		// Errors mean a smaller buffer, or a client that is served by the queue alone.
		if c.raw, _ = u.SyscallConn(); c.raw != nil {
			_ = c.raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) })
		}
	}
	return c
}

// serve writes the queue to the connection until the client is finished or gone.
func (c *client) serve() {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		c.dead = true
		c.conn.Close()
		c.cond.Broadcast()
	}()
	for {
		for len(c.queue) == 0 && !c.closing && !c.dead {
			c.cond.Wait()
		}
		if c.dead || len(c.queue) == 0 {
			return
		}
		b := c.queue
		c.queue, c.spare = c.spare[:0], nil
		c.writing = true
		c.cond.Broadcast()
		c.mu.Unlock()
		_, err := c.conn.Write(b)
		c.mu.Lock()
		c.writing, c.spare = false, b
		c.cond.Broadcast()
		if err != nil {
			return
		}
	}
}

// offer sends one chunk, or queues it, if it need not wait for that.
func (c *client) offer(kind byte, p []byte) (done bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead || len(c.queue) > 0 || c.writing {
		return false
	}
	c.pass(kind, p)
	return true
}

// write sends one chunk, or queues it. It blocks while the client is slow; false means that the client is gone.
func (c *client) write(kind byte, p []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Much output is worth waiting for the socket: it isn't copied then.
	most := maxQueue
	if len(p) >= maxQueue/4 {
		most = 0
	}
	for (len(c.queue) > most || most == 0 && c.writing) && !c.dead && !c.loose && !c.skips(kind) {
		c.cond.Wait()
	}
	if c.dead {
		return false
	}
	c.pass(kind, p)
	return true
}

// skips says that the client does not want that stream.
func (c *client) skips(kind byte) bool { return int(kind) < len(c.skip) && c.skip[kind] }

// pass sends what the socket takes and queues the rest.
func (c *client) pass(kind byte, p []byte) {
	if c.skips(kind) {
		return
	}
	var h []byte
	if c.framed {
		head := control.Header(kind, len(p))
		h = head[:]
	}
	n := 0
	if len(c.queue) == 0 && !c.writing && c.raw != nil {
		n = c.send(h, p)
	}
	if n < len(h) {
		c.queue = append(c.queue, h[n:]...)
		n = len(h)
	}
	if rest := p[n-len(h):]; len(rest) > 0 {
		c.queue = append(c.queue, rest...)
	}
	if len(c.queue) > 0 {
		c.cond.Broadcast()
	}
}

// send gives the socket what it takes without waiting, and returns how much that was. Whatever keeps it from taking more, serve will see.
func (c *client) send(h, p []byte) (n int) {
	err := c.raw.Write(func(fd uintptr) bool {
		var err error
		if n, err = unix.SendmsgBuffers(int(fd), [][]byte{h, p}, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil {
			n = 0
		}
		return true
	})
	if err != nil {
		return 0
	}
	return n
}

// loosen lets writes pass without waiting, from the moment that the process has ended.
func (c *client) loosen() {
	c.mu.Lock()
	c.loose = true
	c.cond.Broadcast()
	c.mu.Unlock()
}

// finish queues the end frame (nil: none) and lets the connection close behind it.
func (c *client) finish(e *container.Exit) {
	if e != nil && c.end {
		if b, err := json.Marshal(e); err == nil {
			c.write(control.FrameEnd, b)
		}
	}
	c.mu.Lock()
	c.closing = true
	c.cond.Broadcast()
	c.mu.Unlock()
}

// abandon closes the connection at once.
func (c *client) abandon() {
	c.mu.Lock()
	c.dead = true
	c.cond.Broadcast()
	c.mu.Unlock()
	// A writer that hangs in the connection returns with this.
	c.conn.Close()
}

// streams joins one process's standard streams to a log and any number of clients.
type streams struct {
	// log receives all output; nil for an exec.
	log func(kind byte, p []byte) error
	// calm is called after work that took memory; may be nil.
	calm func()
	// writers counts the goroutines that write to clients.
	writers *sync.WaitGroup

	mu      sync.Mutex
	clients []*client
	stdin   io.WriteCloser // nil: none
	loose   bool
	done    bool
	pumps   sync.WaitGroup
}

// attach adds a client. When the process has ended already it returns false and the client is closed.
func (s *streams) attach(c *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		c.conn.Close()
		return false
	}
	c.loose = s.loose
	s.clients = append(s.clients, c)
	s.writers.Go(c.serve)
	return true
}

func (s *streams) drop(c *client) {
	s.mu.Lock()
	var left []*client
	for _, o := range s.clients {
		if o != c {
			left = append(left, o)
		}
	}
	s.clients = left
	s.mu.Unlock()
	c.abandon()
}

// setStdin gives the streams the process's input.
func (s *streams) setStdin(w io.WriteCloser) {
	s.mu.Lock()
	s.stdin = w
	s.mu.Unlock()
}

// pump copies r to the log and all clients until its end.
func (s *streams) pump(kind byte, r *os.File) {
	s.pumps.Go(func() {
		for f := (flow{}); s.move(kind, r, &f); {
		}
	})
}

// flow is what a stream has been like.
type flow struct {
	// much says that the last read could have got more; wide that the pipe has been made larger.
	much, wide bool
}

// buffers are what moves between two reads: an idle stream holds none.
var (
	buffers = sync.Pool{New: func() any { return new([chunk]byte) }}
	floods  = sync.Pool{New: func() any { return new([flood]byte) }}
)

// move waits until r has something, and passes it on. It returns false at r's end.
func (s *streams) move(kind byte, r *os.File, f *flow) bool {
	rc, err := r.SyscallConn()
	if err != nil { // closed
		return false
	}
	var buf []byte
	var n int
	var rerr error
	var back func()
	err = rc.Read(func(fd uintptr) bool {
		if f.much {
			b := floods.Get().(*[flood]byte)
			buf, back = b[:], func() { floods.Put(b) }
		} else {
			b := buffers.Get().(*[chunk]byte)
			buf, back = b[:], func() { buffers.Put(b) }
		}
		for {
			if n, rerr = unix.Read(int(fd), buf); !errors.Is(rerr, unix.EINTR) {
				break
			}
		}
		if errors.Is(rerr, unix.EAGAIN) {
			back()
			f.much = false
			return false // called again when there is something
		}
		if n == len(buf) && f.much && !f.wide {
			f.wide = true
			// An error means that it is no pipe, or as large as it may be.
			_, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize)
		}
		return true
	})
	if err != nil { // closed meanwhile; the function has not returned true
		return false
	}
	f.much = n >= chunk
	if n > 0 {
		s.emit(kind, buf[:n])
	}
	back()
	if f.much && s.calm != nil {
		s.calm()
	}
	return n > 0 && rerr == nil // EIO is a terminal's way to say that it has ended
}

// emit gives output to the log and to all clients: to those first that need no waiting for, so that they work while it is logged.
func (s *streams) emit(kind byte, p []byte) {
	s.mu.Lock()
	cs := s.clients
	s.mu.Unlock()
	var slow []*client
	for _, c := range cs {
		if !c.offer(kind, p) {
			slow = append(slow, c)
		}
	}
	if s.log != nil {
		if err := s.log(kind, p); err != nil {
			complain("write log", err)
		}
	}
	for _, c := range slow {
		if !c.write(kind, p) {
			s.drop(c)
		}
	}
}

// feed copies a client's input to the process until it ends; once says that the process's input ends with it. Without a use for
// input it still reads, to notice a client that leaves.
func (s *streams) feed(c *client, r io.Reader, input, once bool) {
	go func() { // ends with the connection, which finish or abandon closes
		buf := make([]byte, chunk)
		for {
			n, err := r.Read(buf)
			if n > 0 && input {
				s.mu.Lock()
				w := s.stdin
				s.mu.Unlock()
				if w != nil {
					// An error means that the process closed its input or ended: what comes is read and dropped.
					_, _ = w.Write(buf[:n])
				}
			}
			if err == nil {
				continue
			}
			if input && once {
				s.closeStdin()
			}
			if !errors.Is(err, io.EOF) || hungUp(c.conn) {
				s.drop(c)
			}
			return
		}
	}()
}

func (s *streams) closeStdin() {
	s.mu.Lock()
	w := s.stdin
	s.stdin = nil
	s.mu.Unlock()
	if w != nil {
		w.Close()
	}
}

// loosen is called when the process has ended.
func (s *streams) loosen() {
	s.mu.Lock()
	s.loose = true
	cs := s.clients
	s.mu.Unlock()
	for _, c := range cs {
		c.loosen()
	}
}

// finish ends it: clients get the end frame behind the output and are closed.
func (s *streams) finish(e container.Exit) {
	e.Health = nil // longer than an end frame may be
	s.closeStdin()
	s.mu.Lock()
	s.done = true
	cs := s.clients
	s.clients = nil
	s.mu.Unlock()
	for _, c := range cs {
		c.finish(&e)
	}
}

// hungUp tells a peer that is gone from one that only ended its half.
func hungUp(conn net.Conn) bool {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return false
	}
	rc, err := u.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	if err := rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(p, 0)
		hup = err == nil && p[0].Revents&unix.POLLHUP != 0
	}); err != nil {
		return true
	}
	return hup
}
