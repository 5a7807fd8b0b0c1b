package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"conex/internal/linux/mount"
	"conex/internal/linux/nsfork"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostBase is the host's id of the tests' container root.
const hostBase = 1_500_000_000

func withUsers(c *Config) *Config {
	c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: hostBase, Size: 65536}}
	c.Spec.Linux.UIDMappings, c.Spec.Linux.GIDMappings = ids, ids
	return c
}

// bothWays runs a test with the fork and with nsfork's stage.
func bothWays(t *testing.T, f func(t *testing.T)) {
	t.Run("fork", f)
	nsfork.Staged.Store(true)
	defer nsfork.Staged.Store(false)
	t.Run("stage", f)
}

func ownerOf(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

func TestUserNamespace(t *testing.T) { bothWays(t, testUserNamespace) }

func testUserNamespace(t *testing.T) {
	dir := image(t)
	if err := os.Lchown(filepath.Join(dir, "noexec"), 1000, 1001); err != nil {
		t.Fatal(err)
	}
	type check struct {
		name, script, want string
		edit               func(*Config)
	}
	for _, tc := range []check{
		{"maps", "cat /proc/self/uid_map /proc/1/gid_map", strings.Repeat(fmt.Sprintf("%10d %10d %10d\n", 0, hostBase, 65536), 2), nil},
		{"pid 1", "echo $$", "1\n", nil},
		{"who", "id", "uid=0(root) gid=0(root) groups=0(root)\n", nil},
		{"user by name", "id", "uid=1000(app) gid=1001(app) groups=29(audio),1001(app)\n", func(c *Config) { c.User = "app" }},
		{"owners of the image", "ls -ln /noexec /bin/busybox | while read m l u g x; do echo $u:$g; done", "0:0\n1000:1001\n", nil},
		{"root rules the image", "chmod 600 /bin/busybox; rm /noexec; ls -ln /bin/busybox | while read m x; do echo $m; done", "-rw-------\n", nil},
		{"devices", "echo x >/dev/null && dd if=/dev/zero bs=1 count=1 2>/dev/null | ls -ln /dev/null | while read m l u g x; do echo $m $u:$g; done", "crw-rw-rw- 0:0\n", nil},
		{"own dev", "mkdir /dev/x && ls -ld /dev/shm | while read m l u g x; do echo $m $u:$g; done", "drwxrwxrwt root:root\n", nil},
		{"streams may be opened again", "echo hello >/dev/stdout", "hello\n", nil},
		{"streams of a user", "echo hello >/dev/stderr", "hello\n", func(c *Config) { c.User = "app" }},
		{"processes", "ls -d /proc/[0-9]* | grep -c 1", "1\n", nil},
		{"masks", "cat /proc/keys; cat /proc/timer_list; ls /sys/firmware; touch /proc/sysrq-trigger 2>/dev/null || echo no", "no\n", nil},
		{"no new mounts", "mount -t tmpfs x /tmp 2>/dev/null || echo no", "no\n", nil},
		{"hostname", "hostname", "box\n", func(c *Config) { c.Spec.Hostname = "box" }},
		{"own net", "ls /sys/class/net", "lo\n", nil},
		{"shared net", "readlink /proc/self/ns/net", link(t, "/proc/self/ns/net") + "\n", func(c *Config) {
			withoutNamespace(c, specs.NetworkNamespace)
			c.Spec.Linux.Sysctl = nil // which the host's would be
		}},
		{"init", "echo $$; grep ^Uid: /proc/1/status; readlink /proc/1/exe || echo no", "2\nUid:\t0\t0\t0\t0\nno\n", func(c *Config) { c.Init = true }},
		{"working folder", "pwd; ls -ldn . | while read m l u g x; do echo $u; done", "/a/b\n0\n", func(c *Config) { c.Spec.Process.Cwd = "/a/b" }},
		{"tmpfs", "touch /t/x; ls -ln /t | while read m l u g x; do echo -n $u; done; ls -ldn /t | while read m l u g x; do echo $u; done", "07\n", func(c *Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/t", Type: "tmpfs", Source: "tmpfs", Options: []string{"uid=7", "mode=777"}})
		}},
		{"capabilities", "grep CapEff /proc/self/status", "CapEff:\t00000000a80425fb\n", nil},
		{"no capability outside", "dd if=/dev/zero of=/proc/sys/kernel/core_pattern bs=1 count=1 2>/dev/null || echo no", "no\n", func(c *Config) { c.Spec.Linux.ReadonlyPaths = nil }},
		{"limits", "ulimit -n", "2000\n", func(c *Config) {
			c.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 2000, Hard: 2000}}
		}},
		{"oom score", "cat /proc/self/oom_score_adj", "77\n", func(c *Config) { n := 77; c.Spec.Process.OOMScoreAdj = &n }},
		{"own sysctl", "sysctl -n net.ipv4.ip_unprivileged_port_start", "42\n", func(c *Config) {
			c.Spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "42"}
		}},
		{"groups that may ping", "sysctl -n net.ipv4.ping_group_range", "0\t65535\n", nil},
		{"read-only root", "touch /x 2>/dev/null || echo no", "no\n", func(c *Config) { c.Spec.Root.Readonly = true }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := withUsers(testConfig(t, dir, "sh", "-c", tc.script))
			if tc.edit != nil {
				tc.edit(c)
			}
			if got, _ := output(t, c); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// TestUserNamespaceOnFullDisk: overlayfs would go on read-only, and the container fail at its first file.
func TestUserNamespaceOnFullDisk(t *testing.T) {
	c := withUsers(testConfig(t, image(t), "true"))
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=3"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	c.RootFS.Upper, c.RootFS.Work = filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, d := range []string{c.RootFS.Upper, c.RootFS.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ct, err := New().Create(t.Context(), c)
	if err == nil {
		_, err = ct.Start(t.Context())
		err = errors.Join(err, ct.Delete())
	}
	if errors.Is(err, mount.ErrNoIDMap) {
		t.Skip("this kernel's tmpfs can't be mapped")
	}
	if err == nil || !strings.Contains(err.Error(), "is the disk full") {
		t.Errorf("got %v", err)
	}
}

func link(t *testing.T, path string) string {
	t.Helper()
	l, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func withoutNamespace(c *Config, ns specs.LinuxNamespaceType) {
	var keep []specs.LinuxNamespace
	for _, n := range c.Spec.Linux.Namespaces {
		if n.Type != ns {
			keep = append(keep, n)
		}
	}
	c.Spec.Linux.Namespaces = keep
}

// TestUserNamespaceLeavesOwnersAlone looks at what a container's users write to the disk: the image's ids, none of the host's range.
func TestUserNamespaceLeavesOwnersAlone(t *testing.T) {
	dir := image(t)
	src := t.TempDir()
	if err := os.Chmod(src, 0o777); err != nil {
		t.Fatal(err)
	}
	c := withUsers(testConfig(t, dir, "sh", "-c", "touch /new /plain/x /mapped/x; chmod 4755 /mapped/x; ls -ldn /mapped/old /plain/old | while read m l u g x; do echo $u; done"))
	mapped := t.TempDir()
	for _, d := range []string{src, mapped} {
		if err := os.WriteFile(filepath.Join(d, "old"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := bind(mapped, "/mapped")
	m.Options = append(m.Options, "idmap")
	c.Spec.Mounts = append(c.Spec.Mounts, bind(src, "/plain"), m)
	out, _ := output(t, c)
	if out != "0\n65534\n" {
		t.Errorf("owners inside: %q", out)
	}
	for path, want := range map[string]string{
		filepath.Join(c.RootFS.Upper, "new"): "0:0",
		filepath.Join(mapped, "x"):           "0:0",
		filepath.Join(src, "x"):              fmt.Sprintf("%d:%d", hostBase, hostBase),
	} {
		if got := ownerOf(t, path); got != want {
			t.Errorf("%s belongs to %s, want %s", path, got, want)
		}
	}
}

// TestUserNamespaceHasNothingOfTheHosts: a process that breaks out of everything else is nobody.
func TestUserNamespaceHasNothingOfTheHosts(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := withUsers(testConfig(t, image(t), "sh", "-c", "cat /secret 2>&1; chmod 777 /secret 2>/dev/null || echo no; sysctl -w kernel.hostname=evil >/dev/null 2>&1 || echo no"))
	c.Spec.Mounts = append(c.Spec.Mounts, bind(secret, "/secret"))
	if out, _ := output(t, c); out != "cat: can't open '/secret': Permission denied\nno\nno\n" {
		t.Errorf("%q", out)
	}
}

func TestUserNamespaceExec(t *testing.T) { bothWays(t, testUserNamespaceExec) }

func testUserNamespaceExec(t *testing.T) {
	b, cfg := runningUsers(t)
	adj := 33
	cfg.Process.OOMScoreAdj = &adj
	got := execOutput(t, b, cfg, "id -u; cat /proc/self/oom_score_adj; touch /x && ls -ln /x | while read m l u g x; do echo $u; done; echo out >/dev/stdout; readlink /proc/self/ns/user; readlink /proc/1/ns/user")
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if len(lines) != 6 || lines[0] != "0" || lines[1] != "33" || lines[2] != "0" || lines[3] != "out" || lines[4] != lines[5] || lines[4] == link(t, "/proc/self/ns/user") {
		t.Errorf("%q", got)
	}
	cfg.User = "70000"
	if _, err := b.Exec(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "user 70000: the container's user namespace does not have it") {
		t.Errorf("got %v", err)
	}
	cfg.User = "app"
	if got := execOutput(t, b, cfg, "id -u; echo x >/dev/stdout"); got != "1000\nx\n" {
		t.Errorf("%q", got)
	}
}

func runningUsers(t *testing.T) (Container, *ExecConfig) {
	t.Helper()
	return runningConfig(t, withUsers(testConfig(t, image(t), "sh", "-c", "touch /ready; sleep 1000")))
}

func TestUserNamespaceTerminal(t *testing.T) { bothWays(t, testUserNamespaceTerminal) }

func testUserNamespaceTerminal(t *testing.T) {
	c := withUsers(testConfig(t, image(t), "sh", "-c", "tty; ls -ln /dev/pts/0 | while read m l u g x; do echo $m $u:$g; done; echo x >/dev/console"))
	c.User = "app"
	c.Spec.Process.Terminal = true
	b, err := New().Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Delete(); err != nil {
			t.Error(err)
		}
	}()
	p, err := b.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Console().Close()
	out, _ := io.ReadAll(p.Console()) // ends with EIO, the terminal's other side being closed
	if _, err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := string(out); got != "/dev/pts/0\r\ncrw------- 1000:5\r\nx\r\n" && got != "/dev/pts/0\r\ncrw--w---- 1000:5\r\nx\r\n" {
		t.Errorf("%q", got)
	}
}

func TestMappingsThatMakeNoSense(t *testing.T) {
	dir := image(t)
	for want, edit := range map[string]func(*Config){
		"id mappings without a user namespace": func(c *Config) { withoutNamespace(c, specs.UserNamespace) },
		"a user namespace without id mappings": func(c *Config) { c.Spec.Linux.UIDMappings = nil },
		"does not map id 0": func(c *Config) {
			c.Spec.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 1, HostID: 5000, Size: 10}}
		},
	} {
		c := withUsers(testConfig(t, dir, "true"))
		edit(c)
		if _, err := New().Create(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// TestJoinUserNamespace makes a container in the user namespace of another one.
func TestJoinUserNamespace(t *testing.T) { bothWays(t, testJoinUserNamespace) }

func testJoinUserNamespace(t *testing.T) {
	first, _ := runningUsers(t)
	pid := first.(*box).init.Pid()
	c := testConfig(t, image(t), "sh", "-c", "readlink /proc/self/ns/user; id -u; echo $$; touch /x")
	c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/proc/" + strconv.Itoa(pid) + "/ns/user"})
	if got, _ := output(t, c); got != link(t, "/proc/"+strconv.Itoa(pid)+"/ns/user")+"\n0\n1\n" {
		t.Errorf("%q", got)
	}
	if got := ownerOf(t, filepath.Join(c.RootFS.Upper, "x")); got != "0:0" {
		t.Errorf("on disk: %s", got)
	}
}
