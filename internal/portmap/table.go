package portmap

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// The table, with two networks (`nft list table inet conex` shows it so):
//
//	set bridges  { type ifname }                        the bridges of all networks
//	set internal { type ifname }                        those that lead nowhere
//	set pairs    { type ifname . ifname }               each bridge with itself
//	set subnets4 { type ipv4_addr; flags interval }     what leaves the host with its address; subnets6 the same
//	map ports4     { type inet_proto . inet_service : ipv4_addr . inet_service }              published on every address; ports6
//	map addrports4 { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }  published on one; addrports6
//	set hairpin  { type ifname . inet_proto . inet_service }  published ports by their own bridge
//	set guard    { type ifname }                        see Table.Guard
//	set foreign  { type ifname }                        see KeepFrom
//	map first4     { type inet_proto . inet_service : verdict }              where a first packet goes, see firsts; first6
//	map addrfirst4 { type ipv4_addr . inet_proto . inet_service : verdict }  of a port published on one address; addrfirst6
//	chain raw  { type filter hook prerouting priority raw
//	  meta nfproto ipv4 iifname != "lo" ip daddr 127.0.0.0/8 drop
//	  meta nfproto ipv4 iifname != "lo" ip saddr 127.0.0.0/8 drop }
//	chain publish {
//	  meta nfproto ipv4 dnat ip to ip daddr . meta l4proto . th dport map @addrports4
//	  meta nfproto ipv4 dnat ip to meta l4proto . th dport map @ports4
//	  meta nfproto ipv6 dnat ip6 to ip6 daddr . meta l4proto . th dport map @addrports6
//	  meta nfproto ipv6 dnat ip6 to meta l4proto . th dport map @ports6 }
//	chain prerouting  { type nat hook prerouting priority dstnat       under the policy docker
//	  iifname . meta l4proto . th dport @hairpin return
//	  meta nfproto ipv6 ip6 saddr fe80::/10 iifname != @internal return
//	  fib daddr type local jump publish }
//	chain input       { type filter hook input priority 1073741824     under the policy host
//	  iifname "lo" return
//	  fib daddr type != local return
//	  ct state != new return
//	  iifname . meta l4proto . th dport @hairpin return
//	  meta nfproto ipv6 ip6 saddr fe80::/10 iifname != @internal return
//	  meta nfproto ipv4 ip daddr . meta l4proto . th dport vmap @addrfirst4
//	  meta nfproto ipv4 meta l4proto . th dport vmap @first4
//	  meta nfproto ipv6 ip6 daddr . meta l4proto . th dport vmap @addrfirst6
//	  meta nfproto ipv6 meta l4proto . th dport vmap @first6 }
//	chain log7001 { iifname @internal drop                                  one for each container with such ports
//	  log group 7001 snaplen 65535 queue-threshold 1 drop }
//	chain output      { type nat hook output priority dstnat
//	  meta mark 0x636f6e78 return                                      see firsts.served
//	  oifname "lo" ip daddr 127.0.0.0/8 return
//	  ip6 daddr ::1 return
//	  fib daddr type local jump publish }
//	chain postrouting { type nat hook postrouting priority srcnat
//	  ip saddr @subnets4 oifname != @bridges masquerade
//	  ip6 saddr @subnets6 oifname != @bridges masquerade }
//	chain forward     { type filter hook forward priority filter
//	  ct state established,related accept
//	  iifname . oifname @pairs accept
//	  iifname @internal drop
//	  oifname @internal drop
//	  iifname @bridges oifname @foreign ct status ! dnat drop
//	  oifname @bridges ct status dnat accept
//	  oifname @bridges drop
//	  iifname @bridges accept
//	  iifname @guard oifname @guard drop }
//
// The number of rules that a packet meets is the same with one network or a hundred, with one published port or ten thousand: all else
// are elements of hash tables, and publishing is a few of them in one transaction, not rules in three chains.
//
// raw stands before everything: with route_localnet, which other software sets, nobody outside reaches what listens on 127.0.0.1.
const (
	setBridges  = "bridges"
	setInternal = "internal"
	setPairs    = "pairs"
	setSubnets4 = "subnets4"
	setSubnets6 = "subnets6"
	mapAny4     = "ports4"
	mapAny6     = "ports6"
	mapAddr4    = "addrports4"
	mapAddr6    = "addrports6"
	mapFirst4   = "first4"
	mapFirst6   = "first6"
	mapAddrF4   = "addrfirst4"
	mapAddrF6   = "addrfirst6"
	setHairpin  = "hairpin"
	setGuard    = "guard"
	setForeign  = "foreign"

	chainRaw         = "raw"
	chainPublish     = "publish"
	chainPrerouting  = "prerouting"
	chainInput       = "input"
	chainOutput      = "output"
	chainPostrouting = "postrouting"
	chainForward     = "forward"
)

