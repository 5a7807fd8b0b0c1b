package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/layertar"
	"conex/internal/ocispec"
)

// rawHeader is one tar block, checksum included, for what archive/tar refuses to write.
func rawHeader(name string, kind byte, size string) []byte {
	var b [512]byte
	copy(b[0:100], name)
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	copy(b[124:136], size)
	copy(b[136:], "00000000000\x00")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b[:]
}

// pax makes a PAX header block and its records for the next entry.
func pax(records ...string) []byte {
	var body strings.Builder
	for k := 0; k < len(records); k += 2 {
		rest := " " + records[k] + "=" + records[k+1] + "\n"
		n := len(rest)
		for n != len(fmt.Sprint(n))+len(rest) {
			n = len(fmt.Sprint(n)) + len(rest)
		}
		body.WriteString(fmt.Sprint(n) + rest)
	}
	b := rawHeader("pax", 'x', fmt.Sprintf("%011o\x00", body.Len()))
	b = append(b, body.String()...)
	return append(b, make([]byte, (512-body.Len()%512)%512)...)
}

// millionTar has a million entries, most of them the folders that the names of a few files imply: as many headers would take ten seconds of a
// processor's time to read.
func millionTar() io.Reader {
	var e []entry
	left := layertar.MaxEntries
	for n := 0; left > 0; n++ {
		depth := max(0, min(left-2, 2000))
		name := fmt.Sprintf("%04d/", n) + strings.Repeat("d/", depth) + "f"
		if left == 1 {
			name = "last"
		}
		left -= strings.Count(name, "/") + 1
		e = append(e, fileEntry(name, ""))
	}
	return fromEntries(append(e, fileEntry("toomuch", ""))...)()
}

// empty fails if the store holds anything but itself.
func empty(t *testing.T, s *Store) {
	t.Helper()
	for _, d := range []string{"layers", "staging", "trash"} {
		e, err := os.ReadDir(s.root.Path(d))
		if err != nil {
			t.Fatal(err)
		}
		if len(e) != 0 {
			t.Errorf("%s: left behind: %v", d, e)
		}
	}
}

