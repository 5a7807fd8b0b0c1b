package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/nftables"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"conex/internal/config"
	"conex/internal/linux/nettest"
)

// TestMain runs the tests in a network namespace of their own, where faults can be made.
func TestMain(m *testing.M) {
	nettest.Main(m, "a broken network is made in a namespace, which takes root", nil)
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func host(t *testing.T) *Host {
	dir := t.TempDir()
	return &Host{Config: &config.Config{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state")}, ResolvConf: filepath.Join(dir, "resolv.conf"), Nameserver: 53}
}

// look runs one check.
func look(h *Host, f func(context.Context, *Host, *Result)) Result {
	r := Result{Level: OK}
	f(context.Background(), h, &r)
	return r
}

// want checks level and words of a result, and that who is told of a fault is told what to do.
func want(t *testing.T, r Result, level, words string) {
	t.Helper()
	if r.Level != level || !strings.Contains(r.Found, words) {
		t.Errorf("%s: %q, want %s: %q", r.Level, r.Found, level, words)
	}
	if level != OK && level != Unknown && r.Mend == "" {
		t.Errorf("%q: nothing to do about it", r.Found)
	}
}

func TestLook(t *testing.T) {
	h := host(t)
	ok(t, os.WriteFile(h.ResolvConf, nil, 0o644))
	seen := map[string]bool{}
	for _, r := range h.Look(t.Context()) {
		if seen[r.Check] || r.Found == "" || rank(r.Level) > 0 && r.Level != Unknown && r.Mend == "" || strings.Contains(r.Found, "\n") {
			t.Errorf("result %+v", r)
		}
		seen[r.Check] = true
	}
	if len(seen) != len(checks) {
		t.Errorf("%d results of %d checks", len(seen), len(checks))
	}
	for _, dir := range []string{h.Config.Root, h.Config.State} {
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("%s was made", dir)
		}
	}
}

func TestWorse(t *testing.T) {
	r := Result{Level: OK, Found: "fine"}
	r.Worse(Degraded, "slow", "hurry")
	r.Worse(Broken, "off", "switch")
	r.Worse(Degraded, "old", "new")
	if r.Level != Broken || r.Found != "off" || r.Mend != "switch" || strings.Join(r.Details, ";") != "slow (hurry);old (new)" {
		t.Errorf("%+v", r)
	}
}

// TestFiltered takes system calls away from a thread, as a seccomp profile around conex does.
func TestFiltered(t *testing.T) {
	for _, c := range []struct {
		nr    uintptr
		f     func(context.Context, *Host, *Result)
		level string
		words string
	}{
		{unix.SYS_CLONE3, processes, Degraded, "clone3 is missing"},
		{unix.SYS_PIDFD_OPEN, processes, Broken, "pidfd_open is missing"},
		{unix.SYS_CLOSE_RANGE, processes, Broken, "close_range is missing"},
		{unix.SYS_FSOPEN, mounts, Broken, "fsopen is missing"},
		{unix.SYS_MOUNT_SETATTR, mounts, Broken, "mount_setattr is missing"},
	} {
		res := make(chan Result)
		go func() {
			runtime.LockOSThread() // never unlocked: the filter dies with the thread
			filter := []unix.SockFilter{
				{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
				{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(c.nr), Jf: 1},
				{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
				{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
			}
			prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
			if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
				res <- Result{Found: "seccomp: " + errno.Error()}
				return
			}
			res <- look(nil, c.f)
		}()
		want(t, <-res, c.level, c.words)
	}
	want(t, look(nil, processes), OK, "clone3")
	want(t, look(nil, mounts), OK, "fsopen")
}

// TestCapabilities drops them from a thread.
func TestCapabilities(t *testing.T) {
	drop := func(cap uint) Result {
		res := make(chan Result)
		go func() {
			runtime.LockOSThread() // never unlocked: its capabilities die with the thread
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			if err := unix.Capget(&hdr, &data[0]); err != nil {
				res <- Result{Found: err.Error()}
				return
			}
			data[cap/32].Effective &^= 1 << (cap % 32)
			if err := unix.Capset(&hdr, &data[0]); err != nil {
				res <- Result{Found: err.Error()}
				return
			}
			res <- look(nil, capabilities)
		}()
		return <-res
	}
	want(t, drop(unix.CAP_NET_ADMIN), Broken, "CAP_NET_ADMIN is missing")
	want(t, drop(unix.CAP_SYS_RESOURCE), Degraded, "CAP_SYS_RESOURCE is missing")
}

// TestFolders has root and state on file systems of its own, in a mount namespace.
func TestFolders(t *testing.T) {
	h := host(t)
	ok(t, os.MkdirAll(h.Config.Root, 0o700))
	ok(t, os.MkdirAll(h.Config.State, 0o700))
	mount := func(dir, opts string, flags uintptr, f func(context.Context, *Host, *Result), fill int) Result {
		res := make(chan Result)
		go func() {
			runtime.LockOSThread() // never unlocked: the mount goes with the thread
			fail := func(err error) { res <- Result{Found: err.Error()} }
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				fail(err)
				return
			}
			if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("none", dir, "tmpfs", 0, opts)); err != nil {
				fail(err)
				return
			}
			for i := range fill {
				// The test's limit is met before the last.
				if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), make([]byte, 64<<10), 0o600); err != nil {
					break
				}
			}
			if flags != 0 {
				if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
					fail(err)
					return
				}
			}
			res <- look(h, f)
		}()
		return <-res
	}
	root, state := h.Config.Root, h.Config.State
	want(t, mount(root, "", 0, rootFolder, 0), Degraded, "is on tmpfs: images and volumes are lost")
	want(t, mount(root, "", unix.MS_RDONLY, rootFolder, 0), Broken, "is mounted read-only")
	want(t, mount(root, "size=1m", 0, space, 100), Broken, "no space is left")
	want(t, mount(root, "size=100m,nr_inodes=8", 0, space, 100), Broken, "no inode is left")
	want(t, mount(state, "", 0, stateFolder, 0), OK, "on tmpfs")
	want(t, mount(state, "size=1m", 0, stateFolder, 0), Broken, "no container can be started")
	ok(t, os.WriteFile(root+"/version", []byte("77\n"), 0o644))
	want(t, look(h, rootFolder), Broken, "layout version 77")
}

