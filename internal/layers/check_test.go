package layers

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"conex/internal/disk"
)

// TestCheck damages a layer of each driver in the ways that a hand or a disk can, and looks that nothing but the damage changes.
func TestCheck(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		ctx := context.Background()
		data := tarOf(t, dirEntry("etc"), fileEntry("etc/passwd", "root"), linkEntry(tar.TypeSymlink, "l", "etc"), fileEntry("b", "content of b"))
		info := mustImport(t, s, data)
		dir := s.dir(info.DiffID)
		if f, err := s.Check(ctx, info.DiffID); f != nil || err != nil {
			t.Fatalf("a good layer: %+v, %v", f, err)
		}
		at := func(elem ...string) string { return filepath.Join(append([]string{dir}, elem...)...) }
		appendTo := func(path string) {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			_, err = io.WriteString(f, "x")
			must(t, errors.Join(err, f.Close()))
		}
		ways := map[string]struct {
			spoil    func()
			mendable bool
		}{
			"meta.json": {func() { must(t, os.WriteFile(at("meta.json"), []byte("{"), 0o600)) }, true},
			"blobs":     {func() { must(t, os.WriteFile(at("blobs.json"), []byte("{"), 0o600)) }, true},
			"index":     {func() { appendTo(at("index.erofs")) }, true},
			"lost":      {func() { must(t, os.Remove(at("index.erofs"))) }, true},
			"tar":       {func() { appendTo(at("layer.tar")) }, false},
		}
		if s.drv.name() == DriverDir {
			ways = map[string]struct {
				spoil    func()
				mendable bool
			}{
				"blobs":  {func() { must(t, os.WriteFile(at("blobs.json"), []byte("{"), 0o600)) }, true},
				"longer": {func() { appendTo(at("fs", "etc", "passwd")) }, false},
				"new":    {func() { must(t, os.WriteFile(at("fs", "etc", "shadow"), nil, 0o600)) }, false},
				"lost":   {func() { must(t, os.Remove(at("fs", "b"))) }, false},
				"mode":   {func() { must(t, os.Chmod(at("fs", "b"), 0o4755)) }, false},
				"link":   {func() { must(t, errors.Join(os.Remove(at("fs", "l")), os.Symlink("/root", at("fs", "l")))) }, false},
			}
		}
		for name, w := range ways {
			t.Run(name, func(t *testing.T) {
				w.spoil()
				f, err := s.Check(ctx, info.DiffID)
				if err != nil || f == nil || f.Mendable != w.mendable {
					t.Fatalf("%+v, %v", f, err)
				}
				if _, err := os.Lstat(dir); err != nil {
					t.Fatalf("a check removed it: %v", err)
				}
				if w.mendable {
					must(t, s.Mend(ctx, info.DiffID))
				} else {
					to := s.root.Path("trash", disk.RandomID())
					if moved, err := s.Quarantine(ctx, info.DiffID, to); err != nil || !moved {
						t.Fatalf("%t, %v", moved, err)
					}
					mustImport(t, s, data)
				}
				if f, err := s.Check(ctx, info.DiffID); f != nil || err != nil {
					t.Fatalf("afterwards: %+v, %v", f, err)
				}
				if moved, err := s.Quarantine(ctx, info.DiffID, s.root.Path("trash", disk.RandomID())); err != nil || moved {
					t.Errorf("a good layer goes into quarantine: %t, %v", moved, err)
				}
			})
		}
	})
}
