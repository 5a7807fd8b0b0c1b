package network

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	rtnetlink "github.com/vishvananda/netlink"

	"conex/internal/linux/netlink"
)

// onParent attaches two containers to a network that hangs on the world's cable, and returns them.
func (w *world) onParent(network string) (a, b *container) {
	a, b = &container{ns: newNetNS(w.t), w: w}, &container{ns: newNetNS(w.t), w: w}
	a.ep, b.ep = a.attachTo("aaa", network, Settings{}), b.attachTo("bbb", network, Settings{})
	a.serve(80)
	b.serve(80)
	return a, b
}

// reached asks once, and where an answer is wanted again: on a slow machine the first packets wait for the neighbour's address.
func reached(from *container, to netip.Addr, want bool) bool {
	for range 3 {
		if _, err := ask(from.ns, "tcp", netip.AddrPortFrom(to, 80).String()); err == nil || !want {
			return err == nil
		}
	}
	return false
}

// lan is a network on the cable's subnet, whose gateway is the client.
func lan(driver string, options map[string]string) Spec {
	options[OptionParent] = uplinkName
	return Spec{Name: "lan", Driver: driver, Options: options, Pools: []Pool{
		{Subnet: netip.MustParsePrefix(hostIP4 + "/24").Masked(), Gateway: netip.MustParseAddr(clientIP4), Range: netip.MustParsePrefix("198.51.100.64/28")},
		{Subnet: netip.MustParsePrefix(hostIP6 + "/64").Masked(), Gateway: netip.MustParseAddr(clientIP6)},
	}}
}

// TestMacvlan: containers are on the parent's link, with addresses of their own; the host reaches them not, nor they it.
func TestMacvlan(t *testing.T) {
	for _, mode := range []string{"", "bridge", "private", "vepa"} {
		t.Run("mode "+mode, func(t *testing.T) {
			w := newWorld(t)
			w.create(lan(DriverMacvlan, map[string]string{OptionMacvlanMode: mode}))
			outside := &container{ns: w.client, w: w}
			outside.serve(80)
			a, b := w.onParent("lan")
			if got := a.ep.Address.String(); got != "198.51.100.64/24" || a.ep.HostInterface != "" || a.ep.MTU != wireMTU {
				t.Errorf("endpoint %+v", a.ep)
			}
			for _, c := range []struct {
				name string
				from *container
				to   netip.Addr
				want bool
			}{
				{"to the link", a, netip.MustParseAddr(clientIP4), true},
				{"to the link, IPv6", a, netip.MustParseAddr(clientIP6), true},
				{"from the link", outside, b.ep.Address.Addr(), true},
				{"from the link, IPv6", outside, b.ep.Address6.Addr(), true},
				// In mode vepa a switch that sends packets back would lead there; private keeps even those away.
				{"to each other", a, b.ep.Address.Addr(), mode == "" || mode == "bridge"},
				{"to the host", a, netip.MustParseAddr(hostIP4), false},
			} {
				if got := reached(c.from, c.to, c.want); got != c.want {
					t.Errorf("%s: reached %v, want %v", c.name, got, c.want)
				}
			}
			if err := w.m.Remove(t.Context(), "lan"); !errors.Is(err, ErrInUse) {
				t.Errorf("removal in use: %v", err)
			}
			check(t, w.m.Unplug(a.ep, a.ns))
			check(t, w.m.Detach(t.Context(), "aaa"))
			check(t, netlink.In(a.ns, func() error {
				if _, err := rtnetlink.LinkByName("eth0"); err == nil {
					t.Error("the interface is left")
				}
				return nil
			}))
			check(t, w.m.Detach(t.Context(), "bbb"))
			check(t, w.m.Remove(t.Context(), "lan"))
		})
	}
}

// TestMacvlanPassthru gives the parent away, with its MAC, to one network and one container.
func TestMacvlanPassthru(t *testing.T) {
	w := newWorld(t)
	w.create(lan(DriverMacvlan, map[string]string{OptionMacvlanMode: "passthru"}))
	other := lan(DriverMacvlan, map[string]string{})
	other.Name = "other"
	if _, err := w.m.Create(t.Context(), other); err == nil || !strings.Contains(err.Error(), "network lan is already using parent interface "+uplinkName+" in mode passthru") {
		t.Errorf("a second network: %v", err)
	}
	a, b := &container{ns: newNetNS(t), w: w}, &container{ns: newNetNS(t), w: w}
	a.ep = a.attachTo("aaa", "lan", Settings{})
	up, err := rtnetlink.LinkByName(uplinkName)
	check(t, err)
	if a.ep.MAC != up.Attrs().HardwareAddr.String() {
		t.Errorf("MAC %s, the parent's is %s", a.ep.MAC, up.Attrs().HardwareAddr)
	}
	if _, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", Network: "lan", NetNS: b.ns}); err == nil {
		t.Error("a second container has the parent too")
	}
	if slices.Contains(w.attached(), "bbb") {
		t.Error("the failed attach left a record")
	}
	check(t, w.m.Unplug(a.ep, a.ns))
	check(t, w.m.Detach(t.Context(), "aaa"))
	check(t, w.m.Remove(t.Context(), "lan"))
}

