package engine

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/config"
	"conex/internal/disk"
	"conex/internal/ocispec"
)

func amount(t *testing.T, text string) *config.Amount {
	t.Helper()
	a := new(config.Amount)
	if err := a.UnmarshalText([]byte(text)); err != nil {
		t.Fatal(err)
	}
	return a
}

// noise does not compress.
func noise(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return string(b)
}

// buildNoise builds an image of one layer of n bytes that only the build cache holds afterwards, used at that time, and returns the layer.
func buildNoise(t *testing.T, e *Engine, n int, used time.Time) ocispec.Digest {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"Dockerfile": "FROM scratch\nCOPY data /\n", "data": noise(n)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	res, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir}})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Made) != 1 {
		t.Fatalf("made %v", res.Made)
	}
	entries, err := build.Entries(e.Root(), &disk.Meter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, en := range entries {
		if en.Layer != res.Made[0] {
			continue
		}
		for _, p := range en.Paths {
			if err := os.Chtimes(p, used, used); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := e.RemoveImage(bg, string(res.ID), RemoveImageRequest{}); err != nil {
		t.Fatal(err)
	}
	return res.Made[0]
}

func wantLayers(t *testing.T, e *Engine, ids map[ocispec.Digest]bool) {
	t.Helper()
	ls, err := e.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range ids {
		if _, err := ls.Stat(id); (err == nil) != want {
			t.Errorf("layer %s: %v, want it here: %t", id, err, want)
		}
	}
}

// TestBudget goes through the order in which things go.
func TestBudget(t *testing.T) {
	host := memoryRegistry(t)
	e := newBuildEngine(t, "http://"+host)
	p := newPushed(t, tarOf(t, map[string]string{"a": noise(3 << 20)}))
	p.push(t, host, "library/app", "latest")
	img, _, err := e.Pull(bg, PullRequest{Reference: "app"})
	if err != nil {
		t.Fatal(err)
	}
	blob := p.manifest.Layers[0].Digest
	if !e.Blobs().Has(blob) {
		t.Fatal("the compressed layer is not kept within the default budget")
	}
	// What a dead pull has left, and what one that lives is fetching.
	part, live := ocispec.FromBytes([]byte("part")), ocispec.FromBytes([]byte("live"))
	for _, d := range []ocispec.Digest{part, live} {
		if err := os.WriteFile(e.Root().Path("downloads", d.Encoded()), make([]byte, 3<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l, err := disk.Acquire(e.Root().Path("downloads", live.Encoded()+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	now := time.Now()
	oldest, older, newest := buildNoise(t, e, 4<<20, now.Add(-3*time.Hour)), buildNoise(t, e, 4<<20, now.Add(-2*time.Hour)), buildNoise(t, e, 4<<20, now)
	all := func(blobs, parts, a, b, c bool) {
		t.Helper()
		if e.Blobs().Has(blob) != blobs {
			t.Errorf("compressed layer is here: %t", !blobs)
		}
		if _, err := os.Lstat(e.Root().Path("downloads", part.Encoded())); (err == nil) != parts {
			t.Errorf("part of a blob: %v, want it here: %t", err, parts)
		}
		if _, err := os.Lstat(e.Root().Path("downloads", live.Encoded())); err != nil {
			t.Errorf("a download is gone under way: %v", err)
		}
		wantLayers(t, e, map[ocispec.Digest]bool{oldest: a, older: b, newest: c, img.Layers()[0]: true})
		wantClean(t, e)
		wantDu(t, e)
	}
	all(true, true, true, true, true)
	for _, step := range []struct {
		budget         string
		blobs, parts   bool
		old, mid, last bool
	}{
		{"18.5MB", false, true, true, true, true}, // 3 × 4 MiB and a bit, twice 3 MiB
		{"15.5MB", false, false, true, true, true},
		{"12MB", false, false, false, true, true},
		{"8MB", false, false, false, false, true},
		{"0", false, false, false, false, false},
	} {
		e.cfg.GC.Budget = amount(t, step.budget)
		e.afterWrite(bg, 1)
		t.Log(step.budget)
		all(step.blobs, step.parts, step.old, step.mid, step.last)
		st, err := e.addStock(0)
		if err != nil || st.Used > e.cfg.GC.Budget.Of(0)+1<<20 {
			t.Errorf("%s: %+v, %v", step.budget, st, err)
		}
	}
	if err := os.Remove(e.Root().Path("downloads", live.Encoded())); err != nil {
		t.Error(err)
	}
	// The image is as it was.
	if got, err := imageStore(t, e).Resolve("app"); err != nil || got.ID != img.ID {
		t.Errorf("%v, %v", got.ID, err)
	}
}

// TestBudgetSpares has what no budget may touch: layers of leases, of images without a tag, and everything when it is switched off.
func TestBudgetSpares(t *testing.T) {
	e := newBuildEngine(t)
	leased, dangling, off := buildNoise(t, e, 1<<20, time.Now()), ocispec.Digest(""), false
	lease, err := collect.Hold(e.Root(), leased)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string]string{"Dockerfile": "FROM scratch\nCOPY data /\n", "data": noise(1 << 20)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	res, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir}})
	if err != nil {
		t.Fatal(err)
	}
	dangling = res.Made[0]
	e.cfg.GC.Budget, e.cfg.GC.Auto = amount(t, "0"), &off
	cached := buildNoise(t, e, 1<<20, time.Now())
	wantLayers(t, e, map[ocispec.Digest]bool{cached: true, leased: true, dangling: true})
	on := true
	e.cfg.GC.Auto = &on
	e.afterWrite(bg, 1)
	wantLayers(t, e, map[ocispec.Digest]bool{cached: false, leased: true, dangling: true})
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	e.afterWrite(bg, 1)
	wantLayers(t, e, map[ocispec.Digest]bool{leased: false, dangling: true})
	// Cached for the image's sake: the same build finds it.
	if again, err := e.Build(bg, BuildRequest{Request: build.Request{Context: dir}}); err != nil || !again.Cached {
		t.Errorf("%+v, %v", again, err)
	}
	wantClean(t, e)
	wantDu(t, e)
}

// TestMinFree collects for the sake of others on the disk, and gives up looking when there is nothing to drop.
func TestMinFree(t *testing.T) {
	e := newBuildEngine(t)
	a, b := buildNoise(t, e, 4<<20, time.Now().Add(-time.Hour)), buildNoise(t, e, 4<<20, time.Now())
	free, _, err := disk.Free(e.Root().Path())
	if err != nil {
		t.Fatal(err)
	}
	e.cfg.GC.Budget, e.cfg.GC.MinFree = amount(t, "100GB"), amount(t, fmt.Sprint(2*free))
	e.afterWrite(bg, 0)
	wantLayers(t, e, map[ocispec.Digest]bool{a: false, b: false})
	if st, err := e.addStock(0); err != nil || !st.Fixed {
		t.Errorf("%+v, %v", st, err)
	}
	e.cfg.GC.MinFree = amount(t, "0")
	b = buildNoise(t, e, 1<<20, time.Now())
	if st, err := e.addStock(0); err != nil || st.Fixed || st.Used < 1<<20 {
		t.Errorf("%+v, %v", st, err)
	}
	wantLayers(t, e, map[ocispec.Digest]bool{b: true})
}

// TestKeepNever keeps no compressed layer, and lets go those of before.
func TestKeepNever(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t, "http://"+host)
	p := newPushed(t, tarOf(t, map[string]string{"a": "a"}))
	p.push(t, host, "library/app", "latest")
	for _, keep := range []string{config.KeepAlways, config.KeepAuto, config.KeepNever} {
		e.cfg.KeepBlobs, e.cfg.GC.Budget = keep, amount(t, "0")
		if _, _, err := e.Pull(bg, PullRequest{Reference: "app"}); err != nil {
			t.Fatal(err)
		}
		if got := e.Blobs().Has(p.manifest.Layers[0].Digest); got != (keep == config.KeepAlways) {
			t.Errorf("%s: here is %t", keep, got)
		}
		if _, err := e.RemoveImage(bg, "app", RemoveImageRequest{}); err != nil {
			t.Fatal(err)
		}
		wantEmpty(t, e, "blobs/sha256", "layers", "downloads")
	}
}
