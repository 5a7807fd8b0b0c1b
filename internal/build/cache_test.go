package build

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// ran and found compare which steps did work and which were cached.
func (e *env) ran(want ...string) {
	e.t.Helper()
	slices.Sort(want)
	if got := e.ended(Done); !slices.Equal(got, want) {
		e.t.Errorf("ran %q, want %q", got, want)
	}
}

func TestCacheInvalidation(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("package.json", "{}")
	e.write("src/main.js", "1")
	const file = "FROM busybox\nWORKDIR /app\nCOPY package.json .\nRUN cat package.json > deps\nCOPY src src\nRUN cat src/main.js > out\n"
	first := e.must(file)
	e.ran("WORKDIR /app", "COPY package.json .", "RUN cat package.json > deps", "COPY src src", "RUN cat src/main.js > out")

	// A touched file is the same file.
	now := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(e.ctx, "src/main.js"), now, now); err != nil {
		t.Fatal(err)
	}
	if img := e.must(file); img.ID != first.ID {
		t.Error("touching a file changed the image")
	}
	e.ran()

	// So is one that nothing copies.
	e.write("README", "x")
	e.must(file)
	e.ran()

	e.write("src/main.js", "2")
	e.must(file)
	e.ran("COPY src src", "RUN cat src/main.js > out")

	// Back to what was: all there.
	e.write("src/main.js", "1")
	if img := e.must(file); img.ID != first.ID {
		t.Error("going back made another image")
	}
	e.ran()

	// A mode is content.
	if err := os.Chmod(filepath.Join(e.ctx, "src/main.js"), 0o755); err != nil {
		t.Fatal(err)
	}
	e.must(file)
	e.ran("COPY src src", "RUN cat src/main.js > out")

	// So is an extended attribute.
	e.must(file)
	if err := unix.Setxattr(filepath.Join(e.ctx, "src/main.js"), "user.k", []byte("v"), 0); err == nil {
		e.must(file)
		e.ran("COPY src src", "RUN cat src/main.js > out")
	}

	// Metadata alone runs nothing, and makes a new image.
	img := e.must(file + "LABEL x=y\n")
	e.ran()
	if img.ID == first.ID {
		t.Error("a label did not change the image")
	}
}

// A step that ran again with an equal result lets what follows hit by content.
func TestContentKey(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	file := func(arg string) string {
		return "FROM busybox\nRUN : " + arg + "; touch -d '2020-01-01 00:00:00' /tmp/x; mkdir /d; touch -d '2020-01-01 00:00:00' /tmp /d\nRUN echo expensive\nCOPY a /\n"
	}
	e.write("a", "A")
	first := e.must(file("one"))
	second := e.must(file("two"))
	if got := e.ended(Done); len(got) != 1 || !strings.Contains(got[0], ": two") {
		t.Errorf("ran %q", got)
	}
	if got := e.ended(Cached); len(got) != 3 {
		t.Errorf("found %q", got)
	}
	if !slices.Equal(first.Layers(), second.Layers()) {
		t.Error("equal steps gave different layers")
	}
	// And then by definition too.
	e.must(file("two"))
	e.ran()
}

func TestNoCache(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const file = "FROM busybox\nRUN echo 1 > /x\n"
	first := e.must(file)
	second := e.must(file, func(r *Request) { r.NoCache = true })
	e.ran("RUN echo 1 > /x")
	if first.ID == second.ID {
		t.Error("--no-cache gave the old image")
	}
	if third := e.must(file); third.ID != second.ID {
		t.Error("--no-cache did not replace what was cached")
	}
}

