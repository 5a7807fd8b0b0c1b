package doctor

import (
	"conex/internal/linux/netlink"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/resolver"

	"github.com/google/nftables"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func forwarding(_ context.Context, _ *Host, r *Result) {
	r.Found = "IPv4 and IPv6"
	if n, ok := sysctl("net.ipv4.ip_forward"); ok && n == 0 {
		// The first container on a bridge switches it on.
		r.Found = "off until a container needs it"
		r.Note("net.ipv4.ip_forward is 0")
	}
	v6, ok := sysctl("net.ipv6.conf.all.forwarding")
	if !ok {
		r.Worse(Degraded, "the kernel has no IPv6: containers have IPv4 alone", "boot without ipv6.disable=1")
		return
	}
	if n, ok := sysctl("net.ipv6.conf.all.disable_ipv6"); ok && n == 1 {
		r.Note("net.ipv6.conf.all.disable_ipv6 is 1: networks have IPv4 alone")
		return
	}
	if v6 == 0 {
		return
	}
	// A router does not heed router advertisements, unless accept_ra is 2: such a host loses its own IPv6 when they expire.
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		r.Worse(Unknown, "interfaces could not be listed ("+err.Error()+")", "")
		return
	}
	learnt, err := netlink.Dump(func() ([]rtnetlink.Route, error) { return rtnetlink.RouteList(nil, unix.AF_INET6) })
	if err != nil {
		r.Worse(Unknown, "routes could not be listed ("+err.Error()+")", "")
		return
	}
	for _, l := range links {
		name := l.Attrs().Name
		byRA := slices.ContainsFunc(learnt, func(rt rtnetlink.Route) bool { return rt.LinkIndex == l.Attrs().Index && rt.Protocol == unix.RTPROT_RA })
		if n, ok := sysctl("net.ipv6.conf." + name + ".accept_ra"); ok && n == 1 && byRA {
			r.Worse(Degraded, fmt.Sprintf("%s learns its IPv6 route from its router, and with forwarding on it stops to: IPv6 ends when that expires", name),
				fmt.Sprintf("sysctl net.ipv6.conf.%s.accept_ra=2", name))
		}
	}
}

func bridgeFilter(_ context.Context, _ *Host, r *Result) {
	r.Found = "packets between containers of one network pass no firewall (br_netfilter is off)"
	for _, f := range []string{"iptables", "ip6tables"} {
		if n, ok := sysctl("net.bridge.bridge-nf-call-" + f); ok && n == 1 {
			r.Found = "br_netfilter is on: packets between containers of one network pass the host's forward chains"
			r.Note("net.bridge.bridge-nf-call-%s is 1; conex's table accepts them, and what drops them is told under networks", f)
		}
	}
	for _, name := range []string{"all", "default"} {
		if n, ok := sysctl("net.ipv4.conf." + name + ".rp_filter"); ok && n == 1 {
			r.Note("net.ipv4.conf.%s.rp_filter is 1 (strict): fine with one uplink; with asymmetric routes answers are lost, 2 is loose", name)
		}
	}
}

// Share of the connection table that is nearly full.
const nearlyFull = 0.85

func conntrack(_ context.Context, _ *Host, r *Result) {
	count, ok1 := sysctl("net.netfilter.nf_conntrack_count")
	limit, ok2 := sysctl("net.netfilter.nf_conntrack_max")
	if !ok1 || !ok2 || limit == 0 {
		r.Found = "not loaded yet; the first network loads it"
		return
	}
	r.Found = fmt.Sprintf("%d of %d connections", count, limit)
	if float64(count) > nearlyFull*float64(limit) {
		r.Worse(Degraded, fmt.Sprintf("the table of connections is nearly full, %d of %d: new ones will be dropped", count, limit),
			fmt.Sprintf("sysctl net.netfilter.nf_conntrack_max=%d", 4*limit))
	}
}

