package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/linux/nettest"
	"conex/internal/network"
	"conex/test/mirror"
)

// world is one conex installation of a test: data, state and configuration folders of its own and, unless it was made by
// hostWorld, a network namespace of its own, so that a test may use port 8080 as typed. Its end checks that nothing is left.
type world struct {
	t     *testing.T
	bin   string
	root  string
	state string
	dir   string // scratch
	netns *os.File
	env   []string
	// driver is the storage driver, "" what the kernel can.
	driver string
	// podmanDir is podman's, once it has been used.
	podmanDir string

	mu       sync.Mutex
	requests []string // what the mirror was asked
	ids      []string // containers that were seen, for the search for their cgroups
}

// newWorld makes a world whose docker.io is the mirror with the images of images/make.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.netns = newNetns(t)
	w.serveMirror()
	return w
}

// hostWorld is newWorld in the machine's own network namespace, for what must reach the outside.
func hostWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.serveMirror()
	return w
}

func bareWorld(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it runs containers")
	}
	if testing.Short() {
		t.Skip("-short: scenarios take seconds to minutes each")
	}
	w := &world{t: t, bin: binary(t), dir: t.TempDir()}
	w.root = filepath.Join(w.dir, "root")
	// State belongs on a tmpfs, as /run is.
	state, err := os.MkdirTemp("/run", "conex-test.")
	if err != nil {
		t.Fatal(err)
	}
	w.state = state
	config := filepath.Join(w.dir, "config.toml")
	w.env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "CONEX_") }),
		"CONEX_ROOT="+w.root, "CONEX_STATE="+w.state, "CONEX_CONFIG="+config)
	t.Cleanup(w.end)
	return w
}

// patiently runs what all tests wait for. Beside other work a build that finds nothing cached takes minutes, which looks like a test that hangs: so
// it says what it is waiting for.
func patiently(cmd *exec.Cmd) ([]byte, error) {
	began := time.Now()
	done := make(chan struct{})
	var teller sync.WaitGroup
	teller.Go(func() {
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				fmt.Fprintf(os.Stderr, "since %v the tests wait for: %s\n", time.Since(began).Round(time.Second), strings.Join(cmd.Args, " "))
			}
		}
	})
	defer teller.Wait()
	defer close(done)
	return cmd.CombinedOutput()
}

// binary builds conex once for all scenarios, and beside it the explorer.
var buildOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "conex-bin.")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "conex")
	entry, runtimeEntry := "", "" // as the Makefile does it
	if runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64" {
		entry, runtimeEntry = "-E conexEntry", "-E conexRuntimeEntry"
	}
	for _, args := range [][]string{{"-ldflags", entry, "conex/cmd/conex"}, {"conex/cmd/conex-explore"}, {"-ldflags", runtimeEntry, "conex/cmd/conex-runtime"}} {
		cmd := exec.Command("go", append([]string{"build", "-trimpath", "-o", dir}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := patiently(cmd); err != nil {
			return "", fmt.Errorf("go build: %w\n%s", err, out)
		}
	}
	return bin, nil
})

