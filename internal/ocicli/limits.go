package ocicli

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"conex/internal/linux/cgroup"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func updateCommand(fs *flag.FlagSet) func(*app, []string) error {
	var file string
	for _, n := range []string{"resources", "r"} {
		fs.StringVar(&file, n, "", "")
	}
	flags := map[string]*string{}
	for _, n := range []string{
		"blkio-weight", "cpu-period", "cpu-quota", "cpu-burst", "cpu-share", "cpu-rt-period", "cpu-rt-runtime", "cpuset-cpus", "cpuset-mems",
		"cpu-idle", "memory", "memory-reservation", "memory-swap", "pids-limit", "kernel-memory", "kernel-memory-tcp", "l3-cache-schema", "mem-bw-schema",
	} {
		flags[n] = fs.String(n, "", "")
	}
	return func(a *app, args []string) error {
		var res specs.LinuxResources
		if file != "" {
			if err := readResources(file, &res); err != nil {
				return err
			}
		} else if err := resourceFlags(flags, &res); err != nil {
			return err
		}
		c, err := a.openLocked(args[0])
		if err != nil {
			return err
		}
		defer c.lock.Release()
		if c.status() == specs.StateStopped {
			return errNotRunning
		}
		cg, err := c.cgroup()
		if err != nil {
			return err
		}
		return cg.Update(&res)
	}
}

func readResources(file string, res *specs.LinuxResources) error {
	in := os.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxConfig))
	if err == nil {
		err = json.Unmarshal(b, res)
	}
	if err != nil {
		return fmt.Errorf("resources from %s: %w", file, err)
	}
	return nil
}

// resourceFlags puts the flags that are given into res.
func resourceFlags(flags map[string]*string, res *specs.LinuxResources) error {
	cpu, mem := &specs.LinuxCPU{}, &specs.LinuxMemory{}
	var errs []error
	signed := func(name string, size bool, to **int64) {
		s := *flags[name]
		if s == "" {
			return
		}
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil && size {
			n, err = parseSize(s)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("invalid value for %s: %q", name, s))
			return
		}
		*to = &n
	}
	unsigned := func(name string, to **uint64) {
		if s := *flags[name]; s != "" {
			n, err := strconv.ParseUint(s, 10, 64)
			if err != nil {
				errs = append(errs, fmt.Errorf("invalid value for %s: %q", name, s))
				return
			}
			*to = &n
		}
	}
	unsigned("cpu-period", &cpu.Period)
	unsigned("cpu-share", &cpu.Shares)
	unsigned("cpu-burst", &cpu.Burst)
	unsigned("cpu-rt-period", &cpu.RealtimePeriod)
	signed("cpu-quota", false, &cpu.Quota)
	signed("cpu-rt-runtime", false, &cpu.RealtimeRuntime)
	signed("cpu-idle", false, &cpu.Idle)
	cpu.Cpus, cpu.Mems = *flags["cpuset-cpus"], *flags["cpuset-mems"]
	signed("memory", true, &mem.Limit)
	signed("memory-reservation", true, &mem.Reservation)
	signed("memory-swap", true, &mem.Swap)
	var weight *uint64
	unsigned("blkio-weight", &weight)
	if weight != nil {
		w := uint16(*weight)
		res.BlockIO = &specs.LinuxBlockIO{Weight: &w}
	}
	var pids *int64
	signed("pids-limit", false, &pids)
	if pids != nil {
		res.Pids = &specs.LinuxPids{Limit: pids}
	}
	for _, n := range []string{"kernel-memory", "kernel-memory-tcp"} {
		if *flags[n] != "" {
			errs = append(errs, fmt.Errorf("--%s: kernels have dropped this limit", n))
		}
	}
	for _, n := range []string{"l3-cache-schema", "mem-bw-schema"} {
		if *flags[n] != "" {
			errs = append(errs, fmt.Errorf("--%s: Intel RDT is not supported", n))
		}
	}
	res.CPU, res.Memory = cpu, mem
	return errors.Join(errs...)
}

// parseSize reads a number of bytes with a unit: 64m, 1G.
func parseSize(s string) (int64, error) {
	units := map[byte]uint{'b': 0, 'k': 10, 'm': 20, 'g': 30, 't': 40}
	shift, ok := units[s[len(s)-1]|0x20]
	if !ok {
		return 0, errors.ErrUnsupported
	}
	n, err := strconv.ParseInt(s[:len(s)-1], 10, 64)
	if err != nil || n < 0 || n > 1<<(62-shift) {
		return 0, errors.ErrUnsupported
	}
	return n << shift, nil
}

