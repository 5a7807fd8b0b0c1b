package credentials

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// open gives the test a folder of its own for everything that Open looks at.
func open(t *testing.T, config string) *Store {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", filepath.Join(dir, "docker"))
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("XDG_RUNTIME_DIR", dir)
	s := Open()
	s.fallback = []string{filepath.Join(dir, "containers/auth.json")}
	if config != "" {
		write(t, s.path, config)
	}
	return s
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestGet(t *testing.T) {
	s := open(t, `{
	"auths": {
		"https://index.docker.io/v1/": {"auth": "aHViOnB3"},
		"localhost:5000": {"username": "u", "password": "p:w"},
		"https://ghcr.io/v2/": {"auth": "Z2g6cDp3"},
		"token.io": {"auth": "dTo=", "identitytoken": "IDT"},
		"direct.io": {"registrytoken": "RT"},
		"empty.io": {},
		"two.io/team": {"auth": "dDp0"}, "two.io": {"auth": "YTph"},
		"only.io/team": {"auth": "dDp0"}
	},
	"HttpHeaders": {"X": "y"}
}`)
	write(t, s.fallback[0], `{"auths": {"empty.io": {"auth": "cG9kbWFuOnB3"}, "docker.io": {"auth": "eDp4"}}}`)
	for server, want := range map[string]Credentials{
		"docker.io": {Username: "hub", Password: "pw"}, "registry-1.docker.io": {Username: "hub", Password: "pw"}, Hub: {Username: "hub", Password: "pw"},
		"localhost:5000": {Username: "u", Password: "p:w"}, "ghcr.io": {Username: "gh", Password: "p:w"}, "https://GHCR.io/x": {Username: "gh", Password: "p:w"},
		"token.io": {Username: "u", IdentityToken: "IDT"}, "direct.io": {RegistryToken: "RT"}, "empty.io": {Username: "podman", Password: "pw"},
		"two.io": {Username: "a", Password: "a"}, "only.io": {Username: "t", Password: "t"}, "localhost": {}, "io": {}, "evil-ghcr.io": {}, "ghcr.io:443": {},
	} {
		if got, err := s.Get(context.Background(), server); err != nil || got != want {
			t.Errorf("%s: %+v, %v", server, got, err)
		}
	}
	for text, want := range map[string]string{
		`{"auths": {"a": {"auth": "!"}}}`:             `"auth" is not base64`,
		`{"auths": {"a": {"auth": "c2VjcmV0"}}}`:      `"auth" is not name:password`,
		`{"auths": {"a": {"auth": ["secret"]}}}`:      "config.json",
		`{"auths": {"a": {"auth": "secret`:            "not JSON",
		`{"auths": [], "credsStore": "x"}`:            "config.json",
		`{"credsStore": "../../bin/sh"}`:              "no name of a credential helper",
		`{"credsStore": "no-such-helper-of-anybody"}`: "is not in PATH",
	} {
		s := open(t, text)
		_, err := s.Get(context.Background(), "a")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", text, err)
		}
	}
	if c, err := open(t, "").Get(context.Background(), "a"); err != nil || !c.IsZero() {
		t.Errorf("no file: %+v, %v", c, err)
	}
}

