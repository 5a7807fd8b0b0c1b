package build

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// latest is the newest record of the history.
func (e *env) latest() *BuildRecord {
	e.t.Helper()
	r, err := OpenHistory(e.root).Find("")
	if err != nil {
		e.t.Fatal(err)
	}
	return r
}

func (e *env) step(r *BuildRecord, name string) *StepRecord {
	e.t.Helper()
	s, err := r.Step(name)
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// A build leaves a record of every step, with what it takes to show the step's file system again.
func TestBuildRecords(t *testing.T) {
	e := newEnv(t)
	e.write("src/a", "a")
	const file = "FROM scratch AS first\nCOPY src /src\nWORKDIR /w\nFROM scratch\nARG X=1\nENV E=$X\nCOPY --from=first /src /there\n"
	if _, err := e.build(file, func(r *Request) { v := "2"; r.BuildArgs = map[string]*string{"X": &v} }); err != nil {
		t.Fatal(err)
	}
	r := e.latest()
	if r.Outcome != OutcomeDone || r.Image == "" || r.Context != e.ctx || *r.Args["X"] != "2" || r.Took <= 0 {
		t.Errorf("record: %+v", r)
	}
	h := OpenHistory(e.root)
	s := e.step(r, "there")
	if s.Kind != kindCopy || s.Line != 7 || s.Stage != "stage-1" || s.Number != 2 || s.Outcome != OutcomeDone || s.Key == "" || s.Layer == "" {
		t.Errorf("step: %+v", s)
	}
	if !slices.Contains(s.Config.Env, "E=2") {
		t.Errorf("environment %q", s.Config.Env)
	}
	ls, err := h.Layers(r, s)
	if err != nil || len(ls) != 1 || ls[0] != s.Layer {
		t.Errorf("layers %v, %v", ls, err)
	}
	if from := s.Inputs[1]; from.Kind != "step" || from.Step != e.step(r, "WORKDIR").Vertex || from.Files == "" {
		t.Errorf("input %+v", from)
	}
	for name, title := range map[string]string{"first:2": "COPY src", "L2": "COPY src", "2": "COPY --from", "first": "WORKDIR", "src /src": "COPY src"} {
		if s, err := r.Step(name); err != nil || !strings.HasPrefix(s.Title, title) {
			t.Errorf("step %q is %+v, %v", name, s, err)
		}
	}
	for _, name := range []string{"", "copy", "9", "#1", "L99", "L1", "first:9"} {
		if s, err := r.Step(name); err == nil {
			t.Errorf("step %q is %+v", name, s)
		}
	}

	// Cached: the same layers, though the first stage was not looked at.
	if _, err := e.build(file, func(r *Request) { v := "2"; r.BuildArgs = map[string]*string{"X": &v} }); err != nil {
		t.Fatal(err)
	}
	r2 := e.latest()
	if r2.ID <= r.ID || r2.Project != r.Project {
		t.Errorf("records %s of %s, then %s of %s", r.ID, r.Project, r2.ID, r2.Project)
	}
	if s := e.step(r2, "src /src"); s.Outcome != OutcomeUnneeded {
		t.Errorf("unneeded: %+v", s)
	}
	for _, name := range []string{"there", "src /src", "WORKDIR"} {
		was, err := h.Layers(r, e.step(r, name))
		is, err2 := h.Layers(r2, e.step(r2, name))
		if err != nil || err2 != nil || !slices.Equal(was, is) {
			t.Errorf("%s: %v, %v, then %v, %v", name, was, err, is, err2)
		}
	}
}

// Failed builds have a record, builds without a Dockerfile and killed ones none.
func TestBuildRecordsOfFailures(t *testing.T) {
	e := newEnv(t)
	if _, err := e.build("FROM scratch\nCOPY nothing /\nCOPY Dockerfile /\n"); err == nil {
		t.Fatal("built")
	}
	r := e.latest()
	if r.Outcome != OutcomeFailed || r.Line != 2 || !strings.Contains(r.Error, "nothing") || r.Image != "" {
		t.Errorf("record %+v", r)
	}
	if s := e.step(r, "nothing"); s.Outcome != OutcomeFailed || s.Error == "" {
		t.Errorf("step %+v", s)
	}
	if _, err := e.build("FROM\n"); err == nil || e.latest().Line != 1 {
		t.Errorf("parse error: %v, %+v", err, e.latest())
	}
	h := OpenHistory(e.root)
	before, err := h.List()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(e.ctx, "Dockerfile")); err != nil {
		t.Fatal(err)
	}
	if _, err := e.request(t.Context(), Request{Context: e.ctx}); err == nil {
		t.Error("built without a Dockerfile")
	}
	if err := os.Mkdir(e.root.Path("builds", r.Project, "zzzz"), 0o700); err != nil { // as of a killed build
		t.Fatal(err)
	}
	after, err := h.List()
	if err != nil || len(after) != len(before) {
		t.Errorf("%d records, then %d, %v", len(before), len(after), err)
	}
}

