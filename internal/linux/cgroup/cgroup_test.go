package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// childEnv makes the test binary a process to put into cgroups; its value says what it does.
const childEnv = "CONEX_CGROUP_CHILD"

func TestMain(m *testing.M) {
	switch mode := os.Getenv(childEnv); mode {
	case "":
		os.Exit(m.Run())
	case "wait":
		fmt.Println("ready")
		fmt.Scanln() // until stdin is closed
	case "fork":
		for range 3 {
			if err := exec.Command("sleep", "1000").Start(); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		fmt.Println("ready")
		fmt.Scanln()
	case "eat":
		fmt.Println("ready")
		fmt.Scanln()
		b := make([]byte, 256<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("not killed", len(b))
	case "devices":
		fmt.Println("ready")
		fmt.Scanln()
		for _, f := range []string{"/dev/null", "/dev/zero"} {
			for _, how := range []int{os.O_RDONLY, os.O_WRONLY} {
				_, err := os.OpenFile(f, how, 0)
				fmt.Printf("%s %d %v\n", filepath.Base(f), how, err == nil)
			}
		}
	}
	os.Exit(0)
}

// needRoot skips where cgroups can't be made.
func needRoot(t *testing.T) *mountTable {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make cgroups")
	}
	m := mounts()
	if len(m.v1) == 0 && m.unified == "" {
		t.Skip("no cgroup filesystem is mounted")
	}
	return m
}

// process is a started child.
type process struct {
	*exec.Cmd
	in  *os.File
	out *strings.Builder
	// done is closed when out is complete.
	done chan struct{}
}

// start runs the test binary in the cgroup and waits until it says that it is ready.
func start(t *testing.T, m Manager, mode string) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(self), out: &strings.Builder{}}
	p.Env = append(os.Environ(), childEnv+"="+mode)
	fd, err := m.FD()
	if err != nil {
		t.Fatal(err)
	}
	p.SysProcAttr = &unix.SysProcAttr{}
	if fd != nil {
		defer fd.Close()
		p.SysProcAttr.UseCgroupFD = true
		p.SysProcAttr.CgroupFD = int(fd.Fd())
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.Stdin, p.in = r, w
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errc := make(chan error, 1)
	enter := func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine and so leaves the cgroup
		if err := m.EnterThread(); err != nil {
			errc <- err
			return
		}
		errc <- p.Start()
	}
	for {
		go enter()
		// The goroutine may be given the main thread, which parks for ever then; the next one gets another.
		if err = <-errc; !errors.Is(err, ErrMainThread) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	t.Cleanup(func() { w.Close() })
	line := make([]byte, 6)
	if _, err := out.Read(line); err != nil || string(line) != "ready\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		buf := make([]byte, 4096)
		for {
			n, err := out.Read(buf)
			p.out.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		p.Process.Kill() // an error says that it is gone already
		<-p.done
	})
	return p
}

// drivers are the ways to use this machine's cgroups; a driver beyond the natural one shows that it would work elsewhere.
func drivers(t *testing.T) map[string]func(path string) Manager {
	m := needRoot(t)
	d := map[string]func(string) Manager{}
	if len(m.v1) > 0 {
		d["v1"] = func(path string) Manager { return newV1(&mountTable{v1: m.v1}, path) }
		if m.unified != "" {
			d["hybrid"] = func(path string) Manager { return newV1(m, path) }
		}
	}
	if m.unified != "" {
		d["v2"] = func(path string) Manager { return newV2(m.unified, path) }
	}
	return d
}

