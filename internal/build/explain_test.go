package build

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// why is what a build said of the step whose title contains name: its reasons, or its origin.
func (e *env) why(name string) string {
	e.t.Helper()
	s := e.step(e.latest(), name)
	var lines []string
	for _, r := range s.Reasons {
		lines = append(lines, r.Kind+": "+r.Text)
	}
	if s.Origin != nil {
		lines = append(lines, s.Origin.Kind)
	}
	return strings.Join(lines, "\n")
}

func arg(k, v string) func(*Request) {
	return func(r *Request) { r.BuildArgs = map[string]*string{k: &v} }
}

// Each ingredient that changes is named.
func TestExplainMisses(t *testing.T) {
	e := newEnv(t)
	e.write("src/a", "a")
	e.write("src/b", "b")
	e.write("src/old", "old")
	e.write("one", "1")
	const file = "FROM scratch AS first\nCOPY one /one\nCOPY src /src\nFROM scratch\nARG V=1\nWORKDIR /w$V\nCOPY --from=first /src /there\nCOPY one .\n"
	check := func(name, want string) {
		t.Helper()
		if got := e.why(name); got != want {
			t.Errorf("%s: %q, not %q", name, got, want)
		}
	}
	e.must(file)
	check("COPY src", "new: it was never built before")

	e.write("src/a", "another")
	e.write("src/new", "new")
	if err := os.Remove(filepath.Join(e.ctx, "src/old")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(e.ctx, "src/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	e.must(file)
	check("COPY src", "files: src/a changed, src/b has another mode, src/new added, src/old removed")
	check("COPY one /one", "definition")
	check("there", "files: src/a changed, src/b has another mode, src/new added, src/old removed")
	check("COPY one .", `step: it follows "[stage-1 3/4] COPY --from=first /src /there", which changed`)

	for i := range 30 {
		e.write(fmt.Sprintf("src/many/%02d", i), "")
	}
	e.must(file)
	s := e.step(e.latest(), "COPY src")
	if len(s.Reasons) != 1 || len(s.Reasons[0].Files) != shownFiles || s.Reasons[0].More != 20 || !strings.HasSuffix(s.Reasons[0].Text, "src/many/09 added, and 20 more") {
		t.Errorf("many files: %+v", s.Reasons)
	}

	e.must(file, arg("V", "2"))
	check("WORKDIR", `instruction: the instruction was "WORKDIR /w1", is "WORKDIR /w2"`)
	check("there", `step: it follows "[stage-1 2/4] WORKDIR /w2", which changed`)

	changed := strings.Replace(file, "COPY one /one", "COPY --chmod=600 one /one", 1)
	e.must(changed)
	check("COPY --chmod", `instruction: the instruction was "COPY one /one", is "COPY --chmod=600 one /one"`)
	e.must(strings.Replace(changed, "COPY src", "COPY src /before\nCOPY src", 1))
	check("COPY src /before", "new: it is new in the Dockerfile")
	check("COPY src /src", `step: it follows "[first 3/4] COPY src /before", which changed`)

	e.must(file, func(r *Request) { r.NoCache = true })
	check("COPY src", "no-cache: the cache is not to be used for it (--no-cache)")

	if _, _, err := Prune(e.root, PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	e.must(file)
	check("COPY src", "pruned: it was cached; the cache was pruned since")
}

// RUN's variables and command are told apart; a failure is remembered.
func TestExplainRun(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const file = "FROM busybox\nARG V=1\nENV E=x\nRUN true $V\n"
	e.must(file)
	e.must(file, arg("V", "2"))
	if got, want := e.why("RUN"), `arg: build arg V was "1", is "2"`; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	e.must(strings.Replace(file, "E=x", "E=y", 1))
	if got, want := e.why("RUN"), `env: variable E was "x", is "y"`; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	long := strings.Repeat("word ", 20)
	e.must("FROM busybox\nRUN true " + long + "here " + long + "\n")
	e.must("FROM busybox\nRUN true " + long + "there " + long + "\n")
	if got, want := e.why("RUN"), `instruction: the instruction was "… word here word …", is "… word there word …"`; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	for range 2 {
		if _, err := e.build("FROM busybox\nRUN exit 3\n"); err == nil {
			t.Fatal("built")
		}
	}
	if got, want := e.why("RUN"), "failed: it failed last time"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

// A hit says who made the result.
func TestExplainHits(t *testing.T) {
	e := newEnv(t)
	e.write("a", "a")
	e.must("FROM scratch\nCOPY a /a\n")
	made := e.latest()
	e.must("FROM scratch\nCOPY a /a\nWORKDIR /x\n")
	s := e.step(e.latest(), "COPY")
	if o := s.Origin; o == nil || o.Kind != OriginDefinition || o.Build != made.ID || o.Made.IsZero() || o.Took <= 0 {
		t.Errorf("origin %+v of %s", s.Origin, made.ID)
	}
	if w := s.Origin.Words(s.Origin.Made.Add(2 * time.Hour)); !strings.HasPrefix(w, "from build "+made.ID+" 2 hours ago") {
		t.Errorf("words %q", w)
	}
	// Equal files that came about otherwise.
	e.must("FROM scratch AS x\nCOPY a /a\nFROM scratch\nCOPY --from=x /a /b\n")
	e.must("FROM scratch AS x\nCOPY a /a\nWORKDIR /y\nFROM scratch\nCOPY --from=x /a /b\n")
	if got := e.why("--from"); got != OriginContent {
		t.Errorf("equal content: %q", got)
	}
}

func FuzzFileList(f *testing.F) {
	sel := []source{{items: []item{{path: "a"}, {path: "a/b"}, {path: "a/c"}, {path: "d"}}}}
	f.Add(encodeList(sel, nil))
	f.Add([]byte(listMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, ok := decodeList(b)
		if !ok && list != nil {
			t.Error("a list that is none")
		}
	})
}

func TestFileList(t *testing.T) {
	sel := []source{{items: []item{{path: "a"}, {path: "a/b"}, {path: "a/\xff\n"}, {path: ""}}}}
	list, ok := decodeList(encodeList(sel, nil))
	paths := make([]string, len(list))
	for i, l := range list {
		paths[i] = l.path
	}
	if !ok || !slices.Equal(paths, []string{"a", "a/b", "a/\xff\n", ""}) {
		t.Errorf("%q, %t", paths, ok)
	}
}

// A base image that is another one under its name is told by its ids.
func TestExplainImage(t *testing.T) {
	e := newEnv(t)
	e.write("a", "a")
	first := e.must("FROM scratch\nCOPY a /base\n", e.tag("base"))
	e.must("FROM base\nCOPY a /x\n")
	e.write("a2", "a2")
	second := e.must("FROM scratch\nCOPY a2 /base\n", e.tag("base"))
	e.must("FROM base\nCOPY a /x\n")
	want := fmt.Sprintf("image: image docker.io/library/base:latest was %s, is %s", first.ID.Encoded()[:12], second.ID.Encoded()[:12])
	if got := e.why("COPY"); got != want {
		t.Errorf("%q, not %q", got, want)
	}
}
