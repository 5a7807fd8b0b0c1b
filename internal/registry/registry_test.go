package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/ocispec"

	reg "github.com/google/go-containerregistry/pkg/registry"
)

// client is a Client that waits for nothing.
func client(cfg map[string]config.Registry) *Client {
	c := New(Options{Registry: cfg})
	c.backoff = func(int) time.Duration { return 0 }
	return c
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func put(t *testing.T, host, path, kind, name, mediaType string, body []byte) {
	t.Helper()
	target, method := "http://"+host+"/v2/"+path+"/"+kind+"/"+name, http.MethodPut
	if kind == "blobs" {
		target, method = "http://"+host+"/v2/"+path+"/blobs/uploads/?digest="+name, http.MethodPost
	}
	req, err := http.NewRequest(method, target, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("put %s: %s", target, resp.Status)
	}
}

func memory() http.Handler { return reg.New(reg.Logger(log.New(io.Discard, "", 0))) }

func random(n int) ([]byte, ocispec.Descriptor) {
	b := make([]byte, n)
	rand.Read(b)
	return b, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: ocispec.FromBytes(b), Size: int64(n)}
}

// fill puts a manifest with one blob of n random bytes under path:tag.
func fill(t *testing.T, host, path, tag string, n int) (manifest, blob []byte, desc ocispec.Descriptor) {
	t.Helper()
	blob, desc = random(n)
	conf := []byte("{}")
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: ocispec.FromBytes(conf), Size: 2}, Layers: []ocispec.Descriptor{desc}}
	m.SchemaVersion = 2
	manifest, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	put(t, host, path, "blobs", string(desc.Digest), "application/octet-stream", blob)
	put(t, host, path, "blobs", string(m.Config.Digest), "application/octet-stream", conf)
	put(t, host, path, "manifests", tag, m.MediaType, manifest)
	return manifest, blob, desc
}

