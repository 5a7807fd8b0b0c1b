package monitor

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/cgroup"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mnet "github.com/moby/moby/api/types/network"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestBackoff(t *testing.T) {
	var got []time.Duration
	d := time.Duration(0)
	for range 12 {
		d = nextBackoff(d, time.Second)
		got = append(got, d)
	}
	if got[0] != 100*time.Millisecond || got[1] != 200*time.Millisecond || got[9] != 51200*time.Millisecond || got[10] != time.Minute || got[11] != time.Minute {
		t.Errorf("%v", got)
	}
	if d := nextBackoff(time.Minute, 10*time.Second); d != 100*time.Millisecond {
		t.Errorf("after a long run: %v", d)
	}
}

func TestWanted(t *testing.T) {
	for _, c := range []struct {
		policy   apic.RestartPolicy
		code     int
		restarts int
		want     bool
	}{
		{apic.RestartPolicy{}, 1, 0, false},
		{apic.RestartPolicy{Name: "no"}, 1, 0, false},
		{apic.RestartPolicy{Name: "always"}, 0, 1000, true},
		{apic.RestartPolicy{Name: "unless-stopped"}, 0, 5, true},
		{apic.RestartPolicy{Name: "on-failure"}, 0, 0, false},
		{apic.RestartPolicy{Name: "on-failure"}, 1, 1000, true},
		{apic.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}, 1, 1, true},
		{apic.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}, 1, 2, false},
	} {
		if got := wanted(c.policy, container.Exit{Code: c.code}, c.restarts); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestNextHealth(t *testing.T) {
	start := time.Now()
	conf := apic.HealthConfig{Retries: 2, StartPeriod: 10 * time.Second}
	h := &apic.Health{Status: apic.Starting}
	step := func(after time.Duration, code int) {
		h = nextHealth(h, &apic.HealthcheckResult{Start: start.Add(after), ExitCode: code}, conf, start)
	}
	expect := func(s apic.HealthStatus, streak, log int) {
		t.Helper()
		if h.Status != s || h.FailingStreak != streak || len(h.Log) != log {
			t.Errorf("%s, streak %d, %d results; want %s %d %d", h.Status, h.FailingStreak, len(h.Log), s, streak, log)
		}
	}
	step(time.Second, 1)
	step(2*time.Second, 1)
	step(3*time.Second, 1)
	expect(apic.Starting, 0, 3)
	step(11*time.Second, 1)
	expect(apic.Starting, 1, 4)
	step(12*time.Second, 1)
	expect(apic.Unhealthy, 2, 5)
	step(13*time.Second, 0)
	expect(apic.Healthy, 0, 5)
	step(14*time.Second, -1)
	expect(apic.Healthy, 1, 5)
	// A success ends the start period.
	h = &apic.Health{Status: apic.Starting}
	step(time.Second, 0)
	step(2*time.Second, 1)
	step(3*time.Second, 1)
	expect(apic.Unhealthy, 2, 3)
}

func TestHealthCommand(t *testing.T) {
	for _, c := range []struct {
		conf apic.Config
		want []string
	}{
		{apic.Config{}, nil},
		{apic.Config{Healthcheck: &apic.HealthConfig{Test: []string{"NONE"}}}, nil},
		{apic.Config{Healthcheck: &apic.HealthConfig{Test: []string{"CMD", "a", "b"}}}, []string{"a", "b"}},
		{apic.Config{Healthcheck: &apic.HealthConfig{Test: []string{"CMD-SHELL", "a b"}}}, []string{"/bin/sh", "-c", "a b"}},
		{apic.Config{Shell: []string{"/bin/bash", "-c"}, Healthcheck: &apic.HealthConfig{Test: []string{"CMD-SHELL", "a b"}}}, []string{"/bin/bash", "-c", "a b"}},
	} {
		if got := healthCommand(&c.conf); !slices.Equal(got, c.want) {
			t.Errorf("%v: %q", c.conf.Healthcheck, got)
		}
	}
}

func testRecord(hc apic.HostConfig) *container.Record {
	return &container.Record{
		ID: "0123", Name: "web", Path: "/bin/sh", Args: []string{"-c", "x"}, HostConfig: &hc,
		Config: &apic.Config{Hostname: "h", Env: []string{"PATH=/x", "A=1", "HOSTNAME"}, User: "nobody"},
	}
}

func TestBuildConfig(t *testing.T) {
	pids, yes := int64(50), true
	r := testRecord(apic.HostConfig{
		ReadonlyRootfs: true, Init: &yes, SecurityOpt: []string{"no-new-privileges", "seccomp=unconfined"}, CapDrop: []string{"ALL"}, CapAdd: []string{"CHOWN"},
		ShmSize: 1 << 20, NetworkMode: "host", Resources: apic.Resources{Memory: 64 << 20, NanoCPUs: 15e8, PidsLimit: &pids},
	})
	r.Mounts = []apic.MountPoint{
		{Type: mount.TypeBind, Source: "/src", Destination: "/a/b", RW: false, Propagation: "rslave"},
		{Type: mount.TypeTmpfs, Destination: "/a", Mode: "exec,size=1m", RW: true},
		{Type: mount.TypeBind, Source: "/h", Destination: "/etc/hosts", RW: true},
	}
	c, err := buildConfig(r, "/files", cgroup.Place{Path: "conex/" + r.ID}, sources{})
	if err != nil {
		t.Fatal(err)
	}
	s := c.Spec
	if !slices.Equal(s.Process.Args, []string{"/bin/sh", "-c", "x"}) || !slices.Equal(s.Process.Env, []string{"PATH=/x", "A=1"}) || c.User != "nobody" {
		t.Errorf("process %q %q %q", s.Process.Args, s.Process.Env, c.User)
	}
	if !s.Root.Readonly || !c.Init || c.DefaultSeccomp || !s.Process.NoNewPrivileges || !slices.Equal(s.Process.Capabilities.Bounding, []string{"CAP_CHOWN"}) {
		t.Errorf("security: %v %v %v %v %v", s.Root.Readonly, c.Init, c.DefaultSeccomp, s.Process.NoNewPrivileges, s.Process.Capabilities.Bounding)
	}
	res := s.Linux.Resources
	if *res.Memory.Limit != 64<<20 || *res.Memory.Swap != 128<<20 || *res.CPU.Quota != 150000 || *res.CPU.Period != 100000 || *res.Pids.Limit != 50 {
		t.Errorf("limits: %+v %+v %+v", res.Memory, res.CPU, res.Pids)
	}
	if slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace }) {
		t.Error("--network host has a network namespace of its own")
	}
	for k := range s.Linux.Sysctl {
		if k[:4] == "net." {
			t.Errorf("--network host would set the host's %s", k)
		}
	}
	at := func(dst string) (int, specs.Mount) {
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == dst })
		if i < 0 {
			t.Fatalf("no mount at %s", dst)
		}
		return i, s.Mounts[i]
	}
	ia, a := at("/a")
	ib, b := at("/a/b")
	if ia > ib || a.Type != "tmpfs" || !slices.Equal(a.Options, []string{"nosuid", "nodev", "exec", "size=1m"}) {
		t.Errorf("/a: %d %d %+v", ia, ib, a)
	}
	if b.Source != "/src" || !slices.Equal(b.Options, []string{"rbind", "rslave", "rro"}) {
		t.Errorf("/a/b: %+v", b)
	}
	if _, m := at("/etc/hosts"); m.Source != "/h" {
		t.Errorf("the user's /etc/hosts: %+v", m)
	}
	if _, m := at("/etc/resolv.conf"); m.Source != "/files/resolv.conf" {
		t.Errorf("resolv.conf: %+v", m)
	}
	if _, m := at("/dev/shm"); !slices.Contains(m.Options, "size=1048576") || slices.Contains(m.Options, "size=65536k") {
		t.Errorf("/dev/shm: %+v", m)
	}
}

