package engine

import (
	"context"
	"errors"
	"os"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/image"

	mevents "github.com/moby/moby/api/types/events"
)

// RemoveRequest deletes a container.
type RemoveRequest struct {
	Container string
	// Force kills it if it runs.
	Force bool
	// Volumes deletes its anonymous volumes too.
	Volumes bool
}

// RemoveContainer deletes a container: its record, writable layer, log and name. One that runs is ErrConflict unless forced.
func (e *Engine) RemoveContainer(ctx context.Context, req RemoveRequest) error {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return err
	}
	rec, cs := n.Record, e.Containers()
	for {
		if a := n.Alive(); a != nil || req.Force && n.Stoppable() {
			if !req.Force && a.Paused {
				return conflict("cannot remove container %q: container is paused and must be unpaused first", "/"+rec.Name)
			}
			if !req.Force {
				return conflict("cannot remove container %q: container is %s: stop the container before removing or force remove", "/"+rec.Name, n.Status())
			}
			now := 0
			_, err := e.client(rec.ID).Stop(ctx, "rm", "KILL", &now)
			var ce *control.Error
			if err != nil && !errors.Is(err, control.ErrGone) && !errors.As(err, &ce) {
				return err
			}
		}
		l, err := cs.LockIdle(ctx, rec.ID)
		if errors.Is(err, container.ErrBusy) { // somebody has started it meanwhile
			if n, err = e.lookAgain(ctx, rec.ID); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		defer l.Release()
		break
	}
	if err := e.settleLocked(ctx, rec.ID); err != nil {
		return err
	}
	trash, err := cs.Remove(rec.ID)
	if err != nil {
		return err
	}
	if trash != "" { // otherwise --rm was faster
		e.event(rec, "destroy", nil)
	}
	errs := []error{cs.RemoveRun(rec.ID)}
	if req.Volumes || rec.HostConfig.AutoRemove {
		errs = append(errs, e.removeAnonymous(ctx, rec.Anonymous))
	}
	if trash != "" {
		errs = append(errs, os.RemoveAll(trash))
	}
	errs = append(errs, e.afterContainer(ctx, rec))
	return errors.Join(errs...)
}

// removeAnonymous deletes the volumes that were made for a container which is gone, but for those that another one has.
func (e *Engine) removeAnonymous(ctx context.Context, names []string) error {
	return e.Volumes().RemoveAnonymous(context.WithoutCancel(ctx), names, e.Containers().VolumesInUse, func(name string) {
		e.volumeEvent(mevents.ActionDestroy, name)
	})
}

// afterContainer lets the layers of a removed container go whose image is gone already: it was the last that had them.
func (e *Engine) afterContainer(ctx context.Context, rec *container.Record) error {
	images, err := e.Images()
	if err != nil {
		return err
	}
	if _, err := images.Find(string(rec.ImageID)); !errors.Is(err, image.ErrNotFound) {
		return nil //nolint:nilerr // it is there, whatever else is wrong with it
	}
	_, err = e.sweep(context.WithoutCancel(ctx))
	return err
}
