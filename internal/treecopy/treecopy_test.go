package treecopy

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// root opens a folder as a handle.
func root(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := safepath.OpenRoot(dir)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func copyTree(t *testing.T, src, name, dst, as string, o Options) (int64, error) {
	t.Helper()
	return Copy(context.Background(), root(t, src), name, root(t, dst), as, o)
}

// list describes everything below dir.
func list(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		out = append(out, rel)
		return nil
	}))
	return strings.Join(out, " ")
}

func lstat(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st
}

// everything makes a folder "d" with one of everything.
func everything(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	at := func(p string) string { return filepath.Join(dir, "d", p) }
	must(t,
		os.MkdirAll(at("sub"), 0o750), os.WriteFile(at("f"), []byte("content"), 0o600), os.Chown(at("f"), 7, 70000), os.Chmod(at("f"), 0o640|os.ModeSetuid),
		os.Link(at("f"), at("sub/hard")), os.Symlink("/etc/passwd", at("l")), os.Chown(at("sub"), 3, 4), unix.Mkfifo(at("p"), 0o604),
		unix.Mknod(at("c"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))), os.WriteFile(at("sparse"), nil, 0o644), os.Truncate(at("sparse"), 8<<20),
		unix.Setxattr(at("f"), "user.note", []byte("a\x00b"), 0), unix.Setxattr(at("f"), "trusted.x", []byte("y"), 0),
		os.Chtimes(at("f"), time.Unix(5, 6), time.Unix(1600000000, 123456789)), os.Chtimes(at("sub"), time.Unix(5, 6), time.Unix(1500000000, 987654321)),
	)
	f, err := os.OpenFile(at("sparse"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("x"), 4<<20)
	must(t, err, f.Close())
	return dir
}

func TestCopyKeepsEverything(t *testing.T) {
	src, dst := everything(t), t.TempDir()
	size, err := copyTree(t, src, "d", dst, "n", Options{KeepOwner: true, SetID: true, Caps: true, Devices: true})
	must(t, err)
	if got := list(t, dst); got != ". n n/c n/f n/l n/p n/sparse n/sub n/sub/hard" {
		t.Fatal(got)
	}
	f, hard := lstat(t, dst+"/n/f"), lstat(t, dst+"/n/sub/hard")
	if f.Mode&0o7777 != 0o4640 || f.Uid != 7 || f.Gid != 70000 || f.Mtim.Nano() != 1600000000123456789 || f.Ino != hard.Ino || f.Nlink != 2 {
		t.Errorf("f: %+v", f)
	}
	if d := lstat(t, dst+"/n/sub"); d.Mode&0o7777 != 0o750 || d.Uid != 3 || d.Gid != 4 || d.Mtim.Nano() != 1500000000987654321 {
		t.Errorf("sub: %+v", d)
	}
	if s := lstat(t, dst+"/n/sparse"); s.Size != 8<<20 || s.Blocks*512 > 1<<20 {
		t.Errorf("sparse: %d bytes in %d blocks", s.Size, s.Blocks)
	}
	if a, b := readFile(t, src+"/d/sparse"), readFile(t, dst+"/n/sparse"); !bytes.Equal(a, b) {
		t.Error("the sparse file has another content")
	}
	if c := lstat(t, dst+"/n/c"); c.Mode != unix.S_IFCHR|0o600 || c.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("c: %+v", c)
	}
	if p := lstat(t, dst+"/n/p"); p.Mode != unix.S_IFIFO|0o604 {
		t.Errorf("p: %o", p.Mode)
	}
	var buf [16]byte
	if n, err := unix.Getxattr(dst+"/n/f", "user.note", buf[:]); err != nil || string(buf[:n]) != "a\x00b" {
		t.Errorf("user.note: %q, %v", buf[:max(n, 0)], err)
	}
	if _, err := unix.Getxattr(dst+"/n/f", "trusted.x", buf[:]); err != unix.ENODATA {
		t.Errorf("trusted.x: %v", err)
	}
	// d c f l p sparse sub hard, contents, end
	if want := int64(8*512 + 512 + 8<<20 + 1024); size != want {
		t.Errorf("size %d, want %d", size, want)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return b
}

