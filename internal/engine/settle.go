package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"conex/internal/build"
	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/disk"
	"conex/internal/linux/cgroup"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
)

// snapshot finds a container by name, id or the beginning of an id, settles it if its monitor is dead, and reads all about it.
func (e *Engine) snapshot(ctx context.Context, name string) (*container.Snapshot, error) {
	cs := e.Containers()
	id, err := cs.Resolve(name)
	if err != nil {
		return nil, classify(err)
	}
	if err := e.settleOne(ctx, id); err != nil {
		return nil, err
	}
	n, err := cs.Snapshot(id)
	if errors.Is(err, container.ErrNotFound) {
		return nil, classify(&container.NotFoundError{Name: name})
	}
	return n, err
}

// Settle cleans up after every monitor that died: kills what is left of its container, records the end, gives address and ports
// back, and starts the container again when its restart policy wants it. For a container whose monitor lives it costs one read and
// one try of a lock. The RUN steps of builds that died are ended too.
func (e *Engine) Settle(ctx context.Context) error {
	ids, err := e.Containers().ListRun()
	if err != nil {
		return err
	}
	errs := make([]error, len(ids), len(ids)+1)
	each(len(ids), func(i int) { errs[i] = e.settleOne(ctx, ids[i]) })
	errs = append(errs, build.Settle(ctx, e.cfg.State, e.Networks()), e.Volumes().Settle())
	return errors.Join(errs...)
}

// settleOne is Settle for one container.
func (e *Engine) settleOne(ctx context.Context, id string) error {
	cs := e.Containers()
	st, err := cs.State(id)
	if err != nil {
		return err
	}
	if st == nil {
		// An ended container that may be started again, or what a killed rm left.
		if _, err := os.Lstat(cs.Dir(id)); err == nil || !errors.Is(err, os.ErrNotExist) {
			return err
		}
		st = &container.State{}
	}
	l, err := cs.Lock(id)
	if errors.Is(err, container.ErrBusy) {
		return nil // its monitor lives, or somebody settles it
	}
	if err != nil {
		return err
	}
	ran := st.Status == container.Running || st.Status == container.Restarting
	err = e.settleLocked(ctx, id)
	// Removed since our first look, folder and all: then our lock has made the folder again.
	if _, lerr := cs.Load(id); err == nil && errors.Is(lerr, container.ErrNotFound) {
		err = cs.RemoveRun(id)
	}
	l.Release()
	if err != nil || !ran {
		return err
	}
	return e.revive(ctx, id, nil)
}

