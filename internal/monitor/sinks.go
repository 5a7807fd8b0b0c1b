package monitor

import (
	"time"

	"conex/internal/control"
	"conex/internal/logs"
)

// logWriter gives streams a log: package logs knows streams by name.
type logWriter struct{ d logs.Driver }

func openLog(dir, driver string, opts map[string]string) (*logWriter, error) {
	d, err := logs.NewWriter(dir, opts, driver)
	if err != nil {
		return nil, err
	}
	return &logWriter{d}, nil
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
