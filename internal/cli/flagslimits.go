package cli

import "github.com/spf13/pflag"

// limitFlags are the resources that the container may use.
type limitFlags struct {
	pidsLimit int64
	memory    bytesFlag
	cpus      cpusFlag
}

func (c *limitFlags) register(f *pflag.FlagSet) {
	f.Var(&c.cpus, "cpus", "Number of CPUs")
	f.VarP(&c.memory, "memory", "m", "Memory limit")
	f.Int64Var(&c.pidsLimit, "pids-limit", 0, "Tune container pids limit (set -1 for unlimited)")
	refuseAll(f,
		"blkio-weight",
		"blkio-weight-device",
		"cgroup-parent",
		"cpu-count",
		"cpu-percent",
		"cpu-period",
		"cpu-quota",
		"cpu-rt-period",
		"cpu-rt-runtime",
		"c|cpu-shares",
		"cpuset-cpus",
		"cpuset-mems",
		"device-read-bps",
		"device-read-iops",
		"device-write-bps",
		"device-write-iops",
		"io-maxbandwidth",
		"io-maxiops",
		"kernel-memory",
		"memory-reservation",
		"memory-swap",
		"memory-swappiness",
		"oom-kill-disable?",
		"oom-score-adj",
		"shm-size",
	)
}

func (c *limitFlags) apply(t *flagTarget) error {
	t.host.Memory, t.host.NanoCPUs = int64(c.memory), int64(c.cpus)
	if t.set.Changed("pids-limit") {
		t.host.PidsLimit = &c.pidsLimit
	}
	return nil
}