// settleGone is settleOne for who has found nobody at the monitor's socket, whatever the container's state says. The kernel takes a dead process's
// files from it one after the other, and a busy machine a dying one's time: its socket is closed and its lock is held. One that ends closes
// its socket before it says so. So this returns when the state says that the container does not run, or a monitor says that it does.
func (e *Engine) settleGone(ctx context.Context, id string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if err := e.settleOne(ctx, id); err != nil {
			return err
		}
		st, err := e.Containers().State(id)
		if n := (&container.Snapshot{State: st}); err != nil || !n.Stoppable() {
			return err
		}
		if err := e.client(id).Ping(ctx); !errors.Is(err, control.ErrGone) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// settleLocked is settleOne for who holds the monitor lock; it starts nothing again. Idempotent.
func (e *Engine) settleLocked(ctx context.Context, id string) error {
	cs := e.Containers()
	st, err := cs.State(id)
	if st == nil || err != nil {
		return err
	}
	if st.Cgroup != "" {
		if err := killCgroup(st.Cgroup); err != nil {
			return fmt.Errorf("settle container %s: %w", id[:12], err)
		}
	}
	if err := runtime.ForgetExternal(filepath.Join(e.cfg.State, "oci"), id); err != nil {
		return fmt.Errorf("settle container %s: %w", id[:12], err)
	}
	// Nor does anybody use its volumes, if it was the last.
	if err := e.Volumes().Settle(); err != nil {
		return fmt.Errorf("settle container %s: %w", id[:12], err)
	}
	// Nobody uses the address any more.
	if err := e.Networks().Detach(ctx, id); err != nil {
		return fmt.Errorf("settle container %s: %w", id[:12], err)
	}
	rec, err := cs.Load(id)
	if err != nil && !errors.Is(err, container.ErrNotFound) {
		return err
	}
	if rec != nil && st.Status != container.Exited && st.Monitor != 0 { // no monitor: created by a client that died (see create)
		err := cs.SetExit(rec, deathOf(st))
		if errors.Is(err, syscall.ENOSPC) && !st.AutoRemove {
			// The state folder is another disk: it says the end until this one has room.
			x, last := deathOf(st), *st
			last.Status, last.Pid, last.Endpoints, last.Health, last.ExecIDs, last.Exit = container.Exited, 0, nil, nil, nil, &x
			return cs.SetState(id, &last)
		}
		if err != nil {
			return err
		}
		e.event(rec, "die", deathOf(st).Attributes())
	}
	if rec != nil && st.Status == container.Exited && st.Exit != nil && !st.AutoRemove {
		if err := cs.SetExit(rec, *st.Exit); err != nil {
			if errors.Is(err, syscall.ENOSPC) {
				return nil // still no room
			}
			return err
		}
	}
	if st.AutoRemove {
		trash, err := cs.Remove(id)
		if err != nil {
			return err
		}
		errs := []error{}
		if trash != "" {
			errs = append(errs, os.RemoveAll(trash))
			if rec != nil {
				e.event(rec, "destroy", nil)
			}
		}
		errs = append(errs, e.removeAnonymous(ctx, st.Anonymous))
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	if err := os.Remove(cs.RunDir(id, "sock")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// Last: until here the next settler would find it again.
	if st.AutoRemove {
		return cs.RemoveRun(id)
	}
	return cs.ClearState(id)
}

// killCgroup ends every process in a cgroup and removes it.
func killCgroup(path string) error {
	cg, err := cgroup.New(strings.TrimPrefix(path, "/"))
	if err != nil {
		return err
	}
	if err := cg.Kill(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		return err
	}
	if err := cg.Delete(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		return err
	}
	return nil
}

// deathOf is the end of a container whose monitor left this state behind.
func deathOf(st *container.State) container.Exit {
	if st.Status == container.Restarting && st.Exit != nil {
		return *st.Exit // it was not running: its last end stands
	}
	x := container.Exit{
		Code: 128 + int(syscall.SIGKILL), Signal: int(syscall.SIGKILL), Error: container.MonitorDied, Started: st.Started,
		Finished: time.Now().UTC(), Restarts: st.Restarts,
	}
	switch {
	case st.BootID != disk.BootID():
		x.Code, x.Signal, x.Error = container.LostCode, 0, container.Rebooted
	case st.Status == container.Starting:
		x.Code, x.Signal, x.Error = 125, 0, "monitor died before the command ran"
	}
	return x
}

// revive starts a container again whose monitor died, if it should run; before it those that it needs, which may have died with it. The ids in
// waiting are of those that need this one.
func (e *Engine) revive(ctx context.Context, id string, waiting []string) error {
	n, err := e.Containers().Snapshot(id)
	if errors.Is(err, container.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if n.Alive() != nil || !n.Desired.Running || n.Desired.Stopped || !revivable(n) {
		return nil
	}
	waiting = append(waiting, id)
	for _, owner := range owners(n.Record) {
		if slices.Contains(waiting, owner) {
			continue // a record that somebody has edited
		}
		err := e.settleGone(ctx, owner)
		if err == nil {
			err = e.revive(ctx, owner, waiting) // or waits for whoever does
		}
		if err != nil {
			return err
		}
	}
	mon := startMonitor()
	mon.restarts = 1
	if n.Exit != nil {
		mon.restarts = n.Exit.Restarts + 1
	}
	if _, err := e.launch(ctx, n.Record, nil, mon, attachment{}, &Streams{}); err != nil && !errors.Is(err, container.ErrBusy) {
		return fmt.Errorf("start container %s again: %w", n.Record.Name, err)
	}
	return nil
}

// revivable reports whether the restart policy answers a death from outside.
func revivable(n *container.Snapshot) bool {
	switch p := n.Record.HostConfig.RestartPolicy; p.Name {
	case apic.RestartPolicyAlways, apic.RestartPolicyUnlessStopped:
		return true
	case apic.RestartPolicyOnFailure:
		return p.MaximumRetryCount == 0 || n.Exit == nil || n.Exit.Restarts < p.MaximumRetryCount
	default:
		return false
	}
}