// setNames lists the sets and maps whose elements change while the table stands.
var setNames = []string{setBridges, setInternal, setPairs, setSubnets4, setSubnets6, mapAny4, mapAny6, mapAddr4, mapAddr6, mapFirst4, mapFirst6, mapAddrF4, mapAddrF6, setHairpin, setForeign}

// behindAll is the priority of our input chain: behind whatever filters the host's input, and before connections are confirmed, so that
// a packet that is dropped there leaves none behind.
const behindAll = 1 << 30

// ErrNoTable says that the table is not there.
var ErrNoTable = errors.New("nftables table is missing")

// Numbers of linux/netfilter/nf_tables.h and nf_conntrack_common.h that x/sys lacks or the reader should see.
const (
	ctStateEstablished = 1 << 1
	ctStateRelated     = 1 << 2
	ctStateNew         = 1 << 3
	ctStatusDstNAT     = 1 << 5
	rtnLocal           = 2
	reg1               = 1 // 16 bytes: the 32-bit registers 8 to 11
	reg32              = 8 // the first of the 32-bit registers
)

// plan is the static part of a table.
type plan struct {
	table  *nftables.Table
	chains []*nftables.Chain
	rules  []*nftables.Rule
}

func (p *plan) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: p.table, Type: typ, Hooknum: hook, Priority: prio}
	p.chains = append(p.chains, c)
	return c
}

func (p *plan) rule(c *nftables.Chain, exprs ...[]expr.Any) {
	p.rules = append(p.rules, &nftables.Rule{Table: p.table, Chain: c, Exprs: slices.Concat(exprs...)})
}

