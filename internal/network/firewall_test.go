package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"conex/internal/linux/netlink"
	"conex/internal/portmap"
)

// sh runs a command line in the host's namespace.
func sh(t testing.TB, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, name := range tools {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed, so there is no such firewall to obey", name)
		}
	}
}

// TestPolicyHost has a published port behind each kind of firewall: what it keeps from the host it keeps from the container, what it lets
// through arrives with the client's address. Under the policy docker it has no say.
func TestPolicyHost(t *testing.T) {
	need(t, "nft", "iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy")
	w := newWorld(t)
	for _, policy := range []string{"host", "docker"} {
		check(t, w.m.SetPolicy(t.Context(), policy == "docker"))
		a := w.attach("aaa" + policy)
		a.serve(80)
		r := a.publish(
			portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80},
			portmap.Mapping{Proto: "udp", HostPort: 8080, ContainerPort: 80},
			portmap.Mapping{Proto: "tcp", HostPort: 8081, ContainerPort: 80, HostIP: netip.MustParseAddr(hostIP4)},
		)
		for _, f := range []struct{ name, up, down, refused string }{
			{name: "nothing"},
			{
				name: "nftables",
				up:   "nft 'table inet fw { chain in { type filter hook input priority 0; policy drop; iif lo accept; ct state established,related accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; tcp dport 22 accept; }; }'",
				down: "nft delete table inet fw", refused: "drop",
			},
			{
				name: "nftables, late and rejecting",
				up:   "nft 'table inet fw { chain in { type filter hook input priority 1000; tcp dport { 8080, 8081 } reject with tcp reset; udp dport 8080 reject; }; }'",
				down: "nft delete table inet fw", refused: "reject",
			},
			{
				name: "iptables-nft",
				up:   "iptables-nft -A INPUT -p tcp --dport 8080:8081 -j DROP; iptables-nft -A INPUT -p udp --dport 8080 -j DROP; ip6tables-nft -A INPUT -p udp --dport 8080 -j DROP;  ip6tables-nft -A INPUT -p tcp --dport 8080 -j DROP",
				down: "iptables-nft -F INPUT; ip6tables-nft -F INPUT", refused: "drop",
			},
			{
				name: "iptables-legacy",
				up:   "iptables-legacy -A INPUT -p tcp --dport 8080:8081 -j DROP; iptables-legacy -A INPUT -p udp --dport 8080 -j DROP; ip6tables-legacy -A INPUT -p udp --dport 8080 -j DROP;  ip6tables-legacy -A INPUT -p tcp --dport 8080 -j DROP",
				down: "iptables-legacy -F INPUT; ip6tables-legacy -F INPUT", refused: "drop",
			},
			{
				name: "only for another client",
				up:   "nft 'table inet fw { chain in { type filter hook input priority 0; policy accept; ip saddr " + clientIP4 + " accept; ip6 saddr " + clientIP6 + " accept; iif lo accept; th dport { 8080, 8081 } drop; }; }'",
				down: "nft delete table inet fw",
			},
		} {
			t.Run(policy+"/"+f.name, func(t *testing.T) {
				if f.up != "" {
					sh(t, f.up)
					defer sh(t, f.down)
				}
				for _, c := range []struct{ network, addr, seen string }{
					{"tcp", hostIP4 + ":8080", clientIP4}, {"udp", hostIP4 + ":8080", clientIP4}, {"tcp", hostIP4 + ":8081", clientIP4},
					{"tcp", "[" + hostIP6 + "]:8080", clientIP6}, {"udp", "[" + hostIP6 + "]:8080", clientIP6},
				} {
					seen, err := ask(w.client, c.network, c.addr)
					switch kept := f.refused != "" && policy == "host"; {
					case kept && err == nil:
						t.Errorf("%s %s is reached", c.network, c.addr)
					case kept && c.network == "tcp" && errors.Is(err, syscall.ECONNREFUSED) != (f.refused == "reject"):
						t.Errorf("%s %s: %v, want %s", c.network, c.addr, err, f.refused)
					case !kept && (err != nil || seen != c.seen):
						t.Errorf("%s %s: source %q, want %q: %v", c.network, c.addr, seen, c.seen, err)
					}
				}
				// The host itself is no outsider.
				if _, err := ask(nil, "tcp", hostIP4+":8080"); err != nil {
					t.Errorf("host by its own address: %v", err)
				}
			})
		}
		check(t, r.Close())
		for _, id := range w.attached() {
			check(t, w.m.Detach(t.Context(), id))
		}
	}
}