func binary(t *testing.T) string {
	t.Helper()
	bin, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// layoutOnce runs images/make, which does nothing when the cache is up to date.
var layoutOnce = sync.OnceValues(func() (string, error) {
	bin, err := buildOnce()
	if err != nil {
		return "", err
	}
	cache := os.Getenv("CONEX_IMAGES_CACHE")
	if cache == "" {
		cache, err = filepath.Abs("../.cache/images")
		if err != nil {
			return "", err
		}
	}
	cmd := exec.Command("../images/make", "-o", cache, "-c", bin)
	if out, err := patiently(cmd); err != nil {
		return "", fmt.Errorf("images/make: %w\n%s", err, out)
	}
	return filepath.Join(cache, "oci"), nil
})

// serveMirror serves the made images on a loopback address of the world and configures them as docker.io.
func (w *world) serveMirror() {
	w.t.Helper()
	layout, err := layoutOnce()
	if err != nil {
		w.t.Fatal(err)
	}
	h, err := mirror.Handler(layout, func(r *http.Request) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.requests = append(w.requests, r.Method+" "+r.URL.Path)
	})
	if err != nil {
		w.t.Fatal(err)
	}
	var l net.Listener
	w.inNetns(func() { l, err = net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		w.t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	w.t.Cleanup(func() { srv.Close(); <-done })
	config := fmt.Sprintf("[registry.\"docker.io\"]\nmirrors = [\"http://%s\"]\n", l.Addr())
	if err := os.WriteFile(filepath.Join(w.dir, "config.toml"), []byte(config), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// asked says whether the mirror saw a request that contains part.
func (w *world) asked(part string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.requests, func(r string) bool { return strings.Contains(r, part) })
}

// newNetns makes a network namespace with its loopback device up. It lives as long as the file, which the caller closes, or a
// process in it.
func newNetns(t *testing.T) *os.File {
	t.Helper()
	var f *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network: %w", err)
		}
		if err := nettest.LoopbackUp(); err != nil {
			return err
		}
		var err error
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// onThread runs fn on a thread of its own, which dies afterwards: whatever fn did to its namespaces dies with it.
func onThread(fn func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		errc <- fn()
	}()
	return <-errc
}

// within runs fn in the world's network namespace; processes that fn starts are in it too.
func (w *world) within(fn func() error) error {
	if w.netns == nil {
		return fn()
	}
	return onThread(func() error {
		if err := unix.Setns(int(w.netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// inNetns is within for the test's own goroutine and what can't fail, or says itself that it has.
func (w *world) inNetns(fn func()) {
	w.t.Helper()
	if err := w.within(func() error { fn(); return nil }); err != nil {
		w.t.Fatal(err)
	}
}

// result is what a finished command left.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// command makes a conex command of this world, not started yet.
func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command(w.bin, args...)
	cmd.Env, cmd.Dir = w.env, w.dir
	return cmd
}

// start starts cmd in the world's network namespace.
func (w *world) start(cmd *exec.Cmd) {
	w.t.Helper()
	if err := w.within(cmd.Start); err != nil {
		w.t.Fatalf("%v: %v", cmd.Args, err)
	}
}

// try runs conex with args to its end, whatever its exit code. Four minutes are its limit. Several goroutines may: what goes wrong with running it
// is an error of the test and the code -1.
func (w *world) try(args ...string) result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, w.bin, args...)
	cmd.Env, cmd.Dir = w.env, w.dir
	// A pipe that a leaked process keeps open must not hold the test up.
	cmd.WaitDelay = 5 * time.Second
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	began := time.Now()
	err := w.within(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	r := result{stdout: out.String(), stderr: errb.String(), took: time.Since(began)}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case ctx.Err() != nil:
		r.code = -1
		w.t.Errorf("conex %s: not done after four minutes\n%s%s", strings.Join(args, " "), r.stdout, r.stderr)
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	default:
		r.code = -1
		w.t.Errorf("conex %s: %v\n%s%s", strings.Join(args, " "), err, r.stdout, r.stderr)
	}
	return r
}

// conex runs conex with args, fails the test unless it exits with 0, and returns its stdout without the last newline.
func (w *world) conex(args ...string) string {
	w.t.Helper()
	r := w.try(args...)
	if r.code != 0 {
		w.t.Fatalf("conex %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return strings.TrimSuffix(r.stdout, "\n")
}

// get fetches url from inside the world's network namespace, until it answers with 200: a container that has started may not listen yet.
func (w *world) get(url string) string {
	w.t.Helper()
	body, _ := w.getTried(url)
	return body
}

// getTried is get that says how many times it has asked.
func (w *world) getTried(url string) (body string, tries int) {
	w.t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: w.dial}}
	var last error
	for deadline := time.Now().Add(giveUp); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		tries++
		resp, err := client.Get(url)
		if err != nil {
			last = err
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && resp.StatusCode == http.StatusOK {
			return string(body), tries
		}
		last = fmt.Errorf("status %s, %v", resp.Status, err)
	}
	w.t.Fatalf("GET %s: %v", url, last)
	return "", tries
}

// giveUp is how long tests wait for what must come: so long that it has failed to, however busy the machine is.
const giveUp = 2 * time.Minute

// eventually polls until ok, and fails the test with what if it never is.
func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(giveUp); ; time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("not within %v: %s", giveUp, what)
		}
	}
}

// write makes a file below the world's scratch folder and returns its folder.
func (w *world) write(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return filepath.Dir(path)
}

// copyTree copies a folder into the scratch folder, for tests that change files.
func (w *world) copyTree(from, name string) string {
	w.t.Helper()
	to := filepath.Join(w.dir, name)
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		w.t.Fatal(err)
	}
	return to
}

// end removes the world's containers and images and checks that no trace is left.
func (w *world) end() {
	t := w.t
	if _, err := os.Stat(w.root); err == nil {
		if ids := w.containers(); len(ids) > 0 {
			if t.Failed() {
				w.report(ids)
			}
			w.conex(append([]string{"rm", "-f"}, ids...)...)
		}
		if ids := strings.Fields(w.try("images", "-q", "--no-trunc").stdout); len(ids) > 0 {
			slices.Sort(ids)
			w.conex(append([]string{"rmi", "-f"}, slices.Compact(ids)...)...)
		}
	}
	w.sweep()
	for _, leak := range w.leaks() {
		t.Errorf("left behind: %s", leak)
	}
	unmountBelow(t, w.state)
	unmountBelow(t, w.root)
	if err := os.RemoveAll(w.state); err != nil {
		t.Error(err)
	}
	if w.netns != nil {
		w.netns.Close()
	}
}

// containers lists the ids of all containers and remembers them.
func (w *world) containers() []string {
	w.t.Helper()
	ids := strings.Fields(w.conex("ps", "-aq", "--no-trunc"))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids = append(w.ids, ids...)
	return ids
}

// sweep takes down what conex keeps for the next container: the bridge, and the mounts of layers that the build cache holds.
func (w *world) sweep() {
	root, err := disk.OpenRoot(w.root)
	if err != nil {
		w.t.Error(err)
		return
	}
	w.inNetns(func() { err = network.Open(root, w.state).Cleanup(context.Background()) })
	if err != nil {
		w.t.Error(err)
	}
	ls, err := layers.Open(root, layers.Options{State: w.state, Driver: w.driver})
	if err == nil {
		err = ls.Unmount()
	}
	if err != nil {
		w.t.Error(err)
	}
}

// report logs what the containers said, for a test that failed.
func (w *world) report(ids []string) {
	w.t.Log(w.try("ps", "-a").stdout)
	for _, id := range ids {
		r := w.try("logs", "--tail", "30", id)
		w.t.Logf("logs of %.12s:\n%s%s", id, r.stdout, r.stderr)
	}
}
