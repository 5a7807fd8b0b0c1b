package monitor

import (
	"context"
	"errors"
	"os"
	"time"

	"conex/internal/volume"

	mevents "github.com/moby/moby/api/types/events"
)

// remove makes a container that was run with --rm disappear: name and folder go before anybody hears of its end.
func (m *monitor) remove() error {
	trash, err := m.store.Remove(m.rec.ID)
	m.trash = trash
	m.event("destroy", nil)
	return err
}

// removeRest deletes what remove left to do.
func (m *monitor) removeRest() error {
	var errs []error
	if m.trash != "" {
		errs = append(errs, os.RemoveAll(m.trash))
	}
	return errors.Join(append(errs, m.removeVolumes(context.Background()))...)
}

// volumesTimeout is how long the end of a container waits for its volumes to be removable: somebody may be copying into another container's.
const volumesTimeout = time.Second

// removeVolumes deletes the volumes that were made for a container whose folder is gone and nothing of which is mounted. Idempotent.
func (m *monitor) removeVolumes(ctx context.Context) error {
	if len(m.rec.Anonymous) == 0 {
		return nil
	}
	vols := volume.Open(m.root, m.req.State)
	return vols.RemoveAnonymous(ctx, m.rec.Anonymous, m.store.VolumesInUse, func(name string) {
		m.announce(mevents.VolumeEventType, mevents.ActionDestroy, name, map[string]string{"driver": "local"})
	})
}