func TestBuildArgKeys(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const file = "FROM busybox\nRUN echo before\nARG A=1\nRUN echo after $A; env\n"
	arg := func(k, v string) func(*Request) {
		return func(r *Request) { r.BuildArgs = map[string]*string{k: ptr(v)} }
	}
	e.must(file)
	e.must(file, arg("A", "2"))
	if got := e.ended(Done); len(got) != 1 || !strings.Contains(got[0], "after") {
		t.Errorf("another value of an ARG ran %q", got)
	}
	e.must(file, arg("A", "1"))
	e.ran()
	// Proxies are no part of a key, of the history, or of the image.
	img := e.must(file, arg("HTTP_PROXY", "http://secret"))
	e.ran()
	e.must("FROM busybox\nRUN env\n", arg("HTTP_PROXY", "http://secret"))
	if out := e.output(); !strings.Contains(out, "HTTP_PROXY=http://secret") || !strings.Contains(out, "http_proxy=http://secret") {
		t.Error("the proxy did not reach the step")
	}
	if strings.Contains(string(img.RawConfig), "secret") {
		t.Error("the proxy got into the image")
	}
	err := filepath.WalkDir(e.root.Path("buildcache"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(p)
		if err == nil && strings.Contains(string(data), "secret") {
			t.Errorf("the proxy got into %s", p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStages(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const file = `FROM busybox AS unused
RUN exit 1
FROM busybox AS a
RUN touch /tmp/a; until test -e /m/b; do sleep 0.05; done
FROM busybox AS b
RUN echo b > /b
FROM scratch
COPY --from=a /tmp/a /
COPY --from=b /b /
`
	// Stage a waits for what stage b does at the same time, through a cache mount that both see.
	both := strings.Replace(file, "RUN touch", "RUN --mount=type=cache,id=m,target=/m touch", 1)
	both = strings.Replace(both, "RUN echo b > /b", "RUN --mount=type=cache,id=m,target=/m touch /m/b; echo b > /b", 1)
	img := e.must(both)
	e.wantTree(img, map[string]string{"a": "644 0:0 ", "b": "644 0:0 b\n"})
	for _, ev := range e.events {
		if ev.Stage == "unused" {
			t.Errorf("the unused stage shows: %+v", ev)
		}
	}
	img = e.must(both, func(r *Request) { r.Target = "b" })
	if tree := e.tree(img); tree["b"] == "" || tree["a"] != "" {
		t.Error("--target b did not give stage b")
	}
	e.ran()
	if _, err := e.build(both, func(r *Request) { r.Target = "unused" }); err == nil {
		t.Error("the failing stage did not fail")
	}
}

// A failing step stops its neighbours, and what was done before stays.
func TestFailureCancels(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const file = `FROM busybox AS a
RUN echo done > /x
RUN --mount=type=cache,target=/m touch /m/a; sleep 600
FROM busybox AS b
RUN echo b > /x
RUN --mount=type=cache,target=/m until test -e /m/a; do sleep 0.01; done; exit 3
FROM scratch
COPY --from=a /x /a
COPY --from=b /x /b
`
	_, err := e.build(file)
	var se *StepError
	if !errors.As(err, &se) || se.ExitCode != 3 {
		t.Fatalf("%v", err)
	}
	if got := e.ended(Canceled); !slices.ContainsFunc(got, func(s string) bool { return strings.HasSuffix(s, "sleep 600") }) {
		t.Errorf("canceled %q", got)
	}
	e.must("FROM busybox AS a\nRUN echo done > /x\n")
	e.ran()
	e.clean()
}

// clean checks that nothing of a build is left but the cache.
func (e *env) clean() {
	e.t.Helper()
	for _, dir := range []string{e.root.Path("staging"), filepath.Join(e.state, "build"), e.root.Path("buildcache", "lock")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			e.t.Fatal(err)
		}
		for _, en := range entries {
			e.t.Errorf("%s is left in %s", en.Name(), dir)
		}
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/conex/build-*")
	if err != nil {
		e.t.Fatal(err)
	}
	// Somebody else's command has our mounts too until it has left them for its own.
	for deadline := time.Now().Add(time.Minute); len(groups) > 0; time.Sleep(20 * time.Millisecond) {
		groups = slices.DeleteFunc(groups, func(g string) bool {
			procs, err := os.ReadFile(filepath.Join(g, "cgroup.procs"))
			return err != nil || !e.ours(string(procs))
		})
		if time.Now().After(deadline) {
			e.t.Errorf("left: %q", groups)
			return
		}
	}
}

// ours reports whether one of the processes has this test's folder as its mounts' source: others test here too.
func (e *env) ours(procs string) bool {
	for _, pid := range strings.Fields(procs) {
		m, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if err == nil && strings.Contains(string(m), e.root.Path()) {
			return true
		}
	}
	return false
}

func TestCancel(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("Dockerfile", "FROM busybox\nRUN echo up; sleep 600 & sleep 600\n")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := e.request(ctx, Request{Context: e.ctx, Display: func(ev Event) {
		if ev.Kind == Output {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	e.clean()
}

// Two builds at once share the work.
func TestSingleFlight(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("Dockerfile", "FROM busybox\nRUN sleep 1; echo $$ > /x\nRUN cat /x /proc/uptime > /y\n")
	var mu sync.Mutex
	var done, cached int
	imgs := make([]ocispec.Digest, 4)
	var wg sync.WaitGroup
	for i := range imgs {
		// A builder each: as good as a process each, since flock knows open files only.
		b := &Builder{Root: e.b.Root, State: e.b.State, Layers: e.b.Layers, Runtime: e.b.Runtime, Base: e.b.Base}
		wg.Go(func() {
			res, err := b.Build(t.Context(), Request{Context: e.ctx, Display: func(ev Event) {
				if !strings.Contains(ev.Name, "RUN") {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				switch ev.Kind {
				case Done:
					done++
				case Cached:
					cached++
				}
			}})
			if err != nil {
				t.Error(err)
			}
			imgs[i] = res.ID
		})
	}
	wg.Wait()
	if done != 2 || cached != 6 {
		t.Errorf("%d steps ran and %d were found, want 2 and 6", done, cached)
	}
	for _, id := range imgs[1:] {
		if id != imgs[0] {
			t.Error("builds of the same gave different images")
		}
	}
	e.clean()
}

// Keys come with their ingredients.
func TestRecords(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	img := e.must("FROM scratch\nCOPY a /\n")
	n := 0
	for _, class := range []string{byDefinition, byContent} {
		err := filepath.WalkDir(e.root.Path("buildcache", class), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			var rec Record
			if err := json.Unmarshal(data, &rec); err != nil {
				return err
			}
			if rec.Key != d.Name() || filepath.Base(filepath.Dir(p)) != rec.Key[:2] {
				t.Errorf("record %s lies at %s", rec.Key, p)
			}
			if rec.Kind == kindCopy {
				n++
				var compact []byte
				if compact, err = json.Marshal(rec.Op); err != nil {
					return err
				}
				if got := keyOf(class, rec.Kind, compact, rec.Inputs); got != rec.Key {
					t.Errorf("%s: the ingredients give %s", rec.Key, got)
				}
				if rec.Layer != img.Layers()[0] {
					t.Errorf("layer %s", rec.Layer)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if n != 2 {
		t.Errorf("%d records of the COPY, want 2", n)
	}
	var marked []ocispec.Digest
	if err := Mark(e.root, func(d ...ocispec.Digest) { marked = append(marked, d...) }); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(marked, img.Layers()[0]) {
		t.Error("the cached layer is not marked")
	}
}

// A layer or a record that is gone or damaged is a miss, not an error.
func TestCacheLoss(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	const file = "FROM scratch\nCOPY a /\n"
	first := e.must(file)
	if err := e.images.Delete(first.ID); err != nil {
		t.Fatal(err)
	}
	if err := e.b.Layers.Remove(first.Layers()[0]); err != nil {
		t.Fatal(err)
	}
	second := e.must(file)
	e.ran("COPY a /")
	if !slices.Equal(first.Layers(), second.Layers()) {
		t.Error("equal inputs gave different layers")
	}
	err := filepath.WalkDir(e.root.Path("buildcache"), func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return os.Truncate(p, 10)
	})
	if err != nil {
		t.Fatal(err)
	}
	e.must(file)
	e.ran("COPY a /")
}

// An image that changes under its tag is another input.
func TestBaseChanges(t *testing.T) {
	e := newEnv(t)
	e.write("a", "1")
	tag := e.tag("base")
	e.must("FROM scratch\nCOPY a /\n", tag)
	e.write("b", "B")
	const file = "FROM base\nCOPY b /\n"
	e.must(file)
	e.write("a", "2")
	e.must("FROM scratch\nCOPY a /\n", tag)
	img := e.must(file)
	e.ran("COPY b /")
	e.wantTree(img, map[string]string{"a": "644 0:0 2", "b": "644 0:0 B"})
	var asked bool
	base := e.b.Base
	e.b.Base = func(ctx context.Context, ref string, plat ocispec.Platform, pull bool, p func(int64, int64)) (image.Image, error) {
		asked = asked || pull
		return base(ctx, ref, plat, pull, p)
	}
	e.must(file, func(r *Request) { r.Pull = true })
	if !asked {
		t.Error("--pull was not passed on")
	}
	e.ran()
}
