package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/ocispec"
)

// dockerRegistry starts Debian's docker-registry with more lines for its configuration, and returns its address.
func dockerRegistry(t *testing.T, scheme, more string) string {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (Debian package of that name)")
	}
	dir := t.TempDir()
	addr := deadAddr(t)
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage:\n  delete: {enabled: true}\n  filesystem: {rootdirectory: %s/data}\nhttp:\n  addr: %s\n%s", dir, addr, more)
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "serve", file)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("docker-registry said:\n%s", out.Bytes())
		}
	})
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return addr
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("%s registry at %s does not come up:\n%s", scheme, addr, out.Bytes())
	return ""
}

func knownBlob(content []byte) Upload {
	return Upload{Digest: ocispec.FromBytes(content), Size: int64(len(content)),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }}
}

// streamed is an upload of which nothing is known before.
func streamed(content []byte) Upload {
	var h hash.Hash
	return Upload{Size: -1,
		Open: func() (io.ReadCloser, error) {
			h = sha256.New()
			return io.NopCloser(io.TeeReader(struct{ io.Reader }{bytes.NewReader(content)}, h)), nil
		},
		Sum: func() ocispec.Digest { return ocispec.Digest(fmt.Sprintf("sha256:%x", h.Sum(nil))) },
	}
}

func TestPush(t *testing.T) {
	for name, start := range map[string]func(*testing.T) string{
		"memory":          func(t *testing.T) string { return serve(t, memory()) },
		"docker-registry": func(t *testing.T) string { return dockerRegistry(t, "http", "") },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, c, host := context.Background(), client(nil), start(t)
			ep, err := c.PushEndpoint(ctx, host, "team/app")
			if err != nil || ep.String() != "http://"+host {
				t.Fatalf("%s, %v", ep, err)
			}
			a, descA := random(3 << 20)
			b, descB := random(100_000)
			empty, descEmpty := random(0)
			conf := []byte(`{"architecture":"amd64","os":"linux"}`)
			if _, ok, err := c.HasBlob(ctx, ep, "team/app", descA.Digest); ok || err != nil {
				t.Fatalf("before: %v, %v", ok, err)
			}
			for _, up := range []Upload{knownBlob(a), streamed(b), knownBlob(conf), knownBlob(empty)} {
				if err := c.PutBlob(ctx, ep, "team/app", up); err != nil {
					t.Fatal(err)
				}
			}
			for _, d := range []ocispec.Descriptor{descA, descB, descEmpty} {
				if n, ok, err := c.HasBlob(ctx, ep, "team/app", d.Digest); !ok || n != d.Size || err != nil {
					t.Fatalf("after: %d, %v, %v", n, ok, err)
				}
			}
			m := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
				ocispec.MediaTypeDockerManifest, ocispec.MediaTypeDockerConfig, ocispec.FromBytes(conf), len(conf), ocispec.MediaTypeDockerLayerGzip, descA.Digest, descA.Size)
			for _, tag := range []string{"v1", "v2", string(ocispec.FromBytes(m))} {
				if d, err := c.PutManifest(ctx, ep, "team/app", tag, ocispec.MediaTypeDockerManifest, m); err != nil || d != ocispec.FromBytes(m) {
					t.Fatalf("%s: %s, %v", tag, d, err)
				}
			}
			if _, err := c.PutManifest(ctx, ep, "team/app", string(descA.Digest), ocispec.MediaTypeDockerManifest, m); !errors.Is(err, ErrMismatch) {
				t.Fatalf("under another's digest: %v", err)
			}
			desc, _, err := c.HeadManifest(ctx, host, "team/app", "v1")
			if err != nil || desc.Digest != ocispec.FromBytes(m) || desc.Size != int64(len(m)) || desc.MediaType != ocispec.MediaTypeDockerManifest {
				t.Fatalf("head: %+v, %v", desc, err)
			}
			if _, _, err := c.HeadManifest(ctx, host, "team/app", "nope"); !errors.Is(err, ErrManifestUnknown) {
				t.Fatalf("head of nothing: %v", err)
			}
			tags, err := c.Tags(ctx, host, "team/app")
			if err != nil || strings.Join(tags, " ") != "v1 v2" && name == "docker-registry" {
				t.Fatalf("%v, %v", tags, err)
			}
			if _, err := c.Tags(ctx, host, "no/such"); !errors.Is(err, ErrNameUnknown) {
				t.Fatalf("tags of nothing: %v", err)
			}
			mounted, err := c.MountBlob(ctx, ep, "team/other", descA.Digest, "team/app")
			if err != nil || !mounted && name == "docker-registry" {
				t.Fatalf("mount: %v, %v", mounted, err)
			}
			if mounted {
				if n, ok, err := c.HasBlob(ctx, ep, "team/other", descA.Digest); !ok || n != descA.Size || err != nil {
					t.Fatalf("mounted: %d, %v, %v", n, ok, err)
				}
			}
			_, absent := random(10)
			if mounted, err := c.MountBlob(ctx, ep, "team/other", absent.Digest, "team/app"); err != nil || mounted && name == "docker-registry" {
				t.Fatalf("mount of nothing: %v, %v", mounted, err)
			}
			lied := knownBlob(a)
			lied.Digest = absent.Digest
			if err := c.PutBlob(ctx, ep, "team/app", lied); err == nil || strings.Contains(err.Error(), "\n") {
				t.Fatalf("wrong digest: %v", err)
			}
			var names []string
			if err := c.Catalog(ctx, host, func(n string) bool { names = append(names, n); return true }); err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(names, " "); got != "team/app team/other" && name == "docker-registry" || !strings.Contains(got, "team/app") {
				t.Fatalf("catalog: %s", got)
			}
		})
	}
}

