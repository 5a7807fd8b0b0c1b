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
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"

	reg "github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	apic "github.com/moby/moby/api/types/container"
	apii "github.com/moby/moby/api/types/image"
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

func TestPullFromMirror(t *testing.T) { testPull(t, memoryRegistry(t)) }

// TestPullFromDebianRegistry is the same against the registry that others run.
func TestPullFromDebianRegistry(t *testing.T) {
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed: ", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	conf := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n", filepath.Join(dir, "data"), host)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "serve", conf)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err == nil {
			cmd.Wait() //nolint:errcheck // it was killed
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; {
		resp, err := http.Get("http://" + host + "/v2/")
		if err == nil {
			resp.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	testPull(t, host)
}

func testPull(t *testing.T, host string) {
	e := newImageEngine(t, "http://"+host)
	base := tarOf(t, map[string]string{"etc/os-release": "base"})
	p := newPushed(t, base, tarOf(t, map[string]string{"app": "one"}), tarOf(t, map[string]string{"plain": strings.Repeat("x", 100_000)}), base)
	desc := p.push(t, host, "library/web", "latest")

	var events []Event
	req := PullRequest{Reference: "web", Progress: func(ev Event) { events = append(events, ev) }}
	img, st, err := e.Pull(bg, req)
	if err != nil {
		t.Fatal(err)
	}
	if st.Digest != desc.Digest || !st.Downloaded || img.ID != p.manifest.Config.Digest || img.Manifest != desc.Digest ||
		!slices.Equal(img.RepoTags, []string{"web:latest"}) || !slices.Equal(img.RepoDigests, []string{"web@" + string(desc.Digest)}) {
		t.Fatalf("%+v, %+v", img, st)
	}
	said := actions(events)
	if said["Pulling from library/web"] != 1 || said["Pulling fs layer"] != 3 || said["Pull complete"] != 3 {
		t.Errorf("events: %v", said)
	}
	ls, err := e.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range img.Layers() {
		rc, _, err := ls.OpenTar(id)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(rc)
		rc.Close()
		if err != nil || !bytes.Equal(got, p.tars[i]) {
			t.Errorf("layer %d is not the tar that was pushed: %v", i, err)
		}
	}
	wantEmpty(t, e, "staging", "trash", "leases")

	// Again: nothing to do.
	if _, st, err = e.Pull(bg, req); err != nil || st.Downloaded {
		t.Fatalf("again: %+v, %v", st, err)
	}
	// Another image on the same base: the base is not fetched.
	q := newPushed(t, base, tarOf(t, map[string]string{"app": "two"}))
	q.push(t, host, "library/web", "v2")
	events = nil
	req.Reference = "docker.io/library/web:v2"
	if _, _, err = e.Pull(bg, req); err != nil {
		t.Fatal(err)
	}
	if said := actions(events); said["Already exists"] != 1 || said["Pull complete"] != 1 {
		t.Errorf("events: %v", said)
	}
	// By digest: no tag. The manifest is the first image's.
	byDigest, _, err := e.Pull(bg, PullRequest{Reference: "web@" + string(desc.Digest)})
	if err != nil || byDigest.ID != img.ID {
		t.Fatalf("%v, %v", byDigest.ID, err)
	}
	// The tag moves; the old image stays under its digest.
	q.push(t, host, "library/web", "latest")
	if _, st, err = e.Pull(bg, PullRequest{Reference: "web"}); err != nil || !st.Downloaded {
		t.Fatalf("moved: %+v, %v", st, err)
	}
	old, err := imageStore(t, e).Get(img.ID)
	if err != nil || old.RepoTags != nil || len(old.RepoDigests) != 1 {
		t.Fatalf("old: %+v, %v", old, err)
	}
	// Straight from the registry, by plain http since it is on loopback.
	if direct, _, err := e.Pull(bg, PullRequest{Reference: host + "/library/web"}); err != nil || !slices.Contains(direct.RepoTags, host+"/library/web:latest") {
		t.Fatalf("direct: %v, %v", direct.RepoTags, err)
	}
	if _, _, err := e.Pull(bg, PullRequest{Reference: host + "/library/web:nope"}); !errors.Is(err, ErrNotFound) || !strings.HasPrefix(err.Error(), "manifest for "+host+"/library/web:nope not found: manifest unknown") {
		t.Errorf("unknown tag: %v", err)
	}
}

func actions(events []Event) map[string]int {
	n := map[string]int{}
	for _, ev := range events {
		n[ev.Action]++
	}
	return n
}

// TestPullDockerSchema2 pulls what docker push writes: its own media types, in a manifest list.
func TestPullDockerSchema2(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": "1"}))
	p.manifest.MediaType = ocispec.MediaTypeDockerManifest
	p.manifest.Layers[0].MediaType = ocispec.MediaTypeDockerLayerGzip
	d := p.push(t, host, "d", "one")
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: registry.HostPlatform().Architecture}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeDockerManifestList, "manifests": []any{d}})
	if err != nil {
		t.Fatal(err)
	}
	pushManifest(t, host, "d", "list", ocispec.MediaTypeDockerManifestList, raw)
	for _, tag := range []string{"one", "list"} {
		img, _, err := e.Pull(bg, PullRequest{Reference: host + "/d:" + tag})
		if err != nil || img.ID != p.manifest.Config.Digest || img.Manifest != d.Digest {
			t.Errorf("%s: %+v, %v", tag, img, err)
		}
	}
}

