package engine

import "conex/internal/container"

// event announces what has happened to a container. An event log that can't be written, such as on a full tmpfs, must not make an
// action that has been done look like one that failed, so its error is dropped here.
func (e *Engine) event(rec *container.Record, action string, attrs map[string]string) {
	_ = e.Containers().Announce(rec, action, attrs)
}
