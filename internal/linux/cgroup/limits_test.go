package cgroup

import (
	"bufio"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"conex/internal/linux/bpf"
)

// mapping is what a resource list comes to under both versions: "file=value", or the error.
type mapping struct {
	name   string
	res    specs.LinuxResources
	v1, v2 []string
	// e1 and e2 are parts of the errors.
	e1, e2 string
}

var mappings = []mapping{
	{name: "nothing"},
	{
		name: "memory",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(50))}},
		v1:   []string{"memory.limit_in_bytes=100", "memory.memsw.limit_in_bytes=150", "memory.soft_limit_in_bytes=50"},
		v2:   []string{"memory.max=100", "memory.swap.max=50", "memory.low=50"},
	},
	{
		name: "memory without swap",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(100))}},
		v1:   []string{"memory.limit_in_bytes=100", "memory.memsw.limit_in_bytes=100"},
		v2:   []string{"memory.max=100", "memory.swap.max=0"},
	},
	{
		name: "no limits",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1)), Swap: ptr(int64(-1))}, CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}, Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}},
		v1:   []string{"memory.limit_in_bytes=-1", "memory.memsw.limit_in_bytes=-1", "cpu.cfs_quota_us=-1", "pids.max=max"},
		v2:   []string{"memory.max=max", "memory.swap.max=max", "cpu.max=max", "pids.max=max"},
	},
	{
		name: "zeros say nothing",
		res: specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr(int64(0)), Swap: ptr(int64(0)), Reservation: ptr(int64(0)), DisableOOMKiller: ptr(false)},
			CPU:    &specs.LinuxCPU{Quota: ptr(int64(0)), Period: ptr(uint64(0)), Shares: ptr(uint64(0))}, BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(0))},
		},
	},
	{
		name: "swap alone",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: ptr(int64(100))}},
		v1:   []string{"memory.memsw.limit_in_bytes=100"},
		e2:   "--memory-swap",
	},
	{
		name: "less swap than memory",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(50))}},
		v1:   []string{"memory.limit_in_bytes=100", "memory.memsw.limit_in_bytes=50"}, // which the kernel refuses
		e2:   "--memory-swap",
	},
	{
		name: "v1's memory settings",
		res:  specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(0)), DisableOOMKiller: ptr(true)}},
		v1:   []string{"memory.swappiness=0", "memory.oom_control=1"},
		e2:   "--memory-swappiness",
	},
	{
		name: "cpu",
		res:  specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(150000)), Period: ptr(uint64(100000)), Cpus: "0-1", Mems: "0"}},
		v1:   []string{"cpu.shares=1024", "cpu.cfs_period_us=100000", "cpu.cfs_quota_us=150000", "cpuset.cpus=0-1", "cpuset.mems=0"},
		v2:   []string{"cpu.weight=100", "cpu.max=150000 100000", "cpuset.cpus=0-1", "cpuset.mems=0"},
	},
	{
		name: "cpu period alone",
		res:  specs.LinuxResources{CPU: &specs.LinuxCPU{Period: ptr(uint64(50000))}},
		v1:   []string{"cpu.cfs_period_us=50000"},
		v2:   []string{"cpu.max=max 50000"},
	},
	{
		name: "cpu burst, idle",
		res:  specs.LinuxResources{CPU: &specs.LinuxCPU{Burst: ptr(uint64(1000)), Idle: ptr(int64(1))}},
		v1:   []string{"cpu.cfs_burst_us=1000", "cpu.idle=1"},
		v2:   []string{"cpu.max.burst=1000", "cpu.idle=1"},
	},
	{
		name: "real time",
		res:  specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimePeriod: ptr(uint64(1000)), RealtimeRuntime: ptr(int64(500))}},
		v1:   []string{"cpu.rt_period_us=1000", "cpu.rt_runtime_us=500"},
		e2:   "--cpu-rt-runtime",
	},
	{
		name: "pids",
		res:  specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(100))}},
		v1:   []string{"pids.max=100"},
		v2:   []string{"pids.max=100"},
	},
	{
		name: "block I/O",
		res: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{
			Weight:                ptr(uint16(500)),
			WeightDevice:          []specs.LinuxWeightDevice{weightDevice(8, 0, 10)},
			ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttleDevice(8, 0, 1048576)}, ThrottleWriteBpsDevice: []specs.LinuxThrottleDevice{throttleDevice(8, 0, 2)},
			ThrottleReadIOPSDevice: []specs.LinuxThrottleDevice{throttleDevice(8, 16, 3)}, ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{throttleDevice(8, 16, 4)},
		}},
		v1: []string{
			"blkio.weight=500", "blkio.weight_device=8:0 10", "blkio.throttle.read_bps_device=8:0 1048576", "blkio.throttle.write_bps_device=8:0 2",
			"blkio.throttle.read_iops_device=8:16 3", "blkio.throttle.write_iops_device=8:16 4",
		},
		v2: []string{"io.weight=default 4950", "io.weight=8:0 1", "io.max=8:0 rbps=1048576", "io.max=8:0 wbps=2", "io.max=8:16 riops=3", "io.max=8:16 wiops=4"},
	},
	{
		name: "huge pages, rdma",
		res: specs.LinuxResources{
			HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4194304}},
			Rdma:           map[string]specs.LinuxRdma{"mlx1": {HcaHandles: ptr(uint32(3)), HcaObjects: ptr(uint32(4))}, "mlx0": {}},
		},
		v1: []string{"hugetlb.2MB.limit_in_bytes=4194304", "rdma.max=mlx0", "rdma.max=mlx1 hca_handle=3 hca_object=4"},
		v2: []string{"hugetlb.2MB.max=4194304", "rdma.max=mlx0", "rdma.max=mlx1 hca_handle=3 hca_object=4"},
	},
	{
		name: "a path for a page size",
		res:  specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "../../x", Limit: 1}}},
		e1:   "not valid", e2: "not valid",
	},
	{
		name: "network class",
		res:  specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(7)), Priorities: []specs.LinuxInterfacePriority{{Name: "eth0", Priority: 2}}}},
		v1:   []string{"net_cls.classid=7", "net_prio.ifpriomap=eth0 2"},
		e2:   "network class",
	},
	{
		name: "unified",
		res:  specs.LinuxResources{Unified: map[string]string{"memory.high": "100", "cpu.weight": "7"}},
		e1:   "cpu.weight, memory.high",
		v2:   []string{"cpu.weight=7", "memory.high=100"},
	},
	{
		name: "unified: another file",
		res:  specs.LinuxResources{Unified: map[string]string{"../cgroup.procs": "1"}},
		e1:   "unified", e2: "not valid",
	},
	{
		name: "unified: no resource",
		res:  specs.LinuxResources{Unified: map[string]string{"cgroup.kill": "1"}},
		e1:   "unified", e2: "not a controller's file",
	},
}

