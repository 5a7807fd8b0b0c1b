package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// manyFiles makes n files of a few sizes in folders of a hundred, each tenth with a second name in another folder.
func manyFiles(t testing.TB, dir string, n int) {
	t.Helper()
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprint("d", i/100))
		err := os.MkdirAll(sub, 0o755)
		path := filepath.Join(sub, fmt.Sprint("f", i))
		if err == nil {
			err = os.WriteFile(path, []byte(strings.Repeat("x", i*37%9000)), 0o644)
		}
		if err == nil && i%10 == 0 {
			err = os.Link(path, filepath.Join(dir, fmt.Sprint("l", i)))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestCopyManyFiles compares a copy by several workers with its source.
func TestCopyManyFiles(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	manyFiles(t, src, 3000)
	if err := os.WriteFile(filepath.Join(src, "large"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	sparse := filepath.Join(src, "sparse")
	f, err := os.Create(sparse)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("end"), 64<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := CopyTree(t.Context(), dst, d, CopyOptions{Live: true}); err != nil {
		t.Fatal(err)
	}
	same(t, list(t, dst), list(t, src))
	var a, b unix.Stat_t
	for i := 0; i < 3000; i += 10 {
		if unix.Lstat(fmt.Sprintf("%s/d%d/f%d", dst, i/100, i), &a) != nil || unix.Lstat(fmt.Sprintf("%s/l%d", dst, i), &b) != nil || a.Ino != b.Ino || a.Nlink != 2 {
			t.Fatalf("file %d has not both its names", i)
		}
	}
	if err := unix.Lstat(filepath.Join(dst, "sparse"), &a); err != nil || a.Blocks*512 > 1<<20 {
		t.Errorf("the hole is filled: %d blocks, %v", a.Blocks, err)
	}
	for i := range 30 {
		sub := fmt.Sprintf("/d%d", i)
		if unix.Lstat(src+sub, &a) != nil || unix.Lstat(dst+sub, &b) != nil || a.Mtim != b.Mtim {
			t.Errorf("%s has another time", sub)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := CopyTree(ctx, t.TempDir(), d, CopyOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestCopyOfWhatChanges copies a tree while somebody swaps files in it for links, pipes and devices: nothing of outside is in the copy, and
// nothing is waited for.
func TestCopyOfWhatChanges(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skip: devices need root")
	}
	s := newStore(t)
	if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, nil); err != nil {
		t.Fatal(err)
	}
	data := s.Data("vol")
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.MkdirAll(secret, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(secret+"/key", []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	manyFiles(t, data, 500)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := fmt.Sprintf("%s/d%d/f%d", data, i%5, i%5*100+i%100)
			os.Remove(name)
			switch i % 5 {
			case 0:
				os.Symlink(secret+"/key", name)
			case 1:
				unix.Mkfifo(name, 0o600)
			case 2:
				unix.Mknod(name, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) // /dev/zero
			case 3:
				os.WriteFile(name, []byte("x"), 0o600)
			case 4:
				os.Rename(fmt.Sprintf("%s/d%d", data, i%5), data+"/aside")
				os.Symlink(secret, fmt.Sprintf("%s/d%d", data, i%5))
				os.Remove(fmt.Sprintf("%s/d%d", data, i%5))
				os.Rename(data+"/aside", fmt.Sprintf("%s/d%d", data, i%5))
			}
		}
	}()
	for i := range 8 {
		u, err := s.Use("vol")
		if err != nil {
			t.Fatal(err)
		}
		dst := filepath.Join(t.TempDir(), fmt.Sprint(i))
		if err := os.Mkdir(dst, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := u.CopyTo(t.Context(), dst, ""); err != nil {
			t.Fatal(err)
		}
		for p, content := range list(t, dst) {
			if content == "secret" {
				t.Errorf("%s was read through a link", p)
			}
		}
		if err := u.Release(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	<-done
}

// TestFillGoesOn: a fill that was interrupted after its copy was whole is finished by the next user; before, nothing of it shows.
func TestFillGoesOn(t *testing.T) {
	s := newStore(t)
	if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, nil); err != nil {
		t.Fatal(err)
	}
	bad := errors.New("no")
	if err := s.Fill(t.Context(), "vol", func(dir string) error { lay(t, dir, map[string]string{"half": "x"}); return bad }); !errors.Is(err, bad) {
		t.Fatal(err)
	}
	same(t, list(t, s.Data("vol")), map[string]string{})
	lay(t, s.path("vol", "fill"), map[string]string{"a": "1", "d/b": "2"})
	lay(t, s.Data("vol"), map[string]string{"d/b": "mine"})
	if err := os.Chmod(s.path("vol", "fill"), 0o711); err != nil {
		t.Fatal(err)
	}
	u, err := s.Use("vol")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Release()
	same(t, list(t, s.Data("vol")), map[string]string{"a": "1", "d": "/", "d/b": "mine"})
	if fi, err := os.Stat(s.Data("vol")); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
	if _, err := os.Lstat(s.path("vol", "fill")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("fill stays: %v", err)
	}
	fills := 0
	if err := s.Fill(t.Context(), "vol", func(string) error { fills++; return nil }); err != nil || fills != 0 {
		t.Errorf("filled %d times, %v", fills, err)
	}
	if err := s.Fill(t.Context(), "nosuch", func(string) error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	// Nothing to put in leaves the folder as somebody has set it.
	if _, err := s.Create(Volume{Name: "bare"}, disk.Durable, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.Data("bare"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Fill(t.Context(), "bare", func(string) error { return ErrNothing }); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(s.Data("bare")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
}

func TestUses(t *testing.T) {
	s := newStore(t)
	if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, nil); err != nil {
		t.Fatal(err)
	}
	u, err := s.Use("vol")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.TryAlone("vol"); !errors.Is(err, disk.ErrLocked) {
		t.Errorf("alone beside a user: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Remove(ctx, "vol"); !errors.Is(err, context.Canceled) {
		t.Errorf("removed under a user: %v", err)
	}
	removed := make(chan error, 1)
	go func() { removed <- s.Remove(t.Context(), "vol") }()
	for range 2 {
		if err := u.Release(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
	if _, err := s.Use("vol"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	if err := (*Use)(nil).Release(); err != nil {
		t.Error(err)
	}
	// The lock is the volume's, whatever its name has become.
	for _, name := range []string{"one", "two"} {
		if _, err := s.Create(Volume{Name: name}, disk.Durable, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Rename("one", "two"); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if err := s.Rename("one", "../x"); !errors.Is(err, ErrName) {
		t.Errorf("%v", err)
	}
	l, err := s.Alone(t.Context(), "one")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rename("one", "three"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.TryAlone("three"); !errors.Is(err, disk.ErrLocked) {
		t.Errorf("%v", err)
	}
	l.Release()
	if v, err := s.Get("three"); err != nil || v.Name != "three" {
		t.Errorf("%+v %v", v, err)
	}
}

func TestSnapshots(t *testing.T) {
	s := newStore(t)
	if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, func(d string) error { lay(t, d, map[string]string{"f": "one", "d/g": "1"}); return nil }); err != nil {
		t.Fatal(err)
	}
	one, two := map[string]string{"f": "one", "d": "/", "d/g": "1"}, map[string]string{"f": "two", "d": "/", "d/g": "1", "n": "2"}
	u, err := s.Use("vol")
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Snapshot(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := u.Snapshot(t.Context(), "a"); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if err := u.Snapshot(t.Context(), "a/b"); !errors.Is(err, ErrName) {
		t.Errorf("%v", err)
	}
	if err := u.Release(); err != nil {
		t.Fatal(err)
	}
	lay(t, s.Data("vol"), map[string]string{"f": "two", "n": "2"})
	same(t, list(t, s.SnapshotData("vol", "a")), one)
	v, err := s.Get("vol")
	if err != nil {
		t.Fatal(err)
	}
	bad := errors.New("no")
	if err := s.Replace(&v, "b", func(d string) error { lay(t, d, map[string]string{"half": "x"}); return bad }); !errors.Is(err, bad) {
		t.Fatal(err)
	}
	same(t, list(t, s.Data("vol")), two)
	restore := func(d string) error { return s.CopySnapshot(t.Context(), "vol", "a", d) }
	if err := s.Replace(&v, "a", restore); !errors.Is(err, ErrExists) {
		t.Errorf("%v", err)
	}
	if err := s.Replace(&v, "b", restore); err != nil {
		t.Fatal(err)
	}
	same(t, list(t, s.Data("vol")), one)
	same(t, list(t, s.SnapshotData("vol", "b")), two)
	if all, err := s.Snapshots("vol"); err != nil || len(all) != 2 || all[0].Name != "a" || all[1].Name != "b" {
		t.Errorf("%+v %v", all, err)
	}
	if err := s.Replace(&v, "", func(d string) error { return s.CopySnapshot(t.Context(), "vol", "b", d) }); err != nil {
		t.Fatal(err)
	}
	same(t, list(t, s.Data("vol")), two)
	// Not while somebody reads it.
	u, err = s.Use("vol")
	if err != nil {
		t.Fatal(err)
	}
	f, err := u.Open("a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.RemoveSnapshot(ctx, "vol", "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	f.Close()
	if err := u.Release(); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveSnapshot(t.Context(), "vol", "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveSnapshot(t.Context(), "vol", "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	if left, err := os.ReadDir(s.root.Path("staging")); err != nil || len(left) != 0 {
		t.Errorf("staging has %v, %v", left, err)
	}
}

// TestSharedBlocks takes a snapshot on file systems that share blocks: they do.
func TestSharedBlocks(t *testing.T) {
	for _, mkfs := range [][]string{{"mkfs.btrfs", "-q"}, {"mkfs.xfs", "-q", "-m", "reflink=1"}} {
		t.Run(mkfs[0], func(t *testing.T) {
			dir, _ := loopFS(t, mkfs)
			root, err := disk.OpenRoot(filepath.Join(dir, "root"))
			if err != nil {
				t.Fatal(err)
			}
			s := Open(root, t.TempDir())
			const size = 8 << 20
			content := make([]byte, size)
			for i := range content {
				content[i] = byte(i * 7 >> 3)
			}
			if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, func(d string) error { return os.WriteFile(d+"/f", content, 0o600) }); err != nil {
				t.Fatal(err)
			}
			if n, err := Shared(t.Context(), s.Data("vol")); err != nil || n != 0 {
				t.Errorf("before: %d, %v", n, err)
			}
			if err := disk.SyncFS(dir); err != nil { // what is not written yet takes no room
				t.Fatal(err)
			}
			before, _, err := disk.Free(dir)
			if err != nil {
				t.Fatal(err)
			}
			u, err := s.Use("vol")
			if err != nil {
				t.Fatal(err)
			}
			defer u.Release()
			if err := u.Snapshot(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
			after, _, err := disk.Free(dir)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := Shared(t.Context(), s.Data("vol")); err != nil || n != size || before-after > size/2 {
				t.Errorf("%d bytes are shared, %d were taken, %v", n, before-after, err)
			}
			same(t, list(t, s.SnapshotData("vol", "s")), list(t, s.Data("vol")))
		})
	}
}

// loopFS mounts a new file system from a file.
func loopFS(t *testing.T, mkfs []string) (dir, file string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skip: mounts need root")
	}
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skip("skip: ", err)
	}
	file, dir = filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 512<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], file)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", file, dir).CombinedOutput(); err != nil {
		t.Skipf("skip: this kernel mounts no such file system: %s", out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir, file
}

func TestOptions(t *testing.T) {
	for _, tt := range []struct {
		opts map[string]string
		err  string
	}{
		{nil, ""},
		{map[string]string{"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}, ""},
		{map[string]string{"type": "tmpfs", "device": "tmpfs", "size": "1m"}, ""},
		{map[string]string{"type": "none", "device": "/x", "o": "bind"}, ""},
		{map[string]string{"size": "5g"}, ""},
		{map[string]string{"colour": "red"}, `invalid option: "colour"`},
		{map[string]string{"type": "nfs"}, `missing required option: "device"`},
		{map[string]string{"device": "/x"}, `missing required option: "type"`},
		{map[string]string{"o": "bind", "type": "none"}, `missing required option: "device"`},
		{map[string]string{"type": "none", "device": "x", "o": "bind"}, "no absolute path"},
		{map[string]string{"type": "ext4", "device": "/dev/x", "size": "1g"}, "size is for volumes in the data folder"},
	} {
		err := CheckOptions(tt.opts)
		if tt.err == "" && err != nil || tt.err != "" && (!errors.Is(err, ErrOptions) || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%v: %v", tt.opts, err)
		}
	}
	m := parseMount(map[string]string{"type": "nfs", "device": ":/path", "o": "addr=127.0.0.1,ro,nosuid,nfsvers=4,soft"})
	if err := m.resolved(":/path"); err != nil || m.attr != unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID || len(m.params) != 3 || m.params[0].Value != "127.0.0.1" || !m.params[2].Flag {
		t.Errorf("%+v %v", m, err)
	}
	m = parseMount(map[string]string{"type": "nfs", "device": "localhost:/path", "o": "rw"})
	if err := m.resolved("localhost:/path"); err != nil || len(m.params) != 1 || !strings.HasPrefix(m.params[0].Value, "127.") && m.params[0].Value != "::1" {
		t.Errorf("%+v %v", m, err)
	}
	m = parseMount(map[string]string{"type": "nfs", "device": ":/path"})
	if err := m.resolved(":/path"); err == nil {
		t.Error("no host is named")
	}
	for size, want := range map[string]int64{"": 0, "1k": 1024, "1g": 1 << 30} {
		v := Volume{Options: map[string]string{"size": size}}
		if n, err := v.Size(); err != nil || n != want {
			t.Errorf("%q: %d %v", size, n, err)
		}
	}
}

// BenchmarkCopyTree copies 10,000 files.
func BenchmarkCopyTree(b *testing.B) {
	src := b.TempDir()
	manyFiles(b, src, 10000)
	d, err := os.Open(src)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	for b.Loop() {
		dst := b.TempDir()
		if err := CopyTree(b.Context(), dst, d, CopyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCp is BenchmarkCopyTree by cp -a.
func BenchmarkCp(b *testing.B) {
	src := b.TempDir()
	manyFiles(b, src, 10000)
	for b.Loop() {
		if out, err := exec.Command("cp", "-a", src+"/.", b.TempDir()).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
}

// TestFillGivesUp: who waits for another's first use ends when he is told to.
func TestFillGivesUp(t *testing.T) {
	s := newStore(t)
	if _, err := s.Create(Volume{Name: "vol"}, disk.Durable, nil); err != nil {
		t.Fatal(err)
	}
	l, err := disk.Acquire(s.path("vol", "fill.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Fill(ctx, "vol", func(string) error { t.Error("it is filled"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}
