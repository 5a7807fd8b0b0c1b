package logs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
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
