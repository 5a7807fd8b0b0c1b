package portmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// element is one entry of a map or set.
type element struct {
	set      string
	key, val []byte
	end      bool // the key is the first one behind an interval
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
			to        netip.Addr
			fits      bool
			any, addr string
		}{
			{m.IPv4, !host.IsValid() || host.Is4(), mapAny4, mapAddr4},
			{m.IPv6, !host.IsValid() || host.Is6(), mapAny6, mapAddr6},
		} {
			switch {
			case !f.fits || !f.to.IsValid() || host.IsLoopback():
			case !host.IsValid() || host.IsUnspecified():
				out = append(out, element{set: f.any, key: port, val: value(f.to, m.ContainerPort)})
			default:
				out = append(out, element{set: f.addr, key: slices.Concat(host.WithZone("").AsSlice(), port), val: value(f.to, m.ContainerPort)})
			}
		}
		if host.Is4() && host.IsLoopback() {
			out = append(out, element{set: setLocal, key: slices.Concat(host.AsSlice(), port)})
		} else if len(out) > n && m.Bridge != "" {
			out = append(out, element{set: setHairpin, key: slices.Concat(ifnameData(m.Bridge), port)})
		}
	}
	return out
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
		if e.val != nil && typ == unix.NFT_MSG_NEWSETELEM {
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
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	adds := elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, t.Name, es)
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

// get looks one element up and returns its data.
func get(c *netlink.Conn, table string, e element) (found bool, data []byte, err error) {
	m := elementMessage(unix.NFT_MSG_GETSETELEM, 0, table, e.set, []element{e})
	res, err := c.Execute(m)
	if err != nil {
		return false, nil, err
	}
	if errors.Is(res[0].Err, unix.ENOENT) {
		return false, nil, nil
	}
	if res[0].Err != nil {
		return false, nil, fmt.Errorf("look up port in table %s: %w", table, res[0].Err)
	}
	for _, r := range res[0].Replies {
		if len(r) < 4 {
			continue
		}
		list := netlink.Parse(r[4:])[unix.NFTA_SET_ELEM_LIST_ELEMENTS]
		el := netlink.Parse(netlink.Parse(list)[unix.NFTA_LIST_ELEM])
		return true, netlink.Parse(el[unix.NFTA_SET_ELEM_DATA])[unix.NFTA_DATA_VALUE], nil
	}
	return false, nil, nil
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
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	var ours []element
	for _, e := range es {
		if err := ctx.Err(); err != nil {
			return err
		}
		found, data, err := get(c, t.Name, e)
		if err != nil {
			return err
		}
		if found && (e.val == nil || bytes.Equal(data, e.val)) {
			ours = append(ours, e)
		}
	}
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, ours)...)
	if errors.Is(err, unix.ENOENT) {
		// Another process settles the same leftovers. One by one, what is still there goes.
		err = nil
		for _, e := range ours {
			derr := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_DELSETELEM, 0, t.Name, []element{e})...)
			if derr != nil && !errors.Is(derr, unix.ENOENT) {
				err = errors.Join(err, derr)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("remove ports from nftables table %s: %w", t.Name, err)
	}
	return flushUDP(ms, true)
}
