package blobs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// source is a network that serves b and breaks after cut bytes.
func source(b []byte, cut int, asked *[]int64) func(context.Context, int64) (io.ReadCloser, error) {
	return func(_ context.Context, off int64) (io.ReadCloser, error) {
		*asked = append(*asked, off)
		r := io.Reader(bytes.NewReader(b[off:]))
		if cut >= 0 {
			r = io.MultiReader(io.LimitReader(r, int64(cut)), brokenReader{})
		}
		return io.NopCloser(r), nil
	}
}

type brokenReader struct{}

var errCable = errors.New("cable cut")

func (brokenReader) Read([]byte) (int, error) { return 0, errCable }

func downloadStore(t *testing.T) (*Store, *disk.Root) {
	t.Helper()
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return Open(root), root
}

func begin(t *testing.T, s *Store, d ocispec.Digest, size int) *Download {
	t.Helper()
	dl, err := s.Download(context.Background(), d, int64(size), nil)
	if err != nil {
		t.Fatal(err)
	}
	return dl
}

// TestDownloadGoesOn interrupts a download again and again: no byte is fetched twice, and the whole is verified.
func TestDownloadGoesOn(t *testing.T) {
	s, root := downloadStore(t)
	b := make([]byte, 300<<10)
	rng := rand.NewChaCha8([32]byte{1})
	if _, err := rng.Read(b); err != nil {
		t.Fatal(err)
	}
	d := ocispec.FromBytes(b)
	var asked []int64
	got := 0
	for range 4 {
		dl := begin(t, s, d, len(b))
		if dl.Have() != int64(got) {
			t.Fatalf("has %d bytes, want %d", dl.Have(), got)
		}
		r := dl.Reader(t.Context(), source(b, 70<<10, &asked))
		all, err := io.ReadAll(r)
		got = min(got+70<<10, len(b))
		if got < len(b) && (!errors.Is(err, errCable) || !dl.Broken()) {
			t.Fatalf("got %v, broken %v", err, dl.Broken())
		}
		if !bytes.Equal(all, b[:got]) {
			t.Fatalf("read %d bytes, want the first %d", len(all), got)
		}
		if err := errors.Join(r.Close(), dl.Close()); err != nil {
			t.Fatal(err)
		}
	}
	dl := begin(t, s, d, len(b))
	all, err := io.ReadAll(dl.Reader(t.Context(), source(b, -1, &asked)))
	if err != nil || !bytes.Equal(all, b) || dl.Broken() {
		t.Fatalf("%d bytes, %v", len(all), err)
	}
	if err := dl.Close(); err != nil {
		t.Fatal(err)
	}
	want := []int64{0, 70 << 10, 140 << 10, 210 << 10, 280 << 10}
	if len(asked) != len(want) {
		t.Fatalf("asked for %v", asked)
	}
	for i := range want {
		if asked[i] != want[i] {
			t.Fatalf("asked for %v, want %v", asked, want)
		}
	}
	if err := s.Keep(d, int64(len(b))); err != nil {
		t.Fatal(err)
	}
	if kept, err := s.ReadAll(d, 1<<20); err != nil || !bytes.Equal(kept, b) {
		t.Fatalf("kept blob: %v", err)
	}
	if left, err := os.ReadDir(root.Path("downloads")); err != nil || len(left) != 0 {
		t.Fatalf("left %v, %v", left, err)
	}
	if err := s.Keep(d, int64(len(b))); err != nil {
		t.Fatalf("kept twice: %v", err)
	}
}

