package monitor_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
	"golang.org/x/sys/unix"
)

// gone reports whether a process has ended (a zombie has).
func gone(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	return strings.Contains(string(b[bytes.LastIndexByte(b, ')'):]), ") Z ")
}

// TestMonitorKilled kills the monitor of a running container: the next command settles it.
func TestMonitorKilled(t *testing.T) {
	w := newWorld(t)
	r := request("sleep", "1000")
	r.Name, r.HostConfig.NetworkMode = "web", "bridge"
	r.HostConfig.PortBindings = mnet.PortMap{mnet.MustParsePort("80"): {{HostPort: "8080"}}}
	id := w.detached(r)
	st := w.state(id)
	if err := unix.Kill(st.Monitor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.eventually("ps shows it running", func() bool {
		list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true})
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v %v", list, err)
		}
		return strings.HasPrefix(list[0].Status, "Exited (137)")
	})
	w.eventually("the container's process lives", func() bool { return gone(st.Pid) })
	c, err := w.InspectContainer(t.Context(), "web", false)
	if err != nil || c.State.Error != "monitor died" || c.State.Running {
		t.Errorf("%+v %v", c.State, err)
	}
	if left, err := filepath.Glob(filepath.Join(w.State(), "net", "*", "ep", "*")); err != nil || len(left) > 0 {
		t.Errorf("endpoints are left: %v %v", left, err)
	}
	// It starts again, with its port.
	if _, err := w.Start(t.Context(), engine.StartRequest{Container: "web"}); err != nil {
		t.Fatal(err)
	}
	// With --rm the settler removes it.
	r = request("sleep", "1000")
	r.Name, r.HostConfig.AutoRemove = "gone", true
	r.Config.Volumes = map[string]struct{}{"/data": {}}
	st = w.state(w.detached(r))
	if err := unix.Kill(st.Monitor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Its threads end one after the other; the last gives the lock back.
	w.eventually("the container is not removed", func() bool {
		_, err := w.InspectContainer(t.Context(), "gone", false)
		return errors.Is(err, engine.ErrNotFound) && err.Error() == "No such container: gone"
	})
	if left := w.entries(w.Root().Path("volumes")); len(left) > 0 {
		t.Errorf("volumes %v", left)
	}
}

func TestRestartPolicy(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", "echo run; exit 1")
	r.HostConfig.RestartPolicy = apic.RestartPolicy{Name: "on-failure", MaximumRetryCount: 2}
	id := w.detached(r)
	w.eventually("restarts go on", func() bool { return w.status(id) == "exited" && w.state(id) == nil })
	var out bytes.Buffer
	if err := w.Logs(t.Context(), engine.LogsRequest{Container: id, Tail: -1, Stdout: &out}); err != nil || out.String() != "run\nrun\nrun\n" {
		t.Errorf("%q %v", out.String(), err)
	}
	if c, err := w.InspectContainer(t.Context(), id, false); err != nil || c.RestartCount != 2 || c.State.ExitCode != 1 {
		t.Errorf("%d %+v %v", c.RestartCount, c.State, err)
	}

	r = request("sleep", "1000")
	r.Name = "always"
	r.HostConfig.RestartPolicy = apic.RestartPolicy{Name: "always"}
	id = w.detached(r)
	kill := func(pick func(*container.State) int) {
		t.Helper()
		before := w.state(id)
		if err := unix.Kill(pick(before), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		w.eventually("it does not come back", func() bool {
			if err := w.Settle(t.Context()); err != nil {
				t.Fatal(err)
			}
			st := w.state(id)
			return st != nil && st.Status == "running" && st.Pid != before.Pid
		})
	}
	kill(func(s *container.State) int { return s.Pid })
	kill(func(s *container.State) int { return s.Monitor })
	if err := w.Stop(t.Context(), id, engine.StopRequest{Signal: "KILL"}); err != nil {
		t.Fatal(err)
	}
	if s := w.status(id); s != "exited" {
		t.Errorf("after stop: %s", s)
	}
	// always means at the next boot too, unless-stopped would not.
	if started, err := w.Reconcile(t.Context()); err != nil || !slices.Equal(started, []string{"always"}) || w.status(id) != "running" {
		t.Errorf("%v %v", started, err)
	}
}

// TestReboot has state of before a reboot: what should run starts again.
func TestReboot(t *testing.T) {
	w := newWorld(t)
	for _, policy := range []apic.RestartPolicyMode{"no", "always", "unless-stopped", "on-failure"} {
		r := request("sleep", "1000")
		r.Name = string(policy) + "-x"
		r.HostConfig.RestartPolicy.Name = policy
		st := w.state(w.detached(r))
		if err := unix.Kill(st.Monitor, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		w.eventually("the monitor lives", func() bool { return gone(st.Monitor) })
		id, err := w.Containers().Resolve(r.Name)
		if err != nil {
			t.Fatal(err)
		}
		st.BootID = "another"
		w.eventually("its lock is held", func() bool {
			l, err := w.Containers().Lock(id)
			if err == nil {
				l.Release()
			}
			return err == nil
		})
		if err := w.Containers().SetState(id, st); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"no-x": "exited", "always-x": "running", "unless-stopped-x": "running", "on-failure-x": "running"} {
		id, err := w.Containers().Resolve(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := w.status(id); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// TestHollow has what a power loss leaves of a --rm container: the others are listed, and reconcile removes it.
func TestHollow(t *testing.T) {
	w := newWorld(t)
	dir := w.Root().Path("containers", disk.RandomID())
	if err := os.MkdirAll(filepath.Join(dir, "upper"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	r := request("true")
	if _, err := w.Create(t.Context(), r.CreateRequest); err != nil {
		t.Fatal(err)
	}
	if list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true}); err != nil || len(list) != 1 {
		t.Errorf("%v %v", list, err)
	}
	if _, err := w.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// TestShutdown has a machine that goes down: SIGTERM to the monitor ends the container, which comes back at the next boot.
func TestShutdown(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", `trap "exit 5" TERM; echo ready; while :; do sleep 0.05; done`)
	r.Name = "keep"
	r.HostConfig.RestartPolicy.Name = "unless-stopped"
	id := w.detached(r)
	w.ready(id)
	if err := unix.Kill(w.state(id).Monitor, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	w.eventually("it does not end", func() bool { return w.state(id) == nil })
	if x, err := w.Containers().Exit(id); err != nil || x.Code != 5 {
		t.Errorf("%+v %v", x, err)
	}
	if started, err := w.Reconcile(t.Context()); err != nil || !slices.Equal(started, []string{"keep"}) {
		t.Errorf("%v %v", started, err)
	}
	// Stopped by hand it stays so.
	now := 0
	if err := w.Stop(t.Context(), id, engine.StopRequest{Timeout: &now}); err != nil {
		t.Fatal(err)
	}
	if started, err := w.Reconcile(t.Context()); err != nil || len(started) > 0 {
		t.Errorf("%v %v", started, err)
	}
}
