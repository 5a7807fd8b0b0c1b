package volume

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// losesPower returns the disk below a mounted file system, as it is at this moment, mounted elsewhere: what a machine would find that had
// lost its power.
func losesPower(t *testing.T, disk, options string) string {
	t.Helper()
	file, dir := filepath.Join(t.TempDir(), "after"), t.TempDir()
	if out, err := exec.Command("cp", "--sparse=always", disk, file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", options, file, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestPowerLoss: a volume is there, with what it was filled with, however little of it the kernel would have written by itself.
func TestPowerLoss(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			dir, file := loopFS(t, []string{"mkfs." + kind, "-q"})
			root, err := disk.OpenRoot(filepath.Join(dir, "root"))
			if err != nil {
				t.Fatal(err)
			}
			s := Open(root, t.TempDir())
			want := map[string]map[string]string{"empty": {}}
			for _, n := range []int{3, 100} { // one by one, and all together
				src := t.TempDir()
				files := map[string]string{}
				for i := range n {
					files[fmt.Sprintf("d/f%d", i)] = strings.Repeat("x", 1+i)
				}
				lay(t, src, files)
				want[fmt.Sprint("new", n)], want[fmt.Sprint("old", n)] = list(t, src), list(t, src)
				fill := func(data string) error {
					f, err := os.Open(src)
					if err != nil {
						return err
					}
					defer f.Close()
					return CopyTree(t.Context(), data, f, CopyOptions{Durable: true})
				}
				if _, err := s.Create(Volume{Name: fmt.Sprint("new", n)}, disk.Durable, fill); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Create(Volume{Name: fmt.Sprint("old", n)}, disk.Durable, nil); err != nil {
					t.Fatal(err)
				}
				if err := s.Fill(t.Context(), fmt.Sprint("old", n), fill); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.Create(Volume{Name: "empty", Labels: map[string]string{"a": "b"}}, disk.Durable, nil); err != nil {
				t.Fatal(err)
			}

			options := "loop"
			if kind == "xfs" {
				options += ",nouuid" // beside itself
			}
			after, err := disk.OpenRoot(filepath.Join(losesPower(t, file, options), "root"))
			if err != nil {
				t.Fatal(err)
			}
			s = Open(after, t.TempDir())
			if names, err := s.List(); err != nil || len(names) != len(want) {
				t.Errorf("left: %v, %v", names, err)
			}
			for name, files := range want {
				if _, err := s.Get(name); err != nil {
					t.Error(err)
					continue
				}
				u, err := s.Use(name) // which goes on with a fill
				if err != nil {
					t.Error(err)
					continue
				}
				same(t, list(t, u.Dir), files)
				if err := u.Release(); err != nil {
					t.Error(err)
				}
			}
			if v, err := s.Get("empty"); err != nil || v.Labels["a"] != "b" {
				t.Errorf("%+v %v", v, err)
			}
		})
	}
}

// TestTornRecord: a volume that nobody made durable is an anonymous one after a loss of power, which prunes find.
func TestTornRecord(t *testing.T) {
	s := newStore(t)
	for name, record := range map[string]string{"empty": "", "zeros": "\x00\x00\x00", "broken": "{"} {
		if _, err := s.Create(Volume{Name: name}, disk.Volatile, nil); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.path(name, "meta.json"), []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
		v, err := s.Get(name)
		if torn := name != "broken"; torn != (err == nil) || torn && (!v.Anonymous || v.Name != name || v.Created.IsZero()) {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
		if err := s.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
}
