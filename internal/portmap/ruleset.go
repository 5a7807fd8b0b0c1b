package portmap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// ruleset is what others have in nf_tables, for asking what becomes of a packet. It is read once; elements of sets when a rule needs them.
type ruleset struct {
	c      *netlink.Conn
	chains []foreignChain
	rules  map[string][]foreignRule // by chain's key
	sets   map[string]*foreignSet
}

// foreignSet is a set's or map's elements, in the order of their keys.
type foreignSet struct {
	elements []foreignElement
	interval bool
}

type foreignElement struct {
	key   []byte
	end   bool
	code  int32
	chain string
	leads bool
}

// flow is a packet as far as it is known.
type flow struct {
	family   byte
	proto    byte
	port     uint16 // destination
	iif, oif string
	ctState  uint32 // bits as ct state has them
	dnat     bool
	local    bool // for the host itself
}

// fate is what becomes of it in others' chains of a hook.
type fate struct {
	verdict string // accept, drop, reject
	by      string // what dropped it; empty for accept
	// chain is the base chain that did, policy says that no rule of it was met.
	chain  foreignChain
	policy bool
	// perhaps are rules that may decide otherwise, by something that is not known of the packet.
	perhaps []string
}

// readRuleset reads everything but the table of conex and its elements.
func readRuleset(c *netlink.Conn, own string) (*ruleset, error) {
	chains, err := foreignChains(c)
	if err != nil {
		return nil, err
	}
	s := &ruleset{c: c, rules: map[string][]foreignRule{}, sets: map[string]*foreignSet{}}
	seen := map[string]bool{}
	for _, ch := range chains {
		if ch.family == unix.NFPROTO_INET && ch.table == own {
			continue
		}
		s.chains = append(s.chains, ch)
		if t := fmt.Sprint(ch.family, ch.table); !seen[t] {
			seen[t] = true
			rules, err := foreignRules(c, ch.family, ch.table, "")
			if err != nil {
				return nil, err
			}
			for _, r := range rules {
				k := chainKey(r.family, r.table, r.chain)
				s.rules[k] = append(s.rules[k], r)
			}
		}
	}
	return s, nil
}

func chainKey(family byte, table, chain string) string {
	return fmt.Sprint(family, " ", table, " ", chain)
}

// ask walks all filter chains of a hook.
func (s *ruleset) ask(hook uint32, p flow) fate {
	var base []foreignChain
	for _, ch := range s.chains {
		if ch.hooked && ch.hook == hook && ch.typ == "filter" && (ch.family == unix.NFPROTO_INET || ch.family == p.family) {
			base = append(base, ch)
		}
	}
	slices.SortStableFunc(base, func(a, b foreignChain) int { return int(a.priority) - int(b.priority) })
	out := fate{verdict: "accept"}
	for _, ch := range base {
		w := walk{s: s, p: p, perhaps: &out.perhaps}
		v, by := w.chain(ch.family, ch.table, ch.name, 0)
		if v == "" || v == "return" {
			if v = "accept"; ch.drops {
				v, by, out.policy = "drop", "the policy of "+where(ch.family, ch.table, ch.name), true
			}
		}
		if v != "accept" {
			out.verdict, out.by, out.chain = v, by, ch
			return out
		}
	}
	return out
}

// where names a chain by the tool that people know it from.
func where(family byte, table, chain string) string {
	fam := map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}[family]
	switch {
	case table == "firewalld":
		return "firewalld's chain " + chain
	case table == "filter" && family != unix.NFPROTO_INET && strings.HasPrefix(chain, "ufw"):
		return "ufw's chain " + chain
	case table == "filter" && family != unix.NFPROTO_INET && strings.HasPrefix(chain, "DOCKER"):
		return "Docker's chain " + chain
	case table == "filter" && family == unix.NFPROTO_IPV4 && strings.ToUpper(chain) == chain:
		return "iptables' chain " + chain
	case table == "filter" && family == unix.NFPROTO_IPV6 && strings.ToUpper(chain) == chain:
		return "ip6tables' chain " + chain
	}
	return fmt.Sprintf("chain %s of the nftables table %s %s", chain, fam, table)
}

// walk is one packet's way through one base chain.
type walk struct {
	s       *ruleset
	p       flow
	perhaps *[]string
	steps   int
}

// Bounds of a walk: the kernel allows 16 jumps, and nobody's rules are this many.
const (
	maxJumps = 16
	maxSteps = 100_000
)

