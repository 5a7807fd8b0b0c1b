package portmap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// element is one entry of a map or set.
type element struct {
	set      string
	key, val []byte
}

func elementsOf(ms []Mapping) []element {
	var out []element
	for _, m := range ms {
		ip := m.HostIP.Unmap()
		switch set, key, ok := m.key(); {
		case !m.ContainerIP.Is4():
		case ok:
			out = append(out, element{set, key, m.value()})
		case ip.Is4() && ip.IsLoopback():
			a := ip.As4()
			m.HostIP = netip.Addr{}
			_, key, _ := m.key()
			out = append(out, element{setLocal, append(a[:], key...), nil})
		}
	}
	return out
}

// message is one nf_tables request for family ip.
func message(typ int, flags uint16, attrs netlink.Attrs) netlink.Message {
	data := append([]byte{unix.NFPROTO_IPV4, 0, 0, 0}, attrs...) // struct nfgenmsg: family, version, resource id
	return netlink.Message{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | uint16(typ), Flags: flags, Data: data}
}

// elementMessage adds, deletes or gets elements of one set.
func elementMessage(typ int, flags uint16, table, set string, es []element) netlink.Message {
	var list netlink.Attrs
	for _, e := range es {
		el := netlink.Attrs{}.Nest(unix.NFTA_SET_ELEM_KEY, netlink.Attrs{}.Bytes(unix.NFTA_DATA_VALUE, e.key))
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
	for _, set := range []string{mapAny, mapAddr, setLocal} {
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
func add(n Network, ms []Mapping) error {
	es := elementsOf(ms)
	if len(es) == 0 {
		return nil
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	adds := elementMessages(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, n.Table, es)
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, adds...)
	if errors.Is(err, unix.ENOENT) {
		// Somebody flushed the ruleset since Attach.
		if err := build(n); err != nil {
			return err
		}
		err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, adds...)
	}
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
		// Leftovers of a monitor that died: its listener is gone, since we have the port, so these are nobody's.
		var stale []element
		for _, e := range es {
			found, _, gerr := get(c, n.Table, e)
			if gerr != nil {
				return gerr
			}
			if found {
				stale = append(stale, e)
			}
		}
		msgs := append(elementMessages(unix.NFT_MSG_DELSETELEM, 0, n.Table, stale), adds...)
		err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, msgs...)
	}
	if err != nil {
		return fmt.Errorf("add ports to nftables table %s: %w", n.Table, err)
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

// Withdraw removes the elements of ms that still lead to their container; those that a newer container took over stay.
// Idempotent, and no error when the table is gone. It serves Close and what a dead monitor left. ctx ends it between elements.
func Withdraw(ctx context.Context, n Network, ms []Mapping) error {
	es := elementsOf(ms)
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
		found, data, err := get(c, n.Table, e)
		if err != nil {
			return err
		}
		if found && (e.val == nil || bytes.Equal(data, e.val)) {
			ours = append(ours, e)
		}
	}
	err = c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_DELSETELEM, 0, n.Table, ours)...)
	if errors.Is(err, unix.ENOENT) {
		// Another process settles the same leftovers. One by one, what is still there goes.
		err = nil
		for _, e := range ours {
			derr := c.Transaction(unix.NFNL_SUBSYS_NFTABLES, elementMessages(unix.NFT_MSG_DELSETELEM, 0, n.Table, []element{e})...)
			if derr != nil && !errors.Is(derr, unix.ENOENT) {
				err = errors.Join(err, derr)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("remove ports from nftables table %s: %w", n.Table, err)
	}
	return flushUDP(ms, true)
}
