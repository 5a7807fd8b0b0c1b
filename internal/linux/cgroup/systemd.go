package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"conex/internal/linux/dbus"
	"conex/internal/linux/inotify"
	"conex/internal/linux/nsfork"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// systemd is the driver for machines on which systemd alone makes cgroups: each is a scope of its own, delegated to us. What systemd
// has made is the same folder that the other drivers use, so all but its making, changing and ending is theirs.
//
// A scope begins with a process in it, and the container has none yet: a child of ours that only waits stands in for it until Started.
type systemd struct {
	Manager
	place Place

	mu   sync.Mutex
	hold *os.File // our end of the pipe that the child reads from; nil without a child
	wait func()   // reaps it
	// watch sees the kernel kill for lack of memory, last is what it saw.
	watch *inotify.Watch
	last  MemoryStats
}

// The sockets of systemd: its own, for root and without a bus, and the bus's.
var systemdSockets = []string{"/run/systemd/private", "/run/dbus/system_bus_socket"}

const (
	systemdName    = "org.freedesktop.systemd1"
	systemdPath    = "/org/freedesktop/systemd1"
	systemdManager = systemdName + ".Manager"
	// systemdTimeout bounds one request with its job.
	systemdTimeout = 30 * time.Second
)

// systemdConn connects to systemd and, on a bus, asks for its signals.
func systemdConn() (*dbus.Conn, error) {
	deadline := time.Now().Add(systemdTimeout)
	var errs []error
	for i, path := range systemdSockets {
		c, err := dbus.Dial(path, deadline)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if i == 0 {
			return c, nil
		}
		const bus = "org.freedesktop.DBus"
		_, err = c.Call(bus, "/org/freedesktop/DBus", bus, "Hello", nil)
		if err == nil {
			_, err = c.Call(bus, "/org/freedesktop/DBus", bus, "AddMatch", new(dbus.Body).String("type='signal',interface='"+systemdManager+"',member='JobRemoved'"))
		}
		if err == nil {
			_, err = c.Call(systemdName, systemdPath, systemdManager, "Subscribe", nil)
		}
		if err != nil {
			c.Close()
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
			continue
		}
		return c, nil
	}
	return nil, fmt.Errorf("cgroup driver systemd: %w (without systemd set cgroup-driver to cgroupfs)", errors.Join(errs...))
}

// job makes a call that starts a job and waits for the job's end.
func job(c *dbus.Conn, member string, body *dbus.Body) error {
	r, err := c.Call(systemdName, systemdPath, systemdManager, member, body)
	if err != nil {
		return err
	}
	path := r.String()
	if r.Err() != nil {
		return r.Err()
	}
	for {
		s, err := c.Signal()
		if err != nil {
			return fmt.Errorf("wait for systemd: %w", err)
		}
		if s.Member != "JobRemoved" {
			continue
		}
		s.Body.Uint32()
		if s.Body.String() != path {
			continue
		}
		_ = s.Body.String() // the unit
		if result := s.Body.String(); result != "done" {
			return fmt.Errorf("systemd's job ended with %q", result)
		}
		return nil
	}
}

// call makes a call that is answered at once.
func call(c *dbus.Conn, member string, body *dbus.Body) error {
	_, err := c.Call(systemdName, systemdPath, systemdManager, member, body)
	return err
}

// isError reports whether systemd answered with the error of that name.
func isError(err error, name string) bool {
	var e *dbus.Error
	return errors.As(err, &e) && e.Name == systemdName+"."+name
}

