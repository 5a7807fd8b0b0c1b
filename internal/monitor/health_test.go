package monitor_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"conex/internal/container"
	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
)

// checked is a request for a container with a health check that is made every few milliseconds.
func checked(test []string, cmd ...string) engine.RunRequest {
	r := request(cmd...)
	r.Config.Healthcheck = &apic.HealthConfig{Test: test, Interval: 20 * time.Millisecond, Timeout: 10 * time.Second, Retries: 2}
	return r
}

func (w *world) health(id string) apic.Health {
	w.t.Helper()
	c, err := w.InspectContainer(w.t.Context(), id, false)
	if err != nil {
		w.t.Fatal(err)
	}
	if c.State.Health == nil {
		return apic.Health{}
	}
	return *c.State.Health
}

// TestHealthProbes asks servers in containers without a network, from inside of it.
func TestHealthProbes(t *testing.T) {
	w := newWorld(t)
	serve := `mkdir /www; echo well >/www/ok; exec httpd -f -p 127.0.0.1:8080 -h /www`
	for test, want := range map[string]apic.HealthStatus{
		"http://:8080/ok": apic.Healthy, "http:8080/missing": apic.Unhealthy, "tcp:8080": apic.Healthy, "tcp://[::1]:8080": apic.Unhealthy, "tcp:8081": apic.Unhealthy,
	} {
		id := w.detached(checked([]string{"CMD-SHELL", test}, "sh", "-c", serve))
		w.eventually(test+" is not "+string(want), func() bool { return w.health(id).Status == want })
		h := w.health(id)
		last := h.Log[len(h.Log)-1]
		if (last.ExitCode == 0) != (want == apic.Healthy) || last.ExitCode > 1 {
			t.Errorf("%s: %+v", test, last)
		}
		if test == "http:8080/missing" && !strings.Contains(last.Output, "HTTP/1.1 404 ") || test == "tcp:8081" && !strings.Contains(last.Output, "connection refused") {
			t.Errorf("%s: %q", test, last.Output)
		}
	}
}

// TestHealthHangs has a check that hangs with children until a file is there: all are killed.
func TestHealthHangs(t *testing.T) {
	w := newWorld(t)
	r := checked([]string{"CMD-SHELL", "[ ! -e /ok ] || exit 0; echo begun; sleep 4711 & sh -c 'sleep 4712; true' & wait"}, "sleep", "1000")
	r.Config.Healthcheck.Timeout = 200 * time.Millisecond
	id := w.detached(r)
	// On a busy machine the time may be over before the check comes to its echo.
	w.eventually("no check that hangs has said something", func() bool {
		return slices.ContainsFunc(w.health(id).Log, func(l *apic.HealthcheckResult) bool {
			return l.ExitCode == -1 && l.Output == "Health check exceeded timeout (200ms): begun\n"
		})
	})
	if _, code, err := w.exec(id, "touch", "/ok"); err != nil || code != 0 {
		t.Fatal(code, err)
	}
	w.eventually("not healthy", func() bool { return w.health(id).Status == apic.Healthy })
	w.eventually("processes of the check are left", func() bool {
		_, rows, err := w.Top(t.Context(), id, nil)
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(rows, func(row []string) bool { return strings.Contains(strings.Join(row, " "), "471") })
	})
}

// TestHealthPaused has nobody ask a container that stands still, and nobody count what it could not answer.
func TestHealthPaused(t *testing.T) {
	w := newWorld(t)
	id := w.detached(checked([]string{"CMD", "true"}, "sleep", "1000"))
	w.eventually("not healthy", func() bool { return w.health(id).Status == apic.Healthy })
	f := w.freeze(id)
	frozen := time.Now()
	// A check that was under way is over when the container goes on again, and does not count; one that was over may be on its way to the record.
	time.Sleep(100 * time.Millisecond)
	after := w.health(id)
	if last := after.Log[len(after.Log)-1]; last.Start.After(frozen) {
		t.Errorf("checked while it was paused, which began at %s: %+v", frozen, last)
	}
	if err := f.Thaw(); err != nil {
		t.Fatal(err)
	}
	w.eventually("no check after the thaw", func() bool {
		h := w.health(id)
		return h.Log[len(h.Log)-1].Start.After(after.Log[len(after.Log)-1].Start)
	})
}

// TestHealthOnFailure has each reaction to a container that becomes unhealthy.
func TestHealthOnFailure(t *testing.T) {
	w := newWorld(t)
	r := checked([]string{"CMD-SHELL", "while [ ! -e /ready ]; do sleep 0.01; done; exit 1"}, "sh", "-c", `trap "exit 5" TERM; touch /ready; while :; do sleep 0.02; done`)
	r.Options.HealthOnFailure = "stop"
	r.HostConfig.RestartPolicy.Name = "always"
	id := w.detached(r)
	w.eventually("not stopped", func() bool { return w.status(id) == "exited" })
	x, err := w.Containers().Exit(id)
	if err != nil || x.Code != 5 || x.By == nil || x.By.Command != container.ByHealth || x.Health == nil || len(x.Health.Log) != 2 {
		t.Errorf("%+v %v", x, err)
	}
	if h := w.health(id); h.Status != apic.Unhealthy {
		t.Errorf("after the end it is %s", h.Status)
	}

	r = checked([]string{"CMD", "false"}, "sleep", "1000")
	r.Options.HealthOnFailure = "kill"
	id = w.detached(r)
	w.eventually("not killed", func() bool { return w.status(id) == "exited" })
	if x, err := w.Containers().Exit(id); err != nil || x.Code != 137 || x.By.Command != container.ByHealth {
		t.Errorf("%+v %v", x, err)
	}

	// Killed under a restart policy it comes back, as after any death; restart needs no policy. Each run begins with a check of its own.
	r = checked([]string{"CMD-SHELL", `for n in 1 2; do stat /failed$n || { touch /failed$n; exit 1; }; done`}, "sleep", "1000")
	r.Options.HealthOnFailure = "restart"
	now := 0
	r.Config.StopTimeout = &now
	id = w.detached(r)
	w.eventually("not healthy after a restart", func() bool { return w.health(id).Status == apic.Healthy })
	c, err := w.InspectContainer(t.Context(), id, false)
	if err != nil || c.RestartCount != 1 || !c.State.Running || slices.ContainsFunc(c.State.Health.Log, func(l *apic.HealthcheckResult) bool { return l.ExitCode != 0 }) {
		t.Errorf("%d %+v %v", c.RestartCount, c.State, err)
	}

	r = request("true")
	r.Options.HealthOnFailure = "stop"
	if _, err := w.Create(t.Context(), r.CreateRequest); err == nil || !strings.Contains(err.Error(), "without a health check") {
		t.Errorf("%v", err)
	}
}
