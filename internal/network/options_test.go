package network

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/linux/netlink"
)

func TestCheckOptions(t *testing.T) {
	for _, c := range []struct {
		driver, option string // NAME=VALUE
		internal       bool
		want           string // a part of the error, "" for none
	}{
		{DriverBridge, OptionICC + "=false", false, ""},
		{DriverBridge, OptionICC + "=0", false, ""},
		{DriverBridge, OptionICC + "=", false, "failed to parse value"},
		{DriverBridge, OptionMasquerade + "=perhaps", false, "failed to parse value: perhaps"},
		{DriverBridge, OptionMTU + "=1400", false, ""},
		{DriverBridge, OptionMTU + "=0", false, ""},
		{DriverBridge, OptionMTU + "=67", false, "invalid MTU 67"},
		{DriverBridge, OptionMTU + "=65536", false, "invalid MTU 65536"},
		{DriverBridge, OptionBinding + "=127.0.0.1", false, ""},
		{DriverBridge, OptionBinding + "=::1", false, "an IPv4 address"},
		{DriverBridge, OptionBridgeName + "=br-x", false, ""},
		{DriverBridge, OptionBridgeName + "=lo", false, "taken by an interface"},
		{DriverBridge, OptionBridgeName + "=..", false, "can't name an interface"},
		{DriverBridge, OptionBridgeName + "=a/b", false, "can't name an interface"},
		{DriverBridge, OptionBridgeName + "=cxb1", false, "a name that conex gives itself"},
		{DriverBridge, OptionBridgeName + "=0123456789abcdef", false, "can't name an interface"},
		{DriverBridge, OptionIfacePrefix + "=dev", false, ""},
		{DriverBridge, OptionIfacePrefix + "=lo", false, "can't begin"},
		{DriverBridge, OptionIfacePrefix + "=0123456789abcd", false, "can't begin"},
		{DriverBridge, OptionGatewayMode4 + "=nat", false, ""},
		{DriverBridge, OptionGatewayMode4 + "=isolated", false, "add --internal"},
		{DriverBridge, OptionGatewayMode4 + "=isolated", true, ""},
		{DriverBridge, OptionGatewayMode6 + "=routed", false, "routed is refused"},
		{DriverBridge, OptionGatewayMode6 + "=x", false, "unknown gateway mode x"},
		{DriverBridge, "com.docker.network.bridge.default_bridge=true", false, "is refused"},
		{DriverBridge, "com.docker.network.bridge.nosuch=true", false, "is not known to the bridge driver"},
		{DriverBridge, OptionParent + "=eth0", false, "is not known to the bridge driver"},
		{DriverMacvlan, OptionParent + "=eth0", false, ""},
		{DriverMacvlan, OptionParent + "=lo", false, "loopback interface is not a valid macvlan parent link"},
		{DriverMacvlan, OptionMacvlanMode + "=l2", false, "requested macvlan mode 'l2' is not valid"},
		{DriverMacvlan, OptionICC + "=false", false, "is not known to the macvlan driver"},
		{DriverIPvlan, OptionIPvlanMode + "=l3s", false, ""},
		{DriverIPvlan, OptionIPvlanMode + "=bridge", false, "requested ipvlan mode 'bridge' is not valid"},
		{DriverIPvlan, OptionIPvlanFlag + "=private", false, ""},
		{DriverIPvlan, OptionIPvlanFlag + "=x", false, "requested ipvlan flag 'x' is not valid"},
	} {
		name, value, _ := strings.Cut(c.option, "=")
		err := checkOptions(&Info{Driver: c.driver, Internal: c.internal, Options: map[string]string{name: value}})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: error %v, want %q", c.driver, c.option, err, c.want)
		}
	}
}

func TestEndpointOptions(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{EndpointIfname, "lan0", ""},
		{EndpointIfname, "lo", "can't name an interface"},
		{EndpointIfname, "a/b", "can't name an interface"},
		{EndpointSysctls, "net.ipv4.conf.IFNAME.log_martians=1,net.ipv6.conf.ifname.accept_ra=0", ""},
		{EndpointSysctls, "net.ipv4.ip_forward=1", "unrecognised network interface sysctl"},
		{EndpointSysctls, "net.ipv4.conf.eth0.log_martians=1", "unrecognised network interface sysctl"},
		{EndpointSysctls, "net.ipv4.../../kernel.IFNAME.x=1", "unrecognised network interface sysctl"},
		{EndpointSysctls, "net.core.conf.IFNAME.x=1", "unrecognised network interface sysctl"},
		{EndpointSysctls, "net.ipv4.conf.IFNAME.x/../../y=1", "unrecognised network interface sysctl"},
		{EndpointSysctls, "", "unrecognised network interface sysctl"},
		{"com.docker.network.endpoint.macaddress", "x", "is not known"},
	} {
		err := CheckEndpointOptions(map[string]string{c.name: c.value})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s=%s: error %v, want %q", c.name, c.value, err, c.want)
		}
	}
}

