package network

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/nftables"

	"conex/internal/portmap"
)

// audit is what Survey finds in the way of the networks.
func (w *world) audit() ([]portmap.Finding, error) {
	s, err := w.m.Survey(w.t.Context())
	return s.Findings, err
}

// TestAudit puts a firewall beside the table, as dockerd or ufw does: it must win, and be named.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	bridgeFilter(t, "0")
	a := w.attach("aaa")
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9400, ContainerPort: 80})
	if found, err := w.audit(); err != nil || len(found) > 0 {
		t.Fatalf("findings on a clean host: %v %v", found, err)
	}
	conn, err := nftables.New()
	check(t, err)
	drop := nftables.ChainPolicyDrop
	filter := conn.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
	conn.AddChain(&nftables.Chain{Name: "FORWARD", Table: filter, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
	check(t, conn.Flush())
	defer func() { conn.DelTable(filter); check(t, conn.Flush()) }()
	if _, err := ask(w.client, "tcp", hostIP4+":9400"); err == nil {
		t.Error("conex let a packet pass that the host's firewall drops")
	}
	found, err := w.audit()
	check(t, err)
	if len(found) != 1 || !strings.Contains(found[0].What, "FORWARD") || !strings.Contains(found[0].Hint, "conex network repair") {
		t.Errorf("findings %+v", found)
	}
}

// TestAuditNative has a chain that somebody wrote with nft in the way: what the audit says to add is enough, and it says nothing where nothing is
// dropped.
func TestAuditNative(t *testing.T) {
	need(t, "nft")
	w := newWorld(t)
	a, b := w.attach("aaa"), w.attach("bbb")
	_, err := w.m.Create(t.Context(), Spec{Name: "other"})
	check(t, err)
	o := &container{ns: newNetNS(t), w: w}
	o.ep, err = w.m.Attach(t.Context(), AttachRequest{ContainerID: "other", NetNS: o.ns, Network: "other"})
	check(t, err)
	a.serve(80)
	(&container{ns: w.client, w: w}).serve(81)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9400, ContainerPort: 80})
	works := func(when string, want bool) {
		t.Helper()
		for _, q := range []struct {
			from *os.File
			to   string
		}{{w.client, hostIP4 + ":9400"}, {w.client, "[" + hostIP6 + "]:9400"}, {a.ns, clientIP4 + ":81"}, {a.ns, "[" + clientIP6 + "]:81"}, {o.ns, clientIP4 + ":81"}} {
			if _, err := ask(q.from, "tcp", q.to); (err == nil) != want {
				t.Errorf("%s: %s: %v", when, q.to, err)
			}
		}
	}
	within := func(when string, want bool) {
		t.Helper()
		for _, to := range []netip.Addr{a.ep.Address.Addr(), a.ep.Address6.Addr()} {
			if _, err := ask(b.ns, "tcp", at(to, 80)); (err == nil) != want {
				t.Errorf("%s: %s, asked on its own network: %v", when, to, err)
			}
		}
	}
	bridgeFilter(t, "0")
	sh(t, "nft 'add table inet firewall { chain forward { type filter hook forward priority 0; policy drop; }; }'")
	defer sh(t, "nft delete table inet firewall")
	works("closed", false)
	within("closed", true)
	found, err := w.audit()
	check(t, err)
	if len(found) != 1 || found[0].What != "the policy of chain forward of the nftables table inet firewall drops what containers begin, and what comes for published ports" {
		t.Fatalf("findings %+v", found)
	}
	sh(t, found[0].Hint)
	works("after what the audit says", true)
	if found, err = w.audit(); err != nil || len(found) > 0 {
		t.Errorf("findings %+v, %v, want none", found, err)
	}
	// One's own rule is one's own decision.
	sh(t, "nft insert rule inet firewall forward iifname "+firstBridge+" drop")
	if found, err = w.audit(); err != nil || len(found) != 1 || !strings.HasPrefix(found[0].What, "rule 1 of chain forward of the nftables table inet firewall drops what containers begin") {
		t.Errorf("findings %+v, %v", found, err)
	}

	if !bridgeFilter(t, "1") {
		return
	}
	sh(t, "nft flush chain inet firewall forward; for d in iifname oifname; do nft add rule inet firewall forward $d "+uplinkName+" accept; done; "+
		"nft add rule inet firewall forward ct state established,related accept")
	works("with br_netfilter", true)
	within("with br_netfilter", false)
	if found, err = w.audit(); err != nil || len(found) != 1 || found[0].What != "the policy of chain forward of the nftables table inet firewall drops what containers of one network send each other (br_netfilter)" {
		t.Fatalf("findings %+v, %v", found, err)
	}
	first, second, _ := strings.Cut(found[0].Hint, ". Or ")
	_, second, _ = strings.Cut(second, "): ")
	sh(t, second)
	within("after what the audit says in second place", true)
	bridgeFilter(t, "1")
	sh(t, first)
	within("after what the audit says", true)
	if found, err = w.audit(); err != nil || len(found) > 0 {
		t.Errorf("findings %+v, %v, want none", found, err)
	}
}

// bridgeFilter switches br_netfilter on or off until the test ends, if the kernel has it.
func bridgeFilter(t *testing.T, value string) bool {
	t.Helper()
	for _, name := range []string{"iptables", "ip6tables"} {
		before := readSysctl("bridge/bridge-nf-call-" + name)
		if before == "" {
			return false
		}
		check(t, writeSysctl("bridge/bridge-nf-call-"+name, value))
		t.Cleanup(func() { check(t, writeSysctl("bridge/bridge-nf-call-"+name, before)) })
	}
	return true
}
