package ocicli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/cgroup"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Errors by runc's words, which its callers look for.
var (
	errNotExist   = errors.New("container does not exist")
	errNotRunning = errors.New("container not running")
)

// record is state.json: what is known of a container since its first process exists.
type record struct {
	// Pid is the first process's number, Start its start time in clock ticks since boot, so that the number can't be mistaken.
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"`
	// Bundle is the folder of the bundle, RootFS that of the root file system.
	Bundle  string    `json:"bundle"`
	RootFS  string    `json:"rootfs"`
	Created time.Time `json:"created"`
	Owner   string    `json:"owner"`
	// Systemd says that systemd made the cgroup.
	Systemd bool `json:"systemd,omitempty"`
	// NoKeyring is as at create; an exec follows it.
	NoKeyring bool `json:"noKeyring,omitempty"`
}

// container is a container's folder, opened.
type container struct {
	id, dir string
	rec     record // zero while the container is being created, or when its creator died
	spec    *specs.Spec
	lock    *disk.Lock
}

// checkID refuses what is no name of one folder.
func checkID(id string) error {
	const most = 1024
	ok := id != "" && id != "." && id != ".." && len(id) <= most
	for _, c := range []byte(id) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_+-.", c) >= 0)
	}
	if !ok {
		return fmt.Errorf("invalid container ID format: %.100q: letters, digits, _, +, -, . alone", id)
	}
	return nil
}

// create makes a container's folder, locked. The configuration's bytes are kept in it.
func (a *app) create(id string, config []byte) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(a.root, 0o711); err != nil {
		return nil, err
	}
	c := &container{id: id, dir: filepath.Join(a.root, id)}
	if err := os.Mkdir(c.dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, errors.New("container with given ID already exists")
	} else if err != nil {
		return nil, err
	}
	var err error
	if c.lock, err = disk.Acquire(c.file("lock")); err != nil { // who waited for an older container's has it until he sees that this is another
		return nil, err
	}
	if err := disk.WriteFile(c.file("config.json"), config, 0o600, disk.Volatile); err != nil {
		return nil, errors.Join(err, c.remove())
	}
	return c, nil
}

// file is the path of a file in the container's folder.
func (c *container) file(name string) string { return filepath.Join(c.dir, name) }

// remove deletes the container's folder and lets go of its lock.
func (c *container) remove() error {
	err := disk.RemoveLocked(c.dir)
	c.lock.Release()
	return err
}

// open reads what is known of a container.
func (a *app) open(id string) (*container, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	c := &container{id: id, dir: filepath.Join(a.root, id)}
	if _, err := os.Lstat(c.dir); errors.Is(err, fs.ErrNotExist) {
		return nil, errNotExist
	}
	return c, c.load()
}

// load reads state.json, if there is one.
func (c *container) load() error {
	err := disk.ReadJSON(c.file("state.json"), &c.rec)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	return nil
}

