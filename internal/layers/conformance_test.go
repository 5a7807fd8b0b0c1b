package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// must keeps the making of trees readable.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// acl is a valid POSIX access control list: user::rw-, user:1234:r--, group::r--, mask::r--, other::---.
var acl = []byte("\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xd2\x04\x00\x00" +
	"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff")

// capNetBind is security.capability with cap_net_bind_service=ep.
var capNetBind = []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")

// makeTree makes a tree with one of everything that a layer can hold.
func makeTree(t testing.TB, root string) {
	t.Helper()
	at := func(p string) string { return filepath.Join(root, p) }
	for _, d := range []string{"bin", "etc/deep/er", "big", "names", "sizes", "links", "empty", strings.Repeat("long-folder-name/", 20)} {
		must(t, os.MkdirAll(at(d), 0o755))
	}
	file := func(p, body string, mode uint32) {
		must(t, os.WriteFile(at(p), []byte(body), 0o600))
		must(t, unix.Chmod(at(p), mode))
	}
	file("bin/su", "#!", 0o4755)
	file("bin/sgid", "#!", 0o2755)
	file("etc/none", "", 0)
	file(strings.Repeat("long-folder-name/", 20)+"file", "deep", 0o644)
	must(t, unix.Chmod(at("empty"), 0o1777))
	for _, size := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 100_000, 3 << 20} {
		file(fmt.Sprintf("sizes/%d", size), strings.Repeat("0123456789abcdef!", size/17+1)[:size], 0o644)
	}
	for n := 1; n <= 255; n += 2 {
		file("names/"+strings.Repeat("n", n), fmt.Sprint(n), 0o644)
	}
	for _, n := range []string{"!first", "-dash", "..three", "new\nline", "sp ace", "\xff\xfe", "é", "'q\"\\", "a:b,c"} {
		file("names/"+n, n, 0o644)
	}
	for n := range 10_500 {
		file(fmt.Sprintf("big/entry-%05d", n), "", 0o644)
	}
	file("links/a", "hard", 0o644)
	must(t, os.Link(at("links/a"), at("links/b")))
	must(t, os.Link(at("links/a"), at("etc/deep/c")))
	for n, target := range map[string]string{"s1": "a", "abs": "/etc", "dangling": "../nowhere", "s400": strings.Repeat("x/", 200),
		"s512": strings.Repeat("y", 512), "s600": strings.Repeat("z", 600), "s4000": strings.Repeat("../", 1333)} {
		must(t, os.Symlink(target, at("links/"+n)))
	}
	must(t, os.Link(at("links/s1"), at("links/s1-hard")))
	must(t, unix.Mkfifo(at("fifo"), 0o640))
	must(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(at("disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 300_000))))
	must(t, os.Chown(at("etc/none"), 4_000_000_000, 70_000))
	must(t, os.Lchown(at("links/abs"), 1000, 65_536))
	must(t, os.Chown(at("etc/deep"), 33, 33))

	x := func(p, name string, value []byte) { must(t, unix.Lsetxattr(at(p), name, value, 0)) }
	x("bin/su", "user.long", bytes.Repeat([]byte("v"), 2500))
	x("bin/su", "user.empty", nil)
	x("bin/su", "user.binary", []byte("a\x00b\n=\xff"))
	x("bin/su", "trusted.mine", []byte("1"))
	x("bin/su", "user."+strings.Repeat("n", 250), []byte("x"))
	file("bin/cap", "#!", 0o755)
	x("bin/cap", "security.capability", capNetBind)
	x("etc/deep/er", "user.dir", []byte("d"))
	x("etc/deep", "system.posix_acl_default", acl)
	x("sizes/513", "system.posix_acl_access", acl)
	x("links/s4000", "trusted.link", []byte("on a link"))
	x("fifo", "trusted.fifo", bytes.Repeat([]byte("f"), 700))

	f, err := os.Create(at("sparse"))
	must(t, err)
	for _, off := range []int64{0, 70_000, 1 << 20, 20 << 20} {
		_, err := f.WriteAt([]byte(fmt.Sprintf("island at %d", off)), off)
		must(t, err)
	}
	must(t, f.Truncate(24<<20+7))
	must(t, f.Close())
	f, err = os.Create(at("hole"))
	must(t, err)
	must(t, f.Truncate(50_000))
	must(t, f.Close())

	n := int64(0)
	must(t, filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		n++
		ts := unix.Timespec{Sec: 1_000_000_000 + n, Nsec: (n * 7_654_321) % 1_000_000_000}
		if n%50 == 0 {
			ts.Sec = -n // before 1970
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

func gnuTar(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
		t.Fatalf("tar %q: %v\n%s", args, err, out)
	}
}

// A layer shows what GNU tar packed and what GNU tar would unpack.
func TestConformTree(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("device nodes and owners need root")
	}
	src := filepath.Join(t.TempDir(), "src")
	makeTree(t, src)
	want := snapshot(t, src)
	for _, format := range []string{"posix", "gnu"} {
		file := filepath.Join(t.TempDir(), format+".tar")
		args := []string{"--format=" + format, "--sparse", "--numeric-owner", "-C", src, "-cf", file}
		if format == "posix" {
			// GNU tar packs ACLs as text unless they are taken for plain extended attributes.
			args = append(args, "--xattrs", "--xattrs-include=*", "--no-acls")
		}
		gnuTar(t, append(args, ".")...)
		data, err := os.ReadFile(file)
		must(t, err)
		if format == "gnu" { // no nanoseconds, no extended attributes: compare with what GNU tar makes of it
			out := filepath.Join(t.TempDir(), "out")
			must(t, os.Mkdir(out, 0o755))
			gnuTar(t, "-C", out, "--numeric-owner", "--same-owner", "-xpf", file)
			want = snapshot(t, out)
		}
		t.Run(format, func(t *testing.T) {
			eachDriver(t, func(t *testing.T, s *Store) {
				info := mustImport(t, s, data)
				m, _ := mountChain(t, s, info.DiffID)
				same(t, snapshot(t, m), want)
				sameTar(t, s, info.DiffID, data)
				if err := s.Verify(context.Background(), info.DiffID); err != nil {
					t.Error(err)
				}
				if d, err := os.ReadDir(filepath.Join(m, "big")); err != nil || len(d) != 10_500 {
					t.Errorf("big folder: %d entries, %v", len(d), err)
				}
			})
		})
	}
}

// sameTar checks that the store gives back the tar bit by bit.
func sameTar(t testing.TB, s *Store, id ocispec.Digest, want []byte) {
	t.Helper()
	r, info, err := s.OpenTar(id)
	must(t, err)
	defer r.Close()
	got, err := io.ReadAll(r)
	must(t, err)
	if !bytes.Equal(got, want) || info.Size != int64(len(want)) {
		t.Errorf("the tar came back with %d bytes, digest %s; it had %d (info: %d)", len(got), ocispec.FromBytes(got), len(want), info.Size)
	}
}

// names lists the paths below root, folders with a slash.
func names(t testing.TB, root string) string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		p = strings.TrimPrefix(p, root+"/")
		if d.IsDir() {
			p += "/"
		}
		out = append(out, p)
		return nil
	}))
	return strings.Join(out, " ")
}

