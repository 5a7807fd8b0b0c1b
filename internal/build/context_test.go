package build

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/layertar"
	"conex/internal/safepath"
)

func TestStdin(t *testing.T) {
	e := newEnv(t)
	build := func(in []byte, name string) (map[string]string, error) {
		t.Helper()
		img, err := e.request(t.Context(), Request{Context: "-", Stdin: bytes.NewReader(in), Dockerfile: name})
		if err != nil {
			return nil, err
		}
		return e.tree(img), nil
	}
	tree, err := build([]byte("FROM scratch\nCOPY <<a /a\nA\na\n"), "")
	if err != nil || tree["a"] != "644 0:0 A\n" {
		t.Errorf("Dockerfile on stdin: %v %v", tree, err)
	}
	if _, err := build([]byte("FROM scratch\nCOPY a /a\n"), ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("COPY without a context: %v", err)
	}
	archive := tarball(t,
		tar.Header{Typeflag: tar.TypeReg, Name: "./Dockerfile", Linkname: "FROM scratch\nCOPY . /\n"},
		tar.Header{Typeflag: tar.TypeReg, Name: "other/D", Linkname: "FROM scratch\nCOPY x /only\n"},
		tar.Header{Typeflag: tar.TypeReg, Name: "x", Linkname: "X", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeReg, Name: "ignored", Linkname: "I"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/etc/passwd"},
		tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "x"},
		tar.Header{Typeflag: tar.TypeReg, Name: ".dockerignore", Linkname: "ignored\nother\n.dockerignore\nDockerfile\n"},
	)
	for name, in := range map[string][]byte{"tar": archive, "gzip": gz(t, archive)} {
		tree, err := build(in, "")
		if err != nil || len(tree) != 3 || tree["x"] != "755 0:0 X" || tree["l"] != "-> /etc/passwd" || tree["h"] != "755 0:0 X" {
			t.Errorf("%s: %v %v", name, tree, err)
		}
	}
	if tree, err := build(archive, "other/D"); err != nil || len(tree) != 1 || tree["only"] == "" {
		t.Errorf("-f in a tar: %v %v", tree, err)
	}
	if _, err := build(archive, "none"); !errors.Is(err, ErrNoDockerfile) {
		t.Errorf("no such Dockerfile in the tar: %v", err)
	}
	if _, err := build([]byte("\x1f\x8b\x08garbage"), ""); err == nil {
		t.Error("garbage was built")
	}
	e.write("a", "A")
	img, err := e.request(t.Context(), Request{Context: e.ctx, Dockerfile: "-", Stdin: strings.NewReader("FROM scratch\nCOPY a /b\n")})
	if err != nil || e.tree(img)["b"] == "" {
		t.Errorf("-f - with a folder: %v", err)
	}
	e.clean()
}

func TestDockerfileElsewhere(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	p := filepath.Join(t.TempDir(), "My.Dockerfile")
	if err := os.WriteFile(p, []byte("FROM scratch\nCOPY . /\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p+".dockerignore", []byte("b\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e.write("b", "B")
	img, err := e.request(t.Context(), Request{Context: e.ctx, Dockerfile: p})
	if err != nil {
		t.Fatal(err)
	}
	e.wantTree(img, map[string]string{"a": "644 0:0 A"})
	e.write("sub/D", "FROM scratch\nCOPY a /\n")
	if _, err := e.request(t.Context(), Request{Context: e.ctx, Dockerfile: "sub/D"}); err != nil {
		t.Errorf("-f relative to the context: %v", err)
	}
}

// hostileTars are contexts that try to write elsewhere.
func hostileTars(t testing.TB) map[string][]byte {
	return map[string][]byte{
		"dots":          tarball(t, tar.Header{Typeflag: tar.TypeReg, Name: "../evil", Linkname: "E"}),
		"absolute":      tarball(t, tar.Header{Typeflag: tar.TypeReg, Name: "/evil", Linkname: "E"}),
		"through link":  tarball(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../.."}, tar.Header{Typeflag: tar.TypeReg, Name: "l/evil", Linkname: "E"}),
		"absolute link": tarball(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/tmp"}, tar.Header{Typeflag: tar.TypeReg, Name: "l/evil", Linkname: "E"}),
		"hard link out": tarball(t, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "../../../../etc/passwd"}),
		"device":        tarball(t, tar.Header{Typeflag: tar.TypeChar, Name: "d", Devmajor: 1, Devminor: 3}),
		"link as file":  tarball(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "f", Linkname: "../evil"}, tar.Header{Typeflag: tar.TypeReg, Name: "f", Linkname: "E"}),
		"cut":           tarball(t, tar.Header{Typeflag: tar.TypeReg, Name: "f", Linkname: strings.Repeat("E", 2000)})[:900],
	}
}

// extract unpacks a context and reports what appeared outside of it.
func extract(t testing.TB, data []byte) error {
	t.Helper()
	dir := t.TempDir()
	inside := filepath.Join(dir, "stage", "context")
	if err := os.MkdirAll(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	before := listing(t, dir, inside)
	f, err := safepath.OpenRoot(inside)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = extractContext(t.Context(), f, bytes.NewReader(data))
	if after := listing(t, dir, inside); after != before {
		t.Errorf("outside of the context:\n%s\nwas\n%s", after, before)
	}
	for _, p := range []string{"/evil", "/tmp/evil"} {
		if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s exists", p)
		}
	}
	return err
}

func listing(t testing.TB, dir, skip string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == skip {
			return fs.SkipDir
		}
		b.WriteString(p + "\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestHostileContext(t *testing.T) {
	for name, data := range hostileTars(t) {
		err := extract(t, data)
		switch name {
		case "absolute link", "through link", "link as file":
			// These are harmless, since every path is resolved inside the context.
			continue
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		var ee *layertar.EntryError
		if name != "cut" && !errors.As(err, &ee) {
			t.Errorf("%s: %v names no entry", name, err)
		}
	}
}

func FuzzContext(f *testing.F) {
	for _, data := range hostileTars(f) {
		f.Add(data)
	}
	f.Add(tarball(f, tar.Header{Typeflag: tar.TypeDir, Name: "a/", Mode: 0o755}, tar.Header{Typeflag: tar.TypeReg, Name: "a/b", Linkname: "x"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = extract(t, data) // whatever it says, nothing may appear outside
	})
}

// A shell's <(...) is a pipe.
func TestDockerfileFromPipe(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("FROM scratch\nCOPY a /b\n"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img, err := e.request(t.Context(), Request{Context: e.ctx, Dockerfile: fmt.Sprintf("/dev/fd/%d", r.Fd())})
	if err != nil {
		t.Fatal(err)
	}
	e.wantTree(img, map[string]string{"b": "644 0:0 A"})
}
