package portmap

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// dockerd, ufw and many an administrator set the policy of iptables' FORWARD chain to DROP: what nobody speaks for does not pass. A
// packet needs every chain's consent, so our own chain's accept is not enough there. Every engine speaks for its bridges in that chain;
// conex does it with two rules a bridge, and no more than these can say:
//
//	-A FORWARD -i conex0 -j ACCEPT
//	-A FORWARD -o conex0 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
//
// They stand at the chain's end. So they come after every rule that somebody wrote, and overrule nothing but the policy: what a rule
// drops stays dropped, in DOCKER-USER, in ufw's chains, or before us in FORWARD. They are written as iptables writes them, so that
// iptables, ufw and dockerd still can read the table. Whatever else keeps packets from passing is for Audit to explain.

// passing is a FORWARD chain that drops by default.
type passing struct {
	family nftables.TableFamily
	rules  []foreignRule
}

// passChain and passTable name iptables' chain in its nf_tables form.
const (
	passTable = "filter"
	passChain = "FORWARD"
)

// dropping lists iptables' FORWARD chains (nf_tables, IPv4 and IPv6) that drop by default, and with all those that don't, too.
func dropping(c *netlink.Conn, all bool) ([]passing, error) {
	chains, err := foreignChains(c)
	if err != nil {
		return nil, err
	}
	var out []passing
	for _, ch := range chains {
		if ch.table != passTable || ch.name != passChain || !ch.hooked || ch.hook != unix.NF_INET_FORWARD || !ch.drops && !all ||
			ch.family != unix.NFPROTO_IPV4 && ch.family != unix.NFPROTO_IPV6 {
			continue
		}
		rules, err := foreignRules(c, ch.family, passTable, passChain)
		if err != nil {
			return nil, err
		}
		out = append(out, passing{nftables.TableFamily(ch.family), rules})
	}
	return out, nil
}

// Drops reports whether iptables' FORWARD chain drops by default, so that Pass has something to do. One round trip.
func Drops(t Table) (bool, error) {
	c, err := t.dial()
	if err != nil {
		return false, err
	}
	defer c.Close()
	p, err := dropping(c, false)
	return len(p) > 0, err
}

// Pass speaks for bridges in iptables' FORWARD chains that drop by default, and reports for which it had to. Callers hold the table's
// lock.
func Pass(bridges []string) (changed []string, err error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	ps, err := dropping(c, false)
	if err != nil || len(ps) == 0 {
		return nil, err
	}
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	for _, p := range ps {
		for _, b := range bridges {
			in, out := p.find(b)
			if len(in) > 0 && len(out) > 0 {
				continue
			}
			if !slices.Contains(changed, b) {
				changed = append(changed, b)
			}
			table := &nftables.Table{Name: passTable, Family: p.family}
			chain := &nftables.Chain{Name: passChain, Table: table}
			if len(in) == 0 {
				conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: slices.Concat(iptablesIface(expr.MetaKeyIIFNAME, b), iptablesAccept())})
			}
			if len(out) == 0 {
				conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: slices.Concat(iptablesIface(expr.MetaKeyOIFNAME, b), iptablesState(), iptablesAccept())})
			}
		}
	}
	if len(changed) == 0 {
		return nil, nil
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("let packets of %v pass iptables' FORWARD chain: %w", changed, err)
	}
	return changed, nil
}

// Unpass takes back what Pass did for a bridge, wherever the policy stands by now. Idempotent.
func Unpass(bridge string) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	ps, err := dropping(c, true)
	if err != nil {
		return err
	}
	for _, p := range ps {
		in, out := p.find(bridge)
		for _, r := range slices.Concat(in, out) {
			a := netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, passTable).String(unix.NFTA_RULE_CHAIN, passChain).
				Bytes(unix.NFTA_RULE_HANDLE, be64(r.handle))
			err := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, foreignMessage(unix.NFT_MSG_DELRULE, byte(p.family), a))
			if err != nil && !gone(err) {
				return fmt.Errorf("remove the rules of %s from iptables' FORWARD chain: %w", bridge, err)
			}
		}
	}
	return nil
}

// find returns the rules that are as Pass writes them for a bridge.
func (p passing) find(bridge string) (in, out []foreignRule) {
	for _, r := range p.rules {
		var names []string
		for _, e := range r.exprs {
			if e.name != "counter" {
				names = append(names, e.name)
			}
		}
		n := len(r.exprs)
		if n < 3 || len(names) < 3 || names[0] != "meta" || names[1] != "cmp" {
			continue
		}
		code, _, ok := r.exprs[n-1].verdict()
		key, isKey := r.exprs[0].number(unix.NFTA_META_KEY)
		op, isOp := r.exprs[1].number(unix.NFTA_CMP_OP)
		if !ok || code != verdictCodeAccept || !isKey || !isOp || op != unix.NFT_CMP_EQ || text(r.exprs[1].value(unix.NFTA_CMP_DATA)) != bridge {
			continue
		}
		switch {
		case key == unix.NFT_META_IIFNAME && len(names) == 3:
			in = append(in, r)
		case key == unix.NFT_META_OIFNAME && len(names) == 4 && names[2] == "match" && text(r.exprs[2].data[unix.NFTA_MATCH_NAME]) == "conntrack":
			out = append(out, r)
		}
	}
	return in, out
}

// iptablesIface is -i or -o as iptables writes it: the name with its zero byte, not padded.
func iptablesIface(key expr.MetaKey, name string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: append([]byte(name), 0)},
	}
}

// iptablesState is -m conntrack --ctstate RELATED,ESTABLISHED,DNAT.
func iptablesState() []expr.Any {
	const established, related, dnat = 1 << 1, 1 << 2, 1 << 7
	info := &xt.ConntrackMtinfo3{}
	info.MatchFlags, info.StateMask = uint16(xt.ConntrackState), established|related|dnat
	return []expr.Any{&expr.Match{Name: "conntrack", Rev: 3, Info: info}}
}

func iptablesAccept() []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
}

// KeepFrom keeps the table's containers from other bridges, but for what those publish: where iptables' policy dropped that, Pass would
// let it through. Callers hold the table's lock.
func KeepFrom(t Table, bridges []string) error {
	var es []element
	for _, b := range bridges {
		es = append(es, element{set: setForeign, key: ifnameData(b)})
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, t.Name, es)...); err != nil {
		return fmt.Errorf("add other engines' bridges to nftables table %s: %w", t.Name, err)
	}
	return nil
}
