package engine

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"conex/internal/config"
	"conex/internal/linux/cgroup"
	"conex/internal/logs"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// Info describes the engine and the machine, by the names that Docker's info has where it has them.
type Info struct {
	Containers, ContainersRunning, ContainersPaused, ContainersStopped int
	Images                                                             int
	// Driver is the storage driver, DriverStatus pairs of words about it, StorageWhy the reason for the choice.
	Driver       string
	DriverStatus [][2]string
	StorageWhy   string
	// LoggingDriver is the default log driver, LogLimits its bounds in words.
	LoggingDriver, LogLimits string
	// CgroupVersion is "1", "2" or "hybrid"; CgroupControllers are those that limits can be set with.
	CgroupDriver, CgroupVersion                                       string
	CgroupControllers                                                 []string
	MemoryLimit, SwapLimit, CPUCfsQuota, CPUShares, CPUSet, PidsLimit bool
	IPv4Forwarding                                                    bool
	KernelVersion, OperatingSystem, OSVersion, OSType, Architecture   string
	NCPU                                                              int
	MemTotal                                                          int64
	Name                                                              string
	// DockerRootDir is the data folder, State the folder of what a reboot clears.
	DockerRootDir, State string
	// Runtimes are those that --runtime takes by name, with the programs of the others.
	Runtimes        map[string]RuntimeInfo
	DefaultRuntime  string
	SecurityOptions []string
	Warnings        []string
}

// Info looks at the stores and at the machine.
func (e *Engine) Info(ctx context.Context) (Info, error) {
	if err := e.Settle(ctx); err != nil {
		return Info{}, err
	}
	i := Info{
		OSType: runtime.GOOS, NCPU: runtime.NumCPU(), DockerRootDir: e.root.Path(), State: e.cfg.State, DefaultRuntime: config.BuiltinRuntime, Runtimes: e.runtimes(),
		SecurityOptions: []string{"name=seccomp,profile=builtin"}, CgroupDriver: cmp.Or(e.cfg.CgroupDriver, config.CgroupFS),
	}
	all, err := e.snapshots(ctx)
	if err != nil {
		return i, err
	}
	i.Containers = len(all)
	for _, n := range all {
		switch n.Status() {
		case apic.StateRunning, apic.StateRestarting:
			i.ContainersRunning++
		case apic.StatePaused:
			i.ContainersPaused++
		default:
			i.ContainersStopped++
		}
	}
	images, err := e.Images()
	if err != nil {
		return i, err
	}
	list, err := images.List()
	if err != nil {
		return i, err
	}
	i.Images = len(list)
	ls, err := e.Layers()
	if err != nil {
		return i, err
	}
	i.Driver, i.StorageWhy = ls.Driver()
	i.DriverStatus = [][2]string{{"Reason", i.StorageWhy}}
	o, err := logs.ParseOptions(e.cfg.Log.Driver, e.cfg.Log.Options)
	if err != nil {
		return i, err
	}
	i.LoggingDriver, i.LogLimits = o.Driver, o.String()
	i.cgroups()
	return i, i.machine()
}

func (i *Info) cgroups() {
	p := cgroup.Probe()
	i.CgroupVersion, i.CgroupControllers, i.SwapLimit = p.Version, p.Controllers, p.SwapLimit
	for _, c := range p.Controllers {
		switch c {
		case "memory":
			i.MemoryLimit = true
		case "cpu":
			i.CPUCfsQuota, i.CPUShares = true, true
		case "cpuset":
			i.CPUSet = true
		case "pids":
			i.PidsLimit = true
		}
	}
	if !i.MemoryLimit {
		i.Warnings = append(i.Warnings, "WARNING: No memory limit support")
	}
	if !i.SwapLimit {
		i.Warnings = append(i.Warnings, "WARNING: No swap limit support")
	}
	i.IPv4Forwarding = strings.TrimSpace(readText("/proc/sys/net/ipv4/ip_forward")) == "1"
}

func (i *Info) machine() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	i.KernelVersion, i.Architecture = unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])
	var err error
	if i.Name, err = os.Hostname(); err != nil {
		return err
	}
	for line := range strings.Lines(readText("/etc/os-release")) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		if s, err := strconv.Unquote(v); err == nil {
			v = s
		}
		switch k {
		case "PRETTY_NAME":
			i.OperatingSystem = v
		case "VERSION_ID":
			i.OSVersion = v
		}
	}
	for line := range strings.Lines(readText("/proc/meminfo")) {
		if rest, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return fmt.Errorf("read /proc/meminfo: %w", err)
			}
			i.MemTotal = kb << 10
		}
	}
	return nil
}
