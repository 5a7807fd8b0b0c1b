package egress

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// The table of an interface; what is said of IPv4 is there for IPv6 as well:
//
//	set self4     { ipv4_addr }                              the container's addresses
//	set link6     { ipv6_addr; interval }                    where neighbours are looked for
//	set answers4  { addr . proto . port . own port; timeout }  flows that others began and that may go on, remote end first
//	set begun4    { addr . proto . port . own port; timeout }  flows to what is listed by name, which outlive the name's answer
//	set peers4    { addr; timeout }                          who has sent something to the container lately: ICMP may answer
//	set names4    { addr; timeout }                          addresses of listed names
//	set ports4    { addr . proto . port; timeout }           the same of those that are listed with a port
//	set denied4   { addr . proto . port; timeout, counter }  what was dropped
//	set told4     { addr . proto . port; timeout }           what the monitor was told of within the last minute
//	chain out { hook ingress; policy drop }
//	chain in  { hook egress; policy accept }
const (
	tableFlagOwner   = 2 // NFT_TABLE_F_OWNER
	tableFlagPersist = 4 // NFT_TABLE_F_PERSIST

	hookIngress, hookEgress = 0, 1 // NF_NETDEV_*

	etherARP, etherIPv4, etherIPv6 = 0x0806, 0x0800, 0x86dd

	reg1  = 1
	reg32 = 8

	synFlag, rstFlag, finFlag, ackFlag = 2, 4, 1, 16
)

// How long flows may be still, about as long as connection tracking remembers them, and other memories.
const (
	beginTime    = 2 * time.Minute
	tcpTime      = 5 * 24 * time.Hour
	datagramTime = 3 * time.Minute
	peerTime     = time.Minute
	toldTime     = time.Minute
	deniedTime   = time.Hour
)

// Bounds: what a flood from within or outside can take up in the kernel.
const (
	maxAnswers = 65535
	maxPeers   = 4096
	maxDenied  = 1024
	maxNames   = 16384
	// tellRate and tellBurst bound what the monitor is told a second.
	tellRate, tellBurst = 10, 50
)

var protocols = map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}

// side is one family's part.
type side struct {
	suffix       string
	ether        uint16
	icmp         byte
	size         uint32 // of an address
	saddr, daddr uint32 // where they stand in the header
	typ          uint32 // the set type's number
	replies      [][2]byte
	echo         byte
	bits         int
}

var sides = []side{
	{suffix: "4", ether: etherIPv4, icmp: unix.IPPROTO_ICMP, size: 4, saddr: 12, daddr: 16, typ: 7, replies: [][2]byte{{0, 0}, {3, 3}, {11, 12}}, echo: 8, bits: 32},
	{suffix: "6", ether: etherIPv6, icmp: unix.IPPROTO_ICMPV6, size: 16, saddr: 8, daddr: 24, typ: 8, replies: [][2]byte{{129, 129}, {1, 4}}, echo: 128, bits: 128},
}

// words of the set types' numbers that nft shows them by.
const (
	typeProto   = 12
	typeService = 13
	typeBits    = 6
)

type exprs []expr.Any

func ethertype(t uint16) exprs {
	return exprs{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg1}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{byte(t >> 8), byte(t)}}}
}

func l4proto(p byte) exprs {
	return exprs{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{p}}}
}

func load(base expr.PayloadBase, reg, offset, length uint32) exprs {
	return exprs{&expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: length}}
}

func nh(reg, offset, length uint32) exprs {
	return load(expr.PayloadBaseNetworkHeader, reg, offset, length)
}

func th(reg, offset, length uint32) exprs {
	return load(expr.PayloadBaseTransportHeader, reg, offset, length)
}

func equal(b ...byte) exprs {
	return exprs{&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: b}}
}

func unequal(b ...byte) exprs {
	return exprs{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: b}}
}

func masked(mask ...byte) exprs {
	return exprs{&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}}
}

func between(r [2]byte) exprs {
	return exprs{
		&expr.Cmp{Op: expr.CmpOpGte, Register: reg1, Data: []byte{r[0]}},
		&expr.Cmp{Op: expr.CmpOpLte, Register: reg1, Data: []byte{r[1]}},
	}
}

