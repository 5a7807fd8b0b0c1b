package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/cgroup"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// current is the record with the limits, the restart policy, the networks and what it may reach by now.
func (m *monitor) current() *container.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.host == nil && m.networks == nil && m.egress == nil {
		return m.rec
	}
	r := *m.rec
	if m.egress != nil {
		r.Options.Egress = *m.egress
	}
	if m.host != nil {
		r.HostConfig = m.host
	}
	if m.networks != nil {
		r.Networks = *m.networks
	}
	return &r
}

// update changes limits, restart policy and what the container may reach: of the running container first, since the kernel may refuse, then in the record.
func (s *server) update(w http.ResponseWriter, q *http.Request) error {
	var c container.Changes
	if err := json.NewDecoder(q.Body).Decode(&c); err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "invalid update request: " + err.Error()}
	}
	m := s.m
	m.changes.Lock()
	defer m.changes.Unlock()
	old := m.current().HostConfig
	hc, err := container.Changed(old, &c)
	if err != nil {
		return &control.Error{Status: http.StatusConflict, Message: err.Error()}
	}
	var cg cgroup.Manager
	r := m.present()
	if r != nil {
		cg = r.ct.Cgroup()
	}
	if cg != nil {
		if err := cg.Update(changedLimits(hc, &c.Resources)); err != nil && !errors.Is(err, cgroup.ErrNotExist) { // it ends
			return err
		}
	}
	undo := func(err error) error {
		if cg != nil {
			err = errors.Join(err, cg.Update(changedLimits(old, &c.Resources)))
		}
		return err
	}
	before := m.current().Options.Egress
	if c.Egress != nil && r != nil {
		if err := r.rebound(context.Background(), *c.Egress); err != nil { // a change is short, and whoever asked for it may leave
			return undo(err)
		}
	}
	if _, err := m.store.Update(m.rec.ID, &c); err != nil {
		if c.Egress != nil && r != nil {
			err = errors.Join(err, r.rebound(context.Background(), before))
		}
		return undo(err)
	}
	m.mu.Lock()
	m.host = hc
	if c.Egress != nil {
		m.egress = c.Egress
	}
	m.mu.Unlock()
	m.event("update", c.Attributes())
	return answer(w, struct{}{})
}

// changedLimits are those of hc that a change touches. What is one limit to the kernel, or bounds another, goes with it.
func changedLimits(hc *apic.HostConfig, c *apic.Resources) *specs.LinuxResources {
	res := &specs.LinuxResources{}
	if c.Memory != 0 || c.MemorySwap != 0 || c.MemoryReservation != 0 {
		r := apic.Resources{}
		if c.Memory != 0 || c.MemorySwap != 0 {
			r.Memory, r.MemorySwap = hc.Memory, hc.MemorySwap
		}
		if c.MemoryReservation != 0 {
			r.MemoryReservation = hc.MemoryReservation
		}
		res.Memory = memoryLimits(&r)
		if r.Memory == 0 && c.MemorySwap != 0 {
			if res.Memory == nil {
				res.Memory = &specs.LinuxMemory{}
			}
			res.Memory.Swap = &c.MemorySwap
		}
	}
	cpu := apic.Resources{CPUShares: c.CPUShares, CpusetCpus: c.CpusetCpus, CpusetMems: c.CpusetMems}
	if c.NanoCPUs != 0 || c.CPUPeriod != 0 || c.CPUQuota != 0 {
		cpu.NanoCPUs, cpu.CPUPeriod, cpu.CPUQuota = hc.NanoCPUs, hc.CPUPeriod, hc.CPUQuota
	}
	if c.CPURealtimePeriod != 0 || c.CPURealtimeRuntime != 0 {
		cpu.CPURealtimePeriod, cpu.CPURealtimeRuntime = hc.CPURealtimePeriod, hc.CPURealtimeRuntime
	}
	res.CPU = cpuLimits(&cpu)
	if c.PidsLimit != nil {
		res.Pids = pidsLimit(*c.PidsLimit)
	}
	if c.BlkioWeight != 0 {
		res.BlockIO = &specs.LinuxBlockIO{Weight: &hc.BlkioWeight}
	}
	return res
}
