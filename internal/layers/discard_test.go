package layers

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"conex/internal/layertar"
)

// TestDiscard skips here and reads there, and always finds the bytes that the tar has at that place.
func TestDiscard(t *testing.T) {
	s := newStore(t, DriverDir)
	var list []entry
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 40 {
		body := make([]byte, rnd.IntN(3000))
		for k := range body {
			body[k] = byte(rnd.Uint32())
		}
		list = append(list, fileEntry(fmt.Sprintf("f%d", i), string(body)))
	}
	data := tarOf(t, list...)
	info := mustImport(t, s, data)
	for range 200 {
		r, _, err := s.OpenTar(info.DiffID)
		if err != nil {
			t.Fatal(err)
		}
		at := 0
		for at < len(data) {
			n := rnd.IntN(6000)
			if k, err := r.(layertar.Discarder).Discard(int64(n)); int(k) != min(n, len(data)-at) || err != nil && err != io.EOF {
				t.Fatalf("skip %d at %d: %d, %v", n, at, k, err)
			}
			at = min(at+n, len(data))
			buf := make([]byte, min(rnd.IntN(6000), len(data)-at))
			if _, err := io.ReadFull(r, buf); err != nil || !bytes.Equal(buf, data[at:at+len(buf)]) {
				t.Fatalf("read %d at %d: %v, or other bytes", len(buf), at, err)
			}
			at += len(buf)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