func TestConformWhiteouts(t *testing.T) {
	base := []entry{dirEntry("a/"), fileEntry("a/1", "1"), fileEntry("a/2", "2"), dirEntry("a/sub/"), fileEntry("a/sub/x", "x"),
		dirEntry("b/"), fileEntry("b/old", "old"), fileEntry("f", "f")}
	for _, c := range []struct {
		name string
		top  []entry
		want string
	}{
		{"file", []entry{dirEntry("a/"), fileEntry("a/.wh.1", "")}, "a/ a/2 a/sub/ a/sub/x b/ b/old f"},
		{"folder", []entry{fileEntry(".wh.a", "")}, "b/ b/old f"},
		{"missing", []entry{fileEntry(".wh.nothing", ""), fileEntry("b/.wh.nothing", "")}, "a/ a/1 a/2 a/sub/ a/sub/x b/ b/old f"},
		{"opaque", []entry{dirEntry("a/"), fileEntry("a/new", ""), fileEntry("a/.wh..wh..opq", "")}, "a/ a/new b/ b/old f"},
		{"opaque first", []entry{dirEntry("a/"), fileEntry("a/.wh..wh..opq", ""), dirEntry("a/sub/"), fileEntry("a/sub/y", "")}, "a/ a/sub/ a/sub/y b/ b/old f"},
		{"opaque with whiteout", []entry{dirEntry("a/"), fileEntry("a/.wh..wh..opq", ""), fileEntry("a/.wh.1", "")}, "a/ b/ b/old f"},
		{"opaque implied", []entry{fileEntry("b/.wh..wh..opq", "")}, "a/ a/1 a/2 a/sub/ a/sub/x b/ f"},
		{"replaced", []entry{fileEntry(".wh.a", ""), dirEntry("a/"), fileEntry("a/3", "")}, "a/ a/3 b/ b/old f"},
		{"replaced, whiteout last", []entry{dirEntry("a/"), fileEntry("a/3", ""), fileEntry(".wh.a", "")}, "a/ a/3 b/ b/old f"},
		{"replaced, implied", []entry{fileEntry(".wh.a", ""), fileEntry("a/3", "")}, "a/ a/3 b/ b/old f"},
		{"file for folder", []entry{fileEntry("a", "file")}, "a b/ b/old f"},
		{"folder for file", []entry{dirEntry("f/"), fileEntry("f/x", "")}, "a/ a/1 a/2 a/sub/ a/sub/x b/ b/old f/ f/x"},
		{"aufs", []entry{dirEntry(".wh..wh.plnk/"), fileEntry(".wh..wh.plnk/1", ""), fileEntry(".wh..wh.aufs", "")}, "a/ a/1 a/2 a/sub/ a/sub/x b/ b/old f"},
		{"own mark", []entry{{tar.Header{Typeflag: tar.TypeDir, Name: "a/", Mode: 0o755, PAXRecords: map[string]string{
			"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.overlay.redirect": "/b"}}, ""}}, "a/ a/1 a/2 a/sub/ a/sub/x b/ b/old f"},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachDriver(t, func(t *testing.T, s *Store) {
				bottom := mustImport(t, s, tarOf(t, base...))
				data := tarOf(t, c.top...)
				top := mustImport(t, s, data)
				m, _ := mountChain(t, s, bottom.DiffID, top.DiffID)
				if got := names(t, m); got != c.want {
					t.Errorf("got  %s\nwant %s", got, c.want)
				}
				sameTar(t, s, top.DiffID, data)
			})
		})
	}
}