// TestUploadSource holds that a failure of our own disk is told as what it is, and not repeated.
func TestUploadSource(t *testing.T) {
	host := serve(t, memory())
	c := client(nil)
	ep := Endpoint{Domain: host, Scheme: "http", Host: host}
	broken := errors.New("the disk is broken")
	for name, up := range map[string]Upload{
		"open": {Digest: ocispec.FromBytes(nil), Size: 10, Open: func() (io.ReadCloser, error) { return nil, broken }},
		"read": {Digest: ocispec.FromBytes(nil), Size: 1 << 20, Open: func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(strings.NewReader("begin"), errReader{broken})), nil
		}},
		"read stream": {Size: -1, Open: func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(strings.NewReader("begin"), errReader{broken})), nil
		}},
	} {
		if err := c.PutBlob(context.Background(), ep, "a", up); !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	short := knownBlob([]byte("short"))
	short.Size = 10
	if err := c.PutBlob(context.Background(), ep, "a", short); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short: %v", err)
	}
	long := knownBlob([]byte("much too long"))
	long.Size = 3
	if err := c.PutBlob(context.Background(), ep, "a", long); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("long: %v", err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// uploads is a registry that takes uploads as the functions say; deleted counts the cancelled ones.
func uploads(t *testing.T, start, body http.HandlerFunc) (host string, deleted *atomic.Int32) {
	deleted = new(atomic.Int32)
	return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost:
			start(w, r)
		case http.MethodPut, http.MethodPatch:
			body(w, r)
		case http.MethodDelete:
			deleted.Add(1)
			w.WriteHeader(http.StatusNoContent)
		default:
			http.NotFound(w, r)
		}
	})), deleted
}

func TestUploadLocations(t *testing.T) {
	content, _ := random(1000)
	for _, loc := range []string{"/x/upload?state=a%2Fb&y", "upload", "http://HOST/elsewhere?z=1", "//HOST/y"} {
		var host string
		var put string
		host, _ = uploads(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", strings.ReplaceAll(loc, "HOST", host))
			w.WriteHeader(http.StatusAccepted)
		}, func(w http.ResponseWriter, r *http.Request) {
			put = r.URL.RequestURI()
			got, err := io.ReadAll(r.Body)
			if err != nil || !bytes.Equal(got, content) || r.URL.Query().Get("digest") != string(ocispec.FromBytes(content)) {
				t.Errorf("%s: %d bytes to %s, %v", loc, len(got), r.URL, err)
			}
			w.WriteHeader(http.StatusCreated)
		})
		if err := client(nil).PutBlob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", knownBlob(content)); err != nil {
			t.Errorf("%s: %v", loc, err)
		}
		if strings.Contains(loc, "?") && !strings.Contains(put, "&digest=") {
			t.Errorf("%s: put to %s", loc, put)
		}
	}
	for _, loc := range []string{"", "ftp://h/x", "http://[", ":"} {
		host, _ := uploads(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", loc)
			w.WriteHeader(http.StatusAccepted)
		}, nil)
		if err := client(nil).PutBlob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", knownBlob(content)); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", loc, err)
		}
	}
	for from, want := range map[[2]string]string{
		{"https://a/v2/", "http://a/x"}: "https://a/x", {"https://a/v2/", "http://b/x"}: "", {"https://a/v2/", "https://b/x"}: "https://b/x",
		{"http://a/", "file:///etc/passwd"}: "", {"http://a:1/b/c", "d?e"}: "http://a:1/b/d?e", {"https://a/", "https://u:p@b/x#f"}: "https://b/x",
	} {
		if got, err := follow(from[0], from[1]); got != want || (err == nil) != (want != "") {
			t.Errorf("%v: %q, %v", from, got, err)
		}
	}
}