// TestPullKilled kills a process in the middle of a layer: the next pull cleans up after it and succeeds.
func TestPullKilled(t *testing.T) {
	if root := os.Getenv("ENGINE_TEST_PULL_ROOT"); root != "" { // we are the process to be killed
		e, err := Open(&config.Config{Root: root, State: os.Getenv("ENGINE_TEST_PULL_STATE")})
		if err == nil {
			_, _, err = e.Pull(bg, PullRequest{Reference: os.Getenv("ENGINE_TEST_PULL_REF")})
		}
		t.Fatalf("ended before it was killed: %v", err)
	}
	p := newPushed(t, tarOf(t, nil), tarOf(t, nil), tarOf(t, map[string]string{"big": strings.Repeat("x", 1<<20)})) // the third is not compressed
	big := p.packed[2]
	half := make(chan struct{}, 1)
	var stuck atomic.Bool
	stuck.Store(true)
	inner := reg.New(reg.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if stuck.Load() && r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, string(ocispec.FromBytes(big))) {
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			w.Write(big[:len(big)/2])
			w.(http.Flusher).Flush()
			half <- struct{}{}
			<-r.Context().Done()
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	p.push(t, host, "k", "latest")
	e := newImageEngine(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestPullKilled$")
	cmd.Env = append(os.Environ(), "ENGINE_TEST_PULL_ROOT="+e.cfg.Root, "ENGINE_TEST_PULL_STATE="+e.cfg.State, "ENGINE_TEST_PULL_REF="+host+"/k")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	for len(entries(t, e, "staging")) == 0 { // the client has the bytes, it is about to stage them
		time.Sleep(time.Millisecond)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	if len(entries(t, e, "staging")) == 0 || len(entries(t, e, "leases")) == 0 {
		t.Fatal("the kill came too late to leave anything")
	}
	stuck.Store(false)
	img, _, err := e.Pull(bg, PullRequest{Reference: host + "/k"})
	if err != nil || len(img.Layers()) != 3 {
		t.Fatalf("%+v, %v", img, err)
	}
	if _, err := e.sweep(bg); err != nil { // takes the dead lease
		t.Fatal(err)
	}
	wantEmpty(t, e, "staging", "trash", "leases")
	if _, err := imageStore(t, e).Resolve(host + "/k"); err != nil {
		t.Fatal(err)
	}
}

// TestPullRepairs pulls an image again of which a layer was lost and the config damaged.
func TestPullRepairs(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": "12345"}), tarOf(t, map[string]string{"b": "678"}))
	p.push(t, host, "r", "latest")
	img, _, err := e.Pull(bg, PullRequest{Reference: host + "/r"})
	if err != nil {
		t.Fatal(err)
	}
	ls, err := e.Layers()
	if err != nil {
		t.Fatal(err)
	}
	if err := ls.Remove(img.Layers()[0]); err != nil {
		t.Fatal(err)
	}
	if sums, err := e.ListImages(bg, ImagesRequest{}); err != nil || len(sums) != 1 || sums[0].Size != 3 {
		t.Errorf("an image that lacks a layer must still be listed: %+v, %v", sums, err)
	}
	if err := os.WriteFile(e.Root().Path("blobs", "sha256", img.ID.Encoded()), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := e.Pull(bg, PullRequest{Reference: host + "/r"}); err != nil {
		t.Fatal(err)
	}
	if sums, err := e.ListImages(bg, ImagesRequest{}); err != nil || len(sums) != 1 || sums[0].Size != 8 {
		t.Errorf("%+v, %v", sums, err)
	}
	// Damaged again, it can also be removed, with all that was its.
	if err := os.WriteFile(e.Root().Path("blobs", "sha256", img.ID.Encoded()), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := e.RemoveImage(bg, host+"/r", RemoveImageRequest{}); err != nil || len(got) != 3 {
		t.Errorf("%v, %v", got, err)
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256")
}

func TestPullPlatforms(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	var idx ocispec.Index
	idx.SchemaVersion, idx.MediaType = 2, ocispec.MediaTypeImageIndex
	ids := map[string]ocispec.Digest{}
	for _, arch := range []string{"s390x", "amd64", "arm64"} {
		p := newPushed(t, tarOf(t, map[string]string{"arch": arch}))
		p.config.Architecture = arch
		d := p.push(t, host, "multi", "x-"+arch)
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		idx.Manifests = append(idx.Manifests, d)
		ids[arch] = p.manifest.Config.Digest
	}
	raw, err := json.Marshal(idx)
	if err != nil {
		t.Fatal(err)
	}
	pushManifest(t, host, "multi", "latest", idx.MediaType, raw)
	for plat, arch := range map[string]string{"": registry.HostPlatform().Architecture, "linux/arm64": "arm64", "s390x": "s390x"} {
		img, st, err := e.Pull(bg, PullRequest{Reference: host + "/multi", Platform: plat})
		if err != nil || img.ID != ids[arch] || st.Digest != ocispec.FromBytes(raw) {
			t.Errorf("%q: %v, %v, %v", plat, img.ID, st.Digest, err)
		}
	}
	_, _, err = e.Pull(bg, PullRequest{Reference: host + "/multi", Platform: "linux/riscv64"})
	if err == nil || err.Error() != "pull "+host+"/multi:latest: no matching manifest for linux/riscv64 in the manifest list entries" {
		t.Errorf("riscv64: %v", err)
	}
	if _, _, err = e.Pull(bg, PullRequest{Reference: host + "/multi:x-s390x", Platform: "linux/arm64"}); !errors.Is(err, registry.ErrNoPlatform) {
		t.Errorf("s390x as arm64: %v", err)
	}
}

// TestPullLies pulls images with something wrong: each is refused in one line, and nothing is left.
func TestPullLies(t *testing.T) {
	good := tarOf(t, map[string]string{"a": strings.Repeat("content", 1000)})
	evil := tarOf(t, map[string]string{"b": "other"})
	for name, c := range map[string]struct {
		spoil func(*pushed)
		want  string
	}{
		"diffID of another tar":  {func(p *pushed) { p.config.RootFS.DiffIDs[0] = ocispec.FromBytes(evil) }, "digest"},
		"fewer layers than said": {func(p *pushed) { p.config.RootFS.DiffIDs = append(p.config.RootFS.DiffIDs, ocispec.FromBytes(evil)) }, "manifest has 1 layers, its config 2"},
		"size too small":         {func(p *pushed) { p.manifest.Layers[0].Size-- }, "the manifest says"},
		"truncated gzip": {func(p *pushed) {
			cut := p.packed[0][:len(p.packed[0])-20]
			p.packed[0] = cut
			p.manifest.Layers[0].Digest, p.manifest.Layers[0].Size = ocispec.FromBytes(cut), int64(len(cut))
		}, "EOF"},
		"layer is no tar": {func(p *pushed) {
			junk := bytes.Repeat([]byte("junk"), 1000)
			p.packed[0] = junk
			p.manifest.Layers[0].Digest, p.manifest.Layers[0].Size = ocispec.FromBytes(junk), int64(len(junk))
			p.config.RootFS.DiffIDs[0] = ocispec.FromBytes(junk)
		}, ""},
		"hostile diffID": {func(p *pushed) { p.config.RootFS.DiffIDs[0] = "sha256:../../../../../../etc/passwd" }, "not a sha256"},
		"missing layer":  {func(p *pushed) { p.manifest.Layers[0].Digest = ocispec.FromBytes(evil) }, "blob unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			host := memoryRegistry(t)
			e := newImageEngine(t)
			p := newPushed(t, good)
			c.spoil(p)
			p.push(t, host, "lie", "latest")
			_, _, err := e.Pull(bg, PullRequest{Reference: host + "/lie"})
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.want)) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, c.want)
			}
			wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")
		})
	}
}

// TestPullWrongBytes gets a layer of the right length from a registry that changed a byte in it.
func TestPullWrongBytes(t *testing.T) {
	inner := reg.New(reg.Logger(log.New(io.Discard, "", 0)))
	p := newPushed(t, tarOf(t, nil), tarOf(t, nil), tarOf(t, map[string]string{"a": strings.Repeat("content", 1000)})) // the third is not compressed
	bad := p.manifest.Layers[2].Digest
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, string(bad)) {
			b := bytes.Replace(p.packed[2], []byte("content"), []byte("CONTENT"), 1)
			w.Write(b)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	e := newImageEngine(t)
	p.push(t, host, "lie", "latest")
	_, _, err := e.Pull(bg, PullRequest{Reference: host + "/lie"})
	if !errors.Is(err, registry.ErrMismatch) || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), string(bad)) {
		t.Errorf("got %v", err)
	}
	for _, l := range entries(t, e, "layers") {
		if l == bad.Encoded() {
			t.Error("the changed layer was stored")
		}
	}
	wantEmpty(t, e, "images", "images/by-id", "blobs/sha256", "staging", "trash", "leases")
}

func TestPullUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := l.Addr().String()
	l.Close()
	mirror := memoryRegistry(t)
	e := newImageEngine(t)
	e.cfg.Registry = map[string]config.Registry{"hub.test": {Mirrors: []string{"http://" + mirror, "http://" + dead}, PlainHTTP: true}, dead: {PlainHTTP: true}}
	_, _, err = e.Pull(bg, PullRequest{Reference: dead + "/x"})
	if err == nil || !strings.Contains(err.Error(), "registry http://"+dead+": ") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v", err)
	}
	_, _, err = e.Pull(bg, PullRequest{Reference: "hub.test/x"})
	if err == nil || !strings.Contains(err.Error(), "mirror http://"+mirror+": ") || !strings.Contains(err.Error(), "mirror http://"+dead+": ") || !strings.Contains(err.Error(), "registry http://hub.test: ") {
		t.Errorf("%v", err)
	}
	denied := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }))
	t.Cleanup(denied.Close)
	name := strings.TrimPrefix(denied.URL, "http://") + "/team/x"
	_, _, err = e.Pull(bg, PullRequest{Reference: name})
	if err == nil || !strings.HasPrefix(err.Error(), "pull access denied for "+name+", repository does not exist or may require 'docker login': ") {
		t.Errorf("%v", err)
	}
}

