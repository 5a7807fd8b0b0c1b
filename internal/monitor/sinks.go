package monitor

import (
	"fmt"
	"os"
	"sync"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/events"
	"conex/internal/logs"
	"conex/internal/network"

	mevents "github.com/moby/moby/api/types/events"
)

// logWriter gives streams a log: package logs knows streams by name.
type logWriter struct{ d logs.Driver }

// openLog opens the container's log for a run.
func (m *monitor) openLog() (*logWriter, error) {
	o, err := logs.ParseOptions(m.req.LogDriver, m.req.LogOptions)
	if err != nil {
		return nil, err
	}
	d, err := logs.Open(m.store.Dir(m.rec.ID, "log"), logs.Describe(m.rec), o)
	if err != nil {
		return nil, fmt.Errorf("failed to initialize logging driver: %w", err)
	}
	return &logWriter{d}, nil
}

// compressLog does what was left undone while the container ran.
func (m *monitor) compressLog() error {
	o, err := logs.ParseOptions(m.req.LogDriver, m.req.LogOptions)
	if err != nil {
		return err
	}
	return logs.Compress(m.store.Dir(m.rec.ID, "log"), o)
}

func (l *logWriter) write(kind byte, p []byte) error {
	name := "stdout"
	if kind == control.FrameStderr {
		name = "stderr"
	}
	return l.d.Write(name, p, time.Now())
}

// named is the record with the name that the container has now: it may have been renamed since the start.
type named struct {
	mu   sync.Mutex
	rec  *container.Record
	file os.FileInfo // of config.json when rec was read; a change replaces the file
}

// record is the container's record with its name of now.
func (m *monitor) record() *container.Record {
	n := &m.named
	n.mu.Lock()
	defer n.mu.Unlock()
	if st, err := os.Stat(m.store.Dir(m.rec.ID, "config.json")); err == nil && (n.file == nil || !os.SameFile(st, n.file)) {
		if r, err := m.store.Load(m.rec.ID); err == nil {
			n.rec = r
		}
		n.file = st
	}
	return n.rec
}

// event announces what has happened to the container, by the name that it has now.
func (m *monitor) event(action string, attrs map[string]string) {
	if err := m.store.Announce(m.record(), action, attrs); err != nil {
		complain("write event", err)
	}
}

// announce writes an event about something else that the container has or had.
func (m *monitor) announce(kind mevents.Type, action mevents.Action, id string, attrs map[string]string) {
	err := events.Open(m.req.State).Write(events.Event{Type: kind, Action: action, Actor: mevents.Actor{ID: id, Attributes: attrs}})
	if err != nil {
		complain("write event", err)
	}
}

// disconnected announces that a run has left its networks.
func (m *monitor) disconnected(r *run) {
	for _, ep := range r.left {
		m.networkEvent(mevents.ActionDisconnect, ep)
	}
}

// networkEvent announces that the container joins or leaves a network.
func (m *monitor) networkEvent(action mevents.Action, ep *network.Endpoint) {
	m.announce(mevents.NetworkEventType, action, ep.NetworkID, map[string]string{"container": m.rec.ID, "name": ep.NetworkName, "type": ep.Driver})
}
