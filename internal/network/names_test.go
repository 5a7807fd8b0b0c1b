package network

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"conex/internal/disk"
)

// found is what Names says about a name, sorted.
func found(t *testing.T, n *Names, name string) string {
	t.Helper()
	addrs, known, err := n.Addresses(name)
	check(t, err)
	slices.SortFunc(addrs, netip.Addr.Compare)
	out := []string{fmt.Sprint(known)}
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, " ")
}

// both are an endpoint's addresses as found has them.
func both(eps ...*Endpoint) string {
	var addrs []netip.Addr
	for _, ep := range eps {
		addrs = append(addrs, ep.Address.Addr(), ep.Address6.Addr())
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	out := "true"
	for _, a := range addrs {
		out += " " + a.String()
	}
	return out
}

// TestNames: a container knows who is on its networks, as soon as they are and only as long.
func TestNames(t *testing.T) {
	w := newWorld(t)
	for _, n := range []string{"Front", "back", "other"} {
		w.create(Spec{Name: n, Internal: n == "back"})
	}
	ns := func() *container { return &container{ns: newNetNS(t), w: w} }
	id := func(c string) string { return strings.Repeat(c, 64) }
	me, a, b, c := ns(), ns(), ns(), ns()
	mine := me.attachTo(id("0"), "Front", Settings{})
	n := w.m.Names()
	n.Exists = func(name string) bool { return name == "stopped.example" || name == "stopped" }
	n.Links = map[string]string{"Cache": id("a"), "gone": "nobody"}
	if got := found(t, n, "name-"+id("0")); got != "false" {
		t.Errorf("on no network: %s", got)
	}
	if n.Outward() {
		t.Error("outward without a network")
	}
	n.Join([]*Endpoint{mine})
	epA := a.attachTo(id("a"), "Front", Settings{Aliases: []string{"API", "a.example"}})
	check(t, w.m.Rename(context.Background(), id("a"), "Web"))
	for name, want := range map[string]string{
		"name-" + id("0"): both(mine), strings.Repeat("0", 12): both(mine), "web": both(epA), strings.Repeat("a", 12): both(epA), id("a"): both(epA),
		"api": both(epA), "a.example": both(epA), "cache": both(epA), "web.front": both(epA), "api.front": both(epA), "web.back": "false", "name-" + id("a"): "false",
		"gone": "false", "aaaa": "false", "": "false", "front": "false", "stopped": "true", "stopped.example": "true", "stopped.front": "true", "nobody.front": "false",
		"host.docker.internal":    fmt.Sprintf("true %s %s", mine.Gateway, mine.Gateway6),
		"gateway.docker.internal": fmt.Sprintf("true %s %s", mine.Gateway, mine.Gateway6), "host.containers.internal": fmt.Sprintf("true %s %s", mine.Gateway, mine.Gateway6),
		"../../etc/passwd": "false", "\x00": "false",
	} {
		if got := found(t, n, name); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}

	// Several share a name; others come and go, at once.
	epB := b.attachTo(id("b"), "Front", Settings{Aliases: []string{"api"}})
	if got := found(t, n, "api"); got != both(epA, epB) {
		t.Errorf("shared: %s", got)
	}
	epC := c.attachTo(id("c"), "back", Settings{Aliases: []string{"api", "db"}})
	if got := found(t, n, "db"); got != "false" {
		t.Errorf("on another network: %s", got)
	}
	second := me.attachTo(id("0"), "back", Settings{Interface: "eth1", NoDefaultRoute: true})
	n.Join([]*Endpoint{mine, second})
	if got := found(t, n, "db"); got != both(epC) {
		t.Errorf("on both: %s", got)
	}
	if got := found(t, n, "api"); got != both(epA, epB) {
		t.Errorf("the first network first: %s", got)
	}
	if got := found(t, n, "api.back"); got != both(epC) {
		t.Errorf("by its network: %s", got)
	}
	if !n.Outward() {
		t.Error("no way out")
	}
	n.Join([]*Endpoint{second})
	if n.Outward() || found(t, n, "api") != both(epC) || found(t, n, "web") != "false" {
		t.Errorf("on the internal network alone: %v, %s, %s", n.Outward(), found(t, n, "api"), found(t, n, "web"))
	}
	n.Join([]*Endpoint{mine, second})

	reverse := func(a netip.Addr) string {
		name, ours, err := n.Reverse(a)
		check(t, err)
		return fmt.Sprint(name, " ", ours)
	}
	outsider := ns().attachTo(id("d"), "other", Settings{})
	for a, want := range map[netip.Addr]string{
		epA.Address.Addr(): "Web.front true", epA.Address6.Addr(): "Web.front true", epC.Address.Addr(): "name-" + id("c") + ".back true",
		mine.Gateway: " true", outsider.Address.Addr(): " true", outsider.Address6.Addr(): " true", netip.MustParseAddr("192.0.2.1"): " false", netip.MustParseAddr("2001:db8::1"): " false",
	} {
		if got := reverse(a); got != want {
			t.Errorf("%s: %s, want %s", a, got, want)
		}
	}
	late := w.create(Spec{Name: "late"})
	if got := reverse(late.IPv4.Subnet.Addr().Next()); got != " true" {
		t.Errorf("a network that is new: %s", got)
	}

	check(t, w.m.Detach(context.Background(), id("a")))
	if got := found(t, n, "web") + ", " + found(t, n, "api") + ", " + reverse(epA.Address.Addr()); got != "false, "+both(epB)+",  true" {
		t.Errorf("one has gone: %s", got)
	}
	for _, gone := range []string{"0", "b", "c", "d"} {
		check(t, w.m.Detach(context.Background(), id(gone)))
	}
	for _, net := range []string{"Front", "back", "other", "late"} {
		check(t, w.m.Remove(context.Background(), net))
	}
	if got := found(t, n, "api"); got != "false" {
		t.Errorf("the network has gone: %s", got)
	}
}

// TestServices: ports that containers say they serve are found by the names that they have.
func TestServices(t *testing.T) {
	w := newWorld(t)
	attach := func(id string, aliases []string, exposed ...string) *Endpoint {
		ep, err := w.m.Attach(t.Context(), AttachRequest{ContainerID: id, Name: "Name-" + id, NetNS: newNetNS(t), Exposed: exposed, Hostname: "host-" + id, Settings: Settings{Aliases: aliases}})
		check(t, err)
		return ep
	}
	one, two := attach("aaa", []string{"api"}, "80/tcp", "53/udp"), attach("bbb", []string{"api", "host-aaa"}, "80/tcp")
	n := w.m.Names()
	n.Join([]*Endpoint{one})
	for query, want := range map[[2]string]string{
		{"api", "tcp"}: "true name-aaa:80 name-bbb:80", {"name-aaa", "tcp"}: "true name-aaa:80", {"name-bbb", "udp"}: "true", {"nobody", "tcp"}: "false",
	} {
		list, known, err := n.Services(query[0], query[1], 80)
		check(t, err)
		var names []string
		for _, s := range list {
			names = append(names, fmt.Sprintf(" %s:%d", s.Name, s.Port))
		}
		slices.Sort(names)
		if got := fmt.Sprint(known) + strings.Join(names, ""); got != want {
			t.Errorf("%v: %s, want %s", query, got, want)
		}
	}
	// A host name is anybody's to choose, so it stands behind names and aliases.
	if got := found(t, n, "host-aaa"); got != both(two) {
		t.Errorf("host-aaa: %s", got)
	}
	if got := found(t, n, "host-bbb"); got != both(two) {
		t.Errorf("host-bbb: %s", got)
	}
	// A record that can't be read is an error, not an absence.
	check(t, os.WriteFile(w.m.recordPath(one.NetworkID, "bbb"), []byte("{"), 0o600))
	if _, _, err := n.Addresses("api"); err == nil {
		t.Error("an unreadable record was passed over")
	}
	check(t, disk.WriteJSON(w.m.recordPath(one.NetworkID, "bbb"), two, disk.Volatile))
	if got := found(t, n, "host-bbb"); got != both(two) {
		t.Errorf("mended: %s", got)
	}
}

// BenchmarkNames is the look-up of one of a hundred containers that nothing changes about.
func BenchmarkNames(b *testing.B) {
	w := newWorld(b)
	i := w.create(Spec{Name: "net"})
	l, err := w.m.lock(context.Background(), i.ID)
	check(b, err)
	l.Release()
	var own *Endpoint
	for k := range 100 {
		id := fmt.Sprintf("%064d", k)
		ep := &Endpoint{ContainerID: id, ContainerName: fmt.Sprintf("c%d", k), NetworkID: i.ID, NetworkName: "net", Address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(k)}), 8)}
		check(b, w.m.writeEndpoint(ep))
		own = ep
	}
	n := w.m.Names()
	n.Join([]*Endpoint{own})
	time.Sleep(200 * time.Millisecond) // until the folder is at rest
	b.ReportAllocs()
	for b.Loop() {
		if _, known, err := n.Addresses("c7"); err != nil || !known {
			b.Fatal(known, err)
		}
	}
	b.StopTimer()
	for k := range 100 {
		check(b, os.Remove(w.m.recordPath(i.ID, fmt.Sprintf("%064d", k))))
	}
	check(b, w.m.Remove(context.Background(), "net"))
}
