package engine

import (
	"context"
	"runtime"

	apic "github.com/moby/moby/api/types/container"
)

// minMemory is Docker's least --memory, in bytes: below it nothing starts.
const minMemory = 6 << 20

func validateLimits(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	switch {
	case hc.Memory < 0 || hc.Memory > 0 && hc.Memory < minMemory:
		return invalid("Minimum memory limit allowed is 6MB")
	case hc.MemorySwap > 0 && hc.Memory == 0:
		return invalid("You should always set the Memory limit when using Memoryswap limit, see usage")
	case hc.MemorySwap > 0 && hc.MemorySwap < hc.Memory:
		return invalid("Minimum memoryswap limit should be larger than memory limit, see usage")
	case hc.MemoryReservation > 0 && hc.Memory > 0 && hc.Memory < hc.MemoryReservation:
		return invalid("Minimum memory limit can not be less than memory reservation limit, see usage")
	case hc.NanoCPUs < 0 || hc.NanoCPUs > int64(runtime.NumCPU())*1e9:
		return invalid("range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available", runtime.NumCPU(), runtime.NumCPU())
	case hc.NanoCPUs > 0 && (hc.CPUPeriod > 0 || hc.CPUQuota > 0):
		return invalid("Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set.")
	case hc.OomScoreAdj < -1000 || hc.OomScoreAdj > 1000:
		return invalid("Invalid value %d, range for oom score adj is [-1000, 1000]", hc.OomScoreAdj)
	case hc.ShmSize < 0:
		return invalid("SHM size can not be less than 0")
	}
	return nil
}
