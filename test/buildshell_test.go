package test

import (
	"path/filepath"
	"strings"
	"testing"
)

// build --debug at a terminal: a shell where the step failed, then again, on, or the end.
func TestBuildDebug(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	dir := filepath.Join(w.dir, "ctx")
	w.write("ctx/Dockerfile", `FROM busybox
ENV A=env
WORKDIR /w
RUN --mount=type=tmpfs,target=/t touch partial; echo tried; test -e mend
RUN ls > seen
`)
	w.write("ctx/s", "hidden")
	failed := func(args ...string) *terminal {
		t.Helper()
		term := w.terminal(append([]string{"build", "--debug", "--progress", "plain", "-t", "app", dir}, args...)...)
		term.expect(`Dockerfile:4: .* did not complete successfully: exit code: 1`)
		term.expect(`--- last output ---\r\ntried`)
		term.expect(`asks what next`)
		term.expect(`/w # `)
		return term
	}
	seen := func() string {
		t.Helper()
		return strings.Join(strings.Fields(w.conex("run", "--rm", "app", "cat", "/w/seen")), " ")
	}

	// The place is the step's: files as the command left them, environment, mounts, a terminal of the right size.
	term := failed()
	term.send("ls; echo $A; grep -c ' /t tmpfs' /proc/mounts; stty size\r")
	term.expect(`partial\r\nenv\r\n1\r\n24 80\r\n`)
	term.send("exit 3\r")
	term.expect(`What next\? `)
	// Again as it was: the files of the first try are gone.
	term.send("r\r")
	term.expect(`asks what next`)
	term.expect(`/w # `)
	term.send("rm partial; touch mend\r")
	term.expect(`/w # `)
	term.send("\x04")
	term.expect(`What next\? `)
	term.send("what\rd\r")
	term.expect(`What next\? `)
	term.expect(`/w # `)
	term.send("exit\r")
	term.expect(`What next\? `)
	// Again with what was changed.
	term.send("k\r")
	if code := term.wait(); code != 0 {
		t.Errorf("the build ended with %d", code)
	}
	if got := seen(); got != "mend partial seen" {
		t.Errorf("the next step saw %q", got)
	}
	// What was made by hand is not cached, and nothing that stands on it.
	term = failed()
	term.send("touch byhand; exit\r")
	term.expect(`What next\? `)
	term.send("c\r")
	if code := term.wait(); code != 0 {
		t.Errorf("the build ended with %d", code)
	}
	if got := seen(); got != "byhand partial seen" {
		t.Errorf("the next step saw %q", got)
	}
	// Stop is the default; Ctrl-C at the question stops too, and nothing is left of the step.
	term = failed()
	term.send("exit\r")
	term.expect(`What next\? `)
	term.send("\r")
	if code := term.wait(); code != 1 {
		t.Errorf("stopped, and the build ended with %d", code)
	}
	term = failed()
	term.send("exit\r")
	term.expect(`What next\? `)
	term.send("\x03")
	if code := term.wait(); code != 130 {
		t.Errorf("interrupted, and the build ended with %d", code)
	}
	// The display of a terminal goes on below.
	term = w.terminal("build", "--debug", "--progress", "tty", dir)
	term.expect(`asks what next`)
	term.expect(`/w # `)
	term.send("touch mend; exit\r")
	term.expect(`What next\? `)
	term.send("k\r")
	term.expect(`FINISHED`)
	if code := term.wait(); code != 0 {
		t.Errorf("the build ended with %d", code)
	}
}

// build shell at a terminal, and what is left when it is killed.
func TestBuildShell(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.write("ctx/Dockerfile", "FROM busybox\nWORKDIR /w\nRUN touch made\n")
	w.conex("build", "-q", filepath.Join(w.dir, "ctx"))
	term := w.terminal("build", "shell")
	term.expect(`build \w+, after \[3/3\] RUN touch made`)
	term.expect(`/w # `)
	term.send("ls; touch more; sleep 1000 & tty\r")
	term.expect(`made\r\n`)
	term.expect(`/dev/pts/0\r\n`)
	term.send("exit 4\r")
	if code := term.wait(); code != 4 {
		t.Errorf("exit code %d, want 4", code)
	}
	cmd := w.command("build", "shell", "--", "sh", "-c", "ls; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.inNetns(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := out.Read(buf)
	if err != nil || string(buf[:n]) != "made\n" {
		t.Errorf("%q %v", buf[:n], err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // "killed", as it should be
	w.eventually("the next command clears up", func() bool {
		w.conex("build", "shell", "--", "true")
		found, err := filepath.Glob(filepath.Join(w.state, "build", "*"))
		return err == nil && len(found) == 0
	})
}