// TestPolicyOtherNetwork publishes to containers of another network, which obey the host's firewall as well.
func TestPolicyOtherNetwork(t *testing.T) {
	need(t, "nft")
	w := newWorld(t)
	_, err := w.m.Create(t.Context(), Spec{Name: "other"})
	check(t, err)
	defer func() { check(t, w.m.Remove(t.Context(), "other")) }()
	a := w.attach("aaa")
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, portmap.Mapping{Proto: "udp", HostPort: 8080, ContainerPort: 80})
	b := &container{ns: newNetNS(t), w: w}
	b.ep, err = w.m.Attach(t.Context(), AttachRequest{ContainerID: "bbb", Name: "b", NetNS: b.ns, Network: "other"})
	check(t, err)
	defer func() { check(t, w.m.Detach(t.Context(), "bbb")) }()
	for _, network := range []string{"tcp", "udp"} {
		for _, c := range []struct{ addr, seen string }{
			{hostIP4 + ":8080", b.ep.Address.Addr().String()}, {b.ep.Gateway.String() + ":8080", b.ep.Address.Addr().String()},
			{"[" + hostIP6 + "]:8080", b.ep.Address6.Addr().String()},
		} {
			if seen, err := ask(b.ns, network, c.addr); err != nil || seen != c.seen {
				t.Errorf("%s %s: source %q, want %q: %v", network, c.addr, seen, c.seen, err)
			}
		}
		for _, addr := range []string{a.ep.Address.Addr().String() + ":80", "[" + a.ep.Address6.Addr().String() + "]:80"} {
			if seen, err := ask(b.ns, network, addr); err == nil {
				t.Errorf("%s %s is reached around the published port, source %s", network, addr, seen)
			}
		}
	}
	sh(t, "nft 'table inet fw { chain in { type filter hook input priority 0; iifname \""+b.ep.Bridge(w)+"\" drop; }; }'")
	defer sh(t, "nft delete table inet fw")
	if seen, err := ask(b.ns, "tcp", hostIP4+":8080"); err == nil {
		t.Errorf("reached past the firewall, source %s", seen)
	}
}

// Bridge is the name of the endpoint's bridge.
func (ep *Endpoint) Bridge(w *world) string {
	i, err := w.m.Network(w.t.Context(), ep.NetworkID)
	check(w.t, err)
	return i.Interface
}

// TestLoopbackServices has a service of the host on 127.0.0.1 that nobody published, and a host that lets its loopback be routed.
func TestLoopbackServices(t *testing.T) {
	w := newWorld(t)
	a := w.attach("aaa")
	(&container{w: w, ns: hostNS(t)}).serve(9090)
	check(t, os.WriteFile("/proc/sys/net/ipv4/conf/"+uplinkName+"/route_localnet", []byte("1"), 0))
	bridge := "/proc/sys/net/ipv4/conf/" + a.ep.Bridge(w) + "/route_localnet"
	check(t, os.WriteFile(bridge, []byte("1"), 0))
	for _, c := range []*os.File{w.client, a.ns} {
		check(t, netlink.In(c, func() error {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte("1"), 0); err != nil {
				return err
			}
			sh(t, "ip addr flush dev lo") // and with it goes the route that keeps 127.0.0.0/8 at home
			return nil
		}))
		via := hostIP4
		if c == a.ns {
			via = a.ep.Gateway.String()
		}
		check(t, netlink.In(c, func() error {
			out, err := exec.Command("ip", "route", "add", "127.0.0.0/8", "via", via).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}))
		for _, network := range []string{"tcp", "udp"} {
			if seen, err := ask(c, network, "127.0.0.1:9090"); err == nil {
				t.Errorf("%s: a service on the host's loopback is reached, source %s", network, seen)
			}
		}
	}
	if _, err := ask(nil, "tcp", "127.0.0.1:9090"); err != nil {
		t.Errorf("the host itself: %v", err)
	}
}

