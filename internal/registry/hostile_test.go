package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/ocispec"
)

// drip writes a byte at a time until the client or the test has had enough.
func drip(quit <-chan struct{}, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; ; i++ {
			if _, err := io.WriteString(w, text[i%len(text):i%len(text)+1]); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			select {
			case <-quit:
				return
			case <-r.Context().Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
}

func flood(w http.ResponseWriter, r *http.Request) {
	junk := bytes.Repeat([]byte(" "), 1<<16)
	for r.Context().Err() == nil {
		if _, err := w.Write(junk); err != nil {
			return
		}
	}
}

// raw serves connections with what is no HTTP server's idea of an answer.
func raw(t *testing.T, answer func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.ReadAtLeast(c, make([]byte, 4096), 1)
				answer(c)
			}()
		}
	}()
	return l.Addr().String()
}

// TestHostileRegistry asks registries that lie, talk without end, or say next to nothing, for everything that can be asked for. Each gives a
// line that names it, within bounded time and memory.
func TestHostileRegistry(t *testing.T) {
	quit := make(chan struct{})
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s) }
	}
	layer := fmt.Sprintf(`{"mediaType":"m","digest":%q,"size":1}`, ocispec.FromBytes(nil))
	layers := func(n int) string {
		return `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":` + strings.Replace(layer, `"m"`, `"`+ocispec.MediaTypeImageConfig+`"`, 1) +
			`,"layers":[` + strings.Repeat(layer+",", n-1) + layer + `]}`
	}
	servers := map[string]string{
		"endless body":            serve(t, http.HandlerFunc(flood)),
		"byte by byte":            serve(t, drip(quit, " ")),
		"errors byte by byte":     serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403); drip(quit, " ")(w, r) })),
		"overloaded byte by byte": serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503); drip(quit, " ")(w, r) })),
		"endless error":           serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404); flood(w, r) })),
		"silence":                 serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-quit })),
		"429 for ever": serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "86400")
			w.WriteHeader(429)
		})),
		"deep JSON":      serve(t, text(strings.Repeat(`{"a":[`, 500_000))),
		"huge JSON":      serve(t, text(`{"layers":[`+strings.Repeat("{},", 1_300_000)+"{}]}")),
		"100,000 layers": serve(t, text(layers(100_000))),
		"20,000 layers":  serve(t, text(layers(20_000))),
		"redirect loop": serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String()+"x", http.StatusFound)
		})),
		"redirect to a file":      serve(t, http.RedirectHandler("file:///etc/passwd", http.StatusFound)),
		"redirect to metadata":    serve(t, http.RedirectHandler("http://169.254.169.254/latest/meta-data/", http.StatusFound)),
		"redirect to metadata, 6": serve(t, http.RedirectHandler("http://[fd00:ec2::254]/latest/meta-data/", http.StatusTemporaryRedirect)),
		"redirect to the link":    serve(t, http.RedirectHandler("http://[fe80::1%25lo]/", http.StatusFound)),
		"token from metadata": serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://169.254.169.254/token"`)
			w.WriteHeader(401)
		})),
		"endless headers": raw(t, func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for i := 0; ; i++ {
				if _, err := fmt.Fprintf(c, "X-%d: %s\r\n", i, strings.Repeat("x", 1000)); err != nil {
					return
				}
			}
		}),
		"an endless header": raw(t, func(c net.Conn) {
			io.WriteString(c, "HTTP/1.1 200 OK\r\nX: ")
			for {
				if _, err := c.Write(bytes.Repeat([]byte("x"), 1<<16)); err != nil {
					return
				}
			}
		}),
		"endless early hints": raw(t, func(c net.Conn) {
			for {
				if _, err := io.WriteString(c, "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n"); err != nil {
					return
				}
			}
		}),
		"no HTTP":         raw(t, func(c net.Conn) { io.WriteString(c, "SSH-2.0-OpenSSH\r\n") }),
		"hangs up":        raw(t, func(c net.Conn) {}),
		"negative length": raw(t, func(c net.Conn) { io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}") }),
		"nonsense challenge": serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer `+strings.Repeat(`realm="`, 1000))
			w.WriteHeader(401)
		})),
	}
	t.Cleanup(func() { close(quit) }) // before the servers', which wait for their handlers
	for name, host := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := client(map[string]config.Registry{host: {PlainHTTP: true}})
			c.stall, c.maxWait, c.tokenTime, c.listing = 200*time.Millisecond, time.Millisecond, 200*time.Millisecond, 500*time.Millisecond
			c.transports.base.ResponseHeaderTimeout = 200 * time.Millisecond
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // far more than any may take
			defer cancel()
			ep := Endpoint{Domain: host, Scheme: "http", Host: host}
			content, desc := random(1 << 20)
			for what, ask := range map[string]func() error{
				"resolve": func() error {
					_, raw, _, err := c.Resolve(ctx, host, "a", "x")
					if err == nil {
						_, err = DecodeManifest(raw)
					}
					return err
				},
				"head": func() error {
					d, _, err := c.HeadManifest(ctx, host, "a", "x")
					if err == nil && strings.Contains(name, "layers") {
						_, err = c.Manifest(ctx, ep, "a", ocispec.Descriptor{Digest: ocispec.FromBytes([]byte("another than " + d.Digest))})
					}
					return err
				},
				"blob": func() error {
					rc, err := c.Blob(ctx, ep, "a", desc)
					if err != nil {
						return err
					}
					defer rc.Close()
					n, err := io.Copy(io.Discard, rc)
					if n > desc.Size {
						t.Errorf("%d bytes came through", n)
					}
					return err
				},
				"tags":    func() error { _, err := c.Tags(ctx, host, "a"); return notEmpty(name, err) },
				"catalog": func() error { return notEmpty(name, c.Catalog(ctx, host, func(string) bool { return true })) },
				"has": func() error {
					_, ok, err := c.HasBlob(ctx, ep, "a", desc.Digest)
					return unless(ok || name == "endless error", err)
				},
				"mount":  func() error { ok, err := c.MountBlob(ctx, ep, "a", desc.Digest, "b"); return unless(!ok, err) },
				"put":    func() error { return c.PutBlob(ctx, ep, "a", knownBlob(content)) },
				"stream": func() error { return c.PutBlob(ctx, ep, "a", streamed(content)) },
				"manifest": func() error {
					_, err := c.PutManifest(ctx, ep, "a", "x", ocispec.MediaTypeImageManifest, []byte("{}"))
					return unless(true, err) // what it answers to a PUT is its word alone
				},
			} {
				err := ask()
				if err == nil {
					t.Errorf("%s: no error", what)
					continue
				}
				if errors.Is(err, errFine) {
					continue
				}
				if ctx.Err() != nil {
					t.Fatalf("%s: took too long: %v", what, err)
				}
				if s := err.Error(); strings.ContainsAny(s, "\n\r\x1b") || len(s) > 1000 || !strings.Contains(s, host) && !strings.Contains(s, "20000 layers") {
					t.Errorf("%s: %s", what, s)
				}
			}
		})
	}
}

