// Package egress owns the filter of what a container may reach (--egress): the list that a user writes, and an nftables table for
// each of the container's interfaces, in the host's network namespace.
//
// The table hangs on the host's end of the container's veth, where every packet of the container passes before it is bridged, routed or
// given to the host itself; so one place holds for the network's other containers, other networks, the host and the world, whatever
// other tools do to bridges and forwarding. It tracks by itself who has spoken to the container, since the kernel's connection tracking
// comes later:
//
//	container ─► veth ─► chain out: its own addresses? an answer? listed? else drop
//	container ◄─ veth ◄─ chain in:  who begins to talk to it may be answered
//
// The table belongs to the monitor's socket: no other process changes or flushes it as long as the monitor lives (Linux 6.9).
package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Entry is one thing that a container may reach.
type Entry struct {
	// Name is a host's or container's name, or *.example.com for all below it; empty with a prefix.
	Name string
	// Prefix is a network or an address.
	Prefix netip.Prefix
	// Port is 0 for all ports and protocols; Proto is tcp, udp or sctp with a port.
	Port  uint16
	Proto string
}

// List is what a container may reach. An empty one is nothing.
type List []Entry

// maxEntries bounds a list: addresses and ranges are looked through one by one.
const maxEntries = 256

// Deny is the value that allows nothing, Any the one that bounds nothing, which is a container's without --egress.
const (
	Deny = "deny"
	Any  = "any"
)

// Normal checks the values of --egress and returns them as they are kept: none for Any.
func Normal(values []string) ([]string, error) {
	if slices.Contains(values, Any) {
		if slices.ContainsFunc(values, func(v string) bool { return v != Any }) {
			return nil, fmt.Errorf("egress: %s excludes other values", Any)
		}
		return nil, nil
	}
	if len(values) == 0 {
		return nil, nil
	}
	_, err := Parse(values)
	return values, err
}

// Matches reports whether a container with these values is one that a word describes: deny, any, allow, or an entry of its list.
func Matches(values []string, word string) bool {
	switch l, err := Parse(values); {
	case len(values) == 0 || err != nil:
		return word == Any && err == nil
	case len(l) == 0:
		return word == Deny
	default:
		e, err := parseEntry(word)
		return word == "allow" || err == nil && slices.Contains(l, e)
	}
}

// Parse reads the values of --egress: "deny", or "allow=ENTRY,ENTRY...", several of which add up. An entry is NAME, *.NAME, ADDRESS or
// CIDR, with :PORT or :PORT/PROTO behind it; IPv6 addresses with a port stand in brackets.
func Parse(values []string) (List, error) {
	l := List{}
	denied := false
	for _, v := range values {
		if v == Deny {
			denied = true
			continue
		}
		rest, ok := strings.CutPrefix(v, "allow=")
		if !ok {
			return nil, fmt.Errorf("egress %q: want deny, any, or allow=HOST[:PORT[/PROTO]],CIDR[:PORT[/PROTO]]", v)
		}
		for s := range strings.SplitSeq(rest, ",") {
			e, err := parseEntry(s)
			if err != nil {
				return nil, err
			}
			if !slices.Contains(l, e) {
				l = append(l, e)
			}
		}
	}
	switch {
	case denied && len(l) > 0:
		return nil, fmt.Errorf("egress: deny and allow= exclude each other: allow= alone denies all that it does not list")
	case len(l) > maxEntries:
		return nil, fmt.Errorf("egress: %d entries, at most %d", len(l), maxEntries)
	}
	return l, nil
}

func parseEntry(s string) (Entry, error) {
	bad := func(why string) (Entry, error) { return Entry{}, fmt.Errorf("egress: %q: %s", s, why) }
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return Entry{Prefix: whole(a)}, nil
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return prefixed(s, p)
	}
	host, rest := s, ""
	bracket := strings.HasPrefix(s, "[")
	if bracket {
		inside, after, ok := strings.Cut(s[1:], "]")
		if !ok {
			return bad("a bracket is open")
		}
		host, rest = inside, after
	} else if i := strings.IndexAny(s, "/:"); i >= 0 {
		host, rest = s[:i], s[i:]
	}
	a, err := netip.ParseAddr(host)
	isAddr := err == nil && a.Zone() == ""
	if bracket && (!isAddr || a.Is4()) {
		return bad("in brackets stands an IPv6 address")
	}
	var e Entry
	if isAddr {
		e.Prefix = whole(a)
		if bits, ok := strings.CutPrefix(rest, "/"); ok {
			b, port, more := strings.Cut(bits, ":")
			p, err := netip.ParsePrefix(host + "/" + b)
			if err != nil {
				return bad("not a CIDR")
			}
			if e, err = prefixed(s, p); err != nil {
				return e, err
			}
			rest = ""
			if more {
				rest = ":" + port
			}
		}
	} else {
		e.Name = strings.ToLower(strings.TrimSuffix(host, "."))
		if !isName(strings.TrimPrefix(e.Name, "*.")) {
			return bad("neither a name nor an address")
		}
	}
	if rest == "" {
		return e, nil
	}
	port, ok := strings.CutPrefix(rest, ":")
	if !ok {
		return bad("a port begins with a colon, as in example.com:443/tcp")
	}
	port, proto, ok := strings.Cut(port, "/")
	if !ok {
		proto = "tcp"
	}
	if protocols[proto] == 0 {
		return bad("the protocol is tcp, udp or sctp")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return bad("the port is none of 1 to 65535")
	}
	e.Port, e.Proto = uint16(n), proto
	return e, nil
}

func prefixed(s string, p netip.Prefix) (Entry, error) {
	if p.Addr().Is4In6() {
		return Entry{}, fmt.Errorf("egress: %q: write an IPv4 network as such", s)
	}
	return Entry{Prefix: p.Masked()}, nil
}

func whole(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}

// isName reports whether s is a name as hosts and containers have them.
func isName(s string) bool {
	if s == "" || len(s) > 253 || strings.Trim(s, "0123456789.") == "" {
		return false // digits and dots are an address that was mistyped
	}
	for part := range strings.SplitSeq(s, ".") {
		if part == "" || len(part) > 63 || strings.ContainsFunc(part, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) {
			return false
		}
	}
	return true
}

// String is the entry as a user writes it.
func (e Entry) String() string {
	s := e.Name
	if s == "" {
		s = e.Prefix.String()
		if e.Prefix.IsSingleIP() {
			s = e.Prefix.Addr().String()
		}
		if e.Port != 0 && e.Prefix.Addr().Is6() {
			a, bits, ok := strings.Cut(s, "/")
			if s = "[" + a + "]"; ok {
				s += "/" + bits
			}
		}
	}
	if e.Port != 0 {
		s += ":" + strconv.Itoa(int(e.Port)) + "/" + e.Proto
	}
	return s
}

// covers reports whether the entry names a host; names come in lower case without a dot at the end.
func (e Entry) covers(name string) bool {
	if below, ok := strings.CutPrefix(e.Name, "*"); ok {
		return len(name) > len(below) && strings.HasSuffix(name, below)
	}
	return e.Name != "" && e.Name == name
}

// Names reports whether a name is listed: only such names are looked up outside, since a question is a message too.
func (l List) Names(name string) bool {
	return slices.ContainsFunc(l, func(e Entry) bool { return e.covers(name) })
}

// Fixed are the names of the list that are no patterns.
func (l List) Fixed() []string {
	var out []string
	for _, e := range l {
		if e.Name != "" && !strings.HasPrefix(e.Name, "*") && !slices.Contains(out, e.Name) {
			out = append(out, e.Name)
		}
	}
	return out
}
