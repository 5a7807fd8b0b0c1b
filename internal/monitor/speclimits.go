package monitor

import (
	"cmp"
	"strconv"

	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// cpuPeriod is the period that --cpus counts in, in microseconds; Docker's.
const cpuPeriod = 100000

// resources translates limits.
func resources(s *specs.Spec, hc *apic.HostConfig) {
	res := s.Linux.Resources
	if hc.Memory > 0 || hc.MemoryReservation > 0 {
		m := &specs.LinuxMemory{}
		if hc.Memory > 0 {
			m.Limit = &hc.Memory
			// Docker's rule: as much swap as memory unless it is said otherwise; the value counts both.
			swap := cmp.Or(hc.MemorySwap, 2*hc.Memory)
			m.Swap = &swap
		}
		if hc.MemoryReservation > 0 {
			m.Reservation = &hc.MemoryReservation
		}
		if hc.MemorySwappiness != nil && *hc.MemorySwappiness >= 0 {
			v := uint64(*hc.MemorySwappiness)
			m.Swappiness = &v
		}
		m.DisableOOMKiller = hc.OomKillDisable
		res.Memory = m
	}
	cpu := &specs.LinuxCPU{Cpus: hc.CpusetCpus, Mems: hc.CpusetMems}
	if hc.CPUShares > 0 {
		v := uint64(hc.CPUShares)
		cpu.Shares = &v
	}
	if hc.CPUPeriod > 0 {
		v := uint64(hc.CPUPeriod)
		cpu.Period = &v
	}
	if hc.CPUQuota > 0 {
		cpu.Quota = &hc.CPUQuota
	}
	if hc.NanoCPUs > 0 {
		period, quota := uint64(cpuPeriod), hc.NanoCPUs*cpuPeriod/1e9
		cpu.Period, cpu.Quota = &period, &quota
	}
	if *cpu != (specs.LinuxCPU{}) {
		res.CPU = cpu
	}
	if hc.PidsLimit != nil && *hc.PidsLimit > 0 {
		res.Pids = &specs.LinuxPids{Limit: hc.PidsLimit}
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
}
