package runtime

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conex/internal/linux/userns"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ranges are triples of Inside, Outside and Size.
func ranges(n ...uint32) (m userns.Map) {
	for ; len(n) > 0; n = n[3:] {
		m = append(m, userns.Range{Inside: n[0], Outside: n[1], Size: n[2]})
	}
	return m
}

func TestOwnerMap(t *testing.T) {
	for _, tc := range []struct {
		owner, seen uint32
		ids         userns.Map
		want        userns.Map
	}{
		{1000, 0, nil, ranges(1000, 0, 1, 1, 1, 999, 1001, 1001, maxID-1001)},
		{0, 33, nil, ranges(0, 33, 1, 1, 1, 32, 34, 34, maxID-34)},
		{7, 7, nil, ranges(7, 7, 1, 0, 0, 7, 8, 8, maxID-8)},
		{1000, 0, ranges(0, 500000, 100), ranges(1000, 500000, 1, 1, 500001, 99)},
		{5, 200, ranges(0, 500000, 100), ranges(0, 500000, 5, 6, 500006, 94)},
	} {
		got := ownerMap(tc.owner, tc.seen, tc.ids)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%d as %d: %v, want %v", tc.owner, tc.seen, got, tc.want)
		}
		if _, err := userns.Mapping(got, got); err != nil && os.Getuid() == 0 {
			t.Errorf("%d as %d: the kernel refuses it: %v", tc.owner, tc.seen, err)
		}
	}
}

func TestSubpaths(t *testing.T) {
	dir := image(t)
	vol := t.TempDir()
	for _, d := range []string{"a/b", "etc"} {
		if err := os.MkdirAll(filepath.Join(vol, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{"a/b/f": "deep", "etc/passwd": "of the volume"} {
		if err := os.WriteFile(filepath.Join(vol, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, to := range map[string]string{"abs": "/etc", "up": "../../../../../../etc", "in": "a/b", "magic": "/proc/self/root"} {
		if err := os.Symlink(to, filepath.Join(vol, name)); err != nil {
			t.Fatal(err)
		}
	}
	for sub, want := range map[string]string{
		"a/b/f": "deep", "abs/passwd": "of the volume", "up/passwd": "of the volume", "in/f": "deep", "../../../a/b/f": "deep",
		"magic/etc/passwd": "!cannot access path magic/etc/passwd: no such file or directory", "nosuch": "!cannot access path nosuch",
	} {
		c := testConfig(t, dir, "cat", "/f")
		c.Spec.Mounts = append(c.Spec.Mounts, bind(vol, "/f"))
		c.Sources = map[string]Source{"/f": {Subpath: sub}}
		if fails, ok := strings.CutPrefix(want, "!"); ok {
			b, err := New().Create(t.Context(), c)
			if err == nil {
				_, err = b.Start(t.Context())
				if derr := b.Delete(); derr != nil {
					t.Error(derr)
				}
			}
			if err == nil || !strings.Contains(err.Error(), fails) {
				t.Errorf("%s: %v", sub, err)
			}
			continue
		}
		if got, _ := output(t, c); got != want {
			t.Errorf("%s: %q, want %q", sub, got, want)
		}
	}
}

// TestSubpathIsSwapped changes a subpath between a folder and links out of the volume while containers start: each sees the folder, what
// the link means inside of the volume, or nothing; none sees the host.
func TestSubpathIsSwapped(t *testing.T) {
	dir := image(t)
	vol, host := t.TempDir(), t.TempDir()
	for p, content := range map[string]string{filepath.Join(vol, "real/f"): "volume", filepath.Join(host, "f"): "host"} {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(host, filepath.Join(vol, "evil")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(vol, "real"), filepath.Join(vol, "sub")); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(vol, "sub"), unix.AT_FDCWD, filepath.Join(vol, "evil"), unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	seen := 0
	for range 60 {
		c := testConfig(t, dir, "cat", "/s/f")
		c.Spec.Mounts = append(c.Spec.Mounts, bind(vol, "/s"))
		c.Sources = map[string]Source{"/s": {Subpath: "sub"}}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c.Stdio[1] = w
		b, err := New().Create(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		p, err := b.Start(t.Context())
		w.Close()
		if err == nil {
			buf := make([]byte, 64)
			n, _ := r.Read(buf)
			if n > 0 && string(buf[:n]) != "volume" {
				t.Errorf("a container saw %q", buf[:n])
			}
			seen += n
			if _, err := p.Wait(); err != nil {
				t.Error(err)
			}
		} else if !strings.Contains(err.Error(), "cannot access path sub") {
			t.Errorf("%v", err)
		}
		r.Close()
		if err := b.Delete(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-done
	if seen == 0 {
		t.Error("no start ever saw the folder")
	}
}

// TestMountOptionsOfTrees has the attributes of a mount apart from those of the mounts below.
func TestMountOptionsOfTrees(t *testing.T) {
	dir := image(t)
	src := t.TempDir()
	sub := filepath.Join(src, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(sub, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	for opts, want := range map[string]string{
		"rbind,ro": "ro rw", "rbind,rro": "ro ro", "rbind,rro,rw": "rw ro", "bind,rro": "ro", "rbind": "rw rw", "rbind,private,ro": "ro rw",
	} {
		c := testConfig(t, dir, "cat", "/proc/mounts")
		c.Spec.Mounts = append(c.Spec.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: src, Options: strings.Split(opts, ",")})
		out, _ := output(t, c)
		var got []string
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if f[1] != "/m" && f[1] != "/m/sub" {
				continue
			}
			got = append(got, f[3][:2])
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%s: %q, want %q", opts, s, want)
		}
	}
}

// TestBindWithOtherOwner writes as three users of a container, with and without a user namespace.
func TestBindWithOtherOwner(t *testing.T) {
	dir := image(t)
	for _, users := range []bool{false, true} {
		for _, user := range []string{"", "app", "5:6"} {
			src := t.TempDir()
			if err := os.Chown(src, 4321, 8765); err != nil {
				t.Fatal(err)
			}
			c := testConfig(t, dir, "touch", "/m/x")
			if users {
				withUsers(c)
			}
			c.User = user
			c.Spec.Mounts = append(c.Spec.Mounts, bind(src, "/m"))
			c.Sources = map[string]Source{"/m": {Owner: &Owner{4321, 8765}}}
			if out, st := output(t, c); st.Code != 0 {
				t.Errorf("%v %s: %s", users, user, out)
				continue
			}
			if got := ownerOf(t, filepath.Join(src, "x")); got != "4321:8765" {
				t.Errorf("%v %q: the file belongs to %s", users, user, got)
			}
		}
	}
}
