package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// v1 is the driver for controllers that are mounted one by one.
type v1 struct {
	path string
	// roots maps controllers to mount points.
	roots map[string]string
	// uni is the folder in the v2 tree of a hybrid set-up, nil without one.
	uni *unified
}

func newV1(m *mountTable, path string) *v1 {
	v := &v1{path: path, roots: m.v1}
	if m.unified != "" {
		v.uni = &unified{filepath.Join(m.unified, path)}
	}
	return v
}

// dir returns a controller's folder of this cgroup.
func (v *v1) dir(controller string) (string, error) {
	root, ok := v.roots[controller]
	if !ok {
		return "", fmt.Errorf("not mounted: %w", ErrUnsupported)
	}
	return filepath.Join(root, v.path), nil
}

// dirs lists this cgroup's possible v1 folders, each once; not all of them need to exist.
func (v *v1) dirs() []string {
	var out []string
	for _, root := range v.roots {
		out = append(out, filepath.Join(root, v.path))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// always are the controllers without whose folder a container can't be counted or ended.
var always = []string{"blkio", "cpu", "cpuacct", "memory", "pids"}

// needed lists the controllers in which res needs a folder. A container gets one in every hierarchy, so that nothing of it stays in
// the cgroups of whoever starts it; in the others it may be lacking, where conex itself runs in a container for instance.
func (v *v1) needed(res *specs.LinuxResources, limits []limit) []string {
	need := slices.Clone(always)
	if v.uni == nil {
		need = append(need, "freezer")
	}
	for _, l := range limits {
		need = append(need, l.controller)
	}
	if res != nil && restricts(res.Devices) {
		need = append(need, "devices")
	}
	return need
}

func (v *v1) Create(res *specs.LinuxResources) error {
	limits, err := v1Limits(res)
	if err != nil {
		return err
	}
	err = v.create(res, limits)
	if err != nil {
		// Nobody can be inside yet, so this needs no patience.
		for _, d := range v.dirs() {
			err = errors.Join(err, removeTree(d))
		}
		if v.uni != nil {
			err = errors.Join(err, removeTree(v.uni.dir))
		}
	}
	return err
}

func (v *v1) create(res *specs.LinuxResources, limits []limit) error {
	if v.uni != nil {
		if err := mkdir(strings.TrimSuffix(v.uni.dir, v.path), v.path, nil); err != nil {
			return err
		}
	}
	need := v.needed(res, limits)
	made := map[string]bool{}
	for _, c := range slices.Sorted(maps.Keys(v.roots)) {
		root := v.roots[c]
		if made[root] {
			continue
		}
		made[root] = true
		err := mkdir(root, v.path, v.prepare(c))
		if forbidden(err) && !v.shares(root, need) {
			continue
		}
		if err != nil {
			return err
		}
	}
	if err := apply(limits, v.dir); err != nil {
		return err
	}
	return v.setDevices(res)
}

// shares reports whether one of the controllers is mounted at root.
func (v *v1) shares(root string, controllers []string) bool {
	return slices.ContainsFunc(controllers, func(c string) bool { return v.roots[c] == root })
}

// forbidden reports whether an error says that a hierarchy isn't ours to change.
func forbidden(err error) bool {
	return errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
}

// prepare returns what a new folder of a controller needs before it can be used.
func (v *v1) prepare(controller string) func(string) error {
	if v.roots["cpuset"] == "" || v.roots[controller] != v.roots["cpuset"] {
		return nil
	}
	// A new cpuset is empty, and nothing can enter an empty one.
	return func(dir string) error {
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := readFile(filepath.Join(filepath.Dir(dir), f))
			if err == nil {
				err = writeFile(filepath.Join(dir, f), value)
			}
			if err != nil {
				return fmt.Errorf("inherit %s: %w", f, err)
			}
		}
		return nil
	}
}

func (v *v1) setDevices(res *specs.LinuxResources) error {
	if res == nil || !restricts(res.Devices) {
		return nil
	}
	dir, err := v.dir("devices")
	if err == nil {
		return writeV1Devices(dir, res.Devices)
	}
	if v.uni != nil {
		return attachDevices(v.uni.dir, res.Devices)
	}
	return fmt.Errorf("device access: cgroup controller devices: %w", err)
}

func (v *v1) EnterThread() error {
	if unix.Gettid() == unix.Getpid() {
		return ErrMainThread
	}
	return v.enter("tasks", "0")
}

func (v *v1) Entrances() (fds []int, err error) {
	for _, d := range v.dirs() {
		file := filepath.Join(d, "tasks")
		fd, err := retry(func() (int, error) { return unix.Open(file, unix.O_WRONLY|unix.O_CLOEXEC, 0) })
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return nil, fmt.Errorf("enter cgroup: %w", &fs.PathError{Op: "open", Path: file, Err: err})
		}
		fds = append(fds, fd)
	}
	if fds == nil {
		return nil, fmt.Errorf("enter cgroup %s: %w", v.path, ErrNotExist)
	}
	return fds, nil
}

