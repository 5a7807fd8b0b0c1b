package container

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
)

// Probe is a health check that conex makes itself, inside the container's network: the image needs no curl for it. It is written in
// the place of a health check's command:
//
//	http://[HOST]:PORT[/PATH]  http:PORT[/PATH]   GET; a status of 200 to 399 is healthy
//	tcp://[HOST]:PORT          tcp:PORT           somebody accepts the connection
type Probe struct {
	// HTTP tells the two kinds apart.
	HTTP bool
	// Host is as it was written; an address, or "localhost" also where nothing was.
	Host string
	Port uint16
	// Path begins with "/" and has the query.
	Path string
}

// ParseProbe reads a health check's test (Docker's HealthConfig.Test). Nil without an error means that it is a command, or none.
func ParseProbe(test []string) (*Probe, error) {
	if len(test) != 2 || test[0] != "CMD" && test[0] != "CMD-SHELL" {
		return nil, nil
	}
	line := test[1]
	scheme, rest, ok := strings.Cut(line, ":")
	switch {
	case ok && (scheme == "http" || scheme == "tcp"):
	case ok && scheme == "https" && strings.HasPrefix(rest, "//"):
		return nil, fmt.Errorf("invalid health probe %q: probes speak http and tcp, https needs a command in the image", line)
	default:
		return nil, nil
	}
	bad := func(why string) (*Probe, error) { return nil, fmt.Errorf("invalid health probe %q: %s", line, why) }
	if strings.ContainsFunc(line, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return bad("it takes visible ASCII characters alone; write others as %XX")
	}
	p := &Probe{HTTP: scheme == "http", Host: "localhost"}
	authority, full := strings.CutPrefix(rest, "//")
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		p.Path = authority[i:]
		authority = authority[:i]
	}
	switch {
	case p.Path != "" && !p.HTTP:
		return bad("tcp has no path")
	case strings.Contains(p.Path, "#"):
		return bad("a server never sees what stands behind a #")
	case p.HTTP && !strings.HasPrefix(p.Path, "/"):
		p.Path = "/" + p.Path
	}
	port := authority
	if full {
		host := authority
		host, port = authority, ""
		if i := strings.LastIndexByte(authority, ':'); i >= 0 && !strings.HasSuffix(authority, "]") {
			host, port = authority[:i], authority[i+1:]
		}
		if host != "" {
			p.Host = host
		}
	}
	if port == "" && full && p.HTTP {
		port = "80"
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return bad("it needs a port, as in " + scheme + "://:8080")
	}
	p.Port = uint16(n)
	if _, err := p.Addrs(); err != nil {
		return bad(err.Error())
	}
	return p, nil
}

// Addrs are the addresses to try, in order.
func (p *Probe) Addrs() ([]netip.AddrPort, error) {
	if strings.EqualFold(p.Host, "localhost") {
		return []netip.AddrPort{
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), p.Port), netip.AddrPortFrom(netip.IPv6Loopback(), p.Port),
		}, nil
	}
	host := p.Host
	if h, ok := strings.CutPrefix(host, "["); ok {
		host, ok = strings.CutSuffix(h, "]")
		if !ok {
			return nil, errors.New("its host lacks a ]")
		}
	}
	a, err := netip.ParseAddr(host)
	if err != nil || a.Zone() != "" || a.Is6() && host == p.Host {
		return nil, errors.New("its host is an address, [IPv6] in brackets, or localhost: names of others are not looked up inside the container")
	}
	return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), p.Port)}, nil
}

// String is the probe in its long form.
func (p *Probe) String() string {
	scheme := "tcp"
	if p.HTTP {
		scheme = "http"
	}
	return scheme + "://" + p.Authority() + p.Path
}

// Authority is host and port.
func (p *Probe) Authority() string { return p.Host + ":" + strconv.Itoa(int(p.Port)) }

// Printable is text with what is no visible character replaced, on one line: for words that come out of a container.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
