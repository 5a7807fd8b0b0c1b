package portmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// element is one entry of a map or set.
type element struct {
	set      string
	key, val []byte
	end      bool // the key is the first one behind an interval
	leads    bool // val is the name of a chain
}

// elementsOf are the elements that lead to a mapping's container, and those that keep others from it.
func elementsOf(ms []Mapping) []element {
	var out []element
	for _, m := range ms {
		// Concatenated keys are padded to four bytes a field.
		port := []byte{protoNumber(m.Proto), 0, 0, 0, byte(m.HostPort >> 8), byte(m.HostPort), 0, 0}
		host := m.HostIP.Unmap()
		n := len(out)
		for _, f := range []struct {
			to               netip.Addr
			fits             bool
			any, addr        string
			first, addrFirst string
		}{
			{m.IPv4, !host.IsValid() || host.Is4(), mapAny4, mapAddr4, mapFirst4, mapAddrF4},
			{m.IPv6, !host.IsValid() || host.Is6(), mapAny6, mapAddr6, mapFirst6, mapAddrF6},
		} {
			key, set, first := port, f.any, f.first
			if host.IsValid() && !host.IsUnspecified() {
				key, set, first = slices.Concat(host.WithZone("").AsSlice(), port), f.addr, f.addrFirst
			}
			if !f.fits || !f.to.IsValid() || host.IsLoopback() {
				continue
			}
			out = append(out, element{set: set, key: key, val: value(f.to, m.ContainerPort)})
			if m.Group != 0 {
				out = append(out, element{set: first, key: key, val: []byte(logChain(m.Group)), leads: true})
			}
		}
		if len(out) > n && m.Bridge != "" {
			out = append(out, element{set: setHairpin, key: slices.Concat(ifnameData(m.Bridge), port)})
		}
	}
	return out
}

// logPrefix begins the names of chains that give first packets to a log group; see firsts.
const logPrefix = "log"

func logChain(group uint16) string { return logPrefix + strconv.Itoa(int(group)) }

// snaplen is how much of a logged packet is wanted: all.
const snaplen = 0xffff

// groupsOf are the log groups of mappings.
func groupsOf(ms []Mapping) []uint16 {
	var out []uint16
	for _, m := range ms {
		if m.Group != 0 && !slices.Contains(out, m.Group) {
			out = append(out, m.Group)
		}
	}
	return out
}

// logChains makes the chains of log groups, or sees that they are as they should be. What comes from an internal network ends there:
// the monitor would send it on as the host's own, past the chain that keeps such networks apart.
func logChains(table string, groups []uint16) []netlink.Message {
	var msgs []netlink.Message
	for _, g := range groups {
		name := logChain(g)
		inChain := netlink.Attrs{}.String(unix.NFTA_RULE_TABLE, table).String(unix.NFTA_RULE_CHAIN, name)
		expression := func(a netlink.Attrs, kind string, data netlink.Attrs) netlink.Attrs {
			return a.Nest(unix.NFTA_LIST_ELEM, netlink.Attrs{}.String(unix.NFTA_EXPR_NAME, kind).Nest(unix.NFTA_EXPR_DATA, data))
		}
		dropped := func(exprs netlink.Attrs) netlink.Message {
			exprs = expression(exprs, "immediate", netlink.Attrs{}.Bytes(unix.NFTA_IMMEDIATE_DREG, []byte{0, 0, 0, unix.NFT_REG_VERDICT}).
				Nest(unix.NFTA_IMMEDIATE_DATA, netlink.Attrs{}.Nest(unix.NFTA_DATA_VERDICT, netlink.Attrs{}.Bytes(unix.NFTA_VERDICT_CODE, []byte{0, 0, 0, verdictCodeDrop}))))
			return message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, inChain.Nest(unix.NFTA_RULE_EXPRESSIONS, exprs))
		}
		sealed := expression(nil, "meta", netlink.Attrs{}.Bytes(unix.NFTA_META_DREG, []byte{0, 0, 0, reg1}).Bytes(unix.NFTA_META_KEY, []byte{0, 0, 0, unix.NFT_META_IIFNAME}))
		sealed = expression(sealed, "lookup", netlink.Attrs{}.String(unix.NFTA_LOOKUP_SET, setInternal).Bytes(unix.NFTA_LOOKUP_SREG, []byte{0, 0, 0, reg1}))
		logged := expression(nil, "log", netlink.Attrs{}.Bytes(unix.NFTA_LOG_GROUP, []byte{byte(g >> 8), byte(g)}).
			Bytes(unix.NFTA_LOG_SNAPLEN, []byte{0, 0, snaplen >> 8, snaplen & 0xff}).Bytes(unix.NFTA_LOG_QTHRESHOLD, []byte{0, 1}))
		msgs = append(msgs,
			message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, netlink.Attrs{}.String(unix.NFTA_CHAIN_TABLE, table).String(unix.NFTA_CHAIN_NAME, name)),
			message(unix.NFT_MSG_DELRULE, 0, inChain), dropped(sealed), dropped(logged))
	}
	return msgs
}

