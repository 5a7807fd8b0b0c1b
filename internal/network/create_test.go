package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// attachTo gives a container another network, as eth<k>.
func (c *container) attachTo(id, network string, s Settings) *Endpoint {
	c.w.t.Helper()
	ep, err := c.w.m.Attach(c.w.t.Context(), AttachRequest{ContainerID: id, Name: "name-" + id, Network: network, NetNS: c.ns, Settings: s})
	check(c.w.t, err)
	return ep
}

func (w *world) create(s Spec) Info {
	w.t.Helper()
	i, err := w.m.Create(w.t.Context(), s)
	check(w.t, err)
	return i
}

// TestNetworks has two networks beside the default one: each is reached by its own containers alone, until one is on both.
func TestNetworks(t *testing.T) {
	w := newWorld(t)
	front, back := w.create(Spec{Name: "front"}), w.create(Spec{Name: "back", Internal: true})
	if front.IPv4.Subnet.Overlaps(back.IPv4.Subnet) || front.IPv4.Subnet.Bits() != networkBits || !front.IPv6.Valid() {
		t.Errorf("subnets %s and %s", front.subnets(), back.subnets())
	}
	ns := func() *container { return &container{ns: newNetNS(t), w: w} }
	a, b, both := ns(), ns(), ns()
	a.ep = a.attachTo("aaa", "front", Settings{})
	b.ep = b.attachTo("bbb", "back", Settings{})
	both.ep = both.attachTo("ccc", "front", Settings{Interface: "eth0"})
	second := both.attachTo("ccc", "back", Settings{Interface: "eth1", NoDefaultRoute: true, NoDefaultRoute6: true, Aliases: []string{"db"}})
	d := w.attach("ddd") // the default network
	(&container{ns: w.client, w: w}).serve(81)
	for _, c := range []*container{a, b, d} {
		c.serve(80)
	}
	for _, c := range []struct {
		name string
		from *container
		to   netip.Addr
		port int
		want bool
	}{
		{"same network", both, a.ep.Address.Addr(), 80, true},
		{"same network, IPv6", both, a.ep.Address6.Addr(), 80, true},
		{"second network", both, b.ep.Address.Addr(), 80, true},
		{"second network, IPv6", both, b.ep.Address6.Addr(), 80, true},
		{"other network", a, b.ep.Address.Addr(), 80, false},
		{"other network, IPv6", a, b.ep.Address6.Addr(), 80, false},
		{"default network", a, d.ep.Address.Addr(), 80, false},
		{"from the default network", d, a.ep.Address.Addr(), 80, false},
		{"outside", a, netip.MustParseAddr(clientIP4), 81, true},
		{"outside, IPv6", a, netip.MustParseAddr(clientIP6), 81, true},
		{"outside, from two", both, netip.MustParseAddr(clientIP4), 81, true},
		{"outside, from internal", b, netip.MustParseAddr(clientIP4), 81, false},
	} {
		_, err := ask(c.from.ns, "tcp", netip.AddrPortFrom(c.to, uint16(c.port)).String())
		if (err == nil) != c.want {
			t.Errorf("%s: reached %v, want %v: %v", c.name, err == nil, c.want, err)
		}
	}
	// A route of its own does not lead an internal container out.
	check(t, netlink.In(b.ns, func() error {
		return rtnetlink.RouteAdd(&rtnetlink.Route{Gw: b.ep.Address.Masked().Addr().Next().AsSlice()})
	}))
	if _, err := ask(b.ns, "tcp", clientIP4+":81"); err == nil {
		t.Error("an internal network leads out")
	}
	if got := strings.Join(second.Names(), " "); got != "name-ccc db ccc" {
		t.Errorf("names %q", got)
	}

	// A port of one network is reached from the other through the host, with the client's address.
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 9500, ContainerPort: 80})
	for _, to := range []string{hostIP4 + ":9500", "[" + hostIP6 + "]:9500"} {
		seen, err := ask(d.ns, "tcp", to)
		if want := d.ep.Address.Addr().String(); err != nil || seen != want && seen != d.ep.Address6.Addr().String() {
			t.Errorf("%s from another network: source %s, want %s: %v", to, seen, want, err)
		}
	}

	if err := w.m.Remove(t.Context(), "back"); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "name-bbb") {
		t.Errorf("removal in use: %v", err)
	}
	check(t, w.m.DetachFrom(t.Context(), "ccc", back.ID))
	check(t, w.m.Detach(t.Context(), "bbb"))
	check(t, w.m.Remove(t.Context(), "back"))
	if _, err := rtnetlink.LinkByName(back.Interface); err == nil {
		t.Error("the bridge is left")
	}
	if _, err := w.m.Network(t.Context(), "back"); !errors.Is(err, ErrNotFound) {
		t.Errorf("look-up of a removed network: %v", err)
	}
	if _, err := ask(both.ns, "tcp", netip.AddrPortFrom(a.ep.Address.Addr(), 80).String()); err != nil {
		t.Errorf("the network that stays: %v", err)
	}
}