func TestPutAndDelete(t *testing.T) {
	s := open(t, `{"auths": {"other.io": {"auth": "YTph", "email": "e"}, "http://here.io/v1/": {"auth": "b2xkOm9sZA=="}}, "psFormat": "x", "big": 12345678901234567890}`)
	ctx := context.Background()
	for server, c := range map[string]Credentials{"here.io": {Username: "n", Password: "p:w"}, "docker.io": {Username: "h", IdentityToken: "T"}} {
		if h, err := s.Put(ctx, server, c); h != "" || err != nil {
			t.Fatal(h, err)
		}
		if got, err := s.Get(ctx, server); err != nil || got != c {
			t.Fatalf("%s: %+v, %v", server, got, err)
		}
	}
	raw, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"psFormat": "x"`, `"big": 12345678901234567890`, `"email": "e"`, `"https://index.docker.io/v1/": {`, "\t\"auths\""} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("%s\nlacks %s", raw, want)
		}
	}
	if st, err := os.Stat(s.path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := s.Delete(ctx, "https://here.io"); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, "never.io"); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(ctx, "here.io"); err != nil || !got.IsZero() {
		t.Errorf("after logout: %+v, %v", got, err)
	}
	if got, err := s.Get(ctx, "other.io"); err != nil || got.Username != "a" {
		t.Errorf("the other: %+v, %v", got, err)
	}
	// A file that nobody can read is not overwritten.
	s = open(t, "{not json")
	if _, err := s.Put(ctx, "a", Credentials{Username: "u", Password: "p"}); err == nil {
		t.Error("a broken file was replaced")
	}
	s = open(t, `{"auths": null}`)
	if _, err := s.Put(ctx, "a", Credentials{Username: "u", Password: "p"}); err != nil {
		t.Error(err)
	}
}

// TestLinkedFile keeps a link to the file, as people have who keep their settings elsewhere.
func TestLinkedFile(t *testing.T) {
	s := open(t, "")
	real := filepath.Join(t.TempDir(), "real.json")
	write(t, real, "{}")
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, s.path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(context.Background(), "a", Credentials{Username: "u", Password: "p"}); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(s.path); err != nil || st.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, %v", st, err)
	}
}

func TestConcurrent(t *testing.T) {
	s := open(t, "")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, err := s.Put(context.Background(), fmt.Sprintf("r%d.io", i), Credentials{Username: "u", Password: "p"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f, err := read(s.path)
	if err != nil || len(f.Auths) != 20 {
		t.Fatalf("%d entries, %v", len(f.Auths), err)
	}
}

// helperScript is a credential helper that keeps everything in one folder.
const helperScript = `#!/bin/sh
dir=$HELPER_DIR
case $1 in
store) cat >$dir/stored;;
get) read -r s; [ "$s" = here.io ] && [ -f $dir/stored ] && exec cat $dir/stored
	[ "$s" = bad.io ] && { echo "the keyring is locked"; exit 1; }
	[ "$s" = garbage.io ] && { echo "secret{"; exit 0; }
	echo "credentials not found in native keychain"; exit 1;;
erase) read -r s; rm $dir/stored;;
esac
`

func TestHelpers(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-here"), []byte(helperScript), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("HELPER_DIR", dir)
	ctx := context.Background()
	for _, config := range []string{`{"credsStore": "here"}`, `{"credHelpers": {"https://here.io": "here", "bad.io": "here", "garbage.io": "here"}}`} {
		s := open(t, config)
		if c, err := s.Get(ctx, "here.io"); err != nil || !c.IsZero() {
			t.Fatalf("before: %+v, %v", c, err)
		}
		for _, want := range []Credentials{{Username: "u", Password: "p"}, {IdentityToken: "T"}} {
			if h, err := s.Put(ctx, "here.io", want); err != nil || h != "here" {
				t.Fatal(h, err)
			}
			if c, err := s.Get(ctx, "here.io"); err != nil || c != want {
				t.Fatalf("%+v, %v", c, err)
			}
			raw, err := os.ReadFile(s.path)
			if err != nil || !strings.Contains(string(raw), `"here.io": {}`) {
				t.Fatalf("%s, %v", raw, err)
			}
		}
		for server, want := range map[string]string{"bad.io": "the keyring is locked", "garbage.io": "not JSON"} {
			if _, err := s.Get(ctx, server); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v", server, err)
			}
		}
		if err := s.Delete(ctx, "here.io"); err != nil {
			t.Fatal(err)
		}
		if c, err := s.Get(ctx, "here.io"); err != nil || !c.IsZero() {
			t.Fatalf("after: %+v, %v", c, err)
		}
	}
}

func TestCheckServer(t *testing.T) {
	for in, want := range map[string]string{"localhost:5000": "localhost:5000", "https://a.b/v2/": "a.b", Hub: "docker.io", "[::1]:5000": "[::1]:5000", "": "", "a b": "", "u@h": "", "https://": "", "a:b:c": ""} {
		if got, err := CheckServer(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"a":{"auth":"YTph"}},"credHelpers":{"b":"c"}}`))
	f.Add([]byte(`{"auths":{"https://a/v1/":null}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var c file
		if json.Unmarshal(raw, &c) != nil {
			return
		}
		c.Helpers, c.Store = nil, ""
		for key := range c.Auths {
			if got, err := c.get(context.Background(), key); err != nil && !got.IsZero() {
				t.Fatalf("%+v with %v", got, err)
			}
		}
	})
}
