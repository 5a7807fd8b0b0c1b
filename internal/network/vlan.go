package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/linux/netlink"
)

// The drivers macvlan and ipvlan give a container an interface of its own on the host's link, the parent: no bridge, no table, no
// published ports. The host itself can't reach them, nor they the host: the kernel keeps the parent and what hangs on it apart.

// Modes and flags, by the names that options have, with linux/if_link.h's values.
var (
	macvlanModes = map[string]uint32{"": 4, "private": 1, "vepa": 2, "bridge": 4, macvlanPassthru: 8}
	ipvlanModes  = map[string]uint16{"": 0, "l2": 0, "l3": 1, "l3s": 2}
	ipvlanFlags  = map[string]uint16{"": 0, "bridge": 0, "private": 1, "vepa": 2}
)

// macvlanPassthru gives the parent to one container, with its MAC.
const macvlanPassthru = "passthru"

// Attributes of linux/if_link.h.
const (
	iflaMacvlanMode = 1
	iflaIPvlanMode  = 1
	iflaIPvlanFlags = 2
)

// parentMark is the alias of a VLAN's interface that conex made, so that it knows it for its own.
const parentMark = "made by conex"

// ErrUnsupported says that the kernel lacks a kind of interface.
var ErrUnsupported = errors.New("not supported by this kernel")

// kernelOptions are what a kernel is built with to have a kind of interface.
var kernelOptions = map[string]string{DriverMacvlan: "CONFIG_MACVLAN", DriverIPvlan: "CONFIG_IPVLAN", "vlan": "CONFIG_VLAN_8021Q"}

// supported asks the kernel for an interface of a kind without saying what it needs, which makes none.
func supported(kind string) error {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer c.Close()
	info := netlink.Attrs{}.String(unix.IFLA_INFO_KIND, kind)
	err = c.Do(netlink.Message{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Data: linkMessage(0, false).Nest(unix.IFLA_LINKINFO, info)})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("interfaces of kind %s are %w: it is built without %s", kind, ErrUnsupported, kernelOptions[kind])
	}
	return nil // whatever else it complains of
}

func checkParent(_ *Info, v string) error {
	switch {
	case v == "lo":
		return &wordError{"loopback interface is not a valid macvlan parent link"}
	case !validInterface(v):
		return fmt.Errorf("%q can't name an interface", v)
	}
	return nil
}

// checkDriver checks what macvlan and ipvlan need of the kernel, of the parent, and of the networks that share it.
func checkDriver(i *Info, others []Info) error {
	if i.Driver == DriverBridge {
		return nil
	}
	if err := supported(i.Driver); err != nil {
		return err
	}
	if i.Parent == "" {
		return fmt.Errorf("the %s driver needs the interface that it hangs on: -o parent=eth0", i.Driver)
	}
	for _, o := range others {
		switch {
		case o.Parent != i.Parent || o.ConfigOnly():
		case o.Driver != i.Driver:
			return fmt.Errorf("interface %s is the parent of %s network %s: macvlan and ipvlan can't share one", i.Parent, o.Driver, o.Name)
		case o.Options[OptionMacvlanMode] == macvlanPassthru:
			return fmt.Errorf("macvlan network %s is already using parent interface %s in mode passthru", o.Name, i.Parent)
		case i.Options[OptionMacvlanMode] == macvlanPassthru:
			return fmt.Errorf("cannot use mode passthru, macvlan network %s is already using parent interface %s", o.Name, i.Parent)
		}
	}
	_, err := ensureParent(*i)
	return err
}

// ensureParent looks the parent up, and makes it if it is a VLAN of an interface (eth0.10) that is not there.
func ensureParent(i Info) (link, error) {
	l, err := lookLink(i.Parent)
	if !errors.Is(err, unix.ENODEV) {
		return l, err
	}
	base, id, err := parseVLAN(i.Parent)
	if err != nil {
		return l, err
	}
	at, err := lookLink(base)
	if errors.Is(err, unix.ENODEV) {
		return l, fmt.Errorf("failed to find master interface %s of %s on the host", base, i.Parent)
	}
	if err != nil {
		return l, err
	}
	if err := supported("vlan"); err != nil {
		return l, fmt.Errorf("parent %s: %w", i.Parent, err)
	}
	attrs := rtnetlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.Alias = i.Parent, int(at.index), parentMark
	v := &rtnetlink.Vlan{LinkAttrs: attrs, VlanId: id, VlanProtocol: rtnetlink.VLAN_PROTOCOL_8021Q}
	if err := rtnetlink.LinkAdd(v); err != nil && !errors.Is(err, unix.EEXIST) {
		return l, fmt.Errorf("make parent %s: %w", i.Parent, err)
	}
	made, err := rtnetlink.LinkByName(i.Parent)
	if err == nil {
		err = errors.Join(rtnetlink.LinkSetAlias(made, parentMark), rtnetlink.LinkSetUp(made))
	}
	if err != nil {
		return l, fmt.Errorf("set up parent %s: %w", i.Parent, err)
	}
	return lookLink(i.Parent)
}

