package layertar_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/exec"
	"strings"
	"testing"

	"conex/internal/layers/erofsindex"
	"conex/internal/layertar"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

func makeTar(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write(bytes.Repeat([]byte("c"), int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestSplit(t *testing.T) {
	for name, want := range map[string]string{"": "", ".": "", "./": "", "a": "a", "./a//b/": "a b", "a/./b": "a b", "..a/b..": "..a b..", "a/...": "a ..."} {
		if got, err := layertar.Split(name); err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"/", "/a", "..", "a/..", "../a", "a\x00", strings.Repeat("x", 256), strings.Repeat("x/", 2048)} {
		if got, err := layertar.Split(name); err == nil {
			t.Errorf("%q: accepted as %q", name, got)
		}
	}
}

func TestScanTree(t *testing.T) {
	data := makeTar(t,
		tar.Header{Name: "a/f", Typeflag: tar.TypeReg, Size: 700, Mode: 0o640, Uid: 7},
		tar.Header{Name: "a/f", Typeflag: tar.TypeReg, Size: 3, Mode: 0o600},
		tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "a/f"},
		tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700},
		tar.Header{Name: "d/sub/.wh.x", Typeflag: tar.TypeReg},
	)
	tree, err := layertar.Scan(bytes.NewReader(data), nil)
	if err != nil {
		t.Fatal(err)
	}
	f := tree.Lookup("a/f")
	if f == nil || f != tree.Lookup("h") || f.Nlink != 2 || f.Size != 3 || f.Mode != unix.S_IFREG|0o600 || string(data[f.Offset:f.Offset+f.Size]) != "ccc" {
		t.Errorf("the last entry of a name does not win, or its hard link is another file: %+v", f)
	}
	if got := strings.Join(tree.Implied(), " "); got != "a d/sub" {
		t.Errorf("implied: %s", got)
	}
	if w := tree.Lookup("d/sub/x"); w == nil || !w.IsWhiteout() {
		t.Errorf("whiteout: %+v", w)
	}
	if tree.ContentSize() != 3 || tree.Entries() != 5 || tree.Root().Nlink != 4 {
		t.Errorf("content %d, entries %d, root has %d links", tree.ContentSize(), tree.Entries(), tree.Root().Nlink)
	}
}

// GNU tar's three ways to write a sparse file give the same chunks.
func TestSparse(t *testing.T) {
	dir := t.TempDir()
	script := `truncate -s 1000000 s && printf hello | dd of=s bs=1 seek=500000 conv=notrunc status=none`
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, args := range [][]string{{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"}} {
		out, err := exec.Command("tar", append(args, "--sparse", "-C", dir, "-cf", "-", "s")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		var spill bytes.Buffer
		tree, err := layertar.Scan(bytes.NewReader(out), &spill)
		if err != nil {
			t.Errorf("%q: %v", args, err)
			continue
		}
		s := tree.Lookup("s")
		if s == nil || !s.Sparse || s.Size != 1_000_000 || len(s.Extents) != 1 || s.Extents[0].Off != 500_000&^4095 ||
			string(spill.Bytes()[500_000%4096:][:5]) != "hello" || spill.Len() != 4096 {
			t.Errorf("%q: %+v, spill of %d", args, s, spill.Len())
		}
	}
}

// FuzzLayertar feeds bytes as a tar. Whatever is accepted stays inside the root and inside the tar, and gives an index
// that another implementation of the format can walk and read.
func FuzzLayertar(f *testing.F) {
	f.Add(makeTar(f, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Size: 5}, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
		tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "a/b"}, tar.Header{Name: "a/.wh.c", Typeflag: tar.TypeReg},
		tar.Header{Name: "a/.wh..wh..opq", Typeflag: tar.TypeReg}))
	f.Add(makeTar(f, tar.Header{Name: "../x", Typeflag: tar.TypeReg}))
	f.Add(makeTar(f, tar.Header{Name: "d/", Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y", "SCHILY.xattr.trusted.overlay.opaque": "y"}},
		tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, tar.Header{Name: strings.Repeat("long/", 50), Typeflag: tar.TypeDir}))
	f.Fuzz(func(t *testing.T, data []byte) { check(t, withSums(data)) })
}

// withSums corrects the checksum of every block that says it is a header: without, the fuzzer would hardly ever get past it.
func withSums(data []byte) []byte {
	data = bytes.Clone(data)
	for n := 0; n+layertar.Block <= len(data); n += layertar.Block {
		b := data[n : n+layertar.Block]
		if string(b[257:262]) != "ustar" {
			continue
		}
		copy(b[148:], "        ")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	}
	return data
}

func check(t *testing.T, data []byte) {
	var spill bytes.Buffer
	tree, err := layertar.Scan(bytes.NewReader(data), &spill)
	if err != nil {
		if !errors.Is(err, layertar.ErrRefused) {
			t.Fatalf("an error that does not blame the tar: %v", err)
		}
		return
	}
	want := map[string]*layertar.Inode{}
	err = tree.Walk(func(path string, i *layertar.Inode) error {
		for part := range strings.SplitSeq(path, "/") {
			if path != "" && (part == "" || part == "." || part == ".." || len(part) > 255 || strings.Contains(part, "\x00")) {
				t.Errorf("path %q could leave the root", path)
			}
		}
		if i.Type() == unix.S_IFREG && !i.Sparse && i.Offset+i.Size > int64(len(data)) {
			t.Errorf("%q: content %d+%d lies outside the tar of %d", path, i.Offset, i.Size, len(data))
		}
		for _, e := range i.Extents {
			if e.At+layertar.SparseChunk > int64(spill.Len()) || e.Off >= i.Size {
				t.Errorf("%q: chunk %+v lies outside", path, e)
			}
		}
		want[path] = i
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var a, b bytes.Buffer
	if err := erofsindex.Write(&a, tree, int64(len(data)), int64(spill.Len())); err != nil {
		t.Fatal(err)
	}
	if err := erofsindex.Write(&b, tree, int64(len(data)), int64(spill.Len())); err != nil || !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Fatalf("two indexes of one tree differ (%v)", err)
	}
	var devices []io.ReaderAt
	if len(data) > 0 {
		devices = append(devices, bytes.NewReader(data))
	}
	if spill.Len() > 0 {
		devices = append(devices, bytes.NewReader(spill.Bytes()))
	}
	img, err := erofs.Open(bytes.NewReader(a.Bytes()), erofs.WithExtraDevices(devices...))
	if err != nil {
		t.Fatalf("open index: %v", err)
	}
	for path, i := range want {
		if path == "" || !fs.ValidPath(path) { // io/fs knows no names that are not UTF-8
			continue
		}
		info, err := fs.Stat(lstat{img}, path)
		if err != nil {
			t.Errorf("stat %q: %v", path, err)
			continue
		}
		if info.IsDir() != i.IsDir() || i.Type() == unix.S_IFREG && info.Size() != i.Size {
			t.Errorf("%q: %v, %d bytes; the tree has %o, %d", path, info.Mode(), info.Size(), i.Mode, i.Size)
		}
		if i.Type() == unix.S_IFREG && !i.Sparse {
			got, err := fs.ReadFile(img, path)
			if err != nil || !bytes.Equal(got, data[i.Offset:i.Offset+i.Size]) {
				t.Errorf("%q: read %d bytes, %v", path, len(got), err)
			}
		}
	}
}

// lstat makes fs.Stat describe a link and not what it leads to.
type lstat struct{ fs.FS }

func (l lstat) Stat(name string) (fs.FileInfo, error) { return fs.Lstat(l.FS, name) }

// Every shortened and every flipped form of a tar ends in a tree or an EntryError.
func TestDamaged(t *testing.T) {
	data := makeTar(t, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Size: 600}, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
		tar.Header{Name: strings.Repeat("n", 150), Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}})
	for n := 0; n < len(data); n += 97 {
		check(t, data[:n])
		d := bytes.Clone(data)
		d[n] ^= 0x41
		check(t, d)
	}
	if _, err := layertar.Scan(io.LimitReader(bytes.NewReader(data), 900), nil); !errors.Is(err, layertar.ErrRefused) {
		t.Errorf("cut in the content: %v", err)
	}
}
