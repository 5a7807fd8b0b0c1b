package tty_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"conex/internal/linux/tty"
)

// open returns a terminal of the machine's own devpts.
func open(t *testing.T) (master, slave *os.File) {
	t.Helper()
	return openAt(t, "/dev/ptmx")
}

func openAt(t *testing.T, path string) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	slave, name, err := tty.OpenPTY(master)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	if filepath.Dir(name) != "/dev/pts" {
		t.Errorf("slave's path %q", name)
	}
	return master, slave
}

func TestPTY(t *testing.T) {
	master, slave := open(t)
	fd := int(slave.Fd())
	if !tty.IsTerminal(fd) || !tty.IsTerminal(int(master.Fd())) {
		t.Error("not a terminal")
	}
	want := tty.Size{Rows: 31, Cols: 97}
	if err := tty.SetSize(int(master.Fd()), want); err != nil {
		t.Fatal(err)
	}
	if got, err := tty.GetSize(fd); got != want || err != nil {
		t.Errorf("size %v, %v; want %v", got, err, want)
	}

	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	state, err := tty.MakeRaw(fd)
	if err != nil {
		t.Fatal(err)
	}
	// In raw mode Ctrl-C is a byte like others, and arrives without a line's end.
	if _, err := master.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if n, err := slave.Read(b); n != 1 || b[0] != 3 || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
	if err := tty.Restore(fd, state); err != nil {
		t.Fatal(err)
	}
	after, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("restored mode %+v, %v; want %+v", after, err, before)
	}
}

func TestControllingTerminal(t *testing.T) {
	master, slave := open(t)
	cmd := exec.Command("sh", "-c", "tty >&2; stty size </dev/tty")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := tty.SetSize(int(master.Fd()), tty.Size{Rows: 12, Cols: 34}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	want := slave.Name() + "\r\n12 34\r\n"
	b := make([]byte, len(want)) // the kernel passes it on in pieces, when it comes to it
	if n, err := io.ReadFull(master, b); string(b) != want {
		t.Errorf("got %q, %v; want %q", b[:n], err, want)
	}
}

// TestForeignDevpts uses a devpts that is mounted nowhere near /dev/pts, as a container's is.
func TestForeignDevpts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a devpts")
	}
	dir := t.TempDir()
	if err := unix.Mount("devpts", dir, "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	master, slave := openAt(t, filepath.Join(dir, "ptmx"))
	var got, want unix.Stat_t
	if err := unix.Fstat(int(slave.Fd()), &got); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(filepath.Join(dir, "0"), &want); err != nil {
		t.Fatal(err)
	}
	if got.Dev != want.Dev || got.Ino != want.Ino {
		t.Errorf("slave is %d/%d, want that instance's 0: %d/%d", got.Dev, got.Ino, want.Dev, want.Ino)
	}
	if _, err := master.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	if n, err := slave.Read(b); string(b[:n]) != "hello\n" || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
}

func TestNoTerminal(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if tty.IsTerminal(int(f.Fd())) {
		t.Error("/dev/null is a terminal")
	}
	if _, err := tty.MakeRaw(int(f.Fd())); !errors.Is(err, unix.ENOTTY) {
		t.Errorf("raw /dev/null: %v", err)
	}
	if _, _, err := tty.OpenPTY(f); err == nil {
		t.Error("/dev/null has a slave")
	}
}

func TestParseDetachKeys(t *testing.T) {
	for s, want := range map[string][]byte{
		"": nil, tty.DefaultDetachKeys: {16, 17}, "a": {'a'}, "ctrl-a,b,ctrl-@": {1, 'b', 0}, `ctrl-[,ctrl-\,ctrl-],ctrl-^,ctrl-_`: {27, 28, 29, 30, 31},
	} {
		if got, err := tty.ParseDetachKeys(s); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q: %v, %v; want %v", s, got, err, want)
		}
	}
	for _, s := range []string{",", "ctrl-", "ctrl-A", "ctrl-ab", "ab", "a,", "é", "ctrl-1"} {
		if got, err := tty.ParseDetachKeys(s); err == nil {
			t.Errorf("%q = %v", s, got)
		}
	}
}

func TestDetachReader(t *testing.T) {
	tests := []struct {
		keys, in, want string
		detached       bool
	}{
		{"\x10\x11", "hello", "hello", false},
		{"\x10\x11", "hel\x10\x11lo", "hel", true},
		{"\x10\x11", "\x10\x10\x11", "\x10", true},
		{"\x10\x11", "a\x10b\x11\x10", "a\x10b\x11\x10", false},
		{"\x10\x11", "\x10", "\x10", false},
		{"aab", "aaab", "a", true},
		{"abab", "abacabab", "abac", true},
		{"abab", "abaabab", "aba", true},
		{"q", "xq", "x", true},
		{"", "x\x10\x11", "x\x10\x11", false},
	}
	for _, tt := range tests {
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader, "with the error": iotest.DataErrReader,
		} {
			for _, size := range []int{1, 3, 512} {
				r := tty.NewDetachReader(wrap(bytes.NewReader([]byte(tt.in))), []byte(tt.keys))
				var got []byte
				var err error
				for err == nil {
					b := make([]byte, size)
					var n int
					n, err = r.Read(b)
					got = append(got, b[:n]...)
				}
				want := io.EOF
				if tt.detached {
					want = tty.ErrDetached
				}
				if string(got) != tt.want || err != want {
					t.Errorf("keys %q input %q, %s, %d at once: %q, %v; want %q, %v", tt.keys, tt.in, name, size, got, err, tt.want, want)
				}
			}
		}
	}
}

func FuzzDetachReader(f *testing.F) {
	f.Add([]byte("\x10\x11"), []byte("ab\x10\x10\x11c"), byte(2))
	f.Add([]byte("aab"), []byte("aaaab"), byte(1))
	f.Fuzz(func(t *testing.T, keys, in []byte, size byte) {
		if len(keys) == 0 || len(keys) > 16 {
			return
		}
		r := tty.NewDetachReader(iotest.HalfReader(bytes.NewReader(in)), keys)
		var got []byte
		var err error
		for err == nil {
			b := make([]byte, int(size)+1)
			var n int
			n, err = r.Read(b)
			got = append(got, b[:n]...)
		}
		want, wantErr := in, io.EOF
		if i := bytes.Index(in, keys); i >= 0 {
			want, wantErr = in[:i], tty.ErrDetached
		}
		if !bytes.Equal(got, want) || err != wantErr {
			t.Fatalf("%q, %v; want %q, %v", got, err, want, wantErr)
		}
	})
}

func TestHideInput(t *testing.T) {
	master, slave := open(t)
	fd := int(slave.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	old, err := tty.HideInput(fd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := master.WriteString("s3cret\n"); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	if n, err := slave.Read(line); err != nil || string(line[:n]) != "s3cret\n" {
		t.Fatalf("%q, %v", line[:n], err)
	}
	if err := tty.Restore(fd, old); err != nil {
		t.Fatal(err)
	}
	if after, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil || *after != *before {
		t.Errorf("%+v, %v; before %+v", after, err, before)
	}
	if _, err := slave.WriteString("seen"); err != nil {
		t.Fatal(err)
	}
	// What was typed would stand before it.
	if n, err := io.ReadFull(master, line[:len("seen")]); err != nil || string(line[:n]) != "seen" {
		t.Errorf("the terminal showed %q, %v", line[:n], err)
	}
}