// withoutLogChains removes the chains of log groups with their rules. The kernel refuses it (EBUSY) while ports lead to them.
func withoutLogChains(table string, groups []uint16) []netlink.Message {
	var msgs []netlink.Message
	for _, g := range groups {
		msgs = append(msgs, message(unix.NFT_MSG_DELCHAIN, 0, netlink.Attrs{}.String(unix.NFTA_CHAIN_TABLE, table).String(unix.NFTA_CHAIN_NAME, logChain(g))))
	}
	return msgs
}

// value is the data of a port's element: container address and port.
func value(to netip.Addr, port uint16) []byte {
	return append(to.AsSlice(), byte(port>>8), byte(port), 0, 0)
}

// message is one nf_tables request for family inet.
func message(typ int, flags uint16, attrs netlink.Attrs) netlink.Message {
	data := append([]byte{unix.NFPROTO_INET, 0, 0, 0}, attrs...) // struct nfgenmsg: family, version, resource id
	return netlink.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(typ), Flags: flags, Data: data}
}

// elementMessage adds, deletes or gets elements of one set.
func elementMessage(typ int, flags uint16, table, set string, es []element) netlink.Message {
	var list netlink.Attrs
	for _, e := range es {
		el := netlink.Attrs{}.Nest(unix.NFTA_SET_ELEM_KEY, netlink.Attrs{}.Bytes(unix.NFTA_DATA_VALUE, e.key))
		if e.end {
			el = el.Bytes(unix.NFTA_SET_ELEM_FLAGS, []byte{0, 0, 0, unix.NFT_SET_ELEM_INTERVAL_END})
		}
		if e.leads && typ == unix.NFT_MSG_NEWSETELEM {
			v := netlink.Attrs{}.Bytes(unix.NFTA_VERDICT_CODE, []byte{0xff, 0xff, 0xff, 0xfc}).String(unix.NFTA_VERDICT_CHAIN, string(e.val)) // NFT_GOTO
			el = el.Nest(unix.NFTA_SET_ELEM_DATA, netlink.Attrs{}.Nest(unix.NFTA_DATA_VERDICT, v))
		} else if e.val != nil && typ == unix.NFT_MSG_NEWSETELEM {
			el = el.Nest(unix.NFTA_SET_ELEM_DATA, netlink.Attrs{}.Bytes(unix.NFTA_DATA_VALUE, e.val))
		}
		list = list.Nest(unix.NFTA_LIST_ELEM, el)
	}
	a := netlink.Attrs{}.String(unix.NFTA_SET_ELEM_LIST_TABLE, table).String(unix.NFTA_SET_ELEM_LIST_SET, set)
	return message(typ, flags, a.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, list))
}

// perMessage bounds the elements of a message: its attribute length is 16 bits.
const perMessage = 500

func elementMessages(typ int, flags uint16, table string, es []element) []netlink.Message {
	var msgs []netlink.Message
	for _, set := range setNames {
		var of []element
		for _, e := range es {
			if e.set == set {
				of = append(of, e)
			}
		}
		for len(of) > 0 {
			k := min(len(of), perMessage)
			msgs = append(msgs, elementMessage(typ, flags, table, set, of[:k]))
			of = of[k:]
		}
	}
	return msgs
}

// add puts the elements of ms into the table, in one transaction. The caller holds the host ports.
func add(t Table, ms []Mapping) error {
	es := elementsOf(ms)
	if len(es) == 0 {
		return nil
	}
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	adds := append(logChains(t.Name, groupsOf(ms)), elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, t.Name, es)...)
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, adds...)
	if errors.Is(err, unix.ENOENT) {
		// Somebody flushed the ruleset since Attach.
		if err := build(t); err != nil {
			return err
		}
		err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, adds...)
	}
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		// Leftovers of a monitor that died: its listener is gone, since we have the port, so these are nobody's.
		var stale []element
		for _, e := range es {
			found, _, gerr := get(c, t.Name, e)
			if gerr != nil {
				return gerr
			}
			if found {
				stale = append(stale, e)
			}
		}
		msgs := append(elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, stale), adds...)
		err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...)
	}
	if err != nil {
		return fmt.Errorf("add ports to nftables table %s: %w", t.Name, err)
	}
	return flushUDP(ms, false)
}

// perLook bounds how many elements are asked for at once: the answers wait in the socket.
const perLook = 100

// there is what the kernel has of an element.
type there struct {
	found bool
	data  []byte
}

// get looks one element up and returns its data.
func get(c *netlink.Conn, table string, e element) (found bool, data []byte, err error) {
	t, err := look(c, table, []element{e})
	if err != nil {
		return false, nil, err
	}
	return t[0].found, t[0].data, nil
}