func hostNS(t testing.TB) *os.File {
	f, err := os.Open("/proc/thread-self/ns/net")
	check(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// TestForwardDrop is a host whose iptables drop what they are not told of, as beside dockerd or ufw: containers reach out and are reached,
// and what others' bridges had against containers still holds. Afterwards nothing of it is left.
func TestForwardDrop(t *testing.T) {
	for _, kind := range []string{"nft", "legacy"} {
		t.Run(kind, func(t *testing.T) { forwardDrop(t, "iptables-"+kind, "ip6tables-"+kind) })
	}
}

func forwardDrop(t *testing.T, four, six string) {
	need(t, four, six)
	w := newWorld(t)
	sh(t, "for i in "+four+" "+six+"; do $i -P FORWARD DROP; done; ip link add other0 type bridge; ip addr add 10.66.0.1/24 dev other0; ip link set other0 up")
	defer sh(t, "for i in "+four+" "+six+"; do $i -P FORWARD ACCEPT; $i -F FORWARD; done; ip link del other0")
	vm := newNetNS(t)
	w.cable("vm0", vm, "10.66.0.9/32", "10.66.0.2/24")
	sh(t, "ip addr flush dev vm0; ip link set vm0 master other0")
	check(t, netlink.In(vm, func() error { return exec.Command("ip", "route", "add", "default", "via", "10.66.0.1").Run() }))
	a := w.attach("aaa")
	a.serve(80)
	(&container{ns: w.client, w: w}).serve(81)
	(&container{ns: vm, w: w}).serve(81)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, portmap.Mapping{Proto: "udp", HostPort: 8080, ContainerPort: 80})
	for _, c := range []struct {
		what string
		from *os.File
		addr string
		want bool
	}{
		{"outside, published", w.client, hostIP4 + ":8080", true},
		{"outside, published, IPv6", w.client, "[" + hostIP6 + "]:8080", true},
		{"container to outside", a.ns, clientIP4 + ":81", true},
		{"container to another engine's", a.ns, "10.66.0.2:81", false},
		{"another engine's to the port", vm, hostIP4 + ":8080", true},
		{"another engine's to the container", vm, a.ep.Address.Addr().String() + ":80", false},
	} {
		for _, network := range []string{"tcp", "udp"} {
			if _, err := ask(c.from, network, c.addr); (err == nil) != c.want {
				t.Errorf("%s, %s: %v", c.what, network, err)
			}
		}
	}
	// A rule of the administrator's stands above us.
	sh(t, four+" -I FORWARD -o "+a.ep.Bridge(w)+" -p tcp --dport 80 -j DROP")
	if _, err := ask(w.client, "tcp", hostIP4+":8080"); err == nil {
		t.Error("reached past an administrator's rule")
	}
	check(t, w.m.Detach(t.Context(), "aaa"))
	check(t, w.m.Cleanup(t.Context()))
	if rules := sh(t, four+" -S FORWARD; "+six+" -S FORWARD"); strings.Contains(rules, "-i "+firstBridge) || strings.Contains(rules, "DNAT") {
		t.Errorf("rules are left:\n%s", rules)
	}
	check(t, deleteLink("vm0"))
}

// TestBridgeNetfilter is a host that sends what stays on a bridge through iptables, too.
func TestBridgeNetfilter(t *testing.T) {
	need(t, "iptables-nft")
	const file = "/proc/sys/net/bridge/bridge-nf-call-iptables"
	if _, err := os.Stat(file); err != nil {
		t.Skip("this kernel has no br_netfilter")
	}
	w := newWorld(t)
	before, err := os.ReadFile(file)
	check(t, err)
	check(t, os.WriteFile(file, []byte("1"), 0))
	defer os.WriteFile(file, before, 0)
	sh(t, "iptables-nft -P FORWARD DROP")
	defer sh(t, "iptables-nft -P FORWARD ACCEPT; iptables-nft -F FORWARD")
	a, b := w.attach("aaa"), w.attach("bbb")
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80})
	for _, addr := range []string{a.ep.Address.Addr().String() + ":80", hostIP4 + ":8080"} {
		if _, err := ask(b.ns, "tcp", addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	if seen, err := ask(w.client, "tcp", hostIP4+":8080"); err != nil || seen != clientIP4 {
		t.Errorf("outside: source %q, %v", seen, err)
	}
}

// TestPublishOften publishes and frees a port a thousand times: no rule, chain, element, group or descriptor is left.
func TestPublishOften(t *testing.T) {
	need(t, "nft")
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	ports := []portmap.Mapping{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, {Proto: "udp", HostPort: 8080, ContainerPort: 80}}
	once := func() {
		t.Helper()
		r, err := w.m.Reserve(t.Context(), ports)
		check(t, err)
		check(t, w.m.Publish(t.Context(), a.ep, r))
		check(t, r.Close())
	}
	once()
	measure := func() (int, string) {
		runtime.GC() // closes what earlier tests forgot
		fds, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return len(fds), sh(t, "nft list ruleset")
	}
	descriptors, rules := measure()
	rounds := 150
	if v := os.Getenv("CONEX_ROUNDS"); v != "" {
		var err error
		rounds, err = strconv.Atoi(v)
		check(t, err)
	}
	for range rounds {
		once()
	}
	d, r := measure()
	for deadline := time.Now().Add(10 * time.Second); d > descriptors && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		d, r = measure() // they are closed behind
	}
	if d > descriptors || r != rules {
		t.Errorf("%d descriptors and\n%s\nhave become %d and\n%s", descriptors, rules, d, r)
	}
	res, err := w.m.Reserve(t.Context(), slices.Clone(ports))
	check(t, err)
	check(t, w.m.Publish(t.Context(), a.ep, res))
	if seen, err := ask(w.client, "tcp", hostIP4+":8080"); err != nil || seen != clientIP4 {
		t.Errorf("source %q, %v", seen, err)
	}
	check(t, res.Close())
}