// errFine stands for an answer that need not be an error.
var errFine = errors.New("fine")

func unless(fine bool, err error) error {
	if err == nil && fine {
		return errFine
	}
	return err
}

// notEmpty: JSON without names is an empty list.
func notEmpty(name string, err error) error {
	return unless(strings.Contains(name, "layers") || name == "huge JSON", err)
}

// TestHostileMemory holds that what a registry sends does not decide how much memory is used.
func TestHostileMemory(t *testing.T) {
	host := serve(t, http.HandlerFunc(flood))
	c := client(map[string]config.Registry{host: {PlainHTTP: true}})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	c.Resolve(context.Background(), host, "a", "x")
	c.Tags(context.Background(), host, "a")
	_, desc := random(10)
	if rc, err := c.Blob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", desc); err == nil {
		io.Copy(io.Discard, rc)
		rc.Close()
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 100<<20 {
		t.Errorf("%d MB were allocated for answers that are none", n>>20)
	}
}

// TestSlowBlob has a registry that keeps a blob just alive: a byte now and then, over one connection and over many.
func TestSlowBlob(t *testing.T) {
	quit := make(chan struct{})
	defer close(quit)
	_, desc := random(100_000)
	for name, h := range map[string]http.HandlerFunc{
		"one connection": drip(quit, "x"),
		"many connections": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(desc.Size))
			if r.Header.Get("Range") != "" {
				w.Header().Del("Content-Length")
				w.WriteHeader(http.StatusPartialContent)
			}
			io.WriteString(w, "x")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
	} {
		host := lie(t, nil, h)
		c := client(nil)
		c.stall = 100 * time.Millisecond
		rc, err := c.Blob(context.Background(), Endpoint{Scheme: "http", Host: host}, "a", desc)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, rc)
		rc.Close()
		if err == nil || n > 10_000 || !strings.Contains(err.Error(), host) {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

// TestRedirectGuards has the rules that a loopback test can't meet.
func TestRedirectGuards(t *testing.T) {
	for from, to := range map[string][]string{
		"https://registry.example/v2/": {"https://storage.example/x", "https://registry.example:5000/x", "https://10.0.0.7/x", "!http://registry.example.evil/x",
			"!https://127.0.0.1/x", "!https://localhost:2375/x", "!https://[::1]/x", "!https://169.254.169.254/x", "!https://[::ffff:169.254.169.254]/x", "!https://100.100.100.200/x",
			"!https://0.0.0.0/x", "!gopher://a/x", "!https:///x"},
		"http://127.0.0.1:5000/v2/": {"http://127.0.0.1:9000/x", "https://storage.example/x", "!http://169.254.169.254/x"},
	} {
		for _, to := range to {
			want := !strings.HasPrefix(to, "!")
			if _, err := follow(from, strings.TrimPrefix(to, "!")); (err == nil) != want {
				t.Errorf("%s to %s: %v", from, to, err)
			}
		}
	}
	// A name that leads there.
	tr := newTransports(nil)
	for _, addr := range []string{"169.254.169.254:80", "[fd00:ec2::254]:80", "0.0.0.0:80"} {
		if conn, err := tr.dial(context.Background(), "tcp", addr); err == nil || !strings.Contains(err.Error(), "refused to go on") {
			t.Errorf("%s: %v, %v", addr, conn, err)
		}
	}
}
