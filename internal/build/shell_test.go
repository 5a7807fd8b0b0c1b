package build

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a person decides about a step that failed, and what the cache knows of it afterwards.
func TestDebug(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	file := "FROM busybox\nRUN touch /first; test -e /mend\nRUN ls /first /mend > /list 2>/dev/null; echo >> /list\n"
	var asked []string
	decide := func(ds ...Decision) func(*Request) {
		asked = nil
		return func(r *Request) {
			r.Debug = func(ctx context.Context, f *Failure) (Decision, error) {
				var out strings.Builder
				null, err := os.Open("/dev/null")
				if err != nil {
					return Stop, err
				}
				defer null.Close()
				_, err = f.Shell(ctx, "", &Console{In: null, Out: &out, Err: &out})
				if err != nil {
					return Stop, err
				}
				asked = append(asked, f.Instruction)
				d := ds[min(len(asked), len(ds))-1]
				if d == RetryKept {
					err = os.WriteFile(filepath.Join(f.x.upper, "mend"), nil, 0o644)
				}
				return d, err
			}
		}
	}
	ran := func() (n int) {
		for _, ev := range e.events {
			if ev.Kind == Done && strings.Contains(ev.Name, "RUN") {
				n++
			}
		}
		return n
	}
	if _, err := e.build(file, decide(Retry, Stop)); len(asked) != 2 || err == nil {
		t.Errorf("asked %d times: %v", len(asked), err)
	}
	for range 2 { // nothing of it is found the second time
		img := e.must(file, decide(Continue))
		if got := e.tree(img)["list"]; got != "644 0:0 /first\n\n" || ran() != 2 {
			t.Errorf("continued: %q, %d steps ran", got, ran())
		}
	}
	for range 2 {
		img := e.must(file, decide(RetryKept))
		if got := e.tree(img)["list"]; got != "644 0:0 /first\n/mend\n\n" {
			t.Errorf("kept: %q", got)
		}
	}
	if len(asked) != 1 {
		t.Errorf("the result of a step that was mended by hand was found in the cache")
	}
	var se *StepError
	if _, err := e.build(file, decide(Stop)); !errors.As(err, &se) || se.Line != 2 {
		t.Errorf("stopped: %v", err)
	}
	// Of two that fail at the same time one is asked about; the end of the build is the other's too.
	both := "FROM busybox AS a\nRUN false\nFROM busybox AS b\nRUN false\nFROM scratch\nCOPY --from=a /etc /a\nCOPY --from=b /etc /b\n"
	if _, err := e.build(both, decide(Stop)); err == nil || len(asked) != 1 {
		t.Errorf("two failures: asked %d times, %v", len(asked), err)
	}
	// What fails otherwise is no matter for a shell.
	if _, err := e.build("FROM busybox\nCOPY none /\n", decide(Retry)); err == nil || len(asked) > 0 {
		t.Errorf("a COPY that fails: asked %v, %v", asked, err)
	}
	e.clean()
}

func TestFindShell(t *testing.T) {
	newEnv(t) // for what it skips
	x := &execution{upper: t.TempDir(), lower: []string{t.TempDir()}}
	if _, err := x.findShell("", nil); !errors.Is(err, ErrNoShell) {
		t.Errorf("nothing there: %v", err)
	}
	put := func(dir, name string, mode os.FileMode) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		dir, add string
		mode     os.FileMode
		want     string
	}{
		{x.lower[0], "bin/busybox", 0o755, "/bin/busybox sh"},
		{x.lower[0], "bin/sh", 0o755, "/bin/sh"},
		{x.upper, "bin/bash", 0o644, "/bin/sh"},
		{x.upper, "usr/bin/bash", 0o755, "/usr/bin/bash"},
		{x.upper, "bin/zsh", 0o755, "/bin/zsh"},
	} {
		put(c.dir, c.add, c.mode)
		got, err := x.findShell("", []string{"/bin/zsh", "-c"})
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("with %s: %v %v, want %s", c.add, got, err, c.want)
		}
	}
	if got, err := x.findShell("bash", nil); err != nil || got[0] != "bash" {
		t.Errorf("one that was named: %v %v", got, err)
	}
}
