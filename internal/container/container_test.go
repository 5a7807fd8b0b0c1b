package container

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"conex/internal/disk"

	apic "github.com/moby/moby/api/types/container"
)

func newStore(t *testing.T) *Store {
	t.Helper()
	root, err := disk.OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	return Open(root, filepath.Join(t.TempDir(), "run"))
}

func record(name string) *Record {
	return &Record{ID: disk.RandomID(), Name: name, Created: time.Now(), Config: &apic.Config{}, HostConfig: &apic.HostConfig{}}
}

func mustCreate(t *testing.T, s *Store, name string) *Record {
	t.Helper()
	r := record(name)
	if err := s.Create(r, nil); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"web": true, "a1": true, "A_b.c-d": true, "0x": true, "": false, "a": false, "-a": false, ".a": false, "_a": false,
		"a/b": false, "a b": false, "äa": false, "a\x00b": false, strings.Repeat("a", 200): true, strings.Repeat("a", 201): false,
	} {
		if err := CheckName(name); (err == nil) != ok || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("CheckName(%q) = %v, want ok %v", name, err, ok)
		}
	}
	for try := range 100 {
		if n := RandomName(try % 4); CheckName(n) != nil || !strings.Contains(n, "_") {
			t.Errorf("RandomName gave %q", n)
		}
	}
}

func TestNameConflict(t *testing.T) {
	s := newStore(t)
	a := mustCreate(t, s, "web")
	b := record("web")
	err := s.Create(b, nil)
	want := `Conflict. The container name "/web" is already in use by container "` + a.ID + `". You have to remove (or rename) that container to be able to reuse that name.`
	if !errors.Is(err, ErrNameTaken) || err.Error() != want {
		t.Fatalf("second create: %v", err)
	}
	if ids, err := s.List(); err != nil || len(ids) != 1 {
		t.Fatalf("a failed create left something: %v %v", ids, err)
	}
	if left, err := os.ReadDir(s.root.Path("staging")); err != nil || len(left) != 0 {
		t.Fatalf("staging: %v %v", left, err)
	}
	if _, err := s.Remove(a.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Create(b, nil); err != nil {
		t.Fatalf("after remove: %v", err)
	}
}

// TestOneNameWins has many creators want one name.
func TestOneNameWins(t *testing.T) {
	s := newStore(t)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { errs[i] = s.Create(record("web"), nil) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrNameTaken) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d creators got the name", won)
	}
}

// TestCrashedNames has links that a crash left: one to nothing, one to a container that has been renamed since.
func TestCrashedNames(t *testing.T) {
	s := newStore(t)
	a := mustCreate(t, s, "real")
	for name, to := range map[string]string{"gone": disk.RandomID(), "stale": a.ID, "weird": "../../etc"} {
		if err := os.Symlink(to, s.root.Path("names", name)); err != nil {
			t.Fatal(err)
		}
		if id, err := s.Resolve(name); !errors.Is(err, ErrNotFound) {
			t.Errorf("Resolve(%s) = %q, %v", name, id, err)
		}
		r := mustCreate(t, s, name)
		if id, err := s.Resolve(name); err != nil || id != r.ID {
			t.Errorf("Resolve(%s) after create = %q, %v", name, id, err)
		}
	}
	if id, err := s.Resolve("real"); err != nil || id != a.ID {
		t.Errorf("Resolve(real) = %q, %v", id, err)
	}
}

func TestResolve(t *testing.T) {
	s := newStore(t)
	a, b := record("web"), record("db")
	a.ID, b.ID = strings.Repeat("ab", 32), strings.Repeat("ac", 32)
	c := record("ab") // a name that is also the beginning of an id: the name wins
	for _, r := range []*Record{a, b, c} {
		if err := s.Create(r, nil); err != nil {
			t.Fatal(err)
		}
	}
	for in, want := range map[string]string{"web": a.ID, "/web": a.ID, a.ID: a.ID, "aba": a.ID, "aca": b.ID, "ab": c.ID} {
		if id, err := s.Resolve(in); err != nil || id != want {
			t.Errorf("Resolve(%q) = %q, %v", in, id, err)
		}
	}
	if _, err := s.Resolve("a"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("Resolve(a) = %v, want ambiguous", err)
	}
	for _, in := range []string{"nobody", "/", "../web", strings.Repeat("0", 64)} {
		if _, err := s.Resolve(in); !errors.Is(err, ErrNotFound) || err.Error() != "No such container: "+in {
			t.Errorf("Resolve(%q) = %v", in, err)
		}
	}
}