func TestCopyForAnotherOwner(t *testing.T) {
	src, dst := everything(t), t.TempDir()
	var left []string
	_, err := copyTree(t, src, "d", dst, "n", Options{LeftOut: func(p string) { left = append(left, p) }})
	must(t, err)
	if f := lstat(t, dst+"/n/f"); f.Mode&0o7777 != 0o640 || f.Uid != 0 || f.Gid != 0 {
		t.Errorf("f: %o %d:%d", f.Mode, f.Uid, f.Gid)
	}
	if !slices.Equal(left, []string{"n/c"}) {
		t.Errorf("left out %q", left)
	}
	_, err = copyTree(t, src, "d", dst, "o", Options{Owner: &Owner{9, 10}})
	must(t, err)
	for _, p := range []string{"o", "o/f", "o/l", "o/p", "o/sub"} {
		if st := lstat(t, dst+"/"+p); st.Uid != 9 || st.Gid != 10 {
			t.Errorf("%s: %d:%d", p, st.Uid, st.Gid)
		}
	}
}

func TestCopyOverWhatIsThere(t *testing.T) {
	src, dst := everything(t), t.TempDir()
	victim := filepath.Join(t.TempDir(), "victim")
	must(t, os.WriteFile(victim, []byte("whole"), 0o644), os.MkdirAll(dst+"/d/keep", 0o755), os.Symlink(victim, dst+"/d/f"), os.WriteFile(dst+"/d/l", nil, 0o644))
	for range 2 { // the second time all is there
		_, err := copyTree(t, src, "d", dst, "d", Options{})
		must(t, err)
	}
	if got := list(t, dst); got != ". d d/f d/keep d/l d/p d/sparse d/sub d/sub/hard" {
		t.Error(got)
	}
	if string(readFile(t, victim)) != "whole" || string(readFile(t, dst+"/d/f")) != "content" {
		t.Error("a link at the destination was followed")
	}
	// The folder itself keeps its attributes when its contents are copied.
	must(t, os.Chmod(dst, 0o711))
	_, err := copyTree(t, src, "d", dst, ".", Options{KeepOwner: true})
	must(t, err)
	if st := lstat(t, dst); st.Mode&0o777 != 0o711 {
		t.Errorf("mode %o", st.Mode)
	}
	for _, tc := range []struct {
		make, name string
		folder     bool
	}{{"mkdir", "f", true}, {"file", "d", false}, {"link", "d", false}} {
		dst := t.TempDir()
		switch tc.make {
		case "mkdir":
			must(t, os.Mkdir(dst+"/f", 0o755))
		case "file":
			must(t, os.WriteFile(dst+"/d", nil, 0o644))
		case "link":
			must(t, os.Symlink(t.TempDir(), dst+"/d"))
		}
		from := src
		if tc.name == "f" {
			from = src + "/d"
		}
		var ce *ConflictError
		if _, err := copyTree(t, from, tc.name, dst, tc.name, Options{}); !errors.As(err, &ce) || ce.Folder != tc.folder || ce.Path != tc.name {
			t.Errorf("%s: %v", tc.make, err)
		}
	}
}

func TestCopyIntoItself(t *testing.T) {
	src := everything(t)
	if _, err := copyTree(t, src, "d", src+"/d/sub", "d", Options{}); err == nil || !strings.Contains(err.Error(), "into itself") {
		t.Errorf("%v", err)
	}
	// A file onto itself loses nothing.
	_, err := copyTree(t, src+"/d", "f", src+"/d", "f", Options{})
	must(t, err)
	if string(readFile(t, src+"/d/f")) != "content" {
		t.Error("content lost")
	}
}

func TestCopyOntoMountedFile(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	under := filepath.Join(t.TempDir(), "under")
	must(t, os.WriteFile(src+"/f", []byte("new"), 0o600), os.WriteFile(under, []byte("old and longer"), 0o644), os.WriteFile(dst+"/f", nil, 0o644))
	must(t, unix.Mount(under, dst+"/f", "", unix.MS_BIND, ""))
	defer unix.Unmount(dst+"/f", 0)
	_, err := copyTree(t, src, "f", dst, "f", Options{})
	must(t, err)
	if st := lstat(t, under); string(readFile(t, under)) != "new" || st.Mode&0o777 != 0o644 {
		t.Errorf("%q, mode %o", readFile(t, under), st.Mode)
	}
}

// TestCopyWithEachWay copies with every one of the kernel's ways switched off in turn.
func TestCopyWithEachWay(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	must(t, os.WriteFile(src+"/f", big, 0o600))
	for name, e := range map[string]dataEngine{
		"all": {}, "no clone": {noClone: true}, "no range": {noClone: true, noRange: true}, "none": {noClone: true, noRange: true, noSendfile: true},
	} {
		c := &copier{ctx: context.Background(), root: root(t, dst), made: map[[2]uint64]copied{}, engine: e}
		must(t, c.entry(int(root(t, src).Fd()), "f", int(c.root.Fd()), "f", "f"))
		if !bytes.Equal(readFile(t, dst+"/f"), big) {
			t.Errorf("%s: another content", name)
		}
	}
}

