package logs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// setAddress takes Docker's syslog-address: udp, tcp, tcp+tls with a host and perhaps a port, unix or unixgram with a path.
func (s *SyslogOptions) setAddress(addr string) error {
	scheme, rest, ok := strings.Cut(addr, "://")
	switch scheme {
	case "udp", "tcp", "tcp+tls", "unix", "unixgram":
	default:
		ok = false
	}
	if !ok || rest == "" {
		return fmt.Errorf("syslog-address should be in form proto://address, got %s", addr)
	}
	u, err := url.Parse(addr)
	if err != nil {
		return fmt.Errorf("log option syslog-address: %w", err)
	}
	s.Network = scheme
	if scheme == "unix" || scheme == "unixgram" {
		if _, err := os.Stat(u.Path); err != nil {
			return fmt.Errorf("log option syslog-address: %w", err)
		}
		s.Address = u.Path
		return nil
	}
	s.Address = u.Host
	if u.Port() == "" {
		s.Address = net.JoinHostPort(u.Hostname(), "514")
	}
	return nil
}

// tls reads the certificates that the options name.
func (s *SyslogOptions) tls() (*tls.Config, error) {
	c := &tls.Config{InsecureSkipVerify: s.SkipVerify, MinVersion: tls.VersionTLS12}
	if host, _, err := net.SplitHostPort(s.Address); err == nil {
		c.ServerName = host
	}
	if s.CACert != "" {
		pem, err := os.ReadFile(s.CACert)
		if err != nil {
			return nil, fmt.Errorf("log option syslog-tls-ca-cert: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("log option syslog-tls-ca-cert: %s: no certificate in it", s.CACert)
		}
	}
	if (s.Cert == "") != (s.Key == "") {
		return nil, errors.New("log options syslog-tls-cert and syslog-tls-key: one needs the other")
	}
	if s.Cert != "" {
		pair, err := tls.LoadX509KeyPair(s.Cert, s.Key)
		if err != nil {
			return nil, fmt.Errorf("log option syslog-tls-cert: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// ownSyslog are the places of this machine's syslog.
var ownSyslog = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

// syslogSink sends messages to a syslog server.
type syslogSink struct {
	patience
	o        SyslogOptions
	tag      string
	hostname string
	tls      *tls.Config
	conn     net.Conn
	datagram bool
	// buf has messages that aren't sent yet.
	buf   []byte
	count int
}

func openSyslog(o SyslogOptions, tag string) (*syslogSink, error) {
	s := &syslogSink{o: o, tag: tag}
	var err error
	if s.hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	if o.Network == "tcp+tls" {
		if s.tls, err = o.tls(); err != nil {
			return nil, err
		}
	}
	return s, s.dial()
}

func (s *syslogSink) dial() error {
	s.datagram = s.o.Network == "udp" || s.o.Network == "unixgram"
	d := net.Dialer{Timeout: dialTimeout}
	var err error
	switch s.o.Network {
	case "":
		for _, path := range ownSyslog {
			for _, network := range []string{"unixgram", "unix"} {
				if s.conn, err = d.Dial(network, path); err == nil {
					s.datagram = network == "unixgram"
					return nil
				}
			}
		}
		return errors.New("Unix syslog delivery error") //nolint:staticcheck // Docker's words
	case "tcp+tls":
		s.conn, err = tls.DialWithDialer(&d, "tcp", s.o.Address, s.tls)
	default:
		s.conn, err = d.Dial(s.o.Network, s.o.Address)
	}
	if err != nil {
		s.conn = nil
		return fmt.Errorf("syslog: %w", err)
	}
	return nil
}

// render appends a message as the format wants it.
func (s *syslogSink) render(b []byte, m message) []byte {
	severity := 6 // info
	if m.stderr {
		severity = 3 // error
	}
	b = append(b, '<')
	b = strconv.AppendInt(b, int64(s.o.Facility<<3|severity), 10)
	b = append(b, '>')
	now := time.Now()
	switch s.o.Format {
	case "rfc5424", "rfc5424micro":
		layout := time.RFC3339
		if s.o.Format == "rfc5424micro" {
			layout = "2006-01-02T15:04:05.000000Z07:00"
		}
		b = append(b, "1 "...)
		b = now.AppendFormat(b, layout)
		b = append(append(append(b, ' '), s.hostname...), ' ')
		b = append(append(append(b, s.tag...), ' '), pid...)
		b = append(append(append(b, ' '), s.tag...), " - "...)
	case "rfc3164":
		b = now.AppendFormat(b, time.Stamp)
		b = append(append(append(b, ' '), s.hostname...), ' ')
		b = append(append(append(append(b, s.tag...), '['), pid...), "]: "...)
	default:
		b = now.AppendFormat(b, time.Stamp)
		b = append(b, ' ')
		b = append(append(append(append(b, s.tag...), '['), pid...), "]: "...)
	}
	b = append(b, m.line...)
	return append(b, '\n')
}

func (s *syslogSink) send(m message) error {
	if len(m.line) == 0 {
		return nil // as with Docker
	}
	if s.conn == nil {
		if s.over() {
			return nil
		}
		if err := s.dial(); err != nil {
			return s.giveUp(err, 1)
		}
		if note := s.note(); note != "" {
			if err := s.send(message{line: []byte(note), stderr: true, t: m.t}); err != nil {
				return err
			}
		}
	}
	start := len(s.buf)
	s.buf = s.render(s.buf, m)
	if s.o.Network == "tcp+tls" && strings.HasPrefix(s.o.Format, "rfc5424") { // RFC 5425: the length before each message
		text := string(s.buf[start:])
		s.buf = append(append(strconv.AppendInt(s.buf[:start], int64(len(text)), 10), ' '), text...)
	}
	s.count++
	if s.datagram || len(s.buf) > 64<<10 {
		return s.flush()
	}
	return nil
}

// giveUp gives up for now: n messages are lost.
func (s *syslogSink) giveUp(err error, n int) error {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
	s.failed(n)
	return err
}

func (s *syslogSink) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	b, n := s.buf, s.count
	s.buf, s.count = s.buf[:0], 0
	for again := false; ; again = true {
		_, err := s.write(b)
		if err == nil {
			s.pause = 0
			return nil
		}
		// A server that was started anew, or a file that was made anew in its place, is connected to at once.
		if again || isTimeout(err) {
			return s.giveUp(fmt.Errorf("syslog: %w", err), n)
		}
		s.conn.Close()
		if err := s.dial(); err != nil {
			return s.giveUp(err, n)
		}
	}
}

func (s *syslogSink) write(b []byte) (int, error) {
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return 0, err
	}
	return s.conn.Write(b)
}

func (s *syslogSink) close() error {
	if s.conn == nil {
		return nil
	}
	return s.conn.Close()
}
