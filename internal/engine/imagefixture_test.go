package engine

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/ondemand"
	"conex/internal/registry"

	reg "github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
)

var bg = context.Background()

// newImageEngine opens an engine over folders of the test's own, whose docker.io is the mirror and nothing else.
func newImageEngine(t *testing.T, mirrors ...string) *Engine {
	t.Helper()
	cfg := &config.Config{Root: t.TempDir(), State: t.TempDir(), Registry: map[string]config.Registry{"docker.io": {Mirrors: mirrors}}}
	e, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// tarOf makes a tar of files by name, in the order of their names.
func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name])), Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	ondemand.Compress()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// pushed is an image to push, and what is to be wrong with it.
type pushed struct {
	tars     [][]byte
	packed   [][]byte // what the registry gets of tars
	config   ocispec.Image
	manifest ocispec.Manifest
}

// newPushed makes an image with a gzip, a zstd, a plain layer, in turn.
func newPushed(t testing.TB, tars ...[]byte) *pushed {
	t.Helper()
	p := &pushed{tars: tars}
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	p.config.Created, p.config.OS, p.config.Architecture = &at, "linux", registry.HostPlatform().Architecture
	p.config.Config.Cmd = []string{"true"}
	p.config.RootFS.Type = "layers"
	p.manifest.SchemaVersion, p.manifest.MediaType = 2, ocispec.MediaTypeImageManifest
	for i, raw := range tars {
		packed, mt := raw, ocispec.MediaTypeImageLayer
		switch i % 3 {
		case 0:
			packed, mt = gzipped(t, raw), ocispec.MediaTypeImageLayerGzip
		case 1:
			packed, mt = zstded(t, raw), ocispec.MediaTypeImageLayerZstd
		}
		p.packed = append(p.packed, packed)
		p.config.RootFS.DiffIDs = append(p.config.RootFS.DiffIDs, ocispec.FromBytes(raw))
		p.config.History = append(p.config.History, ocispec.History{Created: &at, CreatedBy: fmt.Sprint("layer ", i)}, ocispec.History{Created: &at, CreatedBy: "ENV", EmptyLayer: true})
		p.manifest.Layers = append(p.manifest.Layers, ocispec.Descriptor{MediaType: mt, Digest: ocispec.FromBytes(packed), Size: int64(len(packed))})
	}
	return p
}

// push uploads the image and returns the manifest's descriptor.
func (p *pushed) push(t testing.TB, host, path, tag string) ocispec.Descriptor {
	t.Helper()
	conf, err := json.Marshal(p.config)
	if err != nil {
		t.Fatal(err)
	}
	confType := ocispec.MediaTypeImageConfig
	if p.manifest.MediaType == ocispec.MediaTypeDockerManifest {
		confType = ocispec.MediaTypeDockerConfig
	}
	p.manifest.Config = ocispec.Descriptor{MediaType: confType, Digest: ocispec.FromBytes(conf), Size: int64(len(conf))}
	for _, b := range append([][]byte{conf}, p.packed...) {
		pushBlob(t, host, path, b)
	}
	raw, err := json.Marshal(p.manifest)
	if err != nil {
		t.Fatal(err)
	}
	pushManifest(t, host, path, tag, p.manifest.MediaType, raw)
	return ocispec.Descriptor{MediaType: p.manifest.MediaType, Digest: ocispec.FromBytes(raw), Size: int64(len(raw))}
}

// pushIndex uploads an index with an image for each architecture and returns its digest.
func pushIndex(t testing.TB, host, path string, archs ...string) ocispec.Digest {
	t.Helper()
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	idx.SchemaVersion = 2
	for _, arch := range archs {
		p := newPushed(t, tarOf(t, map[string]string{"common": "x"}), tarOf(t, map[string]string{"arch": arch}))
		p.config.Architecture = arch
		desc := p.push(t, host, path, "of-"+arch)
		desc.Platform = &p.config.Platform
		idx.Manifests = append(idx.Manifests, desc)
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	pushManifest(t, host, path, "latest", idx.MediaType, raw)
	return ocispec.FromBytes(raw)
}

func pushManifest(t testing.TB, host, path, tag, mediaType string, raw []byte) {
	t.Helper()
	do(t, http.MethodPut, "http://"+host+"/v2/"+path+"/manifests/"+tag, mediaType, raw)
}

func pushBlob(t testing.TB, host, path string, b []byte) {
	t.Helper()
	resp := do(t, http.MethodPost, "http://"+host+"/v2/"+path+"/blobs/uploads/", "", nil)
	loc, err := resp.Location()
	if err != nil {
		t.Fatal(err)
	}
	q := loc.Query()
	q.Set("digest", string(ocispec.FromBytes(b)))
	loc.RawQuery = q.Encode()
	do(t, http.MethodPut, loc.String(), "application/octet-stream", b)
}

func do(t testing.TB, method, target, contentType string, body []byte) *http.Response {
	t.Helper()
	req, err := http.NewRequest(method, target, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if msg, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode/100 != 2 {
		t.Fatalf("%s %s: %s %s %v", method, target, resp.Status, msg, err)
	}
	return resp
}

// memoryRegistry serves an empty registry on loopback.
func memoryRegistry(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(reg.New(reg.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// entries counts what lies in a folder of the root.
func entries(t *testing.T, e *Engine, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(e.Root().Path(dir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, d := range list {
		if n := d.Name(); n != "gc.lock" && n != "lock" && n != "by-id" {
			names = append(names, n)
		}
	}
	return names
}

// wantEmpty checks that nothing is left in the folders.
func wantEmpty(t *testing.T, e *Engine, dirs ...string) {
	t.Helper()
	for _, d := range dirs {
		if left := entries(t, e, d); len(left) > 0 {
			t.Errorf("%s holds %v", d, left)
		}
	}
}

func imageStore(t *testing.T, e *Engine) *image.Store {
	t.Helper()
	s, err := e.Images()
	if err != nil {
		t.Fatal(err)
	}
	return s
}
