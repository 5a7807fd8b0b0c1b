package monitor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/network"
	"conex/internal/portmap"
	"conex/internal/runtime"
	"conex/internal/volume"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// drainTimeout is how long the end of a run waits for the rest of the output. The pid namespace's end closes it at once; only a
// process outside (--pid host) can hold it open.
const drainTimeout = 2 * time.Second

// run is one run of the container, from its preparation to its end.
type run struct {
	m    *monitor
	cfg  *runtime.Config
	ct   runtime.Container
	proc runtime.Process
	res  *portmap.Reservation
	eps  []*network.Endpoint // the one with the way out first
	left []*network.Endpoint // eps, once they are released
	gate *gate               // nil without --egress
	// What changes of networks need, under monitor.changes: the folder of the hosts file and the links in it, how many interfaces of each name there
	// were, the ports that were published last, and whether release has been.
	files    string
	links    []link
	numbers  map[string]int
	ports    []portmap.Mapping
	released bool
	names    *nameService // under monitor.changes too, until clean
	io       *streams
	console  *os.File
	volumes  []*volume.Use
	outputs  []*os.File // read ends, closed when the output lasts longer than the process
	started  time.Time
	cleaned  bool // used by main alone
	health   *health
	// freezing keeps the processes still while somebody wants it.
	freezing freezing
	// announcing is held by who sends a signal until its event is written: what the signal does is announced after it.
	announcing sync.Mutex

	mu    sync.Mutex
	execs map[string]*execution
	ender *container.Ender
	last  *container.Ender // who sent the last signal that was not meant to end it
	done  chan struct{}    // closed when the process has ended
}

// endedBy notes who is about to end the run. The first one counts, until somebody kills it outright.
func (r *run) endedBy(by *container.Ender) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ender == nil || by.Signal == int(unix.SIGKILL) && r.ender.Signal != int(unix.SIGKILL) && !r.ender.Forced {
		r.ender = by
	}
}

// signalled notes who sent a signal that need not end the run.
func (r *run) signalled(by *container.Ender) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = by
}

// endedAs returns who ended the run: whoever wanted to, or whoever sent the signal that it died of, as far as its exit code says so.
func (r *run) endedAs(code int) *container.Ender {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ender == nil && r.last != nil && code == 128+r.last.Signal {
		return r.last
	}
	return r.ender
}

// forced notes that the process did not obey whoever wanted to end it.
func (r *run) forced(timeout time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ender != nil && r.ender.Signal != int(unix.SIGKILL) {
		e := *r.ender
		e.Forced, e.Timeout = true, int(timeout/time.Second)
		r.ender = &e
	}
}

// start prepares and executes the container. On an error it returns what exists of the run, for release and clean; nil when
// nothing does.
func (m *monitor) start(first *client) (*run, error) {
	m.changes.Lock()
	defer m.changes.Unlock()
	r := &run{m: m, execs: map[string]*execution{}, done: make(chan struct{})}
	r.freezing.r = r
	ctx := context.Background() // a start is short, and whoever asked for it may leave
	if err := r.reserve(ctx); err != nil {
		return r, err
	}
	joined, err := m.join()
	if err != nil {
		return r, err
	}
	defer joined.close()
	links, err := m.links()
	if err != nil {
		return r, err
	}
	files := joined.files
	if files == "" {
		files = m.store.Dir(m.rec.ID, "files")
		if err := m.writeFiles(files, nil, links); err != nil {
			return r, err
		}
	}
	if err := makeSources(m.rec); err != nil {
		return r, err
	}
	from, err := r.sources()
	if err != nil {
		return r, err
	}
	cfg, err := buildConfig(m.current(), files, m.place, from)
	if err != nil {
		return r, err
	}
	r.cfg = cfg
	for _, l := range links { // the container's own variables stand above them
		cfg.Spec.Process.Env = mergeEnv(l.env(m.rec.Name), cfg.Spec.Process.Env)
	}
	if err := joined.apply(cfg, m.store.RunDir(m.rec.ID, "shm")); err != nil {
		return r, err
	}
	if cfg.RootFS, err = m.rootFS(); err != nil {
		return r, err
	}
	cfg.Scratch = m.store.RunDir(m.rec.ID, "root")
	if err := os.MkdirAll(cfg.Scratch, 0o700); err != nil {
		return r, err
	}
	if e := m.req.Edits; e != nil {
		if err := inject(cfg, e, m.store.RunDir(m.rec.ID, "bundle")); err != nil {
			return r, err
		}
	}
	cfg.SeccompCache = m.req.State + "/seccomp"
	if m.req.Rows > 0 && m.req.Cols > 0 {
		cfg.Spec.Process.ConsoleSize = &specs.Box{Height: uint(m.req.Rows), Width: uint(m.req.Cols)}
	}
	if m.log == nil {
		if m.log, err = m.openLog(); err != nil {
			return r, err
		}
	}
	r.io = &streams{log: m.log.write, calm: m.calm, writers: &m.writers}
	var pipes stdio
	if !m.rec.Config.Tty {
		if pipes, err = newStdio(m.rec.Config.OpenStdin); err != nil {
			return r, err
		}
		defer pipes.closeChild()
		cfg.Stdio = pipes.child
		r.outputs = pipes.parent[1:]
		if pipes.parent[0] != nil {
			r.io.setStdin(pipes.parent[0])
		}
	}
	if r.ct, err = m.rt.Create(m.starting, cfg); err != nil {
		return r, err
	}
	if err := r.connect(ctx, files, links); err != nil {
		return r, err
	}
	if first != nil {
		m.event("attach", nil)
		r.io.attach(first)
		r.io.feed(first, first.conn, m.req.AttachStdin, m.rec.Config.StdinOnce && !m.rec.Config.Tty)
	}
	if r.proc, err = r.ct.Start(m.starting); err != nil {
		return r, err
	}
	r.started = time.Now().UTC()
	if m.rec.Config.Tty {
		r.console = r.proc.Console()
		r.io.setStdin(keepOpen{r.console})
		r.io.pump(control.FrameStdout, r.console)
	} else {
		r.io.pump(control.FrameStdout, pipes.parent[1])
		r.io.pump(control.FrameStderr, pipes.parent[2])
	}
	if err := m.running(r); err != nil {
		return r, errors.Join(err, r.proc.Signal(unix.SIGKILL))
	}
	m.tellLinkers()
	if len(links) > 0 { // one may have begun anew since we looked, and found us starting
		return r, r.relink()
	}
	return r, nil
}