func (s *systemd) Create(res *specs.LinuxResources) error {
	c, err := systemdConn()
	if err != nil {
		return err
	}
	defer c.Close()
	pid, err := s.standIn()
	if err != nil {
		return fmt.Errorf("make %s: %w", s.place.Unit, err)
	}
	props := append([]dbus.Property{
		{Name: "Description", Value: "conex container " + strings.TrimSuffix(s.place.Unit, ".scope")},
		{Name: "Slice", Value: s.place.Slice},
		{Name: "PIDs", Value: []uint32{uint32(pid)}},
		{Name: "DefaultDependencies", Value: false}, // conex stops containers, at a shutdown too
		{Name: "CollectMode", Value: "inactive-or-failed"},
		s.delegation(),
	}, s.properties(res)...)
	if err = s.startUnit(c, props); err == nil {
		err = s.Manager.Create(res)
	}
	if err == nil {
		err = s.watchMemory()
	}
	if err != nil {
		err = fmt.Errorf("make %s: %w", s.place.Unit, err)
		s.Started()
		if serr := stopUnit(c, s.place.Unit); serr != nil {
			err = errors.Join(err, serr)
		}
		err = errors.Join(err, s.Manager.Delete())
	}
	return err
}

// delegation asks for the controllers. On v1 devices are not among them: systemd would open all at each of its reloads.
func (s *systemd) delegation() dbus.Property {
	if Unified() {
		return dbus.Property{Name: "Delegate", Value: true}
	}
	return dbus.Property{Name: "DelegateControllers", Value: []string{"cpu", "cpuacct", "memory", "pids", "blkio"}}
}

// startUnit makes the scope. One of that name may still be ending: its processes are gone.
func (s *systemd) startUnit(c *dbus.Conn, props []dbus.Property) error {
	for try := 0; ; try++ {
		err := job(c, "StartTransientUnit", new(dbus.Body).String(s.place.Unit).String("replace").Properties(props).NoUnits())
		if !isError(err, "UnitExists") || try == 3 {
			return err
		}
		if err := stopUnit(c, s.place.Unit); err != nil {
			return err
		}
	}
}

// stopUnit ends a scope and forgets how it ended. One that isn't there is no error.
func stopUnit(c *dbus.Conn, unit string) error {
	err := job(c, "StopUnit", new(dbus.Body).String(unit).String("replace"))
	if err == nil {
		err = call(c, "ResetFailedUnit", new(dbus.Body).String(unit))
	}
	if isError(err, "NoSuchUnit") {
		return nil
	}
	return err
}

// properties are the limits that systemd has words for, so that what it writes at a reload is what we wrote.
func (s *systemd) properties(res *specs.LinuxResources) []dbus.Property {
	var l []dbus.Property
	if res == nil {
		return nil
	}
	add := func(name string, v any) { l = append(l, dbus.Property{Name: name, Value: v}) }
	orInfinity := func(n int64) uint64 {
		if n < 0 {
			return ^uint64(0)
		}
		return uint64(n)
	}
	v2 := Unified()
	if m := res.Memory; m != nil {
		if set(m.Limit) {
			if v2 {
				add("MemoryMax", orInfinity(*m.Limit))
			} else {
				add("MemoryLimit", orInfinity(*m.Limit))
			}
		}
		if v2 && set(m.Swap) && (*m.Swap < 0 || set(m.Limit) && *m.Swap >= *m.Limit) {
			n := int64(-1)
			if *m.Swap > 0 {
				n = *m.Swap - *m.Limit
			}
			add("MemorySwapMax", orInfinity(n))
		}
		if v2 && set(m.Reservation) {
			add("MemoryLow", orInfinity(*m.Reservation))
		}
	}
	if c := res.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			if v2 {
				add("CPUWeight", weight(*c.Shares))
			} else {
				add("CPUShares", *c.Shares)
			}
		}
		if c.Quota != nil && *c.Quota != 0 {
			period := uint64(100000)
			if c.Period != nil && *c.Period != 0 {
				period = *c.Period
			}
			perSec := ^uint64(0)
			if *c.Quota > 0 {
				// systemd counts in whole percents of a processor.
				perSec = (uint64(*c.Quota)*1000000/period + 9999) / 10000 * 10000
			}
			add("CPUQuotaPerSecUSec", perSec)
		}
	}
	if c := res.CPU; c != nil && v2 {
		for name, list := range map[string]string{"AllowedCPUs": c.Cpus, "AllowedMemoryNodes": c.Mems} {
			if mask := bitmask(list); mask != nil {
				add(name, mask)
			}
		}
	}
	if p := res.Pids; p != nil && p.Limit != nil {
		n := *p.Limit
		if n == 0 {
			n = -1
		}
		add("TasksMax", orInfinity(n))
	}
	if b := res.BlockIO; b != nil && b.Weight != nil && *b.Weight != 0 && v2 {
		add("IOWeight", ioWeight(*b.Weight))
	}
	return l
}