func weightDevice(maj, mnr int64, w uint16) specs.LinuxWeightDevice {
	d := specs.LinuxWeightDevice{Weight: &w}
	d.Major, d.Minor = maj, mnr
	return d
}

func throttleDevice(maj, mnr int64, rate uint64) specs.LinuxThrottleDevice {
	d := specs.LinuxThrottleDevice{Rate: rate}
	d.Major, d.Minor = maj, mnr
	return d
}

func TestLimits(t *testing.T) {
	check := func(t *testing.T, l []limit, err error, want []string, wantErr string) {
		t.Helper()
		if wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), wantErr) {
				t.Errorf("error %v, want one with %q", err, wantErr)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, x := range l {
			got = append(got, x.files[0]+"="+x.value)
			if x.flag == "" {
				t.Errorf("%s has no flag", x.files[0])
			}
			if c, _, _ := strings.Cut(x.files[0], "."); x.controller != c && x.controller != anyController {
				t.Errorf("%s belongs to controller %s", x.files[0], x.controller)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("got  %q\nwant %q", got, want)
		}
	}
	for _, m := range mappings {
		t.Run(m.name, func(t *testing.T) {
			l, err := v1Limits(&m.res)
			check(t, l, err, m.v1, m.e1)
			l, err = v2Limits(&m.res)
			check(t, l, err, m.v2, m.e2)
		})
	}
}