func TestResolveAndBlob(t *testing.T) {
	host := serve(t, memory())
	manifest, blob, desc := fill(t, host, "team/app", "v1", 100_000)
	c := client(nil)
	for _, name := range []string{"v1", string(ocispec.FromBytes(manifest))} {
		d, raw, ep, err := c.Resolve(context.Background(), host, "team/app", name)
		if err != nil || !bytes.Equal(raw, manifest) || d.Digest != ocispec.FromBytes(manifest) || d.MediaType != ocispec.MediaTypeImageManifest {
			t.Fatalf("%s: %+v, %v", name, d, err)
		}
		if m, err := DecodeManifest(raw); err != nil || m.Layers[0].Digest != desc.Digest {
			t.Fatalf("%+v, %v", m, err)
		}
		rc, err := c.Blob(context.Background(), ep, "team/app", desc)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(rc)
		if err != nil || !bytes.Equal(got, blob) {
			t.Fatalf("blob: %d bytes, %v", len(got), err)
		}
		if err := rc.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMirrors(t *testing.T) {
	full, empty := serve(t, memory()), serve(t, memory())
	fill(t, full, "library/nginx", "latest", 10)
	fill(t, full, "hub/library/nginx", "only-prefixed", 10)
	dead := deadAddr(t)
	cfg := func(m ...string) map[string]config.Registry {
		// The registry itself is a dead port, so that nothing here depends on what docker.io would say.
		return map[string]config.Registry{"docker.test": {Mirrors: m, PlainHTTP: true}}
	}
	c := client(cfg("http://"+dead, "http://"+empty, "http://"+full))
	_, _, ep, err := c.Resolve(context.Background(), "docker.test", "library/nginx", "latest")
	if err != nil || ep.Host != full || !ep.Mirror {
		t.Fatalf("%+v, %v", ep, err)
	}
	c = client(cfg("http://" + full + "/hub/"))
	if _, _, ep, err = c.Resolve(context.Background(), "docker.test", "library/nginx", "only-prefixed"); err != nil || ep.String() != "http://"+full+"/hub" {
		t.Fatalf("prefix: %+v, %v", ep, err)
	}
	// All fail: one line that names each place and what it said; the registry's word decides what the error is.
	c = client(map[string]config.Registry{empty: {Mirrors: []string{"http://" + dead}, PlainHTTP: true}})
	_, _, _, err = c.Resolve(context.Background(), empty, "library/nginx", "latest")
	if !errors.Is(err, ErrNameUnknown) {
		t.Errorf("not ErrNameUnknown: %v", err)
	}
	for _, want := range []string{"mirror http://" + dead + ": ", "connection refused; registry http://" + empty + ": name unknown"} {
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v\nlacks %q", err, want)
		}
	}
	if c := Cause(err); !errors.Is(c, ErrNameUnknown) || !strings.HasPrefix(c.Error(), "name unknown") || !strings.Contains(c.Error(), "(mirror http://"+dead+": ") {
		t.Errorf("cause: %v", c)
	}
	fill(t, empty, "library/nginx", "other", 10)
	if _, _, _, err = client(nil).Resolve(context.Background(), empty, "library/nginx", "latest"); !errors.Is(err, ErrManifestUnknown) {
		t.Errorf("not ErrManifestUnknown: %v", err)
	}
	_, _, _, err = client(nil).Resolve(context.Background(), dead, "a", "b")
	if err == nil || strings.Count(err.Error(), "refused") != 1 || !strings.Contains(err.Error(), dead) {
		t.Errorf("dead registry: %v", err)
	}
}

// deadAddr returns an address that refuses connections.
func deadAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestEndpoints(t *testing.T) {
	for domain, want := range map[string]string{
		"docker.io": "[https://registry-1.docker.io]", "ghcr.io": "[https://ghcr.io]",
		"localhost:5000": "[https://localhost:5000 http://localhost:5000]", "127.0.0.1": "[https://127.0.0.1 http://127.0.0.1]",
		"[::1]:5000": "[https://[::1]:5000 http://[::1]:5000]", "localhost.evil.com": "[https://localhost.evil.com]", "10.0.0.1:5000": "[https://10.0.0.1:5000]",
	} {
		eps, err := New(Options{}).endpoints(domain)
		if got := fmt.Sprint(eps); got != want || err != nil {
			t.Errorf("%s: %s, want %s, %v", domain, got, want, err)
		}
	}
}

func TestTLSOnLoopback(t *testing.T) {
	s := httptest.NewTLSServer(memory())
	t.Cleanup(s.Close)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	c := client(nil)
	c.http.Transport = s.Client().Transport
	host := strings.TrimPrefix(s.URL, "https://")
	if _, _, _, err := c.Resolve(context.Background(), host, "a", "b"); !errors.Is(err, ErrManifestUnknown) && !errors.Is(err, ErrNameUnknown) {
		t.Fatal(err)
	}
}

// lie answers manifests and blobs with handlers of the test's own.
func lie(t *testing.T, manifest, blob http.HandlerFunc) string {
	return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/manifests/") && manifest != nil:
			manifest(w, r)
		case strings.Contains(r.URL.Path, "/blobs/") && blob != nil:
			blob(w, r)
		default:
			http.NotFound(w, r)
		}
	}))
}

