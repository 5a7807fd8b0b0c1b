package portmap

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// The table, for a network on conex0 with 172.30.0.0/16 (`nft list table ip conex` shows it so):
//
//	map ports     { type inet_proto . inet_service : ipv4_addr . inet_service }              published on every address
//	map addrports { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }  published on one
//	set loopback  { type ipv4_addr . inet_proto . inet_service }                             published on 127.x
//	set guard     { type ifname }                                                            see Network.Guard
//	chain raw  { type filter hook prerouting priority raw
//	  iifname != "lo" ip daddr . meta l4proto . th dport @loopback drop }
//	chain publish {
//	  dnat ip to ip daddr . meta l4proto . th dport map @addrports
//	  dnat ip to meta l4proto . th dport map @ports }
//	chain prerouting  { type nat hook prerouting priority dstnat
//	  iifname != "conex0" fib daddr type local jump publish }
//	chain output      { type nat hook output priority dstnat
//	  ip daddr != 127.0.0.0/8 fib daddr type local jump publish }
//	chain postrouting { type nat hook postrouting priority srcnat
//	  ip saddr 172.30.0.0/16 oifname != "conex0" masquerade }
//	chain forward     { type filter hook forward priority filter
//	  ct state established,related accept
//	  iifname "conex0" accept
//	  oifname "conex0" ct status dnat accept
//	  oifname "conex0" drop
//	  iifname @guard oifname @guard drop }
//
// The two maps are hash tables: a packet of a new connection costs the same with one published port or ten thousand, and
// publishing is one element, not rules in three chains.
const (
	mapAny   = "ports"
	mapAddr  = "addrports"
	setLocal = "loopback"
	setGuard = "guard"

	chainRaw         = "raw"
	chainPublish     = "publish"
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainPostrouting = "postrouting"
	chainForward     = "forward"
)

// ErrNoTable says that the table is not there.
var ErrNoTable = errors.New("nftables table is missing")

// Numbers of linux/netfilter/nf_tables.h and nf_conntrack_common.h that x/sys lacks or the reader should see.
const (
	ctStateEstablished = 1 << 1
	ctStateRelated     = 1 << 2
	ctStatusDstNAT     = 1 << 5
	rtnLocal           = 2
	reg1               = 1 // 16 bytes: the 32-bit registers 8 to 11
	reg32              = 8 // the first of the 32-bit registers
)

// plan is the static part of a network's table.
type plan struct {
	chains []*nftables.Chain
	rules  []*nftables.Rule
}

func planOf(n Network) (*nftables.Table, *plan) {
	t := &nftables.Table{Name: n.Table, Family: nftables.TableFamilyIPv4}
	p := &plan{}
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
		c := &nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio}
		p.chains = append(p.chains, c)
		return c
	}
	rule := func(c *nftables.Chain, exprs ...[]expr.Any) {
		r := &nftables.Rule{Table: t, Chain: c}
		for _, e := range exprs {
			r.Exprs = append(r.Exprs, e...)
		}
		p.rules = append(p.rules, r)
	}
	raw := chain(chainRaw, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	publish := chain(chainPublish, "", nil, nil)
	prerouting := chain(chainPrerouting, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	output := chain(chainOutput, nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	postrouting := chain(chainPostrouting, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	forward := chain(chainForward, nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)

	// A host with route_localnet (other software sets it) must still not show ports of 127.0.0.1 to its network.
	rule(raw, ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo"), addrProtoPort(), in(setLocal), drop())
	rule(publish, addrProtoPort(), translate(mapAddr))
	rule(publish, protoPort(reg32), translate(mapAny))
	rule(prerouting, ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, n.Bridge), toLocal(), jump(chainPublish))
	rule(output, daddrIn(expr.CmpOpNeq, netip.MustParsePrefix("127.0.0.0/8")), toLocal(), jump(chainPublish))
	rule(postrouting, saddrIn(n.Subnet), ifname(expr.MetaKeyOIFNAME, expr.CmpOpNeq, n.Bridge), []expr.Any{&expr.Masq{}})
	rule(forward, ctHas(expr.CtKeySTATE, ctStateEstablished|ctStateRelated), accept())
	rule(forward, ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq, n.Bridge), accept())
	rule(forward, ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq, n.Bridge), ctHas(expr.CtKeySTATUS, ctStatusDstNAT), accept())
	rule(forward, ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq, n.Bridge), drop())
	rule(forward, load(expr.MetaKeyIIFNAME), in(setGuard), load(expr.MetaKeyOIFNAME), in(setGuard), drop())
	return t, p
}

func load(key expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: key, Register: reg1}} }

func ifname(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	return append(load(key), &expr.Cmp{Op: op, Register: reg1, Data: ifnameData(name)})
}