func planOf(t Table) *plan {
	p := &plan{table: &nftables.Table{Name: t.Name, Family: nftables.TableFamilyINet}}
	raw := p.chain(chainRaw, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw)
	publish := p.chain(chainPublish, "", nil, nil)
	prerouting := p.chain(chainPrerouting, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)
	output := p.chain(chainOutput, nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)
	postrouting := p.chain(chainPostrouting, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	forward := p.chain(chainForward, nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)

	outside := ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo")
	p.rule(raw, family(unix.NFPROTO_IPV4), outside, within(daddr4(reg1), loopback4), drop())
	p.rule(raw, family(unix.NFPROTO_IPV4), outside, within(saddr4(reg1), loopback4), drop())
	p.rule(publish, family(unix.NFPROTO_IPV4), daddr4(reg32), protoPort(reg32+1), translate(mapAddr4))
	p.rule(publish, family(unix.NFPROTO_IPV4), protoPort(reg32), translate(mapAny4))
	p.rule(publish, family(unix.NFPROTO_IPV6), daddr6(reg32), protoPort(reg32+4), translate(mapAddr6))
	p.rule(publish, family(unix.NFPROTO_IPV6), protoPort(reg32), translate(mapAny6))
	hairpin := slices.Concat(load(expr.MetaKeyIIFNAME, reg32), protoPort(reg32+4), in(setHairpin, reg32))
	// No container can answer an address that is good on one link alone: the forwarder does.
	// But not those of internal networks, which have no way past the forward chain.
	linkLocal := slices.Concat(family(unix.NFPROTO_IPV6), within(saddr6(reg1), netip.MustParsePrefix("fe80::/10")), load(expr.MetaKeyIIFNAME, reg1), notIn(setInternal, reg1))
	if t.Docker {
		p.rule(prerouting, hairpin, back())
		p.rule(prerouting, linkLocal, back())
		p.rule(prerouting, toLocal(expr.CmpOpEq), jump(chainPublish))
	} else {
		prio := nftables.ChainPriority(behindAll)
		input := p.chain(chainInput, nftables.ChainTypeFilter, nftables.ChainHookInput, &prio)
		p.rule(input, ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq, "lo"), back())
		p.rule(input, toLocal(expr.CmpOpNeq), back())
		p.rule(input, ctLacks(expr.CtKeySTATE, ctStateNew), back())
		p.rule(input, hairpin, back())
		p.rule(input, linkLocal, back())
		p.rule(input, family(unix.NFPROTO_IPV4), daddr4(reg32), protoPort(reg32+1), vmap(mapAddrF4))
		p.rule(input, family(unix.NFPROTO_IPV4), protoPort(reg32), vmap(mapFirst4))
		p.rule(input, family(unix.NFPROTO_IPV6), daddr6(reg32), protoPort(reg32+4), vmap(mapAddrF6))
		p.rule(input, family(unix.NFPROTO_IPV6), protoPort(reg32), vmap(mapFirst6))
	}
	p.rule(output, load(expr.MetaKeyMARK, reg1), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(markLocal)}}, back())
	p.rule(output, family(unix.NFPROTO_IPV4), within(daddr4(reg1), loopback4), back())
	p.rule(output, family(unix.NFPROTO_IPV6), within(daddr6(reg1), netip.MustParsePrefix("::1/128")), back())
	p.rule(output, toLocal(expr.CmpOpEq), jump(chainPublish))
	p.rule(postrouting, family(unix.NFPROTO_IPV4), saddr4(reg1), in(setSubnets4, reg1), load(expr.MetaKeyOIFNAME, reg1), notIn(setBridges, reg1), []expr.Any{&expr.Masq{}})
	p.rule(postrouting, family(unix.NFPROTO_IPV6), saddr6(reg1), in(setSubnets6, reg1), load(expr.MetaKeyOIFNAME, reg1), notIn(setBridges, reg1), []expr.Any{&expr.Masq{}})
	from, to := load(expr.MetaKeyIIFNAME, reg1), load(expr.MetaKeyOIFNAME, reg1)
	p.rule(forward, ctHas(expr.CtKeySTATE, ctStateEstablished|ctStateRelated), accept())
	p.rule(forward, load(expr.MetaKeyIIFNAME, reg32), load(expr.MetaKeyOIFNAME, reg32+4), in(setPairs, reg32), accept())
	p.rule(forward, from, in(setInternal, reg1), drop())
	p.rule(forward, to, in(setInternal, reg1), drop())
	p.rule(forward, from, in(setBridges, reg1), to, in(setForeign, reg1), ctLacks(expr.CtKeySTATUS, ctStatusDstNAT), drop())
	p.rule(forward, to, in(setBridges, reg1), ctHas(expr.CtKeySTATUS, ctStatusDstNAT), accept())
	p.rule(forward, to, in(setBridges, reg1), drop())
	p.rule(forward, from, in(setBridges, reg1), accept())
	p.rule(forward, from, in(setGuard, reg1), to, in(setGuard, reg1), drop())
	return p
}

func family(f byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{f}},
	}
}

func load(key expr.MetaKey, reg uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: reg}}
}

func ifname(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	return append(load(key, reg1), &expr.Cmp{Op: op, Register: reg1, Data: ifnameData(name)})
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

// header loads a part of the network header.
func header(reg, offset, length uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}}
}

func saddr4(reg uint32) []expr.Any { return header(reg, 12, 4) }
func daddr4(reg uint32) []expr.Any { return header(reg, 16, 4) }
func saddr6(reg uint32) []expr.Any { return header(reg, 8, 16) }
func daddr6(reg uint32) []expr.Any { return header(reg, 24, 16) }

// translate looks the key in the first registers up in a map; a packet without an element goes on to the next rule.
func translate(name string) []expr.Any {
	family, port := uint32(unix.NFPROTO_IPV4), uint32(reg32+1)
	if name == mapAny6 || name == mapAddr6 {
		family, port = unix.NFPROTO_IPV6, reg32+4
	}
	return []expr.Any{
		&expr.Lookup{SourceRegister: reg32, DestRegister: reg32, IsDestRegSet: true, SetName: name},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: reg32, RegProtoMin: port},
	}
}

func in(set string, reg uint32) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: set}}
}

func notIn(set string, reg uint32) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg, SetName: set, Invert: true}}
}

func vmap(name string) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: reg32, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: name}}
}

func toLocal(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: op, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(rtnLocal)},
	}
}

var loopback4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)

// within compares the address that get loads.
func within(get []expr.Any, p netip.Prefix) []expr.Any {
	a := p.Masked().Addr().AsSlice()
	mask := make([]byte, len(a))
	for b := range p.Bits() {
		mask[b/8] |= 0x80 >> (b % 8)
	}
	return append(get,
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(a)), Mask: mask, Xor: make([]byte, len(a))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: a},
	)
}

