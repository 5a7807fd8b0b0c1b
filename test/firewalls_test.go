package test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// firewallTool is a firewall that people use, whose commands run in the host's network namespace with a configuration of the test's own.
type firewallTool struct {
	name  string
	needs []string
	// start closes everything but the service, open and shut are about a published port, by number and protocol. bind says that the bridges belong
	// to the uplink; empty where nothing could.
	start, stop, reload string
	bind                string
	open, shut          func(port int, proto string) string
}

// firewallTools are the ones that the test knows. dir is a folder for their configuration.
func firewallTools(dir string) []firewallTool {
	// ufw knows one configuration, so it sees others in the places of the machine's.
	ufw := func(command string) string {
		return "unshare --mount --propagation private sh -c 'mount --bind " + dir + "/ufw /etc/ufw && mount --bind " + dir + "/default /etc/default && " + command + "'"
	}
	bus := "export DBUS_SYSTEM_BUS_ADDRESS=unix:path=" + dir + "/bus; "
	offline := "firewall-offline-cmd -q --system-config " + dir + "/firewalld --zone=public "
	return []firewallTool{
		{
			name: "ufw", needs: []string{"ufw", "iptables", "unshare"},
			start: "set -e; cp -a /etc/ufw " + dir + "/ufw; cp -a /etc/default " + dir + "/default; " +
				ufw(fmt.Sprintf("ufw --force reset && ufw default deny incoming && ufw default deny routed && ufw allow %d && ufw --force enable", service)),
			stop:   ufw("ufw --force disable") + "; nft delete table ip filter; nft delete table ip6 filter; rm -r " + dir + "/ufw " + dir + "/default",
			open:   func(port int, proto string) string { return ufw(fmt.Sprintf("ufw allow %d/%s", port, proto)) },
			shut:   func(port int, proto string) string { return ufw(fmt.Sprintf("ufw delete allow %d/%s", port, proto)) },
			reload: ufw("ufw reload"),
		},
		{
			name: "firewalld", needs: []string{"firewalld", "firewall-cmd", "firewall-offline-cmd", "dbus-daemon", "setsid"},
			start: "set -e; cp -a /etc/firewalld " + dir + "/firewalld; cat >" + dir + "/bus.conf <<'X'\n" + fmt.Sprintf(busConfig, dir) + "X\n" +
				offline + fmt.Sprintf("--add-interface=uplink0; "+offline+"--add-port=%d/tcp; "+offline+"--add-port=%d/udp; ", service, service) +
				bus + "setsid dbus-daemon --config-file=" + dir + "/bus.conf --nofork --nopidfile >" + dir + "/log 2>&1 </dev/null & echo $! >" + dir + "/pids; " +
				"while [ ! -e " + dir + "/bus ]; do sleep 0.05; done; " +
				"setsid firewalld --nofork --nopid --system-config " + dir + "/firewalld --log-file " + dir + "/firewalld.log >>" + dir + "/log 2>&1 </dev/null & echo $! >>" + dir + "/pids; " +
				"for i in $(seq 100); do if firewall-cmd --state >/dev/null 2>&1; then exit 0; fi; sleep 0.1; done; cat " + dir + "/log; exit 1",
			stop: "tac " + dir + "/pids | while read p; do kill $p; while [ -e /proc/$p ]; do sleep 0.05; done; done; rm -rf " + dir + "/firewalld " + dir + "/bus",
			open: func(port int, proto string) string {
				return bus + fmt.Sprintf("firewall-cmd -q --add-port=%d/%s && firewall-cmd -q --permanent --add-port=%d/%s", port, proto, port, proto)
			},
			shut: func(port int, proto string) string {
				return bus + fmt.Sprintf("firewall-cmd -q --remove-port=%d/%s && firewall-cmd -q --permanent --remove-port=%d/%s", port, proto, port, proto)
			},
			reload: bus + "firewall-cmd -q --reload",
			bind:   bus + "for b in $(ip -o link show type bridge | cut -d: -f2); do firewall-cmd -q --zone=public --add-interface=$b; done",
		},
	}
}