// reserve takes the host's ports, before anything is made: that one is taken is the commonest reason why a start fails.
func (r *run) reserve(ctx context.Context) error {
	ports, err := r.wanted(ctx)
	if err == nil && len(ports) > 0 {
		r.res, err = r.m.nets.Reserve(ctx, ports)
	}
	return err
}

// wanted are the ports that the container is to publish on the networks that it is on.
func (r *run) wanted(ctx context.Context) ([]portmap.Mapping, error) {
	ats := r.m.attachments()
	if len(ats) == 0 {
		return nil, nil
	}
	ports, err := mappings(r.m.current())
	if err == nil {
		err = r.bind(ctx, ats, ports)
	}
	return ports, err
}

// rootFS is what the container's root is mounted from.
func (m *monitor) rootFS() (runtime.RootFS, error) {
	fs := runtime.RootFS{Lower: m.req.Lower, Upper: m.store.Dir(m.rec.ID, "upper"), Work: m.store.Dir(m.rec.ID, "work")}
	if !m.rec.HostConfig.AutoRemove {
		return fs, nil
	}
	// No crash of the machine leaves anything of it, so nothing is synced for it. Overlayfs marks the work folder against a later
	// mount, which could find files cut off by a crash; a restart of ours has seen none.
	fs.Volatile = true
	return fs, os.RemoveAll(filepath.Join(fs.Work, "work", "incompat"))
}

// running records that the process is there.
func (m *monitor) running(r *run) error {
	r.health = newHealth(r)
	if err := m.store.SetDesired(m.rec, container.Desired{Running: true, Since: r.started}); err != nil {
		return err
	}
	m.mu.Lock()
	m.run = r
	m.mu.Unlock()
	err := m.setState(func(s *container.State) {
		s.Status, s.Pid, s.Started, s.Exit = container.Running, r.proc.Pid(), r.started, nil
		s.Endpoints = describe(r.eps)
		if r.health != nil {
			s.Health = &apic.Health{Status: apic.Starting}
		}
	})
	if err != nil {
		return err
	}
	m.event("start", nil)
	if r.health != nil {
		r.health.begin()
	}
	m.mu.Lock()
	close(m.up)
	m.mu.Unlock()
	return nil
}

