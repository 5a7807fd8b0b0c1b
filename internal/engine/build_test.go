package engine

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/build"
)

// newBuildEngine is an engine that builds: what it mounts and connects is taken down in the end.
func newBuildEngine(t *testing.T, mirrors ...string) *Engine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("building needs root")
	}
	e := newImageEngine(t, mirrors...)
	t.Cleanup(func() {
		ls, err := e.Layers()
		if err == nil {
			err = ls.Unmount()
		}
		if err := errors.Join(err, e.Networks().Cleanup(bg)); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return e
}

// TestBuildPulls builds on an image that only a mirror has, and notices with --pull alone that it changed there.
func TestBuildPulls(t *testing.T) {
	host := memoryRegistry(t)
	e := newBuildEngine(t, "http://"+host)
	newPushed(t, tarOf(t, map[string]string{"base": "1"})).push(t, host, "library/base", "latest")
	dir := t.TempDir()
	for name, content := range map[string]string{"Dockerfile": "FROM base\nCOPY own /\n", "own": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	first, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir}, Tags: []string{"mine"}})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := e.InspectImage(bg, "mine", ""); err != nil || r.ID != first.ID.String() || len(r.RootFS.Layers) != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	newPushed(t, tarOf(t, map[string]string{"base": "2"})).push(t, host, "library/base", "latest")
	if second, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir}}); err != nil || second.ID != first.ID || !second.Cached {
		t.Errorf("without --pull: %+v, %v", second, err)
	}
	if third, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir, Pull: true}}); err != nil || third.ID == first.ID {
		t.Errorf("with --pull: %+v, %v", third, err)
	}
	if _, err := e.Build(bg, BuildRequest{Request: build.Request{Context: "-", Stdin: strings.NewReader("FROM " + host + "/nowhere\n")}}); !errors.Is(err, ErrNotFound) {
		t.Errorf("on an image that nobody has: %v", err)
	}
	wantEmpty(t, e, "staging", "trash")
}

// TestBuildNetwork has a step on the default bridge, and its image removed without the cache.
func TestBuildNetwork(t *testing.T) {
	e := newBuildEngine(t)
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("no /bin/busybox (Debian: busybox-static)")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	file := "FROM scratch\nCOPY busybox /bin/sh\nRUN read x < /sys/class/net/eth0/address; echo eth0 has $x; echo > /made\n"
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	req := BuildRequest{Tags: []string{"net"}, Request: build.Request{Context: dir, Display: func(ev build.Event) {
		if ev.Kind == build.Output {
			out.WriteString(ev.Text)
		}
	}}}
	first, err := e.Build(bg, req)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "eth0 has ") || len(strings.TrimSpace(out.String())) < len("eth0 has 00:00:00:00:00:00") {
		t.Errorf("output %q", out.String())
	}
	if _, err := e.RemoveImage(bg, "net", RemoveImageRequest{}); err != nil {
		t.Fatal(err)
	}
	if again, err := e.Build(bg, req); err != nil || !again.Cached || again.ID != first.ID {
		t.Errorf("after the image was removed: %+v, %v", again, err)
	}
	eps, err := filepath.Glob(filepath.Join(e.State(), "net", "*", "ep", "*"))
	if err != nil || len(eps) > 0 {
		t.Errorf("endpoints left: %v %v", eps, err)
	}
	wantEmpty(t, e, "staging", "trash")
}