// Whiteouts that hide nothing must not show, in a folder that overlayfs merges with nothing either.
func TestConformLoneWhiteouts(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		a := mustImport(t, s, tarOf(t, fileEntry(".wh.top", ""), dirEntry("d/"), fileEntry("d/.wh.gone", ""), fileEntry("d/here", ""), dirEntry("d/e/"), fileEntry("d/e/.wh.gone", "")))
		b := mustImport(t, s, tarOf(t, dirEntry("n/"), fileEntry("n/.wh.gone", ""), fileEntry("imp/.wh.gone", "")))
		for want, ids := range map[string][]ocispec.Digest{"d/ d/e/ d/here": {a.DiffID}, "d/ d/e/ d/here imp/ n/": {a.DiffID, b.DiffID}} {
			m, upper := mountChain(t, s, ids...)
			if got := names(t, m); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
			must(t, os.WriteFile(filepath.Join(m, "d/new"), nil, 0o644))
			must(t, os.Remove(filepath.Join(m, "d/new")))
			must(t, os.RemoveAll(filepath.Join(m, "d/e")))
			if got := names(t, upper); got != "d/ d/e" {
				t.Errorf("upper: %s", got)
			}
		}
	})
}

// A tar that uses a folder without naming it must not change the folder's owner, mode and attributes.
func TestConformImplied(t *testing.T) {
	special := func(name string, mode int64, uid int, x string) entry {
		e := dirEntry(name)
		e.Mode, e.Uid, e.Gid = mode, uid, uid
		if x != "" {
			e.PAXRecords = map[string]string{"SCHILY.xattr.user.x": x}
		}
		return e
	}
	eachDriver(t, func(t *testing.T, s *Store) {
		id := func(e ...entry) ocispec.Digest { return mustImport(t, s, tarOf(t, e...)).DiffID }
		stat := func(root, p string) string {
			t.Helper()
			var st unix.Stat_t
			must(t, unix.Lstat(filepath.Join(root, p), &st))
			x, err := getXattr(filepath.Join(root, p), "user.x")
			if err != nil && err != unix.ENODATA {
				t.Fatal(err)
			}
			return fmt.Sprintf("%o %d %s %d.%d", st.Mode&0o7777, st.Uid, x, st.Mtim.Sec, st.Mtim.Nsec)
		}
		stamp := fmt.Sprintf(" %d.%d", mtime.Unix(), mtime.Nanosecond())
		l1 := id(special("tmp/", 0o1777, 0, "t"), special("srv/", 0o750, 33, "s"), special("srv/www/", 0o2770, 34, ""), fileEntry("srv/www/old", ""))
		l2 := id(fileEntry("tmp/a", "a"), fileEntry("srv/www/new", "new"), fileEntry("fresh/dir/file", ""))
		l3 := id(fileEntry("srv/www/third", ""))
		m, _ := mountChain(t, s, l1, l2, l3)
		for p, want := range map[string]string{"tmp": "1777 0 t" + stamp, "srv": "750 33 s" + stamp, "srv/www": "2770 34 " + stamp, "fresh": "755 0  0.0"} {
			if got := stat(m, p); got != want {
				t.Errorf("%s: %s, want %s", p, got, want)
			}
		}
		if got := names(t, m); got != "fresh/ fresh/dir/ fresh/dir/file srv/ srv/www/ srv/www/new srv/www/old srv/www/third tmp/ tmp/a" {
			t.Errorf("names: %s", got)
		}
		// A later layer that names the folder wins; one that removed it below cuts the inheritance; other chains differ.
		l4 := id(special("srv/", 0o700, 99, ""))
		gone := id(fileEntry(".wh.srv", ""))
		m2, _ := mountChain(t, s, l1, l2, l4, l3)
		if got := stat(m2, "srv"); got != "700 99 "+stamp {
			t.Errorf("named again: %s", got)
		}
		if got := stat(m2, "srv/www"); got != "2770 34 "+stamp {
			t.Errorf("below a folder named again: %s", got)
		}
		m3, _ := mountChain(t, s, l1, gone, l3)
		if got, list := stat(m3, "srv/www"), names(t, m3); got != "755 0  0.0" || list != "srv/ srv/www/ srv/www/third tmp/" {
			t.Errorf("removed between: %s; %s", got, list)
		}
		m4, _ := mountChain(t, s, l2, l3)
		if got := stat(m4, "srv/www"); got != "755 0  0.0" {
			t.Errorf("nothing below: %s", got)
		}
		hidden := id(fileEntry("srv/.wh..wh..opq", ""), fileEntry("srv/only", ""))
		m5, _ := mountChain(t, s, l1, hidden)
		if got, list := stat(m5, "srv"), names(t, m5); got != "750 33 s"+stamp || list != "srv/ srv/only tmp/" {
			t.Errorf("opaque and implied: %s; %s", got, list)
		}
	})
}