func TestHostile(t *testing.T) {
	link := func(name, target string) entry { return linkEntry(tar.TypeSymlink, name, target) }
	hard := func(name, target string) entry { return linkEntry(tar.TypeLink, name, target) }
	with := func(e entry, change func(h *tar.Header)) entry { change(&e.Header); return e }
	end := make([]byte, 1024)
	long := strings.Repeat("d/", 2100)
	for _, c := range []struct {
		what  string
		tar   func() io.Reader
		names string // the entry that the error names
		says  string
	}{
		{"dotdot", fromEntries(fileEntry("../../etc/cron.d/x", "x")), "../../etc/cron.d/x", `".."`},
		{"dotdot inside", fromEntries(fileEntry("a/../../x", "x")), "a/../../x", `".."`},
		{"absolute", fromEntries(fileEntry("/etc/passwd", "x")), "/etc/passwd", "absolute"},
		{"through a link", fromEntries(link("out", "/etc"), fileEntry("out/passwd", "x")), "out/passwd", "symbolic link"},
		{"through a link, folder", fromEntries(link("out", "/etc"), dirEntry("out/")), "out/", "takes the place"},
		{"through a nested link", fromEntries(dirEntry("a/"), link("a/b", "../.."), fileEntry("a/b/c/d", "x")), "a/b/c/d", "symbolic link"},
		{"hard link out", fromEntries(hard("shadow", "../../etc/shadow")), "shadow", `".."`},
		{"hard link absolute", fromEntries(hard("shadow", "/etc/shadow")), "shadow", "absolute"},
		{"hard link to nothing", fromEntries(hard("shadow", "etc/shadow")), "shadow", "not in this tar"},
		{"hard link through a link", fromEntries(link("l", "/etc"), hard("x", "l/shadow")), "x", "not in this tar"},
		{"hard link to a folder", fromEntries(dirEntry("d/"), hard("x", "d")), "x", "folder"},
		{"whiteout of /", fromEntries(fileEntry(".wh..", "")), ".wh..", "whiteout of /"},
		{"whiteout of ..", fromEntries(fileEntry(".wh...", "")), ".wh...", "whiteout of /"},
		{"whiteout of nothing", fromEntries(fileEntry(".wh.", "")), ".wh.", "whiteout of /"},
		{"whiteout of .. below", fromEntries(fileEntry("a/.wh...", "")), "a/.wh...", "whiteout"},
		{"opaque root", fromEntries(fileEntry("./.wh..wh..opq", "")), "./.wh..wh..opq", "whiteout of /"},
		{"below a whiteout", fromEntries(fileEntry(".wh.a/b", "")), ".wh.a/b", "whiteout"},
		{"file as a folder", fromEntries(fileEntry("f", "x"), fileEntry("f/g", "x")), "f/g", "no folder"},
		{"folder replaced", fromEntries(dirEntry("d/"), fileEntry("d", "x")), "d", "takes the place of a folder"},
		{"implied folder replaced", fromEntries(fileEntry("d/e", "x"), link("d", "/etc")), "d", "takes the place of a folder"},
		{"file replaced by a folder", fromEntries(fileEntry("d", "x"), dirEntry("d/")), "d/", "takes the place"},
		{"root as a file", fromEntries(fileEntry("./.", "x")), "./.", "root"},
		{"long name", fromEntries(fileEntry(strings.Repeat("n", 256), "")), strings.Repeat("n", 256), "longer than 255"},
		{"long path", fromEntries(fileEntry(long+"f", "")), long + "f", "longer than 4095"},
		{"bad owner", fromEntries(with(fileEntry("f", ""), func(h *tar.Header) { h.Uid = 1<<32 - 1 })), "f", "owner"},
		{"bad device", fromEntries(with(linkEntry(tar.TypeChar, "dev", ""), func(h *tar.Header) { h.Devmajor = 1 << 12 })), "dev", "device number"},
		{"bad capability", fromEntries(with(fileEntry("f", ""), func(h *tar.Header) {
			h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "evil"}
		})), "f", "capability"},
		{"unknown type", fromBytes(rawHeader("odd", 'Z', "00000000000\x00"), end), "odd", "unknown type"},
		{"NUL in a PAX name", fromBytes(rawHeader("ok", '0', "00000000000\x00"), pax("path", "a\x00b"), rawHeader("x", '0', "00000000000\x00"), end), "ok", "no valid tar header"},
		{"negative size", fromBytes(rawHeader("ok", '0', "00000000000\x00"), rawHeader("neg", '0', "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"), end), "ok", "no valid tar header"},
		{"negative PAX size", fromBytes(rawHeader("ok", '0', "00000000000\x00"), pax("size", "-512"), rawHeader("x", '0', "00000000000\x00"), end), "ok", "no valid tar header"},
		{"bad checksum", fromBytes(rawHeader("ok", '0', "00000000000\x00"), bytes.Repeat([]byte{'x'}, 512), end), "ok", "no valid tar header"},
		{"truncated content", fromBytes(rawHeader("cut", '0', "00000010000\x00"), make([]byte, 700)), "cut", "cut short"},
		{"truncated header", fromBytes(rawHeader("ok", '0', "00000000000\x00"), rawHeader("x", '0', "00000000000\x00")[:100]), "ok", "cut short"},
		{"a million entries", millionTar, "toomuch", "more than 999999 entries"},
		{"10 GB sparse", sparseTar(t, "10G"), "./huge", "sparse files of more than 4 GiB"},
		{"many sparse", sparseTar(t, "3G", "3G"), "./huge1", "sparse files of more than 4 GiB"},
	} {
		t.Run(c.what, func(t *testing.T) {
			drivers := []string{DriverEROFS, DriverDir}
			if c.what == "a million entries" {
				drivers = drivers[1:] // the same code reads it for both; it takes a second
			}
			for _, d := range drivers {
				s := newStore(t, d)
				info, err := s.Import(context.Background(), c.tar(), "")
				if err == nil {
					t.Fatalf("%s: accepted as %s", d, info.DiffID)
				}
				var e *layertar.EntryError
				if !errors.As(err, &e) || !errors.Is(err, layertar.ErrRefused) || e.Name != c.names || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: %v", d, err)
				}
				empty(t, s)
			}
		})
	}
}

