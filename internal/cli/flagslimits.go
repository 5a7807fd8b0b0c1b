package cli

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	apic "github.com/moby/moby/api/types/container"
	"github.com/spf13/pflag"
)

// limitFlags are the resources that the container may use.
type limitFlags struct {
	resourceFlags
	blkioWeightDevice                                              weightDevices
	deviceReadBps, deviceWriteBps, deviceReadIOps, deviceWriteIOps throttleDevices
	swappiness                                                     int64
	oomKillDisable                                                 bool
	oomScoreAdj                                                    int
	shmSize                                                        bytesFlag
	cgroupParent                                                   string
	deviceCgroupRules                                              deviceRules
}

// resourceFlags are the limits that can also be changed later (update).
type resourceFlags struct {
	blkioWeight                                    uint16
	cpuPeriod, cpuQuota, cpuRtPeriod, cpuRtRuntime int64
	cpuShares                                      int64
	cpus                                           cpusFlag
	cpusetCpus, cpusetMems                         string
	memory, memoryReservation                      bytesFlag
	memorySwap                                     swapFlag
	pidsLimit                                      int64
}

func (c *resourceFlags) register(f *pflag.FlagSet) {
	f.Uint16Var(&c.blkioWeight, "blkio-weight", 0, "Block IO (relative weight), between 10 and 1000, or 0 to disable (default 0)")
	f.Int64Var(&c.cpuPeriod, "cpu-period", 0, "Limit CPU CFS (Completely Fair Scheduler) period")
	f.Int64Var(&c.cpuQuota, "cpu-quota", 0, "Limit CPU CFS (Completely Fair Scheduler) quota")
	f.Int64Var(&c.cpuRtPeriod, "cpu-rt-period", 0, "Limit CPU real-time period in microseconds")
	f.Int64Var(&c.cpuRtRuntime, "cpu-rt-runtime", 0, "Limit CPU real-time runtime in microseconds")
	f.Int64VarP(&c.cpuShares, "cpu-shares", "c", 0, "CPU shares (relative weight)")
	f.Var(&c.cpus, "cpus", "Number of CPUs")
	f.StringVar(&c.cpusetCpus, "cpuset-cpus", "", "CPUs in which to allow execution (0-3, 0,1)")
	f.StringVar(&c.cpusetMems, "cpuset-mems", "", "MEMs in which to allow execution (0-3, 0,1)")
	f.VarP(&c.memory, "memory", "m", "Memory limit")
	f.Var(&c.memoryReservation, "memory-reservation", "Memory soft limit")
	f.Var(&c.memorySwap, "memory-swap", "Swap limit equal to memory plus swap: '-1' to enable unlimited swap")
	f.Int64Var(&c.pidsLimit, "pids-limit", 0, "Tune container pids limit (set -1 for unlimited)")
	refuse(f, "kernel-memory", "", "bytes", "the kernel has no limit of its own memory any more")
}

// fill writes all but the number of processes, where 0 and "not given" are two things.
func (c *resourceFlags) fill(res *apic.Resources) {
	res.BlkioWeight, res.CPUPeriod, res.CPUQuota, res.CPUShares = c.blkioWeight, c.cpuPeriod, c.cpuQuota, c.cpuShares
	res.CPURealtimePeriod, res.CPURealtimeRuntime, res.NanoCPUs = c.cpuRtPeriod, c.cpuRtRuntime, int64(c.cpus)
	res.CpusetCpus, res.CpusetMems = c.cpusetCpus, c.cpusetMems
	res.Memory, res.MemoryReservation, res.MemorySwap = int64(c.memory), int64(c.memoryReservation), int64(c.memorySwap)
}

func (c *limitFlags) register(f *pflag.FlagSet) {
	c.resourceFlags.register(f)
	f.Var(&c.blkioWeightDevice, "blkio-weight-device", "Block IO weight (relative device weight)")
	f.StringVar(&c.cgroupParent, "cgroup-parent", "", "Optional parent cgroup for the container")
	f.Var(&c.deviceCgroupRules, "device-cgroup-rule", "Add a rule to the cgroup allowed devices list")
	for _, t := range []struct {
		value *throttleDevices
		name  string
		usage string
		bytes bool
	}{
		{&c.deviceReadBps, "device-read-bps", "Limit read rate (bytes per second) from a device", true},
		{&c.deviceReadIOps, "device-read-iops", "Limit read rate (IO per second) from a device", false},
		{&c.deviceWriteBps, "device-write-bps", "Limit write rate (bytes per second) to a device", true},
		{&c.deviceWriteIOps, "device-write-iops", "Limit write rate (IO per second) to a device", false},
	} {
		t.value.bytes = t.bytes
		f.Var(t.value, t.name, t.usage)
	}
	f.Int64Var(&c.swappiness, "memory-swappiness", -1, "Tune container memory swappiness (0 to 100)")
	f.BoolVar(&c.oomKillDisable, "oom-kill-disable", false, "Disable OOM Killer")
	f.IntVar(&c.oomScoreAdj, "oom-score-adj", 0, "Tune host's OOM preferences (-1000 to 1000)")
	f.Var(&c.shmSize, "shm-size", "Size of /dev/shm")
	for _, name := range []string{"cpu-count", "cpu-percent", "io-maxbandwidth", "io-maxiops"} {
		refuse(f, name, "", "string", "Windows alone has such a limit")
	}
}