// TestCopyFromProc copies files that say to be empty.
func TestCopyFromProc(t *testing.T) {
	dst := t.TempDir()
	_, err := copyTree(t, "/proc", "version", dst, "v", Options{})
	must(t, err)
	if !bytes.Equal(readFile(t, dst+"/v"), readFile(t, "/proc/version")) {
		t.Errorf("%q", readFile(t, dst+"/v"))
	}
}

func TestCopyCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Copy(ctx, root(t, everything(t)), "d", root(t, t.TempDir()), "d", Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// swapper exchanges two names in a folder as fast as it can until the test stops it, as a hostile container does.
func swapper(t *testing.T, dir, a, b string) (stop func()) {
	t.Helper()
	quit := make(chan struct{})
	var w sync.WaitGroup
	w.Go(func() {
		for {
			select {
			case <-quit:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, a), unix.AT_FDCWD, filepath.Join(dir, b), unix.RENAME_EXCHANGE); err != nil && err != unix.ENOENT {
				t.Error(err)
				return
			}
		}
	})
	return func() { close(quit); w.Wait() }
}

// TestSwappedSource is CVE-2018-15664 outwards: while "d" is copied it is now a folder, now a link to a secret outside.
func TestSwappedSource(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(outside+"/secret", []byte("secret"), 0o600))
	src := t.TempDir()
	must(t, os.MkdirAll(src+"/top/d", 0o755), os.WriteFile(src+"/top/d/secret", []byte("public"), 0o644), os.Symlink(outside, src+"/top/x"),
		os.WriteFile(src+"/top/file", []byte("public"), 0o644), os.Symlink(outside+"/secret", src+"/top/filelink"))
	defer swapper(t, src+"/top", "d", "x")()
	defer swapper(t, src+"/top", "file", "filelink")()
	for range 300 {
		dst := t.TempDir()
		if _, err := copyTree(t, src, "top", dst, "top", Options{}); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"d/secret", "x/secret", "file", "filelink"} {
			p = filepath.Join(dst, "top", p)
			st, err := os.Lstat(filepath.Dir(p))
			if err != nil || st.Mode()&os.ModeSymlink != 0 {
				continue
			}
			if st, err = os.Lstat(p); err == nil && st.Mode().IsRegular() && string(readFile(t, p)) != "public" {
				t.Fatalf("%s was read from outside", p)
			}
		}
		os.RemoveAll(dst)
	}
}

// TestSwappedTarget is CVE-2018-15664 inwards: while "d" is copied to it is now a folder, now a link to one outside.
func TestSwappedTarget(t *testing.T) {
	outside := t.TempDir()
	src, dst := t.TempDir(), t.TempDir()
	must(t, os.Mkdir(src+"/d", 0o700), os.WriteFile(src+"/d/f", []byte("x"), 0o600), os.Symlink("f", src+"/d/l"), unix.Mkfifo(src+"/d/p", 0o600))
	must(t, os.Mkdir(dst+"/d", 0o755), os.Symlink(outside, dst+"/x"))
	before := lstat(t, outside)
	stop := swapper(t, dst, "d", "x")
	for range 1000 {
		if _, err := copyTree(t, src, "d", dst, "d", Options{KeepOwner: true}); err != nil {
			var ce *ConflictError
			if !errors.As(err, &ce) {
				t.Fatal(err)
			}
		}
	}
	stop()
	if got, after := list(t, outside), lstat(t, outside); got != "." || after.Mode != before.Mode || after.Mtim != before.Mtim {
		t.Errorf("outside there is now %s, mode %o", got, after.Mode)
	}
}

// TestSwappedForAPipe swaps a file for a pipe, whose opening would wait for ever, and for a device, whose opening is an order to it.
func TestSwappedForAPipe(t *testing.T) {
	src := t.TempDir()
	must(t, os.WriteFile(src+"/f", []byte("x"), 0o600), unix.Mkfifo(src+"/p", 0o600))
	defer swapper(t, src, "f", "p")()
	for range 1000 {
		_, err := copyTree(t, src, "f", t.TempDir(), "f", Options{})
		must(t, err)
	}
}

type entry struct {
	h       tar.Header
	content string
}

