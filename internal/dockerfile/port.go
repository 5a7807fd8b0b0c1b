package dockerfile

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// maxPorts bounds what one EXPOSE declares: every port of every protocol.
const maxPorts = 3 * 65536

// port is a word of EXPOSE: port[-last][/protocol]. What `run -p` takes before it, [ip:][port[-last]:], may stand there as in Docker and
// means nothing.
type port struct {
	first, last int
	proto       string
	// upper says that the protocol is not in lower case, host that an address or a host's port stands before.
	upper, host bool
}

// parsePort reads a word of EXPOSE.
func parsePort(word string) (p port, err error) {
	parts := strings.Split(word, ":")
	nums, proto, _ := strings.Cut(parts[len(parts)-1], "/")
	if nums == "" {
		return p, fmt.Errorf("invalid port: %q: no port specified", word)
	}
	switch p.proto = strings.ToLower(proto); p.proto {
	case "":
		p.proto = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return p, fmt.Errorf("invalid port: %q: invalid proto: %s", word, proto)
	}
	p.upper = proto != strings.ToLower(proto)
	if n := len(parts); n > 1 {
		ip, host := strings.Join(parts[:n-2], ":"), parts[n-2]
		p.host = ip != "" || host != ""
		if ip != "" {
			if _, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")); err != nil {
				return p, fmt.Errorf("invalid IP address: %s", ip)
			}
		}
		if host != "" {
			first, last, ok := portRange(host)
			if !ok {
				return p, fmt.Errorf("invalid hostPort: %s", host)
			}
			defer func() {
				if err == nil && p.last != p.first && p.last-p.first != last-first {
					err = fmt.Errorf("invalid ranges specified for container and host Ports: %s and %s", nums, host)
				}
			}()
		}
	}
	var ok bool
	if p.first, p.last, ok = portRange(nums); !ok {
		return p, fmt.Errorf("invalid containerPort: %s", nums)
	}
	return p, nil
}

// portRange reads port or first-last.
func portRange(s string) (first, last int, ok bool) {
	a, b, isRange := strings.Cut(s, "-")
	if !isRange {
		b = a
	}
	lo, err1 := strconv.ParseUint(a, 10, 16)
	hi, err2 := strconv.ParseUint(b, 10, 16)
	return int(lo), int(hi), err1 == nil && err2 == nil && hi >= lo
}
