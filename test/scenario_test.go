package test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
)

// The three ways to a container, typed as every tutorial has them. Each pulls its image from the mirror of docker.io.

func TestRunDetachedWithPort(t *testing.T) {
	w := newWorld(t)
	id := w.conex("run", "-d", "--name", "webserver", "-p", "8080:80", "nginx")
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(id) {
		t.Errorf("run -d printed %q, want a container id", id)
	}
	if page := w.get("http://127.0.0.1:8080/"); !strings.Contains(page, "Welcome to nginx!") {
		t.Errorf("the page is %q", page)
	}
	if !w.asked("GET /v2/library/nginx/manifests/latest") {
		t.Error("the image did not come from the mirror of docker.io")
	}
	if got := w.conex("ps", "--format", "{{.Names}} {{.Image}} {{.Ports}}"); !strings.HasPrefix(got, "webserver nginx 0.0.0.0:8080->80/tcp") {
		t.Errorf("ps says %q", got)
	}
	// nginx logs the request through its link to the container's stdout.
	w.eventually("the request in the container's log", func() bool {
		return strings.Contains(w.conex("logs", "webserver"), `"GET / HTTP/1.1" 200`)
	})
	// A second one can't have the name, and a third can't have the port: nothing of them stays.
	if r := w.try("run", "-d", "--name", "webserver", "nginx"); r.code != 125 || !strings.Contains(r.stderr, "already in use") {
		t.Errorf("taken name: exit code %d, %s", r.code, r.stderr)
	}
	if r := w.try("run", "-d", "--rm", "-p", "8080:80", "nginx"); r.code != 125 || !strings.Contains(r.stderr, "8080") {
		t.Errorf("taken port: exit code %d, %s", r.code, r.stderr)
	}
	if got := w.conex("ps", "-aq"); strings.Contains(got, "\n") {
		t.Errorf("containers after two refused ones: %q", got)
	}
	w.conex("stop", "webserver")
	if got := w.conex("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "webserver"); got != "exited 0" {
		t.Errorf("after stop (SIGQUIT by the image's STOPSIGNAL): %s", got)
	}
}

func TestCreateThenStart(t *testing.T) {
	w := newWorld(t)
	id := w.conex("create", "--name", "myapp", "-p", "8080:80", "nginx")
	if got := w.conex("inspect", "-f", "{{.State.Status}}", "myapp"); got != "created" {
		t.Errorf("after create: %s", got)
	}
	if !w.asked("GET /v2/library/nginx/manifests/latest") {
		t.Error("the image did not come from the mirror of docker.io")
	}
	if got := w.conex("start", "myapp"); got != "myapp" {
		t.Errorf("start printed %q", got)
	}
	if page := w.get("http://127.0.0.1:8080/"); !strings.Contains(page, "Welcome to nginx!") {
		t.Errorf("the page is %q", page)
	}
	if got := w.conex("ps", "-q", "--no-trunc"); got != id {
		t.Errorf("ps -q says %q, want %s", got, id)
	}
}

func TestInteractive(t *testing.T) {
	w := newWorld(t)
	term := w.terminal("run", "-it", "--name", "interactive", "ubuntu", "/bin/bash")
	term.expect(`root@[0-9a-f]{12}:/# `)
	term.send("tty && echo $((6 * 7)) && cat /etc/debian_version\r")
	term.expect(`/dev/pts/0\r\n42\r\n`)
	term.expect(`root@[0-9a-f]{12}:/# `)
	// The window's size arrives inside, also when it changes.
	if err := pty.Setsize(term.tty, &pty.Winsize{Rows: 33, Cols: 101}); err != nil {
		t.Fatal(err)
	}
	term.send("until [ \"$(stty size)\" = '33 101' ]; do sleep .05; done; echo res''ized\r")
	term.expect(`resized\r\n`)
	// Ctrl-C ends the job, not the shell.
	term.send("sleep 1000\r")
	term.expect(`sleep 1000\r\n`)
	w.eventually("sleep running", func() bool {
		return strings.Contains(w.conex("top", "interactive"), "sleep 1000")
	})
	term.send("\x03")
	term.expect(`\^C`)
	term.send("echo status $?\r")
	term.expect(`status 130\r\n`)
	if !w.asked("GET /v2/library/ubuntu/manifests/latest") {
		t.Error("the image did not come from the mirror of docker.io")
	}
	// Leave it running, come back, end it.
	term.send("\x10\x11")
	if code := term.wait(); code != 0 {
		t.Errorf("detached with exit code %d", code)
	}
	if got := w.conex("inspect", "-f", "{{.State.Running}}", "interactive"); got != "true" {
		t.Errorf("running after ctrl-p ctrl-q: %s", got)
	}
	term = w.terminal("attach", "interactive")
	term.send("echo ba''ck\r")
	term.expect(`back\r\n`)
	term.send("exit 7\r")
	if code := term.wait(); code != 7 {
		t.Errorf("exit 7 gave exit code %d", code)
	}
}

// terminal is a conex command on a pty, driven as a person would.
type terminal struct {
	w    *world
	tty  *os.File
	wait func() int

	mu  sync.Mutex
	buf bytes.Buffer // what came since the last expect
}