// chain returns accept, drop, reject, return, or "" at the chain's end.
func (w *walk) chain(family byte, table, name string, depth int) (verdict, by string) {
	if depth > maxJumps {
		return "", ""
	}
	for n, r := range w.s.rules[chainKey(family, table, name)] {
		if w.steps++; w.steps > maxSteps {
			return "", ""
		}
		sure, v, to := w.rule(&r)
		at := fmt.Sprintf("rule %d of %s", n+1, where(family, table, name))
		if !sure {
			if v == "drop" || v == "reject" || v == "accept" {
				w.note(at + " (" + v + ")")
			}
			if v == "jump" || v == "goto" {
				// What stands there counts for some packets, so whatever it says is said of some.
				if v, by := w.chain(family, table, to, depth+1); v == "drop" || v == "reject" {
					w.note(by + " (" + v + ")")
				}
			}
			continue
		}
		switch v {
		case "accept", "return":
			return v, ""
		case "drop", "reject":
			return v, at
		case "jump", "goto":
			inner, by := w.chain(family, table, to, depth+1)
			if inner == "accept" || inner == "drop" || inner == "reject" {
				return inner, by
			}
			if v == "goto" {
				return "return", ""
			}
		}
	}
	return "", ""
}

func (w *walk) note(s string) {
	if len(*w.perhaps) < 4 && !slices.Contains(*w.perhaps, s) {
		*w.perhaps = append(*w.perhaps, s)
	}
}

// rule says whether a rule is met for certain, and what it then does; "" when it isn't met.
func (w *walk) rule(r *foreignRule) (sure bool, verdict, to string) {
	sure = true
	regs := registers{}
	for _, e := range r.exprs {
		if code, chain, ok := e.verdict(); ok {
			return sure, verdictName(code), chain
		}
		switch e.name {
		case "counter", "log", "notrack", "last", "objref":
		case "meta", "payload", "ct", "fib", "immediate":
			w.load(e, regs)
		case "bitwise":
			regs.bitwise(e)
		case "cmp":
			switch met, known := regs.compare(e); {
			case !known:
				sure = false
			case !met:
				return true, "", ""
			}
		case "range":
			switch met, known := regs.within(e); {
			case !known:
				sure = false
			case !met:
				return true, "", ""
			}
		case "lookup":
			el, known := w.lookup(r, e, regs)
			inv, _ := e.number(unix.NFTA_LOOKUP_FLAGS)
			_, isMap := e.data[unix.NFTA_LOOKUP_DREG]
			switch {
			case !known:
				sure = false
			case (el == nil) != (inv&1 != 0):
				return true, "", ""
			case isMap && el != nil && el.leads:
				return sure, verdictName(el.code), el.chain
			}
		case "match":
			switch met, known := xtMatch(text(e.data[unix.NFTA_MATCH_NAME]), e.data[unix.NFTA_MATCH_INFO], w.p); {
			case !known:
				sure = false
			case !met:
				return true, "", ""
			}
		case "target":
			if text(e.data[unix.NFTA_TARGET_NAME]) == "REJECT" {
				return sure, "reject", ""
			}
		case "reject":
			return sure, "reject", ""
		default:
			sure = false
		}
	}
	return true, "", ""
}

func verdictName(code int32) string {
	switch code {
	case verdictCodeDrop:
		return "drop"
	case verdictCodeAccept:
		return "accept"
	case unix.NFT_JUMP:
		return "jump"
	case unix.NFT_GOTO:
		return "goto"
	case unix.NFT_RETURN:
		return "return"
	}
	return ""
}

// registers are what rules have loaded: nil for what is not known.
type registers map[uint32][]byte

// slot makes one number of the two ways to name a register: four of 16 bytes, and sixteen of four.
func slot(n uint32) uint32 {
	if n >= unix.NFT_REG32_00 {
		return n - unix.NFT_REG32_00
	}
	return (n - 1) * 4
}

