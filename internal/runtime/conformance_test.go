package runtime_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/cgroup"
	"conex/internal/linux/nsfork"
	"conex/internal/ocicli"
	_ "conex/internal/ocicli/takeover" // makes this test's binary an OCI runtime under another name
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestConformance holds every implementation of Runtime to the same behaviour.
func TestConformance(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	t.Run("builtin", func(t *testing.T) { conform(t, func(*testing.T) runtime.Runtime { return runtime.New() }) })
	t.Run("builtin by the stage", func(t *testing.T) {
		nsfork.Staged.Store(true)
		defer nsfork.Staged.Store(false)
		conform(t, func(*testing.T) runtime.Runtime { return runtime.New() })
	})
	t.Run("conex-runtime", func(t *testing.T) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(t.TempDir(), ocicli.Name)
		if err := os.Symlink(self, link); err != nil {
			t.Fatal(err)
		}
		conform(t, external(link))
	})
	t.Run("runc", func(t *testing.T) { conform(t, external(installed(t, "runc"))) })
	t.Run("crun", func(t *testing.T) {
		path := installed(t, "crun")
		if cgroup.Probe().Version == "hybrid" {
			// Of it there are versions that refuse v1 and v2 beside each other: hide the latter.
			unshare := installed(t, "unshare")
			wrapper := filepath.Join(t.TempDir(), "crun")
			script := "#!/bin/sh\nexec " + unshare + " -m sh -c 'umount /sys/fs/cgroup/unified; exec " + path + " \"$@\"' crun \"$@\"\n"
			if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			path = wrapper
		}
		conform(t, external(path))
	})
}

func installed(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip(name + " is not installed")
	}
	return path
}

func external(path string) func(*testing.T) runtime.Runtime {
	return func(t *testing.T) runtime.Runtime { return runtime.NewExternal(path, t.TempDir()) }
}

