package cgroup

import (
	"os"
	"slices"
	"strings"
	"testing"

	"conex/internal/linux/dbus"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestSystemd makes, limits and ends a scope by the machine's own systemd; internal/linux/dbus has the wire, test/guest the machine.
func TestSystemd(t *testing.T) {
	needRoot(t)
	if _, err := os.Lstat("/run/systemd/system"); err != nil {
		t.Skip("systemd does not run this machine: `make guest` has one where it does")
	}
	place, err := ForContainer("0123456789abcdef", "conextest-below.slice", true)
	if err != nil {
		t.Fatal(err)
	}
	if place.Path != "conextest.slice/conextest-below.slice/conex-0123456789abcdef.scope" {
		t.Fatalf("place %+v", place)
	}
	m, err := Open(place)
	if err != nil {
		t.Fatal(err)
	}
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(96 << 20))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(50))},
		Devices: []specs.LinuxDeviceCgroup{
			{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"},
			{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(5)), Access: "r"}, {Allow: true, Type: "c", Major: ptr(int64(136)), Access: "rwm"},
		},
	}
	for round := range 2 { // the same name again at once, as a restart has it
		if err := m.Create(res); err != nil {
			t.Fatal(round, err)
		}
		p := start(t, m, "devices")
		m.Started()
		if pids, err := m.Pids(); err != nil || !slices.Equal(pids, []int{p.Process.Pid}) {
			t.Errorf("pids %v, %v; want %d alone", pids, err, p.Process.Pid)
		}
		b, err := os.ReadFile("/proc/" + itoa(int64(p.Process.Pid)) + "/cgroup")
		if err != nil || !strings.Contains(string(b), ":/"+place.Path+"\n") {
			t.Errorf("the process is in %s, %v", b, err)
		}
		if round == 0 {
			if err := m.Update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(128 << 20)), Swap: ptr(int64(128 << 20))}}); err != nil {
				t.Error(err)
			}
			st, err := m.Stats()
			if err != nil || st.Memory.Limit != 128<<20 || st.Pids.Limit != 50 {
				t.Errorf("after an update: %+v, %v", st, err)
			}
		}
		p.in.Close()
		if err := waitFor(p); err != nil {
			t.Error(err)
		}
		if got, want := p.out.String(), "null 0 true\nnull 1 true\nzero 0 true\nzero 1 false\n"; got != want {
			t.Errorf("devices: got %q, want %q", got, want)
		}
		if err := m.Delete(); err != nil {
			t.Error(err)
		}
		for _, root := range mounts().roots() {
			if exists(root + "/" + place.Path) {
				t.Errorf("%s/%s is left", root, place.Path)
			}
		}
	}
}

func TestPlaces(t *testing.T) {
	for _, tt := range []struct {
		spec    string
		systemd bool
		want    Place
	}{
		{"/conex/x", false, Place{Path: "conex/x"}},
		{"a/b", false, Place{Path: "a/b"}},
		{"/../x", false, Place{Path: "x"}},
		{"a:b:c", false, Place{Path: "a:b:c"}},
		{":conex:x", true, Place{Path: "system.slice/conex-x.scope", Slice: "system.slice", Unit: "conex-x.scope"}},
		{"machine.slice:cri:x", true, Place{Path: "machine.slice/cri-x.scope", Slice: "machine.slice", Unit: "cri-x.scope"}},
		{"a-b.slice::x", true, Place{Path: "a.slice/a-b.slice/x.scope", Slice: "a-b.slice", Unit: "x.scope"}},
		{"-.slice:p:x", true, Place{Path: "p-x.scope", Slice: "-.slice", Unit: "p-x.scope"}},
	} {
		got, err := Parse(tt.spec, tt.systemd)
		if err != nil || got != tt.want {
			t.Errorf("%s: %+v, %v", tt.spec, got, err)
			continue
		}
		if again, err := Parse(got.String(), tt.systemd); err != nil || again != got {
			t.Errorf("%s: %s means %+v, %v", tt.spec, got, again, err)
		}
	}
	for _, bad := range []struct {
		spec    string
		systemd bool
	}{
		{"", false}, {"/", false}, {"/conex/x", true}, {"a:b", true}, {"a::", true}, {"../x.slice:p:x", true}, {"a--b.slice:p:x", true},
		{".slice:p:x", true}, {"a.service:p:x", true}, {"a.slice:p:x/y", true}, {"a.slice:p:" + strings.Repeat("x", 300), true},
	} {
		if p, err := Parse(bad.spec, bad.systemd); err == nil {
			t.Errorf("%q is %+v", bad.spec, p)
		}
	}
}

// TestSystemdProperties has limits in systemd's own words, on the version that this machine has.
func TestSystemdProperties(t *testing.T) {
	s := &systemd{}
	res := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(50))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(33333)), Period: ptr(uint64(100000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))}, BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(10))},
	}
	want := []dbus.Property{{Name: "MemoryLimit", Value: uint64(100)}, {Name: "CPUShares", Value: uint64(1024)}, {Name: "CPUQuotaPerSecUSec", Value: uint64(340000)}, {Name: "TasksMax", Value: ^uint64(0)}}
	if Unified() {
		want = []dbus.Property{
			{Name: "MemoryMax", Value: uint64(100)}, {Name: "MemorySwapMax", Value: uint64(50)}, {Name: "MemoryLow", Value: uint64(50)}, {Name: "CPUWeight", Value: uint64(100)},
			{Name: "CPUQuotaPerSecUSec", Value: uint64(340000)}, {Name: "TasksMax", Value: ^uint64(0)}, {Name: "IOWeight", Value: uint64(1)},
		}
	}
	if got := s.properties(res); !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	if got := bitmask("0-2,9"); string(got) != "\x07\x02" {
		t.Errorf("0-2,9 is %x", got)
	}
	if got := s.properties(nil); got != nil {
		t.Errorf("no limits: %v", got)
	}
}

// TestWithin reads lists of processors.
func TestWithin(t *testing.T) {
	for _, tt := range []struct {
		want, have string
		ok, bad    bool
	}{
		{"", "0-1", true, false}, {"0", "0-1", true, false}, {"0-1", "0,1", true, false}, {"1-2", "0-1", false, false}, {"0,3", "0-3", true, false},
		{"x", "0", false, true}, {"1-", "0", false, true}, {"2-1", "0-3", false, true}, {"-1", "0", false, true}, {"0-999999999", "0", false, true}, {"0,,1", "0-1", false, true},
	} {
		if ok, err := Within(tt.want, tt.have); ok != tt.ok || (err != nil) != tt.bad {
			t.Errorf("%q in %q: %v, %v", tt.want, tt.have, ok, err)
		}
	}
}

// TestStandIn has the child that holds a scope's place do nothing, and go when it is told.
func TestStandIn(t *testing.T) {
	s := &systemd{}
	pid, err := s.standIn()
	if err != nil {
		t.Fatal(err)
	}
	if fds, err := os.ReadDir("/proc/" + itoa(int64(pid)) + "/fd"); err != nil || len(fds) > 3 {
		t.Errorf("it holds %d descriptors, %v", len(fds), err)
	}
	s.Started()
	if _, err := os.Lstat("/proc/" + itoa(int64(pid))); err == nil {
		t.Error("it is still there")
	}
	s.Started()
}
