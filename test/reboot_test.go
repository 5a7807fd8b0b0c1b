package test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// reboot does to this installation what a machine does that goes down: every process dies at once, and the state folder is empty
// afterwards. With orderly the unit's ExecStop runs before.
func (w *world) reboot(orderly bool) {
	w.t.Helper()
	ids := w.containers()
	if orderly {
		w.conex("reconcile", "--shutdown")
		w.eventually("the monitors gone", func() bool { return len(w.monitors()) == 0 })
	}
	w.killAll()
	for _, id := range ids {
		w.eventually("the container's processes gone", func() bool {
			pids := cgroupPids(id)
			for _, pid := range pids {
				kill9(w.t, pid)
			}
			return len(pids) == 0
		})
	}
	w.eventually("the monitors gone", func() bool { return len(w.monitors()) == 0 })
	for _, id := range ids {
		for _, pattern := range []string{"/sys/fs/cgroup/*/conex/" + id, "/sys/fs/cgroup/conex/" + id} {
			dirs, err := filepath.Glob(pattern)
			if err != nil {
				w.t.Fatal(err)
			}
			for _, d := range dirs {
				if err := os.Remove(d); err != nil && !os.IsNotExist(err) {
					w.t.Fatal(err)
				}
			}
		}
	}
	unmountBelow(w.t, w.state)
	entries, err := os.ReadDir(w.state)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(w.state, e.Name())); err != nil {
			w.t.Fatal(err)
		}
	}
	// Bridge and table go with the machine too.
	w.sweep()
}

// TestReboot loses everything that a reboot loses: reconcile restores what the restart policies say, and nothing is told that isn't so.
func TestReboot(t *testing.T) {
	for _, orderly := range []bool{false, true} {
		name := "power loss"
		if orderly {
			name = "shutdown"
		}
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.conex("pull", "-q", "busybox")
			run := func(name, policy string, more ...string) {
				args := append([]string{"run", "-d", "--name", name, "--restart", policy}, more...)
				if !slices.Contains(more, "--network") {
					args = append(args, "--network", "none")
				}
				w.conex(append(args, "busybox", "sh", "-c", `trap "exit 0" TERM; while :; do sleep 0.02; done`)...)
			}
			for _, policy := range []string{"no", "always", "unless-stopped", "on-failure"} {
				run(policy+"-ran", policy)
				run(policy+"-stopped", policy)
				w.conex("stop", policy+"-stopped")
			}
			w.conex("run", "-d", "--name", "published", "-p", "8080:80", "--restart", "always", "busybox", "sh", "-c",
				"mkdir -p /www; echo back > /www/index.html; exec httpd -f -p 80 -h /www")
			// They run only beside those that they need, in a chain.
			run("needed", "always", "--ipc", "shareable")
			run("needs-net", "always", "--network", "container:needed")
			run("needs-pid", "always", "--pid", "container:needed")
			run("needs-both", "always", "--pid", "container:needs-pid", "--ipc", "container:needed")
			run("needs-link", "always", "--network", "bridge", "--link", "published:www")
			w.conex("run", "-d", "--name", "loops", "--network", "none", "--restart", "always", "busybox", "false")
			w.conex("run", "-d", "--rm", "--name", "gone", "--network", "none", "-v", "/data", "busybox", "sleep", "1000")
			w.conex("create", "--name", "created", "--restart", "always", "busybox", "true")
			w.reboot(orderly)

			// Before anybody has started anything: no container runs, and none is said never to have run.
			got := w.conex("ps", "-a", "--filter", "name=no-ran", "--filter", "name=always-ran", "--format", "{{.Names}} {{.Status}}")
			for _, line := range strings.Split(got, "\n") {
				want := "Exited (255) "
				if orderly {
					want = "Exited (0) "
				}
				if _, status, _ := strings.Cut(line, " "); !strings.HasPrefix(status, want) {
					t.Errorf("before reconcile: %s", line)
				}
			}
			started := strings.Fields(w.conex("reconcile"))
			want := []string{"always-ran", "always-stopped", "loops", "needed", "needs-both", "needs-link", "needs-net", "needs-pid", "published", "unless-stopped-ran"}
			if !orderly { // otherwise it ended with 0, which is no failure
				want = append(want, "on-failure-ran")
			}
			slices.Sort(want)
			if !slices.Equal(started, want) {
				t.Errorf("started %v, want %v", started, want)
			}
			if got := w.get("http://127.0.0.1:8080/"); got != "back\n" {
				t.Errorf("the page is %q", got)
			}
			for name, status := range map[string]string{
				"no-ran": "exited", "no-stopped": "exited", "unless-stopped-stopped": "exited", "on-failure-stopped": "exited", "always-ran": "running", "created": "created",
			} {
				if got := w.conex("inspect", "-f", "{{.State.Status}}", name); got != status {
					t.Errorf("%s is %s, want %s", name, got, status)
				}
			}
			if r := w.try("inspect", "gone"); r.code == 0 {
				t.Error("the container of --rm is still there")
			}
			if why := w.conex("why", "no-ran"); !orderly && !strings.Contains(why, "The machine went down while it ran") || orderly && !strings.Contains(why, "The machine was going down") {
				t.Errorf("why says %q", why)
			}
			// What it did it does once.
			if again := w.conex("reconcile"); again != "" {
				t.Errorf("the second reconcile started %q", again)
			}
			w.conex("stop", "-t", "0", "loops")
		})
	}
}
