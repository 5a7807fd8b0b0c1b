package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"conex/internal/disk"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// reboot makes all layers look as if written before the last reboot.
func reboot(t *testing.T, s *Store) {
	t.Helper()
	must(t, s.Unmount())
	list, err := filepath.Glob(s.root.Path("layers", "*", "meta.json"))
	must(t, err)
	for _, p := range list {
		var m meta
		must(t, disk.ReadJSON(p, &m))
		m.Boot = "another boot"
		must(t, disk.WriteJSON(p, m, disk.Volatile))
	}
}

func TestAfterReboot(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		ctx := context.Background()
		data := tarOf(t, dirEntry("d/"), fileEntry("d/f", strings.Repeat("content", 100)), fileEntry("imp/lied", ""))
		id := mustImport(t, s, data).DiffID
		usable := func() error {
			m, err := s.Lower(ctx, []ocispec.Digest{id})
			if err != nil {
				return err
			}
			b, err := os.ReadFile(filepath.Join(m[0], "d/f"))
			if err == nil && !strings.HasPrefix(string(b), "contentcontent") {
				err = fmt.Errorf("content %q", b)
			}
			return err
		}
		reboot(t, s)
		must(t, usable())
		m, trusted, err := s.read(id)
		if err != nil || !trusted || m.Boot != disk.BootID() {
			t.Errorf("not marked as verified: %+v, %v", m, err)
		}
		// Synced: believed.
		must(t, s.Sync(id))
		must(t, s.Sync(id))
		reboot(t, s)
		must(t, usable())
		if m, trusted, err := s.read(id); err != nil || !trusted || m.Boot == disk.BootID() {
			t.Errorf("synced, but verified again: %+v, %v", m, err)
		}
		// What a power loss leaves: files of the right length, full of zeros.
		damage := func(name string) {
			t.Helper()
			p := filepath.Join(s.dir(id), name)
			st, err := os.Stat(p)
			must(t, err)
			must(t, os.WriteFile(p, make([]byte, st.Size()), 0o600))
		}
		must(t, os.Remove(filepath.Join(s.dir(id), "synced")))
		if s.drv.name() == DriverEROFS {
			reboot(t, s)
			damage("index.erofs")
			damage("implied.json")
			must(t, usable())
			must(t, s.Verify(ctx, id))
			damage("meta.json")
			must(t, s.Unmount())
			must(t, usable())
			damage("layer.tar")
		} else {
			damage("fs/d/f")
		}
		reboot(t, s)
		if err := usable(); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("damaged layer: %v", err)
		}
		empty(t, s)
		mustImport(t, s, data)
		must(t, usable())
	})
}

func TestVerifyFindsDamage(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		files := []string{"layer.tar", "index.erofs"}
		if s.drv.name() == DriverDir {
			files = []string{"fs/f", "tar.split"}
		}
		for _, name := range files {
			id := mustImport(t, s, tarOf(t, fileEntry("f", "content"))).DiffID
			must(t, s.Verify(context.Background(), id))
			p := filepath.Join(s.dir(id), name)
			b, err := os.ReadFile(p)
			must(t, err)
			b[len(b)/2] ^= 0x10
			b[0] ^= 1
			must(t, os.WriteFile(p, b, 0o600))
			if err := s.Verify(context.Background(), id); err == nil {
				t.Errorf("%s: damage not found", name)
			} else if name != "tar.split" && !errors.Is(err, ErrDigest) {
				t.Errorf("%s: %v", name, err)
			}
			must(t, s.Remove(id))
		}
	})
}

// A file that somebody deleted by hand is made anew where the rest allows it; else the layer is not there any more, so that a pull
// brings it again.
func TestDeletedFiles(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		files := map[string]bool{"layer.tar": false, "index.erofs": true, "meta.json": true}
		if s.drv.name() == DriverDir {
			files = map[string]bool{"fs": false}
		}
		for name, heals := range files {
			data := tarOf(t, fileEntry("f", "content"))
			id := mustImport(t, s, data).DiffID
			must(t, os.RemoveAll(filepath.Join(s.dir(id), name)))
			if _, err := s.Stat(id); heals && err != nil || !heals && !errors.Is(err, ErrNotFound) {
				t.Errorf("without %s: %v", name, err)
			}
			if got := mustImport(t, s, data).DiffID; got != id {
				t.Errorf("without %s: imported again as %s", name, got)
			}
			m, _ := mountChain(t, s, id)
			if got := names(t, m); got != "f" {
				t.Errorf("without %s, imported again: %s", name, got)
			}
			must(t, s.Remove(id))
		}
	})
}

