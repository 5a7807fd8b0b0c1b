package test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Builds beside each other, and builds that end before they are done. Steps meet in a cache mount, which all of a world's builds share:
// what they do there shows in its folder. No test looks at the clock but to give up.

// meet is the cache mount of the steps of these tests.
const meet = "--mount=type=cache,id=meet,target=/meet "

// wait is a shell command that ends when each of the names is in the cache mount.
func wait(names ...string) string {
	cmd := "true"
	for _, n := range names {
		cmd += fmt.Sprintf("; until [ -e /meet/%s ]; do sleep 0.02; done", n)
	}
	return cmd
}

// met says whether name is in the cache mount.
func (w *world) met(name string) bool {
	found, _ := filepath.Glob(filepath.Join(w.root, "buildcache", "mount", "*", name))
	return len(found) > 0
}

// put makes a file in the cache mount, which a step has made.
func (w *world) put(name string) {
	w.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(w.root, "buildcache", "mount", "*"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range dirs {
		if st, err := os.Stat(d); err == nil && st.IsDir() {
			if err := os.WriteFile(filepath.Join(d, name), nil, 0o644); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// lines counts the lines of a file in the cache mount.
func (w *world) lines(name string) int {
	n := 0
	found, _ := filepath.Glob(filepath.Join(w.root, "buildcache", "mount", "*", name))
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil {
			w.t.Error(err)
		}
		n += bytes.Count(b, []byte{'\n'})
	}
	return n
}

// builder is a build that runs.
type builder struct {
	w    *world
	cmd  *exec.Cmd
	mu   sync.Mutex
	out  bytes.Buffer
	done chan struct{}
	err  error
}

func (b *builder) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.Write(p)
}

func (b *builder) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.String()
}

// startBuild starts a build whose output, in plain form, can be looked at.
func (w *world) startBuild(args ...string) *builder {
	w.t.Helper()
	b := &builder{w: w, cmd: w.command(append([]string{"build", "--progress", "plain"}, args...)...), done: make(chan struct{})}
	b.cmd.Stdout, b.cmd.Stderr = b, b
	w.start(b.cmd)
	go func() {
		defer close(b.done)
		b.err = b.cmd.Wait()
	}()
	return b
}

// wait waits for the end and gives the exit code, -1 for a signal.
func (b *builder) wait() int {
	b.w.t.Helper()
	select {
	case <-b.done:
	case <-time.After(2 * giveUp):
		b.cmd.Process.Kill() //nolint:errcheck // the test has failed
		b.w.t.Fatalf("a build is not done after %v:\n%s", 2*giveUp, b)
	}
	return b.cmd.ProcessState.ExitCode()
}

func (b *builder) ok() string {
	b.w.t.Helper()
	if code := b.wait(); code != 0 {
		b.w.t.Fatalf("a build ended with %d:\n%s", code, b)
	}
	return b.String()
}

// buildTraces lists what builds that have ended, and for a killed one the next, leave in no case. The build cache, the bridge and the mounts of
// layers stay, and a killed one's lease until the next sweep.
func (w *world) buildTraces() []string {
	var left []string
	for _, pattern := range []string{
		w.root + "/staging/*", w.root + "/trash/*", w.root + "/buildcache/lock/*",
		w.state + "/build/*", w.state + "/net/*/addr/*", w.state + "/net/*/ep/*",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, f := range found {
			if to, err := os.Readlink(f); err == nil {
				f += " of " + to
			}
			left = append(left, f)
		}
	}
	left = append(left, w.processes()...)
	for _, m := range w.mounts() {
		if !strings.HasPrefix(m, "mount "+w.state+"/layers/") {
			left = append(left, m)
		}
	}
	for _, l := range w.network() {
		if strings.HasPrefix(l, "link ") && l != "link conex0" {
			left = append(left, l)
		}
	}
	return append(left, w.cgroups()...)
}

// noteSteps remembers the cgroups of the steps that run now.
func (w *world) noteSteps() {
	locks, _ := filepath.Glob(w.state + "/build/*.lock")
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range locks {
		if id := "build-" + strings.TrimSuffix(filepath.Base(l), ".lock"); !slices.Contains(w.ids, id) {
			w.ids = append(w.ids, id)
		}
	}
}

func (w *world) wantNoBuildTraces(when string) {
	w.t.Helper()
	// The kernel takes a namespace's links away a moment after its last process.
	left := w.buildTraces()
	for deadline := time.Now().Add(giveUp); len(left) > 0 && time.Now().Before(deadline); left = w.buildTraces() {
		time.Sleep(20 * time.Millisecond)
	}
	for _, l := range left {
		w.t.Errorf("%s: left behind: %s", when, l)
	}
}

// Six stages wait for each other: none could end if one of them waited for a processor, of which there may be two.
func TestBuildParallel(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	var text, names []string
	for i := range 6 {
		names = append(names, fmt.Sprintf("stage%d", i))
	}
	last := "FROM scratch\n"
	for i, n := range names {
		others := slices.Concat(names[:i], names[i+1:])
		text = append(text, fmt.Sprintf("FROM busybox AS %s\nRUN %stouch /meet/%s; %s; echo %s >/%s\n", n, meet, n, wait(others...), n, n))
		last += fmt.Sprintf("COPY --from=%s /%s /\n", n, n)
	}
	dir := w.write("parallel/Dockerfile", strings.Join(text, "")+last)
	w.startBuild("-t", "parallel", dir).ok()
	for _, n := range names {
		if !w.met(n) {
			t.Errorf("%s did not run", n)
		}
	}

	// With a bound of one, no command finds another one at work.
	text = nil
	last = "FROM scratch\n"
	for _, n := range names {
		text = append(text, fmt.Sprintf("FROM busybox AS %s\nRUN %smkdir /meet/alone && sleep 0.05 && rmdir /meet/alone && echo %s > /%s\n", n, meet, n, n))
		last += fmt.Sprintf("COPY --from=%s /%s /\n", n, n)
	}
	w.write("bounded/Dockerfile", strings.Join(text, "")+last)
	w.env = append(w.env, "CONEX_BUILD_PARALLELISM=1")
	w.startBuild(filepath.Join(w.dir, "bounded")).ok()
	w.env[len(w.env)-1] = "CONEX_BUILD_PARALLELISM=some"
	defer func() { w.env = w.env[:len(w.env)-1] }()
	if r := w.try("build", dir); r.code == 0 || !strings.Contains(r.stderr, `CONEX_BUILD_PARALLELISM: "some" is no number of steps`) {
		t.Errorf("a senseless bound: %d, %s", r.code, r.stderr)
	}
}

// Two steps that take two locked caches, in either order, and one that names a cache twice, do not wait for each other or themselves.
func TestBuildLockedCaches(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	text, last := "", "FROM scratch\n"
	for i := range 8 {
		a, b := "one", "two"
		if i%2 == 1 {
			a, b = b, a
		}
		text += fmt.Sprintf("FROM busybox AS s%d\nRUN --mount=type=cache,id=%s,target=/a,sharing=locked --mount=type=cache,id=%s,target=/b,sharing=locked "+
			"--mount=type=cache,id=%s,target=/c %s mkdir /a/alone && sleep 0.02 && rmdir /a/alone && echo %d > /n\n", i, a, b, a, meet, i)
		last += fmt.Sprintf("COPY --from=s%d /n /%d\n", i, i)
	}
	dir := w.write("caches/Dockerfile", text+last)
	w.startBuild(dir).ok()
}

// A step that fails ends the others at once; what was done before is not done again.
func TestBuildFailureCancels(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	hang := forever(7654)
	text := "FROM busybox AS good\nRUN " + meet + "echo x >> /meet/first; echo first > /first\nRUN " + meet + "touch /meet/hangs; exec " + hang + "\n" +
		"FROM busybox AS bad\nRUN " + meet + wait("hangs") + "; echo told >&2; exit 3\n" +
		"FROM scratch\nCOPY --from=good / /\nCOPY --from=bad / /\n"
	dir := w.write("fails/Dockerfile", text)
	b := w.startBuild(dir)
	if code := b.wait(); code != 1 {
		t.Errorf("the build ended with %d", code)
	}
	out := b.String()
	for _, want := range []string{"Dockerfile:5", "exit code: 3", "CANCELED"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if running(hang) {
		t.Error("the other stage's command still runs")
	}
	w.wantNoBuildTraces("after the failure")
	mended := strings.Replace(strings.Replace(text, "exec "+hang, "echo hung > /hung", 1), "exit 3", "echo bad > /bad", 1)
	w.write("fails/Dockerfile", mended)
	w.startBuild(dir).ok()
	if n := w.lines("first"); n != 1 {
		t.Errorf("the step that was done before the failure ran %d times", n)
	}
}

// resumable is a Dockerfile with all that a build may have on its way: two stages at once, networks, bind and cache mounts, copies; and its last
// step checks the content.
func (w *world) resumable(name, nonce string) string {
	for i := range 30 {
		w.write(fmt.Sprintf("%s/src/f%02d", name, i), strings.Repeat("x", 40_000+i))
	}
	return w.write(name+"/Dockerfile", "FROM busybox AS a\nCOPY src /src\nRUN echo "+nonce+" > /a; cat /src/* | sha256sum > /sum\n"+
		"FROM busybox AS b\nRUN "+meet+"--mount=type=bind,source=src,target=/src cat /src/* | sha256sum > /sum; echo "+nonce+" > /b\n"+
		"RUN --network=none --mount=type=bind,from=a,source=src,target=/other,rw echo y > /other/more; cat /other/f* | sha256sum > /sum2\n"+
		"FROM busybox\nCOPY --from=a /a /sum /from-a/\nCOPY --from=b /b /sum /sum2 /from-b/\nWORKDIR /from-a\n"+
		"RUN cmp sum /from-b/sum && cmp sum /from-b/sum2 && cmp a /from-b/b && [ $(cat a) = "+nonce+" ]\n")
}

func TestBuildInterrupted(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	// At a known place: two commands run, one with a bridge and mounts; a first step is done.
	hang := forever(8765)
	text := "FROM busybox AS a\nRUN " + meet + "echo x >> /meet/first; echo first > /first\nRUN " + meet + "--mount=type=bind,source=Dockerfile,target=/d touch /meet/a; exec " + hang + "\n" +
		"FROM busybox AS b\nRUN --network=none " + meet + "--mount=type=bind,from=a,source=/bin,target=/other,rw touch /meet/b; exec " + hang + "\n" +
		"FROM scratch\nCOPY --from=a / /\nCOPY --from=b / /\n"
	text = strings.Replace(text, "from=a,source=/bin", "from=busybox,source=/bin", 1)
	dir := w.write("interrupted/Dockerfile", text)
	b := w.startBuild("-t", "interrupted", dir)
	w.eventually("both commands at work", func() bool { return w.met("a") && w.met("b") })
	w.noteSteps()
	if len(w.ids) < 2 {
		t.Errorf("%d steps run", len(w.ids))
	}
	b.cmd.Process.Signal(syscall.SIGINT) //nolint:errcheck // its end is what counts
	if code := b.wait(); code != 130 {
		t.Errorf("Ctrl-C: exit code %d\n%s", code, b)
	}
	if running(hang) {
		t.Error("a command still runs")
	}
	w.wantNoBuildTraces("after Ctrl-C")
	w.write("interrupted/Dockerfile", strings.ReplaceAll(text, "exec "+hang, "echo > /done"))
	w.startBuild(dir).ok()
	if n := w.lines("first"); n != 1 {
		t.Errorf("the step that was done before Ctrl-C ran %d times", n)
	}
	w.cut(func(b *builder) { b.cmd.Process.Signal(syscall.SIGINT) }, true) //nolint:errcheck // it may have ended
}

func TestBuildKilledAnywhere(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.cut(func(b *builder) { b.cmd.Process.Kill() }, false) //nolint:errcheck // it may have ended
}

// A killed builder's commands write on for as long as nobody settles them, where others want to clean up.
func TestBuilderKilledWriting(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	dir := w.write("writes/Dockerfile", "FROM busybox\nRUN "+meet+"touch /meet/writes; i=0; while :; do i=$((i+1)); : > /file$i; done\n")
	b := w.startBuild(dir)
	w.eventually("the command at work", func() bool { return w.met("writes") })
	w.noteSteps()
	kill9(t, b.cmd.Process.Pid)
	b.wait()
	w.conex("rmi", "-f", w.conex("images", "-q", "busybox"))
	w.conex("pull", "-q", "busybox") // sweeps, and settles nothing
	w.startBuild(w.write("next/Dockerfile", "FROM busybox\nRUN true\n")).ok()
	w.wantNoBuildTraces("after the next build")
}

// cut ends builds at moments of chance and sees to it that the next one goes on where they were, and that nothing is left. clean says that
// the build that was ended cleans up by itself.
func (w *world) cut(end func(*builder), clean bool) {
	t := w.t
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	began := time.Now()
	w.startBuild(w.resumable("whole", "whole")).ok()
	whole := time.Since(began)
	cached := 0
	for i := range int(stressTime(t) / (3 * time.Second)) {
		nonce := fmt.Sprintf("n%v-%d", clean, i)
		dir := w.resumable("cut", nonce)
		b := w.startBuild("-t", "cut", dir)
		stop := make(chan struct{})
		var notes sync.WaitGroup
		notes.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					w.noteSteps()
				}
			}
		})
		time.Sleep(time.Duration(rng.Int64N(int64(whole))))
		end(b)
		b.wait()
		close(stop)
		notes.Wait()
		when := fmt.Sprintf("seed %d, round %d", seed, i)
		if clean {
			w.wantNoBuildTraces(when)
		}
		done := parsePlain(b.String())
		next := w.startBuild("-t", "cut", dir)
		for step, cachedThen := range parsePlain(next.ok()) {
			// What was said to be done before is not done again.
			if isCached, ended := done[step]; ended && !isCached && !strings.HasPrefix(step, "FROM ") {
				if !cachedThen {
					t.Errorf("%s: %q is done again\n%s\n%s", when, step, b, next)
				}
				cached++
			}
		}
		w.wantNoBuildTraces(when + ", after the next build")
		if got := w.conex("run", "--rm", "--network", "none", "cut", "cat", "/from-b/b"); got != nonce {
			t.Errorf("%s: the image has %q", when, got)
		}
		if t.Failed() {
			t.Logf("steps that were seen: %v\nthe build that was ended:\n%s\nthe next one:\n%s", w.ids, b, next)
			return
		}
	}
	t.Logf("%d steps of builds that were ended served the next ones", cached)
	w.checkStore()
}

