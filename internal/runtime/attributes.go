package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"conex/internal/linux/nsfork"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// checkExtras refuses what a spec can ask for and no kernel or no code of ours gives.
func checkExtras(cfg *Config) error {
	s, l := cfg.Spec, cfg.Spec.Linux
	switch {
	case l.IntelRdt != nil:
		return errors.New("create container: linux.intelRdt is not supported")
	case len(l.NetDevices) > 0:
		return errors.New("create container: linux.netDevices is not supported: move the device into a network namespace first and join that by its path")
	case l.RootfsPropagation != "" && propagationOptions[l.RootfsPropagation] == 0:
		return fmt.Errorf("create container: rootfsPropagation %q is none of private, slave, shared, unbindable and their recursive forms", l.RootfsPropagation)
	case len(l.TimeOffsets) > 0 && !slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.TimeNamespace && n.Path == "" }):
		return errors.New("create container: timeOffsets need a time namespace of the container's own")
	case s.Hooks != nil && cfg.State == nil:
		return errors.New("create container: hooks are not supported here")
	}
	if err := checkProcess(s.Process); err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	var none nsfork.Program
	if err := containerAttributes(&none, l); err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	for _, p := range slices.Concat(l.MaskedPaths, l.ReadonlyPaths) {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("create container: masked or read-only path %q is not absolute", p)
		}
	}
	if cfg.Exact && s.Hostname != "" && !hasNamespace(s, specs.UTSNamespace) {
		return errors.New("create container: a hostname needs a uts namespace")
	}
	return nil
}

// checkProcess is checkExtras for what an exec has too.
func checkProcess(p *specs.Process) error {
	if p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined" && !AppArmor() {
		return fmt.Errorf("AppArmor profile %s: this host has no AppArmor", p.ApparmorProfile)
	}
	var none nsfork.Program
	if err := attributes(&none, p); err != nil {
		return err
	}
	if a := p.ExecCPUAffinity; a != nil {
		for _, list := range []string{a.Initial, a.Final} {
			if _, err := parseCPUs(list); err != nil {
				return fmt.Errorf("execCPUAffinity: %w", err)
			}
		}
	}
	return nil
}

// AppArmor reports whether the kernel enforces AppArmor profiles.
func AppArmor() bool {
	b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && len(b) > 0 && b[0] == 'Y'
}

// schedAttr is struct sched_attr of sched_setattr(2), version 0.
type schedAttr struct {
	size, policy              uint32
	flags                     uint64
	nice                      int32
	priority                  uint32
	runtime, deadline, period uint64
}

var schedPolicies = map[specs.LinuxSchedulerPolicy]uint32{
	specs.SchedOther: unix.SCHED_NORMAL, specs.SchedFIFO: unix.SCHED_FIFO, specs.SchedRR: unix.SCHED_RR, specs.SchedBatch: unix.SCHED_BATCH,
	specs.SchedIdle: unix.SCHED_IDLE, specs.SchedDeadline: unix.SCHED_DEADLINE,
}

var schedFlags = map[specs.LinuxSchedulerFlag]uint64{
	specs.SchedFlagResetOnFork: 0x01, specs.SchedFlagReclaim: 0x02, specs.SchedFlagDLOverrun: 0x04, specs.SchedFlagKeepPolicy: 0x08,
	specs.SchedFlagKeepParams: 0x10, specs.SchedFlagUtilClampMin: 0x20, specs.SchedFlagUtilClampMax: 0x40,
}

var ioClasses = map[specs.IOPriorityClass]int{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}

// attributes adds what the kernel keeps of a process beside its credentials: scheduler, priorities, the profile of AppArmor.
func attributes(prog *nsfork.Program, p *specs.Process) error {
	if s := p.Scheduler; s != nil {
		policy, ok := schedPolicies[s.Policy]
		if !ok {
			return fmt.Errorf("scheduler policy %q is not supported", s.Policy)
		}
		a := &schedAttr{policy: policy, nice: s.Nice, priority: uint32(s.Priority), runtime: s.Runtime, deadline: s.Deadline, period: s.Period}
		a.size = uint32(unsafe.Sizeof(*a))
		for _, f := range s.Flags {
			bit, ok := schedFlags[f]
			if !ok {
				return fmt.Errorf("scheduler flag %q is not supported", f)
			}
			a.flags |= bit
		}
		prog.Call("set scheduler", unix.SYS_SCHED_SETATTR, 0, a, 0)
	}
	if io := p.IOPriority; io != nil {
		class, ok := ioClasses[io.Class]
		if !ok || io.Priority < 0 || io.Priority > 7 {
			return fmt.Errorf("ioPriority: class %q with priority %d: want IOPRIO_CLASS_RT, _BE or _IDLE and 0 to 7", io.Class, io.Priority)
		}
		const whoProcess, classShift = 1, 13
		prog.Call("set I/O priority", unix.SYS_IOPRIO_SET, whoProcess, 0, class<<classShift|io.Priority)
	}
	if p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined" {
		text := []byte("exec " + p.ApparmorProfile)
		fd := prog.Call("open AppArmor attribute", unix.SYS_OPENAT, unix.AT_FDCWD, "/proc/self/attr/exec", unix.O_WRONLY|unix.O_CLOEXEC, 0)
		prog.Call("set AppArmor profile", unix.SYS_WRITE, fd, text, len(text))
	}
	return nil
}