func TestListRemove(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		ctx := context.Background()
		a := mustImport(t, s, tarOf(t, fileEntry("d/a", "aaaa")))
		b := mustImport(t, s, tarOf(t, fileEntry("d/b", "bb")))
		list, err := s.List()
		if err != nil || len(list) != 2 || list[0] != a || list[1] != b || a.ContentSize != 4 || a.Entries != 1 || a.DiskSize < 4 {
			t.Errorf("list: %+v, %v", list, err)
		}
		m, _ := mountChain(t, s, a.DiffID, b.DiffID)
		must(t, s.Remove(a.DiffID))
		must(t, s.Remove(a.DiffID))
		if s.drv.name() == DriverEROFS {
			if got := names(t, m); got != "d/ d/a d/b" {
				t.Errorf("a container lost its files: %s", got)
			}
		}
		if _, err := s.Stat(a.DiffID); !errors.Is(err, ErrNotFound) {
			t.Errorf("stat: %v", err)
		}
		if _, err := s.Lower(ctx, []ocispec.Digest{a.DiffID}); !errors.Is(err, ErrNotFound) {
			t.Errorf("lower: %v", err)
		}
		if _, _, err := s.OpenTar(a.DiffID); !errors.Is(err, ErrNotFound) {
			t.Errorf("open: %v", err)
		}
		if _, err := s.Stat("sha256:../../etc"); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("nonsense: %v", err)
		}
		must(t, s.Remove(b.DiffID))
		must(t, s.root.Sweep())
		empty(t, s)
		left, err := os.ReadDir(s.state)
		must(t, err)
		for _, e := range left {
			if e.Name() != "driver.json" {
				t.Errorf("left in the state folder: %s", e.Name())
			}
		}
	})
}

// Many importers, mounters and removers of one layer: every call ends well, or says that the layer is not there.
func TestConcurrent(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		var body bytes.Buffer
		for n := range 300_000 {
			fmt.Fprintln(&body, n)
		}
		data := tarOf(t, dirEntry("d/"), fileEntry("d/f", body.String()))
		id := ocispec.FromBytes(data)
		var wg sync.WaitGroup
		for n := range 8 {
			wg.Go(func() {
				other, err := Open(s.root, Options{Driver: s.drv.name(), State: filepath.Dir(s.state)})
				if err != nil {
					t.Error(err)
					return
				}
				for range 5 {
					// Without a digest nobody is spared the work, so that all publish at once.
					info, err := other.Import(context.Background(), bytes.NewReader(data), "")
					if err != nil && !errors.Is(err, ErrNotFound) || err == nil && info.DiffID != id {
						t.Errorf("import: %v, %v", info, err)
					}
					lower, err := other.Lower(context.Background(), []ocispec.Digest{id})
					if err != nil && !errors.Is(err, ErrNotFound) {
						t.Errorf("lower: %v", err)
					}
					if err == nil && n < 4 {
						if st, err := os.Stat(filepath.Join(lower[0], "d/f")); err == nil && st.Size() != int64(body.Len()) {
							t.Errorf("size %d", st.Size())
						}
					}
					if n == 7 {
						if err := other.Remove(id); err != nil {
							t.Errorf("remove: %v", err)
						}
					}
				}
			})
		}
		wg.Wait()
		mustImport(t, s, data)
		must(t, s.Verify(context.Background(), id))
		if n, err := filepath.Glob(s.root.Path("staging", "*")); err != nil || len(n) != 0 {
			t.Errorf("left in staging: %q, %v", n, err)
		}
	})
}