// wait returns when the process has ended and its output has been passed on.
func (r *run) wait() container.Exit {
	status, err := r.proc.Wait()
	close(r.done)
	r.allAnnounced()
	r.freezing.dropAll(true)
	if r.health != nil {
		r.health.end()
	}
	r.m.mu.Lock()
	checked := r.m.state.Health
	r.m.mu.Unlock()
	e := container.Exit{
		Health: checked,
		Code:   status.Code, Signal: int(status.Signal), Started: r.started, Finished: time.Now().UTC(), Restarts: r.m.state.Restarts,
	}
	if err != nil {
		e.Code, e.Error = 125, err.Error()
	}
	e.By = r.endedAs(e.Code)
	if n, err := r.ct.Cgroup().OOMKills(); err == nil && n > 0 {
		e.OOM = true
		if st, err := r.ct.Cgroup().Stats(); err == nil {
			e.MemoryLimit, e.PeakMemory = st.Memory.Limit, st.Memory.Peak
		}
		r.m.event("oom", nil)
	}
	r.io.loosen()
	drained := make(chan struct{})
	go func() { // ends with the pumps, which closing their sources ends
		r.io.pumps.Wait()
		close(drained)
	}()
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	select {
	case <-drained:
	case <-t.C:
	}
	for _, f := range r.outputs {
		f.Close()
	}
	if r.console != nil {
		r.console.Close()
	}
	<-drained
	// Closing writes the last line if it has no end; whoever hears of the exit may read the log.
	if err := r.m.closeLog(); err != nil {
		complain("close log", err)
	}
	return e
}

// closeLog closes the log between runs.
func (m *monitor) closeLog() error {
	if m.log == nil {
		return nil
	}
	err := m.log.d.Close()
	m.log = nil
	return err
}

// release frees what others may be waiting for: ports, the address. Idempotent.
func (r *run) release() error {
	var errs []error
	r.m.changes.Lock() // nobody connects or disconnects it meanwhile
	defer r.m.changes.Unlock()
	r.released = true
	r.m.unmarkLinks()
	errs = append(errs, r.gate.close())
	if len(r.eps) > 0 || r.numbers != nil { // or one is left that could not be disconnected
		errs = append(errs, r.m.nets.Leave(context.Background(), r.m.rec.ID, r.res))
		r.left, r.eps = r.eps, nil
	} else if r.res != nil {
		errs = append(errs, r.res.Close())
	}
	r.res = nil
	return errors.Join(errs...)
}

// clean removes the cgroup, namespaces and mounts. Idempotent.
func (r *run) clean() error {
	for _, f := range r.outputs {
		f.Close()
	}
	if r.ct == nil || r.cleaned {
		return r.leaveSources()
	}
	r.cleaned = true
	return errors.Join(r.stopNames(), r.ct.Delete(), r.leaveSources())
}

// announced sends a signal and writes its event.
func (r *run) announced(sig unix.Signal) error {
	r.announcing.Lock()
	defer r.announcing.Unlock()
	if err := r.proc.Signal(sig); err != nil {
		return err
	}
	r.m.event("kill", map[string]string{"signal": strconv.Itoa(int(sig))})
	return nil
}

// allAnnounced waits for who is about to announce a signal.
func (r *run) allAnnounced() {
	r.announcing.Lock()
	defer r.announcing.Unlock()
}

// terminate sends sig and, when the process is still there after timeout (negative: for ever), SIGKILL. It returns when the
// process has ended.
func (r *run) terminate(sig unix.Signal, timeout time.Duration) {
	// An error means that it has ended, which the channel says too.
	_ = r.proc.Signal(sig)
	kill := sig == unix.SIGKILL
	r.freezing.dropAll(kill) // v1's freezer lets nobody die before the thaw
	if timeout >= 0 && !kill {
		t := time.NewTimer(timeout)
		defer t.Stop()
		select {
		case <-r.done:
			return
		case <-t.C:
		}
		r.forced(timeout)
		r.m.event("kill", map[string]string{"signal": strconv.Itoa(int(unix.SIGKILL))})
		_ = r.proc.Signal(unix.SIGKILL)
		r.freezing.dropAll(true)
	}
	<-r.done
}

// stdio are the pipes of a process without a terminal. A nil input is /dev/null.
type stdio struct{ parent, child [3]*os.File }

func newStdio(input bool) (s stdio, err error) {
	defer func() {
		if err != nil {
			s.closeChild()
			for _, f := range s.parent {
				if f != nil {
					f.Close()
				}
			}
		}
	}()
	for i := range 3 {
		if i == 0 && !input {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return s, err
		}
		if i == 0 {
			s.child[i], s.parent[i] = r, w
		} else {
			s.child[i], s.parent[i] = w, r
		}
	}
	return s, nil
}

func (s *stdio) closeChild() {
	for _, f := range s.child {
		if f != nil {
			f.Close()
		}
	}
}

// keepOpen is a terminal as input: the end of a client's input is not the terminal's end.
type keepOpen struct{ *os.File }

func (keepOpen) Close() error { return nil }
