package archive

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/blobs"
	"conex/internal/ocispec"
)

func TestLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	l := OpenLayout(dir)
	if _, err := l.Resolve("latest"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a layout that is not there: %v", err)
	}
	content := []byte("manifest")
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: ocispec.FromBytes(content), Size: int64(len(content))}
	for range 2 {
		if err := l.PutBytes(t.Context(), content); err != nil {
			t.Fatal(err)
		}
		if err := l.Tag("a", d); err != nil {
			t.Fatal(err)
		}
		if err := l.Tag("b", d); err != nil {
			t.Fatal(err)
		}
	}
	idx, err := l.index()
	if err != nil || len(idx.Manifests) != 2 {
		t.Errorf("%d names, %v; want 2", len(idx.Manifests), err)
	}
	for _, name := range []string{"a", "b", string(d.Digest)} {
		got, err := l.Resolve(name)
		if err != nil || got.Digest != d.Digest {
			t.Errorf("%s leads to %v, %v", name, got, err)
		}
	}
	if _, err := l.Resolve("c"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("a name that is not there: %v", err)
	}
	rc, err := l.Blob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if b, err := io.ReadAll(rc); err != nil || string(b) != "manifest" {
		t.Errorf("%q, %v", b, err)
	}

	// What is written is compared with its descriptor, and so is what is read.
	wrong := Blob{Descriptor: ocispec.Descriptor{Digest: ocispec.FromBytes([]byte("x")), Size: 1}, Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("y")), nil }}
	if err := l.Put(t.Context(), wrong); err == nil {
		t.Error("a damaged blob was written")
	}
	left, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil || len(left) != 1 {
		t.Errorf("%d files among the blobs, %v; want 1", len(left), err)
	}
	if err := os.WriteFile(l.blobPath(d.Digest), []byte("MANIFEST"), 0o644); err != nil {
		t.Fatal(err)
	}
	rc2, err := l.Blob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer rc2.Close()
	if _, err := io.ReadAll(rc2); !errors.Is(err, blobs.ErrMismatch) {
		t.Errorf("a damaged blob was read: %v", err)
	}
	for _, bad := range []ocispec.Digest{"sha256:../../../../etc/passwd", "md5:0cc175b9c0f1b6a831c399e269772661", ""} {
		if _, err := l.Blob(ocispec.Descriptor{Digest: bad, Size: 1}); err == nil {
			t.Errorf("blob %q was opened", bad)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, ociList), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Resolve("a"); !errors.Is(err, ErrRefused) {
		t.Errorf("a damaged index: %v", err)
	}
}
