package monitor_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	mnet "github.com/moby/moby/api/types/network"
)

func TestRun(t *testing.T) {
	w := newWorld(t)
	out, errs, code, err := w.run(request("sh", "-c", "echo out; echo err >&2; exit 3"))
	if err != nil || out != "out\n" || errs != "err\n" || code != 3 {
		t.Errorf("%q %q %d %v", out, errs, code, err)
	}
	killed := w.detached(request("sleep", "1000"))
	if err := w.Kill(t.Context(), killed, ""); err != nil {
		t.Error(err)
	}
	if code, err := w.Wait(t.Context(), killed); err != nil || code != 137 {
		t.Errorf("killed: %d %v", code, err)
	}
	r := request("id")
	r.Config.User = "bob"
	r.HostConfig.AutoRemove = true
	if out, _, _, err := w.run(r); err != nil || !strings.Contains(out, "uid=1000(bob) gid=1000(bob)") {
		t.Errorf("%q %v", out, err)
	}
	list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true})
	if err != nil || len(list) != 2 || !strings.HasPrefix(list[0].Status, "Exited (137) ") || !strings.HasSuffix(list[0].Status, " ago") {
		t.Errorf("%v %v", list, err)
	}
}

// TestExitCodes has commands that can't be executed: Docker's codes, and the container stays as "created" unless it is --rm.
func TestExitCodes(t *testing.T) {
	w := newWorld(t)
	for cmd, want := range map[string]int{"nosuch": 127, "/etc/passwd": 126, "/nosuch": 127} {
		for _, rm := range []bool{false, true} {
			r := request(cmd)
			r.HostConfig.AutoRemove = rm
			_, _, _, err := w.run(r)
			var ee *engine.ExitError
			if !errors.As(err, &ee) || ee.Code != want {
				t.Errorf("%s: %v", cmd, err)
			}
		}
	}
	list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true})
	if err != nil || len(list) != 3 {
		t.Fatalf("%v %v", list, err)
	}
	for _, c := range list {
		if c.Status != "Created" {
			t.Errorf("%s: %s", c.Command, c.Status)
		}
	}
	r := request("true")
	r.Config.Image = "nosuch"
	if _, _, _, err := w.run(r); !errors.Is(err, engine.ErrNotFound) || err.Error() != "No such image: nosuch:latest" {
		t.Errorf("%v", err)
	}
}

func TestInput(t *testing.T) {
	w := newWorld(t)
	r := request("sort", "-r")
	r.Config.OpenStdin, r.Config.StdinOnce, r.HostConfig.AutoRemove = true, true, true
	r.Streams.Stdin = strings.NewReader("a\nb\nc\n")
	if out, _, code, err := w.run(r); err != nil || out != "c\nb\na\n" || code != 0 {
		t.Errorf("%q %d %v", out, code, err)
	}
	// A reader that never ends does not keep the container's end from being seen.
	pr, pw := io.Pipe()
	defer pw.Close()
	r = request("head", "-n", "1")
	r.Config.OpenStdin, r.Config.StdinOnce, r.HostConfig.AutoRemove = true, true, true
	r.Streams.Stdin = pr
	go pw.Write([]byte("line\n"))
	if out, _, _, err := w.run(r); err != nil || out != "line\n" {
		t.Errorf("%q %v", out, err)
	}
}

// TestOutputWhole moves more than every buffer on the way holds.
func TestOutputWhole(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x")
	out, _, _, err := w.run(r)
	if err != nil || len(out) != 5000000 || strings.Trim(out, "x") != "" {
		t.Errorf("%d bytes, %v", len(out), err)
	}
}