func TestDownloadOfWrongBytes(t *testing.T) {
	s, root := downloadStore(t)
	d := ocispec.FromBytes([]byte("right"))
	var asked []int64
	dl := begin(t, s, d, 5)
	if _, err := io.ReadAll(dl.Reader(t.Context(), source([]byte("wrong"), -1, &asked))); !errors.Is(err, ErrMismatch) || dl.Broken() {
		t.Fatalf("%v, broken %v", err, dl.Broken())
	}
	if err := dl.Reset(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(dl.Reader(t.Context(), source([]byte("right and more than that"), -1, &asked))); err != nil || string(b) != "right" {
		t.Fatalf("%q, %v", b, err)
	}
	if err := dl.Discard(); err != nil {
		t.Fatal(err)
	}
	dl = begin(t, s, d, 5)
	if _, err := io.ReadAll(dl.Reader(t.Context(), source([]byte("rig"), -1, &asked))); !errors.Is(err, io.ErrUnexpectedEOF) || !dl.Broken() {
		t.Fatalf("a source that ends early: %v", err)
	}
	if err := dl.Discard(); err != nil {
		t.Fatal(err)
	}
	// Zeros in place of the beginning, as after a power loss.
	if err := os.WriteFile(root.Path("downloads", d.Encoded()), make([]byte, 3), 0o600); err != nil {
		t.Fatal(err)
	}
	dl = begin(t, s, d, 5)
	if _, err := io.ReadAll(dl.Reader(t.Context(), source([]byte("right"), -1, &asked))); !errors.Is(err, ErrMismatch) {
		t.Fatalf("a damaged beginning: %v", err)
	}
	if err := dl.Close(); err != nil {
		t.Fatal(err)
	}
	if list, err := s.Downloads(); err != nil || len(list) != 1 || list[0].Digest != d || list[0].Size != 5 {
		t.Fatalf("%+v, %v", list, err)
	}
	dl = begin(t, s, d, 2) // less than what is there: it can't be the beginning of it
	if dl.Have() != 0 {
		t.Fatalf("has %d", dl.Have())
	}
	if err := s.DropDownload(d); err != nil { // busy: left alone
		t.Fatal(err)
	}
	if err := dl.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(root.Path("downloads")); err != nil || len(left) != 0 {
		t.Fatalf("an empty download stays: %v, %v", left, err)
	}
}

// TestSettle ends downloads whose processes were killed.
func TestSettle(t *testing.T) {
	s, root := downloadStore(t)
	d := ocispec.FromBytes([]byte("right"))
	for _, tt := range []struct {
		left string
		kept bool
	}{{"rig", false}, {"wrong", false}, {"right", true}} {
		if err := os.WriteFile(root.Path("downloads", d.Encoded()), []byte(tt.left), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Settle(d, 5); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ReadAll(d, 10); (err == nil) != tt.kept {
			t.Errorf("%q: %v", tt.left, err)
		}
		if left, err := os.ReadDir(root.Path("downloads")); err != nil || len(left) != 0 {
			t.Errorf("%q leaves %v, %v", tt.left, left, err)
		}
	}
	if err := s.Settle(d, 5); err != nil { // nothing there
		t.Error(err)
	}
	other := ocispec.FromBytes([]byte("x"))
	dl := begin(t, s, other, 1)
	if err := s.Settle(other, 1); err != nil { // busy
		t.Error(err)
	}
	if err := dl.Close(); err != nil {
		t.Error(err)
	}
}

// TestKeepOfAnothers keeps a download that somebody else has begun again meanwhile: what is there of it is no blob.
func TestKeepOfAnothers(t *testing.T) {
	s, root := downloadStore(t)
	d := ocispec.FromBytes([]byte("right"))
	for _, busy := range []bool{true, false} {
		dl := begin(t, s, d, 5)
		if err := os.WriteFile(root.Path("downloads", d.Encoded()), []byte("ri"), 0o600); err != nil {
			t.Fatal(err)
		}
		if !busy {
			if err := dl.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Keep(d, 5); err != nil {
			t.Error(err)
		}
		if s.Has(d) {
			t.Fatalf("half a download is a blob (busy: %t)", busy)
		}
		if err := dl.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDownloadIsShared lets a second one wait for the first, and give up waiting.
func TestDownloadIsShared(t *testing.T) {
	s, _ := downloadStore(t)
	d := ocispec.FromBytes([]byte("x"))
	first := begin(t, s, d, 1)
	ctx, cancel := context.WithCancel(context.Background())
	waiting := make(chan struct{})
	ended := make(chan error)
	go func() {
		_, err := s.Download(ctx, d, 1, func() { close(waiting) })
		ended <- err
	}()
	<-waiting
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	second := make(chan *Download)
	go func() {
		dl, err := s.Download(context.Background(), d, 1, nil)
		if err != nil {
			t.Error(err)
		}
		second <- dl
	}()
	var asked []int64
	if _, err := io.ReadAll(first.Reader(t.Context(), source([]byte("x"), -1, &asked))); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	dl := <-second
	if dl == nil || dl.Have() != 1 {
		t.Fatalf("%+v", dl)
	}
	if err := dl.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Download(context.Background(), "sha256:../x", 1, nil); err == nil || strings.Contains(err.Error(), "\n") {
		t.Fatalf("got %v", err)
	}
}
