package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// registry is Debian's docker-registry in a world's network namespace, and a proxy in front of it that writes down what goes through
// and can be told to misbehave.
type registry struct {
	w *world
	// addr is the proxy's address, direct the registry's own.
	addr, direct string

	mu      sync.Mutex
	log     []exchange
	conduct func(*http.Request) conduct
}

// exchange is a request as the proxy saw it.
type exchange struct {
	method, path, query string
	status              int
	// up and down are the bytes of the bodies.
	up, down int64
	at       time.Time
}

// conduct is how the proxy treats a request; the zero value passes it on.
type conduct struct {
	// status, if not 0, is answered instead of asking the registry.
	status int
	header map[string]string
	// cut, if not 0, breaks the connection after so many bytes of the answer's body.
	cut int64
	// pace, if not nil, is how fast the bodies may come and go.
	pace *pacer
}

// serveRegistry starts an empty registry. The test is skipped where Debian's docker-registry is missing.
func (w *world) serveRegistry() *registry {
	w.t.Helper()
	bin := need(w.t, "docker-registry", "docker-registry")
	r := &registry{w: w}
	dir, err := os.MkdirTemp("", "registry.")
	if err != nil {
		w.t.Fatal(err)
	}
	var l net.Listener
	w.inNetns(func() { l, err = net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		w.t.Fatal(err)
	}
	r.direct = l.Addr().String()
	l.Close() // nobody else is in this network namespace
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}\nhttp: {addr: %q}\n",
		filepath.Join(dir, "data"), r.direct)
	file := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(bin, "serve", file)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	w.start(cmd)
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		for line := range strings.Lines(out.String()) {
			if w.t.Failed() && !strings.Contains(line, " unknown") { // asked for what it does not have: nothing wrong
				w.t.Logf("the registry: %s", line)
			}
		}
		os.RemoveAll(dir)
	})
	w.get("http://" + r.direct + "/v2/")

	w.inNetns(func() { l, err = net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		w.t.Fatal(err)
	}
	r.addr = l.Addr().String()
	srv := &http.Server{Handler: r.proxy(), ConnContext: smallBuffer}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	w.t.Cleanup(func() { srv.Close(); <-done })
	return r
}

// smallBuffer keeps what was sent and never received small, so that the bytes that the proxy counts are those that came.
func smallBuffer(ctx context.Context, c net.Conn) context.Context {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(32 << 10)
	}
	return ctx
}

// need returns the path of a program that comes with a Debian package, or skips the test.
func need(t *testing.T, program, pkg string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		p := filepath.Join(dir, program)
		if st, err := os.Stat(p); err == nil && st.Mode()&0o111 != 0 && !st.IsDir() {
			return p
		}
	}
	t.Skipf("needs %s: apt-get install %s", program, pkg)
	return ""
}

// proxy is the recorder.
func (r *registry) proxy() http.Handler {
	target := &url.URL{Scheme: "http", Host: r.direct}
	tr := &http.Transport{DialContext: r.w.dial, MaxIdleConnsPerHost: 16}
	r.w.t.Cleanup(tr.CloseIdleConnections)
	pass := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.Out.Host = p.In.Host // Location headers lead back through the proxy
		},
		Transport:     tr,
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ErrorLog:      quietLog,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		decide := r.conduct
		r.mu.Unlock()
		var c conduct
		if decide != nil {
			c = decide(req)
		}
		e := exchange{method: req.Method, path: req.URL.Path, query: req.URL.RawQuery, at: time.Now()}
		body := &countedBody{ReadCloser: req.Body, pace: c.pace}
		req.Body = body
		cw := &countedWriter{ResponseWriter: w, c: c}
		defer func() {
			broken := recover()
			e.status, e.up, e.down = cw.status, body.n.load(), cw.n
			r.mu.Lock()
			r.log = append(r.log, e)
			r.mu.Unlock()
			if broken != nil {
				panic(http.ErrAbortHandler)
			}
		}()
		if c.status != 0 {
			for k, v := range c.header {
				w.Header().Set(k, v)
			}
			cw.WriteHeader(c.status)
			return
		}
		pass.ServeHTTP(cw, req)
	})
}

type countedBody struct {
	io.ReadCloser
	n    counter
	pace *pacer
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.add(int64(n))
	if b.pace != nil {
		b.pace.wait(n)
	}
	return n, err
}

type counter struct {
	mu sync.Mutex
	n  int64
}

func (c *counter) add(n int64) { c.mu.Lock(); c.n += n; c.mu.Unlock() }

func (c *counter) load() int64 { c.mu.Lock(); defer c.mu.Unlock(); return c.n }

// countedWriter writes an answer as its conduct says.
type countedWriter struct {
	http.ResponseWriter
	c      conduct
	status int
	n      int64
}

func (w *countedWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countedWriter) Flush() { w.ResponseWriter.(http.Flusher).Flush() }

func (w *countedWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	done := 0
	for done < len(p) {
		part := p[done:]
		if w.c.pace != nil {
			part = part[:min(len(part), 8<<10)]
			w.c.pace.wait(len(part))
		}
		if w.c.cut > 0 && w.n+int64(len(part)) > w.c.cut {
			w.ResponseWriter.Write(part[:w.c.cut-w.n])
			w.n = w.c.cut
			w.Flush()
			panic(http.ErrAbortHandler)
		}
		n, err := w.ResponseWriter.Write(part)
		w.n += int64(n)
		done += n
		if err != nil {
			return done, err
		}
		if w.c.pace != nil {
			w.Flush()
		}
	}
	return done, nil
}

// pacer lets through so many bytes a second, for all who share it.
type pacer struct {
	perSecond int
	mu        sync.Mutex
	next      time.Time
}

// become changes how many.
func (p *pacer) become(perSecond int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.perSecond = perSecond
}