// openLocked is open for a change. It waits for whoever is at it.
func (a *app) openLocked(id string) (*container, error) {
	c, err := a.open(id)
	if err != nil {
		return nil, err
	}
	c.lock, err = disk.Acquire(c.file("lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNotExist
	}
	if err != nil {
		return nil, err
	}
	c.rec = record{} // it may have been deleted while we waited, and made anew
	return c, c.load()
}

// config reads the configuration that the container was created with.
func (c *container) config() (*specs.Spec, error) {
	if c.spec != nil {
		return c.spec, nil
	}
	b, err := disk.ReadFile(c.file("config.json"))
	if err != nil {
		return nil, err
	}
	if c.spec, err = parseSpec(b); err != nil {
		return nil, err
	}
	completeSpec(c.spec, c.id, c.rec.Bundle, c.rec.Systemd)
	return c.spec, nil
}

// cgroup is the container's, whether it exists or not.
func (c *container) cgroup() (cgroup.Manager, error) {
	spec, err := c.config()
	if err != nil {
		return nil, err
	}
	place, err := cgroup.Parse(spec.Linux.CgroupsPath, c.rec.Systemd)
	if err != nil {
		return nil, err
	}
	return cgroup.Open(place)
}

// runtimeConfig is what package runtime wants to know of an existing container.
func (c *container) runtimeConfig() (*runtime.Config, error) {
	spec, err := c.config()
	if err != nil {
		return nil, err
	}
	return &runtime.Config{ID: c.id, Spec: spec, Exact: true, NoKeyring: c.rec.NoKeyring, SystemdCgroup: c.rec.Systemd, SeccompCache: seccompCache(filepath.Dir(c.dir))}, nil
}

// alive reports whether the first process is there.
func (c *container) alive() bool {
	if c.rec.Pid == 0 {
		return false
	}
	start, state, err := procStat(c.rec.Pid)
	return err == nil && start == c.rec.Start && state != 'Z' && state != 'X'
}

// status is the container's, by what the kernel says now.
func (c *container) status() specs.ContainerState {
	if c.rec.Pid == 0 && c.lock == nil && disk.Held(c.file("lock")) {
		return specs.StateCreating
	}
	if !c.alive() {
		return specs.StateStopped
	}
	if c.held() {
		return specs.StateCreated
	}
	if cg, err := c.cgroup(); err == nil {
		if frozen, err := cg.Frozen(); err == nil && frozen {
			return "paused"
		}
	}
	return specs.StateRunning
}

// held reports whether the first process waits for its start: the pipe has a reader only then.
func (c *container) held() bool {
	fd, err := unix.Open(c.file("start"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// state is the container in the form of the specification, for hooks and for `state`.
func (c *container) state(status specs.ContainerState, pid int) *specs.State {
	s := &specs.State{Version: specs.Version, ID: c.id, Status: status, Pid: pid, Bundle: c.rec.Bundle}
	if spec, err := c.config(); err == nil {
		s.Annotations = spec.Annotations
	}
	return s
}

// save records the first process: from now on the container exists.
func (c *container) save(pid int) error {
	start, _, err := procStat(pid)
	if err != nil {
		return err
	}
	c.rec.Pid, c.rec.Start = pid, start
	b, err := c.rec.encode()
	if err != nil {
		return err
	}
	return disk.WriteFile(c.file("state.json"), b, 0o600, disk.Volatile)
}

// encode is json.Marshal without making a plan of how, which would take longer than all else that save does.
func (r *record) encode() (b []byte, err error) {
	text := func(name, s string) {
		b = append(append(b, `,"`...), name+`":`...)
		if strings.IndexFunc(s, func(c rune) bool { return c < ' ' || c > '~' || strings.ContainsRune(`"\<>&`, c) }) < 0 {
			b = append(append(append(b, '"'), s...), '"')
			return
		}
		q, qerr := json.Marshal(s)
		b, err = append(b, q...), errors.Join(err, qerr)
	}
	b = strconv.AppendInt(append(b, `{"pid":`...), int64(r.Pid), 10)
	b = strconv.AppendUint(append(b, `,"start":`...), r.Start, 10)
	text("bundle", r.Bundle)
	text("rootfs", r.RootFS)
	text("created", r.Created.Format(time.RFC3339Nano))
	text("owner", r.Owner)
	if r.Systemd {
		b = append(b, `,"systemd":true`...)
	}
	if r.NoKeyring {
		b = append(b, `,"noKeyring":true`...)
	}
	return append(b, '}'), err
}

// procStat reads a process's start time and state.
func procStat(pid int) (start uint64, state byte, err error) {
	b, err := disk.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may hold anything, parentheses too.
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const startTime = 22 - 3 // counted from 1 in proc_pid_stat(5); the first after the name is number 3
	if len(fields) <= startTime {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	start, err = strconv.ParseUint(fields[startTime], 10, 64)
	return start, fields[0][0], err
}

// seccompCache is the folder of compiled filters.
func seccompCache(root string) string { return filepath.Join(root, "seccomp,") } // no container is called so

// list opens every container, by name. One that can't be read is left out: it is being made or removed.
func (a *app) list() ([]*container, error) {
	entries, err := os.ReadDir(a.root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []*container
	for _, e := range entries {
		if !e.IsDir() || disk.IsTemp(e.Name()) || checkID(e.Name()) != nil {
			continue
		}
		if c, err := a.open(e.Name()); err == nil {
			out = append(out, c)
		}
	}
	return out, disk.RemoveLeft(a.root, entries)
}