// TestRepairAll lets others do their worst: after Repair, which says what it did, all is as before; a second one finds nothing.
func TestRepairAll(t *testing.T) {
	need(t, "nft", "ip", "iptables-nft")
	w := newWorld(t)
	if done, err := w.m.Repair(t.Context()); err != nil || len(done) > 0 {
		t.Fatalf("before there was anything: %q, %v", done, err)
	}
	a, b := w.attach("aaa"), w.attach("bbb")
	a.serve(80)
	a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, portmap.Mapping{Proto: "udp", HostPort: 8080, ContainerPort: 80, HostIP: netip.MustParseAddr(hostIP4)})
	(&container{ns: w.client, w: w}).serve(81)
	br := a.ep.Bridge(w)
	works := func() {
		t.Helper()
		for _, network := range []string{"tcp", "udp"} {
			if seen, err := ask(w.client, network, hostIP4+":8080"); err != nil || seen != clientIP4 {
				t.Errorf("outside to the port, %s: %q %v", network, seen, err)
			}
			if seen, err := ask(b.ns, network, clientIP4+":81"); err != nil || seen != hostIP4 {
				t.Errorf("container to outside, %s: %q %v", network, seen, err)
			}
			if _, err := ask(b.ns, network, a.ep.Address.Addr().String()+":80"); err != nil {
				t.Errorf("container to container, %s: %v", network, err)
			}
		}
	}
	works()
	for _, c := range []struct{ name, harm, undo, said string }{
		{name: "nothing"},
		{name: "flush ruleset", harm: "nft flush ruleset", said: "nftables table conex has network bridge again"},
		{name: "flush a chain", harm: "nft flush chain inet conex forward", said: "nftables table conex has network bridge again"},
		{name: "flush the elements", harm: "nft flush map inet conex ports4; nft flush map inet conex first4", said: "elements put back into nftables table conex"},
		{name: "delete the bridge", harm: "ip link del " + br, said: "bridge " + br + " of network bridge set up again"},
		{name: "bridge down", harm: "ip link set " + br + " down", said: "bridge " + br + " of network bridge set up again"},
		{name: "address gone", harm: "ip addr flush dev " + br, said: "bridge " + br + " of network bridge set up again"},
		{name: "interface off its bridge", harm: "ip link set " + a.ep.HostInterface + " nomaster", said: "container name-aaa is on bridge " + br + " again"},
		{name: "forwarding off", harm: "echo 0 > /proc/sys/net/ipv4/ip_forward", said: "IPv4 forwarding switched on"},
		{
			name: "another engine comes up", harm: "iptables-nft -P FORWARD DROP", undo: "iptables-nft -P FORWARD ACCEPT; iptables-nft -F FORWARD",
			said: "iptables' FORWARD chain lets " + br + " pass",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.harm != "" {
				sh(t, c.harm)
			}
			if c.undo != "" {
				defer sh(t, c.undo)
			}
			done, err := w.m.Repair(t.Context())
			check(t, err)
			if c.said == "" && len(done) > 0 || c.said != "" && !strings.Contains(strings.Join(done, "\n"), c.said) {
				t.Errorf("said %q, want %q", done, c.said)
			}
			works()
			// The kernel takes a moment for a new IPv6 address.
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				done, err := w.m.Repair(t.Context())
				check(t, err)
				if len(done) == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("the second time: %q", done)
				}
			}
		})
	}
}

