// Package monitor is the process that owns one running container: its standard streams, log, exit status, restarts, health
// checks, network endpoint and published ports.
//
// The engine executes conex's own binary under the name conex-monitor; Takeover in this package's init makes that a monitor
// before the command line and everything else heavy initialises. Files of the process: see package control.
//
//	engine: StartRequest ->  stdin
//	                         read the record, reserve ports, Create, join the network, Start
//	engine: one line     <-  Report
//	clients              <-> sock, and the socket pair of the client that was attached from the start
//	                         the process ends: exit.json, ports, address and volumes freed, with --rm everything removed
//	clients              <-  the end frame
//	                         cgroup, mounts and trash are cleaned up; the lock goes with the process
package monitor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	goruntime "runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/disk"
	"conex/internal/initstage"
	"conex/internal/linux/cgroup"
	"conex/internal/linux/mount"
	"conex/internal/network"
	"conex/internal/plainjson"
	"conex/internal/portmap"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

func init() { initstage.Takeover(control.Name, Main) }

// monitor is one container's monitor.
type monitor struct {
	req   control.StartRequest
	root  *disk.Root
	store *container.Store
	rec   *container.Record // as it was at the start; current has its limits and restart policy of now
	place cgroup.Place
	nets  *network.Manager
	rt    runtime.Runtime
	log   *logWriter // open while the container runs
	sock  net.Listener
	lock  *disk.Lock
	first *os.File // of the client that is attached from the start, until it is one
	trash string   // what remove left to delete
	// volumesLeft says that remove could not delete all volumes that it was to.
	volumesLeft bool
	kept        bool // the end could not be written to the disk: the state stays, and says it
	// writers are the goroutines that still write to clients.
	writers sync.WaitGroup

	// changes is held while the container is started, while its limits or networks are changed, and while its networks are released.
	changes sync.Mutex
	watched bool // watch has begun; under changes

	mu    sync.Mutex
	state container.State
	host  *apic.HostConfig // the record's as it was changed since, nil before that
	// networks are the record's as they were changed since, nil before that.
	networks *[]container.Attachment
	egress   *[]string     // likewise
	run      *run          // the present run; nil between runs
	up       chan struct{} // closed when the run that begins next, or the present one, is there; another after each restart
	// starting ends by abort, when somebody who stops the container has waited long enough for a start that does not come to its end.
	starting context.Context
	abort    context.CancelCauseFunc
	// stop is closed when no further run must be started.
	stop     chan struct{}
	stopped  bool // stop is closed
	byHand   bool // a user did it
	again    bool // the failed health check wants another run
	next     chan struct{}
	lastExit container.Exit
	backoff  time.Duration // the last pause; used by main alone
	// idle calls rest some time after the last start or exec, which need more memory than waiting does; worked says that there was more than
	// the first start.
	idle   *time.Timer
	worked atomic.Bool
	named  named         // the record as events show it
	final  chan struct{} // closed when the last run's end is recorded
}

// idleAfter is when the monitor has calmed down: late enough for a container that only runs a moment never to pay for it.
const idleAfter = time.Second

// idlePercent is the collector's GOGC from then on: it begins at 2 MB, above what a start takes. Until then it is what the engine set.
const idlePercent = 50

// Main runs a monitor and returns its exit code. The process has been prepared as package control describes.
func Main() int {
	goruntime.MemProfileRate = 0 // each sample dirties another page of a table of 1.4 MB
	// Whoever started us may have a stricter one; the container's processes inherit it.
	unix.Umask(0o022)
	unix.CloseOnExec(control.SelfFD)
	// A copy, since what stands at 0 is inherited; 0 stays taken, lest a file of ours gets the number.
	fd, err := unix.FcntlInt(control.RequestFD, unix.F_DUPFD_CLOEXEC, control.SelfFD+1)
	if err != nil {
		return 1
	}
	report := os.NewFile(uintptr(fd), "report")
	self := os.NewFile(control.SelfFD, "self")
	if err := mount.ForbidExecution(self); err != nil {
		reply(report, control.Report{Error: fmt.Sprintf("forbid execution of the monitor: %v", err), ExitCode: 125})
		return 1
	}
	self.Close()
	// What ps and the kernel's messages call us; executed through a descriptor, we would be called by its number.
	if err := os.WriteFile("/proc/self/comm", []byte(control.Name), 0); err != nil {
		complain("set own name", err)
	}
	m, err := open(fd)
	if errors.Is(err, control.ErrNotNeeded) {
		return 0
	}
	if err != nil {
		reply(report, control.Report{Error: err.Error(), ExitCode: 125})
		return 1
	}
	err = m.main(report)
	if err != nil {
		complain("monitor", err)
	}
	// The container is done with; only clients that read slowly still have something to come.
	m.lock.Release()
	if !m.rec.HostConfig.AutoRemove {
		if err := m.compressLog(); err != nil && !errors.Is(err, os.ErrNotExist) {
			complain("compress log", err)
		}
	}
	m.writers.Wait()
	if err != nil {
		return 1
	}
	return 0
}

