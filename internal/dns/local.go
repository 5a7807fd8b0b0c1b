package dns

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// local answers what is ours to answer; false says that somebody else is to be asked. out is what stands in front of the answer.
func (s *Server) local(q *query, out []byte) ([]byte, bool) {
	at := len(out)
	end := func(rcode dnsmessage.RCode) ([]byte, bool) { return q.failure(out[:at], rcode), true }
	switch {
	case q.class != dnsmessage.ClassINET, q.typ == typeAXFR, q.typ == typeIXFR:
		return end(dnsmessage.RCodeRefused)
	case q.name == "":
		return out, false
	}
	found := q.reply(out, dnsmessage.RCodeSuccess)
	if addr, ok := reverseAddr(q.name); ok {
		name, ours, err := s.reverse(addr)
		switch {
		case err != nil:
			return end(rcodeServerFailure)
		case name != "" && q.typ == dnsmessage.TypePTR:
			if data := wireName(name); data != nil {
				found = q.record(found, at, 6, questionName, dnsmessage.TypePTR, data)
			}
		case name == "":
			if _, other := s.cfg.Load().domain(q.name); ours && !other {
				return end(dnsmessage.RCodeNameError)
			}
			return out, false
		}
		return q.options(found, at), true
	}
	if name, proto, port, ok := serviceName(q.name); ok {
		list, known, err := s.cfg.Load().Names.Services(name, proto, port)
		switch {
		case err != nil:
			return end(rcodeServerFailure)
		case known && len(list) == 0:
			return end(dnsmessage.RCodeNameError)
		case known:
			if q.typ == dnsmessage.TypeSRV {
				found = q.services(found, at, list)
			}
			return q.options(found, at), true
		}
	}
	addrs, known, err := s.addresses(q.name)
	switch {
	case err != nil:
		return end(rcodeServerFailure)
	case known && len(addrs) == 0:
		return end(dnsmessage.RCodeNameError)
	case known:
		if learn := s.cfg.Load().Learn; learn != nil && learn(q.name, addrs, ttl*time.Second) != nil {
			return end(rcodeServerFailure)
		}
		shuffle(addrs)
		if q.typ == dnsmessage.TypeA || q.typ == dnsmessage.TypeAAAA {
			found = q.addresses(found, at, 6, questionName, q.typ, addrs)
		}
		return q.options(found, at), true
	}
	if _, other := s.cfg.Load().domain(q.name); !other && stays(q.name, q.typ) {
		return end(dnsmessage.RCodeNameError)
	}
	return out, false
}

// addresses are those of the loopback names, or of ours.
func (s *Server) addresses(name string) ([]netip.Addr, bool, error) {
	if below(name, "localhost") {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, true, nil
	}
	return s.cfg.Load().Names.Addresses(name)
}

func (s *Server) reverse(a netip.Addr) (string, bool, error) {
	switch {
	case a == netip.IPv6Loopback(), a == netip.AddrFrom4([4]byte{127, 0, 0, 1}):
		return "localhost", true, nil
	case a.IsLoopback():
		return "", true, nil
	}
	return s.cfg.Load().Names.Reverse(a)
}

// services adds services and, as far as there is room, their addresses.
func (q *query) services(out []byte, at int, list []Service) []byte {
	shuffle(list)
	for _, e := range list {
		if name := wireName(e.Name); name != nil {
			data := binary.BigEndian.AppendUint16(make([]byte, 4, 6+len(name)), e.Port) // priority and weight: equals
			out = q.record(out, at, 6, questionName, dnsmessage.TypeSRV, append(data, name...))
		}
	}
	for _, e := range list {
		if name := wireName(e.Name); name != nil {
			for _, typ := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
				out = q.addresses(out, at, 10, name, typ, e.Addrs)
			}
		}
	}
	return out
}

// below reports whether a name is domain or lies in it.
func below(name, domain string) bool {
	rest, ok := strings.CutSuffix(name, domain)
	return ok && (rest == "" || rest[len(rest)-1] == '.')
}

// ownDomains have names of ours alone. All of .internal is not ours: clouds have names there.
var ownDomains = []string{"docker.internal", "containers.internal"}

// stays reports whether a name that nobody has is not asked for elsewhere. A name without a dot could be a container's that does not run now; only what concerns a
// top level domain itself, which a resolver in the container needs to verify signatures, goes out.
func stays(name string, typ dnsmessage.Type) bool {
	if slices.ContainsFunc(ownDomains, func(d string) bool { return below(name, d) }) {
		return true
	}
	if base, _, _, ok := serviceName(name); ok {
		name = base
	}
	if strings.Contains(name, ".") {
		return false
	}
	switch typ {
	case dnsmessage.TypeNS, dnsmessage.TypeSOA, typeDS, typeDNSKEY, typeRRSIG, typeNSEC, typeNSEC3PARAM:
		return false
	}
	return true
}

// serviceName takes a name of the form _PORT._PROTO.NAME apart, where PORT is a number or one of the few names that are read here.
func serviceName(s string) (name, proto string, port uint16, ok bool) {
	service, rest, _ := strings.Cut(s, ".")
	proto, name, _ = strings.Cut(rest, ".")
	if len(service) < 2 || service[0] != '_' || name == "" || proto != "_tcp" && proto != "_udp" && proto != "_sctp" {
		return "", "", 0, false
	}
	if n, err := strconv.ParseUint(service[1:], 10, 16); err == nil {
		port = uint16(n)
	} else {
		port = wellKnown(service[1:])
	}
	return name, proto[1:], port, true
}

// wellKnown are ports by the names that SRV records know them by; 0 for others, which nobody offers.
func wellKnown(service string) uint16 {
	switch service {
	case "ftp":
		return 21
	case "ssh":
		return 22
	case "smtp":
		return 25
	case "domain", "dns":
		return 53
	case "http":
		return 80
	case "kerberos":
		return 88
	case "imap":
		return 143
	case "ldap":
		return 389
	case "https":
		return 443
	case "submission":
		return 587
	case "mqtt":
		return 1883
	case "etcd-client":
		return 2379
	case "mysql":
		return 3306
	case "postgresql", "postgres":
		return 5432
	case "amqp":
		return 5672
	case "redis":
		return 6379
	case "http-alt":
		return 8080
	case "mongodb":
		return 27017
	}
	return 0
}

// reverseAddr is the address that a name of a reverse zone stands for.
func reverseAddr(name string) (netip.Addr, bool) {
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(s, ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(s) != 63 {
		return netip.Addr{}, false
	}
	var a [16]byte
	for k := range 32 {
		if k > 0 && s[2*k-1] != '.' {
			return netip.Addr{}, false
		}
		n, err := strconv.ParseUint(s[2*k:2*k+1], 16, 4)
		if err != nil {
			return netip.Addr{}, false
		}
		a[15-k/2] |= byte(n) << (4 * (k % 2))
	}
	return netip.AddrFrom16(a), true
}
