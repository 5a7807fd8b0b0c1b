package container

import (
	"cmp"
	"errors"
	"strings"

	"conex/internal/disk"

	apic "github.com/moby/moby/api/types/container"
)

// Changes are what of a container can be changed after it was made: limits, where zero values leave the old one, and the restart
// policy, where an empty name does.
type Changes struct {
	apic.UpdateConfig
	// Egress is what the container may reach from now on, as in Options; nil leaves it.
	Egress *[]string `json:"egress,omitempty"`
}

// Attributes are those of the event of a change, beside Docker's: "egress" is what the container may reach from now on.
func (c *Changes) Attributes() map[string]string {
	if c.Egress == nil {
		return nil
	}
	return map[string]string{"egress": cmp.Or(strings.Join(*c.Egress, " "), "any")}
}

// ErrConflict says that a change doesn't go with what the container has. The texts are Docker's.
var ErrConflict = errors.New("conflicting options")

// conflictError is ErrConflict with its words.
type conflictError string

func (e conflictError) Error() string { return string(e) }

// Is makes errors.Is(err, ErrConflict) true.
func (e conflictError) Is(target error) bool { return target == ErrConflict }

// Changed returns what becomes of a host config by c; hc itself stays as it is. ErrConflict when the two don't go together.
func Changed(hc *apic.HostConfig, c *Changes) (*apic.HostConfig, error) {
	n := *hc
	switch {
	case c.NanoCPUs > 0 && n.CPUPeriod > 0:
		return nil, conflictError("Conflicting options: Nano CPUs cannot be updated as CPU Period has already been set")
	case c.NanoCPUs > 0 && n.CPUQuota > 0:
		return nil, conflictError("Conflicting options: Nano CPUs cannot be updated as CPU Quota has already been set")
	case c.CPUPeriod > 0 && n.NanoCPUs > 0:
		return nil, conflictError("Conflicting options: CPU Period cannot be updated as NanoCPUs has already been set")
	case c.CPUQuota > 0 && n.NanoCPUs > 0:
		return nil, conflictError("Conflicting options: CPU Quota cannot be updated as NanoCPUs has already been set")
	case c.Memory != 0 && c.Memory > n.MemorySwap && c.MemorySwap == 0:
		return nil, conflictError("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	case c.RestartPolicy.Name != "" && n.AutoRemove && !c.RestartPolicy.IsNone():
		return nil, conflictError("Restart policy cannot be updated because AutoRemove is enabled for the container")
	}
	set(&n.BlkioWeight, c.BlkioWeight)
	set(&n.CPUShares, c.CPUShares)
	set(&n.NanoCPUs, c.NanoCPUs)
	set(&n.CPUPeriod, c.CPUPeriod)
	set(&n.CPUQuota, c.CPUQuota)
	set(&n.CPURealtimePeriod, c.CPURealtimePeriod)
	set(&n.CPURealtimeRuntime, c.CPURealtimeRuntime)
	set(&n.CpusetCpus, c.CpusetCpus)
	set(&n.CpusetMems, c.CpusetMems)
	set(&n.Memory, c.Memory)
	set(&n.MemorySwap, c.MemorySwap)
	set(&n.MemoryReservation, c.MemoryReservation)
	set(&n.PidsLimit, c.PidsLimit)
	if c.RestartPolicy.Name != "" {
		n.RestartPolicy = c.RestartPolicy
	}
	return &n, nil
}

func set[T comparable](to *T, v T) {
	var zero T
	if v != zero {
		*to = v
	}
}

// SetNetworks changes the networks of a container's record. The caller holds the monitor lock, or is the monitor. A nil error promises what
// Update's does.
func (s *Store) SetNetworks(id string, ats []Attachment) (*Record, error) {
	l, err := s.lockNames() // a rename changes the record too
	if err != nil {
		return nil, err
	}
	defer l.Release()
	r, err := s.Load(id)
	if err != nil {
		return nil, err
	}
	if r.Networks = ats; ats == nil {
		r.Networks = []Attachment{}
	}
	return r, disk.WriteJSON(s.Dir(id, "config.json"), r, durability(r.HostConfig.AutoRemove))
}

// Update changes a container's record. The caller holds the monitor lock, or is the monitor. A nil error promises that the change
// survives a power loss as the container itself does.
func (s *Store) Update(id string, c *Changes) (*Record, error) {
	l, err := s.lockNames() // a rename changes the record too
	if err != nil {
		return nil, err
	}
	defer l.Release()
	r, err := s.Load(id)
	if err != nil {
		return nil, err
	}
	if r.HostConfig, err = Changed(r.HostConfig, c); err != nil {
		return nil, err
	}
	if c.Egress != nil {
		r.Options.Egress = *c.Egress
	}
	return r, disk.WriteJSON(s.Dir(id, "config.json"), r, durability(r.HostConfig.AutoRemove))
}