// look looks up to perLook elements up, in one round trip.
func look(c *netlink.Conn, table string, es []element) ([]there, error) {
	msgs := make([]netlink.Message, len(es))
	for k, e := range es {
		msgs[k] = elementMessage(unix.NFT_MSG_GETSETELEM, 0, table, e.set, []element{e})
	}
	res, err := c.Execute(msgs...)
	if err != nil {
		return nil, err
	}
	out := make([]there, len(es))
	for k, e := range es {
		if errors.Is(res[k].Err, unix.ENOENT) {
			continue
		}
		if res[k].Err != nil {
			return nil, fmt.Errorf("look up port in table %s: %w", table, res[k].Err)
		}
		for _, r := range res[k].Replies {
			if len(r) < 4 {
				continue
			}
			list := netlink.Parse(r[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS]
			el := netlink.Parse(netlink.Parse(list)[unix.NFTA_LIST_ELEM])
			d := netlink.Parse(el[unix.NFTA_SET_ELEM_DATA])
			out[k] = there{true, d[unix.NFTA_DATA_VALUE]}
			if e.leads {
				out[k].data = []byte(text(netlink.Parse(d[unix.NFTA_DATA_VERDICT])[unix.NFTA_VERDICT_CHAIN]))
			}
		}
	}
	return out, nil
}

// unshared are the elements that go with ms: that a bridge's own containers take the forwarder may be needed by a port of the same number
// on another address.
func unshared(t Table, ms []Mapping) ([]element, error) {
	es := elementsOf(ms)
	if t.Live == nil || !slices.ContainsFunc(ms, func(m Mapping) bool { return m.HostIP.IsValid() }) {
		return es, nil
	}
	live, err := t.Live()
	if err != nil {
		return nil, err
	}
	others := elementsOf(slices.DeleteFunc(live, func(m Mapping) bool { return slices.Contains(ms, m) }))
	return slices.DeleteFunc(es, func(e element) bool {
		return e.set == setHairpin && slices.ContainsFunc(others, func(o element) bool { return o.set == e.set && bytes.Equal(o.key, e.key) })
	}), nil
}

// Withdraw removes the elements of ms that still lead to their container; those that a newer container took over stay.
// Idempotent, and no error when the table is gone. It serves Close and what a dead monitor left. ctx ends it between elements.
func Withdraw(ctx context.Context, t Table, ms []Mapping) error {
	es, err := unshared(t, ms)
	if err != nil {
		return err
	}
	if len(es) == 0 {
		return nil
	}
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.CloseBehind()
	var ours []element
	for part := range slices.Chunk(es, perLook) {
		if err := ctx.Err(); err != nil {
			return err
		}
		there, err := look(c, t.Name, part)
		if err != nil {
			return err
		}
		for k, e := range part {
			if there[k].found && (e.val == nil || bytes.Equal(there[k].data, e.val)) {
				ours = append(ours, e)
			}
		}
	}
	msgs := elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, ours)
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, append(msgs, withoutLogChains(t.Name, groupsOf(ms))...)...)
	if errors.Is(err, unix.EBUSY) {
		err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...) // other ports still lead to the chain
	}
	if errors.Is(err, unix.ENOENT) {
		// Another process settles the same leftovers. One by one, what is still there goes.
		err = nil
		var one []netlink.Message
		for _, e := range ours {
			one = append(one, elementMessage(unix.NFT_MSG_DELSETELEM, 0, t.Name, e.set, []element{e}))
		}
		for _, m := range append(one, withoutLogChains(t.Name, groupsOf(ms))...) {
			if derr := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, m); derr != nil && !errors.Is(derr, unix.EBUSY) && !gone(derr) {
				err = errors.Join(err, derr)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("remove ports from nftables table %s: %w", t.Name, err)
	}
	return flushUDP(ms, true)
}

// move makes the elements of was lead where those of is do, in one transaction. The caller holds the host ports.
func move(t Table, was, is []Mapping) error {
	in := func(es []element, e element) bool {
		return slices.ContainsFunc(es, func(o element) bool { return o.set == e.set && bytes.Equal(o.key, e.key) && bytes.Equal(o.val, e.val) })
	}
	old, err := unshared(t, was)
	if err != nil {
		return err
	}
	come := elementsOf(is)
	stay := slices.Clone(old)
	old = slices.DeleteFunc(old, func(e element) bool { return in(come, e) })
	come = slices.DeleteFunc(come, func(e element) bool { return in(stay, e) })
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	msgs := append(elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, old), elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, t.Name, come)...)
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...)
	if errors.Is(err, unix.ENOENT) {
		return add(t, is) // somebody has taken the table, or elements of it, away
	}
	if err != nil {
		return fmt.Errorf("move ports in nftables table %s: %w", t.Name, err)
	}
	return flushUDP(was, true)
}

// Missing counts the elements of published ports that the table should have and has not. Callers hold the table's lock.
func Missing(ctx context.Context, t Table) (int, error) {
	want, _, err := everything(t)
	if err != nil {
		return 0, err
	}
	c, err := t.dial()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	n := 0
	for set, es := range want {
		if slices.Contains([]string{setBridges, setPairs, setInternal, setSubnets4, setSubnets6, setGuard}, set) {
			continue // they come with their bridge; see Standing
		}
		for _, e := range es {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			found, _, err := get(c, t.Name, element{set: set, key: e.Key})
			if err != nil {
				return 0, err
			}
			if !found {
				n++
			}
		}
	}
	return n, nil
}
