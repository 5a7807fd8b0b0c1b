package engine

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"

	reg "github.com/google/go-containerregistry/pkg/registry"
)

// recorder is a registry that tells what was uploaded to it.
type recorder struct {
	host string
	mu   sync.Mutex
	sent []string // POST and PUT requests, without the parts that are random
	off  bool     // answers 503 to everything
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	r := &recorder{}
	inner := reg.New(reg.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		off := r.off
		switch {
		case off:
		case req.Method == http.MethodPost && req.URL.Query().Get("mount") != "":
			r.sent = append(r.sent, "mount")
		case req.Method == http.MethodPut && strings.Contains(req.URL.Path, "/manifests/"):
			r.sent = append(r.sent, "manifest")
		case req.Method == http.MethodPut:
			r.sent = append(r.sent, "blob")
		}
		r.mu.Unlock()
		if off {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

// took returns how often each kind of request came since the last call.
func (r *recorder) took() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := map[string]int{}
	for _, s := range r.sent {
		n[s]++
	}
	r.sent = nil
	return n
}

func (r *recorder) wants(t *testing.T, what string, blobs, mounts, manifests int) {
	t.Helper()
	if n := r.took(); n["blob"] != blobs || n["mount"] != mounts || n["manifest"] != manifests {
		t.Errorf("%s sent %v, want %d blobs, %d mounts, %d manifests", what, n, blobs, mounts, manifests)
	}
}

// taggedImport makes an image of one layer under a tag.
func taggedImport(t *testing.T, e *Engine, tag, content string) image.Image {
	t.Helper()
	id, err := e.Import(bg, ImportRequest{Source: "-", Stdin: bytes.NewReader(tarOf(t, map[string]string{"f": content})), Reference: tag})
	if err != nil {
		t.Fatal(err)
	}
	img, err := imageStore(t, e).Resolve(id)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, e *Engine, req PushRequest) PushStatus {
	t.Helper()
	st, err := e.Push(bg, req)
	if err != nil || len(st) != 1 {
		t.Fatalf("push %s: %v, %v", req.Reference, st, err)
	}
	return st[0]
}

func pullInto(t *testing.T, name string) (*Engine, image.Image) {
	t.Helper()
	e := newImageEngine(t)
	img, _, err := e.Pull(bg, PullRequest{Reference: name})
	if err != nil {
		t.Fatal(err)
	}
	return e, img
}

func TestPushOfABuiltImage(t *testing.T) {
	r := newRecorder(t)
	e := newImageEngine(t)
	img := taggedImport(t, e, r.host+"/a/app", strings.Repeat("content ", 50_000))
	st := push(t, e, PushRequest{Reference: r.host + "/a/app"})
	r.wants(t, "first push", 2, 0, 1)
	_, got := pullInto(t, r.host+"/a/app")
	if got.ID != img.ID || got.Manifest != st.Digest {
		t.Fatalf("pulled %s by %s, pushed %s by %s", got.ID, got.Manifest, img.ID, st.Digest)
	}
	if again := push(t, e, PushRequest{Reference: r.host + "/a/app:latest"}); again.Digest != st.Digest {
		t.Errorf("the second push gives %s, the first %s", again.Digest, st.Digest)
	}
	r.wants(t, "second push", 0, 0, 1)
	// Another repository of the same registry: mounted.
	if err := e.Tag(bg, r.host+"/a/app", r.host+"/b/app:v1"); err != nil {
		t.Fatal(err)
	}
	if other := push(t, e, PushRequest{Reference: r.host + "/b/app:v1"}); other.Digest != st.Digest || other.Tag != "v1" {
		t.Errorf("%+v", other)
	}
	r.wants(t, "push to another repository", 0, 0, 1) // this registry has one store for all repositories
	// Another registry: the same bytes, though they were never kept.
	r2 := newRecorder(t)
	if err := e.Tag(bg, r.host+"/a/app", r2.host+"/app"); err != nil {
		t.Fatal(err)
	}
	if other := push(t, e, PushRequest{Reference: r2.host + "/app"}); other.Digest != st.Digest {
		t.Errorf("another registry gets %s, the first %s", other.Digest, st.Digest)
	}
	r2.wants(t, "push to another registry", 2, 0, 1)
	// As zstd it is another manifest of the same image.
	level := 5
	z := push(t, e, PushRequest{Reference: r2.host + "/app", Compression: "zstd", Level: &level})
	if z.Digest == st.Digest {
		t.Error("zstd gives the manifest of gzip")
	}
	if _, got := pullInto(t, r2.host+"/app"); got.ID != img.ID {
		t.Errorf("pulled %s", got.ID)
	}
	wantEmpty(t, e, "staging", "trash", "leases", "downloads")
}

// TestPushOfAPulledImage takes away what a push would send, bit by bit: first the blobs here, then the registry they came from.
func TestPushOfAPulledImage(t *testing.T) {
	from, to := newRecorder(t), newRecorder(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": "1"}), tarOf(t, map[string]string{"b": strings.Repeat("2", 100_000)}), tarOf(t, map[string]string{"c": "3"}))
	desc := p.push(t, from.host, "app", "latest")
	e, _ := pullInto(t, from.host+"/app")
	tag := func(name string) string {
		t.Helper()
		if err := e.Tag(bg, from.host+"/app", to.host+"/"+name); err != nil {
			t.Fatal(err)
		}
		return to.host + "/" + name
	}
	if st := push(t, e, PushRequest{Reference: tag("kept")}); st.Digest != desc.Digest {
		t.Errorf("pushed as %s, pulled as %s", st.Digest, desc.Digest)
	}
	to.wants(t, "push with blobs", 4, 0, 1)
	for _, l := range p.manifest.Layers {
		if err := e.Blobs().Remove(l.Digest); err != nil {
			t.Fatal(err)
		}
	}
	third := newRecorder(t)
	if err := e.Tag(bg, from.host+"/app", third.host+"/app"); err != nil {
		t.Fatal(err)
	}
	var events []Event
	if st := push(t, e, PushRequest{Reference: third.host + "/app", Progress: func(ev Event) { events = append(events, ev) }}); st.Digest != desc.Digest {
		t.Errorf("pushed as %s, pulled as %s", st.Digest, desc.Digest)
	}
	if !slices.ContainsFunc(events, func(ev Event) bool { return strings.HasPrefix(ev.Action, "Copying from ") }) {
		t.Errorf("nothing was copied from another registry: %v", actions(events))
	}
	// Nobody has the bytes any more.
	for _, r := range []*recorder{from, to, third} {
		r.mu.Lock()
		r.off = true
		r.mu.Unlock()
	}
	last := newRecorder(t)
	if err := e.Tag(bg, from.host+"/app", last.host+"/app"); err != nil {
		t.Fatal(err)
	}
	events = nil
	st := push(t, e, PushRequest{Reference: last.host + "/app", Progress: func(ev Event) { events = append(events, ev) }})
	changed := slices.ContainsFunc(events, func(ev Event) bool {
		return strings.Contains(ev.Message, "digest changes from "+string(desc.Digest)+" to "+string(st.Digest))
	})
	if st.Digest == desc.Digest || !changed {
		t.Errorf("compressed anew: %s, %v", st.Digest, events)
	}
	if _, got := pullInto(t, last.host+"/app"); got.ID != p.manifest.Config.Digest {
		t.Errorf("pulled %s", got.ID)
	}
}

// TestPushOfADamagedBlob has a compressed layer that a power loss cut short, and one with a wrong byte.
func TestPushOfADamagedBlob(t *testing.T) {
	from, to := newRecorder(t), newRecorder(t)
	p := newPushed(t, tarOf(t, map[string]string{"a": strings.Repeat("1", 10_000)}), tarOf(t, map[string]string{"b": strings.Repeat("2", 10_000)}))
	desc := p.push(t, from.host, "app", "latest")
	e, _ := pullInto(t, from.host+"/app")
	for i, l := range p.manifest.Layers {
		path := e.root.Path("blobs", "sha256", l.Digest.Encoded())
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if b[len(b)-1] ^= 1; i == 0 {
			b = b[:len(b)/2]
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Tag(bg, from.host+"/app", to.host+"/app"); err != nil {
		t.Fatal(err)
	}
	if st := push(t, e, PushRequest{Reference: to.host + "/app"}); st.Digest != desc.Digest {
		t.Errorf("pushed as %s, pulled as %s", st.Digest, desc.Digest)
	}
}

func TestPushRefuses(t *testing.T) {
	r := newRecorder(t)
	e := newImageEngine(t)
	taggedImport(t, e, r.host+"/app", "x")
	bad := 99
	for _, c := range []struct {
		req  PushRequest
		want string
	}{
		{PushRequest{Reference: r.host + "/none"}, "An image does not exist locally with the tag: " + r.host + "/none"},
		{PushRequest{Reference: r.host + "/none", AllTags: true}, "An image does not exist locally with the tag: " + r.host + "/none"},
		{PushRequest{Reference: r.host + "/app:v2"}, "An image does not exist locally with the tag: " + r.host + "/app"},
		{PushRequest{Reference: r.host + "/app:latest", AllTags: true}, "tag can't be used with --all-tags/-a"},
		{PushRequest{Reference: r.host + "/app@" + string(ocispec.FromBytes(nil))}, "cannot push a digest reference"},
		{PushRequest{Reference: "A"}, "must be lowercase"},
		{PushRequest{Reference: r.host + "/app", Compression: "lzma"}, "gzip or zstd"},
		{PushRequest{Reference: r.host + "/app", Level: &bad}, "level"},
		{PushRequest{Reference: r.host + "/app", Platform: "a/b/c/d"}, "invalid platform"},
		{PushRequest{Reference: r.host + "/app", Platform: "linux/s390x"}, "for platform linux/s390x"},
	} {
		st, err := e.Push(bg, c.req)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || len(st) != 0 {
			t.Errorf("%+v: %v, %v; want %q", c.req, st, err, c.want)
		}
	}
	r.wants(t, "nothing", 0, 0, 0)
}

func TestAllTags(t *testing.T) {
	r := newRecorder(t)
	e := newImageEngine(t)
	taggedImport(t, e, r.host+"/app:v1", "1")
	taggedImport(t, e, r.host+"/app:v2", "2")
	taggedImport(t, e, r.host+"/other:v3", "3")
	st, err := e.Push(bg, PushRequest{Reference: r.host + "/app", AllTags: true})
	if err != nil || len(st) != 2 || st[0].Tag != "v1" || st[1].Tag != "v2" {
		t.Fatalf("%+v, %v", st, err)
	}
	f := newImageEngine(t)
	if err := f.PullAll(bg, PullRequest{Reference: r.host + "/app"}); err != nil {
		t.Fatal(err)
	}
	refs, err := imageStore(t, f).References()
	if err != nil || len(refs) != 2 {
		t.Fatalf("%v, %v", refs, err)
	}
	if err := f.PullAll(bg, PullRequest{Reference: r.host + "/app:v1"}); err == nil || !strings.Contains(err.Error(), "--all-tags") {
		t.Errorf("got %v", err)
	}
	if err := f.PullAll(bg, PullRequest{Reference: r.host + "/none"}); err == nil {
		t.Error("a repository that is not there was pulled")
	}
}

// TestPushOfAnIndex pulls two platforms of an index of two, and pushes them as they came; of one alone the image goes without the index.
func TestPushOfAnIndex(t *testing.T) {
	from, to := newRecorder(t), newRecorder(t)
	index := pushIndex(t, from.host, "app", registry.HostPlatform().Architecture, "s390x")
	e, img := pullInto(t, from.host+"/app")
	if err := e.Tag(bg, from.host+"/app", to.host+"/one"); err != nil {
		t.Fatal(err)
	}
	if st := push(t, e, PushRequest{Reference: to.host + "/one"}); st.Digest != img.Manifest {
		t.Errorf("one platform: %s, want %s", st.Digest, img.Manifest)
	}
	if _, _, err := e.Pull(bg, PullRequest{Reference: from.host + "/app", Platform: "linux/s390x"}); err != nil {
		t.Fatal(err)
	}
	if now, err := imageStore(t, e).Resolve(from.host + "/app"); err != nil || now.ID != img.ID {
		t.Fatalf("a foreign platform took the tag: %v, %v", now.ID, err)
	}
	if err := e.Tag(bg, from.host+"/app", to.host+"/both"); err != nil {
		t.Fatal(err)
	}
	if st := push(t, e, PushRequest{Reference: to.host + "/both"}); st.Digest != index {
		t.Errorf("the index went as %s, it came as %s", st.Digest, index)
	}
	if st := push(t, e, PushRequest{Reference: to.host + "/both", Platform: "s390x"}); st.Digest == index || st.Digest == img.Manifest {
		t.Errorf("the other platform went as %s", st.Digest)
	}
	f := newImageEngine(t)
	got, _, err := f.Pull(bg, PullRequest{Reference: to.host + "/both"})
	if err != nil || got.Config.Architecture != "s390x" {
		t.Fatalf("%+v, %v", got.Config.Platform, err)
	}
}
