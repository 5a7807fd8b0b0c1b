package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// newStore opens a store in folders of the test, and unmounts its layers at the end.
func newStore(t testing.TB, driver string) *Store {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers need root: owners, devices, mounts")
	}
	root, err := disk.OpenRoot(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(root, Options{Driver: driver, State: filepath.Join(t.TempDir(), "state")})
	if err != nil {
		if driver == DriverEROFS {
			t.Skipf("no EROFS here: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return s
}

// eachDriver runs f with a store of each driver.
func eachDriver(t *testing.T, f func(t *testing.T, s *Store)) {
	for _, d := range []string{DriverEROFS, DriverDir} {
		t.Run(d, func(t *testing.T) { f(t, newStore(t, d)) })
	}
}

// entry is a tar entry of a test.
type entry struct {
	tar.Header
	body string
}

var mtime = time.Unix(1_600_000_000, 123_456_789)

func dirEntry(name string) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: mtime}, ""}
}

func fileEntry(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: mtime}, body}
}

func linkEntry(kind byte, name, target string) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777, ModTime: mtime}, ""}
}

// tarOf makes a tar as it stands, hostile or not.
func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.Format == tar.FormatUnknown {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func mustImport(t testing.TB, s *Store, data []byte) Info {
	t.Helper()
	info, err := s.Import(context.Background(), bytes.NewReader(data), ocispec.FromBytes(data))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// mountChain mounts the layers as a container would see them, with a writable layer on top, and returns both folders.
func mountChain(t testing.TB, s *Store, ids ...ocispec.Digest) (merged, upper string) {
	t.Helper()
	lower, err := s.Lower(context.Background(), ids)
	if err != nil {
		t.Fatal(err)
	}
	top := t.TempDir()
	merged, upper = filepath.Join(top, "m"), filepath.Join(top, "u")
	for _, d := range []string{"m", "u", "w"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m, err := mount.Overlay(mount.OverlayOptions{Lower: lower, Upper: upper, Work: filepath.Join(top, "w")})
	if err != nil {
		t.Fatalf("mount overlay of %q: %v", lower, err)
	}
	defer m.Close()
	at, err := os.OpenFile(merged, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	if err := mount.Attach(m, at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return merged, upper
}

func TestFirst(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		data := tarOf(t, dirEntry("etc/"), fileEntry("etc/passwd", "root"), linkEntry(tar.TypeSymlink, "l", "etc"), linkEntry(tar.TypeLink, "etc/hard", "etc/passwd"))
		info := mustImport(t, s, data)
		m, _ := mountChain(t, s, info.DiffID)
		b, err := os.ReadFile(filepath.Join(m, "l/hard"))
		if err != nil || string(b) != "root" {
			t.Fatalf("%q, %v", b, err)
		}
		if err := s.Verify(context.Background(), info.DiffID); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(info.DiffID); err != nil {
			t.Fatal(err)
		}
	})
}
