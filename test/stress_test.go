package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// raceBinary builds conex with the race detector, which needs cgo. Only the test's program has it: what is shipped has no C in it.
var raceBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "conex-race.")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "conex")
	cmd := exec.Command("go", "build", "-race", "-o", bin, "conex/cmd/conex")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build -race: %w\n%s", err, out)
	}
	return bin, nil
})

// stressTime is how long TestTogether goes on with the race detector: CONEX_STRESS, or a minute.
func stressTime(t *testing.T) time.Duration {
	t.Helper()
	s := os.Getenv("CONEX_STRESS")
	if s == "" {
		return time.Minute
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("CONEX_STRESS: %v", err)
	}
	return d
}

// Eight users at once pull, tag, remove, prune, build and run. Nobody sees an error that no user caused, the store is whole afterwards,
// and nothing is left. Most of the time the program has the race detector; without it, it gets further in the same time.
func TestTogether(t *testing.T) {
	t.Run("quick", func(t *testing.T) { together(t, bareWorld(t), stressTime(t)/4, false) })
	t.Run("killed", func(t *testing.T) {
		w := bareWorld(t)
		w.write("config.toml", "[gc]\nbudget = \"2MB\"\n") // so that it is at work all the time
		together(t, w, stressTime(t)/4, true)
	})
	t.Run("killed dir", func(t *testing.T) {
		w := bareWorld(t)
		w.driver = "dir"
		w.write("config.toml", "storage-driver = \"dir\"\n[gc]\nbudget = \"2MB\"\n")
		together(t, w, stressTime(t)/4, true)
	})
	t.Run("race", func(t *testing.T) {
		w := bareWorld(t)
		need(t, "gcc", "gcc")
		bin, err := raceBinary()
		if err != nil {
			t.Fatal(err)
		}
		races := t.TempDir()
		w.bin = bin
		w.env = append(w.env, "GORACE=log_path="+filepath.Join(races, "race"))
		together(t, w, stressTime(t), false)
		reports, err := filepath.Glob(filepath.Join(races, "race*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range reports {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			t.Errorf("the race detector says:\n%s", b)
		}
	})
}

// together lets the users work for so long. With kill every sixth of their commands is killed at a moment of chance, which is no reason
// for anything else to go wrong.
func together(t *testing.T, w *world, limit time.Duration, kill bool) {
	w.netns = newNetns(t)
	r := w.serveRegistry()
	// Images that share layers with each other, in every form.
	base := busybox(t)
	var names []string
	for i, f := range append(forms, forms[0]) {
		name := fmt.Sprintf("app%d:1", i)
		r.put(name, f.image(t, "linux/amd64", base, tarOf(t, map[string][]byte{"etc/motd": []byte("hello\n"), "common": noise(1, 1<<20)}),
			tarOf(t, map[string][]byte{fmt.Sprintf("own%d", i): noise(byte(10+i), 1<<20)})))
		names = append(names, r.addr+"/"+name)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	s := &stress{w: w, kill: kill, names: names, counts: map[string]int{}, excused: map[string]int{}}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var wg sync.WaitGroup
	for user := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(user)))
			for n := 0; ctx.Err() == nil; n++ {
				s.act(user, n, rng)
			}
		})
	}
	wg.Wait()
	t.Logf("%v; errors that users caused: %v", s.counts, s.excused)
	w.checkStore()
	if !kill {
		w.wantNoLeftovers()
	}
	// What was made is usable: every image that is listed runs.
	for _, id := range w.listed() {
		if res := w.try("run", "--rm", "--network", "none", id, "cat", "/etc/motd"); res.code != 0 {
			t.Errorf("run %s afterwards: %d, %s", id, res.code, res.stderr)
		}
	}
}

// listed lists the images that have a name, by their ids: the name may be a digest alone, whose tag has moved on.
func (w *world) listed() []string {
	w.t.Helper()
	ids := strings.Fields(w.conex("images", "-q", "--no-trunc", "--filter", "dangling=false"))
	slices.Sort(ids)
	return slices.Compact(ids)
}

type stress struct {
	w     *world
	kill  bool
	names []string

	mu              sync.Mutex
	counts, excused map[string]int
}