func tarball(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.h.Typeflag == 0 {
			e.h.Typeflag = tar.TypeReg
		}
		e.h.Size, e.h.Format = int64(len(e.content)), tar.FormatPAX
		if e.h.Mode == 0 {
			e.h.Mode = 0o644
		}
		must(t, w.WriteHeader(&e.h))
		_, err := io.WriteString(w, e.content)
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

func extract(t *testing.T, rootDir, dir string, raw []byte) error {
	t.Helper()
	_, err := Extract(context.Background(), bytes.NewReader(raw), root(t, rootDir), dir, Options{KeepOwner: true, SetID: true, Caps: true, Devices: true})
	return err
}

func TestExtract(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(dir+"/to/real", 0o711), os.Symlink("/to/real", dir+"/to/link"), os.Chmod(dir+"/to", 0o711))
	when := time.Unix(1600000000, 123456789)
	raw := tarball(t,
		entry{h: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o700}},
		entry{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o750, Uid: 3, Gid: 4, ModTime: when}},
		entry{h: tar.Header{Name: "d/f", Mode: 0o4640, Uid: 7, Gid: 8, ModTime: when, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "n", "SCHILY.xattr.trusted.overlay.opaque": "y"}}, content: "content"},
		entry{h: tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "d/f"}},
		entry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/etc/passwd"}},
		entry{h: tar.Header{Name: "/abs/implied"}, content: "x"},
		entry{h: tar.Header{Name: "link/through"}, content: "y"},
		entry{h: tar.Header{Typeflag: tar.TypeFifo, Name: "p"}},
		entry{h: tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}},
		entry{h: tar.Header{Name: "holes"}, content: strings.Repeat("\x00", 1<<20) + "x" + strings.Repeat("\x00", 1<<20)},
		entry{h: tar.Header{Name: ".wh.ordinary"}},
	)
	must(t, extract(t, dir, "/to", raw), extract(t, dir, "/to", raw))
	if got := list(t, dir+"/to"); got != ". .wh.ordinary abs abs/implied c d d/f hard holes l link p real real/through" {
		t.Error(got)
	}
	if st := lstat(t, dir+"/to"); st.Mode&0o777 != 0o711 {
		t.Errorf("the folder itself has mode %o", st.Mode)
	}
	if d := lstat(t, dir+"/to/d"); d.Mode&0o777 != 0o750 || d.Uid != 3 || d.Mtim.Nano() != when.UnixNano() {
		t.Errorf("d: %+v", d)
	}
	if f := lstat(t, dir+"/to/hard"); f.Mode&0o7777 != 0o4640 || f.Uid != 7 || f.Nlink != 2 {
		t.Errorf("f: %+v", f)
	}
	if h := lstat(t, dir+"/to/holes"); h.Size != 2<<20+1 || h.Blocks*512 > 512<<10 {
		t.Errorf("holes: %d bytes, %d blocks", h.Size, h.Blocks)
	}
	var buf [8]byte
	if _, err := unix.Getxattr(dir+"/to/d/f", "trusted.overlay.opaque", buf[:]); err != unix.ENODATA {
		t.Errorf("overlayfs's attribute was taken: %v", err)
	}
}

func TestExtractHostile(t *testing.T) {
	outside := t.TempDir()
	must(t, os.WriteFile(outside+"/victim", []byte("whole"), 0o600))
	for name, tc := range map[string]struct {
		entries []entry
		want    string
	}{
		"dot dot":                {[]entry{{h: tar.Header{Name: "../../x"}, content: "x"}}, "is outside of"},
		"dot dot inside":         {[]entry{{h: tar.Header{Name: "a/../x"}, content: "x"}}, `".." in the name`},
		"link, then through it":  {[]entry{{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: outside}}, {h: tar.Header{Name: "l/victim"}, content: "x"}}, "no such file"},
		"relative link":          {[]entry{{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../../../../../.." + outside}}, {h: tar.Header{Name: "l/victim"}, content: "x"}}, "no such file"},
		"file over link":         {[]entry{{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: outside + "/victim"}}, {h: tar.Header{Name: "l"}, content: "x"}}, ""},
		"hard link out":          {[]entry{{h: tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "../" + outside + "/victim"}}}, "is outside of"},
		"hard link by link":      {[]entry{{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: outside}}, {h: tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "l/victim"}}}, "hard link to"},
		"hard link to nothing":   {[]entry{{h: tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "nothing"}}}, "hard link to"},
		"folder over file":       {[]entry{{h: tar.Header{Name: "f"}, content: "x"}, {h: tar.Header{Typeflag: tar.TypeDir, Name: "f/"}}}, "cannot overwrite non-directory"},
		"file over folder":       {[]entry{{h: tar.Header{Typeflag: tar.TypeDir, Name: "f/"}}, {h: tar.Header{Name: "f"}, content: "x"}}, "cannot overwrite directory"},
		"below a file":           {[]entry{{h: tar.Header{Name: "f"}, content: "x"}, {h: tar.Header{Name: "f/x"}, content: "x"}}, "cannot overwrite non-directory"},
		"long name":              {[]entry{{h: tar.Header{Name: strings.Repeat("x", 256)}, content: "x"}}, "longer than 255"},
		"owner nobody has":       {[]entry{{h: tar.Header{Name: "f", Uid: 1 << 33}, content: "x"}}, "which nobody has"},
		"time nobody lives to":   {[]entry{{h: tar.Header{Name: "f", ModTime: time.Unix(1<<60, 0)}, content: "x"}}, ""},
		"symlink without target": {[]entry{{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l"}}}, "leads nowhere"},
	} {
		dir := t.TempDir()
		must(t, os.Mkdir(dir+"/to", 0o755))
		err := extract(t, dir, "/to", tarball(t, tc.entries...))
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: more than a line: %v", name, err)
		}
	}
	if string(readFile(t, outside+"/victim")) != "whole" || list(t, outside) != ". victim" {
		t.Errorf("outside: %s, %q", list(t, outside), readFile(t, outside+"/victim"))
	}
}

