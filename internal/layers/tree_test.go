package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// everything makes a folder with one of everything.
func everything(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(at("d"), 0o750))
	must(os.WriteFile(at("d/f"), []byte("content"), 0o600))
	must(unix.Chmod(at("d/f"), 0o4711))
	must(os.Link(at("d/f"), at("z")))
	must(os.Symlink("../nowhere", at("d/l")))
	must(os.WriteFile(at(".wh.x"), nil, 0o644)) // an ordinary name in a tree that is no layer
	must(os.WriteFile(at("sparse"), nil, 0o644))
	must(os.Truncate(at("sparse"), 1<<20))
	must(unix.Mkfifo(at("p"), 0o640))
	must(unix.Mknod(at("c"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(os.Chown(at("c"), 3, 70000))
	must(unix.Lsetxattr(at("d/f"), "user.note", []byte("a\x00b"), 0))
	must(unix.Lsetxattr(at("d"), "trusted.overlay.opaque", []byte("y"), 0))
	l, err := net.Listen("unix", at("sock"))
	must(err)
	t.Cleanup(func() { l.Close() })
	when := time.Unix(1600000000, 123456789)
	must(os.Chtimes(at("d/f"), when, when))
	return dir
}

func writeTree(t *testing.T, dir string, changed func(string)) []byte {
	t.Helper()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var out bytes.Buffer
	if changed == nil {
		changed = func(p string) { t.Errorf("%s changed", p) }
	}
	if err := WriteTree(context.Background(), &out, root, changed); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestWriteTree(t *testing.T) {
	dir := everything(t)
	raw := writeTree(t, dir, nil)
	if again := writeTree(t, dir, nil); !bytes.Equal(raw, again) {
		t.Error("the same tree gives another tar the second time")
	}
	heads := map[string]*tar.Header{}
	var names []string
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "d/f" && string(b) != "content" || h.Name == "sparse" && !bytes.Equal(b, make([]byte, 1<<20)) {
			t.Errorf("%s: %d bytes", h.Name, len(b))
		}
		heads[h.Name], names = h, append(names, h.Name)
	}
	if want := []string{".wh.x", "c", "d/", "d/f", "d/l", "p", "sparse", "z"}; !slices.Equal(names, want) {
		t.Fatalf("entries %q, want %q", names, want)
	}
	f := heads["d/f"]
	if f.Mode != 0o4711 || f.ModTime.UnixNano() != 1600000000123456789 || f.PAXRecords["SCHILY.xattr.user.note"] != "a\x00b" {
		t.Errorf("d/f: mode %o, %v, %q", f.Mode, f.ModTime, f.PAXRecords)
	}
	if d := heads["d/"]; d.Mode != 0o750 || d.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] != "" {
		t.Errorf("d: mode %o, %q", d.Mode, d.PAXRecords)
	}
	if z := heads["z"]; z.Typeflag != tar.TypeLink || z.Linkname != "d/f" {
		t.Errorf("z: type %c to %q", z.Typeflag, z.Linkname)
	}
	if l := heads["d/l"]; l.Typeflag != tar.TypeSymlink || l.Linkname != "../nowhere" {
		t.Errorf("d/l: type %c to %q", l.Typeflag, l.Linkname)
	}
	if c := heads["c"]; c.Typeflag != tar.TypeChar || c.Devmajor != 1 || c.Devminor != 3 || c.Uid != 3 || c.Gid != 70000 {
		t.Errorf("c: %+v", c)
	}
	if heads["p"].Typeflag != tar.TypeFifo {
		t.Errorf("p: type %c", heads["p"].Typeflag)
	}
}

// cutter cuts a file off when its first bytes come by, and removes another.
type cutter struct {
	bytes.Buffer
	do func()
}

func (c *cutter) Write(p []byte) (int, error) {
	if c.do != nil {
		c.do()
		c.do = nil
	}
	return c.Buffer.Write(p)
}

// TestWriteLiveTree changes a tree while it is written.
func TestWriteLiveTree(t *testing.T) {
	dir := t.TempDir()
	big := bytes.Repeat([]byte("x"), 4<<20)
	for _, n := range []string{"a", "b", "c", "d"} {
		if err := os.WriteFile(filepath.Join(dir, n), big, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "c"), filepath.Join(dir, "e")); err != nil {
		t.Fatal(err)
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	out := &cutter{do: func() {
		for _, err := range []error{
			os.Truncate(filepath.Join(dir, "a"), 10), os.Remove(filepath.Join(dir, "b")), os.Remove(filepath.Join(dir, "c")),
			os.WriteFile(filepath.Join(dir, "d"), []byte("short"), 0o600),
		} {
			if err != nil {
				t.Error(err)
			}
		}
	}}
	var torn []string
	if err := WriteTree(context.Background(), out, root, func(p string) { torn = append(torn, p) }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(torn, []string{"a"}) {
		t.Errorf("told of %q", torn)
	}
	sizes := map[string]int64{}
	for r := tar.NewReader(&out.Buffer); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sizes[h.Name] = h.Size
		if n, err := io.Copy(io.Discard, r); err != nil || n != h.Size {
			t.Errorf("%s: %d bytes, %v", h.Name, n, err)
		}
	}
	if len(sizes) != 3 || sizes["a"] != 4<<20 || sizes["d"] != 5 || sizes["e"] != 4<<20 {
		t.Errorf("%v", sizes)
	}
}