// TestUploadRetries breaks uploads in every way that another attempt can mend, then in one that none can.
func TestUploadRetries(t *testing.T) {
	content, _ := random(1 << 20)
	accepted := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "/v2/a/blobs/uploads/1")
		w.WriteHeader(http.StatusAccepted)
	}
	quit := make(chan struct{})
	defer close(quit)
	for _, stream := range []bool{false, true} {
		for name, fail := range map[string]http.HandlerFunc{
			"500": func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); w.WriteHeader(500) },
			"429": func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); w.WriteHeader(429) },
			"drop": func(w http.ResponseWriter, r *http.Request) {
				io.CopyN(io.Discard, r.Body, 300_000)
				panic(http.ErrAbortHandler)
			},
			"forgotten": func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				w.WriteHeader(404)
				io.WriteString(w, `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}`)
			},
			"silence": func(w http.ResponseWriter, r *http.Request) { <-quit },
		} {
			var tries atomic.Int32
			var got []byte
			host, deleted := uploads(t, accepted, func(w http.ResponseWriter, r *http.Request) {
				last := r.Method == http.MethodPut
				if !stream || !last {
					if tries.Add(1) < 3 {
						fail(w, r)
						return
					}
					got, _ = io.ReadAll(r.Body)
				}
				w.WriteHeader(map[bool]int{true: http.StatusCreated, false: http.StatusAccepted}[last])
			})
			c := client(nil)
			c.stall = 200 * time.Millisecond
			c.transports.base.ResponseHeaderTimeout = 200 * time.Millisecond
			up := knownBlob(content)
			if stream {
				up = streamed(content)
			}
			err := c.PutBlob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", up)
			if err != nil || !bytes.Equal(got, content) || deleted.Load() != 2 {
				t.Errorf("%s, stream %v: %d bytes, %d cancelled, %v", name, stream, len(got), deleted.Load(), err)
			}
		}
	}
	var tries atomic.Int32
	host, deleted := uploads(t, accepted, func(w http.ResponseWriter, r *http.Request) {
		tries.Add(1)
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(403)
	})
	err := client(nil).PutBlob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", knownBlob(content))
	if !errors.Is(err, ErrDenied) || tries.Load() != 1 || deleted.Load() != 1 {
		t.Errorf("403: %d tries, %d cancelled, %v", tries.Load(), deleted.Load(), err)
	}
}