// rootFolder makes a root file system from the host's busybox.
func rootFolder(t *testing.T) string {
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	dir := t.TempDir()
	for name, data := range map[string]string{
		"bin/busybox": string(bin), "etc/passwd": "root:x:0:0::/root:\napp:x:1000:1001::/home/app:\n", "etc/group": "audio:x:29:app\n", "bad": "no program",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"sh", "cat", "id", "ls", "touch", "sleep", "stty", "pwd", "grep", "true", "hostname", "readlink"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

type suite struct {
	t    *testing.T
	rt   runtime.Runtime
	root string
}

func (s suite) config(args ...string) *runtime.Config {
	t := s.t
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"upper", "work", "root", "cache"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c := &runtime.Config{ID: disk.RandomID(), Spec: runtime.DefaultSpec(), DefaultSeccomp: true, SeccompCache: dir + "/cache", Scratch: dir + "/root"}
	c.RootFS = runtime.RootFS{Lower: []string{s.root}, Upper: dir + "/upper", Work: dir + "/work"}
	c.Spec.Process.Args, c.Spec.Process.Env = args, []string{"PATH=/bin"}
	c.Spec.Linux.CgroupsPath = "/conex-test/" + c.ID
	return c
}

// create makes a container that the test's end deletes.
func (s suite) create(c *runtime.Config) runtime.Container {
	s.t.Helper()
	ct, err := s.rt.Create(context.Background(), c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		for range 2 { // idempotent
			if err := ct.Delete(); err != nil {
				s.t.Error(err)
			}
		}
		if pids, err := ct.Cgroup().Pids(); err != nil || len(pids) > 0 {
			s.t.Errorf("left in the cgroup: %v %v", pids, err)
		}
	})
	return ct
}

// pipes gives a function that starts something two pipes and returns what it wrote and how it ended.
func (s suite) output(start func(stdio [3]*os.File) (runtime.Process, error)) (string, runtime.ExitStatus) {
	s.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Close()
	p, err := start([3]*os.File{nil, w, w})
	w.Close()
	if err != nil {
		s.t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		s.t.Fatal(err)
	}
	st, err := p.Wait()
	if err != nil {
		s.t.Fatal(err)
	}
	return string(out), st
}

func (s suite) run(c *runtime.Config) (string, runtime.ExitStatus) {
	s.t.Helper()
	return s.output(func(stdio [3]*os.File) (runtime.Process, error) {
		c.Stdio = stdio
		return s.create(c).Start(context.Background())
	})
}

func conform(t *testing.T, make func(*testing.T) runtime.Runtime) {
	root := rootFolder(t)
	run := func(name string, f func(s suite)) {
		t.Run(name, func(t *testing.T) { f(suite{t, make(t), root}) })
	}
	var null unix.Stat_t
	if err := unix.Stat(os.DevNull, &null); err != nil {
		t.Fatal(err)
	}
	defer func() { // whatever the runtime gives its users, and whatever they do to it
		var now unix.Stat_t
		if err := unix.Stat(os.DevNull, &now); err != nil || now.Uid != null.Uid || now.Gid != null.Gid || now.Mode != null.Mode {
			t.Errorf("the host's null device is of %d:%d, mode %o: %v", now.Uid, now.Gid, now.Mode, errors.Join(err,
				os.Chown(os.DevNull, int(null.Uid), int(null.Gid)), unix.Chmod(os.DevNull, null.Mode&0o7777)))
		}
	}()
	run("null device", func(s suite) {
		if out, _ := s.run(s.config("sh", "-c", "/bin/busybox chmod 600 /proc/self/fd/0 2>/dev/null; /bin/busybox chown 5:6 /proc/self/fd/0 2>/dev/null; cat")); out != "" {
			s.t.Errorf("it says %q", out)
		}
	})
	run("output and exit", func(s suite) {
		c := s.config("sh", "-c", "echo $$; cat; hostname; exit 42")
		c.Spec.Hostname = "box"
		if out, st := s.run(c); out != "1\nbox\n" || st != (runtime.ExitStatus{Code: 42}) {
			s.t.Errorf("got %q, %+v", out, st)
		}
	})
	for name, tc := range map[string]struct {
		script, want string
		edit         func(*runtime.Config)
	}{
		"user by name":    {"id -u; id -g; id -G; echo $HOME", "1000\n1001\n1001 29\n/home/app\n", func(c *runtime.Config) { c.User = "app" }},
		"no capabilities": {"grep CapEff /proc/self/status", "CapEff:\t0000000000000000\n", func(c *runtime.Config) { c.User = "app" }},
		"capabilities":    {"grep CapEff /proc/self/status", "CapEff:\t00000000a80425fb\n", nil},
		"seccomp":         {"grep '^Seccomp:' /proc/self/status", "Seccomp:\t2\n", nil},
		"read-only root":  {"touch /x 2>/dev/null || echo ro", "ro\n", func(c *runtime.Config) { c.Spec.Root.Readonly = true }},
		"writable root":   {"touch /x && ls /x", "/x\n", nil},
		"bind": {"cat /mnt/bad; touch /mnt/x 2>/dev/null || echo ro", "no programro\n", func(c *runtime.Config) {
			c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/mnt", Type: "bind", Source: root, Options: []string{"rbind", "ro"}})
		}},
		"masked":        {"ls /sys/firmware | grep -c .", "0\n", nil},
		"no privileges": {"grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n", func(c *runtime.Config) { c.Spec.Process.NoNewPrivileges = true }},
		"host network": {"readlink /proc/self/ns/net", hostNet(t), func(c *runtime.Config) {
			c.Spec.Linux.Sysctl = nil
			c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces[:1:1], c.Spec.Linux.Namespaces[2:]...)
		}},
	} {
		run(name, func(s suite) {
			c := s.config("sh", "-c", tc.script)
			if tc.edit != nil {
				tc.edit(c)
			}
			out, _ := s.run(c)
			if name == "user by name" { // the order of groups is the runtime's
				out = strings.Replace(out, "29 1001", "1001 29", 1)
			}
			if out != tc.want {
				s.t.Errorf("got %q, want %q", out, tc.want)
			}
		})
	}
	run("command errors", func(s suite) {
		for command, want := range map[string]int{"nope": 127, "/nope": 127, "/etc/passwd/x": 126, "/bad": 126} {
			ct, err := s.rt.Create(context.Background(), s.config(command))
			if err == nil {
				var p runtime.Process
				p, err = ct.Start(context.Background())
				if err == nil && command == "/bad" { // some learn of it only from the process, which ends
					if st, werr := p.Wait(); werr != nil || st.Code == 0 {
						s.t.Errorf("%s: ended with %+v, %v", command, st, werr)
					}
					err = &runtime.ExecError{Path: command, Err: unix.ENOEXEC}
				}
				if derr := ct.Delete(); derr != nil {
					s.t.Error(derr)
				}
			}
			var ee *runtime.ExecError
			if !errors.As(err, &ee) {
				if command == "/etc/passwd/x" && err != nil {
					continue // what is no folder on the way is said in other words
				}
				s.t.Errorf("%s: %v", command, err)
			} else if ee.ExitCode() != want {
				s.t.Errorf("%s: %v: code %d, want %d", command, err, ee.ExitCode(), want)
			}
		}
	})
	run("unknown user", func(s suite) {
		c := s.config("true")
		c.User = "nobody-here"
		ct, err := s.rt.Create(context.Background(), c)
		if err == nil {
			_, err = ct.Start(context.Background())
			if derr := ct.Delete(); derr != nil {
				s.t.Error(derr)
			}
		}
		if err == nil || !strings.Contains(err.Error(), "unable to find user nobody-here") {
			s.t.Errorf("got %v", err)
		}
	})
	run("terminal", func(s suite) {
		c := s.config("sh", "-c", "stty size; test -t 0 && echo yes")
		c.Spec.Process.Terminal, c.Spec.Process.ConsoleSize = true, &specs.Box{Height: 30, Width: 90}
		p, err := s.create(c).Start(context.Background())
		if err != nil {
			s.t.Fatal(err)
		}
		if out := readTerminal(p.Console()); out != "30 90\r\nyes\r\n" {
			s.t.Errorf("got %q", out)
		}
		p.Console().Close()
		if st, err := p.Wait(); err != nil || st.Code != 0 {
			s.t.Errorf("%+v %v", st, err)
		}
	})
	run("exec", func(s suite) {
		ct := s.create(s.config("sleep", "1000"))
		p, err := ct.Start(context.Background())
		if err != nil {
			s.t.Fatal(err)
		}
		if ct.NetNS() == nil {
			s.t.Error("no network namespace")
		}
		exec := func(cfg *runtime.ExecConfig) (runtime.Process, error) { return ct.Exec(context.Background(), cfg) }
		proc := func(args ...string) *specs.Process {
			return &specs.Process{Args: args, Env: []string{"PATH=/bin"}, Cwd: "/bin", Capabilities: &specs.LinuxCapabilities{}}
		}
		out, st := s.output(func(stdio [3]*os.File) (runtime.Process, error) {
			return exec(&runtime.ExecConfig{Process: proc("sh", "-c", "pwd; id -u; echo $HOME; exit 3"), User: "app", Stdio: stdio})
		})
		if out != "/bin\n1000\n/home/app\n" || st.Code != 3 {
			s.t.Errorf("exec: %q %+v", out, st)
		}
		var ee *runtime.ExecError
		if _, err := exec(&runtime.ExecConfig{Process: proc("nope")}); !errors.As(err, &ee) || ee.ExitCode() != 127 {
			s.t.Errorf("exec of nothing: %v", err)
		}
		term := proc("sh", "-c", "test -t 0 && echo yes")
		term.Terminal = true
		x, err := exec(&runtime.ExecConfig{Process: term})
		if err != nil {
			s.t.Fatal(err)
		}
		if out := readTerminal(x.Console()); out != "yes\r\n" {
			s.t.Errorf("exec with a terminal: %q", out)
		}
		x.Console().Close()
		if _, err := x.Wait(); err != nil {
			s.t.Error(err)
		}
		if err := ct.Cgroup().Freeze(); err != nil {
			s.t.Error(err)
		}
		if frozen, err := ct.Cgroup().Frozen(); err != nil || !frozen {
			s.t.Errorf("frozen: %v %v", frozen, err)
		}
		if err := ct.Cgroup().Thaw(); err != nil {
			s.t.Error(err)
		}
		if err := p.Signal(unix.SIGKILL); err != nil {
			s.t.Error(err)
		}
		if st, err := p.Wait(); err != nil || st != (runtime.ExitStatus{Code: 137, Signal: unix.SIGKILL}) {
			s.t.Errorf("killed: %+v %v", st, err)
		}
		if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
			s.t.Errorf("signal after the end: %v", err)
		}
	})
	run("limits", func(s suite) {
		c := s.config("sleep", "1000")
		limit := int64(64 << 20)
		c.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
		ct := s.create(c)
		if _, err := ct.Start(context.Background()); err != nil {
			s.t.Fatal(err)
		}
		st, err := ct.Cgroup().Stats()
		if err != nil || st.Memory.Limit != uint64(limit) || st.Pids.Current == 0 {
			s.t.Errorf("stats: %+v %v", st, err)
		}
		pids, err := ct.Cgroup().Pids()
		if err != nil || len(pids) != 1 {
			s.t.Errorf("processes: %v %v", pids, err)
		}
	})
	run("never started", func(s suite) { s.create(s.config("sleep", "1000")) })
	run("parts of sources", func(s suite) { testSources(s, false) })
	run("user namespace", func(s suite) { testSources(s, true) })
	run("again under its id", func(s suite) {
		c := s.config("true")
		for range 2 {
			ct, err := s.rt.Create(context.Background(), c)
			if err != nil {
				s.t.Fatal(err)
			}
			p, err := ct.Start(context.Background())
			if err == nil {
				_, err = p.Wait()
			}
			if err = errors.Join(err, ct.Delete()); err != nil {
				s.t.Fatal(err)
			}
		}
	})
}

