package inflate

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	kflate "github.com/klauspost/compress/flate"
	"golang.org/x/sys/unix"
)

// guarded returns n bytes that begin and end at pages which can't be touched: a load or store beyond them kills the test.
func guarded(t testing.TB, n int) []byte {
	page := os.Getpagesize()
	n = (n + page - 1) / page * page
	b, err := unix.Mmap(-1, 0, n+2*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	if err := unix.Mprotect(b[page:page+n], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return b[page : page+n : page+n]
}

// buffers are what a decoder under test works on.
type buffers struct{ in, slab, p []byte }

func newBuffers(t testing.TB) buffers {
	return buffers{guarded(t, 4096), guarded(t, window+outSize+outMargin), guarded(t, 256<<10)}
}

// unzip reads a gzip stream, up to size bytes at a time.
func (b buffers) unzip(src io.Reader, size int) ([]byte, error) {
	d := newReader(src, b.in, b.slab)
	if err := d.member(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	p := b.p[len(b.p)-min(size, len(b.p)):]
	for {
		n, err := d.Read(p)
		out.Write(p[:n])
		switch err {
		case nil:
		case io.EOF:
			return out.Bytes(), nil
		default:
			return out.Bytes(), err
		}
	}
}

// raw reads a deflate stream without gzip around it.
func (b buffers) raw(src io.Reader) ([]byte, error) {
	d := newReader(src, b.in, b.slab)
	var out bytes.Buffer
	for d.state != atEnd {
		err := d.fill(len(b.slab) - window - outMargin)
		out.Write(d.slab[d.r:d.w])
		if err != nil {
			return out.Bytes(), err
		}
	}
	return out.Bytes(), nil
}

// limit bounds what a test decodes: some hundred bytes can hold megabytes.
const limit = 4 << 20

// contents are plain data of several kinds.
func contents() map[string][]byte {
	random := rand.NewChaCha8([32]byte{})
	noise := make([]byte, 300_000)
	random.Read(noise)
	r := rand.New(random)
	var text, mixed, far bytes.Buffer
	for text.Len() < 400_000 {
		fmt.Fprintf(&text, "line %d of %x\n", r.IntN(100_000), r.IntN(1000))
	}
	for mixed.Len() < 500_000 {
		switch r.IntN(4) {
		case 0:
			mixed.Write(noise[:r.IntN(1000)])
		case 1:
			mixed.Write(bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(2000)))
		case 2:
			mixed.Write(bytes.Repeat(noise[:1+r.IntN(12)], r.IntN(100)))
		case 3:
			at := r.IntN(text.Len() - 2000)
			mixed.Write(text.Bytes()[at : at+r.IntN(2000)])
		}
	}
	for far.Len() < 300_000 { // matches as far as they go
		far.Write(noise[:window])
	}
	skewed := make([]byte, 200_000) // literals with codes of up to 15 bits
	for i := range skewed {
		for skewed[i] < 40 && r.IntN(2) == 0 {
			skewed[i]++
		}
	}
	return map[string][]byte{
		"nothing": nil, "a byte": []byte("x"), "words": []byte("some words, some more words"), "noise": noise, "text": text.Bytes(),
		"mixed": mixed.Bytes(), "far": far.Bytes(), "skewed": skewed, "zeros": make([]byte, 1_000_000),
		"window": noise[:window], "window and one": noise[:window+1],
	}
}

// zipped are gzip streams of plain, made in several ways.
func zipped(t testing.TB, plain []byte) map[string][]byte {
	all := map[string][]byte{}
	for level := -2; level <= 9; level++ {
		all[fmt.Sprintf("std %d", level)] = zip(t, plain, level, false)
		all[fmt.Sprintf("klauspost %d", level)] = zip(t, plain, level, true)
	}
	all["two members"] = append(bytes.Clone(all["std 4"]), all["std 4"]...)
	return all
}

// zip makes a gzip stream with the standard library, or of many flushed blocks with klauspost/compress.
func zip(t testing.TB, plain []byte, level int, flushed bool) []byte {
	var buf bytes.Buffer
	if !flushed {
		w, err := gzip.NewWriterLevel(&buf, level)
		if err == nil {
			_, err = w.Write(plain)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	w, err := kflate.NewWriter(&buf, level)
	for i, rest := 0, plain; len(rest) > 0 && err == nil; i++ {
		n := min(len(rest), i*i*17+1)
		_, err = w.Write(rest[:n])
		if rest = rest[n:]; i%3 == 0 && err == nil {
			err = w.Flush()
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return wrap(buf.Bytes(), plain)
}

// wrap makes gzip of a deflate stream.
func wrap(raw, plain []byte) []byte {
	b := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, raw...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(plain))
	return binary.LittleEndian.AppendUint32(b, uint32(len(plain)))
}

func TestReader(t *testing.T) {
	bufs := newBuffers(t)
	for name, plain := range contents() {
		for how, z := range zipped(t, plain) {
			want := plain
			if how == "two members" {
				want = append(bytes.Clone(plain), plain...)
			}
			for _, size := range []int{1 << 20, 2 * window, 1000} {
				got, err := bufs.unzip(bytes.NewReader(z), size)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s, %s, reads of %d: %d bytes of %d, %v", name, how, size, len(got), len(want), err)
				}
			}
			if len(z) < 50_000 {
				if got, err := bufs.unzip(iotest.OneByteReader(bytes.NewReader(z)), 1<<20); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s, %s, byte by byte: %d bytes of %d, %v", name, how, len(got), len(want), err)
				}
			}
			r, err := NewReader(iotest.DataErrReader(bytes.NewReader(z)))
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if n, err := r.WriteTo(&out); err != nil || n != int64(len(want)) || !bytes.Equal(out.Bytes(), want) {
				t.Fatalf("%s, %s, WriteTo: %d bytes of %d, %v", name, how, n, len(want), err)
			}
		}
	}
}

// TestDamage cuts streams short and changes single bytes: what comes out then is what the standard library makes of it.
func TestDamage(t *testing.T) {
	bufs := newBuffers(t)
	mixed := contents()["mixed"][:20_000]
	for how, z := range zipped(t, mixed) {
		for cut := 0; cut < len(z); cut += 1 + cut/8 {
			if how == "two members" && cut == len(z)/2 {
				continue
			}
			_, err := bufs.unzip(bytes.NewReader(z[:cut]), 1<<20)
			if cut == 0 && err != io.EOF || cut > 0 && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s cut at %d of %d: %v", how, cut, len(z), err)
			}
			same(t, bufs, append(bytes.Clone(z[:cut]), z[cut]^byte(1<<(cut%8))))
		}
		for at := 0; at < len(z); at += 1 + at/50 {
			bad := bytes.Clone(z)
			bad[at] ^= byte(1 << (at % 8))
			same(t, bufs, bad)
		}
		if _, err := bufs.unzip(bytes.NewReader(append(bytes.Clone(z), 0)), 1<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s and a zero: %v", how, err)
		}
		if _, err := bufs.unzip(bytes.NewReader(append(bytes.Clone(z), "something else"...)), 1<<20); err != ErrHeader {
			t.Errorf("%s and garbage: %v", how, err)
		}
	}
}

// same holds unzip against the standard library.
func same(t *testing.T, bufs buffers, z []byte) {
	t.Helper()
	var want []byte
	r, werr := gzip.NewReader(bytes.NewReader(z))
	if werr == nil {
		want, werr = io.ReadAll(io.LimitReader(r, limit))
	}
	if len(want) == limit {
		return
	}
	for _, size := range []int{1 << 20, 10_000} {
		got, err := bufs.unzip(bytes.NewReader(z), size)
		if (err == nil) != (werr == nil) {
			t.Fatalf("reads of %d: %v, should be %v\n%x", size, err, werr, z)
		}
		if err == nil && !bytes.Equal(got, want) || err != nil && !bytes.HasPrefix(got, want) && !bytes.HasPrefix(want, got) {
			t.Fatalf("reads of %d: another content, %d bytes instead of %d\n%x", size, len(got), len(want), z)
		}
	}
}

func TestHeader(t *testing.T) {
	bufs := newBuffers(t)
	body := wrap([]byte{3, 0}, nil)[10:]
	extra := strings.Repeat("e", 300)
	summed := "\x1f\x8b\x08\x02\x00\x00\x00\x00\x00\x00"
	summed += string(binary.LittleEndian.AppendUint16(nil, uint16(crc32.ChecksumIEEE([]byte(summed)))))
	for name, h := range map[string]string{
		"all":          "\x1f\x8b\x08\x1c\x00\x00\x00\x00\x00\x00" + "\x2c\x01" + extra + "name\x00" + "comment\x00",
		"right sum":    summed,
		"wrong sum":    "\x1f\x8b\x08\x02\x00\x00\x00\x00\x00\x00xx",
		"long name":    "\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x00" + strings.Repeat("n", 511) + "\x00",
		"longer name":  "\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x00" + strings.Repeat("n", 512) + "\x00",
		"reserved":     "\x1f\x8b\x08\xe0\x00\x00\x00\x00\x00\x00",
		"other method": "\x1f\x8b\x07\x00\x00\x00\x00\x00\x00\x00",
		"other magic":  "\x1f\x8c\x08\x00\x00\x00\x00\x00\x00\x00",
	} {
		for cut := range len(h) + 1 {
			same(t, bufs, []byte(h[:cut]))
		}
		same(t, bufs, append([]byte(h), body...))
		if name == "all" || name == "right sum" {
			if _, err := bufs.unzip(bytes.NewReader(append([]byte(h), body...)), 100); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestSourceError gives the source's error back, as it is, after what was there before it.
func TestSourceError(t *testing.T) {
	bufs := newBuffers(t)
	broken := errors.New("broken")
	plain := contents()["text"]
	z := zipped(t, plain)["std 6"]
	for _, at := range []int{0, 5, 100, len(z) / 2, len(z) - 4, len(z)} {
		got, err := bufs.unzip(io.MultiReader(bytes.NewReader(z[:at]), iotest.ErrReader(broken)), 1<<20)
		if err != broken || !bytes.HasPrefix(plain, got) || at == len(z) && len(got) != len(plain) {
			t.Errorf("at %d: %d bytes, %v", at, len(got), err)
		}
	}
	if _, err := bufs.unzip(silent{}, 100); err != io.ErrNoProgress {
		t.Errorf("a source that gives nothing: %v", err)
	}
}

type silent struct{}

func (silent) Read([]byte) (int, error) { return 0, nil }

// FuzzReader holds arbitrary gzip streams against the standard library.
func FuzzReader(f *testing.F) {
	bufs := newBuffers(f)
	for _, plain := range contents() {
		for _, z := range zipped(f, plain[:min(len(plain), 3000)]) {
			f.Add(z)
		}
	}
	f.Fuzz(func(t *testing.T, z []byte) { same(t, bufs, z) })
}

// FuzzDeflate holds arbitrary deflate streams against the standard library; there is no checksum that would refuse them first.
func FuzzDeflate(f *testing.F) {
	bufs := newBuffers(f)
	for _, plain := range contents() {
		for how, z := range zipped(f, plain[:min(len(plain), 3000)]) {
			if how != "two members" {
				f.Add(z[10:len(z)-8], false)
			}
		}
	}
	f.Fuzz(func(t *testing.T, z []byte, slow bool) {
		want, werr := io.ReadAll(io.LimitReader(flate.NewReader(bufio.NewReader(bytes.NewReader(z))), limit))
		if len(want) == limit {
			return
		}
		var src io.Reader = bytes.NewReader(z)
		if slow {
			src = iotest.OneByteReader(src)
		}
		got, err := bufs.raw(src)
		if (err == nil) != (werr == nil) {
			t.Fatalf("%v, should be %v", err, werr)
		}
		if err == nil && !bytes.Equal(got, want) || err != nil && !bytes.HasPrefix(got, want) && !bytes.HasPrefix(want, got) {
			t.Fatalf("another content, %d bytes instead of %d", len(got), len(want))
		}
	})
}

// FuzzRoundTrip reads back what the standard library and klauspost/compress write.
func FuzzRoundTrip(f *testing.F) {
	bufs := newBuffers(f)
	for _, plain := range contents() {
		f.Add(plain[:min(len(plain), 10_000)], uint8(3), uint16(700), uint8(6), true)
	}
	f.Fuzz(func(t *testing.T, plain []byte, repeat uint8, size uint16, level uint8, flushed bool) {
		plain = bytes.Repeat(plain, 1+int(repeat)%16)
		z := zip(t, plain, int(level)%12-2, flushed)
		for _, size := range []int{1 << 20, 1 + int(size)} {
			if got, err := bufs.unzip(bytes.NewReader(z), size); err != nil || !bytes.Equal(got, plain) {
				t.Fatalf("reads of %d: %d bytes of %d, %v", size, len(got), len(plain), err)
			}
		}
	})
}
