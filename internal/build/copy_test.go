package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/dockerfile"

	"golang.org/x/sys/unix"
)

// files is the context of the table: a name that ends in / is a folder, "->x" a link.
var copyFiles = map[string]string{
	"a": "A", "b": "B", "a.txt": "T", "d/x": "X", "d/s/y": "Y", "d/l": "->x", "empty/": "", "la": "->a", "ld": "->d", "dangling": "->nowhere",
	"out": "->../../etc/hostname", "sp ace": "S", "etc/passwd": "root:x:0:0:r:/root:/sh\nweb:x:33:44:w:/:/sh\n", "etc/group": "web:x:44:\nstaff:x:50:\n",
}

func TestCopy(t *testing.T) {
	const d755, owned = "755 0:0", "644 0:0 "
	for _, c := range []struct {
		name, file string
		want       map[string]string // nil: want an error that contains err
		err        string
		line       int
	}{
		{name: "file to name", file: "COPY a /x/y", want: map[string]string{"x": d755, "x/y": owned + "A"}},
		{name: "file to folder", file: "COPY a /x/", want: map[string]string{"x": d755, "x/a": owned + "A"}},
		{name: "relative to workdir", file: "WORKDIR /w\nCOPY a .\nCOPY b c", want: map[string]string{"w": d755, "w/a": owned + "A", "w/c": owned + "B"}},
		{name: "relative folder", file: "WORKDIR /w\nCOPY a s/", want: map[string]string{"w": d755, "w/s": d755, "w/s/a": owned + "A"}},
		{name: "several", file: "COPY a b /x/", want: map[string]string{"x": d755, "x/a": owned + "A", "x/b": owned + "B"}},
		{name: "several to no folder", file: "COPY a b /x", err: "must be a folder", line: 2},
		{name: "folder content", file: "COPY d /x", want: map[string]string{"x": d755, "x/x": owned + "X", "x/s": d755, "x/s/y": owned + "Y", "x/l": "-> x"}},
		{name: "folder with slash", file: "COPY d/ /x/", want: map[string]string{"x": d755, "x/x": owned + "X", "x/s": d755, "x/s/y": owned + "Y", "x/l": "-> x"}},
		{name: "empty folder", file: "COPY empty /x", want: map[string]string{"x": d755}},
		{name: "wildcard", file: "COPY a* /x/", want: map[string]string{"x": d755, "x/a": owned + "A", "x/a.txt": owned + "T"}},
		{name: "wildcard in the middle", file: "COPY */x /x/", want: map[string]string{"x": d755, "x/x": owned + "X"}},
		{name: "wildcard of nothing", file: "COPY a no*thing /x/", want: map[string]string{"x": d755, "x/a": owned + "A"}},
		{name: "wildcard of nothing at all", file: "COPY a /\nCOPY no*thing /x/", want: map[string]string{"a": owned + "A"}},
		{name: "link that is named", file: "COPY la /x", want: map[string]string{"x": owned + "A"}},
		{name: "link to a folder", file: "COPY ld /x/", want: map[string]string{"x": d755, "x/x": owned + "X", "x/s": d755, "x/s/y": owned + "Y", "x/l": "-> x"}},
		{name: "json form", file: `COPY ["sp ace", "/x/"]`, want: map[string]string{"x": d755, "x/sp ace": owned + "S"}},
		{name: "missing", file: "COPY a /\nCOPY nope /x", err: `"/nope": not found`, line: 3},
		{name: "dangling", file: "COPY dangling /x", err: `"/dangling": not found`, line: 2},
		{name: "outside", file: "COPY ../../a /x", want: map[string]string{"x": owned + "A"}},
		{name: "link outside", file: "COPY out /x", err: "not found", line: 2},
		{name: "chown numbers", file: "COPY --chown=5:6 d/x /n/x", want: map[string]string{"n": "755 5:6", "n/x": "644 5:6 X"}},
		{name: "chown number alone", file: "COPY --chown=5 a /", want: map[string]string{"a": "644 5:5 A"}},
		{name: "chown names", file: "COPY etc /etc\nCOPY --chown=web a /\nCOPY --chown=web:staff b /", want: map[string]string{
			"etc": d755, "etc/passwd": owned + copyFiles["etc/passwd"], "etc/group": owned + copyFiles["etc/group"], "a": "644 33:44 A", "b": "644 33:50 B"}},
		{name: "chown unknown", file: "COPY etc /etc\nCOPY --chown=nobody a /", err: "unable to find user nobody", line: 3},
		{name: "chmod", file: "COPY --chmod=4750 a /", want: map[string]string{"a": "4750 0:0 A"}},
		{name: "chmod of new folders", file: "COPY --chmod=640 d/x /n/x", want: map[string]string{"n": "750 0:0", "n/x": "640 0:0 X"}},
		{name: "chmod in words", file: "COPY --chmod=u+x,go=,g+u d /n/", want: map[string]string{"n": "755 0:0", "n/x": "770 0:0 X", "n/s": "770 0:0", "n/s/y": "770 0:0 Y", "n/l": "-> x"}},
		{name: "chmod nonsense in words", file: "COPY --chmod=u+q a /", err: "invalid chmod parameter", line: 2},
		{name: "checksum nonsense", file: "ADD --checksum=zz http://127.0.0.1/x /", err: "--checksum=zz: invalid checksum digest format", line: 2},
		{name: "wildcard and a link that leads nowhere", file: "COPY dang* /x/", err: `"/dangling": not found`, line: 2},
		{name: "parents keep their modes", file: "COPY --chmod=700 --chown=5 d/s /d/s\nFROM scratch\nCOPY --from=0 --parents d/./s/y /x/", want: map[string]string{"x": d755, "x/s": "700 5:5", "x/s/y": "700 5:5 Y"}},
		{name: "parents and any depth", file: "COPY --parents d/**/y **/x /x/", want: map[string]string{"x": d755, "x/d": d755, "x/d/s": d755, "x/d/s/y": owned + "Y", "x/d/x": owned + "X"}},
		{name: "chmod nonsense", file: "COPY --chmod=9 a /", err: "invalid chmod parameter", line: 2},
		{name: "exclude", file: "COPY --exclude=s --exclude=l d /x", want: map[string]string{"x": d755, "x/x": owned + "X"}},
		{name: "parents", file: "COPY --parents d/s/y a /x/", want: map[string]string{"x": d755, "x/a": owned + "A", "x/d": d755, "x/d/s": d755, "x/d/s/y": owned + "Y"}},
		{name: "heredoc", file: "ARG V=1\nCOPY <<one <<\"two\" /x/\nv=$V\none\nv=$V\ntwo", want: map[string]string{"x": d755, "x/one": owned + "v=1\n", "x/two": owned + "v=$V\n"}},
		{name: "variables", file: "ENV S=a D=/x\nCOPY $S ${D}/y", want: map[string]string{"x": d755, "x/y": owned + "A"}},
		{name: "folder over file", file: "COPY a /x\nCOPY d /x", err: `"/x" is not a folder`, line: 3},
		{name: "file over folder", file: "COPY d /q\nCOPY a /q/s\nCOPY b /q/x", want: map[string]string{"q": d755, "q/x": owned + "B", "q/l": "-> x", "q/s": d755, "q/s/y": owned + "Y", "q/s/a": owned + "A"}},
		{name: "name over link", file: "COPY d /q\nCOPY a /q/l", want: map[string]string{"q": d755, "q/x": owned + "A", "q/l": "-> x", "q/s": d755, "q/s/y": owned + "Y"}},
		{name: "from stage", file: "COPY --chown=7:8 d/x /x\nFROM scratch\nCOPY --from=0 /x /y", want: map[string]string{"y": "644 7:8 X"}},
		{name: "from named", file: "COPY d /d\nFROM scratch AS two\nCOPY a /\nFROM scratch\nCOPY --from=TWO /a /\nCOPY --from=0 /d/s /", want: map[string]string{"a": owned + "A", "y": owned + "Y"}},
		{name: "from nothing", file: "FROM scratch\nCOPY --from=0 /x /", err: "not found", line: 3},
		{name: "from later", file: "COPY --from=5 /x /", err: "invalid stage index 5", line: 2},
		{name: "workdir in stage", file: "WORKDIR /a\nWORKDIR b\nWORKDIR /a/b/../c", want: map[string]string{"a": d755, "a/b": d755, "a/c": d755}},
		{name: "workdir owner", file: "USER 12\nWORKDIR /a", want: map[string]string{"a": "755 12:12"}},
		{name: "url", file: "COPY http://127.0.0.1/x /", err: "source can't be a URL for COPY", line: 2},
		{name: "git", file: "COPY https://127.0.0.1/x.git /", err: "source can't be a git ref for COPY", line: 2},
		{name: "git ref", file: "ADD https://127.0.0.1/x.git#--upload-pack=x /", err: `invalid git ref "--upload-pack=x"`, line: 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t)
			for name, content := range copyFiles {
				e.write(name, content)
			}
			img, err := e.build("FROM scratch\n" + c.file + "\n")
			if c.want != nil {
				if err != nil {
					t.Fatal(err)
				}
				e.wantTree(img, c.want)
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Fatalf("error %v, want %q", err, c.err)
			}
			var se *StepError
			var pe *dockerfile.ParseError
			switch {
			case errors.As(err, &se):
				if se.Line != c.line {
					t.Errorf("line %d, want %d", se.Line, c.line)
				}
			case errors.As(err, &pe):
				if pe.Lines.First != c.line {
					t.Errorf("line %d, want %d", pe.Lines.First, c.line)
				}
			default:
				t.Errorf("%T has no place", err)
			}
		})
	}
}