func TestBuildNames(t *testing.T) {
	e := newEnv(t)
	h := OpenHistory(e.root)
	if _, err := h.Find(""); !errors.Is(err, ErrNoBuild) {
		t.Errorf("empty history: %v", err)
	}
	began := time.Now()
	for i := range maxBuilds + 5 {
		r := &BuildRecord{ID: buildID(began.Add(time.Duration(i) * time.Millisecond)), Project: "aa", Names: []string{"docker.io/library/app:latest"}}
		if err := h.write(r, nil); err != nil {
			t.Fatal(err)
		}
	}
	list, err := h.List()
	if err != nil || len(list) != maxBuilds {
		t.Fatalf("%d builds, %v", len(list), err)
	}
	for name, want := range map[string]string{"": list[0].ID, "^0": list[0].ID, "^3": list[3].ID, list[7].ID: list[7].ID, list[7].ID[5:]: list[7].ID, "app": list[0].ID} {
		if r, err := h.Find(name); err != nil || r.ID != want {
			t.Errorf("find %q: %v, %v", name, r, err)
		}
	}
	for _, name := range []string{"^99", "^x", "../x", "nothing"} {
		if r, err := h.Find(name); err == nil {
			t.Errorf("find %q: %v", name, r.ID)
		}
	}
	// What is a month old goes, once a day.
	old := &BuildRecord{ID: buildID(began.Add(-2 * maxBuildAge)), Project: "bb"}
	if err := h.write(old, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(e.root.Path("builds", "swept")); err != nil {
		t.Fatal(err)
	}
	if err := h.Remove(list[0]); err != nil {
		t.Fatal(err)
	}
	if err := h.write(list[0], nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(e.root.Path("builds", "bb")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an old project: %v", err)
	}
}

// The begin and the end of a long output are kept, in order.
func TestStepLog(t *testing.T) {
	e := newEnv(t)
	l := newStepLog(e.root, time.Now())
	var want strings.Builder
	for i := range 40_000 {
		text := strings.Repeat(string(rune('a'+i%26)), 99) + "\n"
		l.add(&Event{Vertex: 3, Time: time.Now(), Text: text})
		want.WriteString(text)
	}
	l.add(&Event{Vertex: 4, Time: time.Now(), Text: "short\x1b\xff", Stderr: true})
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	h, r := OpenHistory(e.root), &BuildRecord{ID: "aaaa", Project: "bb"}
	if err := h.write(r, l); err != nil {
		t.Fatal(err)
	}
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	list, err := h.Log(r, 3)
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	var skipped int64
	for _, en := range list {
		if en.Skipped > 0 {
			if skipped += en.Skipped; !strings.HasPrefix(want.String(), got.String()) {
				t.Error("the begin is another")
			}
			got.Reset()
		}
		got.WriteString(en.Text)
	}
	if !strings.HasSuffix(want.String(), got.String()) || got.Len() < logTail/3 || skipped == 0 {
		t.Errorf("%d bytes left out, the end has %d", skipped, got.Len())
	}
	if all, err := h.Log(r, 0); err != nil || all[len(all)-1].Text != "short\x1b\ufffd" || !all[len(all)-1].Stderr {
		t.Errorf("log: %v, %v", all[len(all)-1], err)
	}
}

// A secret that a step prints is on the screen and not in the history.
func TestHistoryHidesSecrets(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	t.Setenv("HIDDEN", "swordfish one\nswordfish two\n")
	user := "http://name:pass@proxy:1"
	e.must("FROM busybox\nRUN --mount=type=secret,id=s cat /run/secrets/s; echo and more\n", func(r *Request) {
		r.Secrets = map[string]Secret{"s": {Env: "HIDDEN"}}
		r.BuildArgs = map[string]*string{"http_proxy": &user}
	})
	if !strings.Contains(e.output(), "swordfish one") {
		t.Errorf("output %q", e.output())
	}
	log, err := OpenHistory(e.root).Log(e.latest(), 0)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, en := range log {
		text.WriteString(en.Text)
	}
	if text.String() != "***\n***\nand more\n" {
		t.Errorf("log %q", text.String())
	}
	for _, secret := range []string{"swordfish", "pass"} {
		err := filepath.WalkDir(e.root.Path("builds"), func(p string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(p)
			if strings.Contains(string(data), secret) {
				t.Errorf("%s has %q", p, secret)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A build that the user ends is recorded as that, and the next one knows.
func TestHistoryOfCanceled(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e.write("Dockerfile", "FROM busybox\nRUN echo done > /done\nRUN echo now; sleep 60\n")
	_, err := e.request(ctx, Request{Context: e.ctx, Display: func(ev Event) {
		if ev.Kind == Output && ev.Text == "now\n" {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	r := e.latest()
	if r.Outcome != OutcomeCanceled || e.step(r, "2").Outcome != OutcomeDone || e.step(r, "3").Outcome != OutcomeCanceled || e.step(r, "3").Took <= 0 {
		t.Errorf("%s: %+v", r.Outcome, r.Steps)
	}
	if _, err := OpenHistory(e.root).Layers(r, e.step(r, "3")); err == nil {
		t.Error("a canceled step has layers")
	}
	e.write("Dockerfile", "FROM busybox\nRUN echo done > /done\nRUN echo now; true\n")
	if _, err := e.request(t.Context(), Request{Context: e.ctx}); err != nil {
		t.Fatal(err)
	}
	if got := e.why("2"); got != OriginDefinition {
		t.Errorf("the finished step: %q", got)
	}
}

// Two builds of one Dockerfile at a time: what one made serves the other, which says so.
func TestHistoryOfTwo(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("Dockerfile", "FROM busybox\nRUN --mount=type=cache,target=/m until test -e /m/met; do sleep 0.01; done; date +%N > /made\n")
	waits := make(chan struct{}, 100)
	go func() { // the step ends when the other build waits for it, which may be before its cache is there
		<-waits
		for t.Context().Err() == nil {
			dirs, _ := filepath.Glob(e.root.Path("buildcache", "mount", "*"))
			for _, d := range dirs {
				if os.WriteFile(filepath.Join(d, "met"), nil, 0o644) == nil {
					return
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	errs := make(chan error)
	for range 2 {
		go func() {
			_, err := e.b.Build(t.Context(), Request{Context: e.ctx, Display: func(ev Event) {
				if ev.Kind == Output {
					waits <- struct{}{}
				}
			}})
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	list, err := OpenHistory(e.root).List()
	if err != nil || len(list) < 2 {
		t.Fatal(len(list), err)
	}
	a, b := e.step(list[0], "RUN"), e.step(list[1], "RUN")
	if a.Outcome == OutcomeDone {
		a, b = b, a
	}
	if a.Origin == nil || a.Origin.Kind != OriginConcurrent || b.Outcome != OutcomeDone || a.Layer != b.Layer {
		t.Errorf("%+v\n%+v", a, b)
	}
}