// bitmask is a list of numbers as systemd takes it: one bit each, the lowest first. Nil for none.
func bitmask(list string) []byte {
	set, err := parseList(list)
	if err != nil {
		return nil // the kernel says what is wrong with it
	}
	var mask []byte
	for n := range set {
		for len(mask) <= n/8 {
			mask = append(mask, 0)
		}
		mask[n/8] |= 1 << (n % 8)
	}
	return mask
}

func (s *systemd) Update(res *specs.LinuxResources) error {
	// The kernel first: it may refuse.
	if err := s.Manager.Update(res); err != nil {
		return err
	}
	props := s.properties(res)
	if len(props) == 0 {
		return nil
	}
	c, err := systemdConn()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := call(c, "SetUnitProperties", new(dbus.Body).String(s.place.Unit).Bool(true).Properties(props)); err != nil {
		return fmt.Errorf("change %s: %w", s.place.Unit, err)
	}
	// systemd rounds what it writes.
	return s.Manager.Update(res)
}

// watchMemory remembers what the kernel killed for lack of memory: systemd removes a scope as soon as its last process has ended, before
// anybody can have asked. On v1 it leaves the controller's folder to us.
func (s *systemd) watchMemory() error {
	v, ok := s.Manager.(*v2)
	if !ok {
		return nil
	}
	w, err := inotify.New(v.unified.dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.watch = w
	s.mu.Unlock()
	go func() { // ends with the folder, at the latest when Delete closes the watch
		for {
			if ended, err := w.Wait(context.Background(), nil); ended || err != nil {
				return
			}
			if n, err := v.OOMKills(); err != nil || n == 0 {
				continue
			}
			if st, err := v.Stats(); err == nil && st.Memory.OOMKills > 0 {
				s.mu.Lock()
				s.last = st.Memory
				s.mu.Unlock()
			}
		}
	}()
	return nil
}

func (s *systemd) OOMKills() (uint64, error) {
	n, err := s.Manager.OOMKills()
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(n, s.last.OOMKills), err
}

func (s *systemd) Stats() (Stats, error) {
	st, err := s.Manager.Stats()
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.Memory.OOMKills < s.last.OOMKills {
		st.Memory = s.last
	}
	return st, err
}

// Started lets the child that stood in go.
func (s *systemd) Started() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hold == nil {
		return
	}
	s.hold.Close()
	s.wait()
	s.hold, s.wait = nil, nil
}

func (s *systemd) Delete() error {
	s.Started()
	s.mu.Lock()
	watch := s.watch
	s.watch = nil
	s.mu.Unlock()
	if watch != nil {
		watch.Close()
	}
	if err := s.Manager.Delete(); err != nil {
		return err
	}
	c, err := systemdConn()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := stopUnit(c, s.place.Unit); err != nil {
		return fmt.Errorf("end %s: %w", s.place.Unit, err)
	}
	return nil
}

// standIn forks a child that does nothing until Started, or until we die.
func (s *systemd) standIn() (pid int, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	var prog nsfork.Program
	buf := make([]byte, 8)
	prog.Call("hold", unix.SYS_DUP3, r, 0, 0)
	prog.CloseOthers(3)
	prog.Ready()
	prog.Call("hold", unix.SYS_READ, 0, buf, 1)
	prog.Exit(0)
	pid, pidfd, err := prog.Start(nsfork.Attr{})
	if err != nil {
		w.Close()
		return 0, err
	}
	pidfd.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold = w
	s.wait = func() {
		var ws unix.WaitStatus
		// It ends by itself, or was killed with the others.
		_, _ = retry(func() (int, error) { return unix.Wait4(pid, &ws, 0, nil) })
	}
	return pid, nil
}
