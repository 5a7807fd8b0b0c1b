package portmap

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// Reach says what a published port is to somebody.
type Reach struct {
	// Container is whose port it is, Port what it is inside ("80/tcp"), Published where it is on the host ("0.0.0.0:8080").
	Container string `json:"container"`
	Port      string `json:"port"`
	Published string `json:"published"`
	// From is who asks: "eth0" for whoever is behind that interface, "host", "same network", "network NAME". Family is 4 or 6.
	From   string `json:"from"`
	Family int    `json:"family"`
	// Reached is yes, no, or maybe: then a rule of Why decides by what is not known here, such as an address.
	Reached string `json:"reached"`
	// Source is who the container sees: client, host or gateway; empty when it is not reached.
	Source string `json:"source,omitempty"`
	// Way is what brings the packet in: nftables or forwarder.
	Way string `json:"way,omitempty"`
	// Why names the rule, chain or policy that decides.
	Why string `json:"why"`
}

// Surroundings are what Reaches must know of the host.
type Surroundings struct {
	// Uplinks are the interfaces that lead out, Networks the bridges of conex's networks by their names.
	Uplinks  []string
	Networks map[string]string
}

// Reaches says for each published port of a container from where it can be reached, and why. It reads others' nf_tables and changes nothing.
func Reaches(ctx context.Context, t Table, name string, ms []Mapping, s Surroundings) ([]Reach, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	rs, err := readRuleset(c, t.Name)
	if err != nil {
		return nil, err
	}
	old, err := legacyInput()
	if err != nil {
		return nil, err
	}
	a := audit{t: t, rs: rs, s: s, legacy: old}
	var out []Reach
	for _, m := range ms {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, r := range a.port(m) {
			r.Container, r.Port, r.Published = name, fmt.Sprintf("%d/%s", m.ContainerPort, m.Proto), m.hostAddr()
			out = append(out, r)
		}
	}
	return out, nil
}

type audit struct {
	t      Table
	rs     *ruleset
	s      Surroundings
	legacy string // what iptables-legacy says of the host's input, in words; empty when nothing
}

// port looks at one published port from everywhere.
func (a *audit) port(m Mapping) []Reach {
	var out []Reach
	host := m.HostIP.Unmap()
	for _, f := range []struct {
		n    int
		fam  byte
		fits bool
		to   netip.Addr
	}{
		{4, unix.NFPROTO_IPV4, !host.IsValid() || host.Is4(), m.IPv4},
		{6, unix.NFPROTO_IPV6, !host.IsValid() || host.Is6(), m.IPv6},
	} {
		if !f.fits {
			continue
		}
		add := func(r Reach, from string) {
			r.From, r.Family = from, f.n
			out = append(out, r)
		}
		if host.IsLoopback() {
			add(Reach{Reached: "no", Why: "it is published on the host's loopback alone"}, "outside")
			add(forwarded("yes", "the host's loopback"), "host")
			continue
		}
		for _, up := range a.s.Uplinks {
			add(a.outside(m, f.fam, f.to, up), up)
		}
		r := Reach{Reached: "yes", Source: "host", Way: "nftables", Why: "translated at output; 127.0.0.1 and ::1 by the forwarder, as gateway"}
		if !f.to.IsValid() {
			r = forwarded("yes", fmt.Sprintf("the container has no IPv%d", f.n))
		}
		add(r, "host")
		r = forwarded("yes", "a connection inside one bridge can't be translated, so the forwarder makes it")
		add(a.input(r, m, f.fam, m.Bridge), "same network")
		for _, name := range slices.Sorted(maps.Keys(a.s.Networks)) {
			if bridge := a.s.Networks[name]; bridge != m.Bridge {
				add(a.outside(m, f.fam, f.to, bridge), "network "+name)
			}
		}
	}
	return out
}

func forwarded(reached, why string) Reach {
	return Reach{Reached: reached, Source: "gateway", Way: "forwarder", Why: why}
}

// outside looks from behind an interface.
func (a *audit) outside(m Mapping, family byte, to netip.Addr, iif string) Reach {
	r := Reach{Reached: "yes", Source: "client", Way: "nftables", Why: "nothing closes the port for the host"}
	if !to.IsValid() {
		r = forwarded("yes", "the container has no address of this family")
	}
	if !a.t.Docker || !to.IsValid() {
		if r = a.input(r, m, family, iif); r.Reached == "no" || !to.IsValid() {
			return r
		}
	} else {
		r.Why = "translated before the host's input chains (publish-policy docker)"
	}
	// The first packet of the policy host leaves from output; what comes after it is forwarded, under both.
	state := uint32(ctStateEstablished)
	if a.t.Docker {
		state = ctStateNew
	}
	f := a.rs.ask(unix.NF_INET_FORWARD, flow{family: family, proto: protoNumber(m.Proto), port: m.ContainerPort, iif: iif, oif: m.Bridge, ctState: state, dnat: true})
	return r.bent(f, "forwarded packets: ")
}

// input looks at what filters the host's input.
func (a *audit) input(r Reach, m Mapping, family byte, iif string) Reach {
	f := a.rs.ask(unix.NF_INET_LOCAL_IN, flow{family: family, proto: protoNumber(m.Proto), port: m.HostPort, iif: iif, ctState: ctStateNew, local: true})
	r = r.bent(f, "")
	if family == unix.NFPROTO_IPV4 && a.legacy != "" && r.Reached == "yes" {
		r.Reached, r.Why = "maybe", a.legacy
	}
	return r
}

// bent is what a fate makes of a reach.
func (r Reach) bent(f fate, of string) Reach {
	switch {
	case f.verdict != "accept":
		return Reach{Reached: "no", Why: of + f.verdict + " by " + f.by}
	case len(f.perhaps) > 0:
		var against []string
		for _, p := range f.perhaps {
			if !strings.HasSuffix(p, "(accept)") {
				against = append(against, p)
			}
		}
		if len(against) > 0 {
			r.Reached, r.Why = "maybe", of+"for some: "+strings.Join(against, ", ")
		}
	}
	return r
}
