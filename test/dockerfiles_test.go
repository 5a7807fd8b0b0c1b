package test

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"conex/test/casefile"
	"conex/test/dockerfiles"
)

// TestDockerfiles builds every Dockerfile of the table in dockerfiles/ and compares the image, or the error, with what BuildKit made of
// the same input: configuration, history, and each file's type, mode, owner, content, links, attributes and, where it is not the
// moment of the build, time.
func TestDockerfiles(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the expectations were recorded on amd64")
	}
	cases, err := dockerfiles.Load("dockerfiles")
	if err != nil {
		t.Fatal(err)
	}
	wants, err := casefile.LoadWants("dockerfiles")
	if err != nil {
		t.Fatal(err)
	}
	rows := compatRows(t, "../docs/compat.md")
	w := newWorld(t)
	w.serveCases(cases)
	r, base := w.built(t, w.write("base/Dockerfile", "FROM busybox\n"))
	if base == nil {
		t.Fatal(r.stderr)
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			for _, r := range c.Rows() {
				if !rows[r] {
					t.Errorf("the difference %q has no row in docs/compat.md", r)
				}
			}
			want, err := c.Expect(wants[c.Name])
			if err != nil {
				t.Fatal(err)
			}
			diff := w.caseDiffers(t, c, want, base)
			switch {
			case diff == "" && c.Pending != "":
				t.Logf("no longer pending: %s", c.Pending)
			case c.Pending != "":
				t.Skipf("pending: %s\n%s", c.Pending, diff)
			case diff != "":
				t.Errorf("BuildKit has - and conex +:\n%s", diff)
			}
		})
	}
}

// caseDiffers builds one case and says how the result differs from want.
func (w *world) caseDiffers(t *testing.T, c *dockerfiles.Case, want []string, base *dockerfiles.Image) string {
	p, err := c.Write(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	r, img := w.built(t, append(c.BuildFlags(p), p.Context)...)
	if img == nil {
		if diff := c.CompareFailures(want, dockerfiles.Failure(r.stderr)); diff != "" {
			return diff + "\n" + r.stderr
		}
		return ""
	}
	got, err := c.Render(img, base)
	if err != nil {
		t.Fatal(err)
	}
	return dockerfiles.Compare(want, got)
}

// built builds an image and reads it; nil when the build failed.
func (w *world) built(t *testing.T, args ...string) (result, *dockerfiles.Image) {
	name := filepath.Join(t.TempDir(), "image.tar")
	r := w.try(append([]string{"build", "--progress", "plain", "--output", "type=oci,dest=" + name}, args...)...)
	if r.code != 0 {
		return r, nil
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := dockerfiles.ReadArchive(f)
	if err != nil {
		t.Fatal(err)
	}
	return r, img
}

// serveCases serves what the cases fetch, in the world's network namespace.
func (w *world) serveCases(cases []*dockerfiles.Case) {
	h, err := dockerfiles.Handler(cases)
	if err != nil {
		w.t.Fatal(err)
	}
	var l net.Listener
	w.inNetns(func() { l, err = net.Listen("tcp", dockerfiles.HTTPAddr) })
	if err != nil {
		w.t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	w.t.Cleanup(func() { srv.Close(); <-done })
}

// compatRows are the first cells of the tables in the given documents.
func compatRows(t *testing.T, names ...string) map[string]bool {
	rows := map[string]bool{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			if cells := strings.Split(line, "|"); len(cells) > 2 {
				rows[strings.TrimSpace(cells[1])] = true
			}
		}
	}
	return rows
}
