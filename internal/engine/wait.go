package engine

import (
	"context"
	"errors"
	"strconv"
	"time"

	"conex/internal/control"
	"conex/internal/events"

	apic "github.com/moby/moby/api/types/container"
)

// Wait returns the exit code of a container's present run when it has ended; of its last run when it does not run; 0 when it never
// ran.
func (e *Engine) Wait(ctx context.Context, name string) (exitCode int, err error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return 0, err
	}
	id := n.Record.ID
	if n.Alive() != nil {
		x, err := e.client(id).Wait(ctx)
		if err == nil {
			return x.Code, nil
		}
		if !errors.Is(err, control.ErrGone) {
			return 0, err
		}
		if err := e.settleGone(ctx, id); err != nil {
			return 0, err
		}
	}
	if n, err = e.Containers().Snapshot(id); err != nil || n.Exit == nil {
		return 0, classify(err)
	}
	return n.Exit.Code, nil
}

// errWaited ends the look at events.
var errWaited = errors.New("it has happened")

// WaitFor waits for a condition: "not-running" (also "") as Wait does, "next-exit" for the end of a run even if none has begun yet,
// "removed", or "healthy". The code is that of the last end, 0 for healthy; a container that ends before it is healthy is an error.
func (e *Engine) WaitFor(ctx context.Context, name, condition string) (exitCode int, err error) {
	actions := map[string]string{"next-exit": "die", "removed": "destroy", "healthy": "health_status: healthy"}
	want := actions[condition]
	switch {
	case condition == "" || condition == "not-running":
		return e.Wait(ctx, name)
	case want == "":
		return 0, invalid("invalid condition: %q: want not-running, next-exit, removed or healthy", condition)
	}
	since := time.Now() // before the look: what happens between them is seen as an event
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return 0, err
	}
	id, alive := n.Record.ID, n.Alive()
	if n.Exit != nil {
		exitCode = n.Exit.Code
	}
	if condition == "healthy" {
		h := n.Record.Config.Healthcheck
		switch {
		case alive != nil && alive.Health != nil && alive.Health.Status == apic.Healthy:
			return 0, nil
		case alive == nil:
			return 0, conflict("container %s is not running", id)
		case h == nil || len(h.Test) == 0 || h.Test[0] == "NONE":
			return 0, conflict("container %s has no health check to wait for", id)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if alive != nil {
		go func() { // ends with ctx; a monitor that is killed says nothing, who settles it does
			if _, err := e.client(id).Wait(ctx); errors.Is(err, control.ErrGone) {
				_ = e.settleGone(ctx, id) // an error leaves it to the next command
			}
		}()
	}
	err = events.Open(e.cfg.State).Read(ctx, events.ReadOptions{
		Since: since, Follow: true,
		Filter: func(ev events.Event) bool { return ev.Actor.ID == id },
	}, func(ev events.Event) error {
		if ev.Action == "die" {
			if c, err := strconv.Atoi(ev.Actor.Attributes["exitCode"]); err == nil {
				exitCode = c
			}
			if condition == "healthy" {
				return conflict("container %s ended before it was healthy, with exit code %d", id, exitCode)
			}
		}
		if string(ev.Action) == want {
			return errWaited
		}
		return nil
	})
	if errors.Is(err, errWaited) {
		if condition == "healthy" {
			exitCode = 0
		}
		return exitCode, nil
	}
	return 0, err
}