// testPath is a place of this test process alone.
func testPath(t *testing.T, name string) string {
	parent := fmt.Sprintf("conex-test-%d", os.Getpid())
	t.Cleanup(func() {
		if err := Prune(parent); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(parent, name)
}

func TestConformance(t *testing.T) {
	for name, open := range drivers(t) {
		t.Run(name, func(t *testing.T) {
			path := testPath(t, name)
			m := open(path)
			if err := m.Create(nil); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := m.Kill(); err != nil {
					t.Error(err)
				}
				if err := m.Delete(); err != nil {
					t.Error(err)
				}
			})
			if err := m.Create(nil); err != nil {
				t.Errorf("create again: %v", err)
			}

			waiting := start(t, m, "wait")
			pids, err := m.Pids()
			if err != nil || !slices.Contains(pids, waiting.Process.Pid) {
				t.Fatalf("pids %v, %v; want %d among them", pids, err, waiting.Process.Pid)
			}
			if name != "v2" { // each v1 hierarchy has it
				for _, d := range m.(*v1).dirs() {
					list, err := readPids(d, nil)
					if exists(d) && (err != nil || !slices.Contains(list, waiting.Process.Pid)) {
						t.Errorf("%s has %v, %v", d, list, err)
					}
				}
			}

			// Frozen, the child doesn't see its stdin close.
			if err := m.Freeze(); err != nil {
				t.Fatal(err)
			}
			waiting.in.Close()
			if s := state(t, waiting.Process.Pid); !strings.Contains("DS", s) {
				t.Errorf("state of a frozen process: %s", s)
			}
			if err := m.Thaw(); err != nil {
				t.Fatal(err)
			}
			if err := waitFor(waiting); err != nil {
				t.Fatalf("after thaw: %v", err)
			}

			// A tree of processes, one of them in a cgroup that the container made.
			forking := start(t, m, "fork")
			sub := open(filepath.Join(path, "sub"))
			if two, ok := m.(*v2); ok {
				// A plain folder, as a container makes it: controllers can't be enabled for it beside processes.
				if err := os.Mkdir(filepath.Join(two.root, two.path, "sub"), 0o755); err != nil {
					t.Fatal(err)
				}
			} else if err := sub.Create(nil); err != nil {
				t.Fatal(err)
			}
			pids, err = m.Pids()
			if err != nil || len(pids) < 4 {
				t.Fatalf("pids %v, %v; want four", pids, err)
			}
			moved := pids[len(pids)-1]
			if err := sub.AddProcess(moved); err != nil {
				t.Fatal(err)
			}
			if list, err := sub.Pids(); err != nil || !slices.Equal(list, []int{moved}) {
				t.Errorf("sub has %v, %v; want %d", list, err, moved)
			}
			again, err := m.Pids()
			if err != nil || len(again) != len(pids) {
				t.Errorf("pids %v, %v; want as many as in %v", again, err, pids)
			}
			if _, err := m.Stats(); err != nil {
				t.Error(err)
			}
			if err := m.Kill(); err != nil {
				t.Fatal(err)
			}
			err = waitFor(forking)
			if err == nil || err.Error() != "signal: killed" {
				t.Errorf("killed child: %v", err)
			}
			if err := m.Delete(); err != nil {
				t.Fatal(err)
			}
			if left, err := m.Pids(); err != nil || len(left) != 0 {
				t.Errorf("after delete: %v, %v", left, err)
			}
			if err := m.Delete(); err != nil {
				t.Errorf("delete again: %v", err)
			}
			for _, root := range mounts().roots() {
				if exists(filepath.Join(root, path)) {
					t.Errorf("%s is left", filepath.Join(root, path))
				}
			}
			if err := m.AddProcess(os.Getpid()); !errors.Is(err, ErrNotExist) {
				t.Errorf("add to a deleted cgroup: %v", err)
			}
			if n, err := m.OOMKills(); n != 0 || err != nil {
				t.Errorf("OOM kills of a deleted cgroup: %d, %v", n, err)
			}
		})
	}
}

// state returns the letter of a process's state.
func state(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b[strings.LastIndexByte(string(b), ')')+2])
}

// TestMainThread runs the call on the process's main thread, which a goroutine gets by luck only.
func TestMainThread(t *testing.T) {
	m := needRoot(t)
	if len(m.v1) == 0 {
		t.Skip("cgroup v1 isn't mounted, threads don't enter on v2")
	}
	v := newV1(m, testPath(t, "main"))
	if unix.Gettid() == unix.Getpid() {
		if err := v.EnterThread(); !errors.Is(err, ErrMainThread) {
			t.Errorf("main thread: %v", err)
		}
		return
	}
	if err := v.EnterThread(); !errors.Is(err, ErrNotExist) {
		t.Errorf("another thread, no such cgroup: %v", err)
	}
}