// open waits for the request and reads what it names. The descriptor is used up, but as a way to answer.
func open(fd int) (*monitor, error) {
	m := &monitor{rt: runtime.New(), stop: make(chan struct{}), up: make(chan struct{}), next: make(chan struct{}), final: make(chan struct{})}
	m.starting, m.abort = context.WithCancelCause(context.Background())
	warmUp()
	req, files, err := control.ReceiveStart(fd)
	if err != nil {
		return nil, err
	}
	m.req, m.lock = req, disk.Handed(files[0])
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	defer files[1].Close()
	for std, f := range []*os.File{null, files[1], files[1]} {
		if err := unix.Dup3(int(f.Fd()), std, 0); err != nil {
			return nil, err
		}
	}
	if req.Attach {
		m.first = files[2]
	}
	if req.Runtime != "" {
		m.rt = runtime.NewExternal(req.Runtime, req.State+"/oci")
	}
	rename(req.ID)
	if m.root, err = disk.OpenRoot(m.req.Root); err != nil {
		return nil, err
	}
	m.store = container.Open(m.root, m.req.State)
	if m.named.file, err = os.Stat(m.store.Dir(m.req.ID, "config.json")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err // without one, Load says which container is missing
	}
	if m.rec, err = m.store.Load(m.req.ID); err != nil {
		return nil, err
	}
	m.named.rec = m.rec
	if m.place, err = cgroup.ForContainer(m.rec.ID, m.rec.HostConfig.CgroupParent, m.req.SystemdCgroup); err != nil {
		return nil, err
	}
	m.nets = network.Open(m.root, m.req.State)
	m.nets.KeepSocket()
	m.idle = time.AfterFunc(idleAfter, m.rest)
	m.state = container.State{
		Status: container.Starting, BootID: disk.BootID(), Monitor: os.Getpid(), Restarts: m.req.Restarts,
		Cgroup: "/" + m.place.Path, AutoRemove: m.rec.HostConfig.AutoRemove, Anonymous: m.rec.Anonymous,
	}
	return m, nil
}

// main is the monitor's life. An error is one that nobody else was told.
func (m *monitor) main(report *os.File) error {
	// From here on a settler finds what we leave behind.
	if err := m.store.SetState(m.rec.ID, &m.state); err != nil {
		reply(report, control.Report{Error: err.Error(), ExitCode: 125})
		return nil
	}
	// The terminal and the session of whoever started us are not ours; SIGTERM comes from a machine that shuts down.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTTOU, unix.SIGTTIN)
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() { // ends with the process
		<-term
		m.shutdown()
	}()

	var first *client
	if m.req.Attach {
		conn, err := net.FileConn(m.first)
		m.first.Close()
		if err != nil {
			reply(report, control.Report{Error: err.Error(), ExitCode: 125})
			return m.store.ClearState(m.rec.ID)
		}
		first = newClient(conn, true, true)
	}
	srv, err := m.listen()
	if err != nil {
		reply(report, control.Report{Error: err.Error(), ExitCode: 125})
		return m.store.ClearState(m.rec.ID)
	}
	var errs []error
	for n := 0; ; n++ {
		var rep *os.File
		if n == 0 {
			rep = report
		}
		r, err := m.start(first)
		if err != nil {
			errs = append(errs, m.failed(err, rep, first, r))
			break
		}
		if rep != nil {
			reply(rep, control.Report{Pid: r.proc.Pid()})
			first = nil
			m.idle.Reset(idleAfter)
		}
		e := r.wait()
		delay, again := m.decide(e)
		if again {
			e.Next = time.Now().UTC().Add(delay)
		}
		errs = append(errs, m.ended(r, e, again))
		if again {
			errs = append(errs, r.clean())
			if m.pause(delay) {
				continue
			}
			errs = append(errs, m.settled(nil, m.lastExit))
		} else {
			errs = append(errs, r.clean())
		}
		break
	}
	srv.close()
	errs = append(errs, m.sweep())
	return errors.Join(errs...)
}

