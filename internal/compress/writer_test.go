package compress

import (
	"bytes"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"
)

// sample is content that compresses to about a half.
func sample(n int) []byte {
	random := rand.New(rand.NewChaCha8([32]byte{7}))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		if random.IntN(3) == 0 && len(b) > 5000 {
			at := random.IntN(len(b) - 5000)
			b = append(b, b[at:at+random.IntN(300)]...)
		} else {
			b = fmt.Appendf(b, "%x ", random.Uint64())
		}
	}
	return b[:n]
}

func write(t testing.TB, kind Kind, level, workers int, plain []byte, pieces int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := newWriter(&out, kind, level, workers)
	if err != nil {
		t.Fatal(err)
	}
	for rest := plain; len(rest) > 0; {
		n := min(pieces, len(rest))
		if k, err := w.Write(rest[:n]); k != n || err != nil {
			t.Fatalf("%d of %d, %v", k, n, err)
		}
		rest = rest[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatalf("closed again: %v", err)
	}
	return out.Bytes()
}

func read(t testing.TB, packed []byte) []byte {
	t.Helper()
	r, _, err := Reader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestWriter reads back what it writes, with conex's reader, another one and the programs that are here.
func TestWriter(t *testing.T) {
	for _, kind := range []Kind{Gzip, Zstd} {
		program, err := exec.LookPath(string(kind))
		if err != nil {
			t.Logf("%s is not installed, its verdict is left out", kind)
		}
		block := map[Kind]int{Gzip: gzipBlock, Zstd: zstdBlock}[kind]
		for _, n := range []int{0, 1, 100, block - 1, block, block + 1, 3*block + 5} {
			plain := sample(n)
			z := write(t, kind, DefaultLevel(kind), 3, plain, 100_000)
			if Detect(z) != kind {
				t.Errorf("%s of %d bytes begins with %x", kind, n, z[:min(6, len(z))])
			}
			if got := read(t, z); !bytes.Equal(got, plain) {
				t.Errorf("%s: %d bytes of %d", kind, len(got), n)
			}
			if kind == Gzip {
				r, err := stdgzip.NewReader(bytes.NewReader(z))
				if err != nil {
					t.Fatal(err)
				}
				r.Multistream(false)
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
					t.Errorf("%d bytes of %d, %v", len(got), n, err)
				}
			}
			if program != "" {
				cmd := exec.Command(program, "-t")
				cmd.Stdin = bytes.NewReader(z)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s -t of %d bytes: %v: %s", program, n, err, out)
				}
			}
		}
	}
	if got := write(t, None, 0, 1, []byte("plain"), 2); string(got) != "plain" {
		t.Errorf("%q", got)
	}
}

