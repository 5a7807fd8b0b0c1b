// Package cgroup owns a container's control group: its folder in every mounted hierarchy, its limits, and the means to
// count, freeze and kill everything in it.
//
// There are two drivers behind Manager. v1 works where each controller is mounted by itself, with or without ("hybrid") a v2
// tree beside them; v2 works on the unified tree alone. On a hybrid machine the v2 tree has no controllers, but it still
// knows which processes belong together, so killing, freezing and waiting use it in both cases.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Errors that the functions of this package wrap.
var (
	// ErrUnsupported says that a limit was asked for which this kernel or its set-up can't enforce. The text names the flag
	// and the controller.
	ErrUnsupported = errors.New("not supported by this host's cgroups")
	// ErrNotExist says that the cgroup is in none of the hierarchies.
	ErrNotExist = errors.New("cgroup does not exist")
	// ErrBusy says that processes are left in a cgroup that was to be deleted.
	ErrBusy = errors.New("cgroup still has processes")
	// ErrMainThread says that EnterThread was called on the process's main thread. That thread can't end before the process
	// does, so the process would stay in the container's cgroup, and be killed with it.
	ErrMainThread = errors.New("the main thread can't enter a cgroup, use another one")
)

// Manager is one container's cgroup. Making a Manager creates nothing; any process may make one for an existing cgroup.
// The methods may be called from several processes at once.
type Manager interface {
	// Create makes the cgroup in every hierarchy that it needs and sets the limits. If it fails nothing is left behind.
	// A nil res sets no limits.
	Create(res *specs.LinuxResources) error

	// EnterThread moves the calling thread into the v1 hierarchies, so that a child which it forks starts inside. The caller
	// has locked the goroutine to the thread and lets the thread die soon (by ending the goroutine without unlocking it): the
	// thread is accounted to the container while it lives. Moving a thread takes some 10 µs a hierarchy; moving a process
	// through cgroup.procs waits for all CPUs, 4 to 12 ms. On v2 it does nothing: FD is the way in.
	EnterThread() error

	// Entrances opens a file of each v1 hierarchy. Whoever writes "0" to all of them is inside, with the thread that does it: a child that
	// does so itself leaves no thread behind that the end of the cgroup has to wait for. On v2 there are none: FD is the way in. The caller
	// closes them.
	Entrances() ([]int, error)

	// FD opens the folder in the v2 tree for clone3's CLONE_INTO_CGROUP. It is nil where no v2 tree is mounted. The caller
	// closes it.
	FD() (*os.File, error)

	// Started says that the container's first process is inside, or will never be.
	Started()

	// AddProcess moves a process, with all its threads, into the cgroup.
	AddProcess(pid int) error

	// Update changes the limits that res sets and leaves the others alone. One that the kernel refuses leaves all as they were.
	Update(res *specs.LinuxResources) error

	// Kill sends SIGKILL to every process in the cgroup and below, in a way that a process which forks can't outrun. It returns
	// when the signals are sent; Delete waits until all are gone.
	Kill() error

	// Freeze stops every process in the cgroup and returns when all have stopped. Thaw lets them go on.
	Freeze() error
	Thaw() error
	// Frozen reports whether Freeze was the last of the two; false for a cgroup that does not exist.
	Frozen() (bool, error)

	// Pids lists the processes in the cgroup and below it.
	Pids() ([]int, error)

	// OOMKills counts the processes that the kernel has killed here since memory ran out.
	OOMKills() (uint64, error)

	// Stats reads the counters.
	Stats() (Stats, error)

	// Delete waits for the last process to go, for some seconds, and removes the cgroup, with what the container made below
	// it, from every hierarchy. It doesn't kill: what isn't dying yields ErrBusy. It is no error when nothing is there.
	Delete() error
}

// Stats are a cgroup's counters. A controller that isn't there leaves zeros.
type Stats struct {
	CPU    CPUStats
	Memory MemoryStats
	Pids   PidsStats
	IO     []IOStats
}

// CPUStats are times in nanoseconds and counts of scheduling periods.
type CPUStats struct {
	Usage, User, System       uint64
	Periods, ThrottledPeriods uint64
	ThrottledTime             uint64
}

// MemoryStats are in bytes.
type MemoryStats struct {
	// Usage is what Docker shows: everything charged less the file cache that could be dropped at once.
	Usage uint64
	// Charged is everything charged, InactiveFile the difference between it and Usage.
	Charged, InactiveFile uint64
	// Peak is the largest Charged so far; 0 where the kernel doesn't keep it (v2 before Linux 5.19).
	Peak uint64
	// Limit is 0 without a limit.
	Limit uint64
	// OOMKills counts the processes that were killed since memory ran out.
	OOMKills uint64
}

// PidsStats count tasks (threads too). Limit is 0 without a limit.
type PidsStats struct{ Current, Limit uint64 }

// IOStats are one block device's counters: bytes and operations.
type IOStats struct {
	Major, Minor          uint64
	ReadBytes, WriteBytes uint64
	ReadOps, WriteOps     uint64
}

// deleteTimeout bounds how long Delete waits for processes that are dying. A process that was killed while it writes back
// gigabytes or sits in an unresponsive network filesystem can take longer; then the next sweep finishes the job.
const deleteTimeout = 10 * time.Second

