package monitor

import (
	"time"

	"conex/internal/container"

	apic "github.com/moby/moby/api/types/container"
)

// Docker's back-off: it doubles with every restart, up to a minute, and begins anew after a run of ten seconds.
const (
	backoffFirst = 100 * time.Millisecond
	backoffMax   = time.Minute
	backoffReset = 10 * time.Second
)

// decide says whether the restart policy wants another run after e, and after what pause.
func (m *monitor) decide(e container.Exit) (time.Duration, bool) {
	select {
	case <-m.stop:
		return 0, false
	default:
	}
	m.mu.Lock()
	again := m.again
	m.again = false
	m.mu.Unlock()
	if !again && !wanted(m.current().HostConfig.RestartPolicy, e, m.state.Restarts) {
		return 0, false
	}
	m.backoff = nextBackoff(m.backoff, e.Finished.Sub(e.Started))
	return m.backoff, true
}

// wanted applies a restart policy to a run that ended by itself.
func wanted(p apic.RestartPolicy, e container.Exit, restarts int) bool {
	switch p.Name {
	case apic.RestartPolicyAlways, apic.RestartPolicyUnlessStopped:
		return true
	case apic.RestartPolicyOnFailure:
		return e.Code != 0 && (p.MaximumRetryCount == 0 || restarts < p.MaximumRetryCount)
	default:
		return false
	}
}

// nextBackoff returns the pause after a run of the given length, when the pause before it was last (0: none yet).
func nextBackoff(last, ran time.Duration) time.Duration {
	if last == 0 || ran >= backoffReset {
		return backoffFirst
	}
	return min(2*last, backoffMax)
}