// A RUN step's changes, made through an overlay, come back the same from the layer made of them.
func TestConformUpper(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		base := mustImport(t, s, tarOf(t, dirEntry("etc/"), fileEntry("etc/keep", "k"), fileEntry("etc/gone", "g"), dirEntry("var/"), dirEntry("var/cache/"),
			fileEntry("var/cache/1", ""), fileEntry("var/cache/2", ""), fileEntry("lnk", "1"), linkEntry(tar.TypeLink, "lnk2", "lnk"), dirEntry("moved/"), fileEntry("moved/f", "m")))
		m, upper := mountChain(t, s, base.DiffID)
		at := func(p string) string { return filepath.Join(m, p) }
		must(t, os.Remove(at("etc/gone")))
		must(t, os.RemoveAll(at("var/cache")))
		must(t, os.Mkdir(at("var/cache"), 0o700))
		must(t, os.WriteFile(at("var/cache/new"), []byte("new"), 0o640))
		must(t, os.Chown(at("etc/keep"), 12, 13))
		must(t, os.WriteFile(at("lnk2"), []byte("changed"), 0o644))
		must(t, os.MkdirAll(at("moved2"), 0o755))
		must(t, os.Rename(at("moved/f"), at("moved2/f")))
		must(t, os.RemoveAll(at("moved")))
		must(t, os.WriteFile(at("moved"), []byte("now a file"), 0o644))
		must(t, os.Mkdir(at("tree"), 0o755))
		makeTree(t, at("tree"))
		l, err := net.Listen("unix", at("sock"))
		must(t, err)
		defer l.Close()
		must(t, os.WriteFile(at("resolv.conf"), []byte("the engine's"), 0o644))
		must(t, os.MkdirAll(at("proc/self"), 0o755))
		want := snapshot(t, m)
		for _, p := range []string{"sock", "resolv.conf", "proc", "proc/self"} {
			delete(want, p)
		}
		exclude := func(p string) bool { return p == "resolv.conf" || p == "proc" }
		info, err := s.WriteUpper(context.Background(), upper, exclude)
		must(t, err)
		again, err := s.WriteUpper(context.Background(), upper, exclude)
		must(t, err)
		if again.DiffID != info.DiffID {
			t.Errorf("two walks gave %s and %s", info.DiffID, again.DiffID)
		}
		m2, _ := mountChain(t, s, base.DiffID, info.DiffID)
		got := snapshot(t, m2)
		// A copied-up name of a hard link is a file of its own on overlayfs, and its sibling still counts two names below.
		for _, snap := range []map[string]string{got, want} {
			for _, p := range []string{"lnk", "lnk2"} {
				snap[p], _, _ = strings.Cut(snap[p], " links")
				snap[p], _, _ = strings.Cut(snap[p], " same as")
			}
		}
		same(t, got, want)

		empty, err := s.WriteUpper(context.Background(), t.TempDir(), nil)
		must(t, err)
		if empty.Entries != 0 || empty.Size != 1024 {
			t.Errorf("empty layer: %+v", empty)
		}
		m3, _ := mountChain(t, s, base.DiffID, empty.DiffID)
		if names(t, m3) == "" {
			t.Error("an empty layer hid the one below")
		}
	})
}

