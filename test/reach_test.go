package test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/disk"
	"conex/internal/network"
)

// TestReach measures who reaches what, and as whom the server sees the asker: three hosts, and containers a1 and a2 on the default network,
// b1 on another one, i1 and i2 on an internal one. docs/SECURITY.md promises the result: a table without a firewall, and for each firewall
// the rows that differ. The test compares them, cell by cell. CONEX_UPDATE=1 writes there what was measured: read it before you commit it.
func TestReach(t *testing.T) {
	doc := readReachDoc(t)
	update := os.Getenv("CONEX_UPDATE") != ""
	var promised table
	var open *matrix
	var r *reach
	policy := ""
	for k, s := range situations(firewallDir(t)) {
		if s.policy != policy {
			policy = s.policy
			r = newReach(t, newWorld(t), policy)
		}
		t.Run(s.name, func(t *testing.T) {
			if _, err := os.Stat(bridgeFilter4); err != nil && strings.Contains(s.name, "br_netfilter") {
				t.Skip("br_netfilter is not loaded: modprobe br_netfilter")
			}
			if why := missing(s.needs); why != "" {
				t.Skip(why)
			}
			r.h.must(r.h.host.run(s.rules, s.args...))
			if !strings.Contains(s.name, "br_netfilter") { // a firewall may have switched it on
				r.bridgeFilterOff()
			}
			r.w.conex("run", "--rm", "busybox", "true") // a start looks at what firewalls say since
			defer func() { r.h.must(r.h.host.run("", "sh", "-c", s.undo)) }()
			got := r.measure()
			if k == 0 {
				open = got
			}
			if update {
				doc.set(s.name, got.markdown(open))
				return
			}
			text, ok := doc.table(s.name)
			if !ok {
				t.Fatalf("docs/SECURITY.md has no table %q", s.name)
			}
			if k == 0 {
				promised = parseTable(text)
			}
			want := promised.with(parseTable(text))
			// What a busy machine answered too late is asked again, with more patience.
			for range 2 {
				r.askAll(got, got.unlike(want), 5*time.Second, 8)
			}
			for _, k := range got.unlike(want) {
				if k.family == 0 && k.proto == "tcp" { // one of the four of a cell
					t.Errorf("%s, asked by %s: measured %q, promised %q", targets()[k.row].words, k.column, got.word(k.row, k.column), want[targets()[k.row].words][k.column])
				}
			}
			for row := range want {
				if !slices.ContainsFunc(targets(), func(t target) bool { return t.words == row }) {
					t.Errorf("the document promises %q, which nothing measures", row)
				}
			}
		})
	}
	if update {
		doc.write(t)
	}
}

// The ports of the matrix. Every place serves on service; the others are published by a1, and on internalPort by i1.
const (
	service      = 7000
	publishedAll = 8001 + iota - 1
	publishedOne
	publishedLoop
	publishedSix
	internalPort
)

// secondNet is the format of the host's second address.
const secondNet4, secondNet6 = "198.51.100.%d/32", "2001:db8:1::%d/128"

// reach is the world of the matrix.
type reach struct {
	t *testing.T
	w *world
	h *hosts
	// askers by the name of their column.
	askers map[string]*place
	// names say how the address of a place is called in a cell.
	names map[netip.Addr]string
	// gateways of a container's network, by asker.
	gateways map[string][2]netip.Addr
	second   [2]netip.Addr
	// linkLocal are the host's addresses on the links that it shares with askers, with the zone that these have for it.
	linkLocal map[string]netip.Addr
}

// bridgeFilterOff keeps what one container sends another of its network out of the host's firewall.
func (r *reach) bridgeFilterOff() {
	r.h.must(r.h.host.run("", "sh", "-c", "for f in "+bridgeFilter4+" "+bridgeFilter6+"; do [ ! -e $f ] || echo 0 >$f; done"))
}

