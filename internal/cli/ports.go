package cli

import (
	"encoding/csv"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"
)

// parsePublish reads the values of -p: [[ip:]host:]container[/proto], each port one number or a range first-last, an IPv6
// address in brackets, and the long form target=80,published=8080,protocol=tcp. It adds the container's ports to exposed and
// the bindings to bound.
func parsePublish(specs []string, exposed network.PortSet, bound network.PortMap) error {
	for _, s := range specs {
		if strings.Contains(s, "=") {
			var err error
			if s, err = longPublish(s); err != nil {
				return err
			}
		}
		if err := parsePort(s, exposed, bound); err != nil {
			return err
		}
	}
	return nil
}

func parsePort(spec string, exposed network.PortSet, bound network.PortMap) error {
	ip, host, ctr := splitPort(spec)
	ctr, proto, hasProto := strings.Cut(ctr, "/")
	if ctr == "" {
		return fmt.Errorf("no port specified: %s<empty>", spec)
	}
	if hasProto && proto == "" {
		return fmt.Errorf("invalid proto: %s", spec)
	}
	p, err := protocol(proto)
	if err != nil {
		return err
	}
	var addr netip.Addr
	if ip != "" {
		if addr, err = netip.ParseAddr(strings.Trim(ip, "[]")); err != nil || strings.HasPrefix(ip, "[") && !addr.Is6() {
			return fmt.Errorf("invalid IP address: %s", ip)
		}
	}
	first, last, err := portRange(ctr)
	if err != nil || first == 0 {
		return fmt.Errorf("invalid containerPort: %s", ctr)
	}
	var hostFirst, hostLast uint16
	if host != "" {
		if hostFirst, hostLast, err = portRange(host); err != nil {
			return fmt.Errorf("invalid hostPort: %s", host)
		}
		// One port in the container and a range on the host means: any free one of the range.
		if last-first != hostLast-hostFirst && last != first {
			return fmt.Errorf("invalid ranges specified for container and host Ports: %s and %s", ctr, host)
		}
	}
	for i := 0; i <= int(last-first); i++ {
		port, _ := network.PortFrom(first+uint16(i), p) //nolint:errcheck // false only without a protocol
		b := network.PortBinding{HostIP: addr}
		switch {
		case host == "":
		case last == first && hostLast != hostFirst:
			b.HostPort = host
		default:
			b.HostPort = strconv.Itoa(int(hostFirst) + i)
		}
		exposed[port] = struct{}{}
		if !slices.Contains(bound[port], b) {
			bound[port] = append(bound[port], b)
		}
	}
	return nil
}

// splitPort cuts at the colons from the right, since an address may contain some.
func splitPort(s string) (ip, host, ctr string) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", s
	}
	ctr, s = s[i+1:], s[:i]
	i = strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", s, ctr
	}
	return s[:i], s[i+1:], ctr
}

func portRange(s string) (first, last uint16, err error) {
	a, b, ranged := strings.Cut(s, "-")
	if !ranged {
		b = a
	}
	x, err := strconv.ParseUint(a, 10, 16)
	if err != nil {
		return 0, 0, err
	}
	y, err := strconv.ParseUint(b, 10, 16)
	if err != nil {
		return 0, 0, err
	}
	if y < x {
		return 0, 0, fmt.Errorf("invalid range %s", s)
	}
	return uint16(x), uint16(y), nil
}

func protocol(s string) (network.IPProtocol, error) {
	switch p := network.IPProtocol(strings.ToLower(s)); p {
	case "":
		return network.TCP, nil
	case network.TCP, network.UDP, network.SCTP:
		return p, nil
	}
	return "", fmt.Errorf("invalid proto: %s", s)
}

// longPublish turns the long form into the short one.
func longPublish(s string) (string, error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return "", fmt.Errorf("invalid publish %q: %w", s, err)
	}
	var target, published, proto string
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok || v == "" {
			return "", fmt.Errorf("invalid field: %s", f)
		}
		switch strings.ToLower(k) {
		case "target":
			target = v
		case "published":
			published = v
		case "protocol":
			proto = v
		case "mode":
			if v != "host" && v != "ingress" {
				return "", fmt.Errorf("invalid publish mode value (%s): must be either ingress or host", v)
			}
		default:
			return "", fmt.Errorf("invalid field key: %s", k)
		}
	}
	if target == "" {
		return "", errors.New("missing mandatory field: target")
	}
	if proto == "" {
		proto = "tcp"
	}
	return published + ":" + target + "/" + proto, nil
}

// parseExpose reads --expose: a port or a range, with or without protocol.
func parseExpose(specs []string, exposed network.PortSet) error {
	for _, s := range specs {
		if strings.Contains(s, ":") {
			return fmt.Errorf("invalid port format for --expose: %s", s)
		}
		if err := parsePort(s, exposed, network.PortMap{}); err != nil {
			return fmt.Errorf("invalid range format for --expose: %s, error: %w", s, err)
		}
	}
	return nil
}