// TestPullAndRemoveAtOnce pulls and removes images that share layers, from several engines over one root; what is left is whole.
func TestPullAndRemoveAtOnce(t *testing.T) {
	host := memoryRegistry(t)
	first := newImageEngine(t)
	base := tarOf(t, map[string]string{"base": strings.Repeat("b", 50_000)})
	var names []string
	for i := range 3 {
		p := newPushed(t, base, tarOf(t, map[string]string{"own": fmt.Sprint(i)}))
		p.push(t, host, fmt.Sprint("img", i), "latest")
		names = append(names, fmt.Sprint(host, "/img", i))
	}
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			e, err := Open(first.cfg)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 6 {
				name := names[(w+i)%3]
				if w < 3 {
					if _, _, err := e.Pull(bg, PullRequest{Reference: name}); err != nil && !errors.Is(err, image.ErrNotFound) {
						t.Errorf("pull: %v", err)
					}
					continue
				}
				if _, err := e.RemoveImage(bg, name, RemoveImageRequest{Force: true}); err != nil && !errors.Is(err, image.ErrNotFound) {
					t.Errorf("rmi: %v", err)
				}
			}
		})
	}
	wg.Wait()
	sums, err := first.ListImages(bg, ImagesRequest{}) // reads each config, and each layer's size
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sums {
		if _, err := first.RemoveImage(bg, s.ID, RemoveImageRequest{Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.sweep(bg); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, first, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")
}

func TestImport(t *testing.T) {
	e := newImageEngine(t)
	raw := tarOf(t, map[string]string{"etc/motd": "hello", "bin/sh": "x"})
	file := filepath.Join(t.TempDir(), "rootfs.tar.gz")
	if err := os.WriteFile(file, gzipped(t, raw), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(file))))
	t.Cleanup(s.Close)
	for name, req := range map[string]ImportRequest{
		"stdin":      {Source: "-", Stdin: bytes.NewReader(raw)},
		"stdin zstd": {Source: "-", Stdin: bytes.NewReader(zstded(t, raw)), Message: "my own"},
		"file":       {Source: file, Reference: "mine:1", Changes: []string{`CMD ["/bin/sh"]`, "ENV A=b"}},
		"url":        {Source: s.URL + "/rootfs.tar.gz", Platform: "linux/arm64"},
	} {
		id, err := e.Import(bg, req)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r, err := e.InspectImage(bg, id)
		if err != nil || r.ID != id || !slices.Equal(r.RootFS.Layers, []string{string(ocispec.FromBytes(raw))}) || r.Size != 6 || r.Os != "linux" {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		switch name {
		case "file":
			if !slices.Equal(r.RepoTags, []string{"mine:1"}) || !slices.Equal(r.Config.Cmd, []string{"/bin/sh"}) || !slices.Equal(r.Config.Env, []string{"A=b"}) || r.Comment != "Imported from "+file {
				t.Errorf("%+v", r)
			}
		case "url":
			if r.Architecture != "arm64" {
				t.Error(r.Architecture)
			}
		case "stdin zstd":
			if r.Comment != "my own" {
				t.Error(r.Comment)
			}
		}
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Errorf("equal content exists once, but layers holds %v", l)
	}
	wantEmpty(t, e, "staging", "trash", "leases")
}

func TestImportRefuses(t *testing.T) {
	e := newImageEngine(t)
	for name, c := range map[string]struct {
		req  ImportRequest
		want string
	}{
		"missing file": {ImportRequest{Source: "/no/such/file"}, "no such file"},
		"no tar":       {ImportRequest{Source: "-", Stdin: strings.NewReader(strings.Repeat("no tar at all ", 100))}, ""},
		"bad change":   {ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, nil)), Changes: []string{"RUN x"}}, "RUN is not a valid change command"},
		"bad name":     {ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, nil)), Reference: "Bad"}, "must be lowercase"},
		"no stdin":     {ImportRequest{Source: "-"}, "there is none"},
		"cut gzip":     {ImportRequest{Source: "-", Stdin: bytes.NewReader(gzipped(t, tarOf(t, map[string]string{"a": "b"}))[:40])}, "EOF"},
	} {
		if id, err := e.Import(bg, c.req); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %s, %v", name, id, err)
		}
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")
}