// act does something that a user may do.
func (s *stress) act(user, n int, rng *rand.Rand) {
	image := func() string { return s.names[rng.IntN(len(s.names))] }
	tag := func() string { return fmt.Sprintf("tag%d", rng.IntN(6)) }
	built := func() string { return fmt.Sprintf("built%d", rng.IntN(4)) }
	switch rng.IntN(17) {
	case 0, 1:
		s.run("pull", "-q", image())
	case 2:
		s.run("tag", image(), tag())
	case 3:
		s.run("rmi", image())
	case 4:
		s.run("rmi", tag())
	case 5:
		s.run("rmi", "-f", image(), built())
	case 6, 7:
		if out, ok := s.run("run", "--rm", "--network", "none", image(), "cat", "/etc/motd"); ok && out != "hello\n" {
			s.w.t.Errorf("a container says %q", out)
		}
	case 8:
		name := fmt.Sprintf("user%d-%d", user, n)
		args := []string{"run", "-d", "--name", name, "-p", fmt.Sprint(8000+user) + ":80"}
		if _, ok := s.run(append(args, image(), "sleep", "1000")...); ok {
			s.run("exec", name, "true")
		}
		s.run("rm", "-f", name)
	case 9, 10:
		dir := filepath.Join(s.w.dir, fmt.Sprintf("ctx%d", user))
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "file"), fmt.Appendf(nil, "%d", rng.IntN(3)), 0o644)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "Dockerfile"), fmt.Appendf(nil, "FROM %s\nCOPY file /file\nRUN echo %d >/ran\n", image(), rng.IntN(3)), 0o644)
		}
		if err != nil {
			s.w.t.Error(err)
			return
		}
		s.run("build", "-q", "-t", built(), dir)
	case 11:
		s.run(pick(rng, []string{"builder", "prune", "-f"}, []string{"builder", "prune", "-a", "-f"})...)
	case 12, 13:
		s.run(pick(rng, []string{"image", "prune", "-f"}, []string{"image", "prune", "-a", "-f"}, []string{"container", "prune", "-f"},
			[]string{"system", "prune", "-f"}, []string{"system", "prune", "-a", "-f", "--volumes"})...)
	case 14:
		s.run("push", "-q", image())
	case 15:
		file := filepath.Join(s.w.dir, fmt.Sprintf("saved%d.tar", user))
		if _, ok := s.run("save", "-o", file, image()); ok {
			s.run("load", "-q", "-i", file)
		}
	case 16:
		s.run(pick(rng, []string{"images", "-a"}, []string{"ps", "-a"}, []string{"system", "df"}, []string{"history", image()}, []string{"image", "inspect", built()})...)
	}
}

func pick(rng *rand.Rand, of ...[]string) []string { return of[rng.IntN(len(of))] }

// excuses are the errors that one user causes by what another one does: each with the command that it may meet.
var excuses = []struct{ command, part string }{
	{"tag", "No such image"},
	{"rmi", "No such image"},
	{"rmi", "is being used by"}, // a container
	{"rmi", "conflict: unable to "},
	{"push", "An image does not exist locally"},
	{"push", "No such image"},
	{"save", "No such image"},
	{"history", "No such image"},
	{"image inspect", "No such image"},
	{"rm", "No such container"}, // its run was killed
}

// run runs conex. An error that nobody caused fails the test.
func (s *stress) run(args ...string) (stdout string, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.w.bin, args...)
	cmd.Env, cmd.Dir = s.w.env, s.w.dir
	cmd.WaitDelay = 5 * time.Second
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	var err error
	s.w.inNetns(func() { err = cmd.Start() })
	killed := s.kill && args[0] != "rm" && rand.IntN(6) == 0
	if err == nil {
		if killed {
			time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
			cmd.Process.Kill() //nolint:errcheck // it may have ended
		}
		err = cmd.Wait()
	}
	name := args[0]
	if slices.Contains([]string{"image", "container", "system", "builder"}, name) {
		name += " " + args[1]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[name]++
	if err == nil {
		return out.String(), true
	}
	if killed && cmd.ProcessState != nil && !cmd.ProcessState.Exited() {
		s.counts["killed"]++
		return "", false
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		for line := range strings.Lines(errb.String()) {
			excused := slices.ContainsFunc(excuses, func(e struct{ command, part string }) bool {
				return e.command == name && strings.Contains(line, e.part)
			})
			if excused {
				s.excused[name]++
				continue
			}
			s.w.t.Errorf("conex %s: %v: %s", strings.Join(args, " "), err, line)
		}
		return "", false
	}
	s.w.t.Errorf("conex %s: %v\n%s", strings.Join(args, " "), err, errb.String())
	return "", false
}