func (c *limitFlags) apply(t *flagTarget) error {
	if c.swappiness != -1 && (c.swappiness < 0 || c.swappiness > 100) {
		return fmt.Errorf("invalid value: %d. Valid memory swappiness range is 0-100", c.swappiness)
	}
	res := &t.host.Resources
	c.fill(res)
	if t.set.Changed("pids-limit") {
		res.PidsLimit = &c.pidsLimit
	}
	res.BlkioWeightDevice = c.blkioWeightDevice
	res.BlkioDeviceReadBps, res.BlkioDeviceWriteBps = c.deviceReadBps.list, c.deviceWriteBps.list
	res.BlkioDeviceReadIOps, res.BlkioDeviceWriteIOps = c.deviceReadIOps.list, c.deviceWriteIOps.list
	res.MemorySwappiness, res.OomKillDisable = &c.swappiness, &c.oomKillDisable
	res.CgroupParent, res.DeviceCgroupRules = c.cgroupParent, c.deviceCgroupRules
	t.host.OomScoreAdj, t.host.ShmSize = c.oomScoreAdj, int64(c.shmSize)
	return nil
}

// swapFlag is a number of bytes, or -1 for no limit.
type swapFlag int64

func (s *swapFlag) Set(v string) error {
	if v == "-1" {
		*s = -1
		return nil
	}
	return (*bytesFlag)(s).Set(v)
}
func (s *swapFlag) Type() string   { return "bytes" }
func (s *swapFlag) String() string { return "" }

// devicePath splits PATH:VALUE.
func devicePath(s string) (path, value string, err error) {
	path, value, ok := strings.Cut(s, ":")
	if !ok || path == "" {
		return "", "", fmt.Errorf("bad format: %s", s)
	}
	if !strings.HasPrefix(path, "/dev/") {
		return "", "", fmt.Errorf("bad format for device path: %s", s)
	}
	return path, value, nil
}

// weightDevices are PATH:WEIGHT.
type weightDevices []*blkiodev.WeightDevice

func (w *weightDevices) Set(s string) error {
	path, value, err := devicePath(s)
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(value, 10, 16)
	if err != nil || n > 0 && (n < 10 || n > 1000) {
		return fmt.Errorf("invalid weight for device: %s", s)
	}
	*w = append(*w, &blkiodev.WeightDevice{Path: path, Weight: uint16(n)})
	return nil
}
func (w *weightDevices) Type() string   { return "list" }
func (w *weightDevices) String() string { return "" }

// throttleDevices are PATH:RATE, in bytes or in operations a second.
type throttleDevices struct {
	bytes bool
	list  []*blkiodev.ThrottleDevice
}

func (t *throttleDevices) Set(s string) error {
	path, value, err := devicePath(s)
	if err != nil {
		return err
	}
	var rate uint64
	if t.bytes {
		n, err := units.RAMInBytes(value)
		if err != nil || n < 0 {
			return fmt.Errorf("invalid rate for device: %s. The correct format is <device-path>:<number>[<unit>]. Number must be a positive integer. Unit is optional and can be kb, mb, or gb", s)
		}
		rate = uint64(n)
	} else if rate, err = strconv.ParseUint(value, 10, 64); err != nil {
		return fmt.Errorf("invalid rate for device: %s. The correct format is <device-path>:<number>. Number must be a positive integer", s)
	}
	t.list = append(t.list, &blkiodev.ThrottleDevice{Path: path, Rate: rate})
	return nil
}
func (t *throttleDevices) Type() string   { return "list" }
func (t *throttleDevices) String() string { return "" }

// deviceRules are TYPE MAJOR:MINOR ACCESS, the kernel's own form.
type deviceRules []string

func (d *deviceRules) Set(s string) error {
	if !validDeviceRule(s) {
		return fmt.Errorf("invalid device cgroup format '%s'", s)
	}
	*d = append(*d, s)
	return nil
}
func (d *deviceRules) Type() string   { return "list" }
func (d *deviceRules) String() string { return "" }

func validDeviceRule(s string) bool {
	kind, rest, _ := strings.Cut(s, " ")
	numbers, access, _ := strings.Cut(rest, " ")
	major, minor, ok := strings.Cut(numbers, ":")
	number := func(s string) bool { return s == "*" || s != "" && strings.Trim(s, "0123456789") == "" }
	return (kind == "a" || kind == "b" || kind == "c") && ok && number(major) && number(minor) &&
		len(access) >= 1 && len(access) <= 3 && strings.Trim(access, "rwm") == ""
}
