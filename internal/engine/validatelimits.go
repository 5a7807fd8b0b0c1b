package engine

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"conex/internal/config"
	"conex/internal/linux/caps"
	"conex/internal/linux/cgroup"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// minMemory is Docker's least --memory and --memory-reservation, in bytes: below it nothing starts.
const minMemory = 6 << 20

// validateLimits checks the limits of a new container. What the kernel lacks is taken out of hc with a warning, as Docker does it.
func (e *Engine) validateLimits(hc *apic.HostConfig) (warnings []string, err error) {
	if warnings, err = checkResources(&hc.Resources, false); err != nil {
		return warnings, err
	}
	if hc.OomScoreAdj < -1000 || hc.OomScoreAdj > 1000 {
		return warnings, invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", hc.OomScoreAdj)
	}
	if hc.OomScoreAdj < 0 && !mayLowerOOMScore(hc.OomScoreAdj) {
		warnings = append(warnings, fmt.Sprintf("conex may not lower OOM scores here (it lacks CAP_SYS_RESOURCE). OOM score adjustment %d discarded.", hc.OomScoreAdj))
		hc.OomScoreAdj = 0
	}
	if hc.ShmSize < 0 {
		return warnings, invalid("SHM size can not be less than 0")
	}
	for _, r := range hc.DeviceCgroupRules {
		if _, err := cgroup.ParseDeviceRule(r); err != nil {
			return warnings, invalid("invalid device cgroup rule format: '%s'", r)
		}
	}
	return warnings, e.validateCgroupParent(hc.CgroupParent)
}

// systemdCgroup reports whether systemd makes cgroups, not conex.
func (e *Engine) systemdCgroup() bool { return e.cfg.CgroupDriver == config.CgroupSystemd }

func (e *Engine) validateCgroupParent(p string) error {
	if p == "" {
		return nil
	}
	if e.systemdCgroup() {
		if _, err := cgroup.SlicePath(p); err != nil || p == "-.slice" {
			return invalid(`cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"`)
		}
		return nil
	}
	if strings.ContainsAny(p, "\x00\n") {
		return invalid("cgroup-parent %q is not a path such as /name or name/below", p)
	}
	return nil
}

// mayLowerOOMScore reports whether a process of ours may get this score. The least that one had so far is always allowed.
func mayLowerOOMScore(score int) bool {
	if caps.Available()&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return true
	}
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return false
	}
	own, err := strconv.Atoi(strings.TrimSpace(string(b)))
	return err == nil && own <= score
}

// checkResources checks limits against each other and the kernel, for a new container or an update.
func checkResources(res *apic.Resources, update bool) (warnings []string, err error) {
	if res.MemorySwappiness != nil && *res.MemorySwappiness == -1 {
		res.MemorySwappiness = nil
	}
	if res.OomKillDisable != nil && !*res.OomKillDisable && cgroup.Unified() {
		res.OomKillDisable = nil
	}
	if !limited(res) { // the usual case does not look at the kernel
		return nil, nil
	}
	can := cgroup.Limits()
	discard := func(text string) { warnings = append(warnings, text) }
	lacks := func(what, consequence string) {
		discard("Your kernel does not support " + what + " or the cgroup is not mounted. " + consequence + " discarded.")
	}
	for _, check := range []func() error{
		func() error { return checkMemory(res, can, update, discard, lacks) },
		func() error { return checkCPU(res, can, discard, lacks) },
		func() error { return checkCPUSet(res, can, lacks) },
		func() error { return checkBlockIO(res, can, lacks) },
	} {
		if err := check(); err != nil {
			return warnings, err
		}
	}
	if res.PidsLimit != nil && !can.Pids {
		if *res.PidsLimit > 0 {
			lacks("PIDs limit capabilities", "PIDs limit")
		}
		res.PidsLimit = nil
	}
	return warnings, nil
}

// limited reports whether anything is limited.
func limited(res *apic.Resources) bool {
	return res.Memory != 0 || res.MemoryReservation != 0 || res.MemorySwap != 0 || res.MemorySwappiness != nil || res.OomKillDisable != nil && *res.OomKillDisable ||
		res.PidsLimit != nil || res.NanoCPUs != 0 || res.CPUShares != 0 || res.CPUPeriod != 0 || res.CPUQuota != 0 || res.CPURealtimePeriod != 0 ||
		res.CPURealtimeRuntime != 0 || res.CpusetCpus != "" || res.CpusetMems != "" || res.BlkioWeight != 0 || len(res.BlkioWeightDevice) > 0 ||
		len(res.BlkioDeviceReadBps) > 0 || len(res.BlkioDeviceWriteBps) > 0 || len(res.BlkioDeviceReadIOps) > 0 || len(res.BlkioDeviceWriteIOps) > 0 ||
		res.CPUCount != 0 || res.CPUPercent != 0 || res.IOMaximumBandwidth != 0 || res.IOMaximumIOps != 0
}