// TestIPvlan is TestMacvlan for ipvlan, where the kernel has it, and the error that says so where it has not.
func TestIPvlan(t *testing.T) {
	if err := supported(DriverIPvlan); err != nil {
		w := newWorld(t)
		_, err := w.m.Create(t.Context(), lan(DriverIPvlan, map[string]string{}))
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "CONFIG_IPVLAN") {
			t.Errorf("error %v, want one that names CONFIG_IPVLAN", err)
		}
		return
	}
	for _, mode := range []string{"l2", "l3", "l3s"} {
		t.Run("mode "+mode, func(t *testing.T) {
			w := newWorld(t)
			w.create(lan(DriverIPvlan, map[string]string{OptionIPvlanMode: mode}))
			outside := &container{ns: w.client, w: w}
			outside.serve(80)
			a, b := w.onParent("lan")
			up, err := rtnetlink.LinkByName(uplinkName)
			check(t, err)
			if a.ep.MAC != up.Attrs().HardwareAddr.String() || a.ep.MAC != b.ep.MAC {
				t.Errorf("MACs %s and %s, the parent's is %s", a.ep.MAC, b.ep.MAC, up.Attrs().HardwareAddr)
			}
			if !reached(a, b.ep.Address.Addr(), true) || !reached(a, b.ep.Address6.Addr(), true) {
				t.Error("containers don't reach each other")
			}
			// Nobody answers for an address of l3 on the link: its neighbours need a route.
			if mode == "l2" && !reached(a, netip.MustParseAddr(clientIP4), true) {
				t.Error("the link is not reached")
			}
			for _, c := range []*container{a, b} {
				check(t, w.m.Unplug(c.ep, c.ns))
				check(t, w.m.Detach(t.Context(), c.ep.ContainerID))
			}
			check(t, w.m.Remove(t.Context(), "lan"))
		})
	}
}

// TestVLANParent has a parent that is not there yet: eth0.10 is made where the kernel has VLANs, and goes with its last network.
func TestVLANParent(t *testing.T) {
	w := newWorld(t)
	spec := func(name string) Spec {
		return Spec{Name: name, Driver: DriverMacvlan, Options: map[string]string{OptionParent: uplinkName + ".10"},
			Pools: []Pool{{Subnet: netip.MustParsePrefix("192.0.2.0/24")}}}
	}
	if err := supported("vlan"); err != nil {
		_, err := w.m.Create(t.Context(), spec("lan"))
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "CONFIG_VLAN_8021Q") {
			t.Errorf("error %v, want one that names CONFIG_VLAN_8021Q", err)
		}
		return
	}
	w.create(spec("lan"))
	w.create(spec("second"))
	for i, name := range []string{"lan", "second"} {
		l, err := rtnetlink.LinkByName(uplinkName + ".10")
		if err != nil || l.Type() != "vlan" {
			t.Fatalf("parent of %d networks: %v, %v", 2-i, l, err)
		}
		check(t, w.m.Remove(t.Context(), name))
	}
	if _, err := rtnetlink.LinkByName(uplinkName + ".10"); err == nil {
		t.Error("the parent is left")
	}
}

func TestParseVLAN(t *testing.T) {
	for _, c := range []struct {
		name, base string
		id         int
	}{
		{"eth0.10", "eth0", 10}, {"eth0.1.4094", "eth0.1", 4094}, {"eth0", "", 0}, {"eth0.", "", 0}, {".10", "", 0}, {"eth0.0", "", 0}, {"eth0.4095", "", 0}, {"eth0.-1", "", 0}, {"eth0.x", "", 0},
	} {
		base, id, err := parseVLAN(c.name)
		if base != c.base || id != c.id || (err == nil) != (c.id > 0) {
			t.Errorf("%s: %s %d %v", c.name, base, id, err)
		}
	}
}