func TestCgroupDriver(t *testing.T) {
	h := host(t)
	h.Config.CgroupDriver = config.CgroupSystemd
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		t.Skip("systemd runs here")
	}
	want(t, look(h, cgroups), Broken, "systemd does not run here")
}

// link makes an interface; dummies are not in every kernel, veths are.
func link(t *testing.T, name string, mtu int) rtnetlink.Link {
	t.Helper()
	a := rtnetlink.NewLinkAttrs()
	a.Name, a.MTU = name, mtu
	ok(t, rtnetlink.LinkAdd(&rtnetlink.Veth{LinkAttrs: a, PeerName: name + "p", PeerMTU: uint32(mtu)}))
	l, err := rtnetlink.LinkByName(name)
	ok(t, err)
	t.Cleanup(func() { ok(t, rtnetlink.LinkDel(l)) })
	for _, n := range []string{name, name + "p"} {
		l, err := rtnetlink.LinkByName(n)
		ok(t, err)
		ok(t, rtnetlink.LinkSetUp(l))
	}
	for _, a := range []string{"192.0.2.2/24", "2001:db8::2/64"} {
		addr, err := rtnetlink.ParseAddr(a)
		ok(t, err)
		addr.Flags = unix.IFA_F_NODAD
		ok(t, rtnetlink.AddrAdd(l, addr))
	}
	return l
}

func TestMTU(t *testing.T) {
	want(t, look(nil, mtu), OK, "no default route")
	up := link(t, "up0", 1400)
	ok(t, rtnetlink.RouteAdd(&rtnetlink.Route{LinkIndex: up.Attrs().Index, Gw: net.ParseIP("192.0.2.1")}))
	want(t, look(nil, mtu), OK, "1400 on up0")
	a := rtnetlink.NewLinkAttrs()
	a.Name, a.MTU = "conex0", 1500
	br := &rtnetlink.Bridge{LinkAttrs: a}
	ok(t, rtnetlink.LinkAdd(br))
	t.Cleanup(func() { ok(t, rtnetlink.LinkDel(br)) })
	want(t, look(nil, mtu), Degraded, "bridge conex0 has an MTU of 1500, the uplink up0 1400")
	ok(t, rtnetlink.LinkSetMTU(br, 1400))
	want(t, look(nil, mtu), OK, "1400")
	ok(t, rtnetlink.LinkSetMTU(br, 1000))
	ok(t, rtnetlink.LinkSetMTU(up, 1000))
	want(t, look(nil, mtu), Degraded, "less than the 1280 that IPv6 needs")
}

