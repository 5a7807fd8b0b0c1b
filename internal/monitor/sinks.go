package monitor

import (
	"fmt"
	"time"

	"conex/internal/control"
	"conex/internal/logs"
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

// event announces what has happened to the container, by the name that it has now.
func (m *monitor) event(action string, attrs map[string]string) {
	rec := m.rec
	if r, err := m.store.Load(rec.ID); err == nil {
		rec = r // renamed since the start
	}
	if err := m.store.Announce(rec, action, attrs); err != nil {
		complain("write event", err)
	}
}
