package runtime

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Each test here plays a hostile image or a hostile process in a container.

// hostileNull describes the host's /dev/null as a container could change it.
func hostileNull(t *testing.T) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/dev/null", &st); err != nil {
		t.Fatal(err)
	}
	return st
}

func TestHostsNullDeviceStaysAsItIs(t *testing.T) {
	c := testConfig(t, image(t), "sh", "-c", "touch -d '2001-01-01 00:00' /proc/keys; touch -d '2001-01-01 00:00' /proc/self/fd/0; chmod 600 /proc/keys; readlink /proc/self/fd/0")
	before := hostileNull(t)
	out, _ := output(t, c)
	after := hostileNull(t)
	if before.Mode != after.Mode || before.Mtim.Sec > after.Mtim.Sec || before.Uid != after.Uid {
		t.Errorf("a container changed the host's /dev/null: %+v, before %+v", after, before)
	}
	if !strings.HasSuffix(out, "/dev/null\n") {
		t.Errorf("standard input is %q", out)
	}
}

// TestHostsNullDeviceInExec lets the container take its own /dev/null away before somebody executes a command in it.
func TestHostsNullDeviceInExec(t *testing.T) {
	for _, prepare := range []string{"rm /dev/null", "rm /dev/null; mkdir /dev/null", "rm /dev/null; ln -s /etc/passwd /dev/null", "rm /dev/null; mknod /dev/null p", "rm /dev/null; mknod /dev/null c 1 5"} {
		b, cfg := running(t, prepare)
		before := hostileNull(t)
		got := execOutput(t, b, cfg, "touch -d '2001-01-01 00:00' /proc/self/fd/0; cat; echo -n end")
		if after := hostileNull(t); after.Mtim.Sec < before.Mtim.Sec || after.Mode != before.Mode {
			t.Errorf("%s: a container changed the host's /dev/null", prepare)
		}
		if !strings.HasSuffix(got, "end") || strings.Contains(got, "root:") {
			t.Errorf("%s: %q", prepare, got)
		}
	}
}