var personalities = map[specs.LinuxPersonalityDomain]int{specs.PerLinux: 0, specs.PerLinux32: 8}

var memoryModes = map[specs.MemoryPolicyModeType]int{
	specs.MpolDefault: 0, specs.MpolPreferred: 1, specs.MpolBind: 2, specs.MpolInterleave: 3, specs.MpolLocal: 4,
	specs.MpolPreferredMany: 5, specs.MpolWeightedInterleave: 6,
}

var memoryFlags = map[specs.MemoryPolicyFlagType]int{
	specs.MpolFNumaBalancing: 1 << 13, specs.MpolFRelativeNodes: 1 << 14, specs.MpolFStaticNodes: 1 << 15,
}

// containerAttributes is attributes for what the spec asks of the whole container and its processes inherit.
func containerAttributes(prog *nsfork.Program, l *specs.Linux) error {
	if p := l.Personality; p != nil {
		n, ok := personalities[p.Domain]
		if !ok || len(p.Flags) > 0 {
			return fmt.Errorf("personality %q with flags %q: want LINUX or LINUX32 without flags", p.Domain, p.Flags)
		}
		prog.Call("set personality", unix.SYS_PERSONALITY, n)
	}
	if m := l.MemoryPolicy; m != nil {
		mode, ok := memoryModes[m.Mode]
		if !ok {
			return fmt.Errorf("memoryPolicy mode %q is not supported", m.Mode)
		}
		for _, f := range m.Flags {
			bit, ok := memoryFlags[f]
			if !ok {
				return fmt.Errorf("memoryPolicy flag %q is not supported", f)
			}
			mode |= bit
		}
		nodes, err := parseCPUs(m.Nodes)
		if err != nil {
			return fmt.Errorf("memoryPolicy nodes: %w", err)
		}
		if nodes == nil {
			prog.Call("set memory policy", unix.SYS_SET_MEMPOLICY, mode, 0, 0)
		} else {
			const bits = 1024
			prog.Call("set memory policy", unix.SYS_SET_MEMPOLICY, mode, nodes, bits)
		}
	}
	return nil
}

// setClocks sets the offsets of the time namespace that the calling thread has made for its children.
func setClocks(offsets map[string]specs.LinuxTimeOffset) error {
	if len(offsets) == 0 {
		return nil
	}
	var text strings.Builder
	for clock, o := range offsets {
		if clock != "monotonic" && clock != "boottime" {
			return fmt.Errorf("timeOffsets: clock %q is none of monotonic, boottime", clock)
		}
		fmt.Fprintf(&text, "%s %d %d\n", clock, o.Secs, o.Nanosecs)
	}
	// By the thread's number as a process: its entry below task/ has no such file.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/timens_offsets", unix.Gettid()), []byte(text.String()), 0); err != nil {
		return fmt.Errorf("set clocks of the time namespace: %w", err)
	}
	return nil
}

// setAffinity binds the calling thread, whose child inherits it, to CPUs: to the initial ones before it enters the container's cgroup,
// to the final ones after that.
func setAffinity(a *specs.CPUAffinity, final bool) error {
	if a == nil {
		return nil
	}
	list := a.Initial
	if final {
		list = a.Final
	}
	set, err := parseCPUs(list)
	if err != nil || set == nil {
		return err
	}
	if err := unix.SchedSetaffinity(0, set); err != nil {
		return fmt.Errorf("execCPUAffinity %s: %w", list, err)
	}
	return nil
}

// parseCPUs reads a list such as "0-3,7"; nil for an empty one.
func parseCPUs(list string) (*unix.CPUSet, error) {
	if list == "" {
		return nil, nil
	}
	var set unix.CPUSet
	const most = 1023 // what a CPUSet holds
	for part := range strings.SplitSeq(list, ",") {
		lo, hi, isRange := strings.Cut(strings.TrimSpace(part), "-")
		first, err := strconv.ParseUint(lo, 10, 16)
		last := first
		if err == nil && isRange {
			last, err = strconv.ParseUint(hi, 10, 16)
		}
		if err != nil || last < first || last > most {
			return nil, fmt.Errorf("%q is not a list of numbers and ranges up to %d", list, most)
		}
		for n := first; n <= last; n++ {
			set.Set(int(n))
		}
	}
	return &set, nil
}