// TestMendByItself has a watcher for each of some containers: what others do is mended without anybody's command, and elements wake nobody.
func TestMendByItself(t *testing.T) {
	need(t, "nft", "iptables-nft")
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	r := a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80})
	ctx, cancel := context.WithCancel(t.Context())
	woken := make(chan struct{}, 100)
	var done sync.WaitGroup
	for range 3 {
		done.Go(func() {
			check(t, portmap.Watch(ctx, func(at time.Time) {
				woken <- struct{}{}
				if err := w.m.Mend(ctx, at); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}))
		})
	}
	defer done.Wait()
	defer cancel()
	eventually := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			// The listener alone would let the container see the gateway.
			seen, err := ask(w.client, "tcp", hostIP4+":8080")
			if err == nil && seen == clientIP4 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: source %q, %v", what, seen, err)
			}
		}
	}
	// The watchers are there when something wakes them: the first thing may come before they listen.
	for len(woken) < 3 {
		sh(t, "nft add table inet other; nft delete table inet other; sleep 0.2")
	}
	// Our own ports wake nobody. What has woken the watchers so far may still be on its way to them, but comes to an end; ports would do it each time.
	for tries := 20; ; tries-- {
		for len(woken) > 0 {
			<-woken
		}
		check(t, r.Close())
		r = a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80})
		time.Sleep(300 * time.Millisecond)
		if len(woken) == 0 {
			break
		}
		if tries == 0 {
			t.Fatal("a port of ours wakes the watchers")
		}
	}
	for _, harm := range []string{"nft flush ruleset", "nft delete table inet conex", "iptables-nft -P FORWARD DROP"} {
		sh(t, harm)
		eventually(harm)
	}
	cancel()
	done.Wait()
	sh(t, "iptables-nft -P FORWARD ACCEPT; iptables-nft -F FORWARD")
}

