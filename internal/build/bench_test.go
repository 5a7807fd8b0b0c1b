package build

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// context20k fills the context with 20,000 files of 10 KB in 200 folders.
func (e *env) context20k() {
	e.t.Helper()
	data := []byte(strings.Repeat("0123456789abcdef", 640))
	for d := range 200 {
		dir := filepath.Join(e.ctx, fmt.Sprintf("d%d", d))
		if err := os.Mkdir(dir, 0o755); err != nil {
			e.t.Fatal(err)
		}
		for i := range 100 {
			copy(data, fmt.Sprintf("%8d", d*100+i))
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d", i)), data, 0o644); err != nil {
				e.t.Fatal(err)
			}
		}
	}
}

// BenchmarkCached is an unchanged build of ten steps.
func BenchmarkCached(b *testing.B) {
	e := newEnv(b)
	e.busybox()
	e.write("a", "A")
	var file strings.Builder
	file.WriteString("FROM busybox\nWORKDIR /w\nCOPY a .\n")
	for i := range 8 {
		fmt.Fprintf(&file, "RUN echo %d > %d\n", i, i)
	}
	e.must(file.String())
	for b.Loop() {
		e.must(file.String())
	}
	if done := e.ended(Done); len(done) > 0 {
		b.Fatalf("ran %q", done)
	}
}

// BenchmarkCachedContext is an unchanged build that copies 20,000 files.
func BenchmarkCachedContext(b *testing.B) {
	e := newEnv(b)
	e.context20k()
	const file = "FROM scratch\nCOPY . /\n"
	e.must(file)
	for b.Loop() {
		e.must(file)
	}
	if done := e.ended(Done); len(done) > 0 {
		b.Fatalf("ran %q", done)
	}
}

// BenchmarkCopy is COPY of 20,000 files (200 MB), hashing included.
func BenchmarkCopy(b *testing.B) {
	e := newEnv(b)
	e.context20k()
	for n := 0; b.Loop(); n++ {
		e.must(fmt.Sprintf("FROM scratch\nCOPY . /%d/\n", n), func(r *Request) {
			if err := os.RemoveAll(e.root.Path("buildcache", "stat")); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkRun is one RUN step that writes a file, without network.
func BenchmarkRun(b *testing.B) {
	e := newEnv(b)
	e.busybox()
	for n := 0; b.Loop(); n++ {
		e.must(fmt.Sprintf("FROM busybox\nRUN echo %d > /x\n", n))
	}
}
