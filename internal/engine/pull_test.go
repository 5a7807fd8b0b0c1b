package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
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

	"conex/internal/config"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"

	reg "github.com/google/go-containerregistry/pkg/registry"
)

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
	for deadline := time.Now().Add(time.Minute); ; {
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
		}, "unexpected end"},
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
