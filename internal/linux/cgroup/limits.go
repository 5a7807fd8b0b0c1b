package cgroup

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// anyController marks a limit whose file name comes from the user (LinuxResources.Unified).
const anyController = ""

// list collects limits.
type list []limit

func (l *list) add(flag, controller, value string, files ...string) *limit {
	*l = append(*l, limit{flag: flag, controller: controller, files: files, value: value})
	return &(*l)[len(*l)-1]
}

func itoa(n int64) string  { return strconv.FormatInt(n, 10) }
func utoa(n uint64) string { return strconv.FormatUint(n, 10) }

// orMax writes v2's word for no limit.
func orMax(n int64) string {
	if n < 0 {
		return "max"
	}
	return itoa(n)
}

// v1Limits turns the resources into v1's files. What isn't set isn't written: a new cgroup has no limits.
func v1Limits(res *specs.LinuxResources) ([]limit, error) {
	var l list
	if res == nil {
		return nil, nil
	}
	if m := res.Memory; m != nil {
		limit, swap := set(m.Limit), set(m.Swap)
		switch {
		case limit && swap:
			l.add("--memory", "memory", itoa(*m.Limit), "memory.limit_in_bytes").paired = true
			// Twice the memory is what Docker sets by itself; on a kernel without swap accounting --memory alone must work.
			l.add("--memory-swap", "memory", itoa(*m.Swap), "memory.memsw.limit_in_bytes").implied = *m.Swap == 2**m.Limit
		case limit:
			l.add("--memory", "memory", itoa(*m.Limit), "memory.limit_in_bytes")
		case swap:
			l.add("--memory-swap", "memory", itoa(*m.Swap), "memory.memsw.limit_in_bytes")
		}
		if set(m.Reservation) {
			l.add("--memory-reservation", "memory", itoa(*m.Reservation), "memory.soft_limit_in_bytes")
		}
		if m.Swappiness != nil {
			l.add("--memory-swappiness", "memory", utoa(*m.Swappiness), "memory.swappiness")
		}
		if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
			l.add("--oom-kill-disable", "memory", "1", "memory.oom_control")
		}
		if set(m.KernelTCP) {
			l.add("--kernel-memory-tcp", "memory", itoa(*m.KernelTCP), "memory.kmem.tcp.limit_in_bytes")
		}
	}
	if c := res.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			l.add("--cpu-shares", "cpu", utoa(*c.Shares), "cpu.shares")
		}
		quota := c.Quota != nil && *c.Quota != 0
		if c.Period != nil && *c.Period != 0 {
			l.add("--cpu-period", "cpu", utoa(*c.Period), "cpu.cfs_period_us").paired = quota
		}
		if quota {
			l.add("--cpus", "cpu", itoa(*c.Quota), "cpu.cfs_quota_us")
		}
		if c.Burst != nil {
			l.add("cpu burst", "cpu", utoa(*c.Burst), "cpu.cfs_burst_us")
		}
		if c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
			l.add("--cpu-rt-period", "cpu", utoa(*c.RealtimePeriod), "cpu.rt_period_us").paired = c.RealtimeRuntime != nil
		}
		if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 {
			l.add("--cpu-rt-runtime", "cpu", itoa(*c.RealtimeRuntime), "cpu.rt_runtime_us")
		}
		if c.Idle != nil {
			l.add("cpu idle", "cpu", itoa(*c.Idle), "cpu.idle")
		}
		l.cpuset(c)
	}
	if p := res.Pids; p != nil && p.Limit != nil {
		l.pids(*p.Limit)
	}
	if b := res.BlockIO; b != nil {
		if w := b.Weight; w != nil && *w != 0 {
			l.add("--blkio-weight", "blkio", utoa(uint64(*w)), "blkio.weight", "blkio.bfq.weight")
		}
		if w := b.LeafWeight; w != nil && *w != 0 {
			l.add("blkio leaf weight", "blkio", utoa(uint64(*w)), "blkio.leaf_weight")
		}
		for _, d := range b.WeightDevice {
			if d.Weight != nil {
				l.add("--blkio-weight-device", "blkio", fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.Weight), "blkio.weight_device", "blkio.bfq.weight_device")
			}
		}
		for _, t := range throttles(b) {
			for _, d := range t.devices {
				l.add(t.flag, "blkio", fmt.Sprintf("%d:%d %d", d.Major, d.Minor, d.Rate), t.v1)
			}
		}
	}
	for _, h := range res.HugepageLimits {
		if err := checkName(h.Pagesize); err != nil {
			return nil, err
		}
		l.add("huge pages of "+h.Pagesize, "hugetlb", utoa(h.Limit), "hugetlb."+h.Pagesize+".limit_in_bytes")
	}
	if n := res.Network; n != nil {
		if n.ClassID != nil {
			l.add("network class", "net_cls", utoa(uint64(*n.ClassID)), "net_cls.classid")
		}
		for _, p := range n.Priorities {
			l.add("network priority", "net_prio", fmt.Sprintf("%s %d", p.Name, p.Priority), "net_prio.ifpriomap")
		}
	}
	l.rdma(res)
	if len(res.Unified) > 0 {
		return nil, fmt.Errorf("unified resources (%s): this host has cgroup v1: %w", strings.Join(slices.Sorted(maps.Keys(res.Unified)), ", "), ErrUnsupported)
	}
	return l, nil
}