// load puts a part of the packet into a register.
func (w *walk) load(e foreignExpr, regs registers) {
	attr := map[string]uint16{"meta": unix.NFTA_META_DREG, "payload": unix.NFTA_PAYLOAD_DREG, "ct": unix.NFTA_CT_DREG, "fib": unix.NFTA_FIB_DREG, "immediate": unix.NFTA_IMMEDIATE_DREG}[e.name]
	dst, ok := e.number(attr)
	if !ok {
		return // it sets something
	}
	var v []byte
	switch e.name {
	case "meta":
		key, _ := e.number(unix.NFTA_META_KEY)
		v = w.meta(key)
	case "payload":
		base, _ := e.number(unix.NFTA_PAYLOAD_BASE)
		off, _ := e.number(unix.NFTA_PAYLOAD_OFFSET)
		n, _ := e.number(unix.NFTA_PAYLOAD_LEN)
		next := uint32(9)
		if w.p.family == unix.NFPROTO_IPV6 {
			next = 6
		}
		switch {
		case base == unix.NFT_PAYLOAD_TRANSPORT_HEADER && off == 2 && n == 2:
			v = binary.BigEndian.AppendUint16(nil, w.p.port)
		case base == unix.NFT_PAYLOAD_NETWORK_HEADER && off == next && n == 1:
			v = []byte{w.p.proto}
		}
	case "ct":
		switch key, _ := e.number(unix.NFTA_CT_KEY); key {
		case unix.NFT_CT_STATE:
			v = binary.NativeEndian.AppendUint32(nil, w.p.ctState)
		case unix.NFT_CT_STATUS:
			var bits uint32
			if w.p.dnat {
				bits = ctStatusDstNAT
			}
			v = binary.NativeEndian.AppendUint32(nil, bits)
		}
	case "fib":
		flags, _ := e.number(unix.NFTA_FIB_FLAGS)
		result, _ := e.number(unix.NFTA_FIB_RESULT)
		if w.p.local && result == unix.NFT_FIB_RESULT_ADDRTYPE && flags == unix.NFTA_FIB_F_DADDR {
			v = binary.NativeEndian.AppendUint32(nil, rtnLocal)
		}
	case "immediate":
		v = e.value(unix.NFTA_IMMEDIATE_DATA)
	}
	regs[slot(dst)] = v
}

func (w *walk) meta(key uint32) []byte {
	switch key {
	case unix.NFT_META_IIFNAME:
		return ifnameData(w.p.iif)
	case unix.NFT_META_OIFNAME:
		return ifnameData(w.p.oif)
	case unix.NFT_META_NFPROTO:
		return []byte{w.p.family}
	case unix.NFT_META_L4PROTO:
		return []byte{w.p.proto}
	case unix.NFT_META_PROTOCOL:
		if w.p.family == unix.NFPROTO_IPV6 {
			return []byte{0x86, 0xdd}
		}
		return []byte{0x08, 0x00}
	}
	return nil
}

// bitwise computes (a & mask) ^ xor.
func (r registers) bitwise(e foreignExpr) {
	src, okS := e.number(unix.NFTA_BITWISE_SREG)
	dst, okD := e.number(unix.NFTA_BITWISE_DREG)
	if !okS || !okD {
		return
	}
	a, mask, xor := r[slot(src)], e.value(unix.NFTA_BITWISE_MASK), e.value(unix.NFTA_BITWISE_XOR)
	if a == nil || len(mask) > len(a) || len(xor) != len(mask) {
		r[slot(dst)] = nil
		return
	}
	v := make([]byte, len(mask))
	for i := range v {
		v[i] = a[i]&mask[i] ^ xor[i]
	}
	r[slot(dst)] = v
}

func (r registers) compare(e foreignExpr) (met, known bool) {
	src, ok := e.number(unix.NFTA_CMP_SREG)
	op, okOp := e.number(unix.NFTA_CMP_OP)
	a, b := r[slot(src)], e.value(unix.NFTA_CMP_DATA)
	if !ok || !okOp || a == nil || len(b) == 0 || len(b) > len(a) {
		return false, false
	}
	c := bytes.Compare(a[:len(b)], b)
	switch op {
	case unix.NFT_CMP_EQ:
		return c == 0, true
	case unix.NFT_CMP_NEQ:
		return c != 0, true
	case unix.NFT_CMP_LT:
		return c < 0, true
	case unix.NFT_CMP_LTE:
		return c <= 0, true
	case unix.NFT_CMP_GT:
		return c > 0, true
	case unix.NFT_CMP_GTE:
		return c >= 0, true
	}
	return false, false
}

func (r registers) within(e foreignExpr) (met, known bool) {
	src, ok := e.number(unix.NFTA_RANGE_SREG)
	op, okOp := e.number(unix.NFTA_RANGE_OP)
	a, lo, hi := r[slot(src)], e.value(unix.NFTA_RANGE_FROM_DATA), e.value(unix.NFTA_RANGE_TO_DATA)
	if !ok || !okOp || a == nil || len(lo) == 0 || len(lo) > len(a) || len(hi) != len(lo) {
		return false, false
	}
	in := bytes.Compare(a[:len(lo)], lo) >= 0 && bytes.Compare(a[:len(hi)], hi) <= 0
	return in == (op == unix.NFT_RANGE_EQ), true
}

