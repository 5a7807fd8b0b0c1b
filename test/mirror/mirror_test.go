package mirror

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// store makes a conex data folder with one image of one layer, tagged twice.
func store(t *testing.T) (*image.Store, *layers.Store, []byte) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers keep owners and devices")
	}
	root, err := disk.OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	ls, err := layers.Open(root, layers.Options{State: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	body := strings.Repeat("hello\n", 10_000)
	if err := tw.WriteHeader(&tar.Header{Name: "hello", Mode: 0o644, Size: int64(len(body)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(tw, body); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := ls.Import(t.Context(), bytes.NewReader(buf.Bytes()), "")
	if err != nil {
		t.Fatal(err)
	}
	var config ocispec.Image
	config.OS, config.Architecture = "linux", "amd64"
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []ocispec.Digest{info.DiffID}}
	raw, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	images := image.Open(root, blobs.Open(root), ls)
	img, err := images.Add(t.Context(), raw, "", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"fixture:latest", "fixture:1"} {
		ref, err := image.ParseReference(tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := images.Tag(img.ID, ref); err != nil {
			t.Fatal(err)
		}
	}
	return images, ls, buf.Bytes()
}

// What an independent client pulls is the tar that the store was given, under both tags.
func TestExportAndServe(t *testing.T) {
	images, ls, want := store(t)
	dir := t.TempDir()
	for range 2 { // the second time nothing is compressed again
		if err := Export(t.Context(), images, ls.OpenTar, dir); err != nil {
			t.Fatal(err)
		}
	}
	h, err := Handler(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	defer srv.Close()
	for _, tag := range []string{"latest", "1"} {
		ref, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/library/fixture:" + tag)
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(ref)
		if err != nil {
			t.Fatal(err)
		}
		list, err := img.Layers()
		if err != nil || len(list) != 1 {
			t.Fatalf("%d layers, %v", len(list), err)
		}
		r, err := list[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: the layer has %d bytes (%v), want the %d that were imported", tag, len(got), err, len(want))
		}
		r.Close()
	}
}

// Blobs that no image needs any more go with the next Export.
func TestExportSweeps(t *testing.T) {
	images, ls, _ := store(t)
	dir := t.TempDir()
	if err := Export(t.Context(), images, ls.OpenTar, dir); err != nil {
		t.Fatal(err)
	}
	stale := filepath.Join(dir, "blobs", "sha256", strings.Repeat("0", 64))
	if err := os.WriteFile(stale, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Export(t.Context(), images, ls.OpenTar, dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(stale); err == nil {
		t.Error("a blob of no image is still there")
	}
	if entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256")); err != nil || len(entries) != 3 {
		t.Errorf("%d blobs (%v), want manifest, config and layer", len(entries), err)
	}
}