// enter writes to a file of every v1 folder that exists.
func (v *v1) enter(file, value string) error {
	found := false
	for _, d := range v.dirs() {
		err := writeFile(filepath.Join(d, file), value)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
		found = true
	}
	if !found {
		return fmt.Errorf("enter cgroup %s: %w", v.path, ErrNotExist)
	}
	return nil
}

func (v *v1) Started() {}

func (v *v1) FD() (*os.File, error) {
	if v.uni == nil {
		return nil, nil
	}
	return v.uni.fd()
}

func (v *v1) AddProcess(pid int) error {
	if err := v.enter("cgroup.procs", strconv.Itoa(pid)); err != nil {
		return err
	}
	if v.uni == nil {
		return nil
	}
	if err := writeFile(filepath.Join(v.uni.dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
		return fmt.Errorf("enter cgroup: %w", err)
	}
	return nil
}

func (v *v1) Update(res *specs.LinuxResources) error {
	limits, err := v1Limits(res)
	if err != nil {
		return err
	}
	if err := change(limits, v.dir); err != nil {
		return err
	}
	return v.setDevices(res)
}

func (v *v1) Kill() error {
	if v.uni != nil {
		if ok, err := v.uni.kill(); ok || err != nil {
			return err
		}
	}
	// Frozen tasks can't fork, so that the list is complete. v1's freezer delivers SIGKILL after the thaw only.
	if err := v.Freeze(); err != nil && !errors.Is(err, ErrNotExist) && !errors.Is(err, ErrUnsupported) {
		return err
	}
	err := killLoop(v.Pids)
	if terr := v.Thaw(); !errors.Is(terr, ErrNotExist) && !errors.Is(terr, ErrUnsupported) {
		err = errors.Join(err, terr)
	}
	return err
}

func (v *v1) Freeze() error { return v.freeze("FROZEN") }
func (v *v1) Thaw() error   { return v.freeze("THAWED") }

func (v *v1) freeze(state string) error {
	if v.uni != nil {
		err := v.uni.freeze(state == "FROZEN")
		if !errors.Is(err, fs.ErrNotExist) { // else cgroup.freeze is missing, before Linux 5.2
			return err
		}
	}
	dir, err := v.dir("freezer")
	if err != nil {
		return fmt.Errorf("freeze: cgroup controller freezer: %w", err)
	}
	file := filepath.Join(dir, "freezer.state")
	// The state passes through FREEZING, and the kernel offers no event for its end: reading the file is what makes it look
	// again. A task that forks meanwhile may need the request once more (a known race of this controller).
	deadline := time.Now().Add(freezeTimeout)
	pause := 100 * time.Microsecond
	for {
		if err := writeFile(file, state); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s: %w", dir, ErrNotExist)
			}
			return err
		}
		got, err := readFile(file)
		if err != nil || got == state {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: state stays %s: %w", dir, got, errEventTimeout)
		}
		time.Sleep(pause)
		pause = min(2*pause, 20*time.Millisecond)
	}
}

func (v *v1) Pids() ([]int, error) {
	if v.uni != nil {
		return treePids(v.uni.dir)
	}
	for _, c := range append([]string{"freezer"}, always...) {
		dir, err := v.dir(c)
		if err == nil && exists(dir) {
			return treePids(dir)
		}
	}
	return nil, nil
}

func (v *v1) OOMKills() (uint64, error) {
	dir, err := v.dir("memory")
	if err != nil {
		return 0, nil // without the controller nothing is killed for a limit
	}
	m, err := readKeyed(filepath.Join(dir, "memory.oom_control"))
	return m["oom_kill"], err
}