func newReach(t *testing.T, w *world, policy string) *reach {
	t.Helper()
	config, err := os.ReadFile(filepath.Join(w.dir, "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	w.write("config.toml", "publish-policy = \""+policy+"\"\n"+string(config))
	r := &reach{t: t, w: w, h: newHosts(t, w.netns), askers: map[string]*place{}, names: map[netip.Addr]string{}, gateways: map[string][2]netip.Addr{}, linkLocal: map[string]netip.Addr{}}
	r.second = [2]netip.Addr{at(secondNet4, 99), at(secondNet6, 99)}
	r.h.must(r.h.host.in(func() error { return address("uplink0", secondNet4, secondNet6, 99) }))
	for _, to := range r.second {
		r.h.must(r.h.neighbour.routeBy(r.h.host, netip.PrefixFrom(to, to.BitLen())))
	}
	r.bridgeFilterOff()
	w.conex("pull", "-q", "busybox")
	root, err := disk.OpenRoot(w.root)
	r.h.must(err)
	m := network.Open(root, w.state)
	for _, s := range []network.Spec{{Name: "other"}, {Name: "inner", Internal: true}} {
		r.h.must(r.h.host.in(func() error { _, err := m.Create(context.Background(), s); return err }))
	}
	host := r.h.host.addrs
	publish := func(addr netip.Addr, port int) string {
		return fmt.Sprintf("%s:%d:%d", "["+addr.String()+"]", port, service)
	}
	var flags []string
	for _, p := range []string{
		fmt.Sprintf("%d:%d", publishedAll, service), publish(host[0], publishedOne), publish(host[1], publishedOne),
		publish(netip.MustParseAddr("127.0.0.1"), publishedLoop), publish(netip.IPv6Loopback(), publishedLoop), publish(netip.IPv6Unspecified(), publishedSix),
	} {
		p = strings.NewReplacer("["+host[0].String()+"]", host[0].String(), "[127.0.0.1]", "127.0.0.1").Replace(p)
		flags = append(flags, "-p", p, "-p", p+"/udp")
	}
	run := func(name, net string, flags ...string) {
		w.conex(slices.Concat([]string{"run", "-d", "--name", name, "--network", net}, flags, []string{"busybox", "sleep", "100000"})...)
		r.askers[name] = w.container(name)
	}
	run("a1", "bridge", flags...)
	run("a2", "bridge")
	run("b1", "other")
	run("i1", "inner", "-p", fmt.Sprintf("%d:%d", internalPort, service), "-p", fmt.Sprintf("%d:%d/udp", internalPort, service))
	run("i2", "inner")
	for _, i := range []struct{ net, of string }{{"bridge", "a1 a2"}, {"other", "b1"}, {"inner", "i1 i2"}} {
		var info network.Info
		r.h.must(r.h.host.in(func() (err error) { info, err = m.Network(context.Background(), i.net); return err }))
		for _, p := range []network.Pool{info.IPv4, info.IPv6} {
			if !p.Valid() {
				t.Fatalf("network %s lacks a family: %+v", i.net, info)
			}
			r.h.must(r.h.neighbour.routeBy(r.h.host, p.Subnet.Masked()))
			r.names[p.Gateway] = "gateway"
		}
		for name := range strings.FieldsSeq(i.of) {
			r.linkLocal[name] = r.hostLinkLocal(info.Interface, "eth0")
			r.gateways[name] = [2]netip.Addr{info.IPv4.Gateway, info.IPv6.Gateway}
		}
	}
	r.linkLocal["neighbour"] = r.hostLinkLocal("uplink0", "uplink0")
	for _, p := range []*place{r.h.outside, r.h.neighbour, r.h.host} {
		r.askers[p.name] = p
	}
	for name, p := range r.askers {
		for _, a := range p.addrs {
			if a.IsValid() {
				r.names[a] = name
			}
		}
		stop, err := p.serve(service)
		r.h.must(err)
		t.Cleanup(stop)
	}
	for _, a := range r.second {
		r.names[a] = "host"
	}
	return r
}

// hostLinkLocal is the link-local address of an interface of the host, for who reaches it by zone.
func (r *reach) hostLinkLocal(name, zone string) netip.Addr {
	r.t.Helper()
	var addrs []net.Addr
	r.h.must(r.h.host.in(func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			addrs, err = i.Addrs()
		}
		return err
	}))
	for _, a := range addrs {
		if p := netip.MustParsePrefix(a.String()); p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
			return p.Addr().WithZone(zone)
		}
	}
	r.t.Fatalf("the host has no link-local address on %s: %v", name, addrs)
	return netip.Addr{}
}

