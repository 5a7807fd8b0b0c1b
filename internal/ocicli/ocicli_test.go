package ocicli

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"conex/internal/initstage"
	"conex/internal/linux/cgroup"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func init() { // as package takeover
	initstage.Takeover(Name, func() int { return Main(os.Args[1:]) })
	initstage.TakeoverCommand("runtime", func() int { return Main(os.Args[2:]) })
}

// machine is a runtime with a root of its own: the test's binary under the runtime's name, which the takeover in init makes it.
type machine struct {
	t         *testing.T
	bin, root string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := &machine{t: t, bin: filepath.Join(dir, Name), root: filepath.Join(dir, "state")}
	if err := os.Symlink(self, m.bin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, id := range strings.Fields(m.ok("list", "-q")) {
			m.ok("delete", "-f", id)
		}
		if err := cgroup.Prune("conex-test-oci"); err != nil {
			t.Error(err)
		}
	})
	return m
}

func (m *machine) command(args ...string) *exec.Cmd {
	return exec.Command(m.bin, append([]string{"--root", m.root}, args...)...)
}

// do runs a command and returns its output, errors and exit code.
func (m *machine) do(args ...string) (stdout, stderr string, code int) {
	m.t.Helper()
	c := m.command(args...)
	var out, errs bytes.Buffer
	// Files, not pipes: a container that lives on would hold those open.
	c.Stdout, c.Stderr = tempFile(m.t), tempFile(m.t)
	err := c.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		m.t.Fatal(err)
	}
	for f, b := range map[io.Writer]*bytes.Buffer{c.Stdout: &out, c.Stderr: &errs} {
		data, err := os.ReadFile(f.(*os.File).Name())
		if err != nil {
			m.t.Fatal(err)
		}
		b.Write(data)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

func tempFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// ok is do for what must work; it returns the output.
func (m *machine) ok(args ...string) string {
	m.t.Helper()
	out, errs, code := m.do(args...)
	if code != 0 {
		m.t.Fatalf("%s: exit %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// fails is do for what must fail with code 1 and a text.
func (m *machine) fails(text string, args ...string) {
	m.t.Helper()
	out, errs, code := m.do(args...)
	if code != 1 || !strings.Contains(errs, text) {
		m.t.Errorf("%s: exit %d, want 1 and %q\n%s%s", strings.Join(args, " "), code, text, out, errs)
	}
}

func (m *machine) status(id string) string {
	m.t.Helper()
	var s specs.State
	if err := json.Unmarshal([]byte(m.ok("state", id)), &s); err != nil {
		m.t.Fatal(err)
	}
	return string(s.Status)
}

// bundle makes a bundle whose process is a script of busybox's shell.
func (m *machine) bundle(script string, edit ...func(*specs.Spec)) string {
	t := m.t
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "rootfs/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs/bin/busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"sh", "cat", "id", "ls", "mount", "touch", "ps", "sleep", "stty", "pwd", "env", "hostname", "grep", "true", "readlink", "dd", "mknod", "nice", "taskset"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "rootfs/bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	m.ok("spec", "-b", dir)
	var s specs.Spec
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.Process.Terminal = false
	s.Process.Args = []string{"/bin/sh", "-c", script}
	s.Process.Env = []string{"PATH=/bin"}
	s.Root.Readonly = false
	for _, e := range edit {
		e(&s)
	}
	if b, err = json.Marshal(&s); err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// eventually waits for what another process is about to make true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func TestRun(t *testing.T) {
	m := newMachine(t)
	out, _, code := m.do("run", "-b", m.bundle("echo $$ $(hostname); exit 7"), "one")
	if out != "1 conex\n" || code != 7 {
		t.Errorf("got %q, exit %d", out, code)
	}
	if out := m.ok("list", "-q"); out != "" {
		t.Errorf("left: %q", out)
	}
	if _, _, code := m.do("run", "-b", m.bundle("kill -9 $$"), "two"); code != 0 { // pid 1 can't kill itself
		t.Errorf("exit %d", code)
	}
}

// TestLife goes through create, start, kill, delete with runc's states and words.
func TestLife(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("trap 'exit 3' TERM; touch /started; while :; do sleep 0.01; done")
	pidFile := filepath.Join(b, "pid")
	m.ok("create", "-b", b, "--pid-file", pidFile, "box")
	if s := m.status("box"); s != "created" {
		t.Errorf("status %q", s)
	}
	pid, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	var s specs.State
	if err := json.Unmarshal([]byte(m.ok("state", "box")), &s); err != nil || s.Bundle != b || string(pid) != itoa(s.Pid) {
		t.Errorf("state %+v, pid file %q, %v", s, pid, err)
	}
	if _, err := os.Stat(filepath.Join(b, "rootfs/started")); err == nil {
		t.Error("it ran before its start")
	}
	m.fails("container with given ID already exists", "create", "-b", b, "box")
	m.ok("start", "box")
	eventually(t, "the process runs", func() bool { _, err := os.Stat(filepath.Join(b, "rootfs/started")); return err == nil })
	if s := m.status("box"); s != "running" {
		t.Errorf("status %q", s)
	}
	m.fails("cannot start an already running container", "start", "box")
	m.fails("that is not stopped", "delete", "box")
	m.ok("pause", "box")
	if s := m.status("box"); s != "paused" {
		t.Errorf("status %q", s)
	}
	m.fails("paused container", "exec", "box", "true")
	m.ok("resume", "box")
	m.fails("container not paused", "resume", "box")
	m.ok("kill", "box", "TERM")
	eventually(t, "stopped", func() bool { return m.status("box") == "stopped" })
	m.fails("container not running", "kill", "box", "0")
	m.fails("cannot start a container that has stopped", "start", "box")
	m.ok("delete", "box")
	m.fails("container does not exist", "state", "box")
	m.fails("container does not exist", "delete", "box")
	m.ok("delete", "--force", "box")
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func TestExec(t *testing.T) {
	m := newMachine(t)
	m.ok("run", "-d", "-b", m.bundle("while :; do sleep 1; done"), "box")
	for _, tc := range []struct {
		args []string
		want string
		code int
	}{
		{[]string{"box", "sh", "-c", "hostname; exit 5"}, "conex\n", 5},
		{[]string{"--cwd", "/bin", "-e", "A=b", "box", "sh", "-c", "pwd; echo $A"}, "/bin\nb\n", 0},
		{[]string{"-u", "5:6", "-g", "7", "box", "sh", "-c", "id -u; id -g; id -G"}, "5\n6\n6 7\n", 0},
		{[]string{"--cap", "CAP_NET_RAW", "box", "grep", "CapBnd", "/proc/self/status"}, "CapBnd:\t0000000020002420\n", 0},
	} {
		out, errs, code := m.do(append([]string{"exec"}, tc.args...)...)
		if out != tc.want || code != tc.code {
			t.Errorf("exec %q: %q exit %d %s", tc.args, out, code, errs)
		}
	}
	m.fails("executable file not found in $PATH", "exec", "box", "nope")
	proc := filepath.Join(t.TempDir(), "process.json")
	if err := os.WriteFile(proc, []byte(`{"args":["/bin/sh","-c","touch /from-exec; exec sleep 100"],"cwd":"/","env":["PATH=/bin"],"user":{"uid":0,"gid":0}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	m.ok("exec", "-d", "--process", proc, "--pid-file", proc+".pid", "box")
	eventually(t, "the detached process runs", func() bool {
		_, _, code := m.do("exec", "box", "ls", "/from-exec")
		return code == 0
	})
	var pids []int
	if err := json.Unmarshal([]byte(m.ok("ps", "--format", "json", "box")), &pids); err != nil || len(pids) < 2 {
		t.Errorf("ps: %v %v", pids, err)
	}
	if out := m.ok("ps", "box"); !strings.Contains(out, "PID") || !strings.Contains(out, "sleep 100") {
		t.Errorf("ps: %s", out)
	}
	m.ok("kill", "--all", "box", "KILL")
	m.ok("delete", "--force", "box")
}

// TestStartFails reports what only execve can know.
func TestStartFails(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("")
	m.fails("executable file not found in $PATH", "run", "-b", m.bundle("", func(s *specs.Spec) { s.Process.Args = []string{"nope"} }), "a")
	if err := os.WriteFile(filepath.Join(b, "rootfs/bad"), []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	bad := m.bundle("", func(s *specs.Spec) { s.Process.Args = []string{"/bad"}; s.Root.Path = filepath.Join(b, "rootfs") })
	m.fails("exec format error", "run", "-b", bad, "b")
	m.ok("create", "-b", bad, "c")
	m.fails("exec format error", "start", "c")
	if s := m.status("c"); s != "stopped" {
		t.Errorf("status %q", s)
	}
	m.ok("delete", "c")
	log := filepath.Join(b, "log")
	m.do("--log", log, "--log-format", "json", "state", "none")
	var line struct{ Level, Msg, Time string }
	if data, err := os.ReadFile(log); err != nil || json.Unmarshal(data, &line) != nil || line.Level != "error" || line.Msg != "container does not exist" {
		t.Errorf("log %q: %v", data, err)
	}
}

// TestCreatorKilled kills create at chosen moments: whatever is left, delete removes it.
func TestCreatorKilled(t *testing.T) {
	m := newMachine(t)
	hook := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(hook, []byte("#!/bin/sh\necho $$ >"+hook+".new && mv "+hook+".new "+hook+".ran\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	b := m.bundle("true", func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: hook}}}
		s.Linux.CgroupsPath = "/conex-test-oci/killed"
	})
	c := m.command("create", "-b", b, "box")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the hook runs", func() bool { _, err := os.Stat(hook + ".ran"); return err == nil })
	if s := m.status("box"); s != "creating" {
		t.Errorf("status %q", s)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	// The first process waits for the creator, and ends with it.
	eventually(t, "stopped", func() bool { return m.status("box") == "stopped" })
	m.ok("delete", "box")
	pid, err := os.ReadFile(hook + ".ran")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(pid)))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n, unix.SIGKILL); err != nil { // the hook is nobody's any more
		t.Error(err)
	}
	for _, dir := range []string{"memory", "unified"} {
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", dir, "conex-test-oci/killed")); err == nil {
			t.Errorf("cgroup in %s is left", dir)
		}
	}
	// A folder without anything in it is one of a creator that was killed at once.
	if err := os.Mkdir(filepath.Join(m.root, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	m.ok("delete", "empty")
}

func TestHooks(t *testing.T) {
	m := newMachine(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	script := filepath.Join(dir, "hook")
	// Each says its name, the state's status, and its namespaces: "host" or "box".
	text := `#!/bin/sh
state=$(cat)
status=$(echo "$state" | grep -o '"status":"[a-z]*"' | cut -d'"' -f4)
pid=$(echo "$state" | grep -o '"pid":[0-9]*' | cut -d: -f2)
net=box; [ "$(readlink /proc/self/ns/net)" = "$HOSTNET" ] && net=host
echo "$1 $status $net $(readlink /proc/$pid/ns/net | grep -vc "$HOSTNET")" >>` + log + `
[ "$1" != "$FAIL" ]
`
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	net, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	hooks := func(fail string) func(*specs.Spec) {
		h := func(name string) []specs.Hook {
			return []specs.Hook{{Path: script, Args: []string{"hook", name}, Env: []string{"PATH=/bin:/usr/bin", "HOSTNET=" + net, "FAIL=" + fail}}}
		}
		return func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{
				Prestart: h("prestart"), CreateRuntime: h("createRuntime"), CreateContainer: h("createContainer"), //nolint:staticcheck // deprecated, and used
				StartContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >/state"}}},
				Poststart:      h("poststart"), Poststop: h("poststop"),
			}
		}
	}
	b := m.bundle("cat /state; sleep 1000", hooks(""))
	m.ok("create", "-b", b, "box")
	m.ok("start", "box")
	m.ok("delete", "--force", "box")
	got, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	want := "prestart creating host 1\ncreateRuntime creating host 1\ncreateContainer creating box 1\npoststart running host 1\npoststop stopped host 0\n"
	if string(got) != want {
		t.Errorf("hooks:\n%swant:\n%s", got, want)
	}
	state, err := os.ReadFile(filepath.Join(b, "rootfs/state"))
	if err != nil || !strings.Contains(string(state), `"status":"created"`) || !strings.Contains(string(state), `"pid":1`) {
		t.Errorf("startContainer hook got %q, %v", state, err)
	}
	for _, name := range []string{"prestart", "createRuntime", "createContainer", "poststart"} {
		out, errs, code := m.do("run", "-b", m.bundle("sleep 1000", hooks(name)), "f-"+name)
		if code != 1 || !strings.Contains(errs, name+" hook #0") {
			t.Errorf("failing %s: exit %d %s%s", name, code, out, errs)
		}
	}
	if out := m.ok("list", "-q"); out != "" {
		t.Errorf("left: %s", out)
	}
	one := 1
	m.fails("killed", "run", "-b", m.bundle("true", func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "100"}, Timeout: &one}}}
	}), "slow")
}

func TestDescriptors(t *testing.T) {
	m := newMachine(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	b := m.bundle("echo over 3 >&3; echo $LISTEN_FDS $LISTEN_PID >&3; ls /proc/self/fd | grep -c .")
	c := m.command("run", "-b", b, "box")
	c.ExtraFiles = []*os.File{w}
	c.Env = append(os.Environ(), "LISTEN_FDS=1")
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != "over 3\n1 1\n" || string(out) != "5\n" {
		t.Errorf("got %q and %q descriptors", got, out)
	}
	m.fails("are open", "run", "-b", b, "--preserve-fds", "4", "box")
}

// TestAttributes looks from inside at what the spec asks for.
func TestAttributes(t *testing.T) {
	m := newMachine(t)
	for name, tc := range map[string]struct {
		script, want string
		edit         func(*specs.Spec)
	}{
		"user as numbers": {"id -u; id -G", "3\n4 9\n", func(s *specs.Spec) { s.Process.User = specs.User{UID: 3, GID: 4, AdditionalGids: []uint32{9}} }},
		"devices":         {"ls /dev/null && dd if=/dev/zero bs=1 count=1 2>/dev/null | grep -c .", "/dev/null\n1\n", nil},
		"device denied": {"mknod /d c 10 200 2>/dev/null; cat /d 2>/dev/null || echo no", "no\n", func(s *specs.Spec) {
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_MKNOD")
		}},
		"no dev mount":    {"ls /dev/null", "/dev/null\n", func(s *specs.Spec) { s.Mounts = s.Mounts[:1] }},
		"masked anywhere": {"cat /secret; ls /hidden | grep -c .", "0\n", func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"/secret", "/hidden", "/nothing"} }},
		"read-only path":  {"touch /hidden/x 2>/dev/null || echo ro", "ro\n", func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"/hidden"} }},
		"read-only root":  {"touch /x 2>/dev/null || echo ro", "ro\n", func(s *specs.Spec) { s.Root.Readonly = true }},
		"relative bind": {"cat /mnt", "data", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/mnt", Source: "data", Options: []string{"bind"}})
		}},
		"personality": {"readlink /proc/self/exe >/dev/null; cat /proc/self/personality", "00000008\n", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32} }},
		"nice":        {"read -r a </proc/self/stat; set -- $a; echo ${19}", "5\n", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: 5} }},
		"batch":       {"grep policy /proc/self/sched | grep -o '[0-9]*$'", "3\n", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: specs.SchedBatch} }},
		"I/O priority": {"echo ok", "ok\n", func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 7}
		}},
		"memory policy": {"grep -c default /proc/self/numa_maps >/dev/null; echo ok", "ok\n", func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{Mode: specs.MpolLocal} }},
		"shared root":   {"grep -c ' / r[ow].* shared:' /proc/self/mountinfo", "1\n", func(s *specs.Spec) { s.Linux.RootfsPropagation = "shared" }},
		"copy up": {"cat /hidden/file; echo; touch /hidden/more; grep -c ' /hidden tmpfs' /proc/mounts", "x\n1\n", func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/hidden", Type: "tmpfs", Source: "tmpfs", Options: []string{"rprivate", "nosuid", "tmpcopyup"}})
		}},
		"user namespace": {"id -u; cat /proc/self/uid_map; touch /hidden/x 2>/dev/null || echo no", "0\n         0     100000      65536\nno\n", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
		}},
		"umask": {"umask", "0027\n", func(s *specs.Spec) { u := uint32(0o27); s.Process.User.Umask = &u }},
		"clocks": {"dd if=/proc/uptime bs=1 count=7 2>/dev/null", "1000000", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 1000000000 - uptime(t)}}
		}},
		"unknown capability": {"grep -c . /proc/self/status >/dev/null; echo ok", "ok\n", func(s *specs.Spec) {
			s.Process.Capabilities.Bounding = append(s.Process.Capabilities.Bounding, "CAP_TOMORROW")
		}},
		"home": {"echo $HOME", "/\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := &machine{t: t, bin: m.bin, root: m.root}
			b := m.bundle(tc.script, func(s *specs.Spec) {
				if tc.edit != nil {
					tc.edit(s)
				}
			})
			for f, data := range map[string]string{"rootfs/secret": "secret", "data": "data", "rootfs/hidden/file": "x"} {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(b, f)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(b, f), []byte(data), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			out, errs, _ := m.do("run", "-b", b, "attr")
			if out != tc.want {
				t.Errorf("got %q, want %q\n%s", out, tc.want, errs)
			}
		})
	}
}

// uptime is the host's, in seconds.
func uptime(t *testing.T) int64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return ts.Sec
}

// TestTimeNamespaceExec: an exec is on the container's clock too.
func TestTimeNamespaceExec(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("sleep 1000", func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {Secs: 4000000000}}
	})
	m.ok("run", "-d", "-b", b, "box")
	if out := m.ok("exec", "box", "dd", "if=/proc/uptime", "bs=1", "count=7"); !strings.HasPrefix(out, "4000") {
		t.Errorf("uptime %q", out)
	}
}

// TestUserNamespace: exec and hooks find their way into a container whose root is none on the host.
func TestUserNamespace(t *testing.T) {
	m := newMachine(t)
	dir := t.TempDir()
	hook := filepath.Join(dir, "hook")
	if err := os.WriteFile(hook, []byte("#!/bin/sh\ncat >"+hook+".state\ncat /proc/$(grep -o '\"pid\":[0-9]*' "+hook+".state | cut -d: -f2)/uid_map >"+hook+".map\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	b := m.bundle("cat /proc/self/uid_map; sleep 1000", func(s *specs.Spec) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
		s.Linux.GIDMappings = s.Linux.UIDMappings
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: hook}}}
	})
	m.ok("create", "-b", b, "box")
	if got, err := os.ReadFile(hook + ".map"); err != nil || !strings.Contains(string(got), "100000") {
		t.Errorf("the hook saw a process with ids %q, %v", got, err)
	}
	m.ok("start", "box")
	if out := m.ok("exec", "box", "sh", "-c", "id -u; cat /proc/self/uid_map"); out != "0\n         0     100000      65536\n" {
		t.Errorf("exec: %q", out)
	}
	m.ok("delete", "--force", "box")
}

func TestRefused(t *testing.T) {
	m := newMachine(t)
	for text, edit := range map[string]func(*specs.Spec){
		"linux.intelRdt":   func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} },
		"linux.netDevices": func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth9": {}} },
		"SELinux":          func(s *specs.Spec) { s.Linux.MountLabel = "x" },
		"seccomp listener": func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/x"}
		},
		"setting it would change": func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} },
		"not allowed in the host's network": func(s *specs.Spec) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
			s.Linux.Namespaces = s.Linux.Namespaces[:1]
			s.Hostname = ""
		},
		"hostname needs a uts": func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[:1] },
		"another platform":     func(s *specs.Spec) { s.Windows = &specs.Windows{} },
		"ociVersion":           func(s *specs.Spec) { s.Version = "2.0.0" },
		"is not absolute":      func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "x"}}} },
		"timeOffsets need":     func(s *specs.Spec) { s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"boottime": {}} },
		"rootfsPropagation":    func(s *specs.Spec) { s.Linux.RootfsPropagation = "sideways" },
		"has \\\"pid\\\" twice": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "pid"})
		},
		"personality":      func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "BSD"} },
		"process.cwd":      func(s *specs.Spec) { s.Process.Cwd = "x" },
		"scheduler policy": func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_ISO"} },
		"rootfs":           func(s *specs.Spec) { s.Root.Path = "/no/such" },
		"mounts inside /proc": func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/proc/self", Type: "tmpfs"})
		},
		"needs --console-socket": func(s *specs.Spec) { s.Process.Terminal = true },
	} {
		m.fails(text, "create", "-b", m.bundle("true", edit), "no")
	}
	if out := m.ok("list", "-q"); out != "" {
		t.Errorf("left: %s", out)
	}
	m.fails("not supported", "checkpoint", "x")
	m.fails("invalid container ID", "state", "../x")
	m.fails("config.json not found", "create", "-b", t.TempDir(), "x")
	m.fails("no command", "fly")
}

func TestConsoleSocket(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("stty size; echo $0", func(s *specs.Spec) {
		s.Process.Terminal = true
		s.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	})
	sock := filepath.Join(b, "sock")
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := unix.Bind(l, &unix.SockaddrUnix{Name: sock}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 1); err != nil {
		t.Fatal(err)
	}
	m.ok("create", "-b", b, "--console-socket", sock, "box")
	fd, _, err := unix.Accept(l)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	name, oob := make([]byte, 64), make([]byte, 64)
	n, oobn, _, _, err := unix.Recvmsg(fd, name, oob, 0)
	if err != nil || n == 0 {
		t.Fatal(n, err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		t.Fatal(err)
	}
	console := os.NewFile(uintptr(fds[0]), "console")
	defer console.Close()
	m.ok("start", "box")
	var got []byte
	buf := make([]byte, 256)
	for { // EIO is the end of a terminal
		n, err := console.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			break
		}
	}
	if !strings.HasPrefix(string(got), "33 77\r\n") {
		t.Errorf("terminal: %q", got)
	}
	m.fails("no terminal", "create", "-b", m.bundle("true"), "--console-socket", sock, "other")
}

func TestUpdateAndEvents(t *testing.T) {
	m := newMachine(t)
	m.ok("run", "-d", "-b", m.bundle("sleep 1000"), "box")
	m.ok("update", "--memory", "64m", "--pids-limit", "77", "box")
	var e struct {
		Type string
		Data struct {
			Memory struct{ Usage struct{ Limit uint64 } }
			Pids   struct{ Current, Limit uint64 }
		}
	}
	if err := json.Unmarshal([]byte(m.ok("events", "--stats", "box")), &e); err != nil {
		t.Fatal(err)
	}
	if e.Type != "stats" || e.Data.Memory.Usage.Limit != 64<<20 || e.Data.Pids.Limit != 77 || e.Data.Pids.Current == 0 {
		t.Errorf("stats: %+v", e)
	}
	res := filepath.Join(t.TempDir(), "res.json")
	if err := os.WriteFile(res, []byte(`{"pids":{"limit":55}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	m.ok("update", "--resources", res, "box")
	if out := m.ok("events", "--stats", "box"); !strings.Contains(out, `"limit":55`) {
		t.Errorf("stats: %s", out)
	}
	m.fails("invalid value for cpu-quota", "update", "--cpu-quota", "much", "box")
}

func TestFeatures(t *testing.T) {
	m := newMachine(t)
	out := m.ok("features")
	for _, want := range []string{`"ociVersionMax": "1.3.0"`, `"createContainer"`, `"time"`, `"rbind"`} {
		if !strings.Contains(out, want) {
			t.Errorf("features lack %s:\n%s", want, out)
		}
	}
	if out := m.ok("--version"); !strings.Contains(out, "spec: 1.3.0") {
		t.Errorf("version: %s", out)
	}
	if out := m.ok("help"); !strings.Contains(out, "features") {
		t.Errorf("help: %s", out)
	}
}

// TestKilledAtAnyMoment kills creators after all kinds of times; delete settles whatever there is then.
func TestKilledAtAnyMoment(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("sleep 1000", func(s *specs.Spec) { s.Linux.CgroupsPath = "/conex-test-oci/moment" })
	for i := range 25 {
		c := m.command("create", "-b", b, "box")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * time.Millisecond) // which moment it hits is chance, and any will do
		_ = c.Process.Kill()
		_ = c.Wait()
		if _, err := os.Stat(filepath.Join(m.root, "box")); err != nil {
			continue // it had not begun
		}
		m.ok("state", "box")
		m.ok("delete", "--force", "box")
		for _, dir := range []string{"memory", "pids", "unified"} {
			if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", dir, "conex-test-oci/moment")); err == nil {
				t.Errorf("killed after %d ms: the cgroup in %s is left", i, dir)
			}
		}
	}
}

// TestJoin puts a second container into the namespaces of a first, as pods are made.
func TestJoin(t *testing.T) {
	m := newMachine(t)
	m.ok("run", "-d", "-b", m.bundle("sleep 1000"), "first")
	var st specs.State
	if err := json.Unmarshal([]byte(m.ok("state", "first")), &st); err != nil {
		t.Fatal(err)
	}
	b := m.bundle("echo $$; readlink /proc/1/ns/net; readlink /proc/self/ns/net; cat /proc/sys/net/ipv4/ip_forward", func(s *specs.Spec) {
		for i, n := range s.Linux.Namespaces {
			if name := map[specs.LinuxNamespaceType]string{"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts"}[n.Type]; name != "" {
				s.Linux.Namespaces[i].Path = "/proc/" + itoa(st.Pid) + "/ns/" + name
			}
		}
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	})
	out, errs, code := m.do("run", "-b", b, "second")
	l := strings.Split(out, "\n")
	if code != 0 || len(l) != 5 || l[0] == "1" || l[1] != l[2] || l[3] != "1" {
		t.Errorf("exit %d: %q %s", code, out, errs)
	}
	if s := m.status("first"); s != "running" {
		t.Errorf("the first is %s", s)
	}
	// Without process ids of its own the end of the first process is not the end: KILL reaches all.
	b = m.bundle("sleep 1000 & exec sleep 1000", func(s *specs.Spec) {
		s.Linux.Namespaces[0] = specs.LinuxNamespace{Type: "pid", Path: "/proc/" + itoa(st.Pid) + "/ns/pid"}
		for i, n := range s.Linux.Namespaces {
			if i > 0 && n.Type == "pid" {
				s.Linux.Namespaces = append(s.Linux.Namespaces[:i], s.Linux.Namespaces[i+1:]...)
				s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "mount"})
				break
			}
		}
	})
	m.ok("run", "-d", "-b", b, "third")
	m.ok("kill", "third", "KILL")
	eventually(t, "all of them are gone", func() bool { return strings.TrimSpace(m.ok("ps", "--format", "json", "third")) == "[]" })
	m.ok("delete", "third")
}

// TestForegroundTerminal runs a process with a terminal whose other side is ours.
func TestForegroundTerminal(t *testing.T) {
	m := newMachine(t)
	b := m.bundle("test -t 0 && echo terminal; read -r line; echo got $line; exit 4", func(s *specs.Spec) { s.Process.Terminal = true })
	c := m.command("run", "-b", b, "box")
	c.Stdin = strings.NewReader("typed\n")
	out, err := c.Output()
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.ExitCode() != 4 || !strings.Contains(string(out), "terminal\r\n") || !strings.Contains(string(out), "got typed\r\n") {
		t.Errorf("%q, %v", out, err)
	}
}

// TestOwnProgram: an image that has the kernel execute the runtime's own program, by its process, gets nowhere (CVE-2019-5736).
func TestOwnProgram(t *testing.T) {
	t.Run("go", func(t *testing.T) { ownProgram(t, newMachine(t)) })
	t.Run("assembly", func(t *testing.T) { // the entry of package shield
		if goruntime.GOARCH != "amd64" && goruntime.GOARCH != "arm64" {
			t.Skip("no entry for this architecture")
		}
		m := newMachine(t)
		m.bin = filepath.Join(t.TempDir(), "oci") // by another name, so that Go's part does nothing early
		cmd := exec.Command("go", "build", "-ldflags=-E conexRuntimeEntry", "-o", m.bin, "conex/cmd/conex-runtime")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		ownProgram(t, m)
	})
}

func ownProgram(t *testing.T, m *machine) {
	// The slack that the entry gives the program is not the container's, nor are blocked signals anybody's.
	if out := m.ok("run", "-b", m.bundle("cat /proc/self/timerslack_ns; grep SigBlk /proc/self/status"), "plain"); out != "50000\nSigBlk:\t0000000000000000\n" {
		t.Errorf("slack and blocked signals: %q", out)
	}
	evil := func(s *specs.Spec) { s.Process.Args = []string{"/evil"} }
	for name, edit := range map[string]func(*specs.Spec){
		"run": evil,
		"hook": func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/evil"}}}
		},
	} {
		b := m.bundle("true", edit)
		if err := os.WriteFile(filepath.Join(b, "rootfs/evil"), []byte("#!/proc/self/exe\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		m.fails("permission denied", "run", "-b", b, name)
		m.ok("create", "-b", b, name)
		m.fails("permission denied", "start", name)
		m.ok("delete", "--force", name)
	}
	b := m.bundle("sleep 1000")
	if err := os.WriteFile(filepath.Join(b, "rootfs/evil"), []byte("#!/proc/self/exe\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.ok("run", "-d", "-b", b, "box")
	m.fails("permission denied", "exec", "box", "/evil")
	m.fails("no such file", "exec", "box", "/proc/self/exe")
}

// FuzzSpec: whatever a config.json holds, it is understood or refused; completing and checking it never panics.
func FuzzSpec(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"ociVersion":"1.0.0","process":{"args":["x"],"cwd":"/"},"root":{"path":"r"}}`,
		`{"ociVersion":"1.0.0","process":{"args":["x"],"cwd":"/"},"root":{"path":"r"},"linux":{"resources":{"devices":[{}]},"namespaces":[{"type":"x"}]},"mounts":[{"destination":"../..","source":"x","options":["bind"]}]}`,
		`{"ociVersion":"1.0.0","process":{"args":["x"],"cwd":"/"},"root":{"path":"r"},"hooks":{"prestart":[{"path":"/x","timeout":-1}]}}`,
		`[`, `null`, `{"ociVersion":1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSpec(b)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than a line: %q", err)
			}
			return
		}
		completeSpec(s, "id", "/bundle", false)
		if s.Linux.CgroupsPath == "" || !filepath.IsAbs(s.Root.Path) {
			t.Errorf("incomplete: %+v", s)
		}
		for _, m := range s.Mounts {
			if !filepath.IsAbs(m.Destination) {
				t.Errorf("mount on %q", m.Destination)
			}
		}
	})
}

// TestInItsCgroup: the first process is in its cgroup of every hierarchy, whoever has entered it: the process itself, or a thread for it
// where there are hooks.
func TestInItsCgroup(t *testing.T) {
	m := newMachine(t)
	hook := func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true"}}} }
	limited := func(s *specs.Spec) {
		least := int64(1 << 20) // too little to share the runtime's memory until it executes
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &least}
	}
	for name, edit := range map[string]func(*specs.Spec){"plain": func(*specs.Spec) {}, "hooks": hook, "limited": limited} {
		where := "/conex-test-oci/in-" + name
		dir := m.bundle("cat /proc/self/cgroup", edit, func(s *specs.Spec) {
			s.Linux.CgroupsPath = where
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
		})
		out := m.ok("run", "-b", dir, "in-"+name)
		for line := range strings.Lines(out) {
			if !strings.HasSuffix(line, ":"+where+"\n") {
				t.Errorf("%s: %s", name, line)
			}
		}
	}
}

// TestRecordIsJSON: what encode writes is what encoding/json writes.
func TestRecordIsJSON(t *testing.T) {
	for _, r := range []record{
		{},
		{Pid: 7, Start: 1 << 63, Bundle: "/var/lib/x", RootFS: "/var/lib/x/rootfs", Created: time.Now().UTC(), Owner: "root", Systemd: true, NoKeyring: true},
		{Bundle: `/a "b" \c`, RootFS: "/<&>\x00\x1f\x7f\u2028\xff日本", Created: time.Unix(1, 500)},
	} {
		want, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.encode(); err != nil || string(got) != string(want) {
			t.Errorf("%s, %v, want %s", got, err, want)
		}
	}
}
