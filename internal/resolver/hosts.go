package resolver

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
)

// HostGateway in an extra host stands for the host's address on the container's network. See ExpandHosts.
const HostGateway = "host-gateway"

// Hosts returns the content of a container's hosts file in Docker's layout: the loopback names, the extra hosts, each
// "name:address" or "name=address", and last the container's own name with each of its addresses. Extra hosts are taken as ExpandHosts returns them; one that it would refuse is left out. lines come behind them as they are.
func Hosts(hostname string, ips []netip.Addr, extra []string, lines ...string) []byte {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\n" +
		"ff02::1\tip6-allnodes\n" +
		"ff02::2\tip6-allrouters\n")
	for _, e := range extra {
		if name, a, err := splitHost(e); err == nil {
			if addr, err := netip.ParseAddr(a); err == nil {
				fmt.Fprintf(&b, "%s\t%s\n", addr, name)
			}
		}
	}
	for _, l := range lines {
		b.WriteString(l)
	}
	for _, ip := range ips {
		if !ip.IsValid() || hostname == "" {
			continue
		}
		// A name with a domain is found by its first part as well.
		short, _, dotted := strings.Cut(hostname, ".")
		fmt.Fprintf(&b, "%s\t%s", ip, hostname)
		if dotted && short != "" {
			b.WriteString(" " + short)
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// ExpandHosts checks the values of --add-host and puts gateway (the network's, or 127.0.0.1 on the host network) in the place
// of host-gateway. Its result is for Hosts.
func ExpandHosts(extra []string, gateway netip.Addr) ([]string, error) {
	var out []string
	for _, e := range extra {
		name, a, err := splitHost(e)
		if err != nil {
			return nil, err
		}
		if a == HostGateway {
			if !gateway.IsValid() {
				return nil, fmt.Errorf("add-host %q: this network has no gateway to stand for %s", e, HostGateway)
			}
			a = gateway.String()
		}
		addr, err := netip.ParseAddr(a)
		if err != nil {
			return nil, fmt.Errorf("invalid IP address in add-host: %q", a)
		}
		out = append(out, name+":"+addr.String())
	}
	return out, nil
}

// CheckName refuses a name that a hosts file or a variable of the environment could not carry as one word.
func CheckName(name string) error {
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '#' || r == '=' || r == '/' }) {
		return fmt.Errorf("%q is no name for a host", name)
	}
	return nil
}

// splitHost parses "name:address", "name=address", the address of IPv6 with or without brackets.
func splitHost(e string) (name, addr string, err error) {
	k := strings.IndexAny(e, ":=")
	if k <= 0 || k == len(e)-1 {
		return "", "", fmt.Errorf("bad format for add-host: %q", e)
	}
	name, addr = e[:k], e[k+1:]
	// A blank would make two names of it, a line break two lines.
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '#' }) {
		return "", "", fmt.Errorf("bad format for add-host: %q", e)
	}
	if strings.HasPrefix(addr, "[") && strings.HasSuffix(addr, "]") {
		addr = addr[1 : len(addr)-1]
	}
	return name, addr, nil
}
