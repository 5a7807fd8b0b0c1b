package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-units"

	"golang.org/x/sys/unix"

	"conex/internal/linux/cgroup"
)

// limitsWorld is a world with the busybox image and no mirror.
func limitsWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.netns = newNetns(t)
	tar, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	w.conex("import", "-c", `CMD ["sh"]`, tar, "busybox")
	return w
}

// TestMonitorLeavesItsStarter: what a service leaves in its cgroups is ended with it, which a container must survive.
func TestMonitorLeavesItsStarter(t *testing.T) {
	w := limitsWorld(t)
	info := cgroup.Probe()
	roots := []string{}
	for _, dir := range info.Mounts {
		roots = append(roots, dir)
	}
	if info.Unified != "" {
		roots = append(roots, info.Unified)
	}
	service := "conex-test-service-" + strconv.Itoa(os.Getpid())
	script := ""
	for _, root := range roots {
		dir := filepath.Join(root, service)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil { // it fails while a process is in it
				t.Error(err)
			}
		})
		if root == info.Mounts["cpuset"] {
			script += "cat " + root + "/cpuset.cpus >" + dir + "/cpuset.cpus\ncat " + root + "/cpuset.mems >" + dir + "/cpuset.mems\n"
		}
		script += "echo $$ >" + dir + "/cgroup.procs\n"
	}
	cmd := exec.Command("sh", "-e", "-c", script+`exec "$@"`, "sh", w.bin, "run", "-d", "--name", "longer", "--network", "none", "busybox", "sleep", "1000")
	cmd.Env = w.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, root := range roots {
		if b, err := os.ReadFile(filepath.Join(root, service, "cgroup.procs")); err != nil || len(b) > 0 {
			t.Errorf("%s still has processes %q, %v", filepath.Join(root, service), strings.Fields(string(b)), err)
		}
	}
	w.conex("rm", "-f", "longer")
}

// cgroupPath is a file of a container's cgroup: of v1's controller, or of the v2 tree where that has the controllers.
func (w *world) cgroupPath(name, v1, v2 string) string {
	w.t.Helper()
	info := cgroup.Probe()
	id := w.conex("inspect", "-f", "{{.Id}}", name)
	if info.Version != "2" {
		controller, _, _ := strings.Cut(v1, ".")
		return filepath.Join(info.Mounts[controller], "conex", id, v1)
	}
	return filepath.Join(info.Unified, "conex", id, v2)
}

