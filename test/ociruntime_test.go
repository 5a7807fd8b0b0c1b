package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// runtimeLink makes a name by which others call conex's OCI runtime. Links to conex are for test/scripts/runtime.txt.
func (w *world) runtimeLink() string {
	w.t.Helper()
	link := w.path("conex-runtime")
	if err := os.Symlink(filepath.Join(filepath.Dir(w.bin), "conex-runtime"), link); err != nil {
		w.t.Fatal(err)
	}
	return link
}

// fails runs a peer's command that must end with code and say text.
func (p *peer) fails(code int, text string, args ...string) {
	p.w.t.Helper()
	_, err := p.try(args...)
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.ExitCode() != code || !strings.Contains(err.Error(), text) {
		p.w.t.Errorf("%s: %v; want code %d and %q", strings.Join(args, " "), err, code, text)
	}
}

// onTerminal runs a peer's command on a terminal of its own and returns what it showed.
func (p *peer) onTerminal(args ...string) string {
	p.w.t.Helper()
	script, err := exec.LookPath("script")
	if err != nil {
		p.w.t.Skip("needs script(1) for a terminal")
	}
	line := make([]string, 0, len(p.argv)+len(args))
	for _, a := range append(p.argv[:len(p.argv):len(p.argv)], args...) {
		line = append(line, "'"+a+"'")
	}
	cmd := exec.Command(script, "-qec", strings.Join(line, " "), "/dev/null")
	cmd.Dir, cmd.Env = p.w.dir, append(os.Environ(), p.env...)
	// A user who types nothing, not one who is gone.
	in, typed, err := os.Pipe()
	if err != nil {
		p.w.t.Fatal(err)
	}
	defer in.Close()
	defer typed.Close()
	cmd.Stdin = in
	out, err := cmd.Output()
	if err != nil {
		p.w.t.Errorf("%s on a terminal: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

const obeying = `trap "exit 0" TERM; echo ready; while :; do sleep 0.05; done`

// engineOnRuntime goes through what Docker and Podman do with an OCI runtime; run is the beginning of their run.
func engineOnRuntime(t *testing.T, p *peer, run ...string) {
	t.Helper()
	with := func(args ...string) []string { return append(append([]string{"run"}, run...), args...) }
	if out := p.run(with("--rm", "busybox", "echo", "hello")...); out != "hello" {
		t.Errorf("run: %q", out)
	}
	p.fails(9, "", with("--rm", "busybox", "sh", "-c", "exit 9")...)
	p.fails(127, "nope", with("--rm", "busybox", "nope")...)
	if out := p.onTerminal(with("--rm", "-it", "busybox", "sh", "-c", "tty; test -t 0 && echo terminal")...); !strings.Contains(out, "/dev/pts/0\r\nterminal") {
		t.Errorf("run -it: %q", out)
	}
	if out := p.run(with("--rm", "--user", "5:6", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/t", "-v", p.w.dir+":/v:ro",
		"busybox", "sh", "-c", "id -u; id -g; touch /x /v/x 2>/dev/null || touch /t/x && grep -c '0000000000000000' /proc/self/status; grep NoNewPrivs /proc/self/status; grep '^Seccomp:' /proc/self/status")...); !strings.HasPrefix(out, "5\n6\n") || !strings.Contains(out, "NoNewPrivs:\t1\nSeccomp:\t2") {
		t.Errorf("run with confinement: %q", out)
	}
	p.run(with("-d", "--name", "web", "--memory", "64m", "busybox", "sh", "-c", obeying)...)
	if out := p.run("exec", "web", "sh", "-c", "echo in"); out != "in" {
		t.Errorf("exec: %q", out)
	}
	p.fails(3, "", "exec", "web", "sh", "-c", "exit 3")
	if out := p.onTerminal("exec", "-it", "web", "tty"); !strings.Contains(out, "/dev/pts/") {
		t.Errorf("exec -it: %q", out)
	}
	p.run("exec", "-d", "web", "touch", "/made")
	p.w.eventually("the detached exec has run", func() bool { _, err := p.try("exec", "web", "ls", "/made"); return err == nil })
	p.run("pause", "web")
	if out := p.run("ps", "-a"); !strings.Contains(strings.ToLower(out), "paused") {
		t.Errorf("paused: %s", out)
	}
	p.run("unpause", "web")
	if out := p.run("top", "web"); !strings.Contains(out, "trap") {
		t.Errorf("top: %s", out)
	}
	p.w.eventually("its output is in the log", func() bool { return p.run("logs", "web") == "ready" })
	p.run("stop", "-t", "60", "web")
	if out := p.run("inspect", "-f", "{{.State.ExitCode}}", "web"); out != "0" { // the signal did not reach it
		t.Errorf("stopped, it has the exit code %s", out)
	}
	p.run("start", "web")
	p.run("kill", "web")
	p.run("rm", "-f", "web")
}

func TestDockerOnConexRuntime(t *testing.T) {
	w := bareWorld(t)
	image, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	p := w.dockerd("--add-runtime", "conex="+w.runtimeLink(), "--cgroup-parent", "/conex-test-docker")
	p.run("import", image, "busybox")
	engineOnRuntime(t, p, "--runtime", "conex")
	// A network is made in a hook before the process runs, with its number.
	if out := p.run("run", "--rm", "--runtime", "conex", "busybox", "ip", "addr", "show", "eth0"); !strings.Contains(out, "inet 172.") {
		t.Errorf("bridge: %s", out)
	}
	p.run("run", "-d", "--name", "limits", "--runtime", "conex", "--memory", "64m", "busybox", "sleep", "1000")
	if out := p.run("stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", "limits"); !strings.Contains(out, "64MiB 1") {
		t.Errorf("stats: %s", out)
	}
	p.run("update", "--memory", "80m", "--memory-swap", "160m", "limits")
	if out := p.run("stats", "--no-stream", "--format", "{{.MemUsage}}", "limits"); !strings.Contains(out, "80MiB") {
		t.Errorf("stats after update: %s", out)
	}
	p.run("rm", "-f", "limits")
	if out := p.run("run", "--rm", "--runtime", "conex", "--privileged", "--init", "busybox", "sh", "-c", "echo $$"); out == "1" {
		t.Errorf("behind Docker's init the shell is process %s", out)
	}
}

func TestPodmanOnConexRuntime(t *testing.T) {
	w := bareWorld(t)
	image, err := busyboxTar()
	if err != nil {
		t.Fatal(err)
	}
	p := w.podmanPeer()
	p.argv = append(p.argv, "--runtime", w.runtimeLink())
	p.run("import", image, "busybox")
	engineOnRuntime(t, p, "--network", "none")
}

func TestContainerdOnConexRuntime(t *testing.T) {
	w := bareWorld(t)
	daemon, err := exec.LookPath("containerd")
	if err != nil {
		t.Skip("containerd is not installed")
	}
	if _, err := exec.LookPath("ctr"); err != nil {
		t.Skip("ctr is not installed")
	}
	dir, err := os.MkdirTemp("/run", "ctr-test.") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unmountBelow(t, dir)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	conf := filepath.Join(w.write("containerd.toml", fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", dir+"/root", dir+"/state", dir+"/sock")), "containerd.toml")
	log, err := os.Create(w.path("containerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(daemon, "-c", conf)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
	})
	p := w.newPeer("ctr", "-a", dir+"/sock")
	w.eventually("containerd answers", func() bool { _, err := p.try("version"); return err == nil })
	rootfs := w.path("rootfs")
	if err := os.MkdirAll(rootfs+"/bin", 0o755); err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static: ", err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	link := w.runtimeLink()
	with := func(args ...string) []string { return append([]string{"run", "--runc-binary", link}, args...) }
	if out := p.run(with("--rm", "--rootfs", rootfs, "one", "/bin/busybox", "echo", "hello")...); out != "hello" {
		t.Errorf("run: %q", out)
	}
	p.run(with("-d", "--rootfs", rootfs, "two", "/bin/busybox", "sleep", "1000")...)
	if out := p.run("task", "exec", "--exec-id", "e", "two", "/bin/busybox", "id", "-u"); out != "0" {
		t.Errorf("exec: %q", out)
	}
	p.run("task", "pause", "two")
	if out := p.run("task", "ls"); !strings.Contains(out, "PAUSED") {
		t.Errorf("task ls: %s", out)
	}
	p.run("task", "resume", "two")
	if out := p.run("task", "metrics", "two"); !strings.Contains(out, "pids.current") {
		t.Errorf("metrics: %s", out)
	}
	p.run("task", "kill", "-s", "9", "two")
	w.eventually("the task has ended", func() bool { return strings.Contains(p.run("task", "ls"), "STOPPED") })
	p.run("task", "rm", "two")
	p.run("container", "rm", "two")
}
