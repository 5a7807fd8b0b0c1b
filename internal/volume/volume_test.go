package volume

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

func newStore(t *testing.T) *Store {
	t.Helper()
	root, err := disk.OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	return Open(root, t.TempDir())
}

func TestCreate(t *testing.T) {
	s := newStore(t)
	fills := 0
	fill := func(data string) error { fills++; return os.WriteFile(filepath.Join(data, "f"), []byte("x"), 0o600) }
	for i, want := range []bool{true, false} {
		if made, err := s.Create(Volume{Name: "vol"}, disk.Durable, fill); err != nil || made != want {
			t.Fatalf("%d: %v %v", i, made, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(s.Data("vol"), "f")); err != nil || fills != 1 {
		t.Errorf("filled %d times: %v", fills, err)
	}
	bad := errors.New("no")
	if _, err := s.Create(Volume{Name: "other"}, disk.Durable, func(string) error { return bad }); !errors.Is(err, bad) {
		t.Errorf("%v", err)
	}
	if names, err := s.List(); err != nil || len(names) != 1 || names[0] != "vol" {
		t.Errorf("%v %v", names, err)
	}
	if _, err := s.Get("other"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	for range 2 {
		if err := s.Remove(t.Context(), "vol"); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "-a", "../x", "a/b", ".x"} {
		if _, err := s.Create(Volume{Name: name}, disk.Durable, nil); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
		if err := s.Remove(t.Context(), name); !errors.Is(err, ErrName) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
}

func TestCopyTree(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skip: owners and devices need root")
	}
	src, dst := t.TempDir(), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	in := func(n string) string { return filepath.Join(src, n) }
	must(os.MkdirAll(in("d/e"), 0o755))
	must(os.WriteFile(in("d/file"), []byte("content"), 0o600))
	must(os.Chown(in("d/file"), 1000, 1001))
	must(os.Chmod(in("d/file"), 0o640|os.ModeSetuid))
	must(os.Link(in("d/file"), in("d/e/link")))
	must(os.Symlink("/etc/passwd", in("sym")))
	must(unix.Mkfifo(in("fifo"), 0o622))
	must(unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	for n, mode := range map[string]uint32{"fifo": 0o622, "null": 0o666} { // past the umask
		must(unix.Chmod(in(n), mode))
	}
	must(unix.Setxattr(in("d"), "trusted.x", []byte("y"), 0))
	must(unix.Setxattr(in("d"), "trusted.overlay.opaque", []byte("y"), 0))
	old := time.Unix(1e9, 123456789)
	must(os.Chtimes(in("d/file"), old, old))
	must(os.Chtimes(in("d"), old, old))
	must(os.Chmod(src, 0o711))
	f, err := os.Open(src)
	must(err)
	defer f.Close()
	must(CopyTree(t.Context(), dst, f, CopyOptions{}))
	stat := func(n string) (st unix.Stat_t) {
		t.Helper()
		must(unix.Lstat(filepath.Join(dst, n), &st))
		return st
	}
	if st := stat("d/file"); st.Uid != 1000 || st.Gid != 1001 || st.Mode != unix.S_IFREG|0o4640 || st.Nlink != 2 || st.Mtim.Nano() != old.UnixNano() {
		t.Errorf("file: %+v", st)
	}
	if stat("d/file").Ino != stat("d/e/link").Ino {
		t.Error("the hard link is a copy")
	}
	if b, err := os.ReadFile(filepath.Join(dst, "d/file")); err != nil || string(b) != "content" {
		t.Errorf("%q %v", b, err)
	}
	if to, err := os.Readlink(filepath.Join(dst, "sym")); err != nil || to != "/etc/passwd" {
		t.Errorf("%q %v", to, err)
	}
	if st := stat("fifo"); st.Mode != unix.S_IFIFO|0o622 {
		t.Errorf("fifo: %o", st.Mode)
	}
	if st := stat("null"); st.Mode != unix.S_IFCHR|0o666 || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null: %+v", st)
	}
	if st := stat("d"); st.Mtim.Nano() != old.UnixNano() {
		t.Errorf("folder's time: %v", st.Mtim)
	}
	if st := stat(""); st.Mode&0o7777 != 0o711 {
		t.Errorf("root's mode: %o", st.Mode)
	}
	buf := make([]byte, 10)
	if n, err := unix.Getxattr(filepath.Join(dst, "d"), "trusted.x", buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("xattr: %q %v", buf[:n], err)
	}
	if _, err := unix.Getxattr(filepath.Join(dst, "d"), "trusted.overlay.opaque", buf); err != unix.ENODATA {
		t.Errorf("overlayfs's own xattr: %v", err)
	}
}
