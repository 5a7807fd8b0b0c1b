package container

import (
	"fmt"

	"github.com/docker/go-units"
	apic "github.com/moby/moby/api/types/container"
)

// StorageSize is --storage-opt size in bytes, 0 without one.
func StorageSize(hc *apic.HostConfig) (int64, error) {
	for k, v := range hc.StorageOpt {
		if k != "size" {
			return 0, fmt.Errorf("unknown option %s", k)
		}
		n, err := units.RAMInBytes(v)
		if err != nil || n <= 0 {
			return 0, fmt.Errorf("invalid size: '%s'", v)
		}
		return n, nil
	}
	return 0, nil
}