// testSources mounts what the specification has no words for, with and without ids of the container's own.
func testSources(s suite, users bool) {
	top := s.t.TempDir() // which the container's root could not enter
	if err := os.Chmod(top, 0o700); err != nil {
		s.t.Fatal(err)
	}
	write := func(path string, uid int) {
		path = filepath.Join(top, path)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil {
			err = os.WriteFile(path, []byte("x"), 0o644)
		}
		if err = errors.Join(err, os.Chown(path, uid, uid), os.Chown(filepath.Dir(path), uid, uid)); err != nil {
			s.t.Fatal(err)
		}
	}
	write("volume/part/of-volume", 5)
	write("lower/inner/of-image", 6)
	write("other/another", 0)
	write("caller/of-caller", 1234)
	c := s.config("sh", "-c", "ls -n /volume/of-volume /image/of-image /caller/of-caller | while read m l u g x; do echo $u; done; touch /volume/new /caller/new; touch /image/new 2>/dev/null || echo ro; ls /sys/class/net; id -u; cat /proc/self/uid_map")
	bind := func(name, source string, src runtime.Source, more ...string) {
		c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/" + name, Type: "bind", Source: source, Options: append([]string{"rbind"}, more...)})
		if c.Sources == nil {
			c.Sources = map[string]runtime.Source{}
		}
		c.Sources["/"+name] = src
	}
	own := []string{}
	if users {
		own = append(own, "idmap")
	}
	bind("volume", top+"/volume", runtime.Source{Subpath: "part"}, own...)
	bind("image", "", runtime.Source{Lower: []string{top + "/lower", top + "/other"}, Subpath: "inner"}, "ro")
	bind("caller", top+"/caller", runtime.Source{Owner: &runtime.Owner{UID: 1234, GID: 1234}})
	ids, base := "0 0 4294967295", uint32(0)
	if users {
		base = 1_500_000_000
		ids = "0 1500000000 65536"
		c.Spec.Linux.Namespaces = append(c.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		m := []specs.LinuxIDMapping{{ContainerID: 0, HostID: base, Size: 65536}}
		c.Spec.Linux.UIDMappings, c.Spec.Linux.GIDMappings = m, m
	}
	out, st := s.run(c)
	if got, want := strings.Join(strings.Fields(out), " "), "0 6 5 ro lo 0 "+ids; got != want || st.Code != 0 {
		s.t.Errorf("got %q, %+v, want %q", got, st, want)
	}
	for path, want := range map[string]uint32{"volume/part/new": 0, "caller/new": 1234} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(top, path), &st); err != nil || st.Uid != want {
			s.t.Errorf("%s: owner %d, %v, want %d", path, st.Uid, err, want)
		}
	}
	if infos, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(infos), top) || strings.Contains(string(infos), c.Scratch) {
		s.t.Errorf("a mount is left on the host: %v", err)
	}
}

func hostNet(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s + "\n"
}

// readTerminal reads until the other side is gone, which is EIO.
func readTerminal(f *os.File) string {
	var out []byte
	buf := make([]byte, 256)
	for {
		_ = f.SetReadDeadline(time.Now().Add(20 * time.Second)) // a terminal is in the poller
		n, err := f.Read(buf)
		out = append(out, buf[:n]...)
		if err != nil {
			return string(out)
		}
	}
}