func in(set string, reg uint32) exprs {
	return exprs{&expr.Lookup{SourceRegister: reg, SetName: set}}
}

func notIn(set string, reg uint32) exprs {
	return exprs{&expr.Lookup{SourceRegister: reg, SetName: set, Invert: true}}
}

// remember puts the key at reg32 into a set, or gives it new time there. A full set ends the rule.
func remember(set string, d time.Duration, what ...expr.Any) exprs {
	return exprs{&expr.Dynset{SrcRegKey: reg32, SetName: set, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: d, Exprs: what}}
}

func verdict(k expr.VerdictKind) exprs { return exprs{&expr.Verdict{Kind: k}} }

func accept() exprs { return verdict(expr.VerdictAccept) }
func drop() exprs   { return verdict(expr.VerdictDrop) }

// flow loads remote address, protocol, remote and own port: of a packet that goes out, or (back) that comes in.
func (s side) flow(back bool) exprs {
	addr, remote, own := s.daddr, uint32(2), uint32(0)
	if back {
		addr, remote, own = s.saddr, 0, 2
	}
	words := s.size / 4
	return slices.Concat(nh(reg32, addr, s.size), exprs{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg32 + words}},
		th(reg32+words+1, remote, 2), th(reg32+words+2, own, 2))
}

// target loads destination address, protocol and port, 0 for protocols without.
func (s side) target(ports bool) exprs {
	words := s.size / 4
	e := slices.Concat(nh(reg32, s.daddr, s.size), exprs{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg32 + words}})
	if ports {
		return append(e, th(reg32+words+1, 2, 2)...)
	}
	return append(e, &expr.Immediate{Register: reg32 + words + 1, Data: []byte{0, 0, 0, 0}})
}

func ported() exprs {
	return slices.Concat(exprs{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}}, in("ported", reg1))
}

func portless() exprs {
	return slices.Concat(exprs{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}}, notIn("ported", reg1))
}

// within matches destinations in a prefix.
func (s side) within(p netip.Prefix) exprs {
	if p.Bits() == 0 {
		return nil
	}
	a := p.Addr().AsSlice()
	mask := make([]byte, len(a))
	for b := range p.Bits() {
		mask[b/8] |= 0x80 >> (b % 8)
	}
	return slices.Concat(nh(reg1, s.daddr, s.size), masked(mask...), equal(a...))
}