func TestLyingManifests(t *testing.T) {
	good := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
	asked := ocispec.FromBytes([]byte("something else"))
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		name string
		want error
	}{
		"other digest than asked": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, good) }, string(asked), ErrMismatch},
		"other digest than announced": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Docker-Content-Digest", string(asked))
			io.WriteString(w, good)
		}, "x", ErrMismatch},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		}, "x", ErrMismatch},
		"html":     {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }, "x", ErrMismatch},
		"schema 1": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"schemaVersion":1}`) }, "x", ErrUnsupported},
		"ambiguous": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"schemaVersion":2,"mediaType":"`+ocispec.MediaTypeImageIndex+`","manifests":[],"config":{}}`)
		}, "x", ErrMismatch},
		"unknown type": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"schemaVersion":2,"mediaType":"a/b"}`)
		}, "x", ErrUnsupported},
		"control characters in the message": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(403)
			io.WriteString(w, `{"errors":[{"code":"DENIED","message":"no\u001b[2J\nway"}]}`)
		}, "x", ErrDenied},
	} {
		host := lie(t, c.h, nil)
		_, _, _, err := client(nil).Resolve(context.Background(), host, "p", c.name)
		if !errors.Is(err, c.want) || strings.ContainsAny(err.Error(), "\n\x1b") || !strings.Contains(err.Error(), host) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLyingBlobs(t *testing.T) {
	content, desc := random(10_000)
	flipped := bytes.Clone(content)
	flipped[9_999] ^= 1
	for name, h := range map[string]http.HandlerFunc{
		"other bytes":     func(w http.ResponseWriter, _ *http.Request) { w.Write(flipped) },
		"shorter":         func(w http.ResponseWriter, _ *http.Request) { w.Write(content[:5000]) },
		"longer":          func(w http.ResponseWriter, _ *http.Request) { w.Write(append(bytes.Clone(content), 1)) },
		"shorter chunked": func(w http.ResponseWriter, _ *http.Request) { w.Write(content[:5000]); w.(http.Flusher).Flush() },
		"endless chunked": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(content); err != nil {
					return
				}
			}
		},
		"range of something else": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(206)
				w.Write(flipped[5000:])
				return
			}
			w.Header().Set("Content-Length", "10000")
			w.Write(content[:5000])
		},
	} {
		host := lie(t, nil, h)
		c := client(nil)
		rc, err := c.Blob(context.Background(), Endpoint{Scheme: "http", Host: host}, "p", desc)
		if err == nil {
			var n int64
			n, err = io.Copy(io.Discard, rc)
			if n > desc.Size {
				t.Errorf("%s: %d bytes came through", name, n)
			}
			rc.Close()
		}
		if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), host) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := client(nil).Blob(context.Background(), Endpoint{Scheme: "http", Host: "127.0.0.1:1"}, "p", ocispec.Descriptor{Digest: "sha256:../../x"})
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("hostile digest: %v", err)
	}
}

// TestDrops breaks the connection again and again; the reader goes on where it was, with and without the server's ranges.
func TestDrops(t *testing.T) {
	content, desc := random(1 << 20)
	for _, ranges := range []bool{true, false} {
		var asked atomic.Int32
		host := lie(t, nil, func(w http.ResponseWriter, r *http.Request) {
			n := asked.Add(1)
			rest, status := content, 200
			if from, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok && ranges {
				off, err := strconv.Atoi(strings.TrimSuffix(from, fmt.Sprintf("-%d", len(content)-1)))
				if err != nil || off <= 0 || off >= len(content) {
					t.Errorf("range %q", from)
				}
				rest, status = content[off:], 206
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(rest)))
			w.WriteHeader(status)
			part := 300_000
			if !ranges {
				part *= int(n)
			}
			w.Write(rest[:min(len(rest), part)]) // and no more: the server cuts the connection, since the length is wrong
		})
		rc, err := client(nil).Blob(context.Background(), Endpoint{Scheme: "http", Host: host}, "p", desc)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(rc)
		if err != nil || !bytes.Equal(got, content) || asked.Load() != 4 {
			t.Errorf("ranges %v: %d bytes, %d requests, %v", ranges, len(got), asked.Load(), err)
		}
		rc.Close()
	}
}

func TestStalled(t *testing.T) {
	content, desc := random(1000)
	var asked atomic.Int32
	host := lie(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) > 1 {
			w.Write(content)
			return
		}
		w.Header().Set("Content-Length", "1000")
		w.Write(content[:500])
		w.(http.Flusher).Flush()
		<-r.Context().Done() // silent until the client goes away
	})
	c := client(nil)
	c.stall = 50 * time.Millisecond
	rc, err := c.Blob(context.Background(), Endpoint{Scheme: "http", Host: host}, "p", desc)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestRetries(t *testing.T) {
	for _, status := range []int{429, 500, 503} {
		var asked atomic.Int32
		good := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
		host := lie(t, func(w http.ResponseWriter, _ *http.Request) {
			if asked.Add(1) < 3 {
				w.WriteHeader(status)
				return
			}
			io.WriteString(w, good)
		}, nil)
		if _, _, _, err := client(nil).Resolve(context.Background(), host, "p", "x"); err != nil || asked.Load() < 3 {
			t.Errorf("%d: %d requests, %v", status, asked.Load(), err)
		}
	}
	var asked atomic.Int32
	host := lie(t, func(w http.ResponseWriter, _ *http.Request) { asked.Add(1); w.WriteHeader(500) }, nil)
	_, _, _, err := client(map[string]config.Registry{host: {PlainHTTP: true}}).Resolve(context.Background(), host, "p", "x")
	if err == nil || !strings.Contains(err.Error(), "500") || asked.Load() != attempts {
		t.Errorf("always 500: %d requests, %v", asked.Load(), err)
	}
}

func TestBearer(t *testing.T) {
	good := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
	var tokens atomic.Int32
	var host string
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			if q := r.URL.Query(); q.Get("service") != `a "b", c` || q.Get("scope") != "repository:team/app:pull" {
				t.Errorf("token query %v", q)
			}
			tokens.Add(1)
			io.WriteString(w, `{"token":"T","expires_in":300}`)
		case r.Header.Get("Authorization") != "Bearer T":
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="a \"b\", c",scope="repository:team/app:pull"`)
			w.WriteHeader(401)
		default:
			io.WriteString(w, good)
		}
	}))
	c := client(nil)
	for range 2 {
		if _, _, _, err := c.Resolve(context.Background(), host, "team/app", "x"); err != nil {
			t.Fatal(err)
		}
	}
	if tokens.Load() != 1 {
		t.Errorf("%d tokens fetched", tokens.Load())
	}
	for name, challenge := range map[string]string{"basic": `Basic realm="x"`, "none": "", "token refused": `Bearer realm="http://` + host + `/nope"`} {
		h := lie(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(401)
		}, nil)
		if name == "token refused" {
			challenge = `Bearer realm="http://` + h + `/v2/x/manifests/token"`
		}
		if _, _, _, err := client(nil).Resolve(context.Background(), h, "p", "x"); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSelect(t *testing.T) {
	d := func(os, arch, variant string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: ocispec.FromBytes([]byte(os + arch + variant)),
			Platform: &ocispec.Platform{OS: os, Architecture: arch, Variant: variant}}
	}
	raw, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
		d("unknown", "unknown", ""), d("linux", "amd64", "v3"), d("linux", "amd64", ""), d("linux", "arm", "v6"), d("linux", "arm", "v7"),
		d("linux", "arm64", "v8"), d("windows", "amd64", ""),
	}})
	if err != nil {
		t.Fatal(err)
	}
	for want, got := range map[string]ocispec.Descriptor{
		"linux/amd64": d("linux", "amd64", ""), "linux/x86_64": d("linux", "amd64", ""), "linux/amd64/v4": d("linux", "amd64", "v3"),
		"arm64": d("linux", "arm64", "v8"), "linux/arm/v6": d("linux", "arm", "v6"), "linux/arm": d("linux", "arm", "v7"), "linux/arm/v8": d("linux", "arm", "v7"),
	} {
		p, err := ParsePlatform(want)
		if err != nil {
			t.Fatal(err)
		}
		if sel, err := Select(raw, p); err != nil || sel.Digest != got.Digest {
			t.Errorf("%s: %+v, %v", want, sel.Platform, err)
		}
	}
	for want, msg := range map[string]string{
		"linux/arm/v5":  "no matching manifest for linux/arm/v5 in the manifest list entries",
		"linux/riscv64": "no matching manifest for linux/riscv64 in the manifest list entries",
	} {
		p, err := ParsePlatform(want)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Select(raw, p); !errors.Is(err, ErrNoPlatform) || err.Error() != msg {
			t.Errorf("%s: %v", want, err)
		}
	}
	for _, bad := range []string{"linux/", "a/b/c/d", "nonsense", "linux/am d64", "/"} {
		if p, err := ParsePlatform(bad); err == nil {
			t.Errorf("%q accepted as %+v", bad, p)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add("application/json", []byte(`{"schemaVersion":2,"config":{"digest":"sha256:x"},"layers":[{}]}`))
	f.Add(`x; y="`, []byte(`{"manifests":[{"platform":{"os":"linux","architecture":"amd64"}}]}`))
	f.Fuzz(func(t *testing.T, header string, raw []byte) {
		mt, err := mediaType(header, raw)
		if err == nil && mt == "" {
			t.Fatal("no type and no error")
		}
		if d, err := Select(raw, HostPlatform()); err == nil && checkDescriptor(d) != nil {
			t.Fatalf("selected %+v", d)
		}
		if m, err := DecodeManifest(raw); err == nil && checkDescriptor(m.Config) != nil {
			t.Fatalf("decoded %+v", m)
		}
		parseChallenge(header)
	})
}