// target is a row: an address and a port by the family, and who must answer there.
type target struct {
	words string
	// to is the address that an asker tries; an invalid one leaves the cell out.
	to   func(r *reach, asker string, family int) netip.Addr
	port uint16
	// who answers.
	who string
}

// targets are the rows.
func targets() []target {
	host := func(r *reach, _ string, f int) netip.Addr { return r.h.host.addrs[f] }
	second := func(r *reach, _ string, f int) netip.Addr { return r.second[f] }
	gateway := func(r *reach, asker string, f int) netip.Addr { return r.gateways[asker][f] }
	loopback := func(_ *reach, asker string, f int) netip.Addr {
		if asker != "host" {
			return netip.Addr{}
		}
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}[f]
	}
	linkLocal := func(r *reach, asker string, f int) netip.Addr {
		if f == 0 {
			return netip.Addr{}
		}
		return r.linkLocal[asker]
	}
	place := func(name string) func(*reach, string, int) netip.Addr {
		return func(r *reach, _ string, f int) netip.Addr { return r.askers[name].addrs[f] }
	}
	return []target{
		{"a1's port published on all addresses, at the host's address", host, publishedAll, "a1"},
		{"the same, at another of its addresses", second, publishedAll, "a1"},
		{"the same, at 127.0.0.1 and ::1", loopback, publishedAll, "a1"},
		{"the same, at the asker's gateway (`host.docker.internal`)", gateway, publishedAll, "a1"},
		{"the same, at the link-local address that the asker's link has for the host", linkLocal, publishedAll, "a1"},
		{"a1's port published on one address of the host, there", host, publishedOne, "a1"},
		{"what is published on one, at another", second, publishedOne, "a1"},
		{"a1's port published on 127.0.0.1 and ::1, there", loopback, publishedLoop, "a1"},
		{"what is published on 127.0.0.1 and ::1, at the host's address", host, publishedLoop, "a1"},
		{"a1's port published on [::], at the host's address", host, publishedSix, "a1"},
		{"the published port of i1, at the host's address", host, internalPort, "i1"},
		{"a1's own address, any port", place("a1"), service, "a1"},
		{"b1's own address, any port", place("b1"), service, "b1"},
		{"i1's own address, any port", place("i1"), service, "i1"},
		{"a service of the host, at its address", host, service, "host"},
		{"a service of the host, at the asker's gateway", gateway, service, "host"},
		{"a service of the neighbour", place("neighbour"), service, "neighbour"},
		{"a service outside", place("outside"), service, "outside"},
	}
}

// columns are the askers in order.
var columns = []string{"outside", "neighbour", "host", "a1", "a2", "b1", "i1", "i2"}

// situation is what surrounds the containers: rules that a command of the host reads, and what removes them.
type situation struct {
	policy string // of publishing
	name   string
	rules  string
	args   []string
	undo   string
	needs  []string // programs
}

