package build

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// TestCachedTree: many ask, one fills; a failed fill leaves nothing; what is read can't be pruned, the rest can.
func TestCachedTree(t *testing.T) {
	root, err := disk.OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	b := &Builder{Root: root}
	broken := errors.New("broken")
	_, err = b.cachedTree(t.Context(), []string{"x"}, treeInfo{}, func(_ context.Context, files, _ string) error {
		return errors.Join(os.WriteFile(filepath.Join(files, "a"), nil, 0o644), broken)
	})
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
	left, err := os.ReadDir(root.Path("staging"))
	if err != nil || len(left) > 0 {
		t.Fatalf("%v, %v", left, err)
	}
	var filled atomic.Int32
	var wg sync.WaitGroup
	trees := make([]*cachedTree, 8)
	for i := range trees {
		wg.Go(func() {
			var err error
			trees[i], err = b.cachedTree(t.Context(), []string{"x"}, treeInfo{Source: "here"}, func(_ context.Context, files, _ string) error {
				filled.Add(1)
				return os.WriteFile(filepath.Join(files, "a"), []byte("A"), 0o644)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := filled.Load(); n != 1 {
		t.Errorf("filled %d times", n)
	}
	prune := func(before time.Time) int64 {
		t.Helper()
		_, freed, err := Prune(root, PruneOptions{Before: before})
		if err != nil {
			t.Fatal(err)
		}
		return freed
	}
	entries, err := Entries(root, &disk.Meter{})
	if err != nil || len(entries) != 1 || entries[0].Kind != KindTree || entries[0].Title != "here" || entries[0].Space.Disk == 0 {
		t.Fatalf("%+v, %v", entries, err)
	}
	if prune(time.Time{}) != 0 {
		t.Error("pruned what is being read")
	}
	for _, tree := range trees {
		if data, err := os.ReadFile(filepath.Join(tree.dir, "a")); err != nil || string(data) != "A" {
			t.Errorf("%q, %v", data, err)
		}
		if err := tree.close(); err != nil {
			t.Error(err)
		}
	}
	if prune(time.Now().Add(-time.Hour)) != 0 {
		t.Error("pruned what was used lately")
	}
	if prune(time.Time{}) == 0 {
		t.Error("nothing was freed")
	}
	left, err = os.ReadDir(root.Path("buildcache", treeFolder))
	if err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// TestEndless: a server that never stops fills no disk.
func TestEndless(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=96m"); err != nil {
		t.Skipf("tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	root, err := disk.OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for block := make([]byte, 1<<20); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer srv.Close()
	b := &Builder{Root: root}
	u, err := parseURL(srv.URL + "/x?secret=hidden")
	if err != nil {
		t.Fatal(err)
	}
	soon(t, func() {
		_, err := b.fetcher(&Request{}).get(t.Context(), u, nil)
		if !errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("error %v", err)
		}
	})
	free, size, err := disk.Free(dir)
	if err != nil || free < size*9/10 {
		t.Errorf("%d of %d bytes are free, %v", free, size, err)
	}
}