// cgroupFile reads such a file.
func (w *world) cgroupFile(name, v1, v2 string) string {
	w.t.Helper()
	b, err := os.ReadFile(w.cgroupPath(name, v1, v2))
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestLimitsInTheKernel compares the kernel's own files with the flags of run and update, on whatever cgroups this machine has.
func TestLimitsInTheKernel(t *testing.T) {
	w := limitsWorld(t)
	v2 := cgroup.Probe().Version == "2"
	w.conex("run", "-d", "--name", "one", "-m", "64m", "--memory-swap", "96m", "--memory-reservation", "32m", "--cpus", "0.5", "-c", "512",
		"--pids-limit", "99", "--cpuset-cpus", "0", "--network", "none", "busybox", "sleep", "1000")
	type file struct{ v1, v2, want1, want2 string }
	check := func(files ...file) {
		t.Helper()
		for _, f := range files {
			want := f.want1
			if v2 {
				want = f.want2
			}
			if got := w.cgroupFile("one", f.v1, f.v2); got != want {
				t.Errorf("%s or %s: %q, want %q", f.v1, f.v2, got, want)
			}
		}
	}
	check(
		file{"memory.limit_in_bytes", "memory.max", "67108864", "67108864"},
		file{"memory.memsw.limit_in_bytes", "memory.swap.max", "100663296", "33554432"}, // v2 counts swap alone
		file{"memory.soft_limit_in_bytes", "memory.low", "33554432", "33554432"},
		file{"cpu.cfs_quota_us", "cpu.max", "50000", "50000 100000"},
		file{"cpu.shares", "cpu.weight", "512", "59"},
		file{"pids.max", "pids.max", "99", "99"},
		file{"cpuset.cpus", "cpuset.cpus", "0", "0"},
	)
	w.conex("update", "-m", "128m", "--memory-swap", "256m", "--cpus", "0.25", "-c", "2048", "--pids-limit", "-1", "one")
	check(
		file{"memory.limit_in_bytes", "memory.max", "134217728", "134217728"},
		file{"memory.memsw.limit_in_bytes", "memory.swap.max", "268435456", "134217728"},
		file{"memory.soft_limit_in_bytes", "memory.low", "33554432", "33554432"},
		file{"cpu.cfs_quota_us", "cpu.max", "25000", "25000 100000"},
		file{"cpu.shares", "cpu.weight", "2048", "174"},
		file{"pids.max", "pids.max", "max", "max"},
	)
	// The other limit of a pair stays what it was.
	w.conex("update", "-m", "192m", "one")
	check(
		file{"memory.limit_in_bytes", "memory.max", "201326592", "201326592"},
		file{"memory.memsw.limit_in_bytes", "memory.swap.max", "268435456", "67108864"},
	)
	w.conex("update", "--memory-swap", "-1", "one")
	if v2 {
		check(file{"", "memory.swap.max", "", "max"})
	} else if got := w.cgroupFile("one", "memory.memsw.limit_in_bytes", ""); len(got) < 19 {
		t.Errorf("memory and swap are limited to %s", got)
	}
	// What the kernel refuses changes nothing: neither a limit before it in the request, nor the record.
	if r := w.try("update", "--memory-reservation", "48m", "--cpu-rt-runtime", "900000", "one"); r.code != 1 || !strings.Contains(r.stderr, "real-time") && !strings.Contains(r.stderr, "real time") {
		t.Errorf("real time that nobody gave away: exit code %d, %s", r.code, r.stderr)
	}
	if got := w.conex("inspect", "-f", "{{.HostConfig.MemoryReservation}} {{.HostConfig.CpuRealtimeRuntime}}", "one"); got != "33554432 0" {
		t.Errorf("after a refused update: %s", got)
	}
	check(file{"memory.soft_limit_in_bytes", "memory.low", "33554432", "33554432"})
	w.conex("rm", "-f", "one")
}

// TestCgroupParent puts containers below a folder of the user's, which stays when they go.
func TestCgroupParent(t *testing.T) {
	w := limitsWorld(t)
	info := cgroup.Probe()
	roots := []string{info.Unified}
	for _, dir := range info.Mounts {
		roots = append(roots, dir)
	}
	parent := "conex-test-parent-" + strconv.Itoa(os.Getpid())
	t.Cleanup(func() {
		if err := cgroup.Prune(parent + "/below"); err != nil {
			t.Error(err)
		}
		if err := cgroup.Prune(parent); err != nil {
			t.Error(err)
		}
	})
	for _, p := range []string{"/" + parent, parent + "/below"} {
		id := w.conex("run", "-d", "--network", "none", "--cgroup-parent", p, "busybox", "sleep", "1000")
		for _, root := range roots {
			if root == "" {
				continue
			}
			if b, err := os.ReadFile(filepath.Join(root, p, id, "cgroup.procs")); err != nil || len(b) == 0 {
				t.Errorf("%s: %q, %v", root, b, err)
			}
		}
		if r := w.try("exec", id, "true"); r.code != 0 {
			t.Errorf("exec: %s", r.stderr)
		}
		w.conex("rm", "-f", id)
		for _, root := range roots {
			if _, err := os.Lstat(filepath.Join(root, p, id)); err == nil {
				t.Errorf("%s is left", filepath.Join(root, p, id))
			}
		}
	}
}

// TestStatsAreTheKernels compares stats with the kernel's files of a container that stands still.
func TestStatsAreTheKernels(t *testing.T) {
	w := limitsWorld(t)
	w.conex("run", "-d", "--name", "still", "-m", "64m", "--network", "none", "busybox", "sh", "-c", "head -c 1m /dev/zero >/file; sleep 1000")
	w.eventually("the file", func() bool { return w.conex("exec", "still", "sh", "-c", "wc -c </file") == "1048576" })
	w.conex("pause", "still")
	number := func(v1, v2 string) uint64 {
		t.Helper()
		n, err := strconv.ParseUint(w.cgroupFile("still", v1, v2), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	key := "total_inactive_file"
	if cgroup.Probe().Version == "2" {
		key = "inactive_file"
	}
	usage := func() uint64 {
		t.Helper()
		used := number("memory.usage_in_bytes", "memory.current")
		for line := range strings.Lines(w.cgroupFile("still", "memory.stat", "memory.stat")) {
			if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == key {
				n, err := strconv.ParseUint(v, 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				used -= n
			}
		}
		return used
	}
	// The kernel adds up its processors' counts when it comes to it: what it says before and after must be the same.
	var used uint64
	var got string
	w.eventually("the kernel's numbers stand still", func() bool {
		used = usage()
		got = w.conex("stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}|{{.CPUPerc}}", "still")
		return usage() == used
	})
	want := units.BytesSize(float64(used)) + " / 64MiB|" + w.cgroupFile("still", "pids.current", "pids.current") + "|0.00%"
	if got != want {
		t.Errorf("stats say %s, the kernel %s", got, want)
	}
	w.conex("unpause", "still")
	w.conex("rm", "-f", "still")
}

// TestCPUShares gives two busy containers one processor and looks at whose time it was, not at the clock.
func TestCPUShares(t *testing.T) {
	w := limitsWorld(t)
	for name, shares := range map[string]string{"small": "256", "large": "1024"} {
		w.conex("run", "-d", "--name", name, "-c", shares, "--cpuset-cpus", "0", "--network", "none", "busybox", "sh", "-c", "while :; do :; done")
	}
	files := [2]string{w.cgroupPath("small", "cpuacct.usage", "cpu.stat"), w.cgroupPath("large", "cpuacct.usage", "cpu.stat")}
	used := func() (nanoseconds [2]float64) { // both at once
		t.Helper()
		for i, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			first, _, _ := strings.Cut(string(b), "\n")
			usec, v2 := strings.CutPrefix(first, "usage_usec ")
			if nanoseconds[i], err = strconv.ParseFloat(usec, 64); err != nil {
				t.Fatal(err)
			}
			if v2 {
				nanoseconds[i] *= 1000
			}
		}
		return nanoseconds
	}
	before := used()
	var small, large float64
	w.eventually("two seconds of processor time", func() bool {
		now := used()
		small, large = now[0]-before[0], now[1]-before[1]
		return small+large > 2e9
	})
	ratio := large / small
	if ratio < 2.5 || ratio > 6 {
		t.Errorf("shares of 1024 and 256: processor time %.2f to 1", ratio)
	}
	w.conex("rm", "-f", "small", "large")
}

// TestIOThrottle writes three megabytes at one a second. However busy the machine is, that can't be done faster than in two seconds.
func TestIOThrottle(t *testing.T) {
	if !cgroup.Limits().IOThrottle {
		t.Skip("this kernel has no limits of block I/O")
	}
	w := limitsWorld(t)
	var st unix.Stat_t
	if err := unix.Stat(w.root, &st); err != nil {
		t.Fatal(err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	b, err := os.ReadFile("/sys/dev/block/" + number + "/uevent")
	if err != nil || !strings.Contains(string(b), "DEVTYPE=disk") {
		t.Skipf("%s is on no disk of its own (%s)", w.root, number)
	}
	_, name, _ := strings.Cut(string(b), "DEVNAME=")
	name, _, _ = strings.Cut(name, "\n")
	dd := []string{"busybox", "dd", "if=/dev/zero", "of=/file", "bs=262144", "count=12", "oflag=direct"}
	if r := w.try(append([]string{"run", "--rm", "--network", "none"}, dd...)...); r.code != 0 {
		t.Skipf("no direct writes here: %s", r.stderr)
	}
	began := time.Now()
	w.conex(append([]string{"run", "--rm", "--network", "none", "--device-write-bps", "/dev/" + name + ":1mb"}, dd...)...)
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("3 MB at 1 MB/s took %s", took)
	}
}
