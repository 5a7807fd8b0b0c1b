package monitor

import (
	"context"
	"errors"
	"os"

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
	vols := volume.Open(m.root, m.req.State)
	errs = append(errs, vols.RemoveAnonymous(context.Background(), m.rec.Anonymous, m.store.VolumesInUse, func(name string) {
		m.announce(mevents.VolumeEventType, mevents.ActionDestroy, name, map[string]string{"driver": "local"})
	}))
	return errors.Join(errs...)
}