// v2Limits turns the resources into the files of the unified tree.
func v2Limits(res *specs.LinuxResources) ([]limit, error) {
	var l list
	if res == nil {
		return nil, nil
	}
	if m := res.Memory; m != nil {
		if set(m.Limit) {
			l.add("--memory", "memory", orMax(*m.Limit), "memory.max")
		}
		if set(m.Swap) {
			// OCI counts memory and swap together, v2 swap alone.
			value, implied := "max", false
			if *m.Swap > 0 {
				if !set(m.Limit) || *m.Limit < 0 {
					return nil, fmt.Errorf("--memory-swap %d: cgroup v2 limits swap by itself, so --memory must be given, too: %w", *m.Swap, ErrUnsupported)
				}
				if *m.Swap < *m.Limit {
					return nil, fmt.Errorf("--memory-swap %d is less than --memory %d: it limits memory and swap together", *m.Swap, *m.Limit)
				}
				value, implied = itoa(*m.Swap-*m.Limit), *m.Swap == 2**m.Limit // see v1Limits
			}
			l.add("--memory-swap", "memory", value, "memory.swap.max").implied = implied
		}
		if set(m.Reservation) {
			l.add("--memory-reservation", "memory", orMax(*m.Reservation), "memory.low")
		}
		if m.Swappiness != nil {
			return nil, fmt.Errorf("--memory-swappiness: cgroup v2 has no such setting: %w", ErrUnsupported)
		}
		if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
			return nil, fmt.Errorf("--oom-kill-disable: cgroup v2 has no such setting: %w", ErrUnsupported)
		}
	}
	if c := res.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			l.add("--cpu-shares", "cpu", utoa(weight(*c.Shares)), "cpu.weight")
		}
		quota, period := "", ""
		if c.Quota != nil && *c.Quota != 0 {
			quota = orMax(*c.Quota)
		}
		if c.Period != nil && *c.Period != 0 {
			period = " " + utoa(*c.Period)
			if quota == "" {
				quota = "max"
			}
		}
		if quota != "" {
			l.add("--cpus", "cpu", quota+period, "cpu.max")
		}
		if c.Burst != nil {
			l.add("cpu burst", "cpu", utoa(*c.Burst), "cpu.max.burst")
		}
		if c.Idle != nil {
			l.add("cpu idle", "cpu", itoa(*c.Idle), "cpu.idle")
		}
		if c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0 || c.RealtimePeriod != nil && *c.RealtimePeriod != 0 {
			return nil, fmt.Errorf("--cpu-rt-runtime, --cpu-rt-period: cgroup v2 has no such setting: %w", ErrUnsupported)
		}
		l.cpuset(c)
	}
	if p := res.Pids; p != nil && p.Limit != nil {
		l.pids(*p.Limit)
	}
	if b := res.BlockIO; b != nil {
		if w := b.Weight; w != nil && *w != 0 {
			// BFQ's file has the old scale, io.weight one from 1 to 10000.
			if *w < 10 || *w > 1000 {
				return nil, fmt.Errorf("--blkio-weight %d: must lie between 10 and 1000", *w)
			}
			l.add("--blkio-weight", "io", "default "+utoa(ioWeight(*w)), "io.weight")
		}
		for _, d := range b.WeightDevice {
			if d.Weight != nil {
				l.add("--blkio-weight-device", "io", fmt.Sprintf("%d:%d %d", d.Major, d.Minor, ioWeight(*d.Weight)), "io.weight")
			}
		}
		for _, t := range throttles(b) {
			for _, d := range t.devices {
				l.add(t.flag, "io", fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, t.v2, d.Rate), "io.max")
			}
		}
	}
	for _, h := range res.HugepageLimits {
		if err := checkName(h.Pagesize); err != nil {
			return nil, err
		}
		l.add("huge pages of "+h.Pagesize, "hugetlb", utoa(h.Limit), "hugetlb."+h.Pagesize+".max")
	}
	if n := res.Network; n != nil && (n.ClassID != nil || len(n.Priorities) > 0) {
		return nil, fmt.Errorf("network class and priorities: cgroup v2 has no such setting: %w", ErrUnsupported)
	}
	l.rdma(res)
	for _, k := range slices.Sorted(maps.Keys(res.Unified)) {
		// Only files of controllers: cgroup.procs or cgroup.kill are no resources.
		if err := checkName(k); err != nil {
			return nil, err
		}
		if c, _, ok := strings.Cut(k, "."); !ok || c == "cgroup" {
			return nil, fmt.Errorf("unified resource %q: not a controller's file", k)
		}
		l.add("unified resource "+k, anyController, res.Unified[k], k)
	}
	return l, nil
}

