package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"conex/internal/ocispec"
)

// liar is a registry that serves one image and can lie about everything in it.
type liar struct {
	config, layer, manifest []byte // layer compressed
	// answer, if not nil, may take a request for itself.
	answer func(w http.ResponseWriter, r *http.Request) bool
}

func newLiar(t *testing.T) *liar {
	t.Helper()
	tar := tarOf(t, map[string][]byte{"noise": noise(7, 2<<20)})
	var b bytes.Buffer
	zw := gzip.NewWriter(&b)
	zw.Write(tar)
	zw.Close()
	l := &liar{layer: b.Bytes()}
	l.config = fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(tar))
	l.describe(1)
	return l
}

// describe writes the manifest, with the layer n times.
func (l *liar) describe(n int) {
	layer := fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%x","size":%d}`, ocispec.MediaTypeImageLayerGzip, sha256.Sum256(l.layer), len(l.layer))
	l.manifest = fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":"sha256:%x","size":%d},"layers":[%s]}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, sha256.Sum256(l.config), len(l.config), strings.TrimSuffix(strings.Repeat(layer+",", n), ","))
}

// repeat makes the layer occur n times.
func (l *liar) repeat(n int) {
	one := l.config[bytes.Index(l.config, []byte(`"sha256:`)):bytes.IndexByte(l.config, ']')]
	l.config = bytes.Replace(l.config, one, bytes.TrimSuffix(bytes.Repeat(append(bytes.Clone(one), ','), n), []byte(",")), 1)
	l.describe(n)
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case l.answer != nil && l.answer(w, r):
	case r.URL.Path == "/v2/":
	case strings.Contains(r.URL.Path, "/manifests/"):
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256(l.manifest)))
		w.Write(l.manifest)
	case strings.HasSuffix(r.URL.Path, fmt.Sprintf("%x", sha256.Sum256(l.config))):
		w.Write(l.config)
	case strings.HasSuffix(r.URL.Path, fmt.Sprintf("%x", sha256.Sum256(l.layer))):
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(l.layer))
	default:
		http.NotFound(w, r)
	}
}

// endless writes until the client has enough.
func endless(w http.ResponseWriter, r *http.Request, part []byte) bool {
	for r.Context().Err() == nil {
		if _, err := w.Write(part); err != nil {
			break
		}
	}
	return true
}

// watchMemory follows a process of program bin; peak returns the most kilobytes that it had. What wait4 says is no use: it begins with the
// memory of the process that forked.
func watchMemory(pid int, bin string) (peak func() int) {
	stop, done, most := make(chan struct{}), make(chan struct{}), 0
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(3 * time.Millisecond):
			}
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe != bin { // not yet, or no more
				continue
			}
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				continue
			}
			_, after, _ := strings.Cut(string(status), "VmHWM:")
			var kb int
			if fmt.Sscan(after, &kb); kb > most {
				most = kb
			}
		}
	}()
	return func() int { close(stop); <-done; return most }
}

// accepted is for what is odd and no lie: it is pulled, and whatever run makes of it, it says in a line.
const accepted = "accepted"

