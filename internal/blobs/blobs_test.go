package blobs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

func open(t testing.TB) (*Store, *disk.Root) {
	t.Helper()
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return Open(root), root
}

// nothingLeft checks that neither blobs nor staging nor trash hold anything but the given blobs.
func nothingLeft(t *testing.T, s *Store, root *disk.Root, blobs int) {
	t.Helper()
	for dir, want := range map[string]int{"blobs/sha256": blobs, "staging": 0, "trash": 0} {
		entries, err := os.ReadDir(root.Path(dir))
		if err != nil || len(entries) != want {
			t.Errorf("%s holds %v, %v; want %d", dir, entries, err, want)
		}
	}
}

func TestPut(t *testing.T) {
	s, root := open(t)
	content := []byte("hello")
	d := ocispec.FromBytes(content)
	for _, want := range []ocispec.Digest{"", d} {
		for _, size := range []int64{-1, 5} {
			got, n, err := s.Put(context.Background(), bytes.NewReader(content), want, size)
			if err != nil || got != d || n != 5 {
				t.Fatalf("put: %v, %d, %v", got, n, err)
			}
		}
	}
	b, err := s.ReadAll(d, 5)
	if err != nil || string(b) != "hello" {
		t.Fatalf("read: %q, %v", b, err)
	}
	if n, err := s.Size(d); err != nil || n != 5 {
		t.Fatal(n, err)
	}
	if l, err := s.List(); err != nil || len(l) != 1 || l[0] != d {
		t.Fatal(l, err)
	}
	nothingLeft(t, s, root, 1)
	for range 2 {
		if err := s.Remove(d); err != nil {
			t.Fatal(err)
		}
	}
	if s.Has(d) {
		t.Fatal("still there")
	}
	if err := root.Sweep(); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s, root, 0)
	empty, err := s.PutBytes(nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := s.ReadAll(empty, 0); err != nil || len(b) != 0 {
		t.Fatal(b, err)
	}
}

// endless never stops; n counts what it gave.
type endless struct{ n int64 }

func (e *endless) Read(p []byte) (int, error) { e.n += int64(len(p)); return len(p), nil }

func TestPutRefuses(t *testing.T) {
	s, root := open(t)
	d := ocispec.FromBytes([]byte("hello"))
	cut := errors.New("connection lost")
	for name, c := range map[string]struct {
		r    io.Reader
		want ocispec.Digest
		size int64
		err  error
	}{
		"wrong digest":   {strings.NewReader("hellO"), d, 5, ErrMismatch},
		"too short":      {strings.NewReader("hell"), d, 5, ErrMismatch},
		"too long":       {strings.NewReader("hello!"), d, 5, ErrMismatch},
		"endless":        {&endless{}, d, 1 << 20, ErrMismatch},
		"reader fails":   {io.MultiReader(strings.NewReader("he"), errReader{cut}), d, 5, cut},
		"fails at limit": {io.MultiReader(strings.NewReader("hello"), errReader{cut}), d, 5, cut},
		"escape":         {strings.NewReader("x"), "sha256:../../../../../../../../../../../../../../../../../../../etc/passwd1", 1, ErrNotFound},
		"sha512":         {strings.NewReader("x"), "sha512:" + ocispec.Digest(strings.Repeat("a", 128)), 1, ErrNotFound},
	} {
		if _, _, err := s.Put(context.Background(), c.r, c.want, c.size); !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", name, err, c.err)
		}
		nothingLeft(t, s, root, 0)
	}
	e := &endless{}
	if _, _, err := s.Put(context.Background(), e, "", 1000); !errors.Is(err, ErrMismatch) || e.n > 1<<20 {
		t.Errorf("endless: %v after %d bytes", err, e.n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := s.Put(ctx, &endless{}, "", -1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	nothingLeft(t, s, root, 0)
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

func TestReadVerifies(t *testing.T) {
	s, root := open(t)
	d, err := s.PutBytes([]byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	p := root.Path("blobs", "sha256", strings.TrimPrefix(string(d), "sha256:"))
	for _, damage := range []string{"hellO", "hell", "hello!", ""} {
		if err := os.WriteFile(p, []byte(damage), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ReadAll(d, 100); !errors.Is(err, ErrMismatch) {
			t.Errorf("ReadAll of %q: %v", damage, err)
		}
		rc, _, err := s.Open(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, rc); !errors.Is(err, ErrMismatch) {
			t.Errorf("read of %q: %v", damage, err)
		}
		if _, err := rc.Read(make([]byte, 1)); !errors.Is(err, ErrMismatch) {
			t.Errorf("verdict on %q was forgotten: %v", damage, err)
		}
		if err := rc.Close(); err != nil {
			t.Fatal(err)
		}
		// Storing it again heals it.
		if _, err := s.PutBytes([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if b, err := s.ReadAll(d, 100); err != nil || string(b) != "hello" {
			t.Errorf("not healed: %q, %v", b, err)
		}
	}
	if _, err := s.ReadAll(d, 4); !errors.Is(err, ErrTooLarge) {
		t.Errorf("limit: %v", err)
	}
	if _, _, err := s.Open(ocispec.FromBytes([]byte("other"))); !errors.Is(err, ErrNotFound) {
		t.Errorf("missing: %v", err)
	}
}

func TestConcurrentPut(t *testing.T) {
	s, root := open(t)
	content := bytes.Repeat([]byte("x"), 1<<20)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, _, err := s.Put(context.Background(), bytes.NewReader(content), "", -1); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	nothingLeft(t, s, root, 1)
}
