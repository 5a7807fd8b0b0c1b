package monitor

import (
	"context"
	"errors"
	"os"
	"time"

	"conex/internal/volume"

	mevents "github.com/moby/moby/api/types/events"
)

// remove makes a container that was run with --rm disappear: name, folder and the volumes that nobody named go before anybody hears of its end. r is
// its last run, nil if there was none.
func (m *monitor) remove(r *run) error {
	var errs []error
	if r != nil && len(m.rec.Anonymous) > 0 { // nothing of them may be mounted
		m.mu.Lock()
		m.run = nil
		m.mu.Unlock()
		errs = append(errs, r.clean())
	}
	trash, err := m.store.Remove(m.rec.ID)
	m.trash = trash
	m.event("destroy", nil)
	ctx, cancel := context.WithTimeout(context.Background(), volumesTimeout)
	defer cancel()
	verr := m.removeVolumes(ctx)
	m.volumesLeft = verr != nil
	if errors.Is(verr, context.DeadlineExceeded) {
		verr = nil // removeRest waits for it
	}
	return errors.Join(append(errs, err, verr)...)
}

// volumesTimeout is how long the end of a container waits for its volumes to be removable: somebody may be copying into another container's.
const volumesTimeout = time.Second

// removeRest deletes what remove left to do.
func (m *monitor) removeRest() error {
	var errs []error
	if m.trash != "" {
		errs = append(errs, os.RemoveAll(m.trash))
	}
	if m.volumesLeft {
		errs = append(errs, m.removeVolumes(context.Background()))
	}
	return errors.Join(errs...)
}

// removeVolumes deletes the volumes that were made for a container whose folder is gone.
func (m *monitor) removeVolumes(ctx context.Context) error {
	if len(m.rec.Anonymous) == 0 {
		return nil
	}
	vols := volume.Open(m.root, m.req.State)
	return vols.RemoveAnonymous(ctx, m.rec.Anonymous, m.store.VolumesInUse, func(name string) {
		m.announce(mevents.VolumeEventType, mevents.ActionDestroy, name, map[string]string{"driver": "local"})
	})
}