func (w *world) terminal(args ...string) *terminal {
	w.t.Helper()
	cmd := w.command(args...)
	cmd.Env = append(cmd.Env, "TERM=xterm")
	term := &terminal{w: w}
	var err error
	w.inNetns(func() { term.tty, err = pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80}) })
	if err != nil {
		w.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		chunk := make([]byte, 4096)
		for {
			n, err := term.tty.Read(chunk)
			term.mu.Lock()
			term.buf.Write(chunk[:n])
			term.mu.Unlock()
			if err != nil { // EIO once the last process on the other side is gone
				return
			}
		}
	}()
	term.wait = sync.OnceValue(func() int {
		kill := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait()
		<-read
		term.tty.Close()
		return cmd.ProcessState.ExitCode()
	})
	w.t.Cleanup(func() { cmd.Process.Kill(); term.wait() })
	return term
}

func (t *terminal) send(keys string) {
	t.w.t.Helper()
	if _, err := io.WriteString(t.tty, keys); err != nil {
		t.w.t.Fatalf("type %q: %v", keys, err)
	}
}

// expect waits until the output since the last call matches pattern, and forgets what came up to the match's end.
func (t *terminal) expect(pattern string) {
	t.w.t.Helper()
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		t.mu.Lock()
		seen := t.buf.String()
		if loc := re.FindStringIndex(seen); loc != nil {
			t.buf.Next(loc[1])
			t.mu.Unlock()
			return
		}
		t.mu.Unlock()
		if time.Now().After(deadline) {
			t.w.t.Fatalf("no %q on the terminal, but %q", pattern, seen)
		}
	}
}

// What several containers and images share, and what they don't.

func TestLayersAreShared(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	base := strings.Fields(w.conex("image", "inspect", "-f", "{{range .RootFS.Layers}}{{println .}}{{end}}", "busybox"))
	w.write("a/Dockerfile", "FROM busybox\nRUN echo a > /a\n")
	w.write("b/Dockerfile", "FROM busybox\nRUN echo b > /b\n")
	used := w.layerFolders()
	var all []string
	for _, name := range []string{"a", "b"} {
		w.conex("build", "-q", "-t", name, filepath.Join(w.dir, name))
		got := strings.Fields(w.conex("image", "inspect", "-f", "{{range .RootFS.Layers}}{{println .}}{{end}}", name))
		if len(got) != len(base)+1 || strings.Join(got[:len(base)], " ") != strings.Join(base, " ") {
			t.Fatalf("layers of %s: %v, want those of busybox %v and one more", name, got, base)
		}
		all = append(all, got[len(base)])
	}
	if all[0] == all[1] {
		t.Errorf("both images end with %s", all[0])
	}
	if got := w.layerFolders(); len(got) != len(used)+2 {
		t.Errorf("layer folders: %d before, %d after two builds, want two more", len(used), len(got))
	}
	// Three images, but the base counts once.
	df := w.conex("system", "df", "--format", "{{.Type}}\t{{.TotalCount}}\t{{.Size}}")
	if !strings.Contains(df, "Images\t3\t") {
		t.Errorf("system df: %s", df)
	}
	w.conex("rmi", "a")
	if got := w.conex("run", "--rm", "--network", "none", "b", "cat", "/b"); got != "b" {
		t.Errorf("after rmi a, b says %q", got)
	}
}

func (w *world) layerFolders() []string {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.root, "layers"))
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestWritesStayInTheContainer(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	before := w.layerSums()
	w.conex("run", "-d", "--name", "one", "--network", "none", "busybox", "sh", "-c",
		"echo changed > /etc/passwd; echo new > /new; rm /bin/vi; exec sleep 1000")
	w.eventually("the writes of the first container", func() bool {
		return w.try("exec", "one", "test", "-e", "/new", "-a", "!", "-e", "/bin/vi").code == 0
	})
	// Neither the image nor a second container has them, while the first one runs.
	for range 2 {
		got := w.conex("run", "--rm", "--network", "none", "busybox", "sh", "-c", "grep -c changed /etc/passwd; ls /new /bin/vi 2>/dev/null; true")
		if r := w.try("run", "--rm", "--network", "none", "busybox", "grep", "-q", "changed", "/etc/passwd"); r.code != 1 || got != "0\n/bin/vi" {
			t.Errorf("a second container sees the first one's writes: %q, exit code %d", got, r.code)
		}
	}
	// They last over a restart.
	w.conex("restart", "-t", "0", "one")
	if got := w.conex("exec", "one", "cat", "/etc/passwd"); got != "changed" {
		t.Errorf("after a restart /etc/passwd has %q", got)
	}
	// Root in a container, with every capability, writes all over its files: what lies on the disk stays as it is.
	w.conex("run", "--rm", "--network", "none", "--privileged", "busybox", "sh", "-c",
		`for f in /bin/busybox /etc/group; do dd if=/dev/zero of=$f bs=1 count=64 conv=notrunc; done; mount -o remount,rw / ; rm -rf /etc /root; true`)
	after := w.layerSums()
	for name, sum := range before {
		if after[name] != sum {
			t.Errorf("layer file %s had sha256 %s, has %s", name, sum, after[name])
		}
	}
	if got := w.conex("run", "--rm", "--network", "none", "busybox", "head", "-n1", "/etc/passwd"); got != "root:x:0:0:root:/root:/bin/sh" {
		t.Errorf("the image's /etc/passwd begins with %q", got)
	}
}