// ifnameData pads an interface name to IFNAMSIZ, so that the comparison is exact.
func ifnameData(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// protoPort loads l4proto and destination port into two 32-bit registers.
func protoPort(reg uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: reg + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func addrProtoPort() []expr.Any {
	return append([]expr.Any{&expr.Payload{DestRegister: reg32, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}}, protoPort(reg32+1)...)
}

// translate looks the key in the first registers up in a map; a packet without an element goes on to the next rule.
func translate(name string) []expr.Any {
	return []expr.Any{
		&expr.Lookup{SourceRegister: reg32, DestRegister: reg32, IsDestRegSet: true, SetName: name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg32, RegProtoMin: reg32 + 1},
	}
}

func in(set string) []expr.Any {
	reg := uint32(reg32)
	if set == setGuard {
		reg = reg1
	}
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: set}}
}

func toLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(rtnLocal)},
	}
}

func daddrIn(op expr.CmpOp, p netip.Prefix) []expr.Any { return addrIn(16, op, p) }

func saddrIn(p netip.Prefix) []expr.Any { return addrIn(12, expr.CmpOpEq, p) }

func addrIn(offset uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
	a := p.Masked().Addr().As4()
	mask := binaryutil.BigEndian.PutUint32(^uint32(0) << (32 - p.Bits()))
	return []expr.Any{
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: reg1, Data: a[:]},
	}
}

func ctHas(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: make([]byte, 4)},
	}
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func accept() []expr.Any           { return verdict(expr.VerdictAccept, "") }
func drop() []expr.Any             { return verdict(expr.VerdictDrop, "") }
func jump(chain string) []expr.Any { return verdict(expr.VerdictJump, chain) }

// Ensure makes the network's table unless it is there and whole. A rebuilt table gets the elements of n.Live back, in the same
// transaction. Callers hold the network's lock.
func Ensure(n Network) error {
	ok, err := whole(n)
	if err != nil || ok {
		return err
	}
	return build(n)
}

// Rebuild replaces the network's table, for a changed Network.Guard. Callers hold the network's lock.
func Rebuild(n Network) error { return build(n) }

// whole asks the kernel for the table and counts its rules: a flushed table has none, and chains or maps that are in use
// can't be deleted. Two round trips, a tenth of a millisecond.
func whole(n Network) (bool, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return false, err
	}
	defer c.Close()
	_, p := planOf(n)
	rules, err := c.Dump(message(unix.NFT_MSG_GETRULE, 0, netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, n.Table)))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list rules of table %s: %w", n.Table, err)
	}
	return len(rules) == len(p.rules), nil
}

// build replaces the table by a new one in one transaction: no packet sees it half made.
func build(n Network) error {
	var live []Mapping
	if n.Live != nil {
		var err error
		if live, err = n.Live(); err != nil {
			return fmt.Errorf("rebuild table %s: %w", n.Table, err)
		}
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t, p := planOf(n)
	// The first add makes the delete succeed when there is no table.
	conn.AddTable(t)
	conn.DelTable(t)
	conn.AddTable(t)

	port := []nftables.SetDatatype{nftables.TypeInetProto, nftables.TypeInetService}
	addrPort := append([]nftables.SetDatatype{nftables.TypeIPAddr}, port...)
	target := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	sets := map[string]*nftables.Set{
		mapAny:   {Table: t, Name: mapAny, IsMap: true, Concatenation: true, KeyType: nftables.MustConcatSetType(port...), DataType: target},
		mapAddr:  {Table: t, Name: mapAddr, IsMap: true, Concatenation: true, KeyType: nftables.MustConcatSetType(addrPort...), DataType: target},
		setLocal: {Table: t, Name: setLocal, Concatenation: true, KeyType: nftables.MustConcatSetType(addrPort...)},
		setGuard: {Table: t, Name: setGuard, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
	}
	elements := make(map[string][]nftables.SetElement)
	for _, name := range n.Guard {
		elements[setGuard] = append(elements[setGuard], nftables.SetElement{Key: ifnameData(name)})
	}
	// Two records can name one port when a monitor died and its port was taken anew: the later one of the list wins.
	seen := make(map[string]int)
	for _, e := range elementsOf(live) {
		k := e.set + string(e.key)
		el := nftables.SetElement{Key: e.key, Val: e.val}
		if i, ok := seen[k]; ok {
			elements[e.set][i] = el
			continue
		}
		seen[k] = len(elements[e.set])
		elements[e.set] = append(elements[e.set], el)
	}
	for _, name := range []string{mapAny, mapAddr, setLocal, setGuard} {
		if err := conn.AddSet(sets[name], nil); err != nil {
			return fmt.Errorf("table %s: set %s: %w", n.Table, name, err)
		}
		for part := range slices.Chunk(elements[name], perMessage) {
			if err := conn.SetAddElements(sets[name], part); err != nil {
				return fmt.Errorf("table %s: set %s: %w", n.Table, name, err)
			}
		}
	}
	for _, c := range p.chains {
		conn.AddChain(c)
	}
	for _, r := range p.rules {
		conn.AddRule(r)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s: %w", n.Table, err)
	}
	return nil
}

// Remove deletes the network's table. It is no error when there is none.
func Remove(n Network) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, message(unix.NFT_MSG_DELTABLE, 0, netlink.Attrs{}.String(unix.NFTA_TABLE_NAME, n.Table)))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nftables table %s: %w", n.Table, err)
	}
	return nil
}
