package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

func TestBlobs(t *testing.T) {
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	s, err := Open(root, Options{Driver: DriverDir, State: state})
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.NewWriter(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	info, err := w.Commit()
	if err != nil {
		t.Fatal(err)
	}
	form := func(n int, sources ...string) Blob {
		return Blob{Digest: ocispec.FromBytes(fmt.Append(nil, n)), Size: int64(n), MediaType: ocispec.MediaTypeImageLayerGzip, Sources: sources}
	}
	for _, b := range []Blob{form(1, "docker.io/library/a"), form(2), form(1, "h/b"), form(1, "docker.io/library/a")} {
		if err := s.AddBlob(info.DiffID, b); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Blobs(info.DiffID)
	if err != nil || len(got) != 2 || got[0].Digest != form(1).Digest || !slices.Equal(got[0].Sources, []string{"h/b", "docker.io/library/a"}) || got[1].Size != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	for n := range 3 * maxBlobs {
		if err := s.AddBlob(info.DiffID, form(n)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Blobs(info.DiffID); err != nil || len(got) != maxBlobs || got[0].Size != 3*maxBlobs-1 {
		t.Fatalf("%d forms, %v", len(got), err)
	}
	// A note that a power loss cut short is made anew.
	if err := os.WriteFile(s.blobsPath(info.DiffID), []byte(`[{"dig`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.AddBlob(info.DiffID, form(5)); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Blobs(info.DiffID); err != nil || len(got) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	missing := ocispec.FromBytes([]byte("missing"))
	if err := s.AddBlob(missing, form(1)); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	if got, err := s.Blobs(missing); err != nil || got != nil {
		t.Fatalf("%v, %v", got, err)
	}
	if locks, err := os.ReadDir(state + "/layers"); err != nil || slices.ContainsFunc(locks, func(e os.DirEntry) bool { return e.Name() == missing.Encoded()+".lock" }) {
		t.Fatalf("a lock of a layer that is not there stays: %v, %v", locks, err)
	}
}

// TestOpenVerified reads layers whose tar is whole, changed and cut short, with and without the checksum.
func TestOpenVerified(t *testing.T) {
	for _, name := range []string{DriverDir, DriverEROFS} {
		root, err := disk.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(root, Options{Driver: name, State: t.TempDir()})
		if err != nil {
			t.Logf("driver %s: %v", name, err)
			continue
		}
		w, err := s.NewWriter(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		content := bytes.Repeat([]byte("content "), 400_000) // more than one block
		if err := w.WriteEntry(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		info, err := w.Commit()
		if err != nil {
			t.Fatal(err)
		}
		meta := filepath.Join(s.dir(info.DiffID), "meta.json")
		for _, checksum := range []bool{true, false} {
			read := func() error {
				rc, got, err := s.OpenVerified(info.DiffID)
				if err != nil {
					t.Fatal(err)
				}
				defer rc.Close()
				n, err := io.Copy(io.Discard, rc)
				if err == nil && (n != got.Size || got.Size != info.Size) {
					t.Errorf("%s: read %d of %d bytes", name, n, got.Size)
				}
				return err
			}
			raw, err := os.ReadFile(meta)
			if err != nil || strings.Contains(string(raw), "crc32c") != checksum {
				t.Fatalf("%s: checksum %v: %s %v", name, checksum, raw, err)
			}
			if err := read(); err != nil {
				t.Errorf("%s, checksum %v: %v", name, checksum, err)
			}
			file := filepath.Join(s.dir(info.DiffID), map[string]string{DriverDir: "fs/f", DriverEROFS: "layer.tar"}[name])
			whole, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			changed := bytes.Clone(whole)
			changed[len(changed)/2] ^= 1
			if err := os.WriteFile(file, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := read(); !errors.Is(err, ErrDigest) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s, checksum %v, a changed byte: %v", name, checksum, err)
			}
			if err := os.WriteFile(file, whole[:len(whole)/2], 0o600); err != nil {
				t.Fatal(err)
			}
			if err := read(); err == nil {
				t.Errorf("%s, checksum %v: half a file was read without an error", name, checksum)
			}
			if err := os.WriteFile(file, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			var m map[string]any
			if err := disk.ReadJSON(meta, &m); err != nil {
				t.Fatal(err)
			}
			delete(m, "crc32c")
			if err := disk.WriteJSON(meta, m, disk.Volatile); err != nil {
				t.Fatal(err)
			}
		}
	}
}