// TestV2WritesFiles runs the v2 driver's limits on a folder with the files that a v2 kernel has, since this machine's v2 tree may
// have no controllers.
func TestV2WritesFiles(t *testing.T) {
	root := t.TempDir()
	files := []string{"memory.max", "memory.swap.max", "memory.low", "cpu.weight", "cpu.max", "cpuset.cpus", "pids.max"}
	leaf := filepath.Join(root, "conex", "x")
	if err := os.MkdirAll(leaf, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{root, filepath.Join(root, "conex"), leaf} {
		write(filepath.Join(d, "cgroup.controllers"), "cpu cpuset memory pids\n")
		write(filepath.Join(d, "cgroup.subtree_control"), "")
	}
	write(filepath.Join(root, "cgroup.subtree_control"), "cpu memory pids cpuset\n")
	for _, f := range files {
		write(filepath.Join(leaf, f), "")
	}
	m := newV2(root, "conex/x")
	err := m.Create(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(200)), Reservation: ptr(int64(10))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(2)), Quota: ptr(int64(5000)), Period: ptr(uint64(10000)), Cpus: "0"},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(7))},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"memory.max": "100", "memory.swap.max": "100", "memory.low": "10", "cpu.weight": "1", "cpu.max": "5000 10000", "cpuset.cpus": "0", "pids.max": "7",
		// The root had handed its controllers down already, the middle had not.
		"../cgroup.subtree_control": "+cpu +cpuset +memory +pids", "../../cgroup.subtree_control": "cpu memory pids cpuset",
	}
	for f, w := range want {
		if got, err := readFile(filepath.Join(leaf, f)); got != w || err != nil {
			t.Errorf("%s = %q, %v; want %q", f, got, err, w)
		}
	}

	// What the kernel lacks is named, unless it is only implied: without swap accounting --memory alone still works.
	if err := os.Remove(filepath.Join(leaf, "memory.swap.max")); err != nil {
		t.Fatal(err)
	}
	swap := func(n int64) error {
		return m.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(n)}})
	}
	if err := swap(200); err != nil {
		t.Errorf("implied swap limit: %v", err)
	}
	if err := swap(300); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--memory-swap") {
		t.Errorf("swap limit: %v", err)
	}
	err = m.Update(&specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(100))}})
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "--blkio-weight: cgroup controller io") {
		t.Errorf("no io controller: %v", err)
	}
}

func TestV2Stats(t *testing.T) {
	root := t.TempDir()
	for f, s := range map[string]string{
		"cpu.stat":       "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 2\nthrottled_usec 7\n",
		"memory.current": "1000\n", "memory.max": "max\n", "memory.peak": "2000\n",
		"memory.stat": "anon 5\ninactive_file 300\n", "memory.events": "low 0\noom 2\noom_kill 1\n",
		"pids.current": "3\n", "pids.max": "9\n",
		"io.stat": "8:16 rbytes=5 wbytes=6 rios=7 wios=8 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=2 rios=3 wios=4\n252:0\n",
	} {
		if err := os.WriteFile(filepath.Join(root, f), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := newV2(filepath.Dir(root), filepath.Base(root))
	s, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.CPU != (CPUStats{Usage: 1500000, User: 1000000, System: 500000, Periods: 4, ThrottledPeriods: 2, ThrottledTime: 7000}) {
		t.Errorf("cpu %+v", s.CPU)
	}
	if s.Memory != (MemoryStats{Usage: 700, Charged: 1000, InactiveFile: 300, Peak: 2000, OOMKills: 1}) {
		t.Errorf("memory %+v", s.Memory)
	}
	if s.Pids != (PidsStats{Current: 3, Limit: 9}) {
		t.Errorf("pids %+v", s.Pids)
	}
	if !slices.Equal(s.IO, []IOStats{{8, 0, 1, 2, 3, 4}, {8, 16, 5, 6, 7, 8}}) {
		t.Errorf("io %+v", s.IO)
	}
	if n, err := m.OOMKills(); n != 1 || err != nil {
		t.Errorf("OOM kills %d, %v", n, err)
	}
}

func TestWeight(t *testing.T) {
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 1024: 100, 262144: 10000, 1 << 40: 10000} {
		if got := weight(shares); got != want {
			t.Errorf("weight(%d) = %d, want %d", shares, got, want)
		}
	}
	last := uint64(0)
	for s := uint64(2); s <= 262144; s += 97 {
		w := weight(s)
		if w < last || w < 1 || w > 10000 {
			t.Fatalf("weight(%d) = %d after %d", s, w, last)
		}
		last = w
	}
	for w, want := range map[uint16]uint64{10: 1, 1000: 10000, 500: 4950} {
		if got := ioWeight(w); got != want {
			t.Errorf("ioWeight(%d) = %d, want %d", w, got, want)
		}
	}
}

func TestV1Devices(t *testing.T) {
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Major: ptr(int64(8)), Minor: ptr(int64(-1)), Access: "r"},
		{Allow: true, Type: "a", Major: ptr(int64(10)), Minor: ptr(int64(200)), Access: "rw"},
	}
	want := []v1Device{
		{"devices.deny", "a"}, {"devices.allow", "c *:* m"}, {"devices.allow", "b 8:* r"},
		{"devices.allow", "b 10:200 rw"}, {"devices.allow", "c 10:200 rw"},
	}
	if got := v1Devices(rules); !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	if !restricts(rules) || restricts(nil) || restricts([]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}) || restricts([]specs.LinuxDeviceCgroup{{Allow: false}, {Allow: true, Type: "a", Access: "mrw"}}) {
		t.Error("restricts is wrong")
	}
	for _, r := range []specs.LinuxDeviceCgroup{{Type: "x"}, {Access: "rwx"}, {Type: "c", Major: ptr(int64(1 << 40))}} {
		if checkDevices([]specs.LinuxDeviceCgroup{r}) == nil {
			t.Errorf("%+v was taken", r)
		}
	}
}