func TestResolveNothing(t *testing.T) {
	if _, err := newStore(t).Resolve(""); !errors.Is(err, ErrName) || errors.Is(err, ErrNotFound) {
		t.Errorf("Resolve of an empty word = %v: `rm -f $UNSET` must not succeed", err)
	}
}

func TestRename(t *testing.T) {
	s := newStore(t)
	a := mustCreate(t, s, "one")
	mustCreate(t, s, "two")
	if err := s.Rename(a.ID, "two"); !errors.Is(err, ErrNameTaken) {
		t.Errorf("to a taken name: %v", err)
	}
	if err := s.Rename(a.ID, "-"); !errors.Is(err, ErrName) {
		t.Errorf("to a bad name: %v", err)
	}
	if err := s.Rename(a.ID, "/three"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve("one"); !errors.Is(err, ErrNotFound) {
		t.Errorf("old name: %v", err)
	}
	if id, err := s.Resolve("three"); err != nil || id != a.ID {
		t.Errorf("new name: %q %v", id, err)
	}
	if _, err := s.Remove(a.ID); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(s.root.Path("names", "t*")); err != nil || len(left) != 1 {
		t.Errorf("names after remove: %v %v", left, err)
	}
}

func TestLock(t *testing.T) {
	s := newStore(t)
	r := mustCreate(t, s, "web")
	l, err := s.Lock(r.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lock(r.ID); !errors.Is(err, ErrBusy) {
		t.Errorf("second lock: %v", err)
	}
	if err := s.SetState(r.ID, &State{Status: Running, BootID: disk.BootID()}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.LockIdle(t.Context(), r.ID); !errors.Is(err, ErrBusy) {
		t.Errorf("LockIdle of a running container: %v", err)
	}
	// A holder that is about to be done is waited for.
	if err := s.SetState(r.ID, &State{Status: Exited, BootID: disk.BootID()}); err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		l, err := s.LockIdle(t.Context(), r.ID)
		l.Release()
		got <- err
	}()
	select {
	case err := <-got:
		t.Errorf("LockIdle returned while the lock was held: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	l.Release()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

// TestLockUnderEyes: who looks whether a lock is held shares it for a moment, and keeps nobody from taking it.
func TestLockUnderEyes(t *testing.T) {
	s := newStore(t)
	id := mustCreate(t, s, "web").ID
	var stop atomic.Bool
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer stop.Store(true)
	for range 2 {
		watchers.Go(func() {
			for !stop.Load() {
				s.Watched(id)
			}
		})
	}
	for range 2000 {
		l, err := s.Lock(id)
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
	}
}

// TestLockIdleLeaves: who waits for a lock hears that its holder runs the container after all, or that nobody wants it any more, and does not
// keep the lock that it may get later.
func TestLockIdleLeaves(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(s *Store, id string, cancel func()) error
		want error
	}{
		"running": {func(s *Store, id string, _ func()) error {
			return s.SetState(id, &State{Status: Running, BootID: disk.BootID()})
		}, ErrBusy},
		"canceled": {func(_ *Store, _ string, cancel func()) error { cancel(); return nil }, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			id := disk.RandomID()
			l, err := s.Lock(id)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			got := make(chan error)
			for range 3 {
				go func() {
					l, err := s.LockIdle(ctx, id)
					if l != nil {
						l.Release()
					}
					got <- err
				}()
			}
			select {
			case err := <-got:
				t.Fatalf("LockIdle returned while the lock was held: %v", err)
			case <-time.After(3 * lookAtHolder):
			}
			if err := c.end(s, id, cancel); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := <-got; !errors.Is(err, c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
			}
			l.Release()
			if err := s.SetState(id, &State{Status: Exited, BootID: disk.BootID()}); err != nil {
				t.Fatal(err)
			}
			if l, err = s.LockIdle(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			l.Release()
		})
	}
}

// While somebody removes a run folder others lock it, as whoever settles does with each that he finds. One at a time has it, the folder
// goes, and nobody's files keep it.
func TestRemoveRunBesideOthers(t *testing.T) {
	s := newStore(t)
	id := disk.RandomID()
	var holders atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				l, err := s.Lock(id)
				if errors.Is(err, ErrBusy) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d have the lock", n)
				}
				if err := s.SetState(id, &State{Status: Starting}); err != nil {
					t.Error(err)
				}
				holders.Add(-1)
				if err := s.RemoveRun(id); err != nil {
					t.Error(err)
				}
				l.Release()
			}
		})
	}
	wg.Wait()
	// A lock that came too late for the last removal has made the folder again; nothing else is there.
	ids, err := s.ListRun()
	if err != nil || len(ids) > 1 {
		t.Errorf("run folders: %v %v", ids, err)
	}
	if left, err := filepath.Glob(s.RunDir(id, "state.json")); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