// A registry that lies gets one clear line, in bounded time and memory, and leaves nothing in the store.
func TestHostileRegistries(t *testing.T) {
	layer := func(r *http.Request, l *liar) bool {
		return strings.HasSuffix(r.URL.Path, fmt.Sprintf("%x", sha256.Sum256(l.layer)))
	}
	for name, c := range map[string]struct {
		spoil func(l *liar)
		want  string
	}{
		"honest": {func(*liar) {}, accepted},
		"wrong bytes": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !layer(r, l) {
					return false
				}
				b := bytes.Clone(l.layer)
				b[len(b)/2] ^= 1
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
				return true
			}
		}, "mismatch"},
		"wrong manifest": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
				w.Write(l.manifest)
				return true
			}
		}, "sha256:0000"},
		"wrong size": {func(l *liar) {
			l.manifest = bytes.Replace(l.manifest, fmt.Appendf(nil, "%d", len(l.layer)), fmt.Appendf(nil, "%d", len(l.layer)+5), 1)
		}, "bytes"},
		"endless layer": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				return layer(r, l) && endless(w, r, noise(1, 1<<20))
			}
		}, ""},
		"endless manifest": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				return strings.Contains(r.URL.Path, "/manifests/") && endless(w, r, bytes.Repeat([]byte(" "), 1<<20))
			}
		}, ""},
		"endless error": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				w.WriteHeader(http.StatusForbidden)
				return endless(w, r, bytes.Repeat([]byte("no "), 1<<18))
			}
		}, ""},
		"endless header": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					return true
				}
				defer conn.Close()
				line := append([]byte("X-Long: "), append(bytes.Repeat([]byte("x"), 1<<16), '\r', '\n')...)
				for _, err = conn.Write([]byte("HTTP/1.1 200 OK\r\n")); err == nil; _, err = conn.Write(line) {
				}
				return true
			}
		}, ""},
		"redirects in a circle": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !layer(r, l) {
					return false
				}
				http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
				return true
			}
		}, "redirect"},
		"a redirect to a file": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !layer(r, l) {
					return false
				}
				http.Redirect(w, r, "file:///etc/passwd", http.StatusTemporaryRedirect)
				return true
			}
		}, ""},
		"100,000 layers":             {func(l *liar) { l.describe(100_000) }, ""},
		"a thousand layers":          {func(l *liar) { l.describe(1000) }, "1000"},
		"20,000 layers that are one": {func(l *liar) { l.repeat(20_000) }, "more than the 500"},
		"400 layers that are one":    {func(l *liar) { l.repeat(400) }, accepted},
		"no layers":                  {func(l *liar) { l.describe(0) }, ""},
		"an empty manifest":          {func(l *liar) { l.manifest = []byte("{}") }, ""},
		"no manifest at all":         {func(l *liar) { l.manifest = []byte("\x1b[2J<html>") }, ""},
		"deep manifest":              {func(l *liar) { l.manifest = bytes.Repeat([]byte("["), 1<<20) }, ""},
		"words for the terminal": {func(l *liar) {
			l.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				w.WriteHeader(http.StatusForbidden)
				b, _ := json.Marshal("\x1b]0;owned\a\x1b[31mred\u009b2J\nline")
				fmt.Fprintf(w, `{"errors":[{"code":"DENIED","message":%s}]}`, b)
				return true
			}
		}, ""},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			w := bareWorld(t)
			w.netns = newNetns(t)
			l := newLiar(t)
			c.spoil(l)
			var ln net.Listener
			var err error
			w.inNetns(func() { ln, err = net.Listen("tcp", "127.0.0.1:0") })
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: l, ErrorLog: quietLog}
			done := make(chan struct{})
			go func() { defer close(done); srv.Serve(ln) }()
			defer func() { srv.Close(); <-done }()

			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, w.bin, "pull", ln.Addr().String()+"/lie:1")
			cmd.Env, cmd.Dir = w.env, w.dir
			var out, errb bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errb
			w.start(cmd)
			peak := watchMemory(cmd.Process.Pid, w.bin)
			err = cmd.Wait()
			if ctx.Err() != nil {
				t.Fatalf("not done after two minutes:\n%s%s", out.String(), errb.String())
			}
			most := peak()
			if most > 120<<10 {
				t.Errorf("%d kB of memory at its peak", most)
			}
			for _, r := range out.String() + errb.String() {
				if r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 {
					t.Errorf("the terminal gets %q", out.String()+errb.String())
					break
				}
			}
			t.Logf("%d kB, %v %s", most, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime(), errb.String())
			if c.want == accepted {
				if err != nil {
					t.Errorf("%v: %s", err, errb.String())
				}
				if r := w.try("run", "--rm", "--network", "none", ln.Addr().String()+"/lie:1", "/x"); r.code < 125 || strings.Count(r.stderr, "\n") > 2 || len(r.stderr) > 1000 {
					t.Errorf("run: %d, %q", r.code, r.stderr)
				}
				return
			}
			if code := cmd.ProcessState.ExitCode(); code != 1 || strings.Count(errb.String(), "\n") != 1 || !strings.Contains(errb.String(), c.want) || len(errb.String()) > 1000 {
				t.Errorf("exit code %d, %q, want one line with %q", code, errb.String(), c.want)
			}
			w.checkStore()
			if got := w.conex("images", "-aq"); got != "" {
				t.Errorf("there are images: %s", got)
			}
			for _, dir := range []string{"layers", "blobs/sha256", "images/by-id"} {
				entries, err := os.ReadDir(filepath.Join(w.root, dir))
				for _, e := range entries {
					t.Errorf("left in %s: %s", dir, e.Name())
				}
				if err != nil && !os.IsNotExist(err) {
					t.Error(err)
				}
			}
		})
	}
}
