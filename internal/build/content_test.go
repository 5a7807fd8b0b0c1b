package build

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// A file's hash is the same from a stream in pieces of any size and from several goroutines, and for a short file its sha256.
func TestContentHash(t *testing.T) {
	dir := t.TempDir()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	v := &view{root: root}
	data := make([]byte, 2*chunk+1)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	h := newContentHash()
	seen := map[[sha256.Size]byte]int{}
	for _, size := range []int{0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 2*chunk + 1} {
		if err := os.WriteFile(filepath.Join(dir, "f"), data[:size], 0o644); err != nil {
			t.Fatal(err)
		}
		it := &item{path: "f"}
		got, short, err := v.hashFile(t.Context(), it, h)
		if err != nil || short {
			t.Fatalf("%d bytes: %v, short %v", size, err, short)
		}
		for _, piece := range []int{1 << 20, 77_777, 3 * chunk} {
			if _, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{bytes.NewReader(data[:size])}, make([]byte, piece)); err != nil {
				t.Fatal(err)
			}
			if sum := h.sum(); sum != got {
				t.Errorf("%d bytes in pieces of %d: another hash", size, piece)
			}
		}
		if plain := sha256.Sum256(data[:size]); (plain == got) != (size <= chunk) {
			t.Errorf("%d bytes: sha256 is %v", size, plain == got)
		}
		if was, ok := seen[got]; ok {
			t.Errorf("%d and %d bytes have one hash", was, size)
		}
		seen[got] = size
	}
}
