package container

import (
	"maps"
	"strconv"
	"time"

	"conex/internal/events"

	mevents "github.com/moby/moby/api/types/events"
)

// Announce writes an event about a container, with Docker's attributes: its image, name and labels, and attrs.
func (s *Store) Announce(r *Record, action string, attrs map[string]string) error {
	all := make(map[string]string, len(r.Config.Labels)+len(attrs)+2)
	maps.Copy(all, r.Config.Labels)
	all["image"], all["name"] = r.Image, r.Name
	maps.Copy(all, attrs)
	return events.Open(s.state).Write(events.Event{
		Type: mevents.ContainerEventType, Action: mevents.Action(action), Actor: mevents.Actor{ID: r.ID, Attributes: all},
	})
}

// Attributes are those of the event of the end: the exit code, and how many seconds the run lasted.
func (e Exit) Attributes() map[string]string {
	a := map[string]string{"exitCode": strconv.Itoa(e.Code)}
	if !e.Started.IsZero() {
		a["execDuration"] = strconv.Itoa(int(e.Finished.Sub(e.Started) / time.Second))
	}
	return a
}
