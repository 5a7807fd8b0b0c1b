package portmap

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/google/nftables"
)

// Finding is one thing on the host that keeps containers from being reached or from reaching out.
type Finding struct {
	// What is wrong, with the names of table and chain.
	What string `json:"what"`
	// Hint says what the administrator can do.
	Hint string `json:"hint"`
}

// Audit looks for what conex will not change: another table's forward chain that drops by default (dockerd and ufw set that),
// and forwarding that is switched off. An empty list means that nothing is in the
// way of the bridge. It changes nothing.
func Audit(ctx context.Context, t Table, bridge string) ([]Finding, error) {
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
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	for _, c := range chains {
		v4 := c.Table.Family == nftables.TableFamilyIPv4 || c.Table.Family == nftables.TableFamilyINet
		if !v4 || c.Table.Name == t.Name || c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward ||
			c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		f := Finding{
			What: fmt.Sprintf("chain %s of the nftables table %s drops forwarded packets by default: published ports and the containers' way out need a rule there", c.Name, c.Table.Name),
			Hint: fmt.Sprintf("let packets from and to %s pass in that chain", bridge),
		}
		switch {
		case hasChain(chains, c.Table, "DOCKER-USER"):
			f.Hint = fmt.Sprintf("iptables -I DOCKER-USER -i %s -j ACCEPT; iptables -I DOCKER-USER -o %s -j ACCEPT", bridge, bridge)
		case hasChain(chains, c.Table, "ufw-user-forward"):
			f.Hint = fmt.Sprintf("ufw route allow in on %s; ufw route allow out on %s", bridge, bridge)
		case hasChain(chains, c.Table, c.Name) && c.Name == "FORWARD":
			f.Hint = fmt.Sprintf("iptables -I FORWARD -i %s -j ACCEPT; iptables -I FORWARD -o %s -j ACCEPT", bridge, bridge)
		}
		out = append(out, f)
	}
	old, err := legacyForwardDrops()
	if err != nil {
		return nil, err
	}
	if old {
		out = append(out, Finding{
			What: "chain FORWARD of iptables-legacy's filter table drops forwarded packets by default: published ports and the containers' way out need a rule there",
			Hint: fmt.Sprintf("iptables-legacy -I FORWARD -i %s -j ACCEPT; iptables-legacy -I FORWARD -o %s -j ACCEPT", bridge, bridge),
		})
	}
	return out, nil
}

func hasChain(chains []*nftables.Chain, t *nftables.Table, name string) bool {
	for _, c := range chains {
		if c.Name == name && c.Table.Name == t.Name && c.Table.Family == t.Family {
			return true
		}
	}
	return false
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