// parseVLAN splits eth0.10.
func parseVLAN(name string) (base string, id int, err error) {
	k := strings.LastIndexByte(name, '.')
	if k > 0 {
		id, err = strconv.Atoi(name[k+1:])
	}
	if k <= 0 || err != nil || id < 1 || id > 4094 {
		return "", 0, fmt.Errorf("invalid subinterface vlan name %s, example formatting is eth0.10: there is no interface %s", name, name)
	}
	return name[:k], id, nil
}

func lookLink(name string) (link, error) {
	c, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return link{}, err
	}
	defer c.Close()
	res, err := c.Execute(getLink(name))
	if err != nil {
		return link{}, err
	}
	return linkOf(res[0])
}

// dropParent removes a VLAN's interface that conex made when no network of this root needs it any more.
func dropParent(i Info, others []Info) error {
	if i.Parent == "" || slices.ContainsFunc(others, func(o Info) bool { return o.ID != i.ID && o.Parent == i.Parent }) {
		return nil
	}
	l, err := rtnetlink.LinkByName(i.Parent)
	var missing rtnetlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil || l.Attrs().Alias != parentMark {
		return err
	}
	return deleteLink(i.Parent)
}

// sharesMAC reports whether the endpoints have the parent's hardware address.
func (i Info) sharesMAC() bool {
	return i.Driver == DriverIPvlan || i.Driver == DriverMacvlan && i.Options[OptionMacvlanMode] == macvlanPassthru
}

// layer3 reports whether the network has no link: no gateway answers there.
func (i Info) layer3() bool {
	mode := i.Options[OptionIPvlanMode]
	return i.Driver == DriverIPvlan && (mode == "l3" || mode == "l3s")
}

// hang makes a container's interface on the parent, born in the container's network namespace.
//
// It runs in the host's network namespace; a socket opened inside configures the interface.
func hang(i Info, ep *Endpoint, parent link, netns *os.File) error {
	inside, err := enter(ep, netns)
	if err != nil {
		return err
	}
	defer inside.Close()
	host, err := netlink.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer host.Close()
	var data netlink.Attrs
	if i.Driver == DriverMacvlan {
		data = netlink.Attrs{}.Uint32(iflaMacvlanMode, macvlanModes[i.Options[OptionMacvlanMode]])
	} else {
		data = netlink.Attrs{}.Bytes(iflaIPvlanMode, u16(ipvlanModes[i.Options[OptionIPvlanMode]])).Bytes(iflaIPvlanFlags, u16(ipvlanFlags[i.Options[OptionIPvlanFlag]]))
	}
	msg := linkMessage(0, false).String(unix.IFLA_IFNAME, ep.Interface).Uint32(unix.IFLA_MTU, uint32(ep.MTU)).
		Uint32(unix.IFLA_LINK, uint32(parent.index)).Uint32(unix.IFLA_NET_NS_FD, uint32(netns.Fd()))
	if !i.sharesMAC() {
		mac, err := net.ParseMAC(ep.MAC)
		if err != nil {
			return err
		}
		msg = msg.Bytes(unix.IFLA_ADDRESS, mac)
	}
	info := netlink.Attrs{}.String(unix.IFLA_INFO_KIND, i.Driver).Nest(unix.IFLA_INFO_DATA, data)
	err = host.Do(netlink.Message{Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_CREATE | unix.NLM_F_EXCL, Data: msg.Nest(unix.IFLA_LINKINFO, info)})
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("interfaces of kind %s are %w: it is built without %s", i.Driver, ErrUnsupported, kernelOptions[i.Driver])
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("make %s interface on %s: %w: something else uses that interface in another way", i.Driver, i.Parent, err)
	case err != nil:
		return fmt.Errorf("make %s interface on %s: %w", i.Driver, i.Parent, err)
	}
	res, err := inside.Execute(getLink(ep.Interface))
	if err != nil {
		return err
	}
	inner, err := linkOf(res[0])
	if err != nil {
		return fmt.Errorf("look up %s: %w", ep.Interface, err)
	}
	err = inside.Do(append(address(ep, inner.index), getLink(ep.Interface))...)
	if err == nil {
		err = awaitLocal(inside, inner.index, ep.Address6.Addr())
	}
	if err != nil {
		return errors.Join(fmt.Errorf("configure %s: %w", ep.Interface, err), deleteInside(inside, ep.Interface))
	}
	return nil
}

func u16(v uint16) []byte { return binary.NativeEndian.AppendUint16(nil, v) }

// deleteInside removes an interface of another network namespace; no error when there is none.
func deleteInside(c *netlink.Conn, name string) error {
	err := c.Do(netlink.Message{Type: unix.RTM_DELLINK, Data: linkMessage(0, false).String(unix.IFLA_IFNAME, name)})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete interface %s: %w", name, err)
	}
	return nil
}

// drivers are the names that a network's driver may have, for messages.
func drivers() []string {
	return slices.Sorted(maps.Keys(map[string]bool{DriverBridge: true, DriverMacvlan: true, DriverIPvlan: true}))
}