// A destination that leads through the image's own links stays inside the image.
func TestCopyThroughLinks(t *testing.T) {
	e := newEnv(t)
	e.write("img/run/", "")
	e.write("img/var/run", "->/run")
	e.write("img/up", "->../../../run/..")
	e.write("a", "A")
	img := e.must("FROM scratch\nCOPY img /\nCOPY a /var/run/x/\nCOPY a /up/b\nCOPY a /var/run\n")
	e.wantTree(img, map[string]string{
		"run": "755 0:0", "run/x": "755 0:0", "run/x/a": "644 0:0 A", "run/a": "644 0:0 A", "var": "755 0:0", "var/run": "-> /run",
		"up": "-> ../../../run/..", "b": "644 0:0 A",
	})
}

// What COPY adds to a folder must not change the folder.
func TestCopyKeepsFolders(t *testing.T) {
	e := newEnv(t)
	e.write("d/x", "X")
	e.write("a", "A")
	if err := os.Chmod(filepath.Join(e.ctx, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	img := e.must("FROM scratch\nCOPY --chown=3:4 --chmod=700 d /p/q\nCOPY a /p/q/\nCOPY a /p/q/r/a\n")
	e.wantTree(img, map[string]string{
		"p": "700 3:4", "p/q": "700 3:4", "p/q/x": "700 3:4 X", "p/q/a": "644 0:0 A", "p/q/r": "755 0:0", "p/q/r/a": "644 0:0 A",
	})
}

func TestCopyKeepsTimesLinksXattrs(t *testing.T) {
	e := newEnv(t)
	e.write("d/x", "X")
	p := filepath.Join(e.ctx, "d/x")
	if err := os.Link(p, filepath.Join(e.ctx, "d/y")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(p, "user.k", []byte("v"), 0); err != nil {
		t.Skipf("no extended attributes here: %v", err)
	}
	ts := []unix.Timespec{{Sec: 1e9, Nsec: 123456789}, {Sec: 1e9, Nsec: 123456789}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, 0); err != nil {
		t.Fatal(err)
	}
	img := e.must("FROM scratch AS one\nCOPY d /d\nFROM scratch\nCOPY --from=one /d /e\n")
	root, err := openStage(t.Context(), e.b.Layers, img.Layers())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	sel, err := (&view{root: root}).selection(t.Context(), []string{"e"}, selectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	x, y := sel[0].items[1], sel[0].items[2]
	if x.st.Ino != y.st.Ino || x.st.Nlink != 2 {
		t.Error("the hard link became a copy")
	}
	if x.st.Mtim != 1e18+123456789 {
		t.Errorf("mtime %d", x.st.Mtim)
	}
	if len(x.xattrs) != 1 || x.xattrs[0] != "user.k\x00v" {
		t.Errorf("xattrs %q", x.xattrs)
	}
}

// Two names of one file stay one within a folder that is copied; what is named twice is copied twice.
func TestCopyHardLinks(t *testing.T) {
	e := newEnv(t)
	e.write("d/x", "X")
	if err := os.Link(filepath.Join(e.ctx, "d/x"), filepath.Join(e.ctx, "d/y")); err != nil {
		t.Fatal(err)
	}
	for file, same := range map[string]bool{"COPY d /e": true, "COPY d/x d/y /e/": false, "COPY d/* /e/": false} {
		img := e.must("FROM scratch\n" + file + "\n")
		root, err := openStage(t.Context(), e.b.Layers, img.Layers())
		if err != nil {
			t.Fatal(err)
		}
		sel, err := (&view{root: root}).selection(t.Context(), []string{"e"}, selectOptions{})
		root.Close()
		if err != nil {
			t.Fatal(err)
		}
		if x, y := sel[0].items[1], sel[0].items[2]; (x.st.Ino == y.st.Ino) != same {
			t.Errorf("%s: one file is %v, want %v", file, !same, same)
		}
	}
}

func TestFileThatVanishes(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	root, err := openContext(e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	v := &view{root: root}
	sel, err := v.selection(t.Context(), []string{"a"}, selectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(e.ctx, "a")); err != nil {
		t.Fatal(err)
	}
	if _, err := v.fingerprint(t.Context(), sel); err == nil || !strings.Contains(err.Error(), `read "/a": it was there and is gone`) {
		t.Errorf("error %v", err)
	}
}

func tarball(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		content := h.Linkname
		if h.Typeflag == tar.TypeReg {
			h.Size, h.Linkname = int64(len(content)), ""
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(content)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestAdd(t *testing.T) {
	e := newEnv(t)
	archive := tarball(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "p/", Mode: 0o750, Uid: 9, Gid: 8},
		tar.Header{Typeflag: tar.TypeReg, Name: "p/f", Linkname: "F", Uid: 9, Gid: 8},
		tar.Header{Typeflag: tar.TypeLink, Name: "p/g", Linkname: "p/f"},
		tar.Header{Typeflag: tar.TypeReg, Name: "./bin/tool", Linkname: "T"},
	)
	e.write("x.tar", string(archive))
	e.write("x.tgz", string(gz(t, archive)))
	e.write("plain.gz", string(gz(t, []byte("no tar"))))
	e.write("evil.tar", string(tarball(t, tar.Header{Typeflag: tar.TypeReg, Name: "../../evil", Linkname: "E"})))
	e.write("root/usr/bin/", "")
	e.write("root/bin", "->usr/bin")
	img := e.must("FROM scratch\nCOPY root /\nADD x.tgz /\nADD plain.gz /plain\nCOPY x.tar /\nADD --unpack=false x.tar /y.tar\n")
	got := e.tree(img)
	for p, w := range map[string]string{
		"p": "750 9:8", "p/f": "644 9:8 F", "p/g": "644 9:8 F", "usr/bin/tool": "644 0:0 T", "bin": "-> usr/bin",
	} {
		if got[p] != w {
			t.Errorf("%s: %q, want %q", p, got[p], w)
		}
	}
	for _, p := range []string{"plain", "x.tar", "y.tar"} {
		if got[p] == "" {
			t.Errorf("%s is missing", p)
		}
	}
	if got := e.tree(e.must("FROM scratch\nADD --chmod=600 x.tar /n/\n")); got["n"] != "755 0:0" || got["n/p/f"] != "644 9:8 F" {
		t.Errorf("--chmod reached what an archive holds: %v", got)
	}
	// As with tar, what the archive holds takes the place of what is there.
	e.write("old/p", "file")
	e.write("old2/p/f/in", "in a folder that a file replaces")
	e.write("old2/p/other", "O")
	e.write("old3/p", "->bin")
	e.write("old3/bin/x", "X")
	want := map[string]string{"p": "750 9:8", "p/f": "644 9:8 F", "p/g": "644 9:8 F", "bin": "755 0:0", "bin/tool": "644 0:0 T"}
	e.wantTree(e.must("FROM scratch\nCOPY old /\nADD x.tar /\n"), want)
	want["p/other"] = "644 0:0 O"
	e.wantTree(e.must("FROM scratch\nCOPY old2 /\nADD x.tar /\n"), want)
	delete(want, "p/other")
	want["bin/x"] = "644 0:0 X"
	e.wantTree(e.must("FROM scratch\nCOPY old3 /\nADD x.tar /\n"), want)
	_, err := e.build("FROM scratch\nADD evil.tar /\n")
	if err == nil || !strings.Contains(err.Error(), `"../../evil"`) {
		t.Errorf("evil archive: %v", err)
	}
}

func TestAddURL(t *testing.T) {
	e := newEnv(t)
	content := "hello"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/dir/file.txt" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")
		if _, err := w.Write([]byte(content)); err != nil {
			t.Error(err)
		}
	}))
	defer srv.Close()
	file := "FROM scratch\nADD " + srv.URL + "/dir/file.txt /x/\n"
	img := e.must(file)
	e.wantTree(img, map[string]string{"x": "755 0:0", "x/file.txt": "600 0:0 hello"})
	if again := e.must(file); again.ID != img.ID {
		t.Error("an unchanged download was copied again")
	}
	content = "other"
	e.wantTree(e.must(file), map[string]string{"x": "755 0:0", "x/file.txt": "600 0:0 other"})
	_, err := e.build("FROM scratch\nADD --checksum=sha256:" + strings.Repeat("0", 64) + " " + srv.URL + "/dir/file.txt /x/\n")
	if err == nil || !strings.Contains(err.Error(), "digest mismatch") {
		t.Errorf("wrong checksum: %v", err)
	}
	if _, err := e.build("FROM scratch\nADD " + srv.URL + "/none /x/\n"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("missing file: %v", err)
	}
}

func TestIgnore(t *testing.T) {
	e := newEnv(t)
	for _, f := range []string{"keep", "a.log", "logs/x.log", "logs/keep.log", "node_modules/m/i.js", "sub/node_modules/j", "sub/k", "deep/a/b/c", "deep/a/b/d"} {
		e.write(f, f)
	}
	e.write(".dockerignore", "# comment\n*.log\nlogs/*\n!logs/keep.log\n**/node_modules\ndeep\n!deep/a/b/c\nDockerfile*\n.dockerignore\n")
	got := e.tree(e.must("FROM scratch\nCOPY . /\n"))
	for _, p := range []string{"keep", "logs/keep.log", "sub/k", "deep/a/b/c"} {
		if got[p] == "" {
			t.Errorf("%s is missing", p)
		}
		delete(got, p)
	}
	for _, p := range []string{"logs", "sub", "deep", "deep/a", "deep/a/b"} {
		delete(got, p)
	}
	if len(got) > 0 {
		t.Errorf("not ignored: %v", got)
	}
	if _, err := e.build("FROM scratch\nCOPY a.log /\n"); !errors.Is(err, ErrNotFound) {
		t.Errorf("an ignored file that is named: %v", err)
	}
	if _, err := e.build("FROM scratch\nCOPY logs/keep.log /\n"); err != nil {
		t.Errorf("a file brought back: %v", err)
	}
	e.write("Dockerfile.dockerignore", "keep\n")
	got = e.tree(e.must("FROM scratch\nCOPY . /\n"))
	if got["keep"] != "" || got["a.log"] == "" {
		t.Error("Dockerfile.dockerignore does not stand above .dockerignore")
	}
}