func TestMappings(t *testing.T) {
	r := testRecord(apic.HostConfig{PublishAllPorts: true, PortBindings: mnet.PortMap{
		mnet.MustParsePort("80"):     {{HostPort: "8080"}, {HostPort: "9000-9010"}},
		mnet.MustParsePort("53/udp"): {{}},
	}})
	r.Config.ExposedPorts = mnet.PortSet{mnet.MustParsePort("80"): {}, mnet.MustParsePort("443"): {}}
	m, err := mappings(r)
	if err != nil || len(m) != 4 {
		t.Fatalf("%v %v", m, err)
	}
	if m[0].Proto != "udp" || m[0].HostPort != 0 || m[1].HostPort != 8080 || m[2].HostPort != 9000 || m[2].HostPortEnd != 9010 || m[3].ContainerPort != 443 {
		t.Errorf("%+v", m)
	}
}

func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := [2]*net.UnixConn{}
	for i, fd := range fds {
		f := newFile(fd)
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// TestSlowClient has a client that reads nothing until the process has ended: the log is complete all the same, the end is not
// delayed, and then the client gets everything.
func TestSlowClient(t *testing.T) {
	var writers sync.WaitGroup
	var log bytes.Buffer
	s := &streams{writers: &writers, log: func(_ byte, p []byte) error { log.Write(p); return nil }}
	ours, theirs := pair(t)
	s.attach(newClient(ours, true, true))
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MB: more than pipe, queue and socket hold
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s.pump(control.FrameStdout, r)
	written := make(chan struct{})
	go func() {
		w.Write(want)
		close(written)
	}()
	select {
	case <-written:
		t.Fatal("the slow client did not slow the process down")
	case <-time.After(50 * time.Millisecond):
	}
	s.loosen()
	<-written
	w.Close()
	s.pumps.Wait()
	s.finish(container.Exit{Code: 7})
	if log.Len() != len(want) {
		t.Errorf("log has %d of %d bytes", log.Len(), len(want))
	}
	got, err := io.ReadAll(theirs)
	if err != nil {
		t.Fatal(err)
	}
	writers.Wait()
	var out []byte
	var end container.Exit
	for len(got) > 0 {
		n := int(got[4])<<24 | int(got[5])<<16 | int(got[6])<<8 | int(got[7])
		if got[0] == control.FrameEnd {
			if err := json.Unmarshal(got[8:8+n], &end); err != nil {
				t.Fatal(err)
			}
		} else {
			out = append(out, got[8:8+n]...)
		}
		got = got[8+n:]
	}
	if !bytes.Equal(out, want) || end.Code != 7 {
		t.Errorf("%d of %d bytes, end %+v", len(out), len(want), end)
	}
}

// TestVanishedClient has a client go away without a word: the process is not held up, and others get their output.
func TestVanishedClient(t *testing.T) {
	var writers sync.WaitGroup
	s := &streams{writers: &writers}
	gone, peer := pair(t)
	c := newClient(gone, true, true)
	s.attach(c)
	s.feed(c, gone, false, false)
	stays, reader := pair(t)
	s.attach(newClient(stays, false, false))
	peer.Close()
	go func() {
		for range 200 {
			s.emit(control.FrameStdout, make([]byte, 16<<10))
		}
		s.finish(container.Exit{})
	}()
	n, err := io.Copy(io.Discard, reader)
	if err != nil || n != 200*16<<10 {
		t.Errorf("the other client got %d bytes: %v", n, err)
	}
	writers.Wait()
}

// TestStdinEnds has a client end its input only: with once the process's input ends too, output goes on.
func TestStdinEnds(t *testing.T) {
	var writers sync.WaitGroup
	s := &streams{writers: &writers}
	r, w := io.Pipe()
	s.setStdin(w)
	ours, theirs := pair(t)
	c := newClient(ours, false, false)
	s.attach(c)
	s.feed(c, ours, true, true)
	if _, err := theirs.Write([]byte("input")); err != nil {
		t.Fatal(err)
	}
	if err := theirs.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || string(b) != "input" {
		t.Fatalf("the process read %q, %v", b, err)
	}
	s.emit(control.FrameStdout, []byte("output"))
	s.finish(container.Exit{})
	if b, err := io.ReadAll(theirs); err != nil || string(b) != "output" {
		t.Errorf("the client read %q, %v", b, err)
	}
	writers.Wait()
}

func TestMergeEnv(t *testing.T) {
	got := mergeEnv([]string{"A=1", "B=2", "AB=3"}, []string{"A=x", "B", "C=4"})
	if !slices.Equal(got, []string{"A=x", "AB=3", "C=4"}) {
		t.Errorf("%q", got)
	}
}

func newFile(fd int) *os.File { return os.NewFile(uintptr(fd), "socket") }