// firewalls tells who else has rules on this machine; which of them are in the way of a network is the engine's look.
func firewalls(_ context.Context, _ *Host, r *Result) {
	if !isRoot() {
		r.Worse(Unknown, "firewall rules take root to see", "sudo conex doctor")
		return
	}
	conn, err := nftables.New()
	if err != nil {
		r.Worse(Broken, "nftables can't be spoken to ("+err.Error()+"): no port can be published", "a kernel with CONFIG_NF_TABLES")
		return
	}
	chains, err := conn.ListChains()
	if err != nil {
		r.Worse(Broken, "nftables can't be listed ("+err.Error()+"): no port can be published", "a kernel with CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET and CONFIG_NFT_NAT")
		return
	}
	var who []string
	add := func(name string) {
		if !slices.Contains(who, name) {
			who = append(who, name)
		}
	}
	for _, c := range chains {
		switch {
		case c.Name == "DOCKER-USER" || c.Table.Name == "docker-bridges":
			add("Docker")
		case strings.HasPrefix(c.Name, "ufw"):
			add("ufw")
		case c.Table.Name == "firewalld":
			add("firewalld")
		case strings.HasPrefix(c.Name, "NETAVARK"):
			add("Podman")
		case strings.HasPrefix(c.Name, "KUBE-"):
			add("Kubernetes")
		}
	}
	r.Found = "no other tool's rules"
	if len(who) > 0 {
		r.Found = "rules of " + strings.Join(who, ", ") + " beside conex's"
	}
	for _, f := range []string{"ip_tables_names", "ip6_tables_names"} {
		if names := strings.Fields(text("/proc/thread-self/net/" + f)); len(names) > 0 {
			r.Worse(Degraded, "rules of the old iptables (iptables-legacy) are in use: they count beside nftables, and neither shows the other's",
				"move to iptables-nft: update-alternatives --set iptables /usr/sbin/iptables-nft, then load the rules anew")
			r.Note("%s: %s", f, strings.Join(names, " "))
			r.Note("nobody is told when these rules change: after a change run `conex network repair`, or the next start of a container looks at them")
		}
	}
	for _, s := range []struct{ path, name string }{{"/run/firewalld.pid", "firewalld"}, {"/run/docker.pid", "dockerd"}, {"/run/docker.sock", "a Docker socket"}} {
		if _, err := os.Stat(s.path); err == nil {
			r.Note("%s is there (%s)", s.name, s.path)
		}
	}
	if strings.Contains(text("/etc/ufw/ufw.conf"), "ENABLED=yes") {
		r.Note("ufw is enabled at boot")
	}
}

// dnsTimeout is how long a name server has to answer.
const dnsTimeout = 2 * time.Second

func nameservers(ctx context.Context, h *Host, r *Result) {
	servers, stub, err := resolver.Nameservers(h.ResolvConf)
	if err != nil {
		r.Worse(Broken, err.Error(), "mend "+h.ResolvConf)
		return
	}
	if len(h.Config.DNS) > 0 {
		servers = nil
		for _, s := range h.Config.DNS {
			if a, err := netip.ParseAddr(s); err == nil {
				servers = append(servers, a)
			}
		}
		r.Note("name servers are the configuration's, not the host's")
	}
	if len(servers) == 0 {
		r.Worse(Broken, h.ResolvConf+" names no name server: containers look up no name outside", "write `nameserver ADDRESS` into it, or set dns in the configuration")
		return
	}
	if stub {
		r.Note("systemd-resolved's stub (127.0.0.53) stands for these")
	}
	type answer struct {
		took time.Duration
		err  error
	}
	answers := make([]answer, len(servers))
	done := make(chan int)
	for i, s := range servers {
		go func() {
			begin := time.Now()
			err := askRoot(ctx, netip.AddrPortFrom(s, h.Nameserver))
			answers[i] = answer{time.Since(begin), err}
			done <- i
		}()
	}
	for range servers {
		<-done
	}
	var dead, live []string
	for i, a := range answers {
		if a.err != nil {
			dead = append(dead, servers[i].String())
			r.Note("%s: %v", servers[i], a.err)
			continue
		}
		live = append(live, servers[i].String())
		r.Note("%s answers within %s", servers[i], a.took.Round(time.Millisecond))
	}
	r.Found = strings.Join(live, ", ") + " answer"
	if len(live) == 1 {
		r.Found += "s"
	}
	switch {
	case len(live) == 0:
		r.Worse(Broken, fmt.Sprintf("no name server answers (%s)", strings.Join(dead, ", ")), "see to the network, or name others: dns in the configuration, --dns")
	case len(dead) > 0:
		r.Worse(Degraded, fmt.Sprintf("%s do not answer: every look-up may wait for them", strings.Join(dead, ", ")), "take them out of "+h.ResolvConf)
	}
}

// askRoot asks a server for the root's name servers, which every resolver knows. Any answer of its counts.
func askRoot(ctx context.Context, server netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	// Header: an id, "recursion desired", one question. Then the root's name, type NS, class IN.
	var id [2]byte
	rand.Read(id[:]) // never fails, says crypto/rand
	q := []byte{id[0], id[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1}
	c, err := new(net.Dialer).DialContext(ctx, "udp", server.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(d); err != nil {
			return err
		}
	}
	if _, err := c.Write(q); err != nil {
		return err
	}
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("no answer within %s", dnsTimeout)
		}
		if err != nil {
			return err
		}
		if n >= 12 && b[0] == q[0] && b[1] == q[1] && b[2]&0x80 != 0 {
			return nil
		}
	}
}

// minMTU is what IPv6 needs.
const minMTU = 1280

