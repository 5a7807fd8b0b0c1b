package monitor

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/runtime"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// Docker's defaults for HEALTHCHECK, and its bounds on what is kept.
const (
	healthInterval      = 30 * time.Second
	healthTimeout       = 30 * time.Second
	healthStartInterval = 5 * time.Second
	healthRetries       = 3
	healthLog           = 5
	healthOutput        = 4096
)

// health runs one run's health check.
type health struct {
	r *run
	// probe is a check of our own; else cmd is the command.
	probe  *container.Probe
	cmd    []string
	conf   apic.HealthConfig
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// newHealth returns nil when the container has no check.
func newHealth(r *run) *health {
	c := r.m.rec.Config.Healthcheck
	cmd := healthCommand(r.m.rec.Config)
	if cmd == nil {
		return nil
	}
	h := &health{r: r, cmd: cmd, conf: *c}
	// What is no probe is a command: an image may say anything, and it fails by its exit code then.
	h.probe, _ = container.ParseProbe(c.Test)
	set := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	set(&h.conf.Interval, healthInterval)
	set(&h.conf.Timeout, healthTimeout)
	set(&h.conf.StartInterval, healthStartInterval)
	if h.conf.Retries <= 0 {
		h.conf.Retries = healthRetries
	}
	return h
}

// healthCommand returns the command of a container's check, nil when it has none.
func healthCommand(c *apic.Config) []string {
	if c.Healthcheck == nil || len(c.Healthcheck.Test) < 2 {
		return nil
	}
	switch test := c.Healthcheck.Test; test[0] {
	case "CMD":
		return test[1:]
	case "CMD-SHELL":
		shell := c.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		return append(append([]string(nil), shell...), test[1])
	default: // NONE
		return nil
	}
}

func (h *health) begin() {
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.done.Go(func() { h.loop(ctx) })
}

// end stops the checks and waits for the one under way.
func (h *health) end() {
	h.cancel()
	h.done.Wait()
}

func (h *health) loop(ctx context.Context) {
	for {
		t := time.NewTimer(h.pause(time.Since(h.r.started)))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		frozen := h.r.freezing.times()
		res := h.check(ctx)
		if ctx.Err() != nil {
			return // the container ended meanwhile: the result means nothing
		}
		if h.r.freezing.times() != frozen {
			continue // it stood still meanwhile, so it could not answer
		}
		h.record(res)
	}
}

// pause is the time to the next check: another one while the container starts and has not been healthy.
func (h *health) pause(age time.Duration) time.Duration {
	h.r.m.mu.Lock()
	defer h.r.m.mu.Unlock()
	if st := h.r.m.state.Health; age < h.conf.StartPeriod && st != nil && st.Status == apic.Starting {
		return h.conf.StartInterval
	}
	return h.conf.Interval
}

// check checks once. Exit code -1 means that it could not be done or took too long.
func (h *health) check(ctx context.Context) *apic.HealthcheckResult {
	if h.probe != nil {
		return h.ask(ctx)
	}
	return h.execute(ctx)
}

// ask is check by a probe of our own.
func (h *health) ask(ctx context.Context) *apic.HealthcheckResult {
	h.r.freezing.gate.RLock()   // waits while the container is frozen
	h.r.freezing.gate.RUnlock() //nolint:staticcheck // nothing to protect
	res := &apic.HealthcheckResult{Start: time.Now()}
	limited, cancel := context.WithTimeout(ctx, h.conf.Timeout)
	defer cancel()
	out, err := probe(limited, h.probe, h.r.proc.Pid())
	res.End, res.Output = time.Now(), out
	if err != nil {
		res.ExitCode, res.Output = 1, h.probe.String()+": "+err.Error()
		if limited.Err() != nil {
			res.ExitCode, res.Output = -1, h.late(res.Output)
		}
	}
	h.r.m.calm()
	return res
}

// late puts output of a check that took too long into Docker's words.
func (h *health) late(output string) string {
	return "Health check exceeded timeout (" + h.conf.Timeout.String() + "): " + output
}

// execute is check by a command in the container.
func (h *health) execute(ctx context.Context) *apic.HealthcheckResult {
	res := &apic.HealthcheckResult{Start: time.Now(), ExitCode: -1}
	out := &capped{}
	x, err := h.r.exec(ctx, control.ExecRequest{Cmd: h.cmd}, func(x *execution) error {
		x.io.log = func(_ byte, p []byte) error { out.Write(p); return nil }
		return nil
	})
	if err != nil {
		var ee *runtime.ExecError
		if errors.As(err, &ee) {
			res.ExitCode = ee.ExitCode()
		}
		res.Output, res.End = err.Error(), time.Now()
		return res
	}
	late := make(chan struct{})
	t := time.AfterFunc(h.conf.Timeout, func() {
		close(late)
		h.r.killTree(x.proc)
	})
	e := x.wait()
	if err := h.r.track(x, false); err != nil {
		complain("record exec", err)
	}
	h.r.m.calm()
	res.End, res.Output = time.Now(), out.String()
	if t.Stop() {
		res.ExitCode = e.Code
		return res
	}
	<-late
	res.Output = h.late(res.Output)
	return res
}

// record takes a result into the state. The state's health is replaced, never changed, since readers hold it.
func (h *health) record(res *apic.HealthcheckResult) {
	var before, after apic.HealthStatus
	err := h.r.m.setState(func(s *container.State) {
		if s.Status != container.Running || s.Health == nil {
			return
		}
		before = s.Health.Status
		s.Health = nextHealth(s.Health, res, h.conf, h.r.started)
		after = s.Health.Status
		if before != after { // before anybody sees it in the state
			h.r.m.event("health_status: "+string(after), nil)
		}
	})
	if err != nil {
		complain("record health", err)
	}
	if before != after && after == apic.Unhealthy {
		h.react(res)
	}
}

// react does what was asked for in the case that the container becomes unhealthy.
func (h *health) react(res *apic.HealthcheckResult) {
	m := h.r.m
	by := &container.Ender{Command: container.ByHealth, Time: res.End}
	switch m.rec.Options.HealthOnFailure {
	case "kill":
		by.Signal = int(unix.SIGKILL)
		h.r.endedBy(by)
		_ = h.r.proc.Signal(unix.SIGKILL) // an error means that it has ended
		h.r.freezing.dropAll(false)
	case "restart":
		m.mu.Lock()
		m.again = true
		m.mu.Unlock()
		h.r.endedBy(by)
		h.r.terminate(m.rec.StopSignal(), time.Duration(m.rec.StopTimeout())*time.Second)
	case "stop":
		m.halt(true)
		h.r.endedBy(by)
		h.r.terminate(m.rec.StopSignal(), time.Duration(m.rec.StopTimeout())*time.Second)
	}
}

// nextHealth is the health after one more result: healthy with a success, unhealthy after as many failures in a row as the check
// allows. Failures in the start period don't count until there was a success.
func nextHealth(old *apic.Health, res *apic.HealthcheckResult, conf apic.HealthConfig, started time.Time) *apic.Health {
	n := &apic.Health{Status: old.Status, FailingStreak: old.FailingStreak}
	n.Log = append(append(n.Log, old.Log...), res)
	n.Log = n.Log[max(0, len(n.Log)-healthLog):]
	switch {
	case res.ExitCode == 0:
		n.FailingStreak, n.Status = 0, apic.Healthy
	case old.Status == apic.Starting && res.Start.Sub(started) < conf.StartPeriod:
	default:
		if n.FailingStreak++; n.FailingStreak >= conf.Retries {
			n.Status = apic.Unhealthy
		}
	}
	return n
}

// capped keeps the beginning of what is written to it.
type capped struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *capped) Write(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.b.Write(p[:min(len(p), max(0, healthOutput-c.b.Len()))])
}

func (c *capped) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}