func TestForwarding(t *testing.T) {
	ok(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0))
	want(t, look(nil, forwarding), OK, "off until a container needs it")
	ok(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
	ok(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	want(t, look(nil, forwarding), OK, "IPv4 and IPv6")
	up := link(t, "up1", 1500)
	_, all, err := net.ParseCIDR("::/0")
	ok(t, err)
	ok(t, rtnetlink.RouteAdd(&rtnetlink.Route{LinkIndex: up.Attrs().Index, Dst: all, Gw: net.ParseIP("2001:db8::1"), Protocol: unix.RTPROT_RA}))
	want(t, look(nil, forwarding), Degraded, "up1 learns its IPv6 route from its router")
	ok(t, os.WriteFile("/proc/sys/net/ipv6/conf/up1/accept_ra", []byte("2"), 0))
	want(t, look(nil, forwarding), OK, "IPv4 and IPv6")
}

func TestFirewalls(t *testing.T) {
	if b, err := os.ReadFile("/proc/net/ip_tables_names"); err == nil && len(b) > 0 {
		t.Skip("iptables-legacy was used in this namespace, by this test's last run, and its tables go with the namespace alone")
	}
	want(t, look(nil, firewalls), OK, "no other tool's rules")
	conn, err := nftables.New()
	ok(t, err)
	table := conn.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
	conn.AddChain(&nftables.Chain{Name: "DOCKER-USER", Table: table})
	conn.AddChain(&nftables.Chain{Name: "ufw-user-forward", Table: table})
	ok(t, conn.Flush())
	want(t, look(nil, firewalls), OK, "rules of Docker, ufw beside conex's")
	conn.DelTable(table)
	ok(t, conn.Flush())
	if out, err := exec.Command("iptables-legacy", "-P", "FORWARD", "ACCEPT").CombinedOutput(); err != nil {
		t.Skipf("nobody has the old iptables here: %v: %s", err, out)
	}
	r := look(nil, firewalls)
	want(t, r, Degraded, "rules of the old iptables (iptables-legacy) are in use")
	if !slices.ContainsFunc(r.Details, func(d string) bool { return strings.Contains(d, "conex network repair") }) {
		t.Errorf("details %q do not say that changes have to be told", r.Details)
	}
}

// TestNameservers has one that answers, one that is silent, and one that isn't there.
func TestNameservers(t *testing.T) {
	lo, err := rtnetlink.LinkByName("lo")
	ok(t, err)
	ok(t, rtnetlink.LinkSetUp(lo))
	serve := func(addr string, answer bool) *net.UDPConn {
		c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr), Port: 5353})
		ok(t, err)
		t.Cleanup(func() { c.Close() })
		go func() {
			b := make([]byte, 512)
			for {
				n, from, err := c.ReadFromUDP(b)
				if err != nil {
					return
				}
				b[2] |= 0x80
				if answer {
					if _, err := c.WriteToUDP(b[:n], from); err != nil {
						return
					}
				}
			}
		}()
		return c
	}
	serve("127.0.0.2", true)
	serve("127.0.0.3", false)
	h := host(t)
	h.Nameserver = 5353
	conf := func(s string) Result {
		ok(t, os.WriteFile(h.ResolvConf, []byte(s), 0o644))
		return look(h, nameservers)
	}
	want(t, conf("search example.com\n"), Broken, "names no name server")
	want(t, conf("nameserver 127.0.0.2\n"), OK, "127.0.0.2 answers")
	want(t, conf("nameserver 127.0.0.2\nnameserver 127.0.0.4\n"), Degraded, "127.0.0.4 do not answer")
	want(t, conf("nameserver 127.0.0.3\n"), Broken, "no name server answers (127.0.0.3)")
	h.Config.DNS = []string{"127.0.0.2"}
	want(t, conf("nameserver 127.0.0.3\n"), OK, "127.0.0.2 answers")
}