// situations begin with the host that has no firewall. dir is for the configuration of firewalls.
func situations(dir string) []situation {
	nft := []string{"nft", "-f", "-"}
	gone := "nft delete table inet firewall"
	sh := func(script string) []string { return []string{"sh", "-c", script} }
	list := []situation{
		{"host", "no firewall", "", sh("true"), "true", nil},
		{"host", "nftables, input closed", inputClosed, nft, gone, nil},
		{"host", "nftables, input closed but for the published ports", inputClosed + inputOpened, nft, gone, nil},
		{"host", "nftables, input and forward closed", inputClosed + forwardClosed, nft, gone, nil},
		{"host", "iptables (nft), FORWARD DROP", "", sh(forwardDrop("nft")), forwardAccept("nft") + "; nft delete table ip filter; nft delete table ip6 filter", nil},
		{"host", "iptables (legacy), FORWARD DROP", "", sh(forwardDrop("legacy")), forwardAccept("legacy"), nil},
		{"host", "iptables (nft), FORWARD DROP, br_netfilter", "", sh("echo 1 >" + bridgeFilter4 + "; echo 1 >" + bridgeFilter6 + ";" + forwardDrop("nft")),
			forwardAccept("nft") + "; nft delete table ip filter; nft delete table ip6 filter", nil},
		{"docker", "no firewall, publish-policy docker", "", sh("true"), "true", nil},
		{"docker", "nftables, input closed, publish-policy docker", inputClosed, nft, gone, nil},
	}
	for _, f := range firewallTools(dir) {
		open := ""
		for port := publishedAll; port <= internalPort; port++ {
			for _, proto := range []string{"tcp", "udp"} {
				open += "; " + f.open(port, proto)
			}
		}
		start := "( " + f.start + " )"
		list = append(list, situation{"host", f.name + ", incoming closed", "", sh(start), f.stop, f.needs},
			situation{"host", f.name + ", incoming closed but for the published ports, reloaded", "", sh(start + open + "; " + f.reload), f.stop, f.needs})
		if f.bind != "" {
			filtered := "echo 1 >" + bridgeFilter4 + "; echo 1 >" + bridgeFilter6 + ";" + start
			list = append(list, situation{"host", f.name + ", incoming closed, br_netfilter", "", sh(filtered), f.stop, f.needs},
				situation{"host", f.name + ", incoming closed, br_netfilter, bridges in the uplink's zone", "", sh(filtered + "; " + f.bind), f.stop, f.needs})
		}
	}
	slices.SortStableFunc(list, func(a, b situation) int { return -strings.Compare(a.policy, b.policy) }) // one world a policy
	return list
}

// bridgeFilter4 and 6 are br_netfilter's: they send what one container sends another of its network through the host's firewall. New
// network namespaces begin with it where the module is loaded.
const bridgeFilter4, bridgeFilter6 = "/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/net/bridge/bridge-nf-call-ip6tables"

// A firewall as they are written for servers: what is not named is dropped. It names service, which is the host's.
const inputClosed = `
table inet firewall {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iifname lo accept
		meta l4proto { icmp, ipv6-icmp } accept
		meta l4proto { tcp, udp } th dport 7000 accept
	}
}
`

const inputOpened = `
table inet firewall {
	chain input {
		meta l4proto { tcp, udp } th dport { 8001-8005 } accept
	}
}
`

const forwardClosed = `
table inet firewall {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
	}
}
`

func forwardDrop(kind string) string {
	return "iptables-" + kind + " -P FORWARD DROP && ip6tables-" + kind + " -P FORWARD DROP"
}

func forwardAccept(kind string) string {
	return "iptables-" + kind + " -P FORWARD ACCEPT && ip6tables-" + kind + " -P FORWARD ACCEPT"
}

// matrix is a measured table: row, column, family and protocol.
type matrix struct {
	cells map[cellKey]string
}

type cellKey struct {
	row    int
	column string
	family int
	proto  string
}

// measure asks everything at once: most of it is waiting for answers that never come.
func (r *reach) measure() *matrix {
	m := &matrix{cells: map[cellKey]string{}}
	var keys []cellKey
	for row := range targets() {
		for _, c := range columns {
			for f := range 2 {
				for _, proto := range []string{"tcp", "udp"} {
					keys = append(keys, cellKey{row, c, f, proto})
				}
			}
		}
	}
	r.askAll(m, keys, 2*time.Second, 128)
	return m
}

func (r *reach) askAll(m *matrix, keys []cellKey, patience time.Duration, atOnce int) {
	var mu sync.Mutex
	var done sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	rows := targets()
	for _, k := range keys {
		t := rows[k.row]
		to := t.to(r, k.column, k.family)
		if !to.IsValid() {
			continue
		}
		slots <- struct{}{}
		done.Go(func() {
			defer func() { <-slots }()
			who, seen, err := r.askers[k.column].ask(k.proto, netip.AddrPortFrom(to, t.port), patience)
			mu.Lock()
			defer mu.Unlock()
			m.cells[k] = r.cell(t, k.column, who, seen, err)
		})
	}
	done.Wait()
}