// imported makes an image of one file and tags it.
func imported(t *testing.T, e *Engine, content string, changes []string, tags ...string) string {
	t.Helper()
	id, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"file": content})), Changes: changes})
	if err != nil {
		t.Fatal(err)
	}
	for _, tag := range tags {
		if err := e.Tag(bg, id, tag); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

func TestRemoveImage(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "tag", "other:2")
	layer := string(ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"})))
	for _, c := range []struct {
		name  string
		force bool
		want  []apii.DeleteResponse
		err   string
	}{
		{"nope", false, nil, "No such image: nope:latest"},
		{id, false, nil, "conflict: unable to delete " + id[7:19] + " (must be forced) - image is referenced in multiple repositories"},
		{"tag", false, []apii.DeleteResponse{{Untagged: "tag:latest"}}, ""},
		{"tag", false, nil, "No such image: tag:latest"},
		{"other:2", false, []apii.DeleteResponse{{Untagged: "other:2"}, {Deleted: id}, {Deleted: layer}}, ""},
	} {
		got, err := e.RemoveImage(bg, c.name, RemoveImageRequest{Force: c.force})
		if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256", "staging", "trash", "leases")

	id = imported(t, e, "2", nil, "x", "y", "y:2")
	got, err := e.RemoveImage(bg, id[7:20], RemoveImageRequest{Force: true})
	if err != nil || len(got) != 5 || got[0].Untagged != "x:latest" || got[3].Deleted != id {
		t.Errorf("by id, forced: %v, %v", got, err)
	}
	wantEmpty(t, e, "images", "images/by-id", "layers", "blobs/sha256")
}

// TestRemoveImagePulled removes the last tag of a pulled image: its digest goes along, as in Docker.
func TestRemoveImagePulled(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	base := tarOf(t, map[string]string{"base": "b"})
	d := newPushed(t, base, tarOf(t, map[string]string{"a": "1"})).push(t, host, "p", "1")
	newPushed(t, base, tarOf(t, map[string]string{"a": "2"})).push(t, host, "p", "2")
	for _, tag := range []string{"1", "2"} {
		if _, _, err := e.Pull(bg, PullRequest{Reference: host + "/p:" + tag}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := e.RemoveImage(bg, host+"/p:1", RemoveImageRequest{})
	if err != nil || len(got) != 4 || got[0].Untagged != host+"/p:1" || got[1].Untagged != host+"/p@"+string(d.Digest) || got[2].Deleted == "" {
		t.Errorf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 2 {
		t.Errorf("the shared base must stay with the other image's layer: %v", l)
	}
}

func TestSweepSparesLeases(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "a")
	open, err := collect.NewLease(e.Root())
	if err != nil {
		t.Fatal(err)
	}
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	if got, err := e.RemoveImage(bg, "a", RemoveImageRequest{}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Untagged: "a:latest"}, {Deleted: id}}) {
		t.Fatalf("under an open lease: %v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 || !collect.Pending(e.Root()) {
		t.Fatalf("layers %v, pending %v", l, collect.Pending(e.Root()))
	}
	held, err := collect.Hold(e.Root(), layer)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.closeLease(bg, open); err != nil { // sweeps what was pending
		t.Fatal(err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 || collect.Pending(e.Root()) {
		t.Fatalf("held layer: %v, pending %v", l, collect.Pending(e.Root()))
	}
	wantEmpty(t, e, "blobs/sha256")
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	res, err := e.sweep(bg)
	if err != nil || !slices.Equal(res.Layers, []ocispec.Digest{layer}) || res.Bytes <= 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256", "leases", "trash")
}

// TestSweepSparesBuildCache removes an image whose layer a cached build step made: the step must go on hitting.
func TestSweepSparesBuildCache(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil)
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	dir := e.Root().Path("buildcache", "def", "ab")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(dir, "abcd")
	if err := disk.WriteJSON(record, build.Record{Key: "abcd", Kind: "run", Layer: layer}, disk.Volatile); err != nil {
		t.Fatal(err)
	}
	if got, err := e.RemoveImage(bg, id, RemoveImageRequest{}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Deleted: id}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Fatalf("layers %v", l)
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	if _, err := e.sweep(bg); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256")
}

func TestListImages(t *testing.T) {
	e := newImageEngine(t)
	one := imported(t, e, "1", []string{"LABEL tier=web keep=1"}, "web", "example.com/team/web:v1")
	two := imported(t, e, "22", []string{"LABEL tier=db"}, "db:14")
	three := imported(t, e, "333", nil)
	for name, c := range map[string]struct {
		req  ImagesRequest
		want []string
	}{
		"all":            {ImagesRequest{}, []string{three, two, one}},
		"dangling":       {ImagesRequest{Filters: map[string][]string{"dangling": {"true"}}}, []string{three}},
		"not dangling":   {ImagesRequest{Filters: map[string][]string{"dangling": {"false"}}}, []string{two, one}},
		"label":          {ImagesRequest{Filters: map[string][]string{"label": {"tier"}}}, []string{two, one}},
		"label value":    {ImagesRequest{Filters: map[string][]string{"label": {"tier=web", "keep"}}}, []string{one}},
		"no such label":  {ImagesRequest{Filters: map[string][]string{"label": {"tier=web", "other"}}}, nil},
		"before":         {ImagesRequest{Filters: map[string][]string{"before": {"db:14"}}}, []string{one}},
		"since":          {ImagesRequest{Filters: map[string][]string{"since": {one[7:19]}}}, []string{three, two}},
		"between":        {ImagesRequest{Filters: map[string][]string{"since": {"web"}, "before": {three}}}, []string{two}},
		"reference":      {ImagesRequest{Filters: map[string][]string{"reference": {"d*", "none"}}}, []string{two}},
		"reference path": {ImagesRequest{Filters: map[string][]string{"reference": {"example.com/*/web"}}}, []string{one}},
		"argument":       {ImagesRequest{Reference: "web"}, []string{one}},
		"full name":      {ImagesRequest{Reference: "docker.io/library/db"}, []string{two}},
		"wrong tag":      {ImagesRequest{Reference: "db:15"}, nil},
		"until":          {ImagesRequest{Filters: map[string][]string{"until": {"1h"}}}, nil},
		"until now":      {ImagesRequest{Filters: map[string][]string{"until": {time.Now().Add(time.Minute).Format(time.RFC3339)}}}, []string{three, two, one}},
	} {
		sums, err := e.ListImages(bg, c.req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, s := range sums {
			got = append(got, s.ID)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if name == "argument" && !slices.Equal(sums[0].RepoTags, []string{"web:latest"}) {
			t.Errorf("%s: names that were not asked for: %v", name, sums[0].RepoTags)
		}
	}
	for key, val := range map[string]string{"colour": "red", "dangling": "maybe", "before": "nope", "until": "never", "reference": "[a"} {
		if _, err := e.ListImages(bg, ImagesRequest{Filters: map[string][]string{key: {val}}}); !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s=%s was accepted", key, val)
		}
	}
}

func TestHistory(t *testing.T) {
	host := memoryRegistry(t)
	e := newImageEngine(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": "12345"}), tarOf(t, map[string]string{"b": "1"}), tarOf(t, map[string]string{"c": "123"}))
	p.config.History = p.config.History[:3] // layer, ENV, layer: the third layer has no line
	p.push(t, host, "h", "latest")
	img, _, err := e.Pull(bg, PullRequest{Reference: host + "/h"})
	if err != nil {
		t.Fatal(err)
	}
	items, err := e.History(bg, host+"/h")
	if err != nil || len(items) != 4 {
		t.Fatalf("%+v, %v", items, err)
	}
	var sizes []int64
	for _, it := range items {
		sizes = append(sizes, it.Size)
	}
	if !slices.Equal(sizes, []int64{3, 1, 0, 5}) || items[0].ID != string(img.ID) || items[1].ID != "<missing>" || items[3].CreatedBy != "layer 0" ||
		!slices.Equal(items[0].Tags, []string{host + "/h:latest"}) || items[3].Created != time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Unix() {
		t.Errorf("%+v", items)
	}
}

// TestRemoveImageInUse has containers on an image: stopped ones need force, a running one never lets go.
func TestRemoveImageInUse(t *testing.T) {
	e := newImageEngine(t)
	id := imported(t, e, "1", nil, "a", "b")
	layer := ocispec.FromBytes(tarOf(t, map[string]string{"file": "1"}))
	cs := e.Containers()
	rec := &container.Record{ID: disk.RandomID(), Name: "user", Created: time.Now(), ImageID: ocispec.Digest(id), Layers: []ocispec.Digest{layer},
		Config: &apic.Config{}, HostConfig: &apic.HostConfig{}}
	if err := cs.Create(rec, nil); err != nil {
		t.Fatal(err)
	}
	refuse := func(name string, force bool, want string) {
		t.Helper()
		got, err := e.RemoveImage(bg, name, RemoveImageRequest{Force: force})
		if !errors.Is(err, image.ErrInUse) || !errors.Is(err, ErrConflict) || err.Error() != want || got != nil {
			t.Errorf("%s, force %v: %v, %v", name, force, got, err)
		}
	}
	// One of two tags may go.
	if got, err := e.RemoveImage(bg, "b", RemoveImageRequest{}); err != nil || len(got) != 1 {
		t.Fatalf("%v, %v", got, err)
	}
	refuse("a", false, fmt.Sprintf("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", "a", rec.ID[:12], id[7:19]))
	refuse(id, false, fmt.Sprintf("conflict: unable to delete %s (must be forced) - image is being used by stopped container %s", id[7:19], rec.ID[:12]))
	// We are its monitor: we hold the lock as long as it runs.
	monitor, err := cs.Lock(rec.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Release()
	if err := cs.SetState(rec.ID, &container.State{Status: container.Running, BootID: disk.BootID()}); err != nil {
		t.Fatal(err)
	}
	refuse(id, true, fmt.Sprintf("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", id[7:19], rec.ID[:12]))
	// Its name may be forced away; the image stays, dangling.
	if got, err := e.RemoveImage(bg, "a", RemoveImageRequest{Force: true}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Untagged: "a:latest"}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if err := cs.ClearState(rec.ID); err != nil {
		t.Fatal(err)
	}
	monitor.Release()
	// Forced by id the image goes; the layer stays for the container.
	if got, err := e.RemoveImage(bg, id, RemoveImageRequest{Force: true}); err != nil || !slices.Equal(got, []apii.DeleteResponse{{Deleted: id}}) {
		t.Fatalf("%v, %v", got, err)
	}
	if l := entries(t, e, "layers"); len(l) != 1 {
		t.Fatalf("the container's layer: %v", l)
	}
	if _, err := cs.Remove(rec.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := e.sweep(bg); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, e, "layers", "blobs/sha256", "images/by-id")
}

// BenchmarkPull fetches an image of one 100 MB layer, gzip at the usual ratio, from a registry in this process.
func BenchmarkPull(b *testing.B) {
	words := make([]byte, 0, 100<<20)
	for rnd := rand.New(rand.NewPCG(1, 2)); len(words) < 100<<20; {
		words = append(words, fmt.Sprintf("%x some text like that of programs; ", rnd.Uint64())...)
	}
	raw := tarOf(b, map[string]string{"big": string(words)})
	s := httptest.NewServer(reg.New(reg.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	newPushed(b, raw).push(b, host, "big", "latest")
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		e, err := Open(&config.Config{Root: b.TempDir(), State: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := e.Pull(bg, PullRequest{Reference: host + "/big"}); err != nil {
			b.Fatal(err)
		}
	}
}
