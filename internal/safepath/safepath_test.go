package safepath

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// both runs f with the kernel's resolution and with the fallback.
func both(t *testing.T, f func(t *testing.T)) {
	t.Run("openat2", func(t *testing.T) {
		if noOpenat2.Load() {
			t.Skip("this kernel has no openat2")
		}
		f(t)
		if noOpenat2.Load() {
			t.Skip("this kernel has no openat2: the fallback was tested")
		}
	})
	t.Run("walk", func(t *testing.T) {
		old := noOpenat2.Swap(true)
		defer noOpenat2.Store(old)
		f(t)
	})
}

func tree(t *testing.T) (root *os.File, outside string) {
	t.Helper()
	top := t.TempDir()
	dir := filepath.Join(top, "root")
	outside = filepath.Join(top, "secret")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "etc/deep/er"), 0o755))
	must(os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("inside"), 0o644))
	must(os.WriteFile(outside, []byte("outside"), 0o644))
	for name, target := range map[string]string{
		"abs": "/etc", "rel": "etc", "up": "../../../../etc", "out": outside, "outdir": top,
		"loop": "loop", "dangling": "/nowhere", "etc/deep/back": "../passwd", "file": "etc/passwd",
	} {
		must(os.Symlink(target, filepath.Join(dir, name)))
	}
	root, err := OpenRoot(dir)
	must(err)
	t.Cleanup(func() { root.Close() })
	return root, outside
}

func TestReadStaysInside(t *testing.T) {
	both(t, func(t *testing.T) {
		root, _ := tree(t)
		for _, p := range []string{"etc/passwd", "/etc/passwd", "abs/passwd", "rel/passwd", "up/passwd", "../../etc/passwd",
			"etc/deep/back", "etc/deep/er/../../passwd", "./etc//passwd", "file", "abs/deep/../../file"} {
			b, err := ReadFile(root, p, 0)
			if err != nil || string(b) != "inside" {
				t.Errorf("%s: %q, %v", p, b, err)
			}
		}
		for p, want := range map[string]error{
			"out": unix.ENOENT, "outdir/secret": unix.ENOENT, "../secret": unix.ENOENT, "loop": unix.ELOOP,
			"dangling": unix.ENOENT, "etc/passwd/x": unix.ENOTDIR, "etc/passwd/": unix.ENOTDIR, "file/.": unix.ENOTDIR, "etc/passwd/./": unix.ENOTDIR, "a\x00b": unix.EINVAL,
		} {
			if b, err := ReadFile(root, p, 0); !errors.Is(err, want) {
				t.Errorf("%s: %q, %v; want %v", p, b, err, want)
			}
		}
		if _, err := ReadFile(root, "etc/passwd", 3); err == nil || !strings.Contains(err.Error(), "longer than 3") {
			t.Errorf("limit: %v", err)
		}
		if _, err := ReadFile(root, "etc", 0); err == nil {
			t.Error("a folder was read")
		}
	})
}

func TestOpenNoLinks(t *testing.T) {
	both(t, func(t *testing.T) {
		root, _ := tree(t)
		for _, p := range []string{"abs/passwd", "file", "etc/deep/back"} {
			if _, err := OpenNoLinks(root, p, unix.O_RDONLY, 0); !errors.Is(err, unix.ELOOP) {
				t.Errorf("%s: %v, want ELOOP", p, err)
			}
		}
		f, err := OpenNoLinks(root, "etc/new", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if _, err := OpenNoLinks(root, "file", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600); !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.EEXIST) {
			t.Errorf("create over a link: %v", err)
		}
	})
}

func TestCreate(t *testing.T) {
	both(t, func(t *testing.T) {
		root, outside := tree(t)
		f, err := Open(root, "abs/made", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o640)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		st, err := Lstat(root, "etc/made")
		if err != nil || st.Mode&0o777 != 0o640 {
			t.Errorf("made: %v, mode %o", err, st.Mode)
		}
		if f, err := Open(root, "out", unix.O_WRONLY|unix.O_TRUNC, 0); err == nil {
			f.Close()
			t.Error("wrote through a link out of the root")
		}
		if b, err := os.ReadFile(outside); err != nil || string(b) != "outside" {
			t.Errorf("outside file: %q, %v", b, err)
		}
		if _, err := Open(root, "etc/passwd", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600); !errors.Is(err, fs.ErrExist) {
			t.Errorf("exclusive create: %v", err)
		}
		if _, err := Open(root, "file", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600); !errors.Is(err, fs.ErrExist) {
			t.Errorf("exclusive create over a link: %v", err)
		}
	})
}

func TestMkdirAll(t *testing.T) {
	both(t, func(t *testing.T) {
		old := unix.Umask(0o077)
		defer unix.Umask(old)
		root, outside := tree(t)
		for in, at := range map[string]string{"a/b/c": "a/b/c", "abs/x/y": "etc/x/y", "../../z": "z", "up/w": "etc/w", "/": ".", "outdir/q": ""} {
			f, err := MkdirAll(root, in, 0o751)
			if at == "" {
				if err == nil {
					f.Close()
					t.Errorf("%s: made through a dangling link", in)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", in, err)
				continue
			}
			var got, want unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &got); err != nil {
				t.Fatal(err)
			}
			f.Close()
			want, err = Lstat(root, at)
			if err != nil || got.Ino != want.Ino {
				t.Errorf("%s: handle of inode %d, %s is %d (%v)", in, got.Ino, at, want.Ino, err)
			}
			if at != "." && got.Mode&0o7777 != 0o751 {
				t.Errorf("%s: mode %o", in, got.Mode)
			}
		}
		if _, err := MkdirAll(root, "etc/passwd/x", 0o755); !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("below a file: %v", err)
		}
		if _, err := os.Lstat(filepath.Join(filepath.Dir(outside), "q")); err == nil {
			t.Error("made a folder outside")
		}
	})
}

func TestReadlink(t *testing.T) {
	both(t, func(t *testing.T) {
		root, _ := tree(t)
		if s, err := Readlink(root, "rel/deep/back"); err != nil || s != "../passwd" {
			t.Errorf("%q, %v", s, err)
		}
		if _, err := Readlink(root, "etc/passwd"); err == nil {
			t.Error("read a file as a link")
		}
		st, err := Lstat(root, "file")
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("lstat: %v, mode %o", err, st.Mode)
		}
		st, err = Stat(root, "file")
		if err != nil || st.Size != 6 {
			t.Errorf("stat: %v, size %d", err, st.Size)
		}
	})
}

// The fallback and the kernel must agree on every path.
func FuzzOpen(f *testing.F) {
	for _, s := range []string{"etc/passwd", "up/../up/passwd", "outdir/secret", "loop/x", "abs/deep/../../../file/", "//", "..", "etc/deep/back/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		root, _ := tree(t)
		resolve := func(walk bool) (uint64, error) {
			noOpenat2.Store(walk)
			defer noOpenat2.Store(false)
			st, err := Stat(root, path)
			return st.Ino, err
		}
		a, err1 := resolve(false)
		b, err2 := resolve(true)
		if a != b || (err1 == nil) != (err2 == nil) {
			t.Errorf("%q: kernel says %d, %v; walk says %d, %v", path, a, err1, b, err2)
		}
	})
}