const busConfig = `<busconfig><type>system</type><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
`

// firewallDir is a folder whose path is short enough for a socket's.
func firewallDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "conex-fw.")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// missing says which programs are not installed, in words; empty when all are.
func missing(programs []string) string {
	var out []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			out = append(out, p)
		}
	}
	if len(out) == 0 {
		return ""
	}
	return strings.Join(out, ", ") + " not installed"
}

// TestFirewallReload has firewalls reload their rules while containers run: ports that are open stay so or come back without a command, what
// --egress denies is denied at every moment, and a port that the firewall shuts is shut.
func TestFirewallReload(t *testing.T) {
	dir := firewallDir(t)
	for _, f := range firewallTools(dir) {
		t.Run(f.name, func(t *testing.T) {
			if why := missing(f.needs); why != "" {
				t.Skip(why)
			}
			w := newWorld(t)
			h := newHosts(t, w.netns)
			sh := func(script string) { t.Helper(); h.must(h.host.run("", "sh", "-c", script)) }
			w.conex("pull", "-q", "busybox")
			w.conex("run", "-d", "--name", "web", "-p", fmt.Sprintf("%d:%d", publishedAll, service), "-p", fmt.Sprintf("%d:%d/udp", publishedAll, service), "busybox", "sleep", "100000")
			w.conex("run", "-d", "--name", "bounded", "--egress", "allow="+h.neighbour.addrs[0].String(), "busybox", "sleep", "100000")
			web, bounded := w.container("web"), w.container("bounded")
			for _, p := range []*place{web, h.neighbour, h.outside} {
				stop, err := p.serve(service)
				h.must(err)
				t.Cleanup(stop)
			}
			sh(f.start)
			stopped := false
			stop := func() {
				if !stopped {
					stopped = true
					sh(f.stop)
				}
			}
			defer stop()
			for _, proto := range []string{"tcp", "udp"} {
				sh(f.open(publishedAll, proto))
			}
			reached := func(who *place, proto string, to netip.AddrPort, want string) bool {
				name, seen, err := who.ask(proto, to, time.Second)
				return err == nil && name == want && (want != "web" || seen == who.addrs[0])
			}
			host := netip.AddrPortFrom(h.host.addrs[0], publishedAll)
			works := func(when string) {
				t.Helper()
				for _, proto := range []string{"tcp", "udp"} {
					w.eventually(when+": web is not reached by "+proto, func() bool { return reached(h.outside, proto, host, "web") })
					w.eventually(when+": the neighbour is not reached by "+proto, func() bool {
						return reached(bounded, proto, netip.AddrPortFrom(h.neighbour.addrs[0], service), "neighbour")
					})
					w.eventually(when+": outside is not reached by "+proto, func() bool {
						return reached(web, proto, netip.AddrPortFrom(h.outside.addrs[0], service), "outside")
					})
				}
			}
			works("before the reload")

			// What is denied is tried all the time.
			var leaks, tries atomic.Int64
			end, ended := make(chan struct{}), make(chan struct{})
			enough := sync.OnceFunc(func() { close(end); <-ended })
			defer enough()
			go func() {
				defer close(ended)
				for {
					select {
					case <-end:
						return
					default:
						if _, _, err := bounded.ask("udp", netip.AddrPortFrom(h.outside.addrs[0], service), 50*time.Millisecond); err == nil {
							leaks.Add(1)
						}
						tries.Add(1)
					}
				}
			}()
			for range 2 {
				sh(f.reload)
				works("after a reload")
			}
			enough()
			if leaks.Load() > 0 || tries.Load() == 0 {
				t.Errorf("%d of %d tries to what --egress denies were answered", leaks.Load(), tries.Load())
			}

			sh(f.shut(publishedAll, "tcp"))
			if reached(h.outside, "tcp", host, "web") {
				t.Error("a port that the firewall shuts is reached")
			}
			sh(f.reload)
			if reached(h.outside, "tcp", host, "web") {
				t.Error("a port that the firewall shuts is reached after a reload")
			}
			stop()
			works("after the firewall is gone")
		})
	}
}