// lookup finds the element of a register's value; nil without one. Keys of several parts are not understood.
func (w *walk) lookup(r *foreignRule, e foreignExpr, regs registers) (el *foreignElement, known bool) {
	src, ok := e.number(unix.NFTA_LOOKUP_SREG)
	a := regs[slot(src)]
	if !ok || a == nil {
		return nil, false
	}
	name := text(e.data[unix.NFTA_LOOKUP_SET])
	k := chainKey(r.family, r.table, name)
	set, there := w.s.sets[k]
	if !there {
		set = readSet(w.s.c, r.family, r.table, name)
		w.s.sets[k] = set
	}
	if set == nil {
		return nil, false
	}
	return set.find(a)
}

// readSet fetches a set's elements; nil when it can't be read.
func readSet(c *netlink.Conn, family byte, table, name string) *foreignSet {
	if c == nil {
		return nil
	}
	msgs, err := dump(c, foreignMessage(unix.NFT_MSG_GETSETELEM, family, netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, table).String(unix.NFTA_SET_ELEM_LIST_SET, name)))
	if err != nil {
		return nil
	}
	s := &foreignSet{}
	for _, m := range msgs {
		s.read(m)
	}
	slices.SortStableFunc(s.elements, func(a, b foreignElement) int { return bytes.Compare(a.key, b.key) })
	return s
}

func (s *foreignSet) read(m []byte) {
	if len(m) < 4 {
		return
	}
	netlink.Each(netlink.Parse(m[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, data []byte) {
		a := netlink.Parse(data)
		e := foreignElement{key: netlink.Parse(a[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE]}
		flags, _ := big32(a[unix.NFTA_SET_ELEM_FLAGS])
		e.end = flags&unix.NFT_SET_ELEM_INTERVAL_END != 0
		s.interval = s.interval || e.end
		if v, there := netlink.Parse(a[unix.NFTA_SET_ELEM_DATA])[unix.NFTA_DATA_VERDICT]; there {
			p := netlink.Parse(v)
			code, ok := big32(p[unix.NFTA_VERDICT_CODE])
			e.code, e.chain, e.leads = int32(code), text(p[unix.NFTA_VERDICT_CHAIN]), ok
		}
		if len(e.key) > 0 {
			s.elements = append(s.elements, e)
		}
	})
}

func (s *foreignSet) find(a []byte) (el *foreignElement, known bool) {
	for i := range s.elements {
		e := &s.elements[i]
		if len(e.key) > len(a) {
			return nil, false
		}
		switch c := bytes.Compare(e.key, a[:len(e.key)]); {
		case s.interval && c <= 0:
			if el = e; e.end {
				el = nil
			}
		case !s.interval && c == 0:
			return e, true
		}
	}
	return el, true
}

// xtMatch understands the matches that iptables, ufw and dockerd use most. info is the match's structure of the kernel.
func xtMatch(name string, info []byte, p flow) (met, known bool) {
	u16 := func(at int) uint16 { return binary.NativeEndian.Uint16(info[at:]) }
	switch {
	case name == "comment":
		return true, true
	case (name == "tcp" || name == "udp") && len(info) >= 9: // spts[2], dpts[2]; tcp: option, flg_mask, flg_cmp, invflags; udp: invflags
		proto := map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}[name]
		if p.proto != proto {
			return false, true
		}
		inv, invAt := byte(0), 8
		if name == "tcp" {
			invAt = 11
		}
		if len(info) > invAt {
			inv = info[invAt]
		}
		if in := p.port >= u16(4) && p.port <= u16(6); in == (inv&2 != 0) {
			return false, true
		}
		if u16(0) != 0 || u16(2) != 0xffff || name == "tcp" && (info[8] != 0 || info[9] != 0) {
			return false, false // by source port, option or flags
		}
		return true, true
	case name == "multiport" && len(info) >= 48: // flags, count, ports[15], pflags[15], invert
		if info[0] != 1 {
			return false, false
		}
		in := false
		for i := 0; i < min(int(info[1]), 15); i++ {
			lo, hi := u16(2+2*i), u16(2+2*i)
			if info[32+i] != 0 && i+1 < 15 {
				i++
				hi = u16(2 + 2*i)
			}
			in = in || p.port >= lo && p.port <= hi
		}
		return in != (info[47] != 0), true
	case name == "conntrack" && len(info) >= 154:
		if u16(146) != 1 { // by more than the state
			return false, false
		}
		state := p.ctState
		if p.dnat {
			state |= 1 << 7
		}
		return (uint32(u16(150))&state != 0) != (u16(148)&1 != 0), true
	case name == "state" && len(info) >= 4:
		return binary.NativeEndian.Uint32(info)&p.ctState != 0, true
	case name == "addrtype" && len(info) >= 8 && p.local && u16(0) == 0 && binary.NativeEndian.Uint32(info[4:]) == 0:
		return u16(2)&(1<<rtnLocal) != 0, true
	}
	return false, false
}
