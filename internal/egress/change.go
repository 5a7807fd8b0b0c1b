package egress

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// Learnt are the names that addresses were looked up by, each with the time until which its answer holds; none is forever.
type Learnt map[netip.Addr]map[string]time.Time

// Flow is one that somebody else began: who answers him is answered, whatever the list says.
type Flow struct {
	Remote netip.AddrPort
	Proto  byte
	// Own is the container's port.
	Own uint16
}

// keys are elements by the name of their set.
type keys map[string][][]byte

func (k keys) add(set string, key []byte) {
	if !slices.ContainsFunc(k[set], func(o []byte) bool { return string(o) == string(key) }) {
		k[set] = append(k[set], key)
	}
}

// name adds what the list of o opens when a name has an address.
func (k keys) name(o Options, name string, a netip.Addr) {
	// Special addresses that a name's owner chose would lead to what nobody listed.
	if a = a.Unmap(); a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return
	}
	for _, e := range o.List {
		if !e.covers(name) {
			continue
		}
		key := a.WithZone("").AsSlice()
		if e.Port == 0 {
			k.add(o.turned("names")+suffix(a), key)
			continue
		}
		k.add(o.turned("ports")+suffix(a), append(key, protocols[e.Proto], 0, 0, 0, byte(e.Port>>8), byte(e.Port), 0, 0))
	}
}

func suffix(a netip.Addr) string {
	if a.Is6() {
		return "6"
	}
	return "4"
}

// allows reports whether a list lets a flow to an address begin, under a name that it was looked up by.
func (l List) allows(a netip.Addr, proto byte, port uint16, learnt Learnt) bool {
	return slices.ContainsFunc(l, func(e Entry) bool {
		if e.Port != 0 && (e.Port != port || protocols[e.Proto] != proto) {
			return false
		}
		if e.Name == "" {
			return e.Prefix.Contains(a)
		}
		for name := range learnt[a] {
			if e.covers(name) {
				return true
			}
		}
		return false
	})
}

// perMessage is how many elements one message holds: an attribute has 64 kB.
const perMessage = 500

// opened are the elements of what was learnt, and of flows in a set.
func opened(o Options, set string, flows []Flow) []netlink.Message {
	now := time.Now()
	byTime := map[time.Duration]keys{}
	at := func(d time.Duration) keys {
		if byTime[d] == nil {
			byTime[d] = keys{}
		}
		return byTime[d]
	}
	for a, names := range o.Learnt {
		// One that two names have stays for the longer time: an element has one.
		k, hold := keys{}, time.Duration(-1)
		for name, until := range names {
			d := until.Sub(now).Truncate(time.Second)
			switch {
			case until.IsZero():
				d = 0
			case d <= 0:
				continue
			}
			before := k.count()
			if k.name(o, name, a); k.count() > before && hold != 0 && (d == 0 || d > hold) {
				hold = d
			}
		}
		for set, ks := range k {
			at(hold)[set] = append(at(hold)[set], ks...)
		}
	}
	for _, f := range flows {
		d := datagramTime
		if f.Proto == unix.IPPROTO_TCP {
			d = tcpTime
		}
		a := f.Remote.Addr()
		at(d)[set+suffix(a)] = append(at(d)[set+suffix(a)], flowKey(a, f.Proto, f.Remote.Port(), f.Own))
	}
	var msgs []netlink.Message
	for d, k := range byTime {
		for set, ks := range k {
			for some := range slices.Chunk(ks, perMessage) {
				msgs = append(msgs, elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, tableName(o.Interface), set, some, nil, d))
			}
		}
	}
	return msgs
}

func (k keys) count() (n int) {
	for _, ks := range k {
		n += len(ks)
	}
	return n
}

// flowKey is an element of the sets answers and begun.
func flowKey(a netip.Addr, proto byte, remote, own uint16) []byte {
	return append(a.AsSlice(), proto, 0, 0, 0, byte(remote>>8), byte(remote), 0, 0, byte(own>>8), byte(own), 0, 0)
}

// Change lets another list pass instead, in one transaction. What others began goes on; what the container began goes on as far as the new
// list allows it, by names that are learnt.
//
// The new rules have sets of their own. A packet that is on its way in that moment sees the rules of before, but of a set what it holds by then:
// with one set for both it could be dropped though both lists allow it. The old sets go with the old rules, when no packet is at them.
func (f *Filter) Change(l List, learnt Learnt) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.c == nil {
		return nil
	}
	o := f.o
	o.List, o.Learnt, o.turn = l, learnt, !o.turn
	out, _ := rules(o)
	rule, err := ruleMessages(f.table, "out", out)
	if err != nil {
		return err
	}
	stay, err := f.staying(l, learnt)
	if err != nil {
		return err
	}
	msgs := slices.Concat(setMessages(f.table, turning(o)), opened(o, o.turned("begun"), stay),
		[]netlink.Message{message(unix.NFT_MSG_DELRULE, 0, netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, f.table).String(unix.NFTA_RULE_CHAIN, "out"))}, rule)
	for _, s := range turning(f.o) {
		msgs = append(msgs, message(unix.NFT_MSG_DELSET, 0, netlink.Attrs{}.String(unix.NFTA_SET_TABLE, f.table).String(unix.NFTA_SET_NAME, s.name)))
	}
	for _, s := range sides { // so that what is denied from now on is told of
		msgs = append(msgs, message(unix.NFT_MSG_DELSETELEM, 0, netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, f.table).String(unix.NFTA_SET_ELEM_LIST_SET, "told"+s.suffix)))
	}
	if err := f.c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...); err != nil {
		return fmt.Errorf("change egress filter of %s: %w", f.o.Interface, err)
	}
	o.Learnt = nil
	f.o = o
	return nil
}

// staying are the flows which the container began and a list allows. What begins after the look is let in again by its name. The caller
// holds f.mu.
func (f *Filter) staying(l List, learnt Learnt) (stay []Flow, err error) {
	for _, s := range sides {
		err := f.each(f.o.turned("begun")+s.suffix, func(key []byte) {
			if len(key) < int(s.size)+12 {
				return
			}
			a, _ := netip.AddrFromSlice(key[:s.size])
			rest := key[s.size:]
			fl := Flow{Proto: rest[0], Remote: netip.AddrPortFrom(a, binary.BigEndian.Uint16(rest[4:])), Own: binary.BigEndian.Uint16(rest[8:])}
			if l.allows(a, fl.Proto, fl.Remote.Port(), learnt) {
				stay = append(stay, fl)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return stay, nil
}

// each calls fn with the keys of a set.
func (f *Filter) each(set string, fn func(key []byte)) error {
	a := netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, f.table).String(unix.NFTA_SET_ELEM_LIST_SET, set)
	replies, err := f.c.Dump(message(unix.NFT_MSG_GETSETELEM, 0, a))
	if err != nil {
		return fmt.Errorf("list %s of %s: %w", set, f.table, err)
	}
	for _, r := range replies {
		if len(r) < 4 {
			continue
		}
		netlink.Each(netlink.Parse(r[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, b []byte) {
			fn(netlink.Parse(netlink.Parse(b)[unix.NFTA_SET_ELEM_KEY])[unix.NFTA_DATA_VALUE])
		})
	}
	return nil
}
