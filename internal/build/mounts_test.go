package build

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// holds reports files below dir with text in them, or in their names.
func holds(t *testing.T, dir, text string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(text)) || strings.Contains(path, text) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Two steps that have a private cache at the same time have a folder each; one after the other they have the same.
func TestPrivateCaches(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	const both = `FROM busybox AS %s
RUN --mount=type=cache,id=box,target=/box --mount=type=cache,id=p,sharing=private,target=/p \
  touch /box/%s /p/%s; until test -e /box/a -a -e /box/b; do sleep 0.01; done; ls /p > /of-%s
`
	file := strings.ReplaceAll(both, "%s", "a") + strings.ReplaceAll(both, "%s", "b") + "FROM busybox\nCOPY --from=a /of-a /\nCOPY --from=b /of-b /\n"
	tree := e.tree(e.must(file))
	if a, b := tree["of-a"], tree["of-b"]; !strings.HasSuffix(a, " a\n") || !strings.HasSuffix(b, " b\n") {
		t.Errorf("private caches held %q and %q", a, b)
	}
	dirs, err := filepath.Glob(e.root.Path("buildcache", "mount", "*", "?"))
	if err != nil || len(dirs) != 4 {
		t.Errorf("%v %v", dirs, err)
	}
	tree = e.tree(e.must("FROM busybox\nRUN --mount=type=cache,id=p,sharing=private,target=/p ls /p > /first; touch /p/c\nRUN --mount=type=cache,id=p,sharing=private,target=/p ls /p > /second\n"))
	if first, second := tree["first"], tree["second"]; len(first) != len("644 0:0 a\n") || second != first+"c\n" {
		t.Errorf("one after the other: %q, then %q", first, second)
	}
	e.clean()
}

// A step may have one cache at two places, and bind mounts may come from anywhere.
func TestMountSources(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	e.write("f", "context")
	tree := e.tree(e.must(`FROM busybox
WORKDIR /w
RUN --mount=type=cache,id=x,sharing=locked,target=/a --mount=type=cache,id=x,target=/b touch /a/y; ls /b > /same
RUN --mount=target=. ls > /here
RUN --mount=from=scratch,target=/e,rw touch /e/x; ls /e > /scratch
RUN --mount=from=busybox,source=/bin/sh,target=/tool test -x /tool && echo image > /image
ARG D=/dyn U=7
RUN --mount=type=cache,target=$D,uid=${U},mode=0750 stat -c '%a %u' /dyn > /dyn1
`))
	for p, want := range map[string]string{"same": "y\n", "here": "Dockerfile\nf\n", "scratch": "x\n", "image": "image\n", "dyn1": "750 7\n"} {
		if tree[p] != "644 0:0 "+want {
			t.Errorf("%s: %q, want %q", p, tree[p], want)
		}
	}
	e.clean()
}

// A secret is nowhere but in its step: the key does not change with it, and no file has it.
func TestSecretStaysOut(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	secret := filepath.Join(t.TempDir(), "s")
	with := func(value string) func(*Request) {
		if err := os.WriteFile(secret, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("CONEX_TEST_SECRET", value)
		return func(r *Request) { r.Secrets = map[string]Secret{"f": {File: secret}, "v": {Env: "CONEX_TEST_SECRET"}} }
	}
	file := "FROM busybox\nRUN --mount=type=secret,id=f --mount=type=secret,id=v,env=V test \"$(cat /run/secrets/f)\" = \"$V\" && echo $V | wc -c > /len\n"
	first := e.must(file, with("h1dden-value"))
	if got := e.tree(first)["len"]; got != "644 0:0 13\n" {
		t.Errorf("the step saw %q", got)
	}
	for _, dir := range []string{e.root.Path(), e.state} {
		if found := holds(t, dir, "h1dden-value"); len(found) > 0 {
			t.Errorf("the secret lies in %v", found)
		}
	}
	if second := e.must(file, with("another")); second.ID != first.ID {
		t.Error("another value made another image")
	}
	if _, err := e.build("FROM busybox\nRUN --mount=type=secret,id=v,env=V true\n", func(r *Request) {
		if err := os.WriteFile(secret, []byte("h1dden\x00"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.Secrets = map[string]Secret{"v": {File: secret}}
	}); err == nil || strings.Contains(err.Error(), "h1dden") {
		t.Errorf("a secret with a NUL byte as a variable: %v", err)
	}
	e.clean()
}

// A build that is given up leaves nothing of a step's mounts, and the next one has its caches.
func TestCanceledMounts(t *testing.T) {
	e := newEnv(t)
	e.busybox()
	key, _ := keyFile(t)
	t.Setenv("CONEX_TEST_SECRET", "h1dden")
	with := func(r *Request) {
		r.Secrets = map[string]Secret{"s": {Env: "CONEX_TEST_SECRET"}}
		r.Agents = map[string]Agent{"default": {Paths: []string{key}}}
	}
	const mounts = "--mount=type=secret,id=s --mount=type=ssh --mount=type=cache,target=/c,sharing=private --mount=type=cache,target=/l,sharing=locked --mount=from=busybox,target=/b,rw"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e.write("Dockerfile", "FROM busybox\nRUN "+mounts+" touch /c/kept; echo up; exec sleep 600\n")
	req := Request{Context: e.ctx, Display: func(ev Event) {
		if ev.Kind == Output && ev.Text == "up\n" {
			cancel()
		}
	}}
	with(&req)
	if _, err := e.request(ctx, req); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	e.clean()
	if found := holds(t, e.root.Path(), "h1dden"); len(found) > 0 {
		t.Errorf("the secret lies in %v", found)
	}
	img := e.must("FROM busybox\nRUN "+mounts+" ls /c > /list\n", with)
	if got := e.tree(img)["list"]; got != "644 0:0 kept\n" {
		t.Errorf("the cache held %q", got)
	}
	e.clean()
}