// rules are the chain out and the chain in.
func rules(o Options) (out, incoming []exprs) {
	begun, names, ports := o.turned("begun"), o.turned("names"), o.turned("ports")
	add := func(parts ...exprs) { out = append(out, slices.Concat(parts...)) }
	mac := []byte(o.MAC)
	add(load(expr.PayloadBaseLLHeader, reg1, 6, 6), unequal(mac...), drop())
	// ARP: who has, and who is, in its own name.
	add(ethertype(etherARP), nh(reg1, 8, 6), equal(mac...), nh(reg1, 14, 4), in("self4", reg1), accept())
	// Neighbours and multicast listeners on the link itself, in its own name too.
	nd := slices.Concat(ethertype(etherIPv6), l4proto(unix.IPPROTO_ICMPV6), nh(reg1, 8, 16), in("neighbour6", reg1), nh(reg1, 24, 16), in("link6", reg1))
	for _, r := range [][2]byte{{130, 132}, {133, 133}, {135, 135}, {143, 143}} {
		add(nd, th(reg1, 0, 1), between(r), accept())
	}
	add(nd, th(reg1, 0, 1), equal(136), th(reg1, 8, 16), in("neighbour6", reg1), accept())
	for _, s := range sides {
		is := ethertype(s.ether)
		add(is, nh(reg1, s.saddr, s.size), notIn("self"+s.suffix, reg1), drop())
		// What goes on, and what answers.
		flags := func(mask, want byte) exprs {
			return slices.Concat(is, l4proto(unix.IPPROTO_TCP), th(reg1, 13, 1), masked(mask), equal(want))
		}
		for _, set := range []string{"answers" + s.suffix, begun + s.suffix} {
			known := slices.Concat(s.flow(false), in(set, reg32))
			add(flags(synFlag|ackFlag, synFlag|ackFlag), known, accept())
			add(is, l4proto(unix.IPPROTO_TCP), th(reg1, 13, 1), masked(rstFlag|finFlag), unequal(0), th(reg1, 13, 1), masked(synFlag), equal(0), known, remember(set, beginTime), accept())
			add(flags(synFlag|rstFlag|finFlag, 0), known, remember(set, tcpTime), accept())
			for _, p := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
				add(is, l4proto(p), known, remember(set, datagramTime), accept())
			}
		}
		for _, r := range s.replies {
			add(is, l4proto(s.icmp), th(reg1, 0, 1), between(r), nh(reg1, s.daddr, s.size), in("peers"+s.suffix, reg1), accept())
		}
		// What is listed.
		for _, e := range o.List {
			if e.Name != "" || e.Prefix.Addr().BitLen() != s.bits {
				continue
			}
			match := exprs{}
			if e.Port != 0 {
				match = slices.Concat(l4proto(protocols[e.Proto]), th(reg1, 2, 2), equal(byte(e.Port>>8), byte(e.Port)))
			}
			add(is, s.within(e.Prefix), match, accept())
		}
		named := slices.Concat(is, nh(reg1, s.daddr, s.size), in(names+s.suffix, reg1))
		exact := slices.Concat(is, ported(), s.target(true), in(ports+s.suffix, reg32))
		// A connection outlives the answer of the name server.
		begins := remember(begun+s.suffix, beginTime)
		add(named, ported(), s.flow(false), begins)
		add(named, accept())
		add(exact, s.flow(false), begins)
		add(exact, accept())
		// What is left is counted, told of within bounds, and dropped.
		for _, t := range []exprs{slices.Concat(is, ported(), s.target(true)), slices.Concat(is, portless(), s.target(false))} {
			add(t, remember("denied"+s.suffix, deniedTime, &expr.Counter{}))
			add(t, in("told"+s.suffix, reg32), drop())
		}
		add(is, exprs{&expr.Limit{Type: expr.LimitTypePkts, Rate: tellRate, Unit: expr.LimitTimeSecond, Burst: tellBurst, Over: true}}, drop())
		add(is, ported(), s.target(true), remember("told"+s.suffix, toldTime))
		add(is, portless(), s.target(false), remember("told"+s.suffix, toldTime))
		if o.Group != 0 {
			add(is, exprs{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN, Group: o.Group, Snaplen: snapLen}}, drop())
		}

		comes := func(parts ...exprs) { incoming = append(incoming, slices.Concat(append([]exprs{is}, parts...)...)) }
		peer := slices.Concat(nh(reg32, s.saddr, s.size), remember("peers"+s.suffix, peerTime))
		answers := func(d time.Duration) exprs { return slices.Concat(s.flow(true), remember("answers"+s.suffix, d)) }
		comes(l4proto(unix.IPPROTO_TCP), th(reg1, 13, 1), masked(synFlag|ackFlag), equal(synFlag), answers(beginTime))
		comes(l4proto(unix.IPPROTO_TCP), th(reg1, 13, 1), masked(synFlag|ackFlag), equal(synFlag), peer)
		for _, p := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
			comes(l4proto(p), answers(datagramTime))
			comes(l4proto(p), peer)
		}
		comes(l4proto(s.icmp), th(reg1, 0, 1), equal(s.echo), peer)
	}
	return out, incoming
}

// set is one of the table's sets.
type set struct {
	name     string
	typ, len uint32
	flags    uint32
	size     uint32
	keys     [][]byte
	ends     [][]byte // of intervals, first behind
}