func TestStatusText(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	boot := disk.BootID()
	before := func(d time.Duration) time.Time { return now.Add(-d) }
	health := func(h apic.HealthStatus) *apic.Health { return &apic.Health{Status: h} }
	for want, n := range map[string]*Snapshot{
		"Created":                        {},
		"Up 5 seconds":                   {State: &State{Status: Running, BootID: boot, Started: before(5 * time.Second)}},
		"Up 2 minutes (healthy)":         {State: &State{Status: Running, BootID: boot, Started: before(2 * time.Minute), Health: health(apic.Healthy)}},
		"Up 3 hours (unhealthy)":         {State: &State{Status: Running, BootID: boot, Started: before(3 * time.Hour), Health: health(apic.Unhealthy)}},
		"Up 1 second (health: starting)": {State: &State{Status: Running, BootID: boot, Started: before(time.Second), Health: health(apic.Starting)}},
		"Exited (0) 3 minutes ago":       {Exit: &Exit{Started: before(time.Hour), Finished: before(3 * time.Minute)}},
		"Exited (137) About a minute ago": {
			Exit: &Exit{Code: 137, Started: before(time.Hour), Finished: before(time.Minute)}, State: &State{Status: Exited, BootID: boot},
		},
		"Restarting (1) 2 seconds ago": {State: &State{Status: Restarting, BootID: boot, Exit: &Exit{Code: 1, Finished: before(2 * time.Second)}}},
	} {
		if got := n.StatusText(now); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// A start that failed leaves the container as created; a state of before the reboot says nothing.
	for want, n := range map[apic.ContainerState]*Snapshot{
		apic.StateCreated: {Exit: &Exit{Code: 127, Error: "x", Finished: now}},
		apic.StateExited:  {Exit: &Exit{Started: now}, State: &State{Status: Running, BootID: "another"}},
	} {
		if got := n.Status(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]syscall.Signal{
		"KILL": 9, "SIGKILL": 9, "kill": 9, "9": 9, "sigterm": 15, "HUP": 1, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63, "64": 64,
	} {
		if got, err := ParseSignal(in); err != nil || got != want {
			t.Errorf("ParseSignal(%q) = %d, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "0", "65", "-1", "NOPE", "RTMIN+31", "RTMIN3", "RTMAX+1", "SIG"} {
		if got, err := ParseSignal(in); err == nil {
			t.Errorf("ParseSignal(%q) = %d", in, got)
		}
	}
}

// TestClearNames leaves a name as a creator does that is killed before its container is there.
func TestClearNames(t *testing.T) {
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := Open(root, t.TempDir())
	if err := os.Symlink(disk.RandomID(), root.Path("names", "nowhere")); err != nil {
		t.Fatal(err)
	}
	id := disk.RandomID()
	if err := os.Mkdir(root.Path("containers", id), 0o700); err != nil { // one whose record can't be read keeps its name
		t.Fatal(err)
	}
	if err := os.Symlink(id, root.Path("names", "damaged")); err != nil {
		t.Fatal(err)
	}
	if err := s.ClearNames(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(root.Path("names"))
	if err != nil || len(left) != 1 || left[0].Name() != "damaged" {
		t.Fatalf("%v, %v", left, err)
	}
}