// calm is called after work that took memory.
func (m *monitor) calm() {
	m.worked.Store(true)
	m.idle.Reset(idleAfter)
}

// rest gives back to the machine what a monitor that waits doesn't need. After a start alone it lets the collector be: a cycle makes two lists of
// 8 KB for each size that there is anything of, half a megabyte in all, which is more than the garbage of a start.
func (m *monitor) rest() {
	debug.SetGCPercent(idlePercent)
	if m.worked.Load() {
		debug.FreeOSMemory()
	}
}

// pause waits before a restart; false when a stop came.
func (m *monitor) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		select {
		case <-m.stop:
			return false
		default:
			return true
		}
	case <-m.stop:
		return false
	}
}

// setState changes state.json by fn.
func (m *monitor) setState(fn func(*container.State)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fn(&m.state)
	return m.store.SetState(m.rec.ID, &m.state)
}

// present returns the present run, nil when the container does not run.
func (m *monitor) present() *run {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run
}

// failed records a start that did not come off. r is what there was of the run, nil if nothing.
func (m *monitor) failed(cause error, report *os.File, first *client, r *run) error {
	// The command line's code is 125 and what `inspect` shows 128, as Docker has it.
	code, exit := 125, 128
	var ee *runtime.ExecError
	if errors.As(cause, &ee) {
		code = ee.ExitCode()
		exit = code
	}
	e := container.Exit{Code: exit, Error: cause.Error(), Unstarted: true, Finished: time.Now().UTC(), Restarts: m.state.Restarts}
	var errs []error
	if last, err := m.store.Exit(m.rec.ID); err != nil {
		errs = append(errs, err)
	} else if last != nil {
		e.Started = last.Started // the container has run before
	}
	if r != nil {
		errs = append(errs, r.release(), r.clean(), m.closeLog())
		m.disconnected(r)
	}
	errs = append(errs, m.settled(nil, e))
	if first != nil {
		first.abandon()
	}
	if report != nil {
		reply(report, control.Report{Error: cause.Error(), ExitCode: code, PortTaken: errors.Is(cause, portmap.ErrPortTaken)})
	} else {
		complain("restart", cause)
	}
	return errors.Join(errs...)
}

// ended does what must be done before anybody hears that the run is over: ports, address and volumes are free, the exit is recorded, and
// a container that is to be removed has lost its name and folder.
func (m *monitor) ended(r *run, e container.Exit, again bool) error {
	errs := []error{r.release()}
	// A prune passes by what somebody uses. Where the process ids are others' too, there may be processes left until clean.
	if pids := m.rec.HostConfig.PidMode; !pids.IsHost() && !pids.IsContainer() {
		errs = append(errs, r.leaveVolumes())
	}
	m.event("die", e.Attributes())
	m.disconnected(r)
	if again {
		errs = append(errs, m.store.SetExit(m.rec, e), m.setState(func(s *container.State) {
			s.Status, s.Pid, s.Endpoints, s.Health, s.Exit, s.ExecIDs = container.Restarting, 0, nil, nil, &e, nil
			s.Restarts++
		}))
		m.mu.Lock()
		m.run, m.lastExit = nil, e
		next := m.next
		m.next, m.up = make(chan struct{}), make(chan struct{})
		m.mu.Unlock()
		close(next)
		r.io.finish(e)
		return errors.Join(errs...)
	}
	errs = append(errs, m.settled(r, e))
	return errors.Join(errs...)
}