// Two builds of one Dockerfile do each step once between them, and the one that waits says so.
func TestBuildsShare(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	text := "FROM busybox AS a\nRUN " + meet + "echo x >> /meet/one; touch /meet/started; " + wait("go") + "; head -c 100 /dev/urandom > /random\n" +
		"RUN " + meet + "echo x >> /meet/two; head -c 100 /dev/urandom > /more\n" +
		"FROM busybox\nRUN " + meet + "echo x >> /meet/three; head -c 100 /dev/urandom > /random\nCOPY --from=a /random /more /a/\n"
	dir := w.write("share/Dockerfile", text)
	build := func(n string) *builder {
		return w.startBuild("-t", "share"+n, "--iidfile", filepath.Join(w.dir, "id"+n), dir)
	}
	first := build("1")
	w.eventually("the first build at its step", func() bool { return w.met("started") })
	second := build("2")
	w.eventually("the second build to say that it waits", func() bool {
		return strings.Contains(second.String(), "waiting for another build")
	})
	w.put("go")
	first.ok()
	second.ok()
	for _, step := range []string{"one", "two", "three"} {
		if n := w.lines(step); n != 1 {
			t.Errorf("step %s ran %d times", step, n)
		}
	}
	id := func(n string) string {
		b, err := os.ReadFile(filepath.Join(w.dir, "id"+n))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if id("1") != id("2") {
		t.Errorf("the images are %s and %s", id("1"), id("2"))
	}

	// The one at work is killed: the one that waits does the step.
	w.write("share/Dockerfile", strings.NewReplacer("started", "again", "/go", "/gone", "/one", "/uno").Replace(text))
	first = build("1")
	w.eventually("the first build at its step", func() bool { return w.met("again") })
	second = build("2")
	w.eventually("the second build to say that it waits", func() bool {
		return strings.Contains(second.String(), "waiting for another build")
	})
	w.noteSteps()
	kill9(t, first.cmd.Process.Pid)
	first.wait()
	w.put("gone")
	second.ok()
	if n := w.lines("uno"); n != 2 {
		t.Errorf("the step ran %d times, once it was killed", n)
	}
	w.startBuild(dir).ok() // settles what the killed one left
	w.wantNoBuildTraces("after the killed build")
}

// A build that may run one command at a time waits for another build's step and for a cache mount, and goes on with what waits for nothing.
func TestBuildWaitsWithoutSlot(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	const locked = "--mount=type=cache,id=held,target=/held,sharing=locked "
	same := "FROM busybox AS same\nRUN " + meet + locked + "touch /meet/first; " + wait("go") + "; echo > /same\n"
	first := w.startBuild(w.write("first/Dockerfile", same))
	w.eventually("the first build at its step", func() bool { return w.met("first") })
	w.env = append(w.env, "CONEX_BUILD_PARALLELISM=1")
	second := w.startBuild(w.write("second/Dockerfile", same+
		"FROM busybox AS cache\nRUN "+locked+"echo > /cache\n"+
		"FROM busybox AS free\nRUN "+meet+"touch /meet/free; echo > /free\n"+
		"FROM scratch\nCOPY --from=same /same /\nCOPY --from=cache /cache /\nCOPY --from=free /free /\n"))
	w.eventually("the second build to wait twice and to go on all the same", func() bool {
		out := second.String()
		return strings.Contains(out, "waiting for another build") && strings.Contains(out, "waiting for a cache mount") && w.met("free")
	})
	w.put("go")
	first.ok()
	second.ok()
}

// Eight builders at once, of which some share steps, beside those who prune and remove whatever they can: no build notices.
func TestBuildsBesidePrune(t *testing.T) {
	w := newWorld(t)
	limit := stressTime(t) / 3
	stop := time.Now().Add(limit)
	var wg sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	count := func(what string) {
		mu.Lock()
		defer mu.Unlock()
		counts[what]++
	}
	for user := range 8 {
		dir := w.resumable(fmt.Sprintf("user%d", user), "")
		wg.Go(func() {
			for n := 0; time.Now().Before(stop) && !t.Failed(); n++ {
				// Every second one is what three others build too.
				nonce := fmt.Sprintf("n%d-%d", user, n)
				if n%2 == 1 {
					nonce = fmt.Sprintf("s%d-%d", user%2, n)
				}
				if err := os.WriteFile(filepath.Join(dir, "src", "f00"), []byte(nonce), 0o644); err != nil {
					t.Error(err)
				}
				text, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
				if err != nil {
					t.Error(err)
				}
				text = regexp.MustCompile(`(echo |= )\S* (> /|\])`).ReplaceAll(text, []byte("${1}"+nonce+" $2"))
				if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), text, 0o644); err != nil {
					t.Error(err)
				}
				cmd := w.command("build", "--progress", "plain", "-t", fmt.Sprintf("user%d", user), dir)
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				w.inNetns(func() { err = cmd.Start() })
				if err == nil {
					err = cmd.Wait()
				}
				if err != nil {
					t.Errorf("user %d, build %d: %v\n%s", user, n, err, &out)
					return
				}
				count("build")
			}
		})
	}
	for i, args := range [][]string{{"builder", "prune", "-af"}, {"system", "prune", "-af"}, {"image", "prune", "-af"}, {"rmi", "-f"}} {
		wg.Go(func() {
			for n := 0; time.Now().Before(stop) && !t.Failed(); n++ {
				a := args
				if a[0] == "rmi" {
					a = append(slices.Clone(a), fmt.Sprintf("user%d", n%8), "busybox")
				}
				cmd := w.command(a...)
				var out bytes.Buffer
				cmd.Stderr = &out
				var err error
				w.inNetns(func() { err = cmd.Start() })
				if err == nil {
					err = cmd.Wait()
				}
				// An image that another one has removed is no error of rmi's.
				if err != nil && !strings.Contains(out.String(), "No such image") {
					t.Errorf("%v: %v\n%s", a, err, &out)
				}
				count(strings.Join(args[:2], " "))
				time.Sleep(time.Duration(20+30*i) * time.Millisecond)
			}
		})
	}
	wg.Wait()
	t.Logf("%v", counts)
	w.checkStore()
	w.wantNoBuildTraces("in the end")
	// What is built now, on what the others have left, is right.
	for user := range 8 {
		nonce := fmt.Sprintf("last%d", user)
		tag := fmt.Sprintf("last%d", user)
		w.startBuild("-t", tag, w.resumable("last"+nonce, nonce)).ok()
		if got := w.conex("run", "--rm", "--network", "none", tag, "cat", "/from-a/a"); got != nonce {
			t.Errorf("the image has %q, not %q", got, nonce)
		}
	}
}
