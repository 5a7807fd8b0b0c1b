package cgroup

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Features says which limits this kernel can set, as far as can be told without making a cgroup.
type Features struct {
	Memory, MemoryReservation, MemorySwap, MemorySwappiness, OOMKillDisable bool
	CPUShares, CPUQuota, CPURealtime, CPUSet, Pids                          bool
	IOWeight, IOThrottle                                                    bool
	// CPUs and MemoryNodes are those that there are, as in "0-3,8".
	CPUs, MemoryNodes string
}

// Limits looks once what can be limited. It reads some twenty names, so only who was asked for a limit asks.
var Limits = sync.OnceValue(func() Features {
	m := mounts()
	if len(m.v1) == 0 {
		return unifiedFeatures(m.unified)
	}
	has := func(controller, file string) bool {
		root, ok := m.v1[controller]
		return ok && exists(filepath.Join(root, file))
	}
	f := Features{
		Memory: has("memory", "memory.limit_in_bytes"), MemoryReservation: has("memory", "memory.soft_limit_in_bytes"),
		MemorySwap: has("memory", "memory.memsw.limit_in_bytes"), MemorySwappiness: has("memory", "memory.swappiness"),
		OOMKillDisable: has("memory", "memory.oom_control"),
		CPUShares:      has("cpu", "cpu.shares"), CPUQuota: has("cpu", "cpu.cfs_quota_us"), CPURealtime: has("cpu", "cpu.rt_runtime_us"),
		CPUSet: has("cpuset", "cpuset.cpus"), Pids: m.v1["pids"] != "",
		// BFQ's own files of weights are in every cgroup but the root, which has its counters.
		IOWeight:   has("blkio", "blkio.weight") || has("blkio", "blkio.bfq.io_service_bytes"),
		IOThrottle: has("blkio", "blkio.throttle.read_bps_device"),
	}
	f.CPUs, f.MemoryNodes = available(m.v1["cpuset"], "cpuset.effective_cpus", "cpuset.cpus"), available(m.v1["cpuset"], "cpuset.effective_mems", "cpuset.mems")
	return f
})

// unifiedFeatures asks a v2 tree. Its root has none of the files that are written, so what there is follows from the controllers.
func unifiedFeatures(root string) Features {
	list, err := readFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return Features{}
	}
	has := func(c string) bool { return slices.Contains(strings.Fields(list), c) }
	f := Features{
		Memory: has("memory"), MemoryReservation: has("memory"), MemorySwap: has("memory") && exists("/proc/swaps"),
		CPUShares: has("cpu"), CPUQuota: has("cpu"), CPUSet: has("cpuset"), Pids: has("pids"),
		IOThrottle: has("io"), IOWeight: has("io") && (exists(filepath.Join(root, "io.cost.qos")) || exists("/sys/module/bfq")),
	}
	f.CPUs, f.MemoryNodes = available(root, "cpuset.cpus.effective"), available(root, "cpuset.mems.effective")
	return f
}

// available reads the first of some lists that there is.
func available(dir string, files ...string) string {
	for _, f := range files {
		if s, err := readFile(filepath.Join(dir, f)); err == nil && s != "" {
			return s
		}
	}
	return ""
}

// maxListed bounds the numbers in a list, as the kernel's own bound on processors does.
const maxListed = 8192

// Within reports whether every number of the list want, as in "0-3,8", is in the list have.
func Within(want, have string) (bool, error) {
	w, err := parseList(want)
	if err != nil {
		return false, err
	}
	h, err := parseList(have)
	if err != nil {
		return false, err
	}
	for n := range w {
		if !h[n] {
			return false, nil
		}
	}
	return true, nil
}

func parseList(s string) (map[int]bool, error) {
	set := map[int]bool{}
	if s == "" {
		return set, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		a, err := strconv.Atoi(first)
		b := a
		if err == nil && isRange {
			b, err = strconv.Atoi(last)
		}
		if err != nil || a < 0 || b < a || b > maxListed {
			return nil, fmt.Errorf("%q is not a list of numbers and ranges such as 0-2,5", s)
		}
		for n := a; n <= b; n++ {
			set[n] = true
		}
	}
	return set, nil
}