// settled records the final end and tells everybody.
func (m *monitor) settled(r *run, e container.Exit) error {
	var errs []error
	e.Next = time.Time{}
	m.mu.Lock()
	d := container.Desired{Stopped: m.byHand}
	// A monitor that was told to end because the machine goes down leaves the wish to run: reconcile will fulfil it.
	d.Running = m.stopped && !m.byHand
	asBefore := e.Unstarted && !m.stopped
	m.mu.Unlock()
	if asBefore { // a start that fails for now, at boot perhaps, is tried again by reconcile if it would have been before
		var err error
		if d, err = m.store.Desired(m.rec.ID); err != nil {
			errs = append(errs, err)
		}
	}
	if !m.rec.HostConfig.AutoRemove {
		err := errors.Join(m.store.SetExit(m.rec, e), m.store.SetDesired(m.rec, d))
		m.kept = err != nil
		errs = append(errs, err)
	} else {
		errs = append(errs, m.remove(r))
	}
	// Nobody new: whoever comes later reads exit.json.
	if m.sock != nil {
		m.sock.Close()
		os.Remove(m.store.RunDir(m.rec.ID, "sock"))
	}
	errs = append(errs, m.setState(func(s *container.State) {
		s.Status, s.Pid, s.Endpoints, s.Health, s.ExecIDs = container.Exited, 0, nil, nil, nil
		if m.kept {
			s.Exit = &e
		}
	}))
	m.mu.Lock()
	m.run, m.lastExit = nil, e
	close(m.next)
	close(m.final)
	m.mu.Unlock()
	if r != nil {
		r.io.finish(e)
	}
	return errors.Join(errs...)
}

// sweep removes what is left when everybody has been told.
func (m *monitor) sweep() error {
	var errs []error
	if m.kept {
		return nil // a settler writes it down when the disk has room
	}
	if !m.rec.HostConfig.AutoRemove {
		return errors.Join(append(errs, m.store.ClearState(m.rec.ID))...)
	}
	errs = append(errs, m.removeRest())
	if err := errors.Join(errs...); err != nil {
		return err // state.json stays, for a settler to finish it
	}
	return m.store.RemoveRun(m.rec.ID)
}

// shutdown ends the container without marking it as stopped by hand.
func (m *monitor) shutdown() {
	m.halt(false)
	if r := m.begun(time.Duration(m.rec.StopTimeout()) * time.Second); r != nil {
		r.endedBy(&container.Ender{Command: container.ByShutdown, Signal: int(m.rec.StopSignal()), Timeout: m.rec.StopTimeout(), Time: time.Now().UTC()})
		r.terminate(m.rec.StopSignal(), time.Duration(m.rec.StopTimeout())*time.Second)
	}
}

// halt makes the present run the last.
func (m *monitor) halt(byHand bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.byHand = m.byHand || byHand
	if !m.stopped {
		m.stopped = true
		close(m.stop)
	}
}

var errStopped = errors.New("no end before the container was stopped")

// begun returns the present run or the one that is being started, for who has made it the last or wants it only if the start is under way; nil when
// there is none any more. After patience (negative: never) it gives up the start, which an external runtime may hold up.
func (m *monitor) begun(patience time.Duration) *run {
	m.mu.Lock()
	r, up := m.run, m.up
	m.mu.Unlock()
	if r != nil {
		return r
	}
	if patience >= 0 {
		defer time.AfterFunc(patience, func() { m.abort(errStopped) }).Stop()
	}
	select {
	case <-up:
		return m.present()
	case <-m.final:
		return nil
	}
}

// reply writes the report and closes the pipe. Whoever wanted it may be gone, then the container goes on all the same.
func reply(f *os.File, r control.Report) {
	b, err := plainjson.Marshal(r)
	if err == nil {
		_, err = f.Write(append(b, '\n'))
	}
	if err != nil && !errors.Is(err, syscall.EPIPE) {
		complain("report", err)
	}
	f.Close()
}

// complain writes to the monitor's own log, c/<id>/monitor.log.
func complain(what string, err error) {
	fmt.Fprintf(os.Stderr, "%s %s: %v\n", time.Now().UTC().Format(time.RFC3339), what, err)
}