// TestUploadToLiars has registries that confirm what they did not get.
func TestUploadToLiars(t *testing.T) {
	content := make([]byte, 32<<20) // more than the kernel buffers
	other := string(ocispec.FromBytes([]byte("other")))
	accepted := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "/v2/a/blobs/uploads/1")
		w.WriteHeader(http.StatusAccepted)
	}
	for name, h := range map[string]http.HandlerFunc{
		"other digest": func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Docker-Content-Digest", other)
			w.WriteHeader(201)
		},
		"too early": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(201) },
		"redirect loop": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String(), http.StatusTemporaryRedirect)
		},
	} {
		for _, up := range []Upload{knownBlob(content), streamed(content)} {
			host, _ := uploads(t, accepted, h)
			if err := client(nil).PutBlob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", up); err == nil || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestPagination(t *testing.T) {
	var host string
	var asked atomic.Int32
	other := serve(t, http.NotFoundHandler())
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := asked.Add(1)
		q := r.URL.Query()
		switch {
		case strings.Contains(r.URL.Path, "/good/"):
			if q.Get("last") == "" {
				w.Header().Set("Link", `</v2/good/tags/list?n=2&last=b>; rel="next"`)
				io.WriteString(w, `{"name":"good","tags":["a","b"]}`)
				return
			}
			io.WriteString(w, `{"name":"good","tags":["c"]}`)
		case strings.Contains(r.URL.Path, "/null/"):
			io.WriteString(w, `{"name":"null","tags":null}`)
		case strings.Contains(r.URL.Path, "/circle/"):
			w.Header().Set("Link", `<`+r.URL.RequestURI()+`>; rel="next"`)
			io.WriteString(w, `{"tags":["a"]}`)
		case strings.Contains(r.URL.Path, "/endless/"):
			w.Header().Set("Link", fmt.Sprintf(`</v2/endless/tags/list?last=%d>; rel="next"`, n))
			io.WriteString(w, `{"tags":["a"]}`)
		case strings.Contains(r.URL.Path, "/huge/"):
			w.Header().Set("Link", fmt.Sprintf(`</v2/huge/tags/list?last=%d>; rel="next"`, n))
			io.WriteString(w, `{"tags":["`+strings.Repeat(`a","`, 900_000)+`b"]}`)
		case strings.Contains(r.URL.Path, "/hangs/"):
			<-r.Context().Done()
		case strings.Contains(r.URL.Path, "/away/"):
			w.Header().Set("Link", `<http://`+other+`/v2/away/tags/list>; rel="next"`)
			io.WriteString(w, `{"tags":["a"]}`)
		default:
			io.WriteString(w, `{"tags":[1]}`)
		}
	}))
	c := client(nil)
	for repo, want := range map[string]string{"good": "[a b c]", "null": "[]"} {
		if tags, err := c.Tags(context.Background(), host, repo); err != nil || fmt.Sprint(tags) != want {
			t.Errorf("%s: %v, %v", repo, tags, err)
		}
	}
	c.listing = 500 * time.Millisecond
	for _, repo := range []string{"circle", "away", "numbers", "hangs"} {
		if _, err := c.Tags(context.Background(), host, repo); !isAnswer(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", repo, err)
		}
	}
	c.listing = time.Minute
	for _, repo := range []string{"endless", "huge"} {
		if _, err := c.Tags(context.Background(), host, repo); !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v", repo, err)
		}
	}
}

func TestNextLink(t *testing.T) {
	for in, want := range map[string]string{
		`</v2/_catalog?last=b&n=2>; rel="next"`: "/v2/_catalog?last=b&n=2", `<a>; rel=next`: "a", `<a>; rel=prev, <b>; x="y"; REL="first next"`: "b",
		`<a>; rel="prev"`: "", "": "", "<": "", "<a": "", `<a>`: "", `a; rel="next"`: "", `<a>;rel="next",<b>;rel="next"`: "a",
	} {
		if got := nextLink([]string{in}); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// TestScopes has a token server that gives each scope its own token, and a registry that wants the right ones.
func TestScopes(t *testing.T) {
	var host string
	var tokens atomic.Int32
	content, desc := random(10)
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			tokens.Add(1)
			fmt.Fprintf(w, `{"token":%q,"expires_in":300}`, strings.Join(r.URL.Query()["scope"], "+"))
			return
		}
		want := "repository:a:pull"
		if r.Method != http.MethodGet {
			want = "repository:a:pull,push"
		}
		if r.URL.Query().Get("from") != "" {
			want = "repository:a:pull,push+repository:b:pull"
		}
		if got := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "); !strings.HasPrefix(got, want) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="s",scope="ignored"`)
			w.WriteHeader(401)
			return
		}
		switch r.Method {
		case http.MethodPost:
			w.Header().Set("Location", "/upload")
			w.WriteHeader(202)
		case http.MethodPut:
			io.Copy(io.Discard, r.Body)
			w.WriteHeader(201)
		case http.MethodHead:
			w.WriteHeader(404)
		default:
			w.Write(content)
		}
	}))
	ctx, c, ep := context.Background(), client(nil), Endpoint{Scheme: "http", Host: host}
	for range 2 {
		if _, _, err := c.HasBlob(ctx, ep, "a", desc.Digest); err != nil {
			t.Fatal(err)
		}
		if mounted, err := c.MountBlob(ctx, ep, "a", desc.Digest, "b"); mounted || err != nil {
			t.Fatal(mounted, err)
		}
		if err := c.PutBlob(ctx, ep, "a", knownBlob(content)); err != nil {
			t.Fatal(err)
		}
	}
	if n := tokens.Load(); n != 2 { // pull,push of a; then that with pull of b, which serves everything
		t.Errorf("%d tokens fetched", n)
	}
}