// TestWorkingFolderIsNoDescriptor tries the way of CVE-2024-21626: a folder of the host that the runtime has open.
func TestWorkingFolderIsNoDescriptor(t *testing.T) {
	dir := image(t)
	host, err := os.Open("/")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if fd, err := unix.FcntlInt(host.Fd(), unix.F_DUPFD, 77); err != nil || fd != 77 { // not even close-on-exec
		t.Fatal(fd, err)
	}
	defer unix.Close(77)
	c := testConfig(t, dir, "sh", "-c", "ls -a; readlink /proc/self/cwd; ls /proc/self/fd")
	c.Spec.Process.Cwd = "/proc/self/fd/77"
	b, err := New().Create(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Start(context.Background()); !errors.Is(err, unix.ENOENT) {
		t.Errorf("started with a working folder of the host: %v", err)
	}
	if err := b.Delete(); err != nil {
		t.Error(err)
	}
	run, cfg := running(t, "true")
	cfg.Process.Cwd = "/proc/self/fd/77"
	if _, err := run.Exec(context.Background(), cfg); !errors.Is(err, unix.ENOENT) {
		t.Errorf("executed with a working folder of the host: %v", err)
	}
	cfg.Process.Cwd = "/"
	if got := execOutput(t, run, cfg, "ls /proc/self/fd"); got != "0\n1\n2\n3\n" { // 3 is ls's own
		t.Errorf("open descriptors: %q", got)
	}
}

func TestLinksInTheImage(t *testing.T) {
	for _, at := range []string{"proc", "sys", "dev"} {
		dir := image(t)
		if err := os.Mkdir(filepath.Join(dir, "evil"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/evil", filepath.Join(dir, at)); err != nil {
			t.Fatal(err)
		}
		b, err := New().Create(context.Background(), testConfig(t, dir, "true"))
		if err == nil {
			_, err = b.Start(context.Background())
			if derr := b.Delete(); derr != nil {
				t.Error(derr)
			}
		}
		if !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOTDIR) || !strings.Contains(err.Error(), "/"+at) {
			t.Errorf("/%s is a link: %v", at, err)
		}
	}
}

// TestMountOntoLinks mounts a file where the image has links: out of the root, dangling with missing parents, in a loop.
func TestMountOntoLinks(t *testing.T) {
	for target, want := range map[string]string{
		"../../../../../../tmp/conex-attack-target": "data",
		"../run/systemd/resolve/stub.conf":          "data",
		"/no/such/place":                            "data",
		"loop":                                      "",
	} {
		dir := image(t)
		if err := os.Symlink(target, filepath.Join(dir, "etc", "loop")); err != nil {
			t.Fatal(err)
		}
		src := filepath.Join(t.TempDir(), "src")
		if err := os.WriteFile(src, []byte("data"), 0o644); err != nil {
			t.Fatal(err)
		}
		c := testConfig(t, dir, "cat", "/etc/loop")
		c.Spec.Mounts = append(c.Spec.Mounts, bind(src, "/etc/loop"))
		if want == "" {
			b, err := New().Create(context.Background(), c)
			if err == nil {
				_, err = b.Start(context.Background())
				if derr := b.Delete(); derr != nil {
					t.Error(derr)
				}
			}
			if err == nil {
				t.Errorf("%s: no error", target)
			}
			continue
		}
		if got, _ := output(t, c); got != want {
			t.Errorf("%s: %q", target, got)
		}
		if _, err := os.Lstat("/tmp/conex-attack-target"); err == nil {
			t.Fatal("a mount point was made on the host")
		}
	}
}

// TestInitIsWorthNothing looks at what a container with CAP_SYS_PTRACE would get by taking over --init's pid 1.
func TestInitIsWorthNothing(t *testing.T) { bothWays(t, testInitIsWorthNothing) }

func testInitIsWorthNothing(t *testing.T) {
	c := testConfig(t, image(t), "sh", "-c", "grep -E '^(CapPrm|NoNewPrivs|Seccomp):' /proc/1/status; ls /proc/1/fd; kill -TERM $$; sleep 9")
	c.Init = true
	caps := append([]string{"CAP_SYS_PTRACE"}, c.Spec.Process.Capabilities.Bounding...)
	p := *c.Spec.Process.Capabilities
	p.Bounding, p.Effective, p.Permitted = caps, caps, caps
	c.Spec.Process.Capabilities = &p
	out, st := output(t, c)
	if want := "CapPrm:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t2\n"; out != want {
		t.Errorf("got %q, want %q", out, want)
	}
	if st.Code != 128+15 {
		t.Errorf("exit code %d", st.Code)
	}
}

// TestInitOfAnotherUser: pid 1 must still be able to signal a command that is not root.
func TestInitOfAnotherUser(t *testing.T) { bothWays(t, testInitOfAnotherUser) }

func testInitOfAnotherUser(t *testing.T) {
	c := testConfig(t, image(t), "sh", "-c", "sleep 1000")
	c.Init, c.User = true, "app"
	b, err := New().Create(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Delete(); err != nil {
			t.Error(err)
		}
	}()
	p, err := b.Start(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || st.Code != 128+15 {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestOwnProgramAsCommand is CVE-2019-5736's first step: the image makes the runtime execute itself. (An image that has a file
// at /proc/self/exe gets past this; it is stopped by how the engine executes the monitor, see mount.ForbidExecution.)
func TestOwnProgramAsCommand(t *testing.T) {
	dir := image(t)
	if err := os.Symlink("/proc/self/exe", filepath.Join(dir, "evil")); err != nil {
		t.Fatal(err)
	}
	b, err := New().Create(context.Background(), testConfig(t, dir, "/evil", "-test.run=^$"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = b.Start(context.Background()); err == nil {
		t.Error("the container runs our program")
	}
	if derr := b.Delete(); derr != nil {
		t.Error(derr)
	}
	run, cfg := running(t, "ln -s /proc/self/exe /evil")
	cfg.Process.Args = []string{"/evil", "-test.run=^$"}
	if p, err := run.Exec(context.Background(), cfg); err == nil {
		t.Error("exec runs our program")
		if _, err := p.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestNulBytes(t *testing.T) {
	dir := image(t)
	for _, edit := range []func(c *Config){
		func(c *Config) { c.Spec.Process.Args = []string{"echo", "a\x00b"} },
		func(c *Config) { c.Spec.Process.Env = []string{"LD_PRELOAD=x\x00y"} },
		func(c *Config) { c.Spec.Process.Cwd = "/\x00" },
	} {
		c := testConfig(t, dir, "true")
		edit(c)
		if b, err := New().Create(context.Background(), c); err == nil {
			t.Error("created")
			if err := b.Delete(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestHostileAccounts(t *testing.T) {
	for name, tc := range map[string]struct {
		passwd, group, user string
		ok                  bool
		uid, gid            uint32
	}{
		"long line before": {passwd: strings.Repeat("x", 1<<17) + "\napp:x:7:8::/:\n", user: "app", ok: true, uid: 7, gid: 8},
		"colons":           {passwd: strings.Repeat(":", 4<<20), group: strings.Repeat(":", 4<<20), user: "1", ok: true, uid: 1},
		"members":          {passwd: "app:x:7:8::/:\n", group: "g:x:9:" + strings.Repeat(",", 4<<20) + "app", user: "app", ok: true, uid: 7, gid: 8},
		"too many":         {passwd: strings.Repeat("a:b:1:1\n", maxEntries+1), user: "a"},
		"too large":        {passwd: strings.Repeat("x", maxAccounts+1), user: "a"},
		"NUL":              {passwd: "ap\x00p:x:7:8::/:\n", user: "app"},
		"negative":         {passwd: "app:x:-1:8::/:\n", user: "app"},
		"overflow":         {passwd: "app:x:4294967296:8::/:\n", user: "app"},
		"number as name":   {passwd: "0:x:7:8::/:\n", user: "0", ok: true, uid: 7, gid: 8},
	} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		for f, data := range map[string]string{"passwd": tc.passwd, "group": tc.group} {
			if err := os.WriteFile(filepath.Join(dir, "etc", f), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		root, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		u, err := ResolveUser(root, tc.user, nil)
		root.Close()
		if (err == nil) != tc.ok || u.UID != tc.uid || u.GID != tc.gid {
			t.Errorf("%s: %d:%d, %v", name, u.UID, u.GID, err)
		}
	}
}

// TestReplacedTerminals lets a container with CAP_SYS_ADMIN put other things where exec -t opens a terminal.
func TestReplacedTerminals(t *testing.T) {
	for _, prepare := range []string{
		"mount -t tmpfs x /dev/pts; mknod /dev/pts/ptmx p",
		"mount -t tmpfs x /dev/pts; ln -s /etc/passwd /dev/pts/ptmx",
		"mount -t tmpfs x /dev/pts; mknod /dev/pts/ptmx c 5 2",
		"mount -t tmpfs x /dev/pts",
	} {
		c := testConfig(t, image(t), "sh", "-c", prepare+"; touch /ready; sleep 1000")
		c.DefaultSeccomp = false
		caps := append([]string{"CAP_SYS_ADMIN"}, c.Spec.Process.Capabilities.Bounding...)
		p := *c.Spec.Process.Capabilities
		p.Bounding, p.Effective, p.Permitted = caps, caps, caps
		c.Spec.Process.Capabilities = &p
		b, cfg := runningConfig(t, c)
		cfg.Process.Terminal = true
		cfg.Process.Args = []string{"true"}
		if pr, err := b.Exec(context.Background(), cfg); err == nil {
			t.Errorf("%s: a terminal was opened", prepare)
			pr.Console().Close()
			if _, err := pr.Wait(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestDevicesAreForbidden makes nodes, which is allowed, and opens them, which is not.
func TestDevicesAreForbidden(t *testing.T) {
	c := testConfig(t, image(t), "sh", "-c", "mknod /sda b 8 0; mknod /kmsg c 1 11; mknod /mem c 1 1; for d in /sda /kmsg /mem; do dd if=$d of=/dev/null count=1 2>/dev/null && echo read $d; done; echo -n done")
	if out, _ := output(t, c); out != "done" {
		t.Errorf("got %q", out)
	}
}

// TestNothingShowsOnTheHost holds the host's mounts to what they were, whatever the container's mounts propagate.
func TestNothingShowsOnTheHost(t *testing.T) {
	host := func() string {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c := testConfig(t, image(t), "sh", "-c", "mount -t tmpfs x /mnt && mount -t tmpfs y /tmp && echo mounted")
	c.DefaultSeccomp = false
	caps := append([]string{"CAP_SYS_ADMIN"}, c.Spec.Process.Capabilities.Bounding...)
	p := *c.Spec.Process.Capabilities
	p.Bounding, p.Effective, p.Permitted = caps, caps, caps
	c.Spec.Process.Capabilities = &p
	src := t.TempDir()
	c.Spec.Mounts = append(c.Spec.Mounts, bind(src, "/mnt"))
	out, _ := output(t, c)
	if out != "mounted\n" {
		t.Fatalf("got %q", out)
	}
	for _, mine := range []string{src, c.Scratch, c.RootFS.Upper} {
		if strings.Contains(host(), mine) {
			t.Errorf("a mount on %s is left on the host", mine)
		}
	}
}

// TestRootsGroups is CVE-2022-36109 for the default user, and Docker's rule that root too is looked up in the group file.
func TestRootsGroups(t *testing.T) {
	dir := image(t)
	if err := os.WriteFile(filepath.Join(dir, "etc/group"), []byte("root:x:0:\nwheel:x:10:app,root\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, _ := output(t, testConfig(t, dir, "grep", "^Groups:", "/proc/self/status")); out != "Groups:\t0 10 \n" {
		t.Errorf("got %q", out)
	}
}

func TestUserCanReopenOutput(t *testing.T) {
	c := testConfig(t, image(t), "sh", "-c", "echo again > /dev/stdout")
	c.User = "app"
	if out, _ := output(t, c); out != "again\n" {
		t.Errorf("got %q", out)
	}
}

func TestErrorQuotesTheCommand(t *testing.T) {
	e := &ExecError{Path: "\x1b]0;owned\a", Err: unix.ENOENT}
	if strings.ContainsAny(e.Error(), "\x1b\a") {
		t.Errorf("%q", e.Error())
	}
}

// bind is a bind mount as the engine writes them.
func bind(src, dst string) specs.Mount {
	return specs.Mount{Destination: dst, Type: "bind", Source: src, Options: []string{"rbind", "rprivate"}}
}

// running starts a container that has executed prepare, with what is needed to execute commands in it.
func running(t *testing.T, prepare string) (Container, *ExecConfig) {
	t.Helper()
	return runningConfig(t, testConfig(t, image(t), "sh", "-c", prepare+"; touch /ready; sleep 1000"))
}

// runningConfig starts c, whose command makes the file /ready when it is.
func runningConfig(t *testing.T, c *Config) (Container, *ExecConfig) {
	t.Helper()
	b, err := New().Create(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := b.Start(context.Background())
	if err != nil {
		t.Fatal(errors.Join(err, b.Delete()))
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Signal(unix.SIGKILL), b.Delete()); err != nil {
			t.Error(err)
		}
		if _, err := p.Wait(); err != nil {
			t.Error(err)
		}
	})
	cfg := &ExecConfig{Process: &specs.Process{Env: c.Spec.Process.Env, Cwd: "/", Capabilities: c.Spec.Process.Capabilities}}
	cfg.Process.Args = []string{"sh", "-c", "until [ -e /ready ]; do :; done"}
	w, err := b.Exec(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	return b, cfg
}

// execOutput executes a shell script in the container and returns what it writes.
func execOutput(t *testing.T, b Container, cfg *ExecConfig, script string) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := *cfg
	p := *cfg.Process
	p.Args = []string{"sh", "-c", script}
	c.Process, c.Stdio = &p, [3]*os.File{nil, w, nil}
	pr, err := b.Exec(context.Background(), &c)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pr.Wait(); err != nil {
		t.Fatal(err)
	}
	return string(out)
}