func fromEntries(e ...entry) func() io.Reader {
	return func() io.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range e {
			h := e.Header
			h.Size, h.Format = int64(len(e.body)), tar.FormatPAX
			if err := w.WriteHeader(&h); err != nil {
				panic(fmt.Sprintf("test tar: %s: %v", h.Name, err))
			}
			if _, err := io.WriteString(w, e.body); err != nil {
				panic(err)
			}
		}
		if err := w.Close(); err != nil {
			panic(err)
		}
		return &b
	}
}

func fromBytes(parts ...[]byte) func() io.Reader {
	return func() io.Reader { return bytes.NewReader(bytes.Join(parts, nil)) }
}

// sparseTar lets GNU tar pack sparse files of the given sizes, ./huge0, ./huge1 and so on, or ./huge.
func sparseTar(t *testing.T, sizes ...string) func() io.Reader {
	return func() io.Reader {
		dir := t.TempDir()
		args := []string{"--format=posix", "--sparse", "-C", dir, "-cf", "-"}
		for k, size := range sizes {
			name := fmt.Sprintf("huge%d", k)
			if len(sizes) == 1 {
				name = "huge"
			}
			if out, err := exec.Command("truncate", "-s", size, filepath.Join(dir, name)).CombinedOutput(); err != nil {
				t.Fatalf("truncate: %v %s", err, out)
			}
			args = append(args, "./"+name)
		}
		out, err := exec.Command("tar", args...).Output()
		if err != nil {
			t.Fatalf("tar: %v", err)
		}
		return bytes.NewReader(out)
	}
}

func TestWrongDigest(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		data := tarOf(t, fileEntry("f", "x"))
		_, err := s.Import(context.Background(), bytes.NewReader(data), ocispec.FromBytes([]byte("other")))
		if !errors.Is(err, ErrDigest) {
			t.Errorf("got %v", err)
		}
		empty(t, s)
		// A source that fails is the source's error, not the tar's.
		broken := errors.New("connection lost")
		_, err = s.Import(context.Background(), io.MultiReader(bytes.NewReader(data[:700]), errReader{broken}), "")
		if !errors.Is(err, broken) || errors.Is(err, layertar.ErrRefused) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := s.Import(ctx, bytes.NewReader(data), ""); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		empty(t, s)
	})
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// What Docker's users call a normal tar: leading "./", names twice, trailing bytes, no end marker, unknown attributes.
func TestHarmlessOddities(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		e := fileEntry("./a/b", "new")
		e.PAXRecords = map[string]string{"SCHILY.xattr.com.apple.quarantine": "1", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}
		data := tarOf(t, dirEntry("./"), dirEntry("./a/"), fileEntry("a/b", "old"), linkEntry(tar.TypeLink, "./keeps-old", "./a/b"), e,
			entry{tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}, ""})
		data = append(data, bytes.Repeat([]byte("junk"), 5000)...)
		info := mustImport(t, s, data)
		m, _ := mountChain(t, s, info.DiffID)
		for p, want := range map[string]string{"a/b": "new", "keeps-old": "old"} {
			if b, err := os.ReadFile(filepath.Join(m, p)); err != nil || string(b) != want {
				t.Errorf("%s: %q, %v", p, b, err)
			}
		}
		if x, err := listXattrs(filepath.Join(m, "a/b")); err != nil || len(x) != 0 {
			t.Errorf("attributes %q, %v", x, err)
		}
		sameTar(t, s, info.DiffID, data)
		bare := tarOf(t, fileEntry("f", "x"))
		bare = bare[:len(bare)-1024]
		info = mustImport(t, s, bare)
		sameTar(t, s, info.DiffID, bare)
		// No padding behind the last file either, as umoci writes it.
		bare = bare[:len(bare)-511]
		info = mustImport(t, s, bare)
		sameTar(t, s, info.DiffID, bare)
		m, _ = mountChain(t, s, info.DiffID)
		if b, err := os.ReadFile(filepath.Join(m, "f")); err != nil || string(b) != "x" {
			t.Errorf("without padding: %q, %v", b, err)
		}
		info = mustImport(t, s, nil)
		if info.Entries != 0 || info.Size != 0 {
			t.Errorf("no bytes at all: %+v", info)
		}
		if _, err := s.Lower(context.Background(), []ocispec.Digest{info.DiffID}); err != nil {
			t.Error(err)
		}
	})
}