// event is one line of `events`, with runc's names.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

type statsData struct {
	CPU struct {
		Usage struct {
			Total  uint64 `json:"total"`
			Kernel uint64 `json:"kernel"`
			User   uint64 `json:"user"`
		} `json:"usage"`
		Throttling struct {
			Periods          uint64 `json:"periods"`
			ThrottledPeriods uint64 `json:"throttledPeriods"`
			ThrottledTime    uint64 `json:"throttledTime"`
		} `json:"throttling"`
	} `json:"cpu"`
	Memory struct {
		Usage struct {
			Limit   uint64 `json:"limit"`
			Usage   uint64 `json:"usage"`
			Max     uint64 `json:"max"`
			Failcnt uint64 `json:"failcnt"`
		} `json:"usage"`
		Raw map[string]uint64 `json:"raw"`
	} `json:"memory"`
	Pids struct {
		Current uint64 `json:"current"`
		Limit   uint64 `json:"limit"`
	} `json:"pids"`
	Blkio struct {
		Bytes []blkio `json:"ioServiceBytesRecursive,omitempty"`
		Ops   []blkio `json:"ioServicedRecursive,omitempty"`
	} `json:"blkio"`
}

type blkio struct {
	Major uint64 `json:"major"`
	Minor uint64 `json:"minor"`
	Op    string `json:"op"`
	Value uint64 `json:"value"`
}

func eventsCommand(fs *flag.FlagSet) func(*app, []string) error {
	stats := fs.Bool("stats", false, "")
	interval := fs.Duration("interval", 5*time.Second, "")
	return func(a *app, args []string) error {
		if *interval <= 0 {
			return errors.New("--interval must be greater than 0")
		}
		c, err := a.open(args[0])
		if err != nil {
			return err
		}
		if c.status() == specs.StateStopped {
			return fmt.Errorf("container with id %s is not running", c.id)
		}
		cg, err := c.cgroup()
		if err != nil {
			return err
		}
		enc := json.NewEncoder(os.Stdout)
		tick := time.NewTicker(*interval)
		defer tick.Stop()
		killed, err := cg.OOMKills()
		if err != nil {
			return err
		}
		for {
			s, err := cg.Stats()
			if err != nil {
				return err
			}
			if s.Memory.OOMKills > killed {
				killed = s.Memory.OOMKills
				if err := enc.Encode(event{Type: "oom", ID: c.id}); err != nil {
					return err
				}
			}
			if err := enc.Encode(event{Type: "stats", ID: c.id, Data: eventStats(s)}); err != nil || *stats {
				return err
			}
			<-tick.C
			if c.status() == specs.StateStopped {
				return nil
			}
		}
	}
}

func eventStats(s cgroup.Stats) statsData {
	var d statsData
	d.CPU.Usage.Total, d.CPU.Usage.Kernel, d.CPU.Usage.User = s.CPU.Usage, s.CPU.System, s.CPU.User
	d.CPU.Throttling.Periods, d.CPU.Throttling.ThrottledPeriods, d.CPU.Throttling.ThrottledTime = s.CPU.Periods, s.CPU.ThrottledPeriods, s.CPU.ThrottledTime
	d.Memory.Usage.Limit, d.Memory.Usage.Usage, d.Memory.Usage.Max = s.Memory.Limit, s.Memory.Charged, s.Memory.Peak
	d.Memory.Raw = map[string]uint64{"total_inactive_file": s.Memory.InactiveFile}
	d.Pids.Current, d.Pids.Limit = s.Pids.Current, s.Pids.Limit
	for _, io := range s.IO {
		d.Blkio.Bytes = append(d.Blkio.Bytes, blkio{io.Major, io.Minor, "Read", io.ReadBytes}, blkio{io.Major, io.Minor, "Write", io.WriteBytes})
		d.Blkio.Ops = append(d.Blkio.Ops, blkio{io.Major, io.Minor, "Read", io.ReadOps}, blkio{io.Major, io.Minor, "Write", io.WriteOps})
	}
	return d
}