func TestLogs(t *testing.T) {
	w := newWorld(t)
	id := w.detached(request("sh", "-c", "echo one; echo two >&2; echo -n three"))
	if code, err := w.Wait(t.Context(), id); err != nil || code != 0 {
		t.Fatalf("%d %v", code, err)
	}
	var out, errs bytes.Buffer
	if err := w.Logs(t.Context(), engine.LogsRequest{Container: id, Tail: -1, Stdout: &out, Stderr: &errs}); err != nil {
		t.Fatal(err)
	}
	if out.String() != "one\nthree" || errs.String() != "two\n" {
		t.Errorf("%q %q", out.String(), errs.String())
	}
	// Following ends with the container.
	id = w.detached(request("sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.1; done"))
	out.Reset()
	if err := w.Logs(t.Context(), engine.LogsRequest{Container: id, Follow: true, Tail: -1, Stdout: &out, Stderr: &errs}); err != nil {
		t.Fatal(err)
	}
	if out.String() != "1\n2\n3\n" {
		t.Errorf("%q", out.String())
	}
}

func TestExec(t *testing.T) {
	w := newWorld(t)
	r := request("sleep", "1000")
	r.Config.Env = []string{"A=1"}
	id := w.detached(r)
	if out, code, err := w.exec(id, "sh", "-c", "echo $A$B; exit 4"); err != nil || out != "1\n" || code != 4 {
		t.Errorf("%q %d %v", out, code, err)
	}
	var out bytes.Buffer
	code, err := w.Exec(t.Context(), engine.ExecRequest{
		Container: id, Cmd: []string{"sh", "-c", "cat; id -u; echo $B; pwd"}, Env: []string{"B=2"}, User: "bob", WorkingDir: "/etc", Interactive: true,
		Streams: engine.Streams{Stdin: strings.NewReader("in\n"), Stdout: &out, Stderr: &out},
	})
	if err != nil || code != 0 || out.String() != "in\n1000\n2\n/etc\n" {
		t.Errorf("%q %d %v", out.String(), code, err)
	}
	var ee *engine.ExitError
	if _, _, err := w.exec(id, "nosuch"); !errors.As(err, &ee) || ee.Code != 127 {
		t.Errorf("%v", err)
	}
	if _, err := w.Exec(t.Context(), engine.ExecRequest{Container: id, Cmd: []string{"touch", "/tmp/done"}, Detach: true}); err != nil {
		t.Error(err)
	}
	w.eventually("the detached command has not run", func() bool { _, code, _ := w.exec(id, "stat", "/tmp/done"); return code == 0 })
	// Many at a time.
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			if out, code, err := w.exec(id, "sh", "-c", "echo "+strconv.Itoa(i)); err != nil || code != 0 || out != strconv.Itoa(i)+"\n" {
				t.Errorf("exec %d: %q %d %v", i, out, code, err)
			}
		})
	}
	wg.Wait()
	w.eventually("execs are listed", func() bool { return len(w.state(id).ExecIDs) == 0 })
	if err := w.Kill(t.Context(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Wait(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, _, err := w.exec(id, "true"); !errors.Is(err, engine.ErrConflict) {
		t.Errorf("exec in a stopped container: %v", err)
	}
}

func TestStop(t *testing.T) {
	w := newWorld(t)
	const loop = "while :; do sleep 0.05; done"
	id := w.detached(request("sh", "-c", `trap "exit 5" TERM; trap "exit 6" INT; echo ready; `+loop))
	w.ready(id)
	if err := w.Stop(t.Context(), id, engine.StopRequest{}); err != nil {
		t.Fatal(err)
	}
	if x, err := w.Containers().Exit(id); err != nil || x.Code != 5 {
		t.Errorf("%+v %v", x, err)
	}
	if err := w.Stop(t.Context(), id, engine.StopRequest{}); err != nil {
		t.Errorf("stopped already: %v", err)
	}
	// The image's or the user's signal, and SIGKILL for who doesn't listen.
	if _, err := w.Start(t.Context(), engine.StartRequest{Container: id}); err != nil {
		t.Fatal(err)
	}
	w.ready(id, id)
	if err := w.Restart(t.Context(), id, engine.StopRequest{Signal: "INT"}); err != nil {
		t.Fatal(err)
	}
	if x, err := w.Containers().Exit(id); err != nil || x.Code != 6 || w.status(id) != "running" {
		t.Errorf("%+v %v %s", x, err, w.status(id))
	}
	deaf := w.detached(request("sh", "-c", `trap "" TERM; echo ready; `+loop))
	w.ready(deaf)
	now := 0
	if err := w.Stop(t.Context(), deaf, engine.StopRequest{Timeout: &now}); err != nil {
		t.Fatal(err)
	}
	if x, err := w.Containers().Exit(deaf); err != nil || x.Code != 137 || x.Signal != 9 {
		t.Errorf("%+v %v", x, err)
	}
	if err := w.Kill(t.Context(), deaf, "TERM"); !errors.Is(err, engine.ErrConflict) || !strings.HasSuffix(err.Error(), "is not running") {
		t.Errorf("kill of a stopped container: %v", err)
	}
	err := w.RemoveContainer(t.Context(), engine.RemoveRequest{Container: id})
	if !errors.Is(err, engine.ErrConflict) || !strings.HasSuffix(err.Error(), "container is running: stop the container before removing or force remove") {
		t.Errorf("rm of a running container: %v", err)
	}
}

// ready waits until a container has said so in each of its runs: its id is given once a run.
func (w *world) ready(runs ...string) {
	w.t.Helper()
	w.eventually("not ready", func() bool {
		var out bytes.Buffer
		if err := w.Logs(w.t.Context(), engine.LogsRequest{Container: runs[0], Tail: -1, Stdout: &out}); err != nil {
			w.t.Fatal(err)
		}
		return strings.Count(out.String(), "ready\n") == len(runs)
	})
}

func TestPublish(t *testing.T) {
	w := newWorld(t)
	web := func(name string) engine.RunRequest {
		r := request("sh", "-c", "echo hello >/tmp/index.html; exec httpd -f -p 80 -h /tmp")
		r.Name, r.HostConfig.NetworkMode = name, "bridge"
		r.HostConfig.PortBindings = mnet.PortMap{mnet.MustParsePort("80"): {{HostPort: "8080"}}}
		return r
	}
	w.detached(web("one"))
	w.eventually("no page", func() bool {
		resp, err := http.Get("http://127.0.0.1:8080/")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return err == nil && string(b) == "hello\n"
	})
	if p, err := w.Port(t.Context(), "one"); err != nil || len(p[mnet.MustParsePort("80")]) != 2 {
		t.Errorf("%v %v", p, err)
	}
	r := web("two")
	r.Detach = true
	_, err := w.Run(t.Context(), r)
	var ee *engine.ExitError
	if !errors.As(err, &ee) || ee.Code != 125 || !strings.Contains(err.Error(), "Bind for 0.0.0.0:8080 failed: port is already allocated") {
		t.Errorf("%v", err)
	}
	// The port and the address are free as soon as stop returns.
	if err := w.Stop(t.Context(), "one", engine.StopRequest{Signal: "KILL"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Start(t.Context(), engine.StartRequest{Container: "two"}); err != nil {
		t.Errorf("%v", err)
	}
}

// TestTerminal drives a shell on a terminal: size, detach, re-attach, exit code.
func TestTerminal(t *testing.T) {
	w := newWorld(t)
	r := request("sh")
	r.Config.Tty, r.Config.OpenStdin = true, true
	r.Name = "term"
	in, type_ := io.Pipe()
	out := &screen{}
	resize := make(chan engine.Size, 1)
	resize <- engine.Size{Rows: 31, Cols: 97}
	r.Streams = engine.Streams{Stdin: in, Stdout: out, Resize: resize, DetachKeys: "ctrl-p,ctrl-q"}
	done := make(chan engine.RunResult, 1)
	go func() {
		res, err := w.Run(t.Context(), r)
		if err != nil {
			t.Error(err)
		}
		done <- res
	}()
	send := func(s string) {
		t.Helper()
		if _, err := io.WriteString(type_, s); err != nil {
			t.Fatal(err)
		}
	}
	send("stty size; echo T=$TERM\n")
	w.eventually("no size", func() bool { return out.has("31 97\r\nT=xterm\r\n") })
	resize <- engine.Size{Rows: 40, Cols: 100}
	w.eventually("no new size", func() bool {
		send("stty size\n")
		return out.has("40 100\r\n")
	})
	send("sleep 1000\n")
	w.eventually("no sleep", func() bool {
		_, rows, err := w.Top(t.Context(), "term", nil)
		return err == nil && slices.ContainsFunc(rows, func(r []string) bool { return r[len(r)-1] == "sleep 1000" })
	})
	send("\x03echo interrupted=$?\n")
	w.eventually("ctrl-c did nothing", func() bool { return out.has("interrupted=130\r\n") })
	send("\x10\x11")
	if res := <-done; !res.Detached || res.ExitCode != 0 {
		t.Errorf("%+v", res)
	}
	type_.Close()
	if s := w.state(mustResolve(t, w, "term")); s == nil || s.Status != "running" {
		t.Fatalf("after detaching: %+v", s)
	}
	in, type_ = io.Pipe()
	out = &screen{}
	code := make(chan int, 1)
	go func() {
		c, err := w.Attach(t.Context(), engine.AttachRequest{Container: "term", Streams: engine.Streams{Stdin: in, Stdout: out}})
		if err != nil {
			t.Error(err)
		}
		code <- c
	}()
	send("echo back; exit 9\n")
	if c := <-code; c != 9 || !out.has("back\r\n") {
		t.Errorf("%d %q", c, out.String())
	}
}

func mustResolve(t *testing.T, w *world, name string) string {
	t.Helper()
	id, err := w.Containers().Resolve(name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// screen is what a terminal showed.
type screen struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *screen) has(text string) bool { return strings.Contains(s.String(), text) }

func TestMounts(t *testing.T) {
	w := newWorld(t)
	host := t.TempDir()
	if err := os.WriteFile(filepath.Join(host, "file"), []byte("from the host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := request("sh", "-c", "cat /ro/file; touch /ro/x; touch /rw/y && touch /t/z && touch /x; cat /data/sub/file; stat -c %u:%a /data/sub/file; touch /data/w")
	r.Config.Volumes = map[string]struct{}{"/data": {}}
	r.HostConfig.ReadonlyRootfs, r.HostConfig.AutoRemove = true, true
	r.HostConfig.Binds = []string{host + ":/ro:ro"}
	r.HostConfig.Mounts = []mount.Mount{{Type: mount.TypeBind, Source: host, Target: "/rw"}}
	r.HostConfig.Tmpfs = map[string]string{"/t": ""}
	out, errs, code, err := w.run(r)
	if err != nil || code != 0 || out != "from the host\nfrom the image\n1000:640\n" {
		t.Errorf("%q %d %v", out, code, err)
	}
	if !strings.Contains(errs, "/ro/x: Read-only file system") || !strings.Contains(errs, "/x: Read-only file system") || strings.Contains(errs, "/data/w") {
		t.Errorf("%q", errs)
	}
	if _, err := os.Lstat(filepath.Join(host, "y")); err != nil {
		t.Error(err)
	}
	r = request("true")
	r.HostConfig.Mounts = []mount.Mount{{Type: mount.TypeBind, Source: host + "/nosuch", Target: "/rw"}}
	if _, _, _, err := w.run(r); !errors.Is(err, engine.ErrInvalid) || !strings.Contains(err.Error(), "bind source path does not exist") {
		t.Errorf("%v", err)
	}
}

func TestHealth(t *testing.T) {
	w := newWorld(t)
	r := request("sleep", "1000")
	r.Config.Healthcheck = &apic.HealthConfig{Test: []string{"CMD-SHELL", "echo checking; stat /tmp/ok"}, Interval: 20 * time.Millisecond, Retries: 2}
	id := w.detached(r)
	status := func() apic.HealthStatus { return w.state(id).Health.Status }
	w.eventually("not unhealthy", func() bool { return status() == apic.Unhealthy })
	if _, code, err := w.exec(id, "touch", "/tmp/ok"); err != nil || code != 0 {
		t.Fatal(code, err)
	}
	w.eventually("not healthy", func() bool { return status() == apic.Healthy })
	w.eventually("less than 5 results", func() bool { return len(w.state(id).Health.Log) == 5 })
	c, err := w.InspectContainer(t.Context(), id, false)
	if err != nil || len(c.State.Health.Log) != 5 || !strings.HasPrefix(c.State.Health.Log[4].Output, "checking\n") {
		t.Errorf("%+v %v", c.State.Health, err)
	}
}

// TestOOM has the kernel kill a process for lack of memory.
func TestOOM(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo survived")
	r.HostConfig.Memory, r.HostConfig.MemorySwap = 8<<20, 8<<20
	out, _, code, err := w.run(r)
	if err != nil || out != "" || code == 0 {
		t.Fatalf("%q %d %v", out, code, err)
	}
	list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true})
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if c, err := w.InspectContainer(t.Context(), list[0].ID, false); err != nil || !c.State.OOMKilled {
		t.Errorf("%+v %v", c.State, err)
	}
}

// TestRace has many commands start, stop and remove one container at the same time: none may get stuck, and nothing may be left.
func TestRace(t *testing.T) {
	w := newWorld(t)
	r := request("sleep", "1000")
	r.Name = "busy"
	created, err := w.Create(t.Context(), r.CreateRequest)
	if err != nil {
		t.Fatal(err)
	}
	now := 0
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for range 5 {
				var err error
				if i%2 == 0 {
					_, err = w.Start(t.Context(), engine.StartRequest{Container: created.ID})
				} else {
					err = w.Stop(t.Context(), created.ID, engine.StopRequest{Timeout: &now})
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for range 3 {
		wg.Go(func() {
			err := w.RemoveContainer(t.Context(), engine.RemoveRequest{Container: created.ID, Force: true})
			if err != nil && !errors.Is(err, engine.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := w.Containers().Load(created.ID); !errors.Is(err, container.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// TestHalfCreated has what a crash within Create leaves: it never shows, and its name is free.
func TestHalfCreated(t *testing.T) {
	w := newWorld(t)
	if err := os.Symlink(disk.RandomID(), w.Root().Path("names", "half")); err != nil {
		t.Fatal(err)
	}
	r := request("true")
	r.Name, r.HostConfig.AutoRemove = "half", true
	if _, _, code, err := w.run(r); err != nil || code != 0 {
		t.Errorf("%d %v", code, err)
	}
}

// TestCreateFails has a name that is taken: the volumes made on the way are gone again.
func TestCreateFails(t *testing.T) {
	w := newWorld(t)
	r := request("true")
	r.Name = "web"
	if _, err := w.Create(t.Context(), r.CreateRequest); err != nil {
		t.Fatal(err)
	}
	r.Config.Volumes = map[string]struct{}{"/data": {}}
	r.HostConfig.Binds = []string{"named:/named"}
	if _, err := w.Create(t.Context(), r.CreateRequest); !errors.Is(err, engine.ErrConflict) {
		t.Fatal(err)
	}
	if left := w.entries(w.Root().Path("volumes")); len(left) > 0 {
		t.Errorf("volumes %v", left)
	}
	if left := w.entries(w.Root().Path("leases")); slices.ContainsFunc(left, func(n string) bool { return n != "gc.lock" }) {
		t.Errorf("leases %v", left)
	}
}

// TestClientGone has an attached client go away: the container goes on, and a new client sees its output.
func TestClientGone(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", "while :; do echo tick; sleep 0.02; done")
	r.Name = "ticker"
	ctx, leave := context.WithCancel(t.Context())
	out := &screen{}
	r.Streams.Stdout = out
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := w.Run(ctx, r); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	}()
	w.eventually("no output", func() bool { return out.has("tick\n") })
	leave()
	<-done
	ctx, leave = context.WithCancel(t.Context())
	defer leave()
	again := &screen{}
	done = make(chan struct{})
	go func() {
		defer close(done)
		if _, err := w.Attach(ctx, engine.AttachRequest{Container: "ticker", Streams: engine.Streams{Stdout: again}}); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
	}()
	w.eventually("no output for the second", func() bool { return again.has("tick\n") })
	leave()
	<-done
}
