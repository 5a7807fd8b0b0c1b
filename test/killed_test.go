package test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Whatever is killed, whenever: the next command settles it, and nothing leaks (the end of each world checks that).

// kill9 sends SIGKILL to the process alone.
func kill9(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		t.Fatalf("kill %d: %v", pid, err)
	}
}

// monitorOf returns the process id of a container's monitor: the process conex-monitor that holds the container's lock file.
func (w *world) monitorOf(id string) int {
	w.t.Helper()
	found := 0
	w.eventually("a monitor of "+id, func() bool {
		for _, pid := range w.monitors() {
			if holdsFile(pid, filepath.Join(w.state, "c", id)) {
				found = pid
				return true
			}
		}
		return false
	})
	return found
}

func (w *world) initOf(id string) int {
	w.t.Helper()
	pid, err := strconv.Atoi(w.conex("inspect", "-f", "{{.State.Pid}}", id))
	if err != nil || pid <= 0 {
		w.t.Fatalf("pid of %s: %d, %v", id, pid, err)
	}
	return pid
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, after, ok := strings.Cut(string(b), ") ")
	return ok && after[0] != 'Z'
}

func TestMonitorKilled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	id := w.conex("run", "-d", "--name", "victim", "-p", "8080:8080", "busybox", "sh", "-c", "mkdir /www; echo hi > /www/index.html; httpd -f -p 8080 -h /www")
	w.get("http://127.0.0.1:8080/")
	child := w.initOf(id)
	kill9(t, w.monitorOf(id))
	w.eventually("ps to settle the container", func() bool {
		return w.conex("ps", "-q") == ""
	})
	w.eventually("the container's process gone", func() bool { return !alive(child) })
	if got := w.conex("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Running}}", id); got != "exited 137 false" {
		t.Errorf("the settled container is %q", got)
	}
	// Name, port and address are free for the next start of the same container, and its files are there.
	w.conex("start", "victim")
	if got := w.get("http://127.0.0.1:8080/"); got != "hi\n" {
		t.Errorf("after the next start the page is %q", got)
	}
}

// A monitor that was killed is not gone at once: the kernel takes its files from it one after the other, on a busy machine a while later. Here it
// keeps its lock until the command has had time for a wrong answer. Nobody takes the container for one that runs, nor leaves it to the next.
func TestMonitorDying(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	for _, c := range []struct {
		policy      string
		cmd         []string
		out, errout string
		code        int
		after       string // what inspect says
	}{
		{"no", []string{"stop", "-t", "0", "victim"}, "victim", "", 0, "exited 137"},
		{"always", []string{"stop", "-t", "0", "victim"}, "victim", "", 0, "exited 137"},
		{"no", []string{"start", "victim"}, "victim", "", 0, "running 0"},
		{"no", []string{"restart", "-t", "0", "victim"}, "victim", "", 0, "running 0"},
		{"no", []string{"wait", "victim"}, "137", "", 0, "exited 137"},
		{"no", []string{"kill", "victim"}, "", "is not running", 1, "exited 137"},
		{"no", []string{"pause", "victim"}, "", "is not running", 1, "exited 137"},
		{"no", []string{"exec", "victim", "true"}, "", "is not running", 1, "exited 137"},
		{"no", []string{"network", "connect", "other", "victim"}, "", "", 0, "exited 137"},
		{"no", []string{"port", "add", "victim", "8080:80"}, "", "", 0, "exited 137"},
		{"no", []string{"rm", "-f", "victim"}, "victim", "", 0, ""},
	} {
		what := c.policy + " " + strings.Join(c.cmd, " ")
		w.conex("network", "create", "other")
		id := w.conex("run", "-d", "--name", "victim", "--restart", c.policy, "busybox", "sleep", "1000")
		child, pid := w.initOf(id), w.monitorOf(id)
		lock := heldFile(t, pid, filepath.Join(w.state, "c", id, "monitor.lock"))
		kill9(t, pid)
		w.eventually("the monitor's death", func() bool { return !alive(pid) })
		cmd := w.command(c.cmd...)
		var out, errout bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errout
		w.start(cmd)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			cmd.Wait() //nolint:errcheck // the exit code says it
		}()
		select {
		case <-ended:
		case <-time.After(300 * time.Millisecond):
		}
		lock.Close()
		<-ended
		if alive(child) {
			t.Errorf("%s: the container's process is still there", what)
		}
		if code := cmd.ProcessState.ExitCode(); code != c.code || strings.TrimSpace(out.String()) != c.out || !strings.Contains(errout.String(), c.errout) {
			t.Errorf("%s: %d, %q, %q", what, code, out.String(), errout.String())
		}
		if c.after != "" {
			if got := w.conex("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "victim"); got != c.after {
				t.Errorf("%s: then it is %q, want %q", what, got, c.after)
			}
			w.conex("rm", "-f", "victim")
		}
		w.conex("network", "rm", "other")
	}
}

// heldFile opens the very file that a process has open, so that it is not closed when the process ends.
func heldFile(t *testing.T, pid int, path string) *os.File {
	t.Helper()
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err != nil || to != path {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.PidfdGetfd(p, n, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), path)
	}
	t.Fatalf("process %d has not opened %s", pid, path)
	return nil
}