func TestWriter(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		ctx := context.Background()
		build := func(noise bool) Info {
			t.Helper()
			w, err := s.NewWriter(ctx)
			must(t, err)
			defer w.Close()
			for _, e := range []entry{dirEntry("app/"), fileEntry("app/x", strings.Repeat("x", 1234)), linkEntry(tar.TypeLink, "app/hard", "app/x"),
				linkEntry(tar.TypeSymlink, "l", "/app"), fileEntry(strings.Repeat("long/", 60)+"name", "deep"), linkEntry(tar.TypeFifo, "p", "")} {
				h := e.Header
				h.PAXRecords = map[string]string{"SCHILY.xattr.trusted.x": "\x00\xff", "SCHILY.xattr.trusted.y": "2"}
				h.Size = int64(len(e.body))
				if noise {
					h.Uname, h.Gname, h.Format = "me", "us", tar.FormatGNU
					h.AccessTime, h.ChangeTime = mtime, mtime
					h.Name = "./" + h.Name
					h.PAXRecords["comment"] = "noise"
				}
				before := fmt.Sprintf("%+v", h)
				must(t, w.WriteEntry(&h, strings.NewReader(e.body+"more than the header says")))
				if after := fmt.Sprintf("%+v", h); after != before {
					t.Errorf("header changed: %s", after)
				}
			}
			info, err := w.Commit()
			must(t, err)
			must(t, w.Close())
			if err := w.WriteEntry(&tar.Header{Name: "late"}, nil); err == nil {
				t.Error("wrote after the commit")
			}
			return info
		}
		a, b := build(false), build(true)
		if a.DiffID != b.DiffID {
			t.Error("equal entries, different layers")
		}
		must(t, s.Verify(ctx, a.DiffID))
		m, _ := mountChain(t, s, a.DiffID)
		written := snapshot(t, m)
		// The same tar, read as somebody else's, is the same layer.
		r, _, err := s.OpenTar(a.DiffID)
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		must(t, r.Close())
		o := newStore(t, DriverDir)
		m2, _ := mountChain(t, o, mustImport(t, o, data).DiffID)
		same(t, snapshot(t, m2), written)

		for what, f := range map[string]func(w *Writer) error{
			"too short": func(w *Writer) error {
				return w.WriteEntry(&tar.Header{Name: "short", Size: 10}, strings.NewReader("12345"))
			},
			"outside":    func(w *Writer) error { return w.WriteEntry(&tar.Header{Name: "../outside"}, nil) },
			"no content": func(w *Writer) error { return w.WriteEntry(&tar.Header{Name: "none", Size: 1}, nil) },
			"given up":   func(*Writer) error { return io.EOF },
		} {
			w, err := s.NewWriter(ctx)
			must(t, err)
			if f(w) == nil {
				t.Errorf("%s: no error", what)
			}
			if what != "given up" {
				if _, err := w.Commit(); err == nil {
					t.Errorf("%s: committed", what)
				}
			}
			must(t, w.Close())
			must(t, w.Close())
		}
		if n, err := filepath.Glob(s.root.Path("staging", "*")); err != nil || len(n) != 0 {
			t.Errorf("left in staging: %q, %v", n, err)
		}
	})
}

func TestOpen(t *testing.T) {
	root, err := disk.OpenRoot(t.TempDir())
	must(t, err)
	if _, err := Open(root, Options{Driver: "zfs", State: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "zfs") {
		t.Errorf("unknown driver: %v", err)
	}
	state := t.TempDir()
	s, err := Open(root, Options{State: state})
	must(t, err)
	name, why := s.Driver()
	if why == "" {
		t.Error("no reason given")
	}
	t.Logf("this machine: %s, %s", name, why)
	// The answer of the probe is kept: a wrong one shows that it is read, one of another boot that it is not.
	file := filepath.Join(state, "layers", "driver.json")
	var p probed
	must(t, disk.ReadJSON(file, &p))
	p.Driver, p.Why = DriverDir, "as the test wants"
	must(t, disk.WriteJSON(file, p, disk.Volatile))
	s, err = Open(root, Options{State: state})
	must(t, err)
	if n, w := s.Driver(); n != DriverDir || w != p.Why {
		t.Errorf("probe not kept: %s, %s", n, w)
	}
	if _, err := Open(root, Options{State: state, Driver: DriverEROFS}); err == nil || !strings.Contains(err.Error(), p.Why) {
		t.Errorf("erofs where it does not work: %v", err)
	}
	p.Boot = "another"
	must(t, disk.WriteJSON(file, p, disk.Volatile))
	s, err = Open(root, Options{State: state})
	must(t, err)
	if n, _ := s.Driver(); n != name {
		t.Errorf("probe of another boot believed: %s", n)
	}
}

// Devices and set-user-ID programs of a layer do nothing at its own mount, where users of the host could reach them.
func TestMountFlags(t *testing.T) {
	s := newStore(t, DriverEROFS)
	info := mustImport(t, s, tarOf(t, fileEntry("f", "x")))
	lower, err := s.Lower(context.Background(), []ocispec.Digest{info.DiffID})
	must(t, err)
	var st unix.Statfs_t
	must(t, unix.Statfs(lower[0], &st))
	for name, bit := range map[string]int64{"ro": unix.ST_RDONLY, "nosuid": unix.ST_NOSUID, "nodev": unix.ST_NODEV} {
		if st.Flags&bit == 0 {
			t.Errorf("not mounted %s", name)
		}
	}
}