// TestReaches compares what the audit says with what happens.
func TestReaches(t *testing.T) {
	need(t, "nft", "iptables-nft")
	w := newWorld(t)
	sh(t, "ip link add down0 type veth peer name down1")
	defer sh(t, "ip link del down0")
	_, err := w.m.Create(t.Context(), Spec{Name: "other"})
	check(t, err)
	defer func() { check(t, w.m.Remove(t.Context(), "other")) }()
	for _, policy := range []string{"host", "docker"} {
		check(t, w.m.SetPolicy(t.Context(), policy == "docker"))
		a, b := w.attach("aaa"+policy), w.attach("bbb"+policy)
		a.serve(80)
		r := a.publish(portmap.Mapping{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, portmap.Mapping{Proto: "tcp", HostPort: 8081, ContainerPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")})
		o := &container{ns: newNetNS(t), w: w}
		o.ep, err = w.m.Attach(t.Context(), AttachRequest{ContainerID: "other" + policy, NetNS: o.ns, Network: "other"})
		check(t, err)
		froms := map[string]*os.File{uplinkName: w.client, "host": nil, "same network": b.ns, "network other": o.ns}
		for _, f := range []struct{ name, up, down, why string }{
			{name: "nothing", why: "nothing closes the port for the host"},
			{name: "a set, an interface and a map", why: "drop by the policy of chain in of the nftables table inet fw",
				up:   "nft 'table inet fw { set open { type inet_service; flags interval; elements = { 22, 8000-8079 }; }; chain in { type filter hook input priority 0; policy drop; iif lo accept; ct state vmap { established : accept, related : accept, invalid : drop }; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; iifname \"" + firstBridge + "\" accept; tcp dport @open accept; }; }'",
				down: "nft delete table inet fw"},
			{name: "a port of a set", why: "reject by rule 1 of chain ports of the nftables table inet fw",
				up:   "nft 'table inet fw { chain ports { tcp dport { 80, 8080 } reject with tcp reset; }; chain in { type filter hook input priority 0; policy accept; iif lo accept; jump ports; }; }'",
				down: "nft delete table inet fw"},
			{name: "iptables", why: "drop by rule 2 of iptables' chain INPUT",
				up:   "iptables-nft -A INPUT -i lo -j ACCEPT; iptables-nft -A INPUT -p tcp -m multiport --dports 443,8000:8100 -m conntrack --ctstate NEW -j DROP; ip6tables-nft -A INPUT -p tcp --dport 8080 -j DROP",
				down: "iptables-nft -F INPUT; ip6tables-nft -F INPUT"},
			{name: "forward", why: "forwarded packets: drop by rule 1 of chain pass of the nftables table inet fw",
				up:   "nft 'table inet fw { chain pass { type filter hook forward priority 0; oifname \"" + firstBridge + "\" tcp dport 80 drop; }; }'",
				down: "nft delete table inet fw"},
		} {
			t.Run(policy+"/"+f.name, func(t *testing.T) {
				if f.up != "" {
					sh(t, f.up)
					defer sh(t, f.down)
				}
				got, err := w.m.Reaches(t.Context(), "aaa", r.Mappings())
				check(t, err)
				asked, said := 0, false
				for _, g := range got {
					if g.Published != "0.0.0.0:8080" {
						if (g.Reached == "yes") != (g.From == "host") {
							t.Errorf("a port of the loopback: %+v", g)
						}
						continue
					}
					ns, ok := froms[g.From]
					if !ok {
						t.Errorf("from %q", g.From)
						continue
					}
					asked++
					addr := hostIP4 + ":8080"
					if g.Family == 6 {
						addr = "[" + hostIP6 + "]:8080"
					}
					seen, err := ask(ns, "tcp", addr)
					if err != nil && g.Reached == "yes" { // a neighbour that is new to the kernel takes longer on a busy machine
						seen, err = ask(ns, "tcp", addr)
					}
					if (err == nil) != (g.Reached == "yes") {
						t.Errorf("%+v, and it was: source %q, %v", g, seen, err)
					}
					said = said || g.Why == f.why
				}
				if asked != 8 {
					t.Errorf("%d answers: %+v", asked, got)
				}
				if !said && (policy == "host" || f.name == "forward") {
					t.Errorf("nobody says %q: %+v", f.why, got)
				}
			})
		}
		check(t, r.Close())
		for _, id := range w.attached() {
			check(t, w.m.Detach(t.Context(), id))
		}
	}
}

// TestPublishSCTP sends the first chunk of an sctp association, by hand since kernels without sctp sockets are common: it arrives with the
// client's address, and a second container can't have the port.
func TestPublishSCTP(t *testing.T) {
	w := newWorld(t)
	for _, policy := range []string{"host", "docker"} {
		check(t, w.m.SetPolicy(t.Context(), policy == "docker"))
		a := w.attach("aaa" + policy)
		ports := []portmap.Mapping{{Proto: "sctp", HostPort: 8080, ContainerPort: 80}}
		r := a.publish(ports...)
		if _, err := w.m.Reserve(t.Context(), ports); !errors.Is(err, portmap.ErrPortTaken) || !strings.Contains(err.Error(), "(by container name-aaa"+policy+")") {
			t.Errorf("a second one: %v", err)
		}
		var in net.PacketConn
		check(t, netlink.In(a.ns, func() (err error) {
			in, err = net.ListenPacket("ip4:132", "0.0.0.0")
			return err
		}))
		check(t, in.SetDeadline(time.Now().Add(10*time.Second)))
		// Ports, tag 0, checksum, and an INIT chunk of 20 bytes.
		init := []byte{0x30, 0x39, 0x1f, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1}
		binary.LittleEndian.PutUint32(init[8:], crc32.Checksum(init, crc32.MakeTable(crc32.Castagnoli)))
		check(t, netlink.In(w.client, func() error {
			out, err := net.Dial("ip4:132", hostIP4)
			if err != nil {
				return err
			}
			defer out.Close()
			_, err = out.Write(init)
			return err
		}))
		b := make([]byte, 100)
		n, from, err := in.ReadFrom(b)
		check(t, err)
		if from.String() != clientIP4 || n != len(init) || binary.BigEndian.Uint16(b[2:]) != 80 {
			t.Errorf("%s: % x from %s", policy, b[:n], from)
		}
		in.Close()
		check(t, r.Close())
		check(t, w.m.Detach(t.Context(), "aaa"+policy))
	}
}

// TestServerOnIPv4Alone is asked over IPv6: the forwarder brings the connection, and the firewall is obeyed all the same.
func TestServerOnIPv4Alone(t *testing.T) {
	need(t, "nft")
	w := newWorld(t)
	a := w.attach("aaa")
	a.serve(80)
	var l net.Listener
	check(t, netlink.In(a.ns, func() (err error) {
		l, err = net.Listen("tcp4", ":81")
		return err
	}))
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			fmt.Fprintf(c, "%s %s", host(c.RemoteAddr()), b)
			c.Close()
		}
	}()
	ports := []portmap.Mapping{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}, {Proto: "tcp", HostPort: 8081, ContainerPort: 81}, {Proto: "udp", HostPort: 8080, ContainerPort: 80}}
	r, err := w.m.Reserve(t.Context(), ports)
	check(t, err)
	r.Inside(func() (*os.File, error) { return os.Open(fmt.Sprintf("/proc/self/fd/%d", a.ns.Fd())) })
	check(t, w.m.Publish(t.Context(), a.ep, r))
	for _, c := range []struct{ network, addr, seen string }{
		{"tcp", "[" + hostIP6 + "]:8080", clientIP6}, {"udp", "[" + hostIP6 + "]:8080", clientIP6},
		{"tcp", "[" + hostIP6 + "]:8081", a.ep.Gateway.String()}, {"tcp", hostIP4 + ":8081", clientIP4},
	} {
		if seen, err := ask(w.client, c.network, c.addr); err != nil || seen != c.seen {
			t.Errorf("%s %s: source %q, want %q: %v", c.network, c.addr, seen, c.seen, err)
		}
	}
	sh(t, "nft 'table inet fw { chain in { type filter hook input priority 0; iif lo accept; tcp dport 8081 drop; }; }'")
	defer sh(t, "nft delete table inet fw")
	if _, err := ask(w.client, "tcp", "["+hostIP6+"]:8081"); err == nil {
		t.Error("reached past the firewall")
	}
	check(t, r.Close())
}
