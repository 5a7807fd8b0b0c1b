package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// bigTar is a layer as large as a language runtime's: 11,000 entries, 440 MB.
func bigTar(b *testing.B) []byte {
	b.Helper()
	var out bytes.Buffer
	out.Grow(460 << 20)
	w := tar.NewWriter(&out)
	body := make([]byte, 80_000)
	r := rand.NewChaCha8([32]byte{1})
	for n := range 11_000 {
		if _, err := r.Read(body[:4096]); err != nil {
			b.Fatal(err)
		}
		size := int64(n * 7919 % 80_000)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/d%03d/file-%05d", n%300, n), Mode: 0o644, Size: size, ModTime: mtime, Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(body[:size]); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return out.Bytes()
}

// BenchmarkImport applies a large layer with each driver; sha256 alone, which both contain, is the measure.
func BenchmarkImport(b *testing.B) {
	data := bigTar(b)
	b.Run("sha256", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			sha256.Sum256(data)
		}
	})
	for _, d := range []string{DriverEROFS, DriverDir} {
		b.Run(d, func(b *testing.B) {
			s := newStore(b, d)
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				info, err := s.Import(context.Background(), bytes.NewReader(data), "")
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if d == DriverEROFS {
					st, err := os.Stat(filepath.Join(s.dir(info.DiffID), "index.erofs"))
					if err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(st.Size()), "index-bytes")
				}
				if err := s.Remove(info.DiffID); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkSmall is what a RUN step with one changed file pays, and what a container start pays for layers in use.
func BenchmarkSmall(b *testing.B) {
	s := newStore(b, DriverEROFS)
	upper := b.TempDir()
	n := 0
	b.Run("WriteUpper", func(b *testing.B) {
		for b.Loop() {
			n++
			if err := os.WriteFile(filepath.Join(upper, "f"), fmt.Append(nil, n), 0o644); err != nil {
				b.Fatal(err)
			}
			if _, err := s.WriteUpper(context.Background(), upper, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	var ids []ocispec.Digest
	for k := range 10 {
		data := tarOf(b, fileEntry(fmt.Sprintf("f%d", k), "x"))
		ids = append(ids, mustImport(b, s, data).DiffID)
	}
	b.Run("Lower10", func(b *testing.B) {
		for b.Loop() {
			if _, err := s.Lower(context.Background(), ids); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Mount", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			if err := s.Unmount(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := s.Lower(context.Background(), ids[:1]); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Open", func(b *testing.B) {
		root, err := disk.OpenRoot(s.root.Path())
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := Open(root, Options{State: filepath.Dir(s.state)}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkWriter is a COPY of 20,000 files of 10 kB.
func BenchmarkWriter(b *testing.B) {
	s := newStore(b, DriverEROFS)
	body := make([]byte, 10_000)
	for b.Loop() {
		w, err := s.NewWriter(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		for n := range 20_000 {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%d/f%d", n%100, n), Mode: 0o644, Size: int64(len(body)), ModTime: mtime}
			if err := w.WriteEntry(h, bytes.NewReader(body)); err != nil {
				b.Fatal(err)
			}
		}
		info, err := w.Commit()
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Remove(info.DiffID); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
