package engine

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"conex/internal/events"
	"conex/internal/image"

	mevents "github.com/moby/moby/api/types/events"
)

// EventsRequest chooses events.
type EventsRequest struct {
	// Since and Until bound them in time. Without Since and Until there is no history, only what happens from now on; an Until that
	// has passed ends it.
	Since, Until time.Time
	// Filters are Docker's: config, container, daemon, event, image, label, network, node, plugin, scope, secret, service, type,
	// volume. Values of one filter are alternatives, but labels must all be there.
	Filters map[string][]string
}

// eventFilters are the keys of Filters that name the object of a type of event, by the beginning of its id or name.
var eventObjects = []string{"daemon", "container", "plugin", "volume", "network", "node", "service", "secret", "config"}

// Events calls fn for each event, oldest first, until ctx ends, Until has come, or fn returns an error, which it returns.
func (e *Engine) Events(ctx context.Context, req EventsRequest, fn func(events.Event) error) error {
	now := time.Now()
	for _, k := range slices.Sorted(maps.Keys(req.Filters)) {
		if !slices.Contains(eventObjects, k) && !slices.Contains([]string{"event", "image", "label", "scope", "type"}, k) {
			return invalid("invalid filter '%s'", k)
		}
	}
	if !req.Until.IsZero() && req.Until.Before(req.Since) {
		return invalid("`since` time (%s) cannot be after `until` time (%s)", req.Since.Format(time.RFC3339Nano), req.Until.Format(time.RFC3339Nano))
	}
	o := events.ReadOptions{
		Since: req.Since, Until: req.Until, Follow: req.Until.IsZero() || req.Until.After(now),
		Filter: func(ev events.Event) bool { return matchEvent(req.Filters, &ev) },
	}
	if req.Since.IsZero() && req.Until.IsZero() {
		o.Since = now
	}
	return events.Open(e.cfg.State).Read(ctx, o, fn)
}

// matchEvent applies filters by Docker's rules.
func matchEvent(filters map[string][]string, ev *events.Event) bool {
	exact := func(key string, values ...string) bool {
		want, ok := filters[key]
		return !ok || slices.ContainsFunc(values, func(v string) bool { return slices.Contains(want, v) })
	}
	begins := func(key string, values ...string) bool {
		want, ok := filters[key]
		return !ok || slices.ContainsFunc(values, func(v string) bool {
			return slices.ContainsFunc(want, func(w string) bool { return strings.HasPrefix(v, w) })
		})
	}
	action := exact
	for _, w := range filters["event"] {
		if w == "health_status" || w == "exec_create" || w == "exec_start" {
			action = begins // what follows the colon is not for filters to know
		}
	}
	if !action("event", string(ev.Action)) || !exact("type", string(ev.Type)) || !exact("scope", ev.Scope) {
		return false
	}
	for _, key := range eventObjects {
		if !begins(key, ev.Actor.ID, ev.Actor.Attributes["name"]) {
			return false
		}
	}
	name := ev.Actor.Attributes["image"]
	if ev.Type == mevents.ImageEventType {
		name = ev.Actor.Attributes["name"]
	}
	if _, ok := filters["image"]; ok && !exact("image", ev.Actor.ID, name, repository(ev.Actor.ID), repository(name)) {
		return false
	}
	for _, l := range filters["label"] {
		k, want, valued := strings.Cut(l, "=")
		if v, ok := ev.Actor.Attributes[k]; !ok || valued && v != want {
			return false
		}
	}
	return true
}

// repository is an image's name without its tag.
func repository(name string) string {
	ref, err := image.ParseReference(name)
	if err != nil {
		return name
	}
	return ref.FamiliarName()
}

// announce writes an event about what is no container. As for those, an event that can't be written is dropped.
func (e *Engine) announce(kind mevents.Type, action mevents.Action, id string, attrs map[string]string) {
	_ = events.Open(e.cfg.State).Write(events.Event{Type: kind, Action: action, Actor: mevents.Actor{ID: id, Attributes: attrs}})
}

// imageEvent announces what has happened to an image, with its labels as Docker does.
func (e *Engine) imageEvent(action mevents.Action, id, name string, labels map[string]string) {
	attrs := make(map[string]string, len(labels)+1)
	maps.Copy(attrs, labels)
	attrs["name"] = name
	e.announce(mevents.ImageEventType, action, id, attrs)
}

// volumeEvent announces what has happened to a volume.
func (e *Engine) volumeEvent(action mevents.Action, name string) {
	e.announce(mevents.VolumeEventType, action, name, map[string]string{"driver": "local"})
}

// referenceEvent is imageEvent for pull and push, which are about a reference.
func (e *Engine) referenceEvent(action mevents.Action, ref image.Reference, labels map[string]string) {
	e.imageEvent(action, ref.Familiar(), ref.FamiliarName(), labels)
}