// What a layer made of an upper folder can't express is refused.
func TestUpperRefused(t *testing.T) {
	s := newStore(t, DriverDir)
	for name, make := range map[string]func(dir string) error{
		".wh.":     func(d string) error { return os.WriteFile(filepath.Join(d, ".wh.x"), nil, 0o644) },
		"redirect": func(d string) error { return unix.Setxattr(d, "trusted.overlay.redirect", []byte("/etc"), 0) },
		"metacopy": func(d string) error { return unix.Setxattr(d, "trusted.overlay.metacopy", nil, 0) },
	} {
		top := t.TempDir()
		sub := filepath.Join(top, "sub")
		must(t, os.Mkdir(sub, 0o755))
		must(t, make(sub))
		if _, err := s.WriteUpper(context.Background(), top, nil); err == nil || !strings.Contains(err.Error(), "sub") || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := s.List(); err != nil || len(list) != 0 {
		t.Errorf("left behind: %v, %v", list, err)
	}
}

// A layer below can't be changed through a mount, by root either.
func TestImmutable(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		info := mustImport(t, s, tarOf(t, dirEntry("d/"), fileEntry("d/f", "before")))
		m, _ := mountChain(t, s, info.DiffID)
		must(t, os.WriteFile(filepath.Join(m, "d/f"), []byte("after"), 0o644))
		must(t, os.RemoveAll(filepath.Join(m, "d")))
		m2, _ := mountChain(t, s, info.DiffID)
		if b, err := os.ReadFile(filepath.Join(m2, "d/f")); err != nil || string(b) != "before" {
			t.Errorf("%q, %v", b, err)
		}
		must(t, s.Verify(context.Background(), info.DiffID))
		if s.drv.name() == DriverEROFS {
			lower, err := s.Lower(context.Background(), []ocispec.Digest{info.DiffID})
			must(t, err)
			if err := os.WriteFile(filepath.Join(lower[0], "d/f"), []byte("x"), 0o644); err == nil {
				t.Error("wrote into the mount of a layer")
			}
		}
	})
}