// TestDeviceProgram interprets the BPF program for every request and compares it with the rules.
func TestDeviceProgram(t *testing.T) {
	lists := map[string][]specs.LinuxDeviceCgroup{
		"empty": {},
		"docker": {
			{Allow: false, Access: "rwm"},
			{Allow: true, Type: "c", Access: "m"}, {Allow: true, Type: "b", Access: "m"},
			{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"},
			{Allow: true, Type: "c", Major: ptr(int64(5)), Minor: ptr(int64(2)), Access: "rwm"},
			{Allow: true, Type: "c", Major: ptr(int64(136)), Access: "rwm"},
		},
		"split": {
			{Allow: true, Type: "b", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "r"},
			{Allow: true, Type: "b", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "w"},
			{Allow: false, Type: "b", Major: ptr(int64(1)), Minor: ptr(int64(5)), Access: "w"},
		},
		"allow all, deny some": {
			{Allow: true, Type: "a"}, {Allow: false, Type: "c", Major: ptr(int64(1)), Access: "w"}, {Allow: true, Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rw"},
		},
		"denied last": {{Allow: true, Type: "c", Access: "rwm"}, {Allow: false, Access: "rwm"}},
	}
	for name, rules := range lists {
		t.Run(name, func(t *testing.T) {
			prog := deviceProgram(rules)
			for typ := 1; typ <= 2; typ++ {
				for acc := 1; acc <= 7; acc++ {
					for _, maj := range []int64{0, 1, 5, 8, 136} {
						for _, mnr := range []int64{0, 2, 3, 5} {
							want := true
							for bit := 1; bit <= 4; bit <<= 1 {
								if acc&bit == 0 {
									continue
								}
								ok := false
								for _, r := range rules {
									speaks := (r.Type == "" || r.Type == "a" || r.Type == map[int]string{1: "b", 2: "c"}[typ]) &&
										(every(r.Major) || *r.Major == maj) && (every(r.Minor) || *r.Minor == mnr) && access(r)&bit != 0
									if speaks {
										ok = r.Allow
									}
								}
								want = want && ok
							}
							if got := interpret(t, prog, typ, acc, maj, mnr); got != want {
								t.Fatalf("type %d access %d device %d:%d: %v, want %v", typ, acc, maj, mnr, got, want)
							}
						}
					}
				}
			}
		})
	}
}

// interpret runs the few kinds of eBPF instructions that deviceProgram uses.
func interpret(t *testing.T, prog []bpf.Instruction, typ, acc int, maj, mnr int64) bool {
	t.Helper()
	var reg [11]int64
	ctx := [3]int64{int64(acc<<16 | typ), maj, mnr}
	for pc := 0; pc < len(prog); pc++ {
		i := prog[pc]
		dst, src := i.Regs&15, i.Regs>>4
		switch i.Code {
		case unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W:
			reg[dst] = ctx[i.Off/4]
		case 0xbf:
			reg[dst] = reg[src]
		case 0xb7:
			reg[dst] = int64(i.Imm)
		case 0x57:
			reg[dst] &= int64(i.Imm)
		case 0x77:
			reg[dst] >>= i.Imm
		case 0x55:
			if reg[dst] != int64(i.Imm) {
				pc += int(i.Off)
			}
		case 0x15:
			if reg[dst] == int64(i.Imm) {
				pc += int(i.Off)
			}
		case 0x95:
			return reg[0] == 1
		default:
			t.Fatalf("instruction %#x", i.Code)
		}
	}
	t.Fatal("ran off the end")
	return false
}

func TestParseMountinfo(t *testing.T) {
	const text = `25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
31 25 0:27 / /sys/fs/cgroup/un\040ified rw - cgroup2 cgroup2 rw,nsdelegate
32 25 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 25 0:29 / /cg/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
34 25 0:30 / /cg/memory rw - cgroup cgroup rw,memory
garbage
- x
35 25 0:30 / /elsewhere/memory rw - cgroup cgroup rw,memory
`
	m := parseMountinfo(bufio.NewScanner(strings.NewReader(text)))
	if m.unified != "/sys/fs/cgroup/un ified" {
		t.Errorf("unified %q", m.unified)
	}
	if !maps.Equal(m.v1, map[string]string{"cpu": "/cg/cpu,cpuacct", "cpuacct": "/cg/cpu,cpuacct", "memory": "/cg/memory", Named: "/sys/fs/cgroup/systemd"}) {
		t.Errorf("v1 %v", m.v1)
	}
	if !slices.Equal(m.roots(), []string{"/cg/cpu,cpuacct", "/cg/memory", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/un ified"}) {
		t.Errorf("roots %v", m.roots())
	}
}
