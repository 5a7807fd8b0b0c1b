package portmap

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// Finding is one thing on the host that keeps containers from being reached or from reaching out.
type Finding struct {
	// What is wrong, with the names of table and chain.
	What string `json:"what"`
	// Hint says what the administrator can do.
	Hint string `json:"hint"`
}

// Audited is a bridge that Audit looks at; Six says that its containers have IPv6.
type Audited struct {
	Bridge
	Six bool
}

// Audit looks for what keeps the containers of bridges from reaching out by an uplink, from reaching each other, or what is published from being
// answered: others' forward chains that drop such packets, by their policy or by a rule. What nf_tables has is walked as a packet would; a
// verdict of drop in any chain at a hook is final, so no rule of conex's own table could help. An empty list means that nothing is in the way. It
// changes nothing.
func Audit(ctx context.Context, t Table, bridges []Audited, uplinks []string) ([]Finding, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	rs, err := readRuleset(c, t.Name)
	if err != nil {
		return nil, err
	}
	var all []*blocked
	var names []string
	for _, b := range bridges {
		names = append(names, b.Name)
		look := func(what string, p flow) {
			if f := rs.ask(unix.NF_INET_FORWARD, p); f.verdict != "accept" {
				all = also(all, f, b.Name, what)
			}
		}
		families := []byte{unix.NFPROTO_IPV4}
		if b.Six {
			families = append(families, unix.NFPROTO_IPV6)
		}
		for _, family := range families {
			for _, up := range uplinks {
				if b.Internal {
					break
				}
				look("what containers begin", flow{family: family, proto: unix.IPPROTO_TCP, iif: b.Name, oif: up, ctState: ctStateNew})
				look("what comes for published ports", flow{family: family, proto: unix.IPPROTO_TCP, iif: up, oif: b.Name, ctState: ctStateEstablished, dnat: true})
			}
			if !b.Apart && filtersBridges(family) {
				look(toEachOther, flow{family: family, proto: unix.IPPROTO_TCP, iif: b.Name, oif: b.Name, ctState: ctStateNew})
			}
		}
	}
	var out []Finding
	for _, b := range all {
		hint := b.mend(b.bridges, uplinks)
		if slices.Contains(b.what, toEachOther) {
			hint += ". Or keep such packets out of it, if nothing else on this machine needs br_netfilter (Kubernetes does): " + unfilterBridges
		}
		out = append(out, Finding{What: b.by + " drops " + strings.Join(b.what, ", and "), Hint: hint})
	}
	old, err := LegacyForward(names)
	if err != nil {
		return nil, err
	}
	for _, f := range legacyFamilies {
		command := f.command + "-legacy"
		if len(old[command]) == 0 {
			continue
		}
		var hint []string
		for _, b := range old[command] {
			for _, r := range LegacyRules(b) {
				hint = append(hint, command+" -A "+strings.Join(r, " "))
			}
		}
		out = append(out, Finding{
			What: "chain FORWARD of " + command + "'s filter table drops forwarded packets by default: published ports and the containers' way out need a rule there",
			Hint: strings.Join(hint, "; "),
		})
	}
	return out, nil
}

// blocked is what one rule or policy drops.
type blocked struct {
	fate
	what, bridges []string
}

// also notes what else a rule or policy drops.
func also(all []*blocked, f fate, bridge, what string) []*blocked {
	k := slices.IndexFunc(all, func(b *blocked) bool { return b.by == f.by })
	if k < 0 {
		all, k = append(all, &blocked{fate: f}), len(all)
	}
	if !slices.Contains(all[k].what, what) {
		all[k].what = append(all[k].what, what)
	}
	if !slices.Contains(all[k].bridges, bridge) {
		all[k].bridges = append(all[k].bridges, bridge)
	}
	return all
}

// toEachOther is what br_netfilter brings into the forward chains.
const toEachOther = "what containers of one network send each other (br_netfilter)"

const unfilterBridges = "sysctl net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0"

// filtersBridges reports whether what stays on a bridge passes the forward chains of a family.
func filtersBridges(family byte) bool {
	name := "iptables"
	if family == unix.NFPROTO_IPV6 {
		name = "ip6tables"
	}
	on, ok := sysctl("bridge/bridge-nf-call-" + name)
	return ok && on != 0
}

// mend says what lets the packets of bridges pass.
func (f fate) mend(bridges, uplinks []string) string {
	ch := f.chain
	family := map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}[ch.family]
	list := strings.Join(bridges, ", ")
	switch {
	case ch.table == "firewalld":
		// The zone's forwarding is between its interfaces. What comes by an uplink and is not for a published port ends in our own table.
		return "put " + list + " and the way out into one zone: firewall-cmd --permanent --zone=public --add-interface=" +
			strings.Join(slices.Concat(bridges, uplinks), " --add-interface=") + "; firewall-cmd --reload"
	case !f.policy:
		return "that rule is its owner's decision; conex changes none. To let the containers pass, put a rule for " + list + " before it"
	case ch.table == passTable && ch.name == passChain && ch.family != unix.NFPROTO_INET:
		return "conex network repair, which adds two rules for " + list + " at the chain's end"
	}
	var rules []string
	for _, b := range bridges {
		for _, r := range []string{"iifname " + b, "oifname " + b + " ct state established,related", "oifname " + b + " ct status dnat"} {
			rules = append(rules, fmt.Sprintf("nft add rule %s %s %s %s accept", family, ch.table, ch.name, r))
		}
	}
	return strings.Join(rules, "; ")
}

// sysctl reads a number below /proc/sys/net; false when there is none.
func sysctl(path string) (int, bool) {
	b, err := os.ReadFile("/proc/sys/net/" + path)
	if err != nil {
		return 0, false
	}
	v, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	return v, err == nil
}
