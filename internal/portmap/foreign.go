package portmap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// What other tools have put into nf_tables is read with our own few lines: the kernel's messages carry whatever those tools wrote, of
// which only the simple part is understood, and the rest must do no harm.

// foreignChain is a chain of somebody's table.
type foreignChain struct {
	family      byte
	table, name string
	typ         string // of a base chain: filter, nat, route
	hooked      bool
	hook        uint32
	priority    int32
	drops       bool // by policy
}

// foreignRule is a rule in one of them.
type foreignRule struct {
	family       byte
	table, chain string
	handle       uint64
	exprs        []foreignExpr
}

// foreignExpr is one expression of a rule: its name and its attributes.
type foreignExpr struct {
	name string
	data map[uint16][]byte
}

// foreignMessage asks about tables of any family.
func foreignMessage(typ int, family byte, attrs netlink.Attrs) netlink.Message {
	data := append([]byte{family, 0, 0, 0}, attrs...)
	return netlink.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(typ), Data: data}
}

// foreignChains lists all chains of the network namespace.
func foreignChains(c *netlink.Conn) ([]foreignChain, error) {
	msgs, err := dump(c, foreignMessage(unix.NFT_MSG_GETCHAIN, unix.NFPROTO_UNSPEC, nil))
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var out []foreignChain
	for _, m := range msgs {
		if ch, ok := readChain(m); ok {
			out = append(out, ch)
		}
	}
	return out, nil
}

// foreignRules lists the rules of a table, or of one chain of it, in their order.
func foreignRules(c *netlink.Conn, family byte, table, chain string) ([]foreignRule, error) {
	a := netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, table)
	if chain != "" {
		a = a.String(unix.NFTA_RULE_CHAIN, chain)
	}
	msgs, err := dump(c, foreignMessage(unix.NFT_MSG_GETRULE, family, a))
	if err != nil {
		return nil, fmt.Errorf("list rules of nftables table %s: %w", table, err)
	}
	var out []foreignRule
	for _, m := range msgs {
		if r, ok := readRule(m); ok {
			out = append(out, r)
		}
	}
	return out, nil
}

// dump is Conn.Dump for lists that others may change meanwhile: then the kernel says EINTR, and is asked again.
func dump(c *netlink.Conn, m netlink.Message) (msgs [][]byte, err error) {
	for range 10 {
		if msgs, err = c.Dump(m); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return msgs, err
}

func readChain(b []byte) (ch foreignChain, ok bool) {
	if len(b) < 4 {
		return ch, false
	}
	a := netlink.Parse(b[4:])
	ch = foreignChain{family: b[0], table: text(a[unix.NFTA_CHAIN_TABLE]), name: text(a[unix.NFTA_CHAIN_NAME]), typ: text(a[unix.NFTA_CHAIN_TYPE])}
	if h, there := a[unix.NFTA_CHAIN_HOOK]; there {
		hook := netlink.Parse(h)
		n, okN := big32(hook[unix.NFTA_HOOK_HOOKNUM])
		p, okP := big32(hook[unix.NFTA_HOOK_PRIORITY])
		ch.hooked, ch.hook, ch.priority = okN && okP, n, int32(p)
	}
	policy, there := big32(a[unix.NFTA_CHAIN_POLICY])
	ch.drops = there && policy == verdictCodeDrop
	return ch, ch.table != "" && ch.name != ""
}

// chainOf reads the chain's name alone of what the kernel says about a rule.
func chainOf(b []byte) (chain string) {
	if len(b) < 4 {
		return ""
	}
	netlink.Each(b[4:], func(typ uint16, data []byte) {
		if typ == unix.NFTA_RULE_CHAIN {
			chain = text(data)
		}
	})
	return chain
}

func readRule(b []byte) (r foreignRule, ok bool) {
	if len(b) < 4 {
		return r, false
	}
	a := netlink.Parse(b[4:])
	r = foreignRule{family: b[0], table: text(a[unix.NFTA_RULE_TABLE]), chain: text(a[unix.NFTA_RULE_CHAIN])}
	if h := a[unix.NFTA_RULE_HANDLE]; len(h) == 8 {
		r.handle = binary.BigEndian.Uint64(h)
	}
	netlink.Each(a[unix.NFTA_RULE_EXPRESSIONS], func(_ uint16, data []byte) {
		e := netlink.Parse(data)
		r.exprs = append(r.exprs, foreignExpr{text(e[unix.NFTA_EXPR_NAME]), netlink.Parse(e[unix.NFTA_EXPR_DATA])})
	})
	return r, r.table != "" && r.chain != ""
}

// Verdicts as nf_tables and netfilter number them.
const (
	verdictCodeDrop   = 0
	verdictCodeAccept = 1
)

// number reads a 32-bit attribute.
func (e foreignExpr) number(attr uint16) (uint32, bool) { return big32(e.data[attr]) }

// value reads an attribute that holds NFTA_DATA_VALUE.
func (e foreignExpr) value(attr uint16) []byte {
	return netlink.Parse(e.data[attr])[unix.NFTA_DATA_VALUE]
}

// verdict reads an immediate verdict and where it leads.
func (e foreignExpr) verdict() (code int32, chain string, ok bool) {
	if e.name != "immediate" {
		return 0, "", false
	}
	if reg, is := e.number(unix.NFTA_IMMEDIATE_DREG); !is || reg != unix.NFT_REG_VERDICT {
		return 0, "", false
	}
	v := netlink.Parse(netlink.Parse(e.data[unix.NFTA_IMMEDIATE_DATA])[unix.NFTA_DATA_VERDICT])
	n, is := big32(v[unix.NFTA_VERDICT_CODE])
	return int32(n), text(v[unix.NFTA_VERDICT_CHAIN]), is
}

// text reads a zero-terminated string.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func big32(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// gone says that what was to be deleted, or the table around it, is not there.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) }