// TestExtractTop: the folder that a tar goes into has the top's attributes only if it is to have them.
func TestExtractTop(t *testing.T) {
	when := time.Unix(1e9, 0)
	raw := tarball(t, entry{h: tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o1750, ModTime: when}}, entry{h: tar.Header{Name: "f"}, content: "x"})
	for _, top := range []bool{true, false} {
		dir := t.TempDir()
		must(t, os.Chmod(dir, 0o711))
		if _, err := Extract(t.Context(), bytes.NewReader(raw), root(t, dir), "", Options{Top: top}); err != nil {
			t.Fatal(err)
		}
		st := lstat(t, dir)
		if got := st.Mode&0o7777 == 0o1750 && st.Mtim.Sec == when.Unix(); got != top {
			t.Errorf("top %v: mode %o, time %d", top, st.Mode, st.Mtim.Sec)
		}
	}
}

// TestExtractSwapped lets the destination change between a folder and a link while a tar goes into it.
func TestExtractSwapped(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(dir+"/to/d", 0o755), os.Symlink(outside, dir+"/to/x"))
	raw := tarball(t, entry{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o700}}, entry{h: tar.Header{Name: "d/f"}, content: "x"},
		entry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "d/l", Linkname: "f"}}, entry{h: tar.Header{Name: "d/sub/f"}, content: "x"})
	stop := swapper(t, dir+"/to", "d", "x")
	before := lstat(t, outside)
	for range 1000 {
		_ = extract(t, dir, "/to", raw) // how it ends is a matter of luck
	}
	stop()
	if got, after := list(t, outside), lstat(t, outside); got != "." || before.Mtim != after.Mtim || before.Mode != after.Mode {
		t.Errorf("outside there is now %s", got)
	}
}

// FuzzExtract feeds tars as a stranger makes them. Whatever happens stays below the root.
func FuzzExtract(f *testing.F) {
	f.Add(tarball(f, entry{h: tar.Header{Name: "f"}, content: "x"}))
	f.Add(tarball(f, entry{h: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../.."}}, entry{h: tar.Header{Name: "l/canary"}, content: "x"}))
	f.Add(tarball(f, entry{h: tar.Header{Typeflag: tar.TypeDir, Name: "d/"}}, entry{h: tar.Header{Name: "d/f"}}, entry{h: tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "d/f"}}))
	f.Add(tarball(f, entry{h: tar.Header{Name: "../canary"}, content: "x"}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		world := t.TempDir()
		must(t, os.WriteFile(world+"/canary", []byte("whole"), 0o600), os.MkdirAll(world+"/root/to", 0o755))
		r := root(t, world+"/root")
		_, err := Extract(context.Background(), bytes.NewReader(raw), r, "/to", Options{})
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("more than a line: %q", err)
		}
		// As an archive becomes a volume.
		_, err = Extract(context.Background(), bytes.NewReader(raw), r, "", Options{Top: true, KeepOwner: os.Getuid() == 0, SetID: true, Caps: true})
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("more than a line: %q", err)
		}
		names, rerr := os.ReadDir(world)
		must(t, rerr)
		if st := lstat(t, world+"/canary"); len(names) != 2 || string(readFile(t, world+"/canary")) != "whole" || st.Nlink != 1 || st.Mode&0o7777 != 0o600 {
			t.Fatalf("something got out: %v", names)
		}
	})
}