func mtu(_ context.Context, _ *Host, r *Result) {
	links, err := netlink.Dump(rtnetlink.LinkList)
	if err != nil {
		r.Worse(Unknown, "interfaces could not be listed ("+err.Error()+")", "")
		return
	}
	var routes []rtnetlink.Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rs, err := netlink.Dump(func() ([]rtnetlink.Route, error) {
			return rtnetlink.RouteListFiltered(family, &rtnetlink.Route{Dst: nil}, rtnetlink.RT_FILTER_DST)
		})
		if err != nil {
			r.Worse(Unknown, "routes could not be listed ("+err.Error()+")", "")
			return
		}
		routes = append(routes, rs...)
	}
	byIndex := map[int]rtnetlink.Link{}
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
	}
	uplink := 0
	name := ""
	for _, rt := range routes {
		l := byIndex[rt.LinkIndex]
		if l == nil || rt.Dst != nil && !rt.Dst.IP.IsUnspecified() || l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		m := l.Attrs().MTU
		if rt.MTU > 0 {
			m = min(m, rt.MTU)
		}
		if uplink == 0 || m < uplink {
			uplink, name = m, l.Attrs().Name
		}
	}
	if uplink == 0 {
		r.Found = "no default route: networks have 1500"
		return
	}
	r.Found = fmt.Sprintf("%d on %s", uplink, name)
	if uplink < minMTU {
		r.Worse(Degraded, fmt.Sprintf("%s has an MTU of %d, less than the %d that IPv6 needs", name, uplink, minMTU), fmt.Sprintf("ip link set %s mtu %d", name, minMTU))
	}
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "bridge" || !strings.HasPrefix(a.Name, "conex") && !strings.HasPrefix(a.Name, "cxb") || a.MTU <= uplink {
			continue
		}
		r.Worse(Degraded, fmt.Sprintf("bridge %s has an MTU of %d, the uplink %s %d: large packets depend on ICMP, which many networks drop", a.Name, a.MTU, name, uplink),
			fmt.Sprintf("stop the containers on it and run: ip link set %s mtu %d", a.Name, uplink))
	}
	if n, ok := sysctl("net.ipv4.ip_no_pmtu_disc"); ok && n != 0 {
		r.Note("net.ipv4.ip_no_pmtu_disc is %d: the path's MTU is not looked for", n)
	}
	if n, ok := sysctl("net.ipv4.tcp_mtu_probing"); ok && n == 0 {
		r.Note("net.ipv4.tcp_mtu_probing is 0; if connections stand still after their first packets, a firewall on the way drops ICMP: 1 gets TCP around it")
	}
}

// kernelLimits are bounds that are met with many containers.
func kernelLimits(_ context.Context, _ *Host, r *Result) {
	r.Found = "files, inotify, keys, processes"
	for _, l := range []struct {
		name string
		min  int64
		why  string
	}{
		{"fs.file-max", 65536, "all processes together"},
		{"fs.inotify.max_user_instances", 128, "programs that watch files fail with \"too many open files\""},
		{"fs.inotify.max_user_watches", 8192, "programs that watch files fail with \"no space left on device\""},
		{"kernel.keys.root_maxkeys", 1000, "each container takes a session keyring of root's"},
		{"kernel.pid_max", 32768, "processes of all containers"},
		{"kernel.threads-max", 16384, "threads of all containers"},
		{"vm.max_map_count", 65530, "databases map many files"},
	} {
		n, ok := number("/proc/sys/" + strings.Join(splitSysctl(l.name), "/"))
		if !ok {
			continue
		}
		r.Note("%s = %d", l.name, n)
		if n < l.min {
			r.Worse(Degraded, fmt.Sprintf("%s is %d: %s", l.name, n, l.why), fmt.Sprintf("sysctl %s=%d", l.name, l.min))
		}
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		r.Note("open files: %d, at most %d (containers inherit that)", lim.Cur, lim.Max)
		if lim.Max < 4096 {
			r.Worse(Degraded, fmt.Sprintf("a process may open %d files at most, and containers inherit that", lim.Max), "ulimit -Hn 1048576 where conex is started, or --ulimit nofile=")
		}
	}
	if n, err := filepath.Glob("/proc/[0-9]*"); err == nil {
		if limit, ok := sysctl("kernel.pid_max"); ok && int64(len(n)) > limit*8/10 {
			r.Worse(Degraded, fmt.Sprintf("%d processes of at most %d run", len(n), limit), fmt.Sprintf("sysctl kernel.pid_max=%d", min(4*limit, 4194304)))
		}
	}
}

// splitSysctl cuts a setting's name; dots in an interface's name are not met here.
func splitSysctl(name string) []string { return strings.Split(name, ".") }

func clock(_ context.Context, _ *Host, r *Result) {
	if text("/proc/sys/kernel/random/boot_id") == "" {
		r.Worse(Broken, "the kernel has no boot id: what ran before a reboot can't be told from what runs", "mount /proc as it is")
		return
	}
	now := time.Now()
	r.Found = now.UTC().Format("2006-01-02 15:04:05") + " UTC"
	if now.Year() < 2025 {
		r.Worse(Degraded, fmt.Sprintf("the clock says %d: certificates of registries will seem not valid yet", now.Year()), "set the clock: timedatectl set-ntp true")
	}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	switch {
	case err != nil:
		r.Note("whether the clock is kept could not be seen: %v", err)
	case state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0:
		r.Note("nothing keeps the clock (no NTP); it may drift")
	}
}
