package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
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
