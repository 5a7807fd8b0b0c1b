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

// Audit looks for what keeps a bridge's containers from reaching out by an uplink, or what is published from being answered: forwarding that is
// switched off, and others' forward chains that drop such packets, by their policy or by a rule. What nf_tables has is walked as a packet would; a
// verdict of drop in any chain at a hook is final, so no rule of conex's own table could help. An empty list means that nothing is in the way. It
// changes nothing.
func Audit(ctx context.Context, t Table, bridge string, six bool, uplinks []string) ([]Finding, error) {
	var out []Finding
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if on, ok := sysctl("ipv4/ip_forward"); ok && on == 0 {
		out = append(out, Finding{
			What: "net.ipv4.ip_forward is 0: containers reach nothing outside the host, and nothing outside reaches them",
			Hint: "start a container on a bridge network, or run: sysctl net.ipv4.ip_forward=1",
		})
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
	families := []byte{unix.NFPROTO_IPV4}
	if six {
		families = append(families, unix.NFPROTO_IPV6)
	}
	type blocked struct {
		fate
		what []string
	}
	var all []*blocked // one for each that drops
	for _, family := range families {
		for _, up := range uplinks {
			for _, way := range []struct {
				what string
				flow
			}{
				{"what containers begin", flow{family: family, proto: unix.IPPROTO_TCP, iif: bridge, oif: up, ctState: ctStateNew}},
				{"what comes for published ports", flow{family: family, proto: unix.IPPROTO_TCP, iif: up, oif: bridge, ctState: ctStateEstablished, dnat: true}},
			} {
				f := rs.ask(unix.NF_INET_FORWARD, way.flow)
				if f.verdict == "accept" {
					continue
				}
				k := slices.IndexFunc(all, func(b *blocked) bool { return b.by == f.by })
				if k < 0 {
					all, k = append(all, &blocked{fate: f}), len(all)
				}
				if !slices.Contains(all[k].what, way.what) {
					all[k].what = append(all[k].what, way.what)
				}
			}
		}
	}
	for _, b := range all {
		out = append(out, Finding{What: b.by + " drops " + strings.Join(b.what, ", and "), Hint: b.mend(bridge)})
	}
	old, err := LegacyForward([]string{bridge})
	if err != nil {
		return nil, err
	}
	for _, f := range legacyFamilies {
		command := f.command + "-legacy"
		if len(old[command]) == 0 {
			continue
		}
		var hint []string
		for _, r := range LegacyRules(bridge) {
			hint = append(hint, command+" -A "+strings.Join(r, " "))
		}
		out = append(out, Finding{
			What: "chain FORWARD of " + command + "'s filter table drops forwarded packets by default: published ports and the containers' way out need a rule there",
			Hint: strings.Join(hint, "; "),
		})
	}
	return out, nil
}

// mend says what lets the packets of a bridge pass.
func (f fate) mend(bridge string) string {
	ch := f.chain
	family := map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}[ch.family]
	switch {
	case !f.policy:
		return "that rule is its owner's decision; conex changes none. To let the containers pass, put a rule for " + bridge + " before it"
	case ch.table == passTable && ch.name == passChain && ch.family != unix.NFPROTO_INET:
		return "conex network repair, which adds two rules for " + bridge + " at the chain's end"
	}
	add := fmt.Sprintf("nft add rule %s %s %s ", family, ch.table, ch.name)
	return fmt.Sprintf("%siifname %s accept; %soifname %s ct state established,related accept; %soifname %s ct status dnat accept", add, bridge, add, bridge, add, bridge)
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
