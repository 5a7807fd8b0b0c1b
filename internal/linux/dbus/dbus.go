// Package dbus is as much of the D-Bus protocol as it takes to ask systemd for something: method calls over a unix socket, their
// answers, and signals.
//
//	client: \0 AUTH EXTERNAL <uid>, BEGIN   server: OK <guid>   then messages both ways
package dbus

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// Conn is a connection. It is used by one goroutine at a time.
type Conn struct {
	c      net.Conn
	r      *bufio.Reader
	serial uint32
	// signals came while an answer was waited for.
	signals []*Message
}

// maxSignals bounds what is kept for Signal; of more the oldest are dropped.
const maxSignals = 1000

// Dial connects to the socket and proves who we are. Everything on the connection must be done by the deadline.
func Dial(path string, deadline time.Time) (*Conn, error) {
	nc, err := net.DialTimeout("unix", path, time.Until(deadline))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, errors.Unwrap(err))
	}
	c := &Conn{c: nc, r: bufio.NewReader(nc)}
	if err := c.handshake(deadline); err != nil {
		nc.Close()
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return c, nil
}

func (c *Conn) handshake(deadline time.Time) error {
	if err := c.c.SetDeadline(deadline); err != nil {
		return err
	}
	uid := hex.EncodeToString([]byte(strconv.Itoa(os.Geteuid())))
	// BEGIN goes along: a message that systemd reads together with it lies unseen until the next one.
	if _, err := io.WriteString(c.c, "\x00AUTH EXTERNAL "+uid+"\r\nBEGIN\r\n"); err != nil {
		return err
	}
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(line), "OK ") {
		return fmt.Errorf("refused: %q", strings.TrimSpace(string(line)))
	}
	return nil
}

// Close ends the connection.
func (c *Conn) Close() error { return c.c.Close() }

// Error is what the other side answered to a call.
type Error struct {
	// Name is the error's, as in "org.freedesktop.DBus.Error.AccessDenied".
	Name string
	// Message is for people.
	Message string
}

func (e *Error) Error() string {
	if e.Message == "" {
		return e.Name
	}
	return e.Message
}

// Call makes a call and returns the body of its answer. An *Error is the other side's.
func (c *Conn) Call(dest, path, iface, member string, body *Body) (*Reader, error) {
	c.serial++
	m := message{kind: kindCall, serial: c.serial, path: path, iface: iface, member: member, dest: dest}
	if body != nil {
		m.signature, m.body = body.signature, body.b
	}
	if _, err := c.c.Write(m.encode()); err != nil {
		return nil, err
	}
	for {
		m, err := readMessage(c.r)
		if err != nil {
			return nil, err
		}
		switch {
		case m.kind == kindSignal:
			if len(c.signals) == maxSignals {
				c.signals = c.signals[1:]
			}
			c.signals = append(c.signals, m.public())
		case m.replyTo != c.serial:
		case m.kind == kindError:
			e := &Error{Name: m.errorName}
			if strings.HasPrefix(m.signature, "s") {
				e.Message = m.reader().String()
			}
			return nil, e
		case m.kind == kindReturn:
			return m.reader(), nil
		}
	}
}

// Signal returns the next signal; those that came during calls are first.
func (c *Conn) Signal() (*Message, error) {
	if len(c.signals) > 0 {
		m := c.signals[0]
		c.signals = c.signals[1:]
		return m, nil
	}
	for {
		m, err := readMessage(c.r)
		if err != nil {
			return nil, err
		}
		if m.kind == kindSignal {
			return m.public(), nil
		}
	}
}

// Message is a signal.
type Message struct {
	Path, Interface, Member string
	Body                    *Reader
}