// TestRemoveKilled has a removal that was killed when it had marked the network.
func TestRemoveKilled(t *testing.T) {
	w := newWorld(t)
	i := w.create(Spec{Name: "front"})
	a := &container{ns: newNetNS(t), w: w}
	a.attachTo("aaa", "front", Settings{})
	check(t, w.m.Detach(t.Context(), "aaa"))
	check(t, w.m.condemn(t.Context(), i))
	if _, err := w.m.Network(t.Context(), "front"); !errors.Is(err, ErrNotFound) {
		t.Errorf("look-up: %v", err)
	}
	again := w.create(Spec{Name: "front"})
	if _, err := rtnetlink.LinkByName(i.Interface); err == nil {
		t.Error("the bridge is left")
	}
	if _, err := os.Stat(w.root.Path("networks", i.ID+".json")); err == nil {
		t.Error("the record is left")
	}
	check(t, w.m.Remove(t.Context(), again.ID))
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t)
	pool := func(subnet, gateway, part string) []Pool {
		p := Pool{Subnet: netip.MustParsePrefix(subnet)}
		if gateway != "" {
			p.Gateway = netip.MustParseAddr(gateway)
		}
		if part != "" {
			p.Range = netip.MustParsePrefix(part)
		}
		return []Pool{p}
	}
	no := false
	w.create(Spec{Name: "one", Pools: pool("10.7.0.0/24", "10.7.0.254", "10.7.0.128/25")})
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{Name: "one"}, "already exists"},
		{Spec{Name: "host"}, "already exists"},
		{Spec{Name: "two", Pools: pool("10.7.0.0/16", "", "")}, "network one"},
		{Spec{Name: "two", Pools: pool("198.51.100.0/25", "", "")}, "route"},
		{Spec{Name: "two", Pools: pool("10.8.0.1/24", "", "")}, "10.8.0.0/24"},
		{Spec{Name: "two", Pools: pool("10.8.0.0/24", "10.9.0.1", "")}, "invalid gateway"},
		{Spec{Name: "two", Pools: pool("10.8.0.0/24", "", "10.9.0.0/25")}, "invalid ip-range"},
		{Spec{Name: "two", IPv4: &no, IPv6: &no}, "must be enabled"},
		{Spec{Name: "two", Options: map[string]string{OptionBridgeName: uplinkName}}, "taken"},
	} {
		if i, err := w.m.Create(t.Context(), c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %+v %v, want %q", c.spec, i, err, c.want)
		}
	}
	a := &container{ns: newNetNS(t), w: w}
	if ep := a.attachTo("aaa", "one", Settings{MAC: "02:42:0a:07:00:05"}); ep.Address.Addr().String() != "10.7.0.128" || ep.Gateway.String() != "10.7.0.254" || ep.MAC != "02:42:0a:07:00:05" {
		t.Errorf("endpoint %+v", ep)
	}
	for _, c := range []struct{ ip, want string }{{"10.7.0.128", "by container name-aaa"}, {"10.7.0.254", "in use"}, {"10.9.0.1", "not in a subnet"}} {
		_, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", Network: "one", NetNS: newNetNS(t), Settings: Settings{IPv4: netip.MustParseAddr(c.ip)}})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("address %s: %v, want %q", c.ip, err, c.want)
		}
	}
	b := &container{ns: newNetNS(t), w: w}
	if ep := b.attachTo("bbb", "one", Settings{IPv4: netip.MustParseAddr("10.7.0.7")}); ep.Address.Addr().String() != "10.7.0.7" {
		t.Errorf("endpoint %+v", ep)
	}
}

func TestFreeSubnet(t *testing.T) {
	var used []netip.Prefix
	for k := range 300 {
		p, ok := freeSubnet(networkBits, used)
		if !ok || p.Bits() != networkBits {
			t.Fatalf("network %d: %s %v", k, p, ok)
		}
		for _, u := range used {
			if u.Overlaps(p) {
				t.Fatalf("%s overlaps %s", p, u)
			}
		}
		used = append(used, p)
	}
	all := []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.0.0/16")}
	if p, ok := freeSubnet(networkBits, all); ok {
		t.Errorf("%s is not free", p)
	}
	if p, ok := freeSubnet(defaultBits, all[1:]); !ok || p.String() != "172.30.0.0/20" {
		t.Error(fmt.Sprint(p, ok))
	}
}
