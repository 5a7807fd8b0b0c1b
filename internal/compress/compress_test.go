package compress

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

var checks = []byte{xz.CRC64, xz.CRC32, xz.SHA256}

func packed(t testing.TB, kind Kind, content []byte) []byte {
	t.Helper()
	ondemand.Compress()
	var buf bytes.Buffer
	var w io.WriteCloser
	switch kind {
	case Gzip:
		w = gzip.NewWriter(&buf)
	case Xz:
		z, err := xz.WriterConfig{BlockSize: 200_000, CheckSum: checks[len(content)%len(checks)]}.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	case Zstd:
		z, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	default:
		return content
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestReader(t *testing.T) {
	content := []byte(strings.Repeat("some content ", 50_000))
	for _, kind := range []Kind{None, Gzip, Zstd, Xz} {
		for _, c := range [][]byte{content, []byte("x"), nil} {
			r, got, err := Reader(bytes.NewReader(packed(t, kind, c)))
			if err != nil || got != kind {
				t.Fatalf("%s: %s, %v", kind, got, err)
			}
			if b, err := io.ReadAll(r); err != nil || !bytes.Equal(b, c) {
				t.Errorf("%s of %d: %d bytes, %v", kind, len(c), len(b), err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	bz := []byte("BZh91AY&SY\x94\x1f\xe9\x0f\x00\x00\x00\x01\x00 \x00!\x18F\x82\xee\x48\xa7\x0a\x12\x12\x83\xfd\x21\xe0")
	if _, kind, err := Reader(bytes.NewReader(bz)); err != nil || kind != Bzip2 {
		t.Errorf("bzip2: %s, %v", kind, err)
	}
	if _, _, err := Reader(strings.NewReader("\xfd7zXZ\x00...")); err == nil {
		t.Error("xz: a damaged header is taken")
	}
}

func TestDamaged(t *testing.T) {
	content := []byte(strings.Repeat("some content ", 50_000))
	for _, kind := range []Kind{Gzip, Zstd, Xz} {
		p := packed(t, kind, content)
		for name, b := range map[string][]byte{"truncated": p[:len(p)-3], "garbage behind": append(bytes.Clone(p), "garbage!"...)} {
			r, _, err := Reader(bytes.NewReader(b))
			if err == nil {
				_, err = io.Copy(io.Discard, r)
				r.Close()
			}
			if err == nil {
				t.Errorf("%s %s: accepted", kind, name)
			}
		}
	}
}

// verdict fails instead of ending, as a verifying reader does.
type verdict struct{ io.Reader }

var errVerdict = errors.New("wrong digest")

func (v verdict) Read(p []byte) (int, error) {
	n, err := v.Reader.Read(p)
	if err == io.EOF {
		err = errVerdict
	}
	return n, err
}

func TestVerdictIsHeard(t *testing.T) {
	for _, kind := range []Kind{None, Gzip, Zstd, Xz} {
		r, _, err := Reader(verdict{bytes.NewReader(packed(t, kind, []byte("content, and enough of it")))})
		if err == nil {
			_, err = io.Copy(io.Discard, r)
			r.Close()
		}
		if !errors.Is(err, errVerdict) {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(packed(f, Gzip, []byte("a")))
	f.Add(packed(f, Zstd, []byte("a")))
	f.Add(packed(f, Xz, []byte("a")))
	f.Add([]byte("BZh91AY&SY"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, kind, err := Reader(bytes.NewReader(b))
		if err != nil {
			return
		}
		n, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
		if kind == None && (err != nil || n != int64(min(len(b), 1<<20))) {
			t.Fatalf("%d of %d, %v", n, len(b), err)
		}
		if err := r.Close(); err != nil && kind == None {
			t.Fatal(err)
		}
	})
}

// TestXz reads several streams with padding between, as `cat a.xz b.xz` and pxz give, and refuses a dictionary beyond the bound.
func TestXz(t *testing.T) {
	content := []byte(strings.Repeat("some content ", 50_000))
	one := packed(t, Xz, content)
	both := append(append(bytes.Clone(one), 0, 0, 0, 0), one...)
	r, _, err := Reader(bytes.NewReader(both))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); err != nil || len(b) != 2*len(content) {
		t.Errorf("two streams: %d bytes, %v", len(b), err)
	}
	short := []byte(strings.Repeat("some content ", 5))
	one = packed(t, Xz, short)
	for i := 6; i < len(one); i++ { // what is damaged is either noticed or does not matter
		bad := bytes.Clone(one)
		bad[i] ^= 0x10
		r, _, err := Reader(bytes.NewReader(bad))
		var got []byte
		if err == nil {
			got, err = io.ReadAll(r)
		}
		if err == nil && !bytes.Equal(got, short) {
			t.Errorf("byte %d of %d changed, and nobody noticed", i, len(one))
		}
	}
	var big bytes.Buffer
	z, err := xz.WriterConfig{DictCap: 2 * MaxWindow}.NewWriter(&big)
	if err == nil {
		_, err = z.Write(content)
	}
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if r, _, err = Reader(&big); err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if !errors.Is(err, ErrUnsupported) {
		t.Errorf("a dictionary of 256 MB: %v", err)
	}
}
