package collect

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// TestMain also serves as the process that dies with a lease in its hands.
func TestMain(m *testing.M) {
	dir := os.Getenv("COLLECT_TEST_HOLD")
	if dir == "" {
		os.Exit(m.Run())
	}
	root, err := disk.OpenRoot(dir)
	if err == nil {
		_, err = Hold(root, ocispec.Digest(os.Getenv("COLLECT_TEST_DIGEST")))
	}
	fmt.Println("held", err)
	select {} // until killed
}

func stores(t *testing.T) Stores {
	t.Helper()
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// The driver dir works everywhere, and nothing here depends on it.
	ls, err := layers.Open(root, layers.Options{Driver: layers.DriverDir, State: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	bs := blobs.Open(root)
	return Stores{Root: root, Images: image.Open(root, bs, ls), Layers: ls, Blobs: bs}
}

// layer imports a layer of one file. It may run in any goroutine: it reports errors and goes on.
func layer(t *testing.T, s Stores, content string) ocispec.Digest {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := w.WriteHeader(&tar.Header{Name: "f", Mode: 0o644, Size: int64(len(content))})
	if err == nil {
		_, err = w.Write([]byte(content))
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Error(err)
	}
	info, err := s.Layers.Import(context.Background(), &buf, "")
	if err != nil {
		t.Error(err)
	}
	return info.DiffID
}

// sweep sweeps and returns how many layers are left.
func sweep(t *testing.T, s Stores, markers ...Marker) (Result, int) {
	t.Helper()
	res, err := Sweep(context.Background(), s, markers...)
	if err != nil {
		t.Fatal(err)
	}
	left, err := s.Layers.List()
	if err != nil {
		t.Fatal(err)
	}
	return res, len(left)
}

func TestSweep(t *testing.T) {
	s := stores(t)
	inImage, marked, leased, loose := layer(t, s, "image"), layer(t, s, "marked"), layer(t, s, "leased"), layer(t, s, "loose")
	var c ocispec.Image
	c.RootFS.DiffIDs = []ocispec.Digest{inImage}
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	man, err := s.Blobs.PutBytes([]byte("manifest"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Images.Add(context.Background(), raw, man, "")
	if err != nil {
		t.Fatal(err)
	}
	looseBlob, err := s.Blobs.PutBytes([]byte("loose"))
	if err != nil {
		t.Fatal(err)
	}
	lease, err := Hold(s.Root, leased)
	if err != nil {
		t.Fatal(err)
	}
	marker := func(mark func(...ocispec.Digest)) error { mark(marked); return nil }

	broken := errors.New("record is unreadable")
	if _, err := Sweep(context.Background(), s, marker, func(func(...ocispec.Digest)) error { return broken }); !errors.Is(err, broken) {
		t.Fatalf("a marker's error: %v", err)
	}
	if l, err := s.Layers.List(); err != nil || len(l) != 4 {
		t.Fatalf("a sweep that did not know everything removed something: %d layers, %v", len(l), err)
	}
	res, left := sweep(t, s, marker)
	if left != 3 || !slices.Equal(res.Layers, []ocispec.Digest{loose}) || !slices.Equal(res.Blobs, []ocispec.Digest{looseBlob}) || res.Bytes <= 0 || res.Deferred {
		t.Fatalf("%+v, %d layers left", res, left)
	}
	if !s.Blobs.Has(img.ID) || !s.Blobs.Has(man) {
		t.Fatal("config or manifest of an image is gone")
	}
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	if err := lease.Close(); err != nil {
		t.Fatalf("closed twice: %v", err)
	}
	if err := s.Images.Delete(img.ID); err != nil {
		t.Fatal(err)
	}
	if res, left := sweep(t, s); left != 0 || len(res.Layers) != 3 || len(res.Blobs) != 2 {
		t.Fatalf("%+v, %d layers left", res, left)
	}
}

func TestOpenLease(t *testing.T) {
	s := stores(t)
	lease, err := NewLease(s.Root)
	if err != nil {
		t.Fatal(err)
	}
	layer(t, s, "x")
	if res, left := sweep(t, s); !res.Deferred || left != 1 || !Pending(s.Root) {
		t.Fatalf("%+v, %d, pending %v", res, left, Pending(s.Root))
	}
	half := s.Root.Path("leases", ".tmp-pending.1") // of a sweep that was killed
	if err := errors.Join(lease.Close(), os.WriteFile(half, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if res, left := sweep(t, s); res.Deferred || left != 0 || Pending(s.Root) {
		t.Fatalf("%+v, %d, pending %v", res, left, Pending(s.Root))
	}
	if _, err := os.Lstat(half); err == nil {
		t.Error("half a mark stays")
	}
}

func TestAddToLease(t *testing.T) {
	s := stores(t)
	lease, err := Hold(s.Root)
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	a, b := layer(t, s, "a"), layer(t, s, "b")
	if err := lease.Add(a, b); err != nil {
		t.Fatal(err)
	}
	layer(t, s, "c")
	if res, left := sweep(t, s); left != 2 || len(res.Layers) != 1 {
		t.Fatalf("%+v, %d", res, left)
	}
}

// TestLeaseDiesWithItsProcess kills a process that holds a lease.
func TestLeaseDiesWithItsProcess(t *testing.T) {
	s := stores(t)
	d := layer(t, s, "x")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "COLLECT_TEST_HOLD="+s.Root.Path(), "COLLECT_TEST_DIGEST="+string(d))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, err := out.Read(line)
	if err != nil || strings.TrimSpace(string(line[:n])) != "held <nil>" {
		t.Errorf("%q, %v", line[:n], err)
	}
	if _, left := sweep(t, s); left != 1 {
		t.Errorf("a live process's layer was swept")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it was not killed")
	}
	if _, left := sweep(t, s); left != 0 {
		t.Errorf("a dead process's lease still holds")
	}
	files, err := os.ReadDir(s.Root.Path("leases"))
	if err != nil || len(files) != 1 || files[0].Name() != "gc.lock" {
		t.Errorf("leases holds %v, %v", files, err)
	}
}

// TestLookThenUse is what a pull does, against sweeps that run all the time: hold, look, import if it isn't there, use.
func TestLookThenUse(t *testing.T) {
	s := stores(t)
	d := layer(t, s, "shared")
	stop := make(chan struct{})
	var sweeper, users sync.WaitGroup
	sweeper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := Sweep(context.Background(), s); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 4 {
		users.Go(func() {
			for range 20 {
				lease, err := Hold(s.Root, d)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.Layers.Stat(d); errors.Is(err, layers.ErrNotFound) {
					layer(t, s, "shared")
				}
				if _, err := s.Layers.Stat(d); err != nil {
					t.Errorf("a held layer is gone: %v", err)
				}
				if err := lease.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	users.Wait()
	close(stop)
	sweeper.Wait()
}

// TestClaim is what a build does, against sweeps that run all the time: an empty lease, and each layer claimed on its way in. Sweeps take
// what is not claimed meanwhile, and nothing else.
func TestClaim(t *testing.T) {
	s := stores(t)
	stop := make(chan struct{})
	var sweeper, users sync.WaitGroup
	sweeper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if res, err := Sweep(context.Background(), s); err != nil || res.Deferred {
				t.Errorf("%+v, %v", res, err)
				return
			}
		}
	})
	for range 4 {
		users.Go(func() {
			for k := range 20 {
				lease, err := Hold(s.Root)
				if err != nil {
					t.Error(err)
					return
				}
				mine := s
				mine.Layers = s.Layers.Claiming(lease.Claim)
				// The first is everybody's, so it often exists already, claimed by nobody or by somebody who lets go just now.
				for _, d := range []ocispec.Digest{layer(t, mine, "shared"), layer(t, mine, fmt.Sprint("own", k))} {
					if _, err := s.Layers.Stat(d); err != nil {
						t.Errorf("a claimed layer is gone: %v", err)
					}
				}
				if err := lease.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	users.Wait()
	close(stop)
	sweeper.Wait()
	if res, left := sweep(t, s); left != 0 || Left(s.Root) {
		t.Fatalf("%+v, %d left", res, left)
	}
}

// TestKeepForm lets compressed forms go that their layers would keep, unless a lease names them.
func TestKeepForm(t *testing.T) {
	s := stores(t)
	d := layer(t, s, "x")
	marker := func(mark func(...ocispec.Digest)) error { mark(d); return nil }
	var forms []ocispec.Digest
	for _, text := range []string{"one", "two"} {
		b, err := s.Blobs.PutBytes([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Layers.AddBlob(d, layers.Blob{Digest: b, Size: 3, MediaType: ocispec.MediaTypeImageLayerGzip}); err != nil {
			t.Fatal(err)
		}
		forms = append(forms, b)
	}
	if res, left := sweep(t, s, marker); left != 1 || len(res.Blobs) != 0 {
		t.Fatalf("%+v", res)
	}
	lease, err := Hold(s.Root, forms[0])
	if err != nil {
		t.Fatal(err)
	}
	s.KeepForm = func(ocispec.Digest) bool { return false }
	if res, left := sweep(t, s, marker); left != 1 || !slices.Equal(res.Blobs, forms[1:]) || !Left(s.Root) {
		t.Fatalf("%+v", res)
	}
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	if res, _ := sweep(t, s, marker); !slices.Equal(res.Blobs, forms[:1]) || Left(s.Root) {
		t.Fatalf("%+v", res)
	}
}

// TestPlentyOfTrash has a sweep leave much work to a process of its own, and nothing when that dies.
func TestPlentyOfTrash(t *testing.T) {
	s := stores(t)
	big := strings.Repeat("x", plenty)
	layer(t, s, big)
	if res, left := sweep(t, s); left != 0 || res.Bytes < plenty {
		t.Fatalf("%d layers left, %d bytes", left, res.Bytes)
	}
	empty := func() bool {
		list, err := s.Root.Leftovers()
		if err != nil {
			t.Fatal(err)
		}
		return len(list) == 0
	}
	for deadline := time.Now().Add(time.Minute); !empty(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the trash is not emptied")
		}
	}
	// As if the process had been killed: the next sweep does it.
	if _, err := s.Root.TrashLater(s.Root.Path("layers", layer(t, s, big).Encoded())); err != nil {
		t.Fatal(err)
	}
	if _, left := sweep(t, s); left != 0 || !empty() {
		t.Errorf("%d layers left, trash empty: %v", left, empty())
	}
}