// TestIsolatedPorts has a network whose containers must not reach each other, by their link or through the host.
func TestIsolatedPorts(t *testing.T) {
	w := newWorld(t)
	w.create(Spec{Name: "apart", Options: map[string]string{OptionICC: "0"}})
	a, b := &container{ns: newNetNS(t), w: w}, &container{ns: newNetNS(t), w: w}
	a.ep, b.ep = a.attachTo("aaa", "apart", Settings{}), b.attachTo("bbb", "apart", Settings{})
	b.serve(80)
	outside := &container{ns: w.client, w: w}
	outside.serve(80)
	if reached(a, b.ep.Address.Addr(), false) || reached(a, b.ep.Address6.Addr(), false) {
		t.Error("a container reaches another")
	}
	if !reached(a, netip.MustParseAddr(clientIP4), true) {
		t.Error("a container does not reach the outside")
	}
	// A route of the container's own that leads through the host.
	through(t, a, b.ep.Address.Addr())
	if reached(a, b.ep.Address.Addr(), false) {
		t.Error("a container reaches another through the host")
	}
	// Nor does a datagram arrive there, which needs no way back.
	var to net.PacketConn
	check(t, netlink.In(b.ns, func() (err error) {
		to, err = net.ListenPacket("udp4", ":81")
		return err
	}))
	defer to.Close()
	check(t, netlink.In(a.ns, func() error {
		from, err := net.Dial("udp4", netip.AddrPortFrom(b.ep.Address.Addr(), 81).String())
		if err != nil {
			return err
		}
		defer from.Close()
		_, err = from.Write([]byte("hello"))
		return err
	}))
	check(t, to.SetReadDeadline(time.Now().Add(patience/2)))
	if n, _, err := to.ReadFrom(make([]byte, 10)); err == nil {
		t.Errorf("%d bytes arrived through the host", n)
	}
}

// TestConfigFrom makes a network from another's configuration, which stays as it was given.
func TestConfigFrom(t *testing.T) {
	w := newWorld(t)
	pool := Pool{Subnet: netip.MustParsePrefix("10.91.0.0/24")}
	w.create(Spec{Name: "conf", ConfigOnly: true, Pools: []Pool{pool}, Options: map[string]string{OptionMTU: "1300"}, Labels: map[string]string{"a": "b"}})
	i := w.create(Spec{Name: "made", ConfigFrom: "conf"})
	if i.IPv4.Subnet != pool.Subnet || i.IPv4.Gateway != pool.Subnet.Addr().Next() || i.Options[OptionMTU] != "1300" || i.Labels["a"] != "b" || i.ConfigFrom != "conf" {
		t.Errorf("made %+v", i)
	}
	if conf, err := w.m.Network(t.Context(), "conf"); err != nil || !conf.ConfigOnly() || conf.IPv4.Gateway.IsValid() || conf.Driver != DriverNull {
		t.Errorf("configuration %+v, %v", conf, err)
	}
	if _, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "aaa", Network: "conf", NetNS: newNetNS(t)}); err == nil || !strings.Contains(err.Error(), "configuration-only") {
		t.Errorf("attach: %v", err)
	}
	a := &container{ns: newNetNS(t), w: w}
	if a.ep = a.attachTo("aaa", "made", Settings{}); a.ep.MTU != 1300 {
		t.Errorf("MTU %d", a.ep.MTU)
	}
	if err := w.m.Remove(t.Context(), "conf"); err == nil || !strings.Contains(err.Error(), `configuration network "conf" is in use`) {
		t.Errorf("removal in use: %v", err)
	}
	check(t, w.m.Detach(t.Context(), "aaa"))
	check(t, w.m.Remove(t.Context(), "made"))
	check(t, w.m.Remove(t.Context(), "conf"))
}

// through gives a container a route to one address by its gateway.
func through(t *testing.T, c *container, to netip.Addr) {
	check(t, netlink.In(c.ns, func() error {
		return rtnetlink.RouteAdd(&rtnetlink.Route{Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(32, 32)}, Gw: c.ep.Gateway.AsSlice()})
	}))
}

// TestRoute moves a running container's way out between two networks, each family to the one that has it.
func TestRoute(t *testing.T) {
	w := newWorld(t)
	off := false
	w.create(Spec{Name: "both"})
	w.create(Spec{Name: "four", IPv6: &off})
	c := &container{ns: newNetNS(t), w: w}
	a := c.attachTo("aaa", "both", Settings{Interface: "eth0"})
	b := c.attachTo("aaa", "four", Settings{Interface: "eth1", NoDefaultRoute: true, NoDefaultRoute6: true})
	out := func(family int) string {
		var name string
		check(t, netlink.In(c.ns, func() error {
			routes, err := rtnetlink.RouteListFiltered(family, &rtnetlink.Route{Dst: nil}, rtnetlink.RT_FILTER_DST)
			for _, r := range routes {
				l, err := rtnetlink.LinkByIndex(r.LinkIndex)
				if err != nil {
					return err
				}
				name += l.Attrs().Name
			}
			return err
		}))
		return name
	}
	for _, s := range []struct {
		four, six *Endpoint
		want4     string
		want6     string
	}{
		{a, a, "eth0", "eth0"}, {b, a, "eth1", "eth0"}, {b, a, "eth1", "eth0"}, {a, nil, "eth0", ""}, {nil, a, "", "eth0"}, {b, nil, "eth1", ""}, {a, a, "eth0", "eth0"},
	} {
		check(t, w.m.Route([]*Endpoint{a, b}, s.four, s.six, c.ns))
		if got4, got6 := out(rtnetlink.FAMILY_V4), out(rtnetlink.FAMILY_V6); got4 != s.want4 || got6 != s.want6 {
			t.Errorf("ways out %q and %q, want %q and %q", got4, got6, s.want4, s.want6)
		}
		eps, err := w.m.Endpoints("aaa")
		check(t, err)
		for _, e := range eps {
			if e.DefaultRoute != (s.four != nil && e.Interface == s.four.Interface) || e.DefaultRoute6 != (s.six != nil && e.Interface == s.six.Interface) {
				t.Errorf("record %+v", e)
			}
		}
	}
}
