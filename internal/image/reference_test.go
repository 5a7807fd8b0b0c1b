package image

import (
	"strings"
	"testing"

	dist "github.com/distribution/reference"
)

const hex64 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParseReference(t *testing.T) {
	for _, c := range []struct{ in, full, familiar string }{
		{"nginx", "docker.io/library/nginx:latest", "nginx:latest"},
		{"nginx:1.25", "docker.io/library/nginx:1.25", "nginx:1.25"},
		{"me/app", "docker.io/me/app:latest", "me/app:latest"},
		{"docker.io/nginx", "docker.io/library/nginx:latest", "nginx:latest"},
		{"index.docker.io/nginx", "docker.io/library/nginx:latest", "nginx:latest"},
		{"localhost/x", "localhost/x:latest", "localhost/x:latest"},
		{"localhost:5000/x:y", "localhost:5000/x:y", "localhost:5000/x:y"},
		{"[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"},
		{"ghcr.io/a/b__c/d---e", "ghcr.io/a/b__c/d---e:latest", "ghcr.io/a/b__c/d---e:latest"},
		{"UP/x", "UP/x:latest", "UP/x:latest"},
		{"library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"},
		{"nginx@sha256:" + hex64, "docker.io/library/nginx@sha256:" + hex64, "nginx@sha256:" + hex64},
		{"nginx:a@sha256:" + hex64, "docker.io/library/nginx:a@sha256:" + hex64, "nginx:a@sha256:" + hex64},
	} {
		r, err := ParseReference(c.in)
		if err != nil || r.String() != c.full || r.Familiar() != c.familiar {
			t.Errorf("%s: got %q, %q, %v; want %q, %q", c.in, r, r.Familiar(), err, c.full, c.familiar)
		}
	}
}

func TestParseReferenceErrors(t *testing.T) {
	for in, want := range map[string]string{
		"Foo":                                "invalid reference format: repository name (library/Foo) must be lowercase",
		"a/Foo:x":                            "invalid reference format: repository name (a/Foo) must be lowercase",
		"":                                   "invalid reference format",
		"a:":                                 "invalid reference format",
		"a:b:c":                              "invalid reference format",
		"a//b":                               "invalid reference format",
		"a___b":                              "invalid reference format",
		"-a":                                 "invalid reference format",
		"a@sha256:12":                        "invalid reference format",
		"../../etc/passwd":                   "invalid reference format",
		hex64:                                "invalid repository name (" + hex64 + "), cannot specify 64-byte hexadecimal strings",
		"a@sha256:" + hex64[:40]:             "invalid checksum digest length",
		"a@nope:" + hex64:                    "unsupported digest algorithm",
		"x.io/" + strings.Repeat("a", 256):   "repository name must not be more than 255 characters",
		"a:" + strings.Repeat("t", maxTag+1): "invalid reference format",
	} {
		if r, err := ParseReference(in); err == nil || err.Error() != want {
			t.Errorf("%q: got %q, %v; want %q", in, r, err, want)
		}
	}
}

// FuzzReference holds our parser equal to Docker's own package.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"nginx", "a/b:c", "localhost:5000/x@sha256:" + hex64, "[::1]/x", "A.b/c", "a__b--c.d/e", "x_y.z/q", "a@sha512:" + hex64 + hex64,
		"host.name-1:80/a", "foo.com:/x", "İ/x", "a.b.c", "::/x", "[]/x", "a@a1.b:" + hex64, ".x/y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseReference(s)
		want, werr := dist.ParseNormalizedNamed(s)
		if werr == nil && dist.Domain(want) == "" {
			// The package takes a first part that is no valid host as a part of the path, and then has no registry at
			// all. We refuse that.
			if err == nil {
				t.Fatalf("%q: got %q for a reference without registry", s, got)
			}
			return
		}
		if (err == nil) != (werr == nil) {
			t.Fatalf("%q: got %v, package says %v", s, err, werr)
		}
		if err != nil {
			return
		}
		w := dist.TagNameOnly(want)
		if got.String() != w.String() || got.Familiar() != dist.FamiliarString(w) || got.Domain() != dist.Domain(w) ||
			got.Path() != dist.Path(w) || got.Name() != w.Name() || got.FamiliarName() != dist.FamiliarName(w) {
			t.Fatalf("%q: got %q %q, package %q %q", s, got, got.Familiar(), w, dist.FamiliarString(w))
		}
		again, err := ParseReference(got.String())
		if err != nil || again != got {
			t.Fatalf("%q: not stable: %q, %v", s, again, err)
		}
		if n := fileName(got); strings.ContainsRune(n, '/') || len(n) > 250 || strings.HasPrefix(n, ".") {
			t.Fatalf("%q: file name %q", s, n)
		}
	})
}
