package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"conex/internal/config"
	"conex/internal/credentials"
	"conex/internal/ocispec"
)

// htpasswd lets user in with s3cret.
const htpasswd = `user:$2y$05$/63m8QhSB1pYoLyCv13G2OFKP2/zcSy86B2X10vnAakH8s9yshgcu`

// withLogin is a client whose user has logged in at the servers.
func withLogin(t *testing.T, cfg map[string]config.Registry, logins map[string]credentials.Credentials) *Client {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s := credentials.Open()
	for server, c := range logins {
		if _, err := s.Put(context.Background(), server, c); err != nil {
			t.Fatal(err)
		}
	}
	c := client(cfg)
	c.credentials = s
	return c
}

func TestBasic(t *testing.T) {
	file := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(file, []byte(htpasswd+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host := dockerRegistry(t, "http", "auth:\n  htpasswd: {realm: r, path: "+file+"}\n")
	ctx := context.Background()
	good, bad := credentials.Credentials{Username: "user", Password: "s3cret"}, credentials.Credentials{Username: "user", Password: "s3creT"}
	if _, err := client(nil).Login(ctx, host, good); err != nil {
		t.Fatal(err)
	}
	for _, c := range []credentials.Credentials{bad, {}, {Username: "user"}} {
		if _, err := client(nil).Login(ctx, host, c); !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "s3cre") {
			t.Errorf("%+v: %v", c, err)
		}
	}
	ep := Endpoint{Domain: host, Scheme: "http", Host: host}
	content, desc := random(1000)
	for name, c := range map[string]*Client{"nobody": client(nil), "wrong": withLogin(t, nil, map[string]credentials.Credentials{host: bad})} {
		if err := c.PutBlob(ctx, ep, "a", knownBlob(content)); !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "s3cre") {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := withLogin(t, nil, map[string]credentials.Credentials{host: good})
	if err := c.PutBlob(ctx, ep, "a", knownBlob(content)); err != nil {
		t.Fatal(err)
	}
	if n, ok, err := c.HasBlob(ctx, ep, "a", desc.Digest); n != 1000 || !ok || err != nil {
		t.Fatal(n, ok, err)
	}
	if _, err := c.Tags(ctx, host, "none"); !errors.Is(err, ErrNameUnknown) {
		t.Fatal(err)
	}
}

func TestIdentityToken(t *testing.T) {
	var host string
	var posts, gets atomic.Int32
	manifest := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
	oauthOnly := false
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			user, pass, _ := r.BasicAuth()
			switch {
			case r.Method == http.MethodPost:
				posts.Add(1)
				ok := r.FormValue("grant_type") == "refresh_token" && r.FormValue("refresh_token") == "REFRESH" ||
					oauthOnly && r.FormValue("grant_type") == "password" && r.FormValue("username") == "user" && r.FormValue("password") == "s3cret"
				if !ok || r.FormValue("service") != "s" || r.FormValue("client_id") == "" || r.URL.RawQuery != "" {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				io.WriteString(w, `{"access_token":"T","refresh_token":"REFRESH"}`)
			case oauthOnly:
				w.WriteHeader(http.StatusMethodNotAllowed)
			case user == "user" && pass == "s3cret":
				gets.Add(1)
				if r.URL.Query().Get("offline_token") == "true" {
					io.WriteString(w, `{"token":"T","refresh_token":"REFRESH"}`)
					return
				}
				io.WriteString(w, `{"token":"T"}`)
			default:
				w.WriteHeader(http.StatusUnauthorized)
				io.WriteString(w, `{"details":"incorrect username or password"}`)
			}
			return
		}
		if r.Header.Get("Authorization") != "Bearer T" {
			w.Header().Add("WWW-Authenticate", `Basic realm="also"`)
			w.Header().Add("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		io.WriteString(w, manifest)
	}))
	ctx := context.Background()
	pass := credentials.Credentials{Username: "user", Password: "s3cret"}
	for range 2 {
		if id, err := client(nil).Login(ctx, host, pass); err != nil || id != "REFRESH" {
			t.Fatalf("%q, %v", id, err)
		}
		for _, creds := range []credentials.Credentials{pass, {Username: "user", IdentityToken: "REFRESH"}, {RegistryToken: "T"}} {
			if _, _, _, err := withLogin(t, nil, map[string]credentials.Credentials{host: creds}).Resolve(ctx, host, "a", "x"); err != nil {
				t.Errorf("%+v: %v", creds, err)
			}
		}
		for _, creds := range []credentials.Credentials{{Username: "user", IdentityToken: "s3cret"}, {RegistryToken: "s3cret"}, {Username: "user", Password: "s3cret2"}} {
			_, _, _, err := withLogin(t, nil, map[string]credentials.Credentials{host: creds}).Resolve(ctx, host, "a", "x")
			if !errors.Is(err, ErrDenied) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%+v: %v", creds, err)
			}
		}
		oauthOnly = true
	}
}

