package mount_test

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"conex/internal/linux/mount"
	"conex/internal/linux/userns"

	"golang.org/x/sys/unix"
)

func owner(t *testing.T, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return [2]uint32{st.Uid, st.Gid}
}

// TestOverlayWithOtherIDs shows layers and an upper folder with other ids, by descriptors and by attached layers.
func TestOverlayWithOtherIDs(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	ids := userns.Map{{Inside: 0, Outside: 700000, Size: 1000}}
	users, err := userns.Mapping(ids, ids)
	if err != nil {
		t.Fatal(err)
	}
	defer users.Close()
	for _, attached := range []bool{false, true} {
		dir := t.TempDir()
		for _, d := range []string{"a", "b", "rw/upper", "rw/work", "at"} {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for name, uid := range map[string]int{"a/root": 0, "a/user": 33, "b/low": 33, "b/other": 5000} {
			p := filepath.Join(dir, name)
			if err := os.WriteFile(p, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Lchown(p, uid, uid); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan struct{})
		go func() { // on a thread with a mount namespace of its own, which dies with it
			defer close(done)
			runtime.LockOSThread()
			if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
				t.Error(err)
				return
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				t.Error(err)
				return
			}
			mount.UseAttachedLayers(attached)
			if err := userns.FilesAs(700000, 700000); err != nil {
				t.Error(err)
				return
			}
			m, err := mount.Overlay(mount.OverlayOptions{
				Lower: []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}, Upper: filepath.Join(dir, "rw/upper"), Work: filepath.Join(dir, "rw/work"), Users: users,
			})
			if err != nil {
				t.Error(attached, err)
				return
			}
			defer m.Close()
			at, err := os.Open(filepath.Join(dir, "at"))
			if err != nil {
				t.Error(err)
				return
			}
			defer at.Close()
			if err := mount.Attach(m, at); err != nil {
				t.Error(err)
				return
			}
			for name, want := range map[string]uint32{"root": 700000, "user": 700033, "low": 700033, "other": 65534} {
				if got := owner(t, filepath.Join(dir, "at", name)); got != [2]uint32{want, want} {
					t.Errorf("%v: %s belongs to %d, want %d", attached, name, got, want)
				}
			}
			if err := os.Mkdir(filepath.Join(dir, "at/new"), 0o755); err != nil {
				t.Error(err)
			}
			if err := os.Lchown(filepath.Join(dir, "at/low"), 700044, 700045); err != nil {
				t.Error(err)
			}
		}()
		<-done
		if got := owner(t, filepath.Join(dir, "rw/upper/low")); got != [2]uint32{44, 45} {
			t.Errorf("%v: on disk the file belongs to %d", attached, got)
		}
		if got := owner(t, filepath.Join(dir, "rw/upper/new")); got != [2]uint32{0, 0} {
			t.Errorf("%v: on disk the folder belongs to %d", attached, got)
		}
		if got := owner(t, filepath.Join(dir, "b/low")); got != [2]uint32{33, 33} {
			t.Errorf("%v: the layer was changed", attached)
		}
	}
}
