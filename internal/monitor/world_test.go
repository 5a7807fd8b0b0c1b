package monitor_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/engine"
	_ "conex/internal/monitor" // re-executions of this test binary become monitors

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests in a network namespace of their own: they make bridges and nftables tables.
func TestMain(m *testing.M) {
	const marker = "CONEX_TEST_NETNS"
	if os.Getuid() != 0 {
		fmt.Println("skip: containers need root")
		return
	}
	if os.Getenv(marker) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			fmt.Printf("set up the test's namespace: %v %s\n", err, out)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), marker+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := c.Run(); err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			os.Exit(ee.ExitCode())
		}
		fmt.Println(err)
		os.Exit(1)
	}
}

const busybox = "/bin/busybox"

// world is an engine with the image "busybox".
type world struct {
	*engine.Engine
	t *testing.T
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldAt(t, filepath.Join(t.TempDir(), "root"))
}

// newWorldAt is newWorld with its data folder at root.
func newWorldAt(t *testing.T, root string) *world {
	t.Helper()
	bin, err := os.ReadFile(busybox)
	if err != nil {
		t.Skipf("skip: the tests' image is made of %s (package busybox-static): %v", busybox, err)
	}
	cfg := &config.Config{Root: root, State: filepath.Join(t.TempDir(), "run")}
	e, err := engine.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{e, t}
	t.Cleanup(w.close)
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	add := func(h tar.Header, content string) {
		h.Size, h.ModTime = int64(len(content)), time.Unix(1e9, 0)
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, content); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin/", "etc/", "tmp/", "data/", "data/sub/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(bin))
	for _, a := range []string{"sh", "cat", "echo", "sleep", "true", "false", "head", "sort", "id", "ip", "httpd", "stat", "touch", "kill", "env", "wget", "rm", "ls", "stty", "mount", "tr", "seq"} {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + a, Linkname: "busybox", Mode: 0o777}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, "root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/:/bin/sh\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, "root:x:0:\nbob:x:1000:\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "data/sub/file", Mode: 0o640, Uid: 1000, Gid: 1000}, "from the image\n")
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Import(t.Context(), engine.ImportRequest{Source: "-", Stdin: &buf, Reference: "busybox"}); err != nil {
		t.Fatal(err)
	}
	return w
}

// close removes everything and checks that nothing is left.
func (w *world) close() {
	ctx := context.Background()
	list, err := w.ListContainers(ctx, engine.ListRequest{All: true})
	if err != nil {
		w.t.Error(err)
	}
	for _, c := range list {
		if err := w.RemoveContainer(ctx, engine.RemoveRequest{Container: c.ID, Force: true, Volumes: true}); err != nil && !errors.Is(err, engine.ErrNotFound) {
			w.t.Error(err)
		}
	}
	// Monitors clean up after they have reported.
	w.eventually("run folders are left", func() bool { return len(w.entries(w.State(), "c")) == 0 })
	for _, dir := range []string{"containers", "names", "staging", "trash", "volumes"} {
		if left := w.entries(w.Root().Path(dir)); len(left) > 0 {
			w.t.Errorf("%s holds %v", dir, left)
		}
	}
	if ls, err := w.Layers(); err != nil {
		w.t.Error(err)
	} else if err := ls.Unmount(); err != nil {
		w.t.Error(err)
	}
	if b, err := os.ReadFile("/proc/self/mounts"); err != nil || bytes.Contains(b, []byte(w.State())) {
		w.t.Errorf("mounts are left: %v", err)
	}
}

func (w *world) entries(elem ...string) []string {
	w.t.Helper()
	es, err := os.ReadDir(filepath.Join(elem...))
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names
}

// eventually waits for what another process does on its own time.
func (w *world) eventually(what string, f func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("still after a minute: %s", what)
		}
	}
}

func request(cmd ...string) engine.RunRequest {
	return engine.RunRequest{CreateRequest: engine.CreateRequest{
		Pull: "never", Config: &apic.Config{Image: "busybox", Cmd: cmd}, HostConfig: &apic.HostConfig{NetworkMode: "none"},
	}}
}

// run runs a command to its end.
func (w *world) run(r engine.RunRequest) (stdout, stderr string, code int, err error) {
	w.t.Helper()
	var out, errs bytes.Buffer
	r.Streams.Stdout, r.Streams.Stderr = &out, &errs
	res, err := w.Run(w.t.Context(), r)
	return out.String(), errs.String(), res.ExitCode, err
}

// detached starts a command and returns the container's id.
func (w *world) detached(r engine.RunRequest) string {
	w.t.Helper()
	r.Detach = true
	res, err := w.Run(w.t.Context(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.ID
}

func (w *world) state(id string) *container.State {
	w.t.Helper()
	st, err := w.Containers().State(id)
	if err != nil {
		w.t.Fatal(err)
	}
	return st
}

func (w *world) status(id string) string {
	w.t.Helper()
	n, err := w.Containers().Snapshot(id)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(n.Status())
}

func (w *world) exec(id string, cmd ...string) (string, int, error) {
	w.t.Helper()
	var out bytes.Buffer
	code, err := w.Exec(w.t.Context(), engine.ExecRequest{Container: id, Cmd: cmd, Streams: engine.Streams{Stdout: &out, Stderr: &out}})
	return out.String(), code, err
}