func TestInitKilled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	id := w.conex("run", "-d", "busybox", "sleep", "1000")
	kill9(t, w.initOf(id))
	if got := w.conex("wait", id); got != "137" {
		t.Errorf("wait says %s", got)
	}
	if got := w.conex("ps", "-a", "--format", "{{.Status}}"); !strings.HasPrefix(got, "Exited (137)") {
		t.Errorf("ps says %q", got)
	}
	// A restart policy brings it back.
	id = w.conex("run", "-d", "--restart", "always", "busybox", "sleep", "1000")
	first := w.initOf(id)
	kill9(t, first)
	w.eventually("a restart", func() bool {
		got := w.conex("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", id)
		return got == "running 1" && w.initOf(id) != first
	})
}

func TestClientKilled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	cmd := w.command("run", "--name", "fg", "busybox", "sh", "-c", "while :; do echo tick; sleep 0.1; done")
	var out bytes.Buffer
	cmd.Stdout = &out
	w.start(cmd)
	w.eventually("the container to run", func() bool {
		return w.conex("ps", "-q", "--filter", "name=fg") != "" && w.conex("logs", "fg") != ""
	})
	kill9(t, cmd.Process.Pid)
	cmd.Wait()
	// The container is the monitor's, not the client's: it runs on, and its output goes to its log.
	seen := strings.Count(w.conex("logs", "fg"), "tick")
	w.eventually("more output after the client's death", func() bool {
		return strings.Count(w.conex("logs", "fg"), "tick") > seen
	})
	if got := w.conex("inspect", "-f", "{{.State.Running}}", "fg"); got != "true" {
		t.Errorf("running: %s", got)
	}
}

// Everything that `run` starts is killed at a moment that moves through the start. Whatever was there then, `rm -f` removes.
func TestRunKilledAtAnyMoment(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	for i := range 24 {
		delay := time.Duration(i) * 4 * time.Millisecond
		for _, whole := range []bool{false, true} {
			cmd := w.command("run", "-d", "--name", "moment", "-p", "8080:80", "busybox", "sleep", "1000")
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			w.start(cmd)
			time.Sleep(delay)
			if whole { // the client and every monitor of this world at once
				w.killAll()
			}
			kill9(t, cmd.Process.Pid)
			cmd.Wait()
			ids := w.containers()
			if len(ids) > 1 {
				t.Fatalf("killed after %v: %d containers", delay, len(ids))
			}
			if len(ids) == 1 {
				w.conex("rm", "-f", ids[0])
			}
			// Name, port and address are free again.
			if got := w.conex("run", "--rm", "--name", "moment", "-p", "8080:80", "busybox", "echo", "ok"); got != "ok" {
				t.Fatalf("killed after %v: the next run said %q", delay, got)
			}
		}
	}
}

// killAll kills all of this world's monitors and what they are about to become containers, as a crash of conex would.
func (w *world) killAll() {
	for _, pid := range w.monitors() {
		kill9(w.t, pid)
	}
}

func TestBuilderKilled(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	// While a step runs: its process dies with the builder.
	mark := forever(4321)
	dir := w.write("slow/Dockerfile", "FROM busybox\nRUN echo first > /first\nRUN "+mark+"\n")
	cmd := w.command("build", dir)
	w.start(cmd)
	w.eventually("the step running", func() bool { return running(mark) })
	kill9(t, cmd.Process.Pid)
	cmd.Wait()
	w.write("slow/Dockerfile", "FROM busybox\nRUN echo first > /first\nRUN echo second > /second\n")
	steps := w.build("-t", "slow", dir)
	wantSteps(t, "after the killed build", steps, "RUN echo second")
	w.eventually("the step's process gone", func() bool { return !running(mark) })

	// At moments that move through a short build of COPY and RUN: the next build gives the same image as an undisturbed one.
	for i := range 40 {
		w.write(fmt.Sprintf("many/src/f%d", i), strings.Repeat("x", 50_000+i))
	}
	dir = w.write("many/Dockerfile", "FROM busybox\nCOPY src /src\nRUN cat /src/* | sha256sum > /sum\nRUN wc -c /src/* > /count\n")
	for i := range 20 {
		nonce := fmt.Sprintf("n=%d", i)
		cmd := w.command("build", "--label", nonce, "--no-cache", dir)
		w.start(cmd)
		time.Sleep(time.Duration(i) * 5 * time.Millisecond)
		kill9(t, cmd.Process.Pid)
		cmd.Wait()
		w.conex("build", "-q", "-t", "many", dir)
	}
	if got := w.conex("run", "--rm", "--network", "none", "many", "tail", "-n1", "/count"); !strings.Contains(got, "2000780 total") {
		t.Errorf("the last image has %q", got)
	}
}

// forever is a command line that is this test's alone: others may run the same test on this machine.
func forever(kind int) string { return fmt.Sprintf("sleep %d%07d", kind, os.Getpid()) }

// running says whether any process has exactly this command line.
func running(cmdline string) bool {
	want := strings.ReplaceAll(cmdline, " ", "\x00") + "\x00"
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && string(b) == want {
			return true
		}
	}
	return false
}

func TestPullKilled(t *testing.T) {
	w := newWorld(t)
	for i := range 12 {
		cmd := w.command("pull", "debian")
		w.start(cmd)
		time.Sleep(time.Duration(i) * 25 * time.Millisecond)
		kill9(t, cmd.Process.Pid)
		cmd.Wait()
	}
	w.conex("pull", "-q", "debian")
	if got := w.conex("run", "--rm", "--network", "none", "debian", "sh", "-c", "dpkg --verify libc6 | grep -v /usr/share/doc/; echo done"); got != "done" {
		t.Errorf("dpkg --verify in the pulled image: %q", got)
	}
}
