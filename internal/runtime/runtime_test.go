package runtime

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/disk"
	"conex/internal/linux/caps"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// image makes a small root file system from the host's static busybox.
func image(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "etc", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, content string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("bin/busybox", string(bin), 0o755)
	write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n", 0o644)
	write("etc/group", "root:x:0:\napp:x:1001:\naudio:x:29:app\n", 0o644)
	write("noexec", "#!/bin/sh\n", 0o644)
	for _, a := range []string{"sh", "cat", "id", "ls", "mount", "touch", "ps", "sleep", "stty", "tty", "pwd", "env", "mkdir", "mknod", "hostname", "ulimit", "grep", "dd", "true", "sysctl", "readlink", "rm", "chmod", "ln"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// box creates a container on image with a default spec that edit may change.
func testConfig(t testing.TB, image string, args ...string) *Config {
	t.Helper()
	dir := t.TempDir()
	c := &Config{ID: disk.RandomID(), Spec: DefaultSpec(), DefaultSeccomp: true, SeccompCache: filepath.Join(dir, "cache"), Scratch: filepath.Join(dir, "rootfs")}
	for _, d := range []string{"upper", "work", "rootfs", "cache"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c.RootFS = RootFS{Lower: []string{image}, Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work")}
	c.Spec.Process.Args = args
	c.Spec.Process.Env = []string{"PATH=/bin"}
	c.Spec.Linux.CgroupsPath = "/conex-test/" + c.ID
	return c
}

func output(t *testing.T, c *Config) (string, ExitStatus) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c.Stdio[1], c.Stdio[2] = w, w
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
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return string(out), st
}

func TestIsolation(t *testing.T) {
	dir := image(t)
	type check struct {
		name, script, want string
		edit               func(*Config)
	}
	for _, tc := range []check{
		{"pid 1", "echo $$", "1\n", nil},
		{"hostname", "hostname", "box\n", func(c *Config) { c.Spec.Hostname = "box" }},
		{"user by name", "id", "uid=1000(app) gid=1001(app) groups=29(audio),1001(app)\n", func(c *Config) { c.User = "app" }},
		{"user by numbers", "id -u; id -g", "5\n6\n", func(c *Config) { c.User = "5:6" }},
		{"group add", "id -G", "0 29 77\n", func(c *Config) { c.GroupAdd = []string{"audio", "77"} }},
		{"home of user", "echo $HOME", "/home/app\n", func(c *Config) { c.User = "app" }},
		{"working folder is made", "pwd", "/a/b\n", func(c *Config) { c.Spec.Process.Cwd = "/a/b" }},
		{"read-only root", "touch /x 2>/dev/null || echo no", "no\n", func(c *Config) { c.Spec.Root.Readonly = true }},
		{"writable root", "touch /x && ls /x", "/x\n", nil},
		{"core only where the kernel has it", "[ -h /dev/core ] && [ ! -e /proc/kcore ]; echo $?", "1\n", nil},
		{"masked file", "cat /proc/kcore | dd bs=1 count=1 2>/dev/null; echo $?", "0\n", nil},
		{"masked folder", "ls /sys/firmware | grep -c .", "0\n", nil},
		{"proc sys is read-only", "echo 1 > /proc/sys/kernel/panic || echo no", "no\n", nil},
		{"sysrq is read-only", "echo h > /proc/sysrq-trigger || echo no", "no\n", nil},
		{"no mount", "mount -t tmpfs none /tmp 2>/dev/null || echo no", "no\n", nil},
		{"default capabilities", "grep CapEff /proc/self/status", "CapEff:\t00000000a80425fb\n", nil},
		{"no capabilities for a user", "grep CapEff /proc/self/status; grep CapBnd /proc/self/status", "CapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\n", func(c *Config) { c.User = "app" }},
		{"seccomp filter", "grep '^Seccomp:' /proc/self/status", "Seccomp:\t2\n", nil},
		{"profile with flags", "grep '^Seccomp:' /proc/self/status; mkdir /tmp/q 2>/dev/null || echo refused", "Seccomp:\t2\nrefused\n", func(c *Config) {
			c.Spec.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}},
			}
		}},
		{"no new privileges", "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n", func(c *Config) { c.Spec.Process.NoNewPrivileges = true }},
		{"descriptors", "ls /proc/self/fd | grep -c .", "4\n", nil},
		{"devices", "ls /dev | grep -v core", "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n", nil},
		{"no new device", "mknod /tmp/d b 254 0 && cat /tmp/d 2>/dev/null || echo no", "no\n", nil},
		{"low ports", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0\n", nil},
		{"signals", "", "SigIgn:\t0000000000000000\n", func(c *Config) { c.Spec.Process.Args = []string{"grep", "SigIgn", "/proc/self/status"} }},
		{"init is pid 1", "echo $$", "2\n", func(c *Config) { c.Init = true }},
		{"no mounts of the host", "grep -c ext4 /proc/self/mounts; grep -vc conexnone /proc/self/mounts | grep -c '^[12][0-9]$'", "0\n1\n", nil},
		{"tmpfs", "touch /mnt/x && grep ' /mnt ' /proc/mounts | grep -o 'size=[0-9]*k'", "size=64k\n", func(c *Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/mnt", Type: "tmpfs", Options: []string{"size=64k"}})
		}},
		{"bind read-only", "cat /etc/host-issue >/dev/null && { echo >> /etc/host-issue; } 2>/dev/null || echo ro", "ro\n", func(c *Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/etc/host-issue", Type: "bind", Source: "/etc/issue", Options: []string{"rbind", "ro"}})
		}},
		{"privileged", "grep CapEff /proc/self/status | grep -vc 00000000a80425fb; mount -t tmpfs none /tmp && echo yes", "1\nyes\n", func(c *Config) {
			if err := Privileged(c.Spec); err != nil {
				t.Fatal(err)
			}
			c.DefaultSeccomp = false
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := testConfig(t, dir, "sh", "-c", tc.script)
			if tc.edit != nil {
				tc.edit(c)
			}
			got, st := output(t, c)
			if tc.name == "no mount" || tc.name == "masked file" {
				got = got[max(0, len(got)-len(tc.want)):]
			}
			// The shell's own complaint about a refused redirection is not what is asked.
			lines := strings.SplitAfter(got, "\n")
			kept := ""
			for _, l := range lines {
				if !strings.HasPrefix(l, "sh: ") {
					kept += l
				}
			}
			if kept != tc.want || st.Signal != 0 {
				t.Errorf("got %q (status %+v), want %q", got, st, tc.want)
			}
		})
	}
}

func TestExitStatus(t *testing.T) {
	dir := image(t)
	if _, st := output(t, testConfig(t, dir, "sh", "-c", "exit 42")); st != (ExitStatus{Code: 42}) {
		t.Errorf("exit: %+v", st)
	}
	c := testConfig(t, dir, "sh", "-c", "kill -9 $$; exit 1")
	c.Init = true
	if _, st := output(t, c); st.Code != 137 {
		t.Errorf("kill behind init: %+v", st)
	}
}

func TestCommandErrors(t *testing.T) {
	dir := image(t)
	for name, want := range map[string]int{"nope": 127, "/nope": 127, "/noexec": 126, "/etc": 126} {
		c := testConfig(t, dir, name)
		b, err := New().Create(context.Background(), c)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Start(context.Background())
		var e *ExecError
		if !errors.As(err, &e) || e.ExitCode() != want {
			t.Errorf("%s: got %v, want exit code %d", name, err, want)
		}
		if err := b.Delete(); err != nil {
			t.Error(err)
		}
	}
}

func TestRefusals(t *testing.T) {
	dir := image(t)
	for name, edit := range map[string]func(*Config){
		"mount over /proc/self": func(c *Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/proc/self", Type: "bind", Source: "/tmp"})
		},
		"relative destination": func(c *Config) { c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "x", Type: "tmpfs"}) },
		"host sysctl":          func(c *Config) { c.Spec.Linux.Sysctl["vm.swappiness"] = "1" },
		"missing bind source": func(c *Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such/source"})
		},
		"unknown seccomp flag": func(c *Config) {
			c.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_NONE_SUCH"}}
		},
		"unknown user": func(c *Config) { c.User = "nobody-here" },
		"no command":   func(c *Config) { c.Spec.Process.Args = nil },
	} {
		c := testConfig(t, dir, "true")
		edit(c)
		b, err := New().Create(context.Background(), c)
		if err == nil {
			_, err = b.Start(context.Background())
			if derr := b.Delete(); derr != nil {
				t.Error(derr)
			}
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			t.Log(err)
		}
	}
}