// TestWriterIsDeterministic: neither the number of processors nor how the content comes may show.
func TestWriterIsDeterministic(t *testing.T) {
	for _, kind := range []Kind{Gzip, Zstd} {
		plain := sample(5*zstdBlock/2 + 77)
		levels := []int{1, 2, 5, 6, 7}
		if kind == Zstd {
			levels = []int{1, 3, 6}
		}
		for _, level := range levels {
			want := write(t, kind, level, 1, plain, len(plain))
			for workers := 2; workers <= 5; workers++ {
				if !bytes.Equal(write(t, kind, level, workers, plain, 10_000*workers+1), want) {
					t.Errorf("%s, level %d: with %d workers it is another stream", kind, level, workers)
				}
			}
			var out bytes.Buffer
			w, err := NewWriter(&out, kind, level)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(w, iotest.HalfReader(bytes.NewReader(plain))); err != nil || n != int64(len(plain)) {
				t.Fatal(n, err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(out.Bytes(), want) {
				t.Errorf("%s, level %d: ReadFrom gives another stream", kind, level)
			}
		}
	}
}

func TestLevels(t *testing.T) {
	plain := sample(300_000)
	for _, kind := range []Kind{Gzip, Zstd, None, Bzip2, Xz} {
		for level := -2; level <= 23; level++ {
			err := CheckLevel(kind, level)
			w, werr := NewWriter(io.Discard, kind, level)
			if (err == nil) != (werr == nil) {
				t.Fatalf("%s %d: %v, but %v", kind, level, err, werr)
			}
			if err != nil {
				continue
			}
			if err := w.Close(); err != nil {
				t.Error(err)
			}
			if got := read(t, write(t, kind, level, 2, plain, len(plain))); !bytes.Equal(got, plain) {
				t.Errorf("%s %d: %d bytes", kind, level, len(got))
			}
		}
		if err := CheckLevel(kind, DefaultLevel(kind)); (err == nil) != (kind != Bzip2 && kind != Xz) {
			t.Error(err)
		}
	}
	if err := CheckLevel(Gzip, 10); err == nil || err.Error() != "compression level 10 of gzip: use 0 to 9" {
		t.Error(err)
	}
	if _, err := NewWriter(io.Discard, Xz, 0); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	for s, want := range map[string]Kind{"gzip": Gzip, "zstd": Zstd, "none": None, "uncompressed": None, "xz": "", "": "", "GZIP": ""} {
		if got, err := ParseKind(s); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
}

// full takes so many bytes.
type full struct{ left int }

var errFull = errors.New("no space")

func (f *full) Write(b []byte) (int, error) {
	if f.left -= len(b); f.left < 0 {
		return 0, errFull
	}
	return len(b), nil
}

func TestWriterTellsErrors(t *testing.T) {
	plain := sample(20 << 20)
	for _, kind := range []Kind{Gzip, Zstd} {
		for _, room := range []int{0, 1 << 20, 5 << 20} {
			w, err := NewWriter(&full{room}, kind, 1)
			if err != nil {
				t.Fatal(err)
			}
			_, werr := io.Copy(w, bytes.NewReader(plain))
			if err := w.Close(); !errors.Is(err, errFull) || werr != nil && !errors.Is(werr, errFull) {
				t.Errorf("%s with room for %d: %v, %v", kind, room, werr, err)
			}
			if _, err := w.Write([]byte("x")); err == nil {
				t.Error("a closed writer takes more")
			}
		}
		broken := errors.New("broken")
		w, err := NewWriter(io.Discard, kind, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(w, iotest.ErrReader(broken)); err != broken {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

func FuzzWriter(f *testing.F) {
	f.Add([]byte("some content"), uint8(6), uint16(200), true)
	f.Add([]byte(strings.Repeat("a", 1000)), uint8(1), uint16(2000), false)
	f.Fuzz(func(t *testing.T, plain []byte, level uint8, repeat uint16, gz bool) {
		plain = bytes.Repeat(plain, 1+int(repeat))
		if len(plain) > 2*zstdBlock {
			return
		}
		kind, l := Gzip, int(level)%10
		if !gz {
			kind, l = Zstd, 1+int(level)%6
		}
		if got := read(t, write(t, kind, l, 2, plain, len(plain)/3+1)); !bytes.Equal(got, plain) {
			t.Fatalf("%d bytes of %d", len(got), len(plain))
		}
	})
}

// BenchmarkWriter compresses WRITER_FILE, a tar, or else 64 MB that are made up.
func BenchmarkWriter(b *testing.B) {
	plain := sample(64 << 20)
	if name := os.Getenv("WRITER_FILE"); name != "" {
		var err error
		if plain, err = os.ReadFile(name); err != nil {
			b.Fatal(err)
		}
	}
	for _, kind := range []Kind{Gzip, Zstd} {
		b.Run(string(kind), func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			var n int64
			for range b.N {
				n = 0
				w, err := NewWriter(counting{&n}, kind, DefaultLevel(kind))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := w.Write(plain); err != nil {
					b.Fatal(err)
				}
				if err := w.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/float64(len(plain)), "ratio")
		})
	}
}

type counting struct{ n *int64 }

func (c counting) Write(b []byte) (int, error) {
	*c.n += int64(len(b))
	return len(b), nil
}
