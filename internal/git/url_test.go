package git

import (
	"strings"
	"testing"
)

// TestParse holds the rules of BuildKit's dfgitutil and gitutil, as tried with its v0.34.2, and what is refused beyond.
func TestParse(t *testing.T) {
	commit := strings.Repeat("a", 40)
	for _, c := range []struct {
		in  string
		not bool // no git reference
		err string
		// remote, ref and subdir are what must come out; more is checked by hand.
		remote, ref, subdir string
	}{
		{in: "https://host/x.git", remote: "https://host/x.git"},
		{in: "https://host/x.git#main", remote: "https://host/x.git", ref: "main"},
		{in: "https://host/x.git#a/b:c/d", remote: "https://host/x.git", ref: "a/b", subdir: "c/d"},
		{in: "https://host/x.git#:c/../../d/", remote: "https://host/x.git", subdir: "d"},
		{in: "http://u:p@host:80/x.git#" + commit, remote: "http://u:p@host:80/x.git", ref: commit},
		{in: "HTTPS://host/x.git", remote: "https://host/x.git"},
		{in: "https://host/x", not: true},
		{in: "https://host/x.git/y", not: true},
		{in: "https://host/x.tar.gz", not: true},
		{in: "git://host/x", remote: "git://host/x"},
		{in: "ssh://git@host:22/x/y", remote: "ssh://git@host:22/x/y"},
		{in: "git@host:x/y", remote: "git@host:x/y"},
		{in: "git@host:x/y.git#v1:sub", remote: "git@host:x/y.git", ref: "v1", subdir: "sub"},
		{in: "git@host:x/y.git?ref=v1#v1", remote: "git@host:x/y.git"}, // the query is before the fragment, both say the same
		{in: "someone@host.example:x", remote: "someone@host.example:x"},
		{in: "github.com/x/y", remote: "https://github.com/x/y"},
		{in: "github.com/x/y#v1:z", remote: "https://github.com/x/y", ref: "v1", subdir: "z"},
		{in: "https://host/x.git?ref=v1&subdir=/a/b", remote: "https://host/x.git", ref: "v1", subdir: "a/b"},
		{in: "https://host/x.git?branch=v1", remote: "https://host/x.git", ref: "refs/heads/v1"},
		{in: "https://host/x.git?tag=v1", remote: "https://host/x.git", ref: "refs/tags/v1"},
		{in: "https://host/x.git?tag=refs/tags/v1#refs/tags/v1", remote: "https://host/x.git", ref: "refs/tags/v1"},
		{in: "https://host/x.git?mtime=commit&submodules&keep-git-dir=false", remote: "https://host/x.git"},
		{in: "https://host/x.git?fetch-by-commit&commit=" + commit, remote: "https://host/x.git"},
		{in: "https://host/x.git?ref=a#b", err: `ref conflicts: "b" vs "a"`},
		{in: "https://host/x.git?subdir=a#b:c", err: "subdir conflicts"},
		{in: "https://host/x.git?tag=a&branch=a", err: "branch conflicts with tag"},
		{in: "https://host/x.git?tag=a#a", err: "ref conflicts"},
		{in: "https://host/x.git?ref", err: `query "ref" has no value`},
		{in: "https://host/x.git?ref=a&ref=b", err: `query "ref" has multiple values`},
		{in: "https://host/x.git?what=a", err: `unexpected query "what"`},
		{in: "https://host/x.git?submodules=perhaps", err: "invalid submodules value"},
		{in: "https://host/x.git?mtime=now", err: "invalid mtime value"},
		{in: "https://host/x.git?checksum=xyz", err: "invalid checksum xyz"},
		{in: "https://host/x.git?fetch-by-commit", err: "requires a full commit id"},
		{in: "https://host/x.git#-x", err: `invalid git ref "-x"`},
		{in: "https://host/x.git#*", err: `invalid git ref "*"`},
		{in: "https://host/x.git#a..b", err: `invalid git ref`},
		{in: "https://host/x.git#a%0ab", err: `invalid git ref`},
		{in: "https://-oProxyCommand=x/x.git", err: "no host of that name"},
		{in: "ssh://-x@host/y", err: "no host of that name"},
		{in: "git:///x", err: "no host of that name"},
		{in: "ext::sh -c x", not: true},
		{in: "file:///x.git", not: true},
		{in: "fd::17/x", not: true},
		{in: "-x@host:y", not: true},
		{in: "a@-host:y", not: true},
		{in: "git@host:", not: true},
		{in: "./github.com/x", not: true},
		{in: "/x/y.git", not: true},
		{in: "x@y/z", not: true},
		{in: "", not: true},
	} {
		src, ok, err := Parse(c.in)
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v, want %q", c.in, err, c.err)
			}
		case err != nil || ok == c.not:
			t.Errorf("%s: ok %t, error %v", c.in, ok, err)
		case c.not:
		case src.Remote != c.remote || c.ref != "" && src.Ref != c.ref || src.Subdir != c.subdir:
			t.Errorf("%s: %+v", c.in, src)
		}
	}
	src, _, err := Parse("https://u:secret@host/x.git#v1:a")
	if err != nil || strings.Contains(src.String()+src.Shown(), "secret") {
		t.Errorf("%s, %v: the password shows", src, err)
	}
	if _, _, err := Parse("https://u:secret@host/x.git?what=a"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("%v: the password shows", err)
	}
}

// FuzzParse: what is taken can't be an option of git's, speak another protocol, or lead out.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"https://host/x.git#a:b", "git@host:x?ref=a#b", "github.com/x/y", "ssh://-x/y", "https://host/x.git?subdir=../..", "ext::x@y:z", "git://h/%00",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		src, ok, err := Parse(s)
		if !ok || err != nil {
			return
		}
		if strings.HasPrefix(src.Remote, "-") || strings.HasPrefix(src.Ref, "-") || strings.ContainsAny(src.Ref, "*? \n\x00") {
			t.Errorf("%q: %+v", s, src)
		}
		if strings.HasPrefix(src.Subdir, "/") || src.Subdir == ".." || strings.HasPrefix(src.Subdir, "../") {
			t.Errorf("%q: folder %q", s, src.Subdir)
		}
		scheme, _, hasScheme := strings.Cut(src.Remote, "://")
		if hasScheme && scheme != "https" && scheme != "http" && scheme != "git" && scheme != "ssh" {
			t.Errorf("%q: scheme %q", s, scheme)
		}
		if !hasScheme && strings.Contains(src.Remote, "::") && strings.Index(src.Remote, "::") < strings.Index(src.Remote, "@") {
			t.Errorf("%q: git would run a remote helper for %q", s, src.Remote)
		}
	})
}
