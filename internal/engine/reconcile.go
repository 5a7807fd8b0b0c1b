package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"conex/internal/container"
	"conex/internal/control"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sync/errgroup"
)

// atOnce is how many containers start or stop at a time at boot and shutdown.
const (
	startAtOnce = 4
	stopAtOnce  = 64
)

// Reconcile settles what died and starts what should run, after a reboot above all. It returns the names of the containers that it
// started; an error of one does not keep it from the others.
//
// As with Docker: always means also what a user had stopped, unless-stopped does not; on-failure starts what was running.
func (e *Engine) Reconcile(ctx context.Context) (started []string, err error) {
	cs := e.Containers()
	// What a killed process left half deleted is swept by pull, build and import; a machine that only runs containers has us.
	errs := []error{e.Settle(ctx), e.root.Sweep()}
	ids, err := cs.List()
	if err != nil {
		return nil, err
	}
	var start []*container.Record
	for _, id := range ids {
		n, err := cs.Snapshot(id)
		if errors.Is(err, container.ErrNotFound) {
			if cs.Hollow(id) {
				errs = append(errs, e.dropHollow(id))
			}
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if n.Alive() != nil {
			continue
		}
		if n.Record.HostConfig.AutoRemove && n.State == nil && n.Desired.Running && (n.Exit == nil || n.Lost) {
			// It ran when the machine went down, and was not to outlive its run.
			errs = append(errs, e.discard(ctx, n.Record))
			continue
		}
		if n.Lost {
			errs = append(errs, e.recordLoss(n))
		}
		if shouldStart(n) {
			start = append(start, n.Record)
		}
	}
	slices.SortFunc(start, func(a, b *container.Record) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(startAtOnce)
	start = ownersFirst(start)
	tried := map[string]chan struct{}{} // closed when it runs, or can't be made to
	for _, rec := range start {
		var before []chan struct{}
		for _, id := range owners(rec) {
			if c := tried[id]; c != nil {
				before = append(before, c)
			}
		}
		done := make(chan struct{})
		tried[rec.ID] = done
		g.Go(func() error {
			defer close(done)
			for _, c := range before { // of those that were begun before this one, so some of them always goes on
				<-c
			}
			_, err := e.launch(ctx, rec, nil, startMonitor(), attachment{}, &Streams{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				started = append(started, rec.Name)
			case !errors.Is(err, container.ErrBusy) && !errors.Is(err, container.ErrNotFound):
				errs = append(errs, fmt.Errorf("start container %s: %w", rec.Name, err))
			}
			return nil
		})
	}
	_ = g.Wait() // they return none
	slices.Sort(started)
	return started, errors.Join(errs...)
}

// owners are the containers that must run before one can start: whose namespaces it joins, and to which it has links.
func owners(rec *container.Record) []string {
	hc := rec.HostConfig
	ids := []string{hc.NetworkMode.ConnectedContainer(), hc.PidMode.Container(), hc.IpcMode.Container()}
	for _, l := range rec.Options.Links {
		ids = append(ids, l.ID)
	}
	return slices.DeleteFunc(ids, func(id string) bool { return id == "" })
}

// ownersFirst keeps an order but for containers that others need, which come before those.
func ownersFirst(recs []*container.Record) []*container.Record {
	byID := map[string]*container.Record{}
	for _, r := range recs {
		byID[r.ID] = r
	}
	out := make([]*container.Record, 0, len(recs))
	var add func(r *container.Record)
	add = func(r *container.Record) {
		if r == nil || byID[r.ID] == nil {
			return
		}
		delete(byID, r.ID) // before its owners, should a record that somebody has edited make it one of theirs
		for _, id := range owners(r) {
			add(byID[id])
		}
		out = append(out, r)
	}
	for _, r := range recs {
		add(r)
	}
	return out
}

// shouldStart applies a restart policy to a container that does not run after a boot.
func shouldStart(n *container.Snapshot) bool {
	switch n.Record.HostConfig.RestartPolicy.Name {
	case apic.RestartPolicyAlways:
		return n.Desired.Running || n.Desired.Stopped
	case apic.RestartPolicyUnlessStopped:
		return n.Desired.Running && !n.Desired.Stopped
	default:
		// One that the shutdown ended well has not failed.
		well := n.Exit != nil && !n.Lost && n.Exit.Code == 0
		return n.Desired.Running && !well && revivable(n)
	}
}

// recordLoss writes down that nobody saw how a container's last run ended. Its wish to run stays, for its restart policy.
func (e *Engine) recordLoss(n *container.Snapshot) error {
	cs := e.Containers()
	l, err := cs.Lock(n.Record.ID)
	if errors.Is(err, container.ErrBusy) {
		return nil // somebody starts it
	}
	if err != nil {
		return err
	}
	defer l.Release()
	if now, err := cs.Snapshot(n.Record.ID); err != nil || !now.Lost {
		if errors.Is(err, container.ErrNotFound) {
			return cs.RemoveRun(n.Record.ID) // which our lock has made
		}
		return err
	}
	e.event(n.Record, "die", n.Exit.Attributes())
	d := container.Desired{Running: shouldStart(n), Stopped: n.Desired.Stopped}
	return errors.Join(cs.SetExit(n.Record, *n.Exit), cs.SetDesired(n.Record, d))
}

// Shutdown stops all containers, as a machine does that goes down: by their stop signals and time-outs, without anybody's wish that they
// stay stopped, so that Reconcile starts them again as their restart policies say. It returns the names of those that it stopped.
func (e *Engine) Shutdown(ctx context.Context) (stopped []string, err error) {
	errs := []error{e.Settle(ctx)}
	all, err := e.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(stopAtOnce)
	for _, n := range all {
		if n.Alive() == nil {
			continue
		}
		g.Go(func() error {
			_, err := e.client(n.Record.ID).Stop(ctx, control.ForShutdown, "", nil)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				stopped = append(stopped, n.Record.Name)
			case !errors.Is(err, control.ErrGone):
				errs = append(errs, fmt.Errorf("stop container %s: %w", n.Record.Name, err))
			}
			return nil
		})
	}
	_ = g.Wait() // they return none
	slices.Sort(stopped)
	return stopped, errors.Join(errs...)
}

// dropHollow removes what a power loss left of a container that was not to survive it.
func (e *Engine) dropHollow(id string) error {
	cs := e.Containers()
	l, err := cs.Lock(id)
	if errors.Is(err, container.ErrBusy) {
		return nil // somebody else does it
	}
	if err != nil {
		return err
	}
	defer l.Release()
	trash, err := cs.Remove(id)
	if err != nil {
		return err
	}
	errs := []error{cs.RemoveRun(id)}
	if trash != "" {
		errs = append(errs, os.RemoveAll(trash))
	}
	return errors.Join(errs...)
}
