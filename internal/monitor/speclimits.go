package monitor

import (
	"cmp"
	"fmt"
	"strconv"

	"conex/internal/runtime"

	"conex/internal/linux/cgroup"

	"github.com/moby/moby/api/types/blkiodev"
	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cpuPeriod is the period that --cpus counts in, in microseconds; Docker's.
const cpuPeriod = 100000

// resources translates limits.
func resources(s *specs.Spec, hc *apic.HostConfig) error {
	res := s.Linux.Resources
	res.Memory, res.CPU = memoryLimits(&hc.Resources), cpuLimits(&hc.Resources)
	if hc.PidsLimit != nil {
		res.Pids = pidsLimit(*hc.PidsLimit)
	}
	var err error
	if res.BlockIO, err = blockLimits(&hc.Resources); err != nil {
		return err
	}
	for _, text := range hc.DeviceCgroupRules {
		rule, err := cgroup.ParseDeviceRule(text)
		if err != nil {
			return fmt.Errorf("--device-cgroup-rule: %w", err)
		}
		res.Devices = append(res.Devices, rule)
	}
	if hc.OomScoreAdj != 0 {
		s.Process.OOMScoreAdj = &hc.OomScoreAdj
	}
	for _, u := range hc.Ulimits {
		s.Process.Rlimits = append(s.Process.Rlimits, runtime.AllowedRlimit(runtime.Rlimit(u.Name, u.Soft, u.Hard)))
	}
	if hc.ShmSize > 0 {
		for i, m := range s.Mounts {
			if m.Destination == "/dev/shm" && m.Type == "tmpfs" {
				s.Mounts[i].Options = setOption(m.Options, "size="+strconv.FormatInt(hc.ShmSize, 10))
			}
		}
	}
	return nil
}

// memoryLimits are nil when none is set.
func memoryLimits(r *apic.Resources) *specs.LinuxMemory {
	m := specs.LinuxMemory{}
	if r.Memory > 0 {
		m.Limit = &r.Memory
		// Docker's rule: as much swap as memory unless it is said otherwise; the value counts both.
		swap := cmp.Or(r.MemorySwap, 2*r.Memory)
		m.Swap = &swap
	}
	if r.MemoryReservation > 0 {
		m.Reservation = &r.MemoryReservation
	}
	if r.MemorySwappiness != nil && *r.MemorySwappiness >= 0 {
		v := uint64(*r.MemorySwappiness)
		m.Swappiness = &v
	}
	if r.OomKillDisable != nil && *r.OomKillDisable {
		m.DisableOOMKiller = r.OomKillDisable
	}
	if m == (specs.LinuxMemory{}) {
		return nil
	}
	return &m
}

// cpuLimits are nil when none is set.
func cpuLimits(r *apic.Resources) *specs.LinuxCPU {
	c := specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems}
	if r.CPUShares > 0 {
		v := uint64(r.CPUShares)
		c.Shares = &v
	}
	if r.NanoCPUs > 0 {
		period, quota := uint64(cpuPeriod), r.NanoCPUs*cpuPeriod/1e9
		c.Period, c.Quota = &period, &quota
	}
	if r.CPUPeriod > 0 {
		v := uint64(r.CPUPeriod)
		c.Period = &v
	}
	if r.CPUQuota != 0 {
		c.Quota = &r.CPUQuota
	}
	if r.CPURealtimePeriod > 0 {
		v := uint64(r.CPURealtimePeriod)
		c.RealtimePeriod = &v
	}
	if r.CPURealtimeRuntime != 0 {
		c.RealtimeRuntime = &r.CPURealtimeRuntime
	}
	if c == (specs.LinuxCPU{}) {
		return nil
	}
	return &c
}

// pidsLimit translates --pids-limit, where 0 and less mean none.
func pidsLimit(n int64) *specs.LinuxPids {
	if n <= 0 {
		n = -1
	}
	return &specs.LinuxPids{Limit: &n}
}

// blockLimits are nil when none is set. Devices are named by their paths on the host, and looked up at each start.
func blockLimits(r *apic.Resources) (*specs.LinuxBlockIO, error) {
	b := specs.LinuxBlockIO{}
	any := r.BlkioWeight > 0
	if any {
		b.Weight = &r.BlkioWeight
	}
	for _, d := range r.BlkioWeightDevice {
		major, minor, err := blockDevice("--blkio-weight-device", d.Path)
		if err != nil {
			return nil, err
		}
		w := specs.LinuxWeightDevice{Weight: &d.Weight}
		w.Major, w.Minor = major, minor
		b.WeightDevice = append(b.WeightDevice, w)
		any = true
	}
	for _, t := range []struct {
		flag string
		from []*blkiodev.ThrottleDevice
		to   *[]specs.LinuxThrottleDevice
	}{
		{"--device-read-bps", r.BlkioDeviceReadBps, &b.ThrottleReadBpsDevice}, {"--device-write-bps", r.BlkioDeviceWriteBps, &b.ThrottleWriteBpsDevice},
		{"--device-read-iops", r.BlkioDeviceReadIOps, &b.ThrottleReadIOPSDevice}, {"--device-write-iops", r.BlkioDeviceWriteIOps, &b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.from {
			major, minor, err := blockDevice(t.flag, d.Path)
			if err != nil {
				return nil, err
			}
			l := specs.LinuxThrottleDevice{Rate: d.Rate}
			l.Major, l.Minor = major, minor
			*t.to = append(*t.to, l)
			any = true
		}
	}
	if !any {
		return nil, nil
	}
	return &b, nil
}

func blockDevice(flag, path string) (major, minor int64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, 0, fmt.Errorf("%s %s: %w", flag, path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, fmt.Errorf("%s %s: not a block device", flag, path)
	}
	return int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), nil
}