func sets(o Options) []set {
	const dynamic = unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL
	out := []set{{name: "ported", typ: typeProto, len: 1, keys: [][]byte{{unix.IPPROTO_TCP}, {unix.IPPROTO_UDP}, {unix.IPPROTO_SCTP}}}}
	self := map[string][][]byte{}
	for _, a := range o.Addrs {
		k := "self4"
		if a.Is6() {
			k = "self6"
		}
		self[k] = append(self[k], a.AsSlice())
	}
	near := append([][]byte{netip.IPv6Unspecified().AsSlice(), linkLocal(o.MAC).AsSlice()}, self["self6"]...)
	link := set{name: "link6", typ: 8, len: 16, flags: unix.NFT_SET_INTERVAL}
	for _, p := range append([]netip.Prefix{netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff02::/16")}, o.Link6...) {
		link.keys = append(link.keys, p.Masked().Addr().AsSlice())
		link.ends = append(link.ends, behind(p))
	}
	out = append(out, set{name: "neighbour6", typ: 8, len: 16, keys: near}, link)
	for _, s := range sides {
		target, targetLen := concat(s.typ, typeProto, typeService), s.size+8
		out = append(out,
			set{name: "self" + s.suffix, typ: s.typ, len: s.size, keys: self["self"+s.suffix]},
			set{name: "answers" + s.suffix, typ: concat(s.typ, typeProto, typeService, typeService), len: s.size + 12, flags: dynamic, size: maxAnswers},
			set{name: "peers" + s.suffix, typ: s.typ, len: s.size, flags: dynamic, size: maxPeers},
			set{name: "denied" + s.suffix, typ: target, len: targetLen, flags: dynamic, size: maxDenied},
			set{name: "told" + s.suffix, typ: target, len: targetLen, flags: dynamic, size: maxDenied},
		)
	}
	return out
}

// turning are the sets that another list has others for.
func turning(o Options) []set {
	const timeout, dynamic = unix.NFT_SET_TIMEOUT, unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL
	var out []set
	for _, s := range sides {
		out = append(out,
			set{name: o.turned("begun") + s.suffix, typ: concat(s.typ, typeProto, typeService, typeService), len: s.size + 12, flags: dynamic, size: maxAnswers},
			set{name: o.turned("names") + s.suffix, typ: s.typ, len: s.size, flags: timeout, size: maxNames},
			set{name: o.turned("ports") + s.suffix, typ: concat(s.typ, typeProto, typeService), len: s.size + 8, flags: timeout, size: maxNames},
		)
	}
	return out
}

// concat is the number of a set's type whose keys are of several.
func concat(types ...uint32) uint32 {
	t := uint32(0)
	for _, x := range types {
		t = t<<typeBits | x
	}
	return t
}

// behind is the first address after a prefix.
func behind(p netip.Prefix) []byte {
	a := p.Masked().Addr().AsSlice()
	for b := p.Bits(); b < len(a)*8; b++ {
		a[b/8] |= 0x80 >> (b % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last.Next().AsSlice()
}

// linkLocal is the address that the kernel gives an interface by its MAC (RFC 4291).
func linkLocal(mac net.HardwareAddr) netip.Addr {
	a := [16]byte{0xfe, 0x80, 11: 0xff, 12: 0xfe}
	copy(a[8:11], mac[:3])
	copy(a[13:], mac[3:])
	a[8] ^= 2
	return netip.AddrFrom16(a)
}

func message(typ int, flags uint16, attrs netlink.Attrs) netlink.Message {
	data := append([]byte{unix.NFPROTO_NETDEV, 0, 0, 0}, attrs...) // struct nfgenmsg: family, version, resource id
	return netlink.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(typ), Flags: flags, Data: data}
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// messages make the whole table.
func messages(o Options) ([]netlink.Message, error) {
	const create = unix.NLM_F_CREATE
	table := tableName(o.Interface)
	msgs := []netlink.Message{message(unix.NFT_MSG_NEWTABLE, create|unix.NLM_F_EXCL, netlink.Attrs{}.
		String(unix.NFTA_TABLE_NAME, table).Bytes(unix.NFTA_TABLE_FLAGS, be32(tableFlagOwner|tableFlagPersist)))}
	msgs = append(msgs, setMessages(table, append(sets(o), turning(o)...))...)
	msgs = append(msgs, opened(o, "answers", o.Flows)...)
	out, incoming := rules(o)
	for _, c := range []struct {
		name   string
		hook   uint32
		policy uint32
		rules  []exprs
	}{{"in", hookEgress, 1, incoming}, {"out", hookIngress, 0, out}} {
		hook := netlink.Attrs{}.Bytes(unix.NFTA_HOOK_HOOKNUM, be32(c.hook)).Bytes(unix.NFTA_HOOK_PRIORITY, be32(0)).String(unix.NFTA_HOOK_DEV, o.Interface)
		msgs = append(msgs, message(unix.NFT_MSG_NEWCHAIN, create, netlink.Attrs{}.String(unix.NFTA_CHAIN_TABLE, table).String(unix.NFTA_CHAIN_NAME, c.name).
			Nest(unix.NFTA_CHAIN_HOOK, hook).Bytes(unix.NFTA_CHAIN_POLICY, be32(c.policy)).String(unix.NFTA_CHAIN_TYPE, "filter")))
		more, err := ruleMessages(table, c.name, c.rules)
		if err != nil {
			return nil, err
		}
		msgs = append(msgs, more...)
	}
	return msgs, nil
}

// setMessages make sets with their elements.
func setMessages(table string, sets []set) (msgs []netlink.Message) {
	for i, s := range sets {
		desc := netlink.Attrs{}
		if s.size > 0 {
			desc = desc.Bytes(unix.NFTA_SET_DESC_SIZE, be32(s.size))
		}
		a := netlink.Attrs{}.String(unix.NFTA_SET_TABLE, table).String(unix.NFTA_SET_NAME, s.name).Bytes(unix.NFTA_SET_ID, be32(uint32(i+1))).
			Bytes(unix.NFTA_SET_FLAGS, be32(s.flags)).Bytes(unix.NFTA_SET_KEY_TYPE, be32(s.typ)).Bytes(unix.NFTA_SET_KEY_LEN, be32(s.len))
		msgs = append(msgs, message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, a.Nest(unix.NFTA_SET_DESC, desc)))
		if len(s.keys) > 0 {
			msgs = append(msgs, elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, table, s.name, s.keys, s.ends, 0))
		}
	}
	return msgs
}

// ruleMessages append rules to a chain.
func ruleMessages(table, chain string, rules []exprs) ([]netlink.Message, error) {
	msgs := make([]netlink.Message, 0, len(rules))
	for _, r := range rules {
		list := netlink.Attrs{}
		for _, e := range r {
			b, err := expr.Marshal(unix.NFPROTO_NETDEV, e)
			if err != nil {
				return nil, fmt.Errorf("egress filter: %w", err)
			}
			list = list.Nest(unix.NFTA_LIST_ELEM, b)
		}
		msgs = append(msgs, message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, table).
			String(unix.NFTA_RULE_CHAIN, chain).Nest(unix.NFTA_RULE_EXPRESSIONS, list)))
	}
	return msgs, nil
}

// elements is a message about elements of a set.
func elements(typ int, flags uint16, table, set string, keys, ends [][]byte, d time.Duration) netlink.Message {
	var list netlink.Attrs
	one := func(key []byte, end bool) {
		el := netlink.Attrs{}.Nest(unix.NFTA_SET_ELEM_KEY, netlink.Attrs{}.Bytes(unix.NFTA_DATA_VALUE, key))
		if end {
			el = el.Bytes(unix.NFTA_SET_ELEM_FLAGS, be32(unix.NFT_SET_ELEM_INTERVAL_END))
		}
		if d > 0 {
			el = el.Bytes(unix.NFTA_SET_ELEM_TIMEOUT, binaryutil.BigEndian.PutUint64(uint64(d.Milliseconds())))
		}
		list = list.Nest(unix.NFTA_LIST_ELEM, el)
	}
	for i, k := range keys {
		one(k, false)
		if ends != nil {
			one(ends[i], true)
		}
	}
	a := netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, table).String(unix.NFTA_SET_ELEM_LIST_SET, set)
	return message(typ, flags, a.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, list))
}
