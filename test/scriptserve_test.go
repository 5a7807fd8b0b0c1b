package test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// scriptServe is a script's
//
//	serve VARIABLE
//
// It starts an HTTP server in the world's network namespace and sets VARIABLE to its address. It serves the files of the folder www, with
// the tag that lies beside a file as FILE.etag; and the git repositories in the folder git, /git/NAME.git by the smart protocol, /dumb/NAME.git
// as files, /login/NAME.git to who knows the password "open sesame" of user "x-access-token". The file requests has a line for each request:
// method, path and status. Hostile paths are /loop (a redirect to itself), /file (one to file:///etc/passwd), /endless, /short (less than it
// announces), /huge (announces more than any disk has).
func (w *world) scriptServe(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: serve VARIABLE")
	}
	var l net.Listener
	var err error
	w.inNetns(func() { l, err = net.Listen("tcp", "127.0.0.1:0") })
	ts.Check(err)
	s := &scriptServer{www: ts.MkAbs("www"), git: ts.MkAbs("git"), log: ts.MkAbs("requests")}
	ts.Check(os.WriteFile(s.log, nil, 0o644))
	srv := &http.Server{Handler: s, ReadHeaderTimeout: time.Minute}
	go srv.Serve(l)
	ts.Defer(func() { srv.Close() })
	ts.Setenv(args[0], l.Addr().String())
}

type scriptServer struct {
	www, git, log string
	mu            sync.Mutex
}

type statusWriter struct {
	http.ResponseWriter
	code int
}

func (w *statusWriter) WriteHeader(code int) {
	w.code = code
	w.ResponseWriter.WriteHeader(code)
}

func (s *scriptServer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := &statusWriter{rw, 200}
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		f, err := os.OpenFile(s.log, os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			fmt.Fprintln(f, r.Method, r.URL.Path, w.code)
			f.Close()
		}
	}()
	top, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch top {
	case "login":
		if user, pass, _ := r.BasicAuth(); user != "x-access-token" || pass != "open sesame" {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		s.backend("/login", w, r)
	case "git":
		s.backend("/git", w, r)
	case "dumb":
		http.ServeFile(w, r, filepath.Join(s.git, filepath.Clean("/"+rest)))
	case "loop":
		http.Redirect(w, r, "/loop", http.StatusFound)
	case "file":
		http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
	case "endless":
		block := make([]byte, 1<<20)
		for {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	case "short":
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "not a hundred bytes")
	case "huge":
		w.Header().Set("Content-Length", fmt.Sprint(int64(1)<<60))
		fmt.Fprint(w, "the beginning")
	default:
		name := filepath.Join(s.www, filepath.Clean(r.URL.Path))
		if tag, err := os.ReadFile(name + ".etag"); err == nil {
			w.Header().Set("ETag", strings.TrimSpace(string(tag)))
		}
		if name, err := os.ReadFile(name + ".disposition"); err == nil {
			w.Header().Set("Content-Disposition", "attachment; filename="+strings.TrimSpace(string(name)))
		}
		http.ServeFile(w, r, name)
	}
}

func (s *scriptServer) backend(root string, w http.ResponseWriter, r *http.Request) {
	h := &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Root: root,
		Env: []string{"GIT_PROJECT_ROOT=" + s.git, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_PROTOCOL=" + r.Header.Get("Git-Protocol"),
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
		InheritEnv: []string{"PATH"},
	}
	h.ServeHTTP(w, r)
}