func ctHas(key expr.CtKey, bits uint32) []expr.Any   { return ctBits(key, bits, expr.CmpOpNeq) }
func ctLacks(key expr.CtKey, bits uint32) []expr.Any { return ctBits(key, bits, expr.CmpOpEq) }

func ctBits(key expr.CtKey, bits uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: reg1, Data: make([]byte, 4)},
	}
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func accept() []expr.Any           { return verdict(expr.VerdictAccept, "") }
func drop() []expr.Any             { return verdict(expr.VerdictDrop, "") }
func back() []expr.Any             { return verdict(expr.VerdictReturn, "") }
func jump(chain string) []expr.Any { return verdict(expr.VerdictJump, chain) }

// Standing reports whether the table is there and whole, and knows the bridge. Two round trips, a tenth of a millisecond.
func Standing(t Table, b Bridge) (bool, error) {
	c, err := t.dial()
	if err != nil {
		return false, err
	}
	defer c.Close()
	ok, err := whole(c, t)
	if err != nil || !ok {
		return false, err
	}
	ok, _, err = get(c, t.Name, element{set: setBridges, key: ifnameData(b.Name)})
	return ok, err
}

// Ensure makes the table unless it is there and whole, and puts the bridge into it. A table that is made anew gets the elements of all
// bridges and mappings back, in the same transaction. Callers hold the table's lock.
func Ensure(t Table, b Bridge) error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	ok, err := whole(c, t)
	if err != nil {
		return err
	}
	if !ok {
		return build(t)
	}
	msgs := elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, t.Name, bridgeElements(b))
	if err := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...); err != nil {
		return fmt.Errorf("add bridge %s to nftables table %s: %w", b.Name, t.Name, err)
	}
	return nil
}

// Rebuild replaces the table, for a changed Table.Guard or what others did to it. Callers hold the table's lock.
func Rebuild(t Table) error { return build(t) }

// RemoveBridge takes a bridge out of the table. It is no error when it isn't in there, or there is no table. Callers hold the table's lock.
func RemoveBridge(t Table, b Bridge) error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	found, _, err := get(c, t.Name, element{set: setBridges, key: ifnameData(b.Name)})
	if err != nil || !found {
		return err
	}
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, bridgeElements(b))...)
	if err != nil {
		return fmt.Errorf("remove bridge %s from nftables table %s: %w", b.Name, t.Name, err)
	}
	return nil
}

// bridgeElements are the elements of one network.
func bridgeElements(b Bridge) []element {
	name := ifnameData(b.Name)
	es := []element{{set: setBridges, key: name}}
	if !b.Apart {
		es = append(es, element{set: setPairs, key: slices.Concat(name, name)})
	}
	if b.Internal {
		es = append(es, element{set: setInternal, key: name})
	}
	for _, p := range b.Masquerade {
		set := setSubnets4
		if p.Addr().Is6() {
			set = setSubnets6
		}
		es = append(es, element{set: set, key: p.Masked().Addr().AsSlice()})
		if next := behind(p); next.IsValid() {
			es = append(es, element{set: set, key: next.AsSlice(), end: true})
		}
	}
	return es
}

// behind is the first address after a prefix.
func behind(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().AsSlice()
	for b := p.Bits(); b < len(a)*8; b++ {
		a[b/8] |= 0x80 >> (b % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last.Next()
}

// whole asks the kernel for the table and counts its rules: a flushed table has none, and chains or maps that are in use
// can't be deleted. Those of log chains come and go with ports.
func whole(c *netlink.Conn, t Table) (bool, error) {
	rules, err := c.Dump(message(unix.NFT_MSG_GETRULE, 0, netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, t.Name)))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list rules of table %s: %w", t.Name, err)
	}
	n := 0
	for _, b := range rules {
		if chain := chainOf(b); chain != "" && !strings.HasPrefix(chain, logPrefix) {
			n++
		}
	}
	return n == len(planOf(t).rules), nil
}