// New returns the cgroup at path, for instance "conex/<id>", below the root of each hierarchy (not below our own cgroup: on a
// systemd machine that is a session which ends with the user's log-out). It only looks at what is mounted.
func New(path string) (Manager, error) {
	path = filepath.Clean(path)
	if path == "." || !filepath.IsLocal(path) {
		return nil, fmt.Errorf("cgroup path %q doesn't name a folder below the root", path)
	}
	m := mounts()
	switch {
	case len(m.v1) > 0:
		return newV1(m, path), nil
	case m.unified != "":
		return newV2(m.unified, path), nil
	}
	return nil, fmt.Errorf("no cgroup filesystem is mounted, expected at /sys/fs/cgroup: %w", ErrUnsupported)
}

// Open returns the cgroup at a place.
func Open(p Place) (Manager, error) {
	m, err := New(p.Path)
	if err != nil || p.Unit == "" {
		return m, err
	}
	return &systemd{Manager: m, place: p}, nil
}

// Prune removes the folder at path, the parent of containers' cgroups, from every hierarchy in which nothing is left below
// it. It is no error when it isn't there or still in use.
func Prune(path string) error {
	if !filepath.IsLocal(path) || filepath.Clean(path) == "." {
		return fmt.Errorf("cgroup path %q doesn't name a folder below the root", path)
	}
	m := mounts()
	var errs []error
	for _, root := range m.roots() {
		if err := rmdir(filepath.Join(root, path)); err != nil && !errors.Is(err, ErrBusy) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// limit is one write that a LinuxResources asks for.
type limit struct {
	// flag is the option that the user knows, for errors.
	flag string
	// controller owns the file; on v1 it says in which hierarchy the file is.
	controller string
	// files holds the file's name and other names that it has on other kernels, the first existing one is written.
	files []string
	value string
	// implied limits are left out where the kernel lacks the file: the user didn't ask for them by themselves.
	implied bool
	// paired limits bound each other with the next one in the list; when the kernel refuses this order, the other is tried.
	paired bool
}

// apply writes limits; dir gives a controller's folder, "" when it isn't available, with the reason.
func apply(limits []limit, dir func(controller string) (string, error)) error {
	for i := 0; i < len(limits); i++ {
		err := limits[i].write(dir)
		if err != nil && limits[i].paired && i+1 < len(limits) && errors.Is(err, errInvalid) {
			if limits[i+1].write(dir) == nil { // else the first error tells more
				err = limits[i].write(dir)
				i++
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// change is apply for a cgroup in use: if the kernel refuses one limit, those before it get their old values back. Limits of single
// devices are not among them, as they share a file.
func change(limits []limit, dir func(controller string) (string, error)) error {
	type old struct{ file, value string }
	var before []old
	for _, l := range limits {
		d, err := dir(l.controller)
		if err != nil || strings.Contains(l.value, ":") {
			continue
		}
		for _, f := range l.files {
			if text, err := readFile(filepath.Join(d, f)); err == nil {
				first, _, _ := strings.Cut(text, "\n")
				before = append(before, old{filepath.Join(d, f), first})
				break
			}
		}
	}
	err := apply(limits, dir)
	if err == nil {
		return nil
	}
	// Twice, since limits that bound each other go back in one order only.
	for range 2 {
		for _, o := range slices.Backward(before) {
			_ = writeFile(o.file, o.value) // the refusal is what the caller has to hear of
		}
	}
	return err
}

func (l *limit) write(dir func(string) (string, error)) error {
	d, err := dir(l.controller)
	if err != nil {
		if l.implied {
			return nil
		}
		return fmt.Errorf("%s: cgroup controller %s: %w", l.flag, l.controller, err)
	}
	file := ""
	for _, f := range l.files {
		file = f
		err = writeFile(filepath.Join(d, f), l.value)
		if !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrNotExist):
		if l.implied {
			return nil
		}
		if _, serr := os.Lstat(d); serr != nil {
			return fmt.Errorf("%s: %s: %w", l.flag, d, ErrNotExist)
		}
		return fmt.Errorf("%s: cgroup controller %s of this kernel has no %s: %w", l.flag, l.controller, strings.Join(l.files, " or "), ErrUnsupported)
	default:
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err // the path is long and says no more
		}
		return fmt.Errorf("%s: the kernel refuses %q as %s: %w%s", l.flag, l.value, file, err, hint(file, err))
	}
}

// hint says what the kernel means by an error, where that is known.
func hint(file string, err error) string {
	switch {
	case errors.Is(err, unix.EBUSY) && strings.HasPrefix(file, "memory."):
		return ": more than that is in use"
	case errors.Is(err, unix.EOPNOTSUPP) && strings.Contains(file, "bfq"):
		return ": the device's I/O scheduler is not bfq"
	case errors.Is(err, unix.EINVAL) && file == "cpu.rt_runtime_us":
		return ": the parent cgroup has no such share of real time to give away"
	case errors.Is(err, unix.ENODEV):
		return ": a whole disk is wanted, not a partition"
	}
	return ""
}
