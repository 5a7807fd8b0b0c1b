package disk

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTrashGivesSpaceBack removes large files, alone and in a folder: the names are gone when Trash returns, no descriptor stays, and the
// space comes back.
func TestTrashGivesSpaceBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skip("no tmpfs here: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	root, err := OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	free := func() uint64 {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		return st.Bfree * uint64(st.Bsize)
	}
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before, open := free(), fds()
	for _, sub := range []string{"file", "folder/file", "folder/deeper/file"} {
		path := filepath.Join(dir, sub)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, make([]byte, 2*largeFile), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/proc/self/exe", filepath.Join(dir, "folder", "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "folder", "missing"} {
		if err := root.Trash(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if exists(filepath.Join(dir, name)) {
			t.Errorf("%s is still there", name)
		}
	}
	if left, err := root.Leftovers(); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if n := fds(); n > open {
		t.Errorf("%d descriptors instead of %d", n, open)
	}
	for end := time.Now().Add(time.Minute); free() < before; {
		if time.Now().After(end) {
			t.Fatalf("%d bytes free, %d before", free(), before)
		}
		time.Sleep(time.Millisecond)
	}
}
