package control

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func frame(kind byte, data string) string {
	h := Header(kind, len(data))
	return string(h[:]) + data
}

func TestCopyFrames(t *testing.T) {
	in := frame(FrameStdout, "one") + frame(FrameStderr, "two") + frame(FrameStdout, "") + frame(FrameStdout, "three") + frame(FrameEnd, `{"code":3}`) + "rest"
	var out, err bytes.Buffer
	end, e := copyFrames(&out, &err, strings.NewReader(in))
	if e != nil || string(end) != `{"code":3}` || out.String() != "onethree" || err.String() != "two" {
		t.Errorf("%q %v %q %q", end, e, out.String(), err.String())
	}
	// Without an end frame, or within a frame, as from a monitor that was killed.
	for _, torn := range []string{frame(FrameStdout, "x"), frame(FrameStdout, "xyz")[:9], "\x01\x00"} {
		if end, e := copyFrames(nil, nil, strings.NewReader(torn)); end != nil || e != nil {
			t.Errorf("%q %v", end, e)
		}
	}
	// Frames that are larger than the buffer, and heads that lie across its end.
	var long, got bytes.Buffer
	for i := range 20 {
		long.WriteString(frame(FrameStdout, strings.Repeat("x", frameBuffer/3*i+i)))
	}
	if _, e := copyFrames(&got, nil, iotest.HalfReader(&long)); e != nil || got.Len() != 190*(frameBuffer/3+1) {
		t.Errorf("%d bytes, %v", got.Len(), e)
	}
	for _, bad := range []string{frame(7, "x"), frame(FrameEnd, strings.Repeat("x", maxEnd+1))} {
		if _, e := copyFrames(nil, nil, strings.NewReader(bad)); e == nil {
			t.Errorf("no error for %.20q", bad)
		}
	}
}

func FuzzCopyFrames(f *testing.F) {
	f.Add([]byte(frame(1, "a") + frame(2, "b") + frame(4, "{}")))
	f.Add([]byte{4, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		var n int64
		count := writerFunc(func(p []byte) (int, error) { n += int64(len(p)); return len(p), nil })
		end, err := copyFrames(count, count, bytes.NewReader(b))
		if n+int64(len(end)) > int64(len(b)) {
			t.Errorf("%d bytes came out of %d (%v)", n+int64(len(end)), len(b), err)
		}
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

var _ io.Writer = writerFunc(nil)

func TestHeader(t *testing.T) {
	h := Header(2, 70000)
	if h[0] != 2 || binary.BigEndian.Uint32(h[4:]) != 70000 || h[1]|h[2]|h[3] != 0 {
		t.Errorf("% x", h)
	}
}

func TestShortPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	err := ShortPath(path, func(p string) error {
		if len(p) > maxPath {
			t.Errorf("%q is too long", p)
		}
		return os.WriteFile(p, []byte("x"), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}
