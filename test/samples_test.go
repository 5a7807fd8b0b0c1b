package test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// layerSums returns the sha256 of every file of every layer, by its path below layers/.
func (w *world) layerSums() map[string]string {
	w.t.Helper()
	sums := map[string]string{}
	dir := filepath.Join(w.root, "layers")
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || e.Name() == "lock" {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		sums[name] = hex.EncodeToString(h.Sum(nil))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if len(sums) == 0 {
		w.t.Fatal("no layer files")
	}
	return sums
}

// build builds and returns for every step of the Dockerfile that made or took a layer whether it was cached, by the
// instruction's text.
func (w *world) build(args ...string) map[string]bool {
	w.t.Helper()
	r := w.try(append([]string{"build", "--progress", "plain"}, args...)...)
	if r.code != 0 {
		w.t.Fatalf("conex build %s: exit code %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return parsePlain(r.stderr + r.stdout)
}

// parsePlain reads --progress plain: "#5 [build 3/4] RUN make" names step 5, "#5 CACHED" and "#5 DONE 0.1s" end it.
func parsePlain(out string) map[string]bool {
	names, cached := map[string]string{}, map[string]bool{}
	title := regexp.MustCompile(`^#(\d+) \[([^\]]*)\] (.*)$`)
	end := regexp.MustCompile(`^#(\d+) (CACHED|DONE)`)
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\r\n")
		if m := title.FindStringSubmatch(line); m != nil {
			if m[2] != "internal" {
				names[m[1]] = m[3]
			}
		} else if m := end.FindStringSubmatch(line); m != nil && names[m[1]] != "" {
			cached[names[m[1]]] = m[2] == "CACHED"
		}
	}
	return cached
}

// wantSteps compares what a build ran. Keys of want are beginnings of instructions; a step that no key fits must be cached.
func wantSteps(t *testing.T, what string, got map[string]bool, run ...string) {
	t.Helper()
	if len(got) == 0 {
		t.Errorf("%s: no step in the output", what)
	}
	seen := map[string]bool{}
	for step, cached := range got {
		if strings.HasPrefix(step, "FROM ") {
			continue
		}
		must := false
		for _, r := range run {
			if strings.HasPrefix(step, r) {
				must, seen[r] = true, true
			}
		}
		if cached == must {
			t.Errorf("%s: step %q: cached %v, want %v", what, step, cached, !must)
		}
	}
	for _, r := range run {
		if !seen[r] {
			t.Errorf("%s: no step %q", what, r)
		}
	}
}

// healthy waits until the container's health check says so.
func (w *world) healthy(name string) {
	w.t.Helper()
	w.eventually(name+" healthy", func() bool {
		return w.conex("inspect", "-f", "{{.State.Health.Status}}", name) == "healthy"
	})
	if got := w.conex("ps", "--filter", "name="+name, "--format", "{{.Status}}"); !strings.HasSuffix(got, "(healthy)") {
		w.t.Errorf("ps says %q", got)
	}
}

// published returns the address on the host of the container's only published port.
func (w *world) published(name string) string {
	w.t.Helper()
	addr, _, _ := strings.Cut(w.conex("port", name), "\n")
	_, addr, ok := strings.Cut(addr, " -> ")
	if !ok {
		w.t.Fatalf("port %s says %q", name, addr)
	}
	return addr
}

func (w *world) getJSON(url string) map[string]any {
	w.t.Helper()
	var v map[string]any
	if body := w.get(url); json.Unmarshal([]byte(body), &v) != nil {
		w.t.Fatalf("GET %s: no JSON but %q", url, body)
	}
	return v
}

// change appends to a file of a copied sample.
func (w *world) change(path, text string) {
	w.t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		w.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		w.t.Fatal(err)
	}
}

func TestSampleHello(t *testing.T) {
	w := newWorld(t)
	dir := w.copyTree("../samples/hello", "hello")
	w.build("-t", "hello", dir)
	wantSteps(t, "second build", w.build("-t", "hello", dir))
	w.conex("run", "-d", "--name", "hello", "-p", "8080:8080", "hello")
	if page := w.get("http://127.0.0.1:8080/"); !strings.Contains(page, "<h1>Hello from a container</h1>") {
		t.Errorf("the page is %q", page)
	}
	w.healthy("hello")
	wantSteps(t, "other greeting", w.build("-t", "hello", "--build-arg", "GREETING=Hi", dir), "RUN mkdir /www", "COPY --from=page")
}

// The Node.js build asks the npm registry, so it runs in the machine's own network namespace.
func TestSampleNode(t *testing.T) {
	w := hostWorld(t)
	dir := w.copyTree("../samples/node", "node")
	token := w.secret("token")
	npmrc := w.write("npmrc/.npmrc", "//npm.example.com/:_authToken="+token.value+"\n") + "/.npmrc"
	w.build("-t", "sample-node", "--secret", "id=npmrc,src="+npmrc, dir)
	if !w.asked("/v2/library/node/manifests/22") {
		t.Error("the base image did not come from the mirror of docker.io")
	}
	wantSteps(t, "second build", w.build("-t", "sample-node", dir))
	wantSteps(t, "tests", w.build("--target", "test", dir), "COPY . .", "RUN node --test")
	w.change(filepath.Join(dir, "server.test.js"), "\n// changed\n")
	wantSteps(t, "changed test", w.build("-t", "sample-node", dir))
	wantSteps(t, "changed test, tests", w.build("--target", "test", dir), "COPY . .", "RUN node --test")
	w.change(filepath.Join(dir, "server.js"), "\n// changed\n")
	wantSteps(t, "changed source", w.build("-t", "sample-node", dir), "COPY --exclude=*.test.js . .")
	w.change(filepath.Join(dir, "README.md"), "\nchanged\n") // .dockerignore has it
	wantSteps(t, "changed ignored file", w.build("-t", "sample-node", dir))

	// Installed again, and without a network: everything comes from the cache mount.
	w.change(filepath.Join(dir, "package.json"), "\n")
	steps := w.build("-t", "sample-node", "--network", "none", "--secret", "id=npmrc,src="+npmrc, dir)
	ran := false
	for step, cached := range steps {
		ran = ran || strings.Contains(step, "npm ci") && !cached
	}
	if !ran {
		t.Errorf("npm ci did not run again: %v", steps)
	}
	w.wantNoTrace(token, "npm ci --omit=dev")

	w.conex("run", "-d", "--name", "node", "-p", "127.0.0.1::3000", "sample-node")
	got := w.getJSON("http://" + w.published("node") + "/")
	if got["message"] != "Hello from Node.js" || got["uid"] != float64(1000) || got["env"] != "production" {
		t.Errorf("the answer is %v", got)
	}
	w.healthy("node")
	w.conex("stop", "node")
	if got := w.conex("inspect", "-f", "{{.State.ExitCode}}", "node"); got != "0" {
		t.Errorf("exit code after stop: %s", got)
	}
}

func TestSampleFlask(t *testing.T) {
	w := newWorld(t)
	dir := w.copyTree("../samples/flask", "flask")
	w.build("-t", "sample-flask", dir)
	wantSteps(t, "second build", w.build("-t", "sample-flask", dir))
	w.change(filepath.Join(dir, "app.py"), "\n# changed\n")
	wantSteps(t, "changed source", w.build("-t", "sample-flask", dir), "COPY --chmod=0644 app.py .")
	token := w.secret("token")
	tests := w.try("build", "--progress", "plain", "--target", "test", "--secret", "id=token,src="+token.file, dir)
	if tests.code != 0 || !strings.Contains(tests.stderr, "test_token") || strings.Contains(tests.stderr, "skipped") {
		t.Errorf("tests: exit code %d\n%s", tests.code, tests.stderr)
	}
	w.wantNoTrace(token, "test_token")

	w.conex("run", "-d", "--name", "flask", "-p", "8000:8000", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL",
		"--security-opt", "no-new-privileges", "--pids-limit", "64", "--memory", "256m", "sample-flask")
	if got := w.getJSON("http://127.0.0.1:8000/"); got["message"] != "Hello from Flask" || got["uid"] != float64(10001) {
		t.Errorf("the answer is %v", got)
	}
	disk := w.getJSON("http://127.0.0.1:8000/disk")
	if disk["/tmp"] != "writable" || disk["/"] == "writable" || disk["/app"] == "writable" {
		t.Errorf("writable places: %v", disk)
	}
	if got := w.conex("exec", "flask", "grep", "-E", "^(CapEff|CapBnd|NoNewPrivs|Seccomp):", "/proc/1/status"); !strings.Contains(got, "CapEff:\t0000000000000000") ||
		!strings.Contains(got, "CapBnd:\t0000000000000000") || !strings.Contains(got, "NoNewPrivs:\t1") || !strings.Contains(got, "Seccomp:\t2") {
		t.Errorf("process 1 has %q", got)
	}
	w.healthy("flask")
}

func TestSampleMinimal(t *testing.T) {
	w := newWorld(t)
	dir := w.copyTree("../samples/minimal", "minimal")
	w.build("-t", "sample-minimal", dir)
	wantSteps(t, "second build", w.build("-t", "sample-minimal", dir))
	w.change(filepath.Join(dir, "main.go"), "\n// changed\n")
	password := w.secret("netrc")
	r := w.try("build", "--progress", "plain", "-t", "sample-minimal", "--secret", "id=netrc,src="+password.file, dir)
	wantSteps(t, "changed source", parsePlain(r.stderr), "COPY --exclude=*_test.go . .", "RUN --mount=type=cache,target=/root/.cache/go-build", "COPY --from=build")
	// The compiler names what it compiles: the program alone, the standard library comes from the cache mount.
	if !strings.Contains(r.stderr, " example.com/minimal\n") || strings.Contains(r.stderr, " net/http\n") {
		t.Errorf("the second build compiled something else:\n%s", r.stderr)
	}
	if r := w.try("build", "--progress", "plain", "--target", "test", dir); r.code != 0 || !strings.Contains(r.stderr, "ok") {
		t.Errorf("tests: exit code %d\n%s", r.code, r.stderr)
	}
	w.wantNoTrace(password, "example.com/minimal")

	var size int64
	if err := json.Unmarshal([]byte(w.conex("image", "inspect", "-f", "{{.Size}}", "sample-minimal")), &size); err != nil {
		t.Fatal(err)
	}
	if size < 1<<20 || size > 10<<20 {
		t.Errorf("the image has %d bytes, want a few MB", size)
	}
	if got := strings.Fields(w.conex("image", "inspect", "-f", "{{range .RootFS.Layers}}{{println .}}{{end}}", "sample-minimal")); len(got) != 1 {
		t.Errorf("layers: %v, want one", got)
	}
	w.conex("run", "-d", "--name", "minimal", "-p", "8080:8080", "--read-only", "sample-minimal")
	if got := w.get("http://127.0.0.1:8080/"); !strings.HasPrefix(got, "Hello from scratch: uid 65532 on ") {
		t.Errorf("the answer is %q", got)
	}
	w.healthy("minimal")
	w.conex("stop", "minimal")
	if got := w.conex("inspect", "-f", "{{.State.ExitCode}}", "minimal"); got != "0" {
		t.Errorf("exit code after stop: %s", got)
	}
}
