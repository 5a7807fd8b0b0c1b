package dns

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"
)

// serveTCP accepts connections, no more than maxConns at a time.
func (s *Server) serveTCP() {
	defer s.all.Done()
	for {
		select {
		case s.conns <- struct{}{}:
		case <-s.done:
			return
		}
		c, err := s.tcp.Accept()
		if err != nil {
			<-s.conns
			if s.closed.Load() || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // one that was reset before we had it
		}
		s.mu.Lock()
		if s.open == nil {
			s.open = map[net.Conn]struct{}{}
		}
		s.open[c] = struct{}{}
		s.all.Add(1)
		s.mu.Unlock()
		go func() { // ends when the client is done, or slow, or the server closes
			defer s.all.Done()
			s.connection(c)
			c.Close()
			s.mu.Lock()
			delete(s.open, c)
			s.mu.Unlock()
			<-s.conns
		}()
		if s.closed.Load() {
			c.Close() // Close may have looked before it was noted
		}
	}
}

// connection answers the queries of a connection, one after the other.
func (s *Server) connection(c net.Conn) {
	for {
		if c.SetDeadline(time.Now().Add(s.cfg.Load().idle)) != nil {
			return
		}
		msg, err := readMessage(c, maxQuery)
		if err != nil {
			return
		}
		out := make([]byte, 2, 512)
		q, answer := parse(msg)
		switch {
		case q != nil:
			q.tcp, q.limit = true, 0xffff
			var done bool
			if out, done = s.local(q, out); done {
				break
			}
			select {
			case s.waiting <- struct{}{}:
				out = s.forward(q, out[:2])
				<-s.waiting
			default:
				out = q.failure(out[:2], rcodeServerFailure)
			}
		case answer != nil:
			out = append(out, answer...)
		default:
			return
		}
		binary.BigEndian.PutUint16(out, uint16(len(out)-2))
		if c.SetDeadline(time.Now().Add(s.cfg.Load().idle)) != nil {
			return
		}
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

// readMessage reads a message with its length in front. While there is none it needs no more than two bytes.
func readMessage(r io.Reader, limit int) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > limit {
		return nil, errors.New("message too long")
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}