func TestExecAndTerminal(t *testing.T) {
	dir := image(t)
	c := testConfig(t, dir, "sleep", "1000")
	c.Spec.Hostname = "inner"
	b, err := New().Create(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Delete()
	p, err := b.Start(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	e, err := b.Exec(context.Background(), &ExecConfig{User: "app", Process: &specs.Process{
		Args: []string{"sh", "-c", "tty; stty size; hostname; id -un; ps -o comm | grep -c '^sleep'; grep CapEff /proc/self/status; exit 5"}, Env: []string{"PATH=/bin"}, Cwd: "/", Terminal: true,
		ConsoleSize: &specs.Box{Height: 33, Width: 99}, Capabilities: c.Spec.Process.Capabilities,
	}})
	if err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(e.Console()) // EIO at the end, when the last slave closed
	e.Console().Close()
	want := "/dev/pts/0\r\n33 99\r\ninner\r\napp\r\n1\r\nCapEff:\t0000000000000000\r\n"
	if string(out) != want {
		t.Errorf("got %q want %q", out, want)
	}
	if st, err := e.Wait(); err != nil || st.Code != 5 {
		t.Errorf("exec: %+v %v", st, err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || st.Code != 137 || st.Signal != unix.SIGKILL {
		t.Errorf("kill: %+v %v", st, err)
	}
	if _, err := b.Exec(context.Background(), &ExecConfig{Process: &specs.Process{Args: []string{"true"}}}); err == nil {
		t.Error("exec in a dead container succeeded")
	}
}

func TestDefaultCapabilitiesAreDockers(t *testing.T) {
	m, err := caps.Mask(DefaultSpec().Process.Capabilities.Bounding)
	if err != nil || m != 0xa80425fb {
		t.Fatalf("%x %v", m, err)
	}
}

func BenchmarkStart(b *testing.B) {
	dir := image(b)
	for b.Loop() {
		b.StopTimer()
		c := testConfig(b, dir, "true")
		b.StartTimer()
		box, err := New().Create(context.Background(), c)
		if err != nil {
			b.Fatal(err)
		}
		p, err := box.Start(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Wait(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := box.Delete(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