func checkMemory(res *apic.Resources, can cgroup.Features, update bool, discard func(string), lacks func(what, consequence string)) error {
	if res.Memory != 0 && res.Memory < minMemory {
		return invalid("Minimum memory limit allowed is 6MB")
	}
	if res.Memory > 0 && !can.Memory {
		lacks("memory limit capabilities", "Limitation")
		res.Memory, res.MemorySwap = 0, -1
	}
	if res.Memory > 0 && res.MemorySwap != -1 && !can.MemorySwap {
		discard("Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.")
		res.MemorySwap = -1
	}
	if res.Memory > 0 && res.MemorySwap > 0 && res.MemorySwap < res.Memory {
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	}
	if res.Memory == 0 && res.MemorySwap > 0 && !update {
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	}
	if res.MemorySwappiness != nil && !can.MemorySwappiness {
		lacks("memory swappiness capabilities", "Memory swappiness")
		res.MemorySwappiness = nil
	}
	if s := res.MemorySwappiness; s != nil && (*s < 0 || *s > 100) {
		return invalid("Invalid value: %d, valid memory swappiness range is 0-100", *s)
	}
	if res.MemoryReservation > 0 && !can.MemoryReservation {
		lacks("memory soft limit capabilities", "Limitation")
		res.MemoryReservation = 0
	}
	if res.MemoryReservation != 0 && res.MemoryReservation < minMemory {
		return invalid("Minimum memory reservation allowed is 6MB")
	}
	if res.Memory > 0 && res.MemoryReservation > 0 && res.Memory < res.MemoryReservation {
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	}
	if d := res.OomKillDisable; d != nil && !can.OOMKillDisable {
		if *d {
			discard("Your kernel does not support OomKillDisable. OomKillDisable discarded.")
		}
		res.OomKillDisable = nil
	}
	if d := res.OomKillDisable; d != nil && *d && res.Memory == 0 {
		discard("OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.")
	}
	return nil
}

func checkCPU(res *apic.Resources, can cgroup.Features, discard func(string), lacks func(what, consequence string)) error {
	n := runtime.NumCPU()
	switch {
	case res.NanoCPUs > 0 && res.CPUPeriod > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Period cannot both be set")
	case res.NanoCPUs > 0 && res.CPUQuota > 0:
		return invalid("Conflicting options: Nano CPUs and CPU Quota cannot both be set")
	case res.NanoCPUs > 0 && !can.CPUQuota:
		return invalid("NanoCPUs can not be set, as your kernel does not support CPU CFS scheduler or the cgroup is not mounted")
	case res.NanoCPUs < 0 || res.NanoCPUs > int64(n)*1e9:
		return invalid("range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", n, n)
	case res.CPUShares < 0:
		return invalid("invalid CPU shares (%d): value must be a positive integer", res.CPUShares)
	}
	if res.CPUShares > 0 && !can.CPUShares {
		lacks("CPU shares", "Shares")
		res.CPUShares = 0
	}
	if (res.CPUPeriod != 0 || res.CPUQuota != 0) && !can.CPUQuota {
		discard("Your kernel does not support CPU CFS scheduler. CPU period/quota discarded.")
		res.CPUPeriod, res.CPUQuota = 0, 0
	}
	if res.CPUPeriod != 0 && (res.CPUPeriod < 1000 || res.CPUPeriod > 1000000) {
		return invalid("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	}
	if res.CPUQuota > 0 && res.CPUQuota < 1000 {
		return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	}
	if (res.CPURealtimePeriod != 0 || res.CPURealtimeRuntime != 0) && !can.CPURealtime {
		return invalid("Your kernel does not support CPU real-time scheduler")
	}
	if res.CPURealtimePeriod != 0 && res.CPURealtimeRuntime > res.CPURealtimePeriod {
		return invalid("cpu real-time runtime cannot be higher than cpu real-time period")
	}
	if res.CPUCount != 0 || res.CPUPercent != 0 {
		return invalid("CPU count and CPU percent are Windows's, use CPUs")
	}
	return nil
}

func checkCPUSet(res *apic.Resources, can cgroup.Features, lacks func(what, consequence string)) error {
	if (res.CpusetCpus != "" || res.CpusetMems != "") && !can.CPUSet {
		lacks("cpuset", "Cpuset")
		res.CpusetCpus, res.CpusetMems = "", ""
	}
	for _, l := range []struct{ want, have, short, long string }{
		{res.CpusetCpus, can.CPUs, "cpus", "CPUs"}, {res.CpusetMems, can.MemoryNodes, "mems", "memory nodes"},
	} {
		ok, err := cgroup.Within(l.want, l.have)
		if err != nil {
			return invalid("Invalid value %s for cpuset %s", l.want, l.short)
		}
		if !ok {
			return invalid("Requested %s are not available - requested %s, available: %s", l.long, l.want, l.have)
		}
	}
	return nil
}

func checkBlockIO(res *apic.Resources, can cgroup.Features, lacks func(what, consequence string)) error {
	if res.BlkioWeight > 0 && !can.IOWeight {
		lacks("Block I/O weight", "Weight")
		res.BlkioWeight = 0
	}
	if res.BlkioWeight > 0 && (res.BlkioWeight < 10 || res.BlkioWeight > 1000) {
		return invalid("Range of blkio weight is from 10 to 1000")
	}
	if res.IOMaximumBandwidth != 0 || res.IOMaximumIOps != 0 {
		return invalid("Invalid QoS settings: %s does not support Maximum IO Bandwidth or Maximum IO IOps", runtime.GOOS)
	}
	if len(res.BlkioWeightDevice) > 0 && !can.IOWeight {
		lacks("Block I/O weight_device", "Weight-device")
		res.BlkioWeightDevice = nil
	}
	if can.IOThrottle {
		return nil
	}
	if len(res.BlkioDeviceReadBps) > 0 {
		lacks("BPS Block I/O read limit", "Block I/O BPS read limit")
	}
	if len(res.BlkioDeviceWriteBps) > 0 {
		lacks("BPS Block I/O write limit", "Block I/O BPS write limit")
	}
	if len(res.BlkioDeviceReadIOps) > 0 {
		lacks("IOPS Block read limit", "Block I/O IOPS read limit")
	}
	if len(res.BlkioDeviceWriteIOps) > 0 {
		lacks("IOPS Block write limit", "Block I/O IOPS write limit")
	}
	res.BlkioDeviceReadBps, res.BlkioDeviceWriteBps, res.BlkioDeviceReadIOps, res.BlkioDeviceWriteIOps = nil, nil, nil, nil
	return nil
}