func (v *v1) Delete() error {
	deadline := time.Now().Add(deleteTimeout)
	if v.uni != nil {
		err := v.uni.waitEvent("populated 0", deadline)
		if errors.Is(err, errEventTimeout) {
			return fmt.Errorf("delete cgroup %s: %w", v.path, ErrBusy)
		}
		if err != nil {
			return err
		}
	}
	var errs []error
	for _, d := range v.dirs() {
		errs = append(errs, removeTreeBy(d, deadline))
	}
	if v.uni != nil && errors.Join(errs...) == nil { // last: it is how the others' processes are found
		errs = append(errs, removeTreeBy(v.uni.dir, deadline))
	}
	return errors.Join(errs...)
}

func (v *v1) Stats() (Stats, error) {
	var s Stats
	var errs []error
	keyed := func(controller, file string) map[string]uint64 {
		dir, err := v.dir(controller)
		if err != nil {
			return nil
		}
		m, err := readKeyed(filepath.Join(dir, file))
		errs = append(errs, err)
		return m
	}
	num := func(controller, file string) uint64 {
		dir, err := v.dir(controller)
		if err != nil {
			return 0
		}
		n, err := readNumber(filepath.Join(dir, file))
		errs = append(errs, err)
		return n
	}
	s.CPU.Usage = num("cpuacct", "cpuacct.usage")
	s.CPU.User = num("cpuacct", "cpuacct.usage_user")
	s.CPU.System = num("cpuacct", "cpuacct.usage_sys")
	cpu := keyed("cpu", "cpu.stat")
	s.CPU.Periods, s.CPU.ThrottledPeriods, s.CPU.ThrottledTime = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_time"]
	s.Memory.Charged = num("memory", "memory.usage_in_bytes")
	s.Memory.Peak = num("memory", "memory.max_usage_in_bytes")
	s.Memory.Limit = num("memory", "memory.limit_in_bytes")
	s.Memory.InactiveFile = keyed("memory", "memory.stat")["total_inactive_file"]
	s.Memory.OOMKills = keyed("memory", "memory.oom_control")["oom_kill"]
	s.Memory.finish()
	s.Pids = PidsStats{Current: num("pids", "pids.current"), Limit: num("pids", "pids.max")}
	if dir, err := v.dir("blkio"); err == nil {
		io, err := v1IO(dir)
		s.IO = io
		errs = append(errs, err)
	}
	return s, errors.Join(errs...)
}

// finish derives Usage.
func (m *MemoryStats) finish() {
	m.Usage = m.Charged - min(m.InactiveFile, m.Charged)
}

// v1IO reads the throttling layer's counters, which exist whatever the I/O scheduler is: lines "8:0 Read 4096".
func v1IO(dir string) ([]IOStats, error) {
	devs := map[[2]uint64]*IOStats{}
	for _, f := range []string{"blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_serviced_recursive"} {
		text, err := readFile(filepath.Join(dir, f))
		if err != nil {
			if missing(err) == nil {
				continue
			}
			return nil, err
		}
		for line := range strings.SplitSeq(text, "\n") {
			w := strings.Fields(line)
			if len(w) != 3 {
				continue
			}
			d := device(devs, w[0])
			switch n := number(w[2]); {
			case d == nil:
			case w[1] == "Read" && strings.Contains(f, "bytes"):
				d.ReadBytes = n
			case w[1] == "Write" && strings.Contains(f, "bytes"):
				d.WriteBytes = n
			case w[1] == "Read":
				d.ReadOps = n
			case w[1] == "Write":
				d.WriteOps = n
			}
		}
	}
	return sortedIO(devs), nil
}

// device returns the counters of "major:minor", making them if need be; nil for another text.
func device(devs map[[2]uint64]*IOStats, name string) *IOStats {
	maj, mnr, ok := strings.Cut(name, ":")
	if !ok {
		return nil
	}
	key := [2]uint64{number(maj), number(mnr)}
	if devs[key] == nil {
		devs[key] = &IOStats{Major: key[0], Minor: key[1]}
	}
	return devs[key]
}

func sortedIO(devs map[[2]uint64]*IOStats) []IOStats {
	var out []IOStats
	for _, k := range slices.SortedFunc(maps.Keys(devs), func(a, b [2]uint64) int { return slices.Compare(a[:], b[:]) }) {
		out = append(out, *devs[k])
	}
	return out
}