// cell words an answer: as whom the asker was seen.
func (r *reach) cell(t target, asker, who string, seen netip.Addr, err error) string {
	if err != nil {
		return "no"
	}
	if who != t.who {
		return "**" + who + " answers**"
	}
	name := r.names[seen]
	switch {
	case name == asker:
		return "yes"
	case seen.IsLoopback():
		return "as itself"
	case name == "":
		return "**as " + seen.String() + "**"
	}
	return "as " + name
}

// markdown is the table as it stands in the document: the rows that are not as in another one, or all of the same one.
func (m *matrix) markdown(other *matrix) string {
	var b strings.Builder
	for row, t := range targets() {
		line, differs := "| "+t.words, m == other
		for _, c := range columns {
			line += " | " + m.word(row, c)
			differs = differs || m.word(row, c) != other.word(row, c)
		}
		if differs {
			b.WriteString(line + " |\n")
		}
	}
	if b.Len() == 0 {
		return "No difference."
	}
	return "| | " + strings.Join(columns, " | ") + " |\n|---" + strings.Repeat("|---", len(columns)) + "|\n" + strings.TrimSuffix(b.String(), "\n")
}

// unlike are the questions of the cells that are not as promised.
func (m *matrix) unlike(want table) []cellKey {
	var keys []cellKey
	for row, t := range targets() {
		for _, c := range columns {
			if m.word(row, c) == want[t.words][c] {
				continue
			}
			for f := range 2 {
				for _, proto := range []string{"tcp", "udp"} {
					keys = append(keys, cellKey{row, c, f, proto})
				}
			}
		}
	}
	return keys
}

// table is a table of the document: cells by row and column.
type table map[string]map[string]string

func parseTable(text string) table {
	t := table{}
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "| "), " |"), " | ")
		if !strings.HasPrefix(line, "| ") || len(cells) != len(columns)+1 || strings.HasPrefix(line, "| |") {
			continue
		}
		row := map[string]string{}
		for k, c := range columns {
			row[c] = cells[k+1]
		}
		t[cells[0]] = row
	}
	return t
}

// with are the table's rows with those of another in their place.
func (t table) with(other table) table {
	all := maps.Clone(t)
	maps.Copy(all, other)
	return all
}

// word is one cell: what is the same for both families and protocols is said once.
func (m *matrix) word(row int, column string) string {
	var families []string
	for f := range 2 {
		tcp, udp := m.cells[cellKey{row, column, f, "tcp"}], m.cells[cellKey{row, column, f, "udp"}]
		if tcp != udp {
			tcp = fmt.Sprintf("tcp %s, udp %s", tcp, udp)
		}
		families = append(families, tcp)
	}
	switch v4, v6 := families[0], families[1]; {
	case v4 == v6:
		return v4
	case v4 == "":
		return v6
	default:
		return "v4 " + v4 + "; v6 " + v6
	}
}

// reachDoc is docs/SECURITY.md, whose tables stand between comments that name their situation.
type reachDoc struct {
	path, text string
}

func readReachDoc(t *testing.T) *reachDoc {
	t.Helper()
	d := &reachDoc{path: filepath.Join("..", "docs", "SECURITY.md")}
	b, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	d.text = string(b)
	return d
}

func (d *reachDoc) cut(name string) (before, table, after string, ok bool) {
	before, rest, ok := strings.Cut(d.text, "<!-- reach: "+name+" -->\n")
	if !ok {
		return "", "", "", false
	}
	table, after, ok = strings.Cut(rest, "\n<!-- end -->")
	return before, strings.TrimSpace(table), after, ok
}

func (d *reachDoc) table(name string) (string, bool) {
	_, table, _, ok := d.cut(name)
	return table, ok
}

func (d *reachDoc) set(name, table string) {
	before, _, after, ok := d.cut(name)
	if !ok {
		d.text += "\n<!-- reach: " + name + " -->\n\n" + table + "\n\n<!-- end -->\n"
		return
	}
	d.text = before + "<!-- reach: " + name + " -->\n\n" + table + "\n\n<!-- end -->" + after
}

func (d *reachDoc) write(t *testing.T) {
	t.Helper()
	if err := os.WriteFile(d.path, []byte(d.text), 0o644); err != nil {
		t.Fatal(err)
	}
}
