package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/linux/cgroup"
)

// StatsRequest asks what containers use.
type StatsRequest struct {
	// Containers are names and ids; none means all that run.
	Containers []string
	// All counts those that don't run, too.
	All bool
	// Once ends after the first look.
	Once bool
	// Emit gets a list for every look: in the order of `ps`, or of Containers. An error of it ends the command.
	Emit func([]ContainerStats) error
}

// ContainerStats is what one container uses. Of one that doesn't run everything is zero.
type ContainerStats struct {
	// Asked is the name or id by which it was asked for; its id when it wasn't.
	Asked, ID, Name string
	// CPU is in percent of one processor, since the look before.
	CPU float64
	// Memory is in bytes, as Docker counts it: without file cache that could be dropped at once. MemoryLimit is the machine's
	// memory where the container has no limit.
	Memory, MemoryLimit uint64
	// NetRx and NetTx are bytes through the interfaces of its network namespace but the loopback; zero in the host's.
	NetRx, NetTx uint64
	// BlockRead and BlockWrite are bytes from and to block devices.
	BlockRead, BlockWrite uint64
	// Pids counts tasks, threads too.
	Pids uint64
}

// Docker's daemon looks every second, and has to have looked twice before it knows a rate. We need a shorter time for the first one.
const (
	statsFirst = 200 * time.Millisecond
	statsEvery = time.Second
)

// Stats looks at containers once, or every second until ctx ends: the kernel's files, read by this process. Containers that start
// while it looks are in the next list; those that were removed are not, and when the last of those that were named is gone it ends.
func (e *Engine) Stats(ctx context.Context, req StatsRequest) error {
	s := &statsLooker{e: e, req: req, before: map[string]cpuLook{}, machine: memTotal()}
	for _, name := range req.Containers {
		id, err := e.Containers().Resolve(name)
		if err != nil {
			return classify(err)
		}
		s.named = append(s.named, namedContainer{name, id})
	}
	if _, err := s.look(ctx); err != nil { // for the rates of the first list
		return err
	}
	t := time.NewTimer(statsFirst)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		t.Reset(statsEvery)
		list, err := s.look(ctx)
		if err != nil {
			return err
		}
		if len(list) == 0 && len(req.Containers) > 0 && !req.Once {
			return nil
		}
		if err := req.Emit(list); err != nil || req.Once {
			return err
		}
	}
}

type statsLooker struct {
	e       *Engine
	req     StatsRequest
	named   []namedContainer
	before  map[string]cpuLook
	machine uint64 // bytes of memory
}

type namedContainer struct{ asked, id string }

// cpuLook is the processor time that a container had used, and when that was.
type cpuLook struct {
	used uint64
	at   time.Time
}

// look makes one list.
func (s *statsLooker) look(ctx context.Context) ([]ContainerStats, error) {
	if err := s.e.Settle(ctx); err != nil {
		return nil, err
	}
	var list []ContainerStats
	add := func(asked string, n *container.Snapshot) {
		list = append(list, s.stats(asked, n))
	}
	if len(s.named) > 0 {
		for _, c := range s.named {
			n, err := s.e.Containers().Snapshot(c.id)
			if errors.Is(err, container.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			add(c.asked, n)
		}
		return list, nil
	}
	all, err := s.e.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range all {
		if a := n.Alive(); s.req.All || a != nil && a.Status == container.Running {
			add(n.Record.ID, n)
		}
	}
	return list, nil
}

func (s *statsLooker) stats(asked string, n *container.Snapshot) ContainerStats {
	id := n.Record.ID
	out := ContainerStats{Asked: asked, ID: id, Name: n.Record.Name}
	a := n.Alive()
	if a == nil || a.Status != container.Running {
		delete(s.before, id)
		return out
	}
	cg, err := cgroup.New(strings.TrimPrefix(a.Cgroup, "/"))
	if err != nil {
		return out
	}
	// What can't be read has ended meanwhile, or the kernel doesn't count it: both are zeros.
	st, _ := cg.Stats()
	now := cpuLook{st.CPU.Usage, time.Now()}
	was, ok := s.before[id]
	if !ok || was.used > now.used { // it started after the last look
		was = cpuLook{0, a.Started}
	}
	s.before[id] = now
	if d := now.at.Sub(was.at); d > 0 {
		out.CPU = min(float64(now.used-was.used)/float64(d)*100, float64(runtime.NumCPU())*100)
	}
	out.Memory, out.MemoryLimit, out.Pids = st.Memory.Usage, s.machine, st.Pids.Current
	if l := st.Memory.Limit; l > 0 {
		out.MemoryLimit = min(l, s.machine)
	}
	for _, io := range st.IO {
		out.BlockRead += io.ReadBytes
		out.BlockWrite += io.WriteBytes
	}
	if !n.Record.HostConfig.NetworkMode.IsHost() {
		out.NetRx, out.NetTx = processNetwork(a.Pid, a.Cgroup)
	}
	return out
}

// processNetwork counts in the network namespace of a process that must be in the cgroup: its number may be another's by now.
func processNetwork(pid int, cg string) (rx, tx uint64) {
	dir := "/proc/" + strconv.Itoa(pid)
	text := readText(dir + "/net/dev")
	if !strings.Contains(readText(dir+"/cgroup"), cg) {
		return 0, 0
	}
	return parseNetDev(text)
}

// parseNetDev sums the bytes in /proc/<pid>/net/dev, without the loopback device.
func parseNetDev(text string) (rx, tx uint64) {
	for line := range strings.Lines(text) {
		name, counters, ok := strings.Cut(line, ":")
		f := strings.Fields(counters)
		if !ok || strings.TrimSpace(name) == "lo" || len(f) < 9 {
			continue
		}
		r, err1 := strconv.ParseUint(f[0], 10, 64)
		t, err2 := strconv.ParseUint(f[8], 10, 64)
		if err1 == nil && err2 == nil {
			rx, tx = rx+r, tx+t
		}
	}
	return rx, tx
}

// memTotal is the machine's memory in bytes, 0 if /proc doesn't say.
func memTotal() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	var kb uint64
	if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kb); err != nil {
		return 0
	}
	return kb << 10
}
