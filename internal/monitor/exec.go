package monitor

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/http"
	"os"
	"slices"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/disk"
	"conex/internal/linux/caps"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// execution is one further process.
type execution struct {
	id      string
	proc    runtime.Process
	io      *streams
	console *os.File
	outputs []*os.File
}

// execProcess describes a further process: the container's own surroundings with what q changes.
func (r *run) execProcess(q control.ExecRequest) *runtime.ExecConfig {
	base := r.cfg.Spec.Process
	conf := *r.m.rec.Config
	conf.Tty = q.Tty
	p := &specs.Process{
		Args: q.Cmd, Env: mergeEnv(environment(&conf, conf.Hostname), q.Env), Cwd: cmp.Or(q.WorkingDir, base.Cwd),
		Terminal: q.Tty, Capabilities: base.Capabilities, NoNewPrivileges: base.NoNewPrivileges, Rlimits: base.Rlimits,
		OOMScoreAdj: base.OOMScoreAdj, ApparmorProfile: base.ApparmorProfile,
	}
	p.User.Umask = base.User.Umask
	if q.Rows > 0 && q.Cols > 0 {
		p.ConsoleSize = &specs.Box{Height: uint(q.Rows), Width: uint(q.Cols)}
	}
	if q.Privileged { // capabilities alone: the container's seccomp filter stays, as with Docker
		c := caps.All()
		p.Capabilities = &specs.LinuxCapabilities{Bounding: c, Permitted: c, Effective: c, Inheritable: c}
	}
	return &runtime.ExecConfig{
		Process: p, User: cmp.Or(q.User, r.m.rec.Config.User), GroupAdd: r.m.rec.HostConfig.GroupAdd,
	}
}

// exec starts a further process. Its output goes nowhere until clients attach to x.io, which they do in ready.
func (r *run) exec(ctx context.Context, q control.ExecRequest, ready func(x *execution) error) (*execution, error) {
	if len(q.Cmd) == 0 {
		return nil, &control.Error{Status: http.StatusBadRequest, Message: "No exec command specified"}
	}
	cfg := r.execProcess(q)
	var err error
	x := &execution{id: disk.RandomID(), io: &streams{calm: r.m.calm, writers: &r.m.writers}}
	var pipes stdio
	if !q.Tty {
		if pipes, err = newStdio(q.Stdin); err != nil {
			return nil, err
		}
		defer pipes.closeChild()
		cfg.Stdio = pipes.child
		x.outputs = pipes.parent[1:]
		if pipes.parent[0] != nil {
			x.io.setStdin(pipes.parent[0])
		}
	}
	r.freezing.gate.RLock() // waits while the container is frozen
	x.proc, err = r.ct.Exec(ctx, cfg)
	r.freezing.gate.RUnlock()
	if err != nil {
		x.close()
		return nil, err
	}
	x.console = x.proc.Console()
	if err := r.track(x, true); err != nil {
		complain("record exec", err)
	}
	// The head of the answer goes out before any output does.
	rerr := ready(x)
	if q.Tty {
		x.io.setStdin(keepOpen{x.console})
		x.io.pump(control.FrameStdout, x.console)
	} else {
		x.io.pump(control.FrameStdout, pipes.parent[1])
		x.io.pump(control.FrameStderr, pipes.parent[2])
	}
	if rerr != nil {
		complain("attach to exec", rerr) // the process runs on, as when its client dies later
	}
	return x, nil
}

// track adds an exec to the state or takes it out.
func (r *run) track(x *execution, add bool) error {
	r.mu.Lock()
	if add {
		r.execs[x.id] = x
	} else {
		delete(r.execs, x.id)
	}
	r.mu.Unlock()
	// The list is read where it is written, under the state's lock: else of two that end at once the earlier list could win.
	return r.m.setState(func(s *container.State) {
		if s.Status != container.Running {
			return
		}
		r.mu.Lock()
		s.ExecIDs = slices.Sorted(maps.Keys(r.execs))
		r.mu.Unlock()
	})
}

func (r *run) execution(id string) *execution {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.execs[id]
}

// wait returns when the process has ended and what it wrote has been passed on.
func (x *execution) wait() container.Exit {
	status, err := x.proc.Wait()
	e := container.Exit{Code: status.Code, Signal: int(status.Signal), Finished: time.Now().UTC()}
	if err != nil {
		e.Code, e.Error = 125, err.Error()
	}
	x.io.loosen()
	// A child that it left behind in the container may hold the streams: Docker waits for it no longer than this either.
	drained := make(chan struct{})
	go func() { // ends when the sources are closed, below
		x.io.pumps.Wait()
		close(drained)
	}()
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	select {
	case <-drained:
	case <-t.C:
	}
	x.close()
	<-drained
	return e
}

func (x *execution) close() {
	for _, f := range x.outputs {
		f.Close()
	}
	if x.console != nil {
		x.console.Close()
	}
	x.io.closeStdin()
}

// execError gives an error of Exec the words and codes of Docker's.
func execError(err error) error {
	var ee *runtime.ExecError
	if errors.As(err, &ee) {
		return &control.Error{Status: http.StatusBadRequest, Message: "OCI runtime exec failed: " + err.Error(), ExitCode: ee.ExitCode()}
	}
	var ce *control.Error
	if errors.As(err, &ce) {
		return err
	}
	// Whatever else keeps a command from running, an unknown user above all, is "can't be invoked".
	return &control.Error{Status: http.StatusBadRequest, Message: err.Error(), ExitCode: 126}
}
