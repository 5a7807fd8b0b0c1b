package test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// secret is a value that must stay where it is given.
type secret struct {
	value string
	file  string
}

func (w *world) secret(name string) secret {
	w.t.Helper()
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		w.t.Fatal(err)
	}
	s := secret{value: "s3cr3t" + hex.EncodeToString(raw), file: filepath.Join(w.dir, name)}
	if err := os.WriteFile(s.file, []byte(s.value), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// wantNoTrace looks for the secret's bytes in every file of the world's data and state, and in what conex says of its builds and images.
// Each of found, which a build has left on purpose, must be there: the search sees what it looks at.
func (w *world) wantNoTrace(s secret, found ...string) {
	w.t.Helper()
	needles := [][]byte{[]byte(s.value), []byte(base64.StdEncoding.EncodeToString([]byte(s.value)))}
	seen := map[string]bool{}
	look := func(where string, data []byte) {
		for _, n := range needles {
			if bytes.Contains(data, n) {
				w.t.Errorf("the secret is in %s", where)
			}
		}
		for _, f := range found {
			seen[f] = seen[f] || bytes.Contains(data, []byte(f))
		}
	}
	for _, dir := range []string{w.root, w.state} {
		err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // the trash is being emptied
			}
			// What is mounted below the state is the layers, whose files were read.
			if err != nil || d.IsDir() && name == filepath.Join(w.state, "layers") {
				if err == nil {
					err = filepath.SkipDir
				}
				return err
			}
			look(name+"'s name", []byte(name))
			if !d.Type().IsRegular() {
				return nil
			}
			data, err := os.ReadFile(name)
			look(name, data)
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			return err
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	for _, id := range strings.Fields(w.conex("images", "-aq", "--no-trunc")) {
		look("history", []byte(w.conex("history", "--no-trunc", id)))
		look("inspect", []byte(w.conex("image", "inspect", id)))
	}
	for line := range strings.Lines(w.conex("build", "history", "ls", "--format", "{{.ID}}")) {
		id := strings.TrimSpace(line)
		look("build history inspect", []byte(w.conex("build", "history", "inspect", id)))
		look("build history logs", []byte(w.conex("build", "history", "logs", id)))
	}
	for _, f := range found {
		if !seen[f] {
			w.t.Errorf("%q is nowhere: the search saw nothing", f)
		}
	}
}

// A secret is known to the command that it is given to, and to nothing else: not when the step succeeds, not when it fails, and another
// value of it runs nothing again.
func TestBuildSecrets(t *testing.T) {
	w := newWorld(t)
	a, b := w.secret("a"), w.secret("b")
	dir := w.write("secrets/Dockerfile", `FROM busybox AS one
RUN --mount=type=secret,id=a sha256sum /run/secrets/a > /a.sum
RUN --mount=type=secret,id=a,target=/root/deep/key,mode=0440,uid=7 sha256sum < /root/deep/key > /deep.sum
RUN --mount=type=secret,id=b,env=TOKEN printf %s "$TOKEN" | sha256sum > /b.sum
RUN --mount=type=cache,target=/cache --mount=type=secret,id=a --mount=type=secret,id=b,env=TOKEN \
    test -n "$TOKEN" && sha256sum /run/secrets/a > /cache/sum && echo found the token
FROM one AS failing
RUN --mount=type=secret,id=a --mount=type=secret,id=b,env=TOKEN cat /run/secrets/a > /kept; echo "$TOKEN" > /kept2; echo gave up; exit 3
FROM one
`)
	w.env = append(w.env, "BUILD_B="+b.value)
	given := []string{"--secret", "id=a,src=" + a.file, "--secret", "id=b,env=BUILD_B"}
	args := append([]string{"build", "--progress", "plain", "-t", "secrets"}, append(given, dir)...)
	first := w.try(args...)
	if first.code != 0 || !strings.Contains(first.stderr, "found the token") {
		t.Fatalf("exit code %d\n%s", first.code, first.stderr)
	}
	failing := w.try(append([]string{"build", "--progress", "plain", "--target", "failing"}, append(given, dir)...)...)
	if failing.code == 0 || !strings.Contains(failing.stderr, "gave up") {
		t.Fatalf("exit code %d\n%s", failing.code, failing.stderr)
	}
	for _, s := range []secret{a, b} {
		if strings.Contains(first.stderr+first.stdout+failing.stderr+failing.stdout, s.value) {
			t.Error("the secret is in the output")
		}
	}
	sum := w.conex("run", "--rm", "secrets", "cat", "/a.sum", "/deep.sum", "/b.sum")
	for _, s := range []secret{a, b} {
		w.wantNoTrace(s, strings.Fields(sum)[0], "gave up")
	}
	if err := os.WriteFile(a.file, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantSteps(t, "other secret", parsePlain(w.try(args...).stderr))
}
