package cli

import (
	"strings"
	"testing"

	apic "github.com/moby/moby/api/types/container"
)

func TestLimitFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		want func(r *apic.HostConfig) any
		is   string
	}{
		{"", func(h *apic.HostConfig) any { return []any{h.MemorySwappiness, h.OomKillDisable, h.PidsLimit} }, `[-1,false,null]`},
		{"-m 1g --memory-swap -1 --memory-reservation 512m --memory-swappiness 0 --oom-kill-disable",
			func(h *apic.HostConfig) any {
				return []any{h.Memory, h.MemorySwap, h.MemoryReservation, h.MemorySwappiness, h.OomKillDisable}
			}, `[1073741824,-1,536870912,0,true]`},
		{"--memory-swap 2g", func(h *apic.HostConfig) any { return h.MemorySwap }, `2147483648`},
		{"-c 512 --cpu-period 100000 --cpu-quota 50000 --cpu-rt-period 1000000 --cpu-rt-runtime 950000 --cpuset-cpus 0-1 --cpuset-mems 0",
			func(h *apic.HostConfig) any {
				return []any{h.CPUShares, h.CPUPeriod, h.CPUQuota, h.CPURealtimePeriod, h.CPURealtimeRuntime, h.CpusetCpus, h.CpusetMems}
			}, `[512,100000,50000,1000000,950000,"0-1","0"]`},
		{"--pids-limit 0", func(h *apic.HostConfig) any { return h.PidsLimit }, `0`},
		{"--blkio-weight 300 --blkio-weight-device /dev/sda:200 --device-read-bps /dev/sda:1mb --device-write-bps /dev/sda:2kb --device-read-iops /dev/sda:7 --device-write-iops /dev/sdb:8",
			func(h *apic.HostConfig) any {
				return []any{h.BlkioWeight, h.BlkioWeightDevice, h.BlkioDeviceReadBps, h.BlkioDeviceWriteBps, h.BlkioDeviceReadIOps, h.BlkioDeviceWriteIOps}
			},
			`[300,[{"Path":"/dev/sda","Weight":200}],[{"Path":"/dev/sda","Rate":1048576}],[{"Path":"/dev/sda","Rate":2048}],[{"Path":"/dev/sda","Rate":7}],[{"Path":"/dev/sdb","Rate":8}]]`},
		{"--oom-score-adj -300 --shm-size 2g --cgroup-parent /here", func(h *apic.HostConfig) any { return []any{h.OomScoreAdj, h.ShmSize, h.CgroupParent} }, `[-300,2147483648,"/here"]`},
	} {
		t.Run(tt.args, func(t *testing.T) {
			_, h, err := parse(t, append(strings.Fields(tt.args), "busybox")...)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := toJSON(tt.want(h)); got != tt.is || err != nil {
				t.Errorf("got  %s, %v\nwant %s", got, err, tt.is)
			}
		})
	}
}

func TestLimitFlagErrors(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--memory-swap", "-2"}, "invalid size"},
		{[]string{"--memory-swappiness", "101"}, "invalid value: 101. Valid memory swappiness range is 0-100"},
		{[]string{"--memory-swappiness", "-5"}, "invalid value: -5"},
		{[]string{"--blkio-weight", "70000"}, "out of range"},
		{[]string{"--blkio-weight-device", "/dev/sda"}, "bad format: /dev/sda"},
		{[]string{"--blkio-weight-device", "sda:100"}, "bad format for device path: sda:100"},
		{[]string{"--blkio-weight-device", "/dev/sda:5"}, "invalid weight for device: /dev/sda:5"},
		{[]string{"--device-read-bps", "/dev/sda:x"}, "invalid rate for device: /dev/sda:x. The correct format is <device-path>:<number>[<unit>]."},
		{[]string{"--device-write-iops", "/dev/sda:1mb"}, "invalid rate for device: /dev/sda:1mb. The correct format is <device-path>:<number>."},
		{[]string{"--device-cgroup-rule", "c 1:3"}, "invalid device cgroup format 'c 1:3'"},
		{[]string{"--device-cgroup-rule", "c 1:3 rwx"}, "invalid device cgroup format 'c 1:3 rwx'"},
		{[]string{"--device-cgroup-rule", "d 1:3 r"}, "invalid device cgroup format"},
		{[]string{"--device-cgroup-rule", "c :3 r"}, "invalid device cgroup format"},
		{[]string{"--kernel-memory", "5m"}, "--kernel-memory is refused: the kernel has no limit of its own memory any more"},
		{[]string{"--cpu-count", "1"}, "--cpu-count is refused: Windows alone"},
		{[]string{"--cpu-percent", "1"}, "--cpu-percent is refused: Windows alone"},
		{[]string{"--io-maxbandwidth", "1"}, "--io-maxbandwidth is refused: Windows alone"},
		{[]string{"--io-maxiops", "1"}, "--io-maxiops is refused: Windows alone"},
	} {
		if _, _, err := parse(t, append(tt.args, "busybox")...); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: error %v, want %q", tt.args, err, tt.want)
		}
	}
	if _, h, err := parse(t, "--device-cgroup-rule", "c 1:3 rwm", "--device-cgroup-rule", "a *:* m", "busybox"); err != nil || len(h.DeviceCgroupRules) != 2 {
		t.Errorf("device rules: %v, %v", h, err)
	}
}