func ptr[T any](v T) *T { return &v }

// TestLimitsInTheKernel sets limits on this machine's own driver and reads them back.
func TestLimitsInTheKernel(t *testing.T) {
	mt := needRoot(t)
	if len(mt.v1) == 0 {
		t.Skip("this test reads v1's files")
	}
	m := newV1(mt, testPath(t, "limits"))
	t.Cleanup(func() {
		if err := m.Delete(); err != nil {
			t.Error(err)
		}
	})
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(128 << 20)), Reservation: ptr(int64(32 << 20))},
		CPU:    &specs.LinuxCPU{Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Shares: ptr(uint64(512)), Cpus: "0"},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(50))},
	}
	if err := m.Create(res); err != nil {
		t.Fatal(err)
	}
	expect := func(want map[string]string) {
		t.Helper()
		for f, w := range want {
			controller, _, _ := strings.Cut(f, ".")
			dir, err := m.dir(controller)
			if err != nil {
				t.Error(err)
				continue
			}
			if got, err := readFile(filepath.Join(dir, f)); got != w || err != nil {
				t.Errorf("%s = %q, %v; want %q", f, got, err, w)
			}
		}
	}
	expect(map[string]string{
		"memory.limit_in_bytes": "67108864", "memory.memsw.limit_in_bytes": "134217728", "memory.soft_limit_in_bytes": "33554432",
		"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000", "cpu.shares": "512", "cpuset.cpus": "0", "pids.max": "50",
	})
	// Up beyond the old limit of memory and swap, then down again: the order of the two writes matters.
	for _, n := range []int64{512 << 20, 16 << 20} {
		if err := m.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(n), Swap: ptr(2 * n)}}); err != nil {
			t.Fatal(err)
		}
		expect(map[string]string{"memory.limit_in_bytes": itoa(n), "memory.memsw.limit_in_bytes": itoa(2 * n), "cpu.shares": "512", "pids.max": "50"})
	}
	if err := m.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(0))}}); err != nil {
		t.Fatal(err)
	}
	expect(map[string]string{"pids.max": "max"})
	st, err := m.Stats()
	if err != nil || st.Memory.Limit != 0 || st.Pids.Limit != 0 {
		t.Errorf("stats without limits: %+v, %v", st, err)
	}
	err = m.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "4096"}})
	if err == nil || !strings.HasPrefix(err.Error(), "--cpuset-cpus: ") {
		t.Errorf("impossible cpuset: %v", err)
	}
	err = m.Update(&specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 1}}})
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("huge pages of 3 MB: %v", err)
	}
}

// TestEveryHierarchy wants a container in none of the cgroups of whoever starts it, systemd's above all: a service that ends takes
// along whatever it finds in its own.
func TestEveryHierarchy(t *testing.T) {
	mt := needRoot(t)
	m, err := New(testPath(t, "everywhere"))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Create(nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Delete(); err != nil {
			t.Error(err)
		}
	})
	p := start(t, m, "wait")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "/everywhere\n") && !(strings.HasPrefix(line, "0::") && mt.unified == "") {
			t.Errorf("the process is in %s", line)
		}
	}
	if mt.v1["cpuset"] != "" {
		if err := m.Update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "0"}}); err != nil {
			t.Error(err)
		}
		var set unix.CPUSet
		if err := unix.SchedGetaffinity(p.Process.Pid, &set); err != nil || set.Count() != 1 || !set.IsSet(0) {
			t.Errorf("the process may run on %d CPUs, %v", set.Count(), err)
		}
	}
	p.in.Close()
	if err := waitFor(p); err != nil {
		t.Error(err)
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	for name, open := range drivers(t) {
		t.Run(name, func(t *testing.T) {
			path := testPath(t, "fail")
			err := open(path).Create(&specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "4096"}})
			if err == nil || !strings.HasPrefix(err.Error(), "--cpuset-cpus: ") {
				t.Errorf("impossible cpuset: %v", err)
			}
			for _, root := range mounts().roots() {
				if exists(filepath.Join(root, path)) {
					t.Errorf("%s is left", filepath.Join(root, path))
				}
			}
		})
	}
}