// set reports whether an optional value says something: Docker leaves 0 where a flag wasn't given.
func set(n *int64) bool { return n != nil && *n != 0 }

// checkName refuses names that would lead to a file elsewhere.
func checkName(name string) error {
	if name == "" || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
		return fmt.Errorf("cgroup file name %q is not valid", name)
	}
	return nil
}

func (l *list) cpuset(c *specs.LinuxCPU) {
	if c.Cpus != "" {
		l.add("--cpuset-cpus", "cpuset", c.Cpus, "cpuset.cpus")
	}
	if c.Mems != "" {
		l.add("--cpuset-mems", "cpuset", c.Mems, "cpuset.mems")
	}
}

// pids: 0 and -1 are Docker's words for no limit. They are written too, since Update may lift one.
func (l *list) pids(n int64) {
	if n == 0 {
		n = -1
	}
	l.add("--pids-limit", "pids", orMax(n), "pids.max")
}

func (l *list) rdma(res *specs.LinuxResources) {
	for _, dev := range slices.Sorted(maps.Keys(res.Rdma)) {
		value := dev
		if h := res.Rdma[dev].HcaHandles; h != nil {
			value += " hca_handle=" + utoa(uint64(*h))
		}
		if o := res.Rdma[dev].HcaObjects; o != nil {
			value += " hca_object=" + utoa(uint64(*o))
		}
		l.add("rdma of "+dev, "rdma", value, "rdma.max")
	}
}

// throttle is one kind of I/O limit with its two names.
type throttle struct {
	flag, v1, v2 string
	devices      []specs.LinuxThrottleDevice
}

func throttles(b *specs.LinuxBlockIO) []throttle {
	return []throttle{
		{"--device-read-bps", "blkio.throttle.read_bps_device", "rbps", b.ThrottleReadBpsDevice},
		{"--device-write-bps", "blkio.throttle.write_bps_device", "wbps", b.ThrottleWriteBpsDevice},
		{"--device-read-iops", "blkio.throttle.read_iops_device", "riops", b.ThrottleReadIOPSDevice},
		{"--device-write-iops", "blkio.throttle.write_iops_device", "wiops", b.ThrottleWriteIOPSDevice},
	}
}

// weight converts cpu.shares (2 to 262144, 1024 by default) to cpu.weight (1 to 10000, 100 by default). The straight line
// between the two ranges, which runtimes used first, turns the default 1024 into 39, so that a container with default shares lost
// against every other group of the system. This is the curve through both ends and the default that runc and crun use today:
// log10(weight) = (log2(shares)² + 125 log2(shares)) / 612 - 7/34.
func weight(shares uint64) uint64 {
	l := math.Log2(float64(min(max(shares, 2), 262144)))
	return uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34) - 1e-9))
}

// ioWeight converts blkio.weight (10 to 1000) to io.weight (1 to 10000), straight.
func ioWeight(w uint16) uint64 {
	return 1 + (uint64(min(max(w, 10), 1000))-10)*9999/990
}
