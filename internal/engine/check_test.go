package engine

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"conex/internal/layers"
	"conex/internal/ocispec"
)

// wantClean checks the store.
func wantClean(t *testing.T, e *Engine) {
	t.Helper()
	r, err := e.Check(bg, CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Clean() {
		t.Errorf("the store is not clean: %+v", r.Findings)
	}
}

// wantDu compares DiskUsage with du.
func wantDu(t *testing.T, e *Engine) DiskUsage {
	t.Helper()
	u, err := e.DiskUsage(bg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("du", "-s", "--block-size=1", e.Root().Path()).Output()
	if err != nil {
		t.Fatal(err)
	}
	want, err := strconv.ParseInt(strings.Fields(string(out))[0], 10, 64)
	if err != nil || u.Size != want {
		t.Errorf("df says %d, du %d, %v: %+v", u.Size, want, err, u)
	}
	return u
}

func unmountLater(t *testing.T, e *Engine) {
	t.Cleanup(func() {
		if ls, err := e.Layers(); err == nil {
			if err := ls.Unmount(); err != nil {
				t.Error(err)
			}
		}
	})
}

func damage(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], 5); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], 5); err != nil {
		t.Fatal(err)
	}
}

// TestCheckFetchesAgain damages and removes what a pull has brought, each kind of it and all at once.
func TestCheckFetchesAgain(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t, "http://"+host)
	unmountLater(t, e)
	p := newPushed(t, tarOf(t, map[string]string{"a": "a"}), tarOf(t, map[string]string{"b": "b"}), tarOf(t, map[string]string{"c": "c"}))
	p.push(t, host, "library/app", "latest")
	img, _, err := e.Pull(bg, PullRequest{Reference: "app"})
	if err != nil {
		t.Fatal(err)
	}
	wantClean(t, e)
	wantDu(t, e)
	tar := func(i int) string { return e.Root().Path("layers", img.Layers()[i].Encoded(), "layer.tar") }
	blob := func(d ocispec.Digest) string { return e.Root().Path("blobs", "sha256", d.Encoded()) }
	ways := map[string]func(){
		"layer":    func() { damage(t, tar(0)) },
		"gone":     func() { os.RemoveAll(filepath.Dir(tar(1))) },
		"config":   func() { damage(t, blob(img.ID)) },
		"lost":     func() { os.Remove(blob(img.ID)) },
		"manifest": func() { damage(t, blob(img.Manifest)) },
		"forgot":   func() { os.Remove(blob(img.Manifest)) },
		"meta":     func() { os.WriteFile(filepath.Join(filepath.Dir(tar(2)), "meta.json"), []byte("{"), 0o600) },
		"all": func() {
			damage(t, tar(0))
			os.RemoveAll(filepath.Dir(tar(1)))
			damage(t, blob(img.ID))
			os.Remove(blob(img.Manifest))
		},
	}
	for name, spoil := range ways {
		t.Run(name, func(t *testing.T) {
			spoil()
			before := wantDu(t, e)
			r, err := e.Check(bg, CheckRequest{})
			if err != nil || r.Clean() {
				t.Fatalf("not found: %+v, %v", r.Findings, err)
			}
			if after := wantDu(t, e); after.Size != before.Size {
				t.Errorf("a check without repair changed something: %d bytes, then %d", before.Size, after.Size)
			}
			r, err = e.Check(bg, CheckRequest{Repair: true})
			if err != nil || !r.Clean() {
				t.Fatalf("not repaired: %+v, %v", r.Findings, err)
			}
			wantClean(t, e)
			if left := entries(t, e, "quarantine"); len(left) > 0 {
				t.Errorf("what is fetched again stays in quarantine: %v", left)
			}
			got, err := imageStore(t, e).Resolve("app")
			if err != nil || got.ID != img.ID {
				t.Errorf("%v, %v", got.ID, err)
			}
			ls, err := e.Layers()
			if err != nil {
				t.Fatal(err)
			}
			if name, _ := ls.Driver(); name == layers.DriverEROFS {
				if _, err := ls.Lower(bg, img.Layers()); err != nil {
					t.Error(err)
				}
			}
			wantDu(t, e)
		})
	}
}

// TestCheckWithoutARegistry has an image whose config is lost for good: it keeps every sweep from its work until it is put away.
func TestCheckWithoutARegistry(t *testing.T) {
	e := newImageEngine(t)
	src := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(src, tarOf(t, map[string]string{"a": "b"}), 0o600); err != nil {
		t.Fatal(err)
	}
	id, err := e.Import(bg, ImportRequest{Source: src, Reference: "app"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(e.Root().Path("blobs", "sha256", strings.TrimPrefix(id, "sha256:"))); err != nil {
		t.Fatal(err)
	}
	r, err := e.Check(bg, CheckRequest{Repair: true})
	if err != nil || r.Clean() || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].RepairError, "no registry is known to have it") {
		t.Fatalf("%+v, %v", r.Findings, err)
	}
	if left := entries(t, e, "quarantine"); len(left) != 2 {
		t.Errorf("record and tag in quarantine: %v", left)
	}
	if _, err := e.sweep(bg); err != nil {
		t.Error(err)
	}
	wantClean(t, e)
	if _, err := e.Import(bg, ImportRequest{Source: src, Reference: "app"}); err != nil {
		t.Error(err)
	}
	wantClean(t, e)
	wantDu(t, e)
}