func (p *pacer) wait(n int) {
	p.mu.Lock()
	now := time.Now()
	if p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(time.Duration(n) * time.Second / time.Duration(p.perSecond))
	until := p.next
	p.mu.Unlock()
	time.Sleep(time.Until(until))
}

// behave tells the proxy how to treat requests from now on; nil is as it should be.
func (r *registry) behave(fn func(*http.Request) conduct) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conduct = fn
}

// forget empties the log and returns what was in it.
func (r *registry) forget() []exchange {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}

// sum adds up the bytes of blobs in a log.
func sum(log []exchange) (up, down int64) {
	for _, e := range log {
		if strings.Contains(e.path, "/blobs/") {
			up, down = up+e.up, down+e.down
		}
	}
	return up, down
}

// count counts the exchanges of a method whose path has part in it.
func count(log []exchange, method, part string) (n int) {
	for _, e := range log {
		if e.method == method && strings.Contains(e.path, part) {
			n++
		}
	}
	return n
}

func (e exchange) String() string {
	return fmt.Sprintf("%s %s?%s %d up %d down %d", e.method, e.path, e.query, e.status, e.up, e.down)
}

// dial connects from within the world's network namespace.
func (w *world) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = w.within(func() (err error) { conn, err = (&net.Dialer{}).DialContext(ctx, network, addr); return err })
	return conn, err
}

// remote are go-containerregistry's options (crane's library) for registries of this world.
func (w *world) remote() []remote.Option {
	tr := &http.Transport{DialContext: w.dial}
	w.t.Cleanup(tr.CloseIdleConnections)
	return []remote.Option{remote.WithTransport(tr)}
}

// ref parses a name in the registry, past the proxy.
func (r *registry) ref(s string) name.Reference {
	r.w.t.Helper()
	ref, err := name.ParseReference(r.direct+"/"+s, name.Insecure)
	if err != nil {
		r.w.t.Fatal(err)
	}
	return ref
}

// raw returns the manifest that a name in the registry leads to, byte by byte, and its digest.
func (r *registry) raw(s string) ([]byte, string) {
	r.w.t.Helper()
	d, err := remote.Get(r.ref(s), r.w.remote()...)
	if err != nil {
		r.w.t.Fatalf("%s: %v", s, err)
	}
	return d.Manifest, d.Digest.String()
}

// put pushes with crane's library.
func (r *registry) put(s string, what remote.Taggable) {
	r.w.t.Helper()
	var err error
	switch x := what.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(r.ref(s), x, r.w.remote()...)
	case v1.Image:
		err = remote.Write(r.ref(s), x, r.w.remote()...)
	}
	if err != nil {
		r.w.t.Fatalf("push %s: %v", s, err)
	}
}

// form is how an image is written down: the kind of its manifest and the compression of its layers.
type form struct {
	docker bool
	packed string // gzip, zstd or none
}

func (f form) String() string {
	kind := "oci"
	if f.docker {
		kind = "docker"
	}
	return kind + "-" + f.packed
}

var forms = []form{{false, "gzip"}, {false, "zstd"}, {false, "none"}, {true, "gzip"}}

// pack makes a layer of a tar in that form.
func (f form) pack(t *testing.T, tar []byte) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	var err error
	var mt types.MediaType
	switch f.packed {
	case "gzip":
		mt = types.OCILayer
		if f.docker {
			mt = types.DockerLayer
		}
		zw := gzip.NewWriter(&b)
		_, err = zw.Write(tar)
		zw.Close()
	case "zstd":
		mt = types.OCILayerZStd
		zw, _ := zstd.NewWriter(&b)
		_, err = zw.Write(tar)
		zw.Close()
	default:
		mt = types.OCIUncompressedLayer
		b.Write(tar)
	}
	if err != nil {
		t.Fatal(err)
	}
	l := static.NewLayer(b.Bytes(), mt)
	return &packedLayer{l, tar}
}

// packedLayer knows its diffID.
type packedLayer struct {
	v1.Layer
	tar []byte
}

func (l *packedLayer) DiffID() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.tar))
	return h, err
}

func (l *packedLayer) Uncompressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.tar)), nil
}

// image makes an image of layers with the given tars. What goes into its config depends on platform alone.
func (f form) image(t *testing.T, platform string, tars ...[]byte) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if f.docker {
		img = mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.DockerManifestSchema2), types.DockerConfigJSON)
	}
	var adds []mutate.Addendum
	for _, tar := range tars {
		l := f.pack(t, tar)
		mt, _ := l.MediaType()
		adds = append(adds, mutate.Addendum{Layer: l, MediaType: mt, History: v1.History{CreatedBy: "made for a test"}})
	}
	img, err := mutate.Append(img, adds...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	c.OS, c.Architecture, c.Variant = p.OS, p.Architecture, p.Variant
	c.Config.Cmd = []string{"/bin/sh", "-c", "cat /etc/motd"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

// index makes an index of images, one a platform.
func (f form) index(t *testing.T, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	ix := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	if f.docker {
		ix = mutate.IndexMediaType(empty.Index, types.DockerManifestList)
	}
	for _, p := range slices.Sorted(maps.Keys(images)) {
		plat, err := v1.ParsePlatform(p)
		if err != nil {
			t.Fatal(err)
		}
		ix = mutate.AppendManifests(ix, mutate.IndexAddendum{Add: images[p], Descriptor: v1.Descriptor{Platform: plat}})
	}
	return ix
}

// digestOf is the digest of an image or index.
func digestOf(t *testing.T, x interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	h, err := x.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func compact(b []byte) string {
	var out bytes.Buffer
	if json.Compact(&out, b) != nil {
		return strconv.Quote(string(b))
	}
	return out.String()
}