// build replaces the table by a new one in one transaction: no packet sees it half made.
func build(t Table) error {
	elements, groups, err := everything(t)
	if err != nil {
		return fmt.Errorf("rebuild table %s: %w", t.Name, err)
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	p := planOf(t)
	// The first add makes the delete succeed when there is no table.
	conn.AddTable(p.table)
	conn.DelTable(p.table)
	conn.AddTable(p.table)
	for _, c := range p.chains {
		conn.AddChain(c)
	}
	for _, g := range groups { // before the elements that lead to them
		c := conn.AddChain(&nftables.Chain{Name: logChain(g), Table: p.table})
		p.rule(c, load(expr.MetaKeyIIFNAME, reg1), in(setInternal, reg1), drop())
		p.rule(c, []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD, Group: g, Snaplen: snaplen, QThreshold: 1}}, drop())
	}
	for _, s := range sets(p.table) {
		if err := conn.AddSet(s, nil); err != nil {
			return fmt.Errorf("table %s: set %s: %w", t.Name, s.Name, err)
		}
		for part := range slices.Chunk(elements[s.Name], perMessage) {
			if err := conn.SetAddElements(s, part); err != nil {
				return fmt.Errorf("table %s: set %s: %w", t.Name, s.Name, err)
			}
		}
	}
	for _, r := range p.rules {
		conn.AddRule(r)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s: %w", t.Name, err)
	}
	return nil
}

// sets are the table's sets and maps.
func sets(t *nftables.Table) []*nftables.Set {
	port := []nftables.SetDatatype{nftables.TypeInetProto, nftables.TypeInetService}
	with := func(first nftables.SetDatatype) nftables.SetDatatype {
		return nftables.MustConcatSetType(append([]nftables.SetDatatype{first}, port...)...)
	}
	target4 := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	target6 := nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
	names := func(name string) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
	}
	concat := func(name string, key nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, Concatenation: true, KeyType: key}
	}
	ports := func(name string, key, target nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, IsMap: true, Concatenation: true, KeyType: key, DataType: target}
	}
	subnets := func(name string, key nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, Interval: true, KeyType: key}
	}
	first := func(name string, key nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, IsMap: true, Concatenation: true, KeyType: key, DataType: nftables.TypeVerdict}
	}
	return []*nftables.Set{
		first(mapFirst4, nftables.MustConcatSetType(port...)), first(mapAddrF4, with(nftables.TypeIPAddr)),
		first(mapFirst6, nftables.MustConcatSetType(port...)), first(mapAddrF6, with(nftables.TypeIP6Addr)),
		names(setBridges), names(setInternal), names(setGuard), names(setForeign),
		concat(setPairs, nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIFName)),
		subnets(setSubnets4, nftables.TypeIPAddr), subnets(setSubnets6, nftables.TypeIP6Addr),
		ports(mapAny4, nftables.MustConcatSetType(port...), target4), ports(mapAddr4, with(nftables.TypeIPAddr), target4),
		ports(mapAny6, nftables.MustConcatSetType(port...), target6), ports(mapAddr6, with(nftables.TypeIP6Addr), target6),
		concat(setHairpin, with(nftables.TypeIFName)),
	}
}

// everything gathers the elements of a table from the records, by set, and the log groups that they lead to.
func everything(t Table) (elements map[string][]nftables.SetElement, groups []uint16, err error) {
	var es []element
	if t.Bridges != nil {
		bridges, err := t.Bridges()
		if err != nil {
			return nil, nil, err
		}
		for _, b := range bridges {
			es = append(es, bridgeElements(b)...)
		}
	}
	if t.Live != nil {
		live, err := t.Live()
		if err != nil {
			return nil, nil, err
		}
		es = append(es, elementsOf(live)...)
		groups = groupsOf(live)
	}
	for _, name := range t.Guard {
		es = append(es, element{set: setGuard, key: ifnameData(name)})
	}
	out := make(map[string][]nftables.SetElement)
	// Two records can name one port when a monitor died and its port was taken anew: the later one of the list wins.
	seen := make(map[string]int)
	for _, e := range es {
		k := fmt.Sprint(e.set, e.end, e.key)
		el := nftables.SetElement{Key: e.key, Val: e.val, IntervalEnd: e.end}
		if e.leads {
			el.Val, el.VerdictData = nil, &expr.Verdict{Kind: expr.VerdictGoto, Chain: string(e.val)}
		}
		if i, ok := seen[k]; ok {
			out[e.set][i] = el
			continue
		}
		seen[k] = len(out[e.set])
		out[e.set] = append(out[e.set], el)
	}
	return out, groups, nil
}

// Remove deletes the table. It is no error when there is none.
func Remove(t Table) error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, message(unix.NFT_MSG_DELTABLE, 0, netlink.Attrs{}.String(unix.NFTA_TABLE_NAME, t.Name)))
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nftables table %s: %w", t.Name, err)
	}
	return nil
}