// TestExpiredToken has a registry that ends tokens sooner than they say.
func TestExpiredToken(t *testing.T) {
	var host string
	var issued, refused atomic.Int32
	manifest := `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{}}`
	host = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			fmt.Fprintf(w, `{"token":"T%d","expires_in":3600}`, issued.Add(1))
		case r.Header.Get("Authorization") != fmt.Sprintf("Bearer T%d", issued.Load()) || strings.Contains(r.URL.Path, "never"):
			refused.Add(1)
			w.Header().Add("WWW-Authenticate", `Bearer realm="http://`+host+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			io.WriteString(w, manifest)
		}
	}))
	c := client(nil)
	for i := range 3 {
		if _, _, _, err := c.Resolve(context.Background(), host, "a", "x"); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		issued.Add(1) // the present token is none any more
	}
	refused.Store(0)
	if _, _, _, err := c.Resolve(context.Background(), host, "never", "x"); !errors.Is(err, ErrDenied) || refused.Load() != 2 {
		t.Errorf("%d refusals, %v", refused.Load(), err)
	}
}

// TestCredentialsStayHome follows everything that a registry can do to make us show credentials to somebody else.
func TestCredentialsStayHome(t *testing.T) {
	var leaked atomic.Int32
	thief := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("Authorization") != "" || r.Header.Get("Referer") != "" || strings.Contains(string(body)+r.URL.String(), "s3cret") {
			leaked.Add(1)
			t.Errorf("%s %s came with %v %s", r.Method, r.URL, r.Header, body)
		}
		w.Header().Add("WWW-Authenticate", `Basic realm="give"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	thief = strings.Replace(thief, "127.0.0.1", "localhost", 1)
	content, desc := random(10)
	creds := credentials.Credentials{Username: "user", Password: "s3cret"}
	host := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.Header().Add("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", "http://"+thief+"/upload")
			w.WriteHeader(http.StatusAccepted)
			return
		}
		http.Redirect(w, r, "http://"+thief+"/x", http.StatusTemporaryRedirect)
	}))
	c := withLogin(t, nil, map[string]credentials.Credentials{host: creds})
	ep := Endpoint{Domain: host, Scheme: "http", Host: host}
	ctx := context.Background()
	c.Resolve(ctx, host, "a", "x")
	c.Blob(ctx, ep, "a", desc)
	c.PutBlob(ctx, ep, "a", knownBlob(content))
	c.PutManifest(ctx, ep, "a", "x", ocispec.MediaTypeImageManifest, []byte("{}"))
	c.Tags(ctx, host, "a")
	// A token service that sends us on, with each kind of credentials.
	var tokens string
	tokens = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			http.Redirect(w, r, "http://"+thief+"/token", http.StatusTemporaryRedirect)
			return
		}
		w.Header().Add("WWW-Authenticate", `Bearer realm="http://`+tokens+`/token",service="s"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	for _, creds := range []credentials.Credentials{creds, {Username: "user", IdentityToken: "s3cret"}} {
		if _, _, _, err := withLogin(t, nil, map[string]credentials.Credentials{tokens: creds}).Resolve(ctx, tokens, "a", "x"); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Error(err)
		}
	}
	// Plain http to another machine.
	far := Endpoint{Scheme: "http", Host: "registry.example"}
	for _, ch := range []string{`Basic realm="x"`, `Bearer realm="http://tokens.example/token"`, `Bearer realm="http://registry.example/token"`} {
		if _, _, err := client(nil).answer(ctx, far, nil, creds, []string{ch}, false); err == nil || !strings.Contains(err.Error(), "plain http") {
			t.Errorf("%s: %v", ch, err)
		}
	}
	allowed := client(map[string]config.Registry{"registry.example": {PlainHTTP: true}})
	if tok, _, err := allowed.answer(ctx, far, nil, creds, []string{`Basic realm="x"`}, false); err != nil || tok.value == "" {
		t.Errorf("allowed: %v", err)
	}
	if _, _, err := allowed.answer(ctx, far, nil, creds, []string{`Bearer realm="http://tokens.example/token"`}, false); err == nil {
		t.Error("the token service of another machine got credentials in the clear")
	}
}

// TestTokenServers has services that hang, lie and talk without end.
func TestTokenServers(t *testing.T) {
	quit := make(chan struct{})
	defer close(quit)
	for name, h := range map[string]http.HandlerFunc{
		"hangs": func(w http.ResponseWriter, r *http.Request) { <-quit },
		"drips": func(w http.ResponseWriter, r *http.Request) {
			for {
				io.WriteString(w, " ")
				w.(http.Flusher).Flush()
				select {
				case <-quit:
					return
				case <-r.Context().Done():
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		},
		"endless": func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		},
		"html":         func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") },
		"none":         func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") },
		"header break": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"token":"a\r\nX: y"}`) },
		"huge token": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"token":%q}`, strings.Repeat("a", 100_000))
		},
		"always 429": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusTooManyRequests)
		},
		"loop": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) },
	} {
		tokens := serve(t, h)
		host := lie(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+tokens+`/token",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
		}, nil)
		c := client(nil)
		c.tokenTime = 300 * time.Millisecond
		_, _, _, err := c.Resolve(context.Background(), host, "p", "x")
		if err == nil || !strings.Contains(err.Error(), "token from "+tokens) || strings.ContainsAny(err.Error(), "\n\r") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzToken(f *testing.F) {
	f.Add([]byte(`{"token":"a","expires_in":1}`))
	f.Add([]byte(`{"access_token":"a\n","refresh_token":"b","expires_in":99999999999}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		now := time.Now()
		tok, _, err := parseToken(raw, now)
		if err == nil && (!fitsHeader(strings.TrimPrefix(tok.value, "Bearer ")) || tok.expires.Before(now) || tok.expires.After(now.Add(24*time.Hour))) {
			t.Fatalf("%+v", tok)
		}
	})
}
