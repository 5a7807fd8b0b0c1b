package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// v2 is the driver for the unified tree.
type v2 struct {
	root, path string
	unified
}

func newV2(root, path string) *v2 {
	return &v2{root: root, path: path, unified: unified{filepath.Join(root, path)}}
}

// wanted are the controllers that conex asks the tree for.
var wanted = []string{"cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"}

func (v *v2) Create(res *specs.LinuxResources) error {
	limits, err := v2Limits(res)
	if err != nil {
		return err
	}
	if err := mkdir(v.root, v.path, nil); err != nil {
		return err
	}
	enableErr := v.enable()
	err = apply(limits, v.controller(enableErr))
	if err == nil {
		err = v.setDevices(res)
	}
	if err != nil {
		err = errors.Join(err, removeTree(v.unified.dir))
	}
	return err
}

// enable hands the controllers down to this cgroup: each ancestor must list them in cgroup.subtree_control. What is there
// already isn't written again, since that write stops all forks of the machine for a moment.
func (v *v2) enable() error {
	var errs []error
	dir := v.root
	for _, elem := range strings.Split(v.path, "/") {
		have, err := readFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		on, err := readFile(filepath.Join(dir, "cgroup.subtree_control"))
		if err != nil {
			return err
		}
		var add []string
		for c := range strings.FieldsSeq(have) {
			if slices.Contains(wanted, c) && !slices.Contains(strings.Fields(on), c) {
				add = append(add, "+"+c)
			}
		}
		control := filepath.Join(dir, "cgroup.subtree_control")
		if len(add) > 0 && writeFile(control, strings.Join(add, " ")) != nil {
			// The kernel takes all or none; one of them may be the culprit.
			for _, a := range add {
				if err := writeFile(control, a); err != nil {
					errs = append(errs, fmt.Errorf("enable controller %s in %s: %w", a[1:], dir, err))
				}
			}
		}
		dir = filepath.Join(dir, elem)
	}
	return errors.Join(errs...)
}

// controller returns the folder of a controller for apply. All share one, if they are enabled in it; why adds the reason when not.
func (v *v2) controller(why error) func(string) (string, error) {
	have, err := readFile(filepath.Join(v.unified.dir, "cgroup.controllers"))
	return func(c string) (string, error) {
		switch {
		case err != nil:
			return "", err
		case c == anyController || slices.Contains(strings.Fields(have), c):
			return v.unified.dir, nil
		case why != nil:
			return "", fmt.Errorf("%w: %w", ErrUnsupported, why)
		}
		return "", fmt.Errorf("not available in %s: %w", v.root, ErrUnsupported)
	}
}

func (v *v2) setDevices(res *specs.LinuxResources) error {
	if res == nil || !restricts(res.Devices) {
		return nil
	}
	return attachDevices(v.unified.dir, res.Devices)
}

func (v *v2) EnterThread() error { return nil }

func (v *v2) Entrances() ([]int, error) { return nil, nil }

func (v *v2) Started() {}

func (v *v2) FD() (*os.File, error) { return v.fd() }

func (v *v2) AddProcess(pid int) error {
	err := writeFile(filepath.Join(v.unified.dir, "cgroup.procs"), strconv.Itoa(pid))
	if err != nil && !exists(v.unified.dir) {
		return fmt.Errorf("enter cgroup %s: %w", v.path, ErrNotExist)
	}
	if err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

func (v *v2) Update(res *specs.LinuxResources) error {
	limits, err := v2Limits(res)
	if err != nil {
		return err
	}
	if err := change(limits, v.controller(nil)); err != nil {
		return err
	}
	return v.setDevices(res)
}

func (v *v2) Kill() error {
	if ok, err := v.kill(); ok || err != nil {
		return err
	}
	// Frozen tasks can't fork, so that the list is complete. SIGKILL reaches them frozen.
	if err := v.Freeze(); err != nil && !errors.Is(err, ErrNotExist) {
		return err
	}
	err := killLoop(v.Pids)
	if terr := v.Thaw(); !errors.Is(terr, ErrNotExist) {
		err = errors.Join(err, terr)
	}
	return err
}

func (v *v2) Freeze() error { return v.freeze(true) }
func (v *v2) Thaw() error   { return v.freeze(false) }

func (v *v2) Pids() ([]int, error) { return treePids(v.unified.dir) }

func (v *v2) OOMKills() (uint64, error) {
	m, err := readKeyed(filepath.Join(v.unified.dir, "memory.events"))
	return m["oom_kill"], err
}

func (v *v2) Delete() error {
	deadline := time.Now().Add(deleteTimeout)
	err := v.waitEvent("populated 0", deadline)
	if errors.Is(err, errEventTimeout) {
		return fmt.Errorf("delete cgroup %s: %w", v.path, ErrBusy)
	}
	if err != nil {
		return err
	}
	return removeTreeBy(v.unified.dir, deadline)
}

func (v *v2) Stats() (Stats, error) {
	var s Stats
	var errs []error
	keyed := func(file string) map[string]uint64 {
		m, err := readKeyed(filepath.Join(v.unified.dir, file))
		errs = append(errs, err)
		return m
	}
	num := func(file string) uint64 {
		n, err := readNumber(filepath.Join(v.unified.dir, file))
		errs = append(errs, err)
		return n
	}
	cpu := keyed("cpu.stat")
	const us = 1000 // nanoseconds
	s.CPU = CPUStats{
		Usage: cpu["usage_usec"] * us, User: cpu["user_usec"] * us, System: cpu["system_usec"] * us,
		Periods: cpu["nr_periods"], ThrottledPeriods: cpu["nr_throttled"], ThrottledTime: cpu["throttled_usec"] * us,
	}
	s.Memory = MemoryStats{
		Charged: num("memory.current"), Peak: num("memory.peak"), Limit: num("memory.max"),
		InactiveFile: keyed("memory.stat")["inactive_file"], OOMKills: keyed("memory.events")["oom_kill"],
	}
	s.Memory.finish()
	s.Pids = PidsStats{Current: num("pids.current"), Limit: num("pids.max")}
	io, err := readFile(filepath.Join(v.unified.dir, "io.stat"))
	errs = append(errs, missing(err))
	s.IO = v2IO(io)
	return s, errors.Join(errs...)
}

// v2IO parses io.stat: lines "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".
func v2IO(text string) []IOStats {
	devs := map[[2]uint64]*IOStats{}
	for line := range strings.SplitSeq(text, "\n") {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		d := device(devs, w[0])
		if d == nil {
			continue
		}
		for _, kv := range w[1:] {
			k, n, _ := strings.Cut(kv, "=")
			switch k {
			case "rbytes":
				d.ReadBytes = number(n)
			case "wbytes":
				d.WriteBytes = number(n)
			case "rios":
				d.ReadOps = number(n)
			case "wios":
				d.WriteOps = number(n)
			}
		}
	}
	return sortedIO(devs)
}