func TestOOMKillIsCounted(t *testing.T) {
	needRoot(t)
	m, err := New(testPath(t, "oom"))
	if err != nil {
		t.Fatal(err)
	}
	err = m.Create(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(32 << 20)), Swap: ptr(int64(32 << 20))}})
	if errors.Is(err, ErrUnsupported) {
		t.Skipf("memory can't be limited here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Delete(); err != nil {
			t.Error(err)
		}
	})
	p := start(t, m, "eat")
	p.in.Close()
	if err := waitFor(p); err == nil || err.Error() != "signal: killed" {
		t.Errorf("256 MB in 32: %v, %s", err, p.out)
	}
	if n, err := m.OOMKills(); err != nil || n == 0 {
		t.Errorf("OOM kills: %d, %v", n, err)
	}
	s, err := m.Stats()
	if err != nil || s.Memory.OOMKills == 0 || s.Memory.Peak < 16<<20 || s.Memory.Limit != 32<<20 || s.CPU.Usage == 0 {
		t.Errorf("stats %+v, %v", s, err)
	}
}

func TestDeviceRulesInTheKernel(t *testing.T) {
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"}, // null
		{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(5)), Access: "r"},   // zero
		{Allow: true, Type: "c", Major: ptr(int64(136)), Access: "rwm"},                     // the children's terminals
	}
	for name, open := range drivers(t) {
		t.Run(name, func(t *testing.T) {
			m := open(testPath(t, "dev-"+name))
			if err := m.Create(&specs.LinuxResources{Devices: rules}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := m.Kill(); err != nil {
					t.Error(err)
				}
				if err := m.Delete(); err != nil {
					t.Error(err)
				}
			})
			run := func() string {
				p := start(t, m, "devices")
				p.in.Close()
				if err := waitFor(p); err != nil {
					t.Fatal(err)
				}
				return p.out.String()
			}
			if got, want := run(), "null 0 true\nnull 1 true\nzero 0 true\nzero 1 false\n"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			// Update replaces the rules, it doesn't add to them.
			update := append(slices.Clone(rules), specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(5)), Access: "w"})
			if err := m.Update(&specs.LinuxResources{Devices: update}); err != nil {
				t.Fatal(err)
			}
			if got, want := run(), "null 0 true\nnull 1 true\nzero 0 true\nzero 1 true\n"; got != want {
				t.Errorf("after update: got %q, want %q", got, want)
			}
		})
	}
}

// waitFor reads the child's output to its end, then collects it.
func waitFor(p *process) error {
	state, err := p.Process.Wait() // not Cmd.Wait, which closes the pipe that is being read
	if err == nil && !state.Success() {
		err = errors.New(state.String())
	}
	<-p.done
	return err
}

func TestNewRefusesPaths(t *testing.T) {
	for _, p := range []string{"", ".", "/", "../x", "a/../../b", "/abs"} {
		if m, err := New(p); err == nil {
			t.Errorf("New(%q) = %v", p, m)
		}
		if err := Prune(p); err == nil {
			t.Errorf("Prune(%q) succeeded", p)
		}
	}
}

func TestProbe(t *testing.T) {
	m := needRoot(t)
	info := Probe()
	if info.Version == "" || len(info.Controllers) == 0 || !slices.IsSorted(info.Controllers) {
		t.Errorf("%+v", info)
	}
	if (info.Version == "2") != (len(m.v1) == 0) {
		t.Errorf("version %s with %v", info.Version, m.v1)
	}
}

func BenchmarkCreateEnterDelete(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root to make cgroups")
	}
	parent := "conex-bench-" + strconv.Itoa(os.Getpid())
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}, Pids: &specs.LinuxPids{Limit: ptr(int64(100))}}
	i := 0
	for b.Loop() {
		i++
		m, err := New(parent + "/" + strconv.Itoa(i))
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Create(res); err != nil {
			b.Fatal(err)
		}
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
			done <- m.EnterThread()
		}()
		if err := <-done; err != nil && !errors.Is(err, ErrMainThread) {
			b.Fatal(err)
		}
		if err := m.Delete(); err != nil {
			b.Fatal(err)
		}
	}
	if err := Prune(parent); err != nil {
		b.Fatal(err)
	}
}
