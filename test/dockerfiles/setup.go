package dockerfiles

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"conex/internal/ondemand"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// HTTPAddr is where Handler is to be served: the address stands in Dockerfiles, and so in what is recorded.
const HTTPAddr = "127.0.0.1:18099"

// epoch is the time of everything in a context, archiveEpoch of what is in an archive.
var (
	epoch        = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	archiveEpoch = time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
)

// Paths are a case's folders on disk.
type Paths struct{ Context, Outside string }

// Write makes the case's context and what lies beside it below dir. Files are as much younger than epoch.
func (c *Case) Write(dir string, younger time.Duration) (Paths, error) {
	at := epoch.Add(younger)
	p := Paths{Context: filepath.Join(dir, "context"), Outside: filepath.Join(dir, "outside")}
	for _, d := range []string{p.Context, p.Outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return p, err
		}
	}
	for _, f := range c.sections {
		name, data, base := f.Name, f.Data, p.Context
		kind, rest, ok := strings.Cut(name, ":")
		if ok && kind == "http" {
			continue
		}
		if ok && kind == "outside" {
			name, base = rest, p.Outside
		}
		name, data, err := decode(name, data)
		if err == nil {
			err = write(filepath.Join(base, name), data)
		}
		if err != nil {
			return p, fmt.Errorf("case %s: %w", c.Name, err)
		}
	}
	for _, d := range []string{p.Context, p.Outside} {
		if err := age(d, at); err != nil {
			return p, err
		}
	}
	for _, s := range c.setup {
		if err := setup(p.Context, s, at); err != nil {
			return p, fmt.Errorf("case %s: %q: %w", c.Name, s, err)
		}
	}
	return p, nil
}

// decode takes a section's prefix off and does what it says.
func decode(name string, data []byte) (string, []byte, error) {
	kind, rest, ok := strings.Cut(name, ":")
	if !ok {
		return name, data, nil
	}
	var err error
	switch kind {
	case "raw":
		data = bytes.TrimSuffix(data, []byte("\n"))
	case "tar":
		data, err = archive(rest, string(data))
	case "b64":
		data, err = base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(data)), ""))
	default:
		err = fmt.Errorf("section %q: the prefix is not known", name)
	}
	return rest, data, err
}

// BuildFlags are the case's flags with the folders of p.
func (c *Case) BuildFlags(p Paths) []string {
	var out []string
	for _, f := range c.Flags {
		out = append(out, strings.ReplaceAll(f, "$OUT", p.Outside))
	}
	return out
}

func write(name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}

// age gives everything below dir its mode and a time.
func age(dir string, at time.Time) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if d.IsDir() {
			mode = 0o755
		}
		if err := os.Chmod(name, mode); err != nil {
			return err
		}
		return os.Chtimes(name, at, at)
	})
}

// setup does one directive in the context:
//
//	symlink TARGET LINK    hardlink FILE LINK    mkdir DIR    fifo FILE    socket FILE    mode OCTAL FILE    owner UID:GID FILE
//	mtime RFC3339 FILE     xattr NAME=VALUE FILE              big SIZE FILE
func setup(dir, line string, at time.Time) error {
	if line == "foldertimes" {
		return nil // see Render
	}
	w, err := fields(line)
	if err != nil {
		return err
	}
	if len(w) < 2 {
		return fmt.Errorf("too few words")
	}
	name := filepath.Join(dir, w[len(w)-1])
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	var parent unix.Stat_t
	if err := unix.Stat(filepath.Dir(name), &parent); err != nil {
		return err
	}
	mtime := at
	switch w[0] {
	case "symlink":
		err = os.Symlink(w[1], name)
	case "hardlink":
		err = os.Link(filepath.Join(dir, w[1]), name)
	case "mkdir":
		err = os.MkdirAll(name, 0o755)
	case "fifo":
		err = unix.Mkfifo(name, 0o644)
	case "socket":
		err = unix.Mknod(name, unix.S_IFSOCK|0o644, 0)
	case "mode":
		var m uint64
		if m, err = strconv.ParseUint(w[1], 8, 32); err == nil {
			err = unix.Chmod(name, uint32(m))
		}
	case "owner":
		var uid, gid int
		if _, err = fmt.Sscanf(w[1], "%d:%d", &uid, &gid); err == nil {
			err = os.Lchown(name, uid, gid)
		}
	case "mtime":
		mtime, err = time.Parse(time.RFC3339Nano, w[1])
	case "xattr":
		k, v, _ := strings.Cut(w[1], "=")
		err = unix.Lsetxattr(name, k, []byte(v), 0)
	case "big":
		var n int64
		if n, err = strconv.ParseInt(w[1], 10, 64); err == nil {
			err = os.WriteFile(name, bytes.Repeat([]byte("0123456789abcde\n"), int(n/16)), 0o644)
		}
	default:
		err = fmt.Errorf("not a directive")
	}
	if err != nil {
		return err
	}
	ts := func(t time.Time) []unix.Timespec {
		s := unix.NsecToTimespec(t.UnixNano())
		return []unix.Timespec{s, s}
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, name, ts(mtime), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, filepath.Dir(name), ts(at), unix.AT_SYMLINK_NOFOLLOW)
}

// archive makes a tar from lines "TYPE NAME MODE UID:GID [CONTENT]", TYPE dir, file, symlink or hardlink, and compresses it as name ends.
// In CONTENT \n is a newline.
func archive(name, list string) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for line := range strings.Lines(list) {
		w := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 5)
		if len(w) < 4 {
			return nil, fmt.Errorf("%q: want TYPE NAME MODE UID:GID", line)
		}
		h := &tar.Header{Name: w[1], ModTime: archiveEpoch, Format: tar.FormatPAX}
		mode, err := strconv.ParseInt(w[2], 8, 32)
		if err != nil {
			return nil, err
		}
		h.Mode = mode
		if _, err := fmt.Sscanf(w[3], "%d:%d", &h.Uid, &h.Gid); err != nil {
			return nil, err
		}
		content := ""
		if len(w) == 5 {
			content = strings.ReplaceAll(w[4], `\n`, "\n")
		}
		switch w[0] {
		case "dir":
			h.Typeflag = tar.TypeDir
		case "file":
			h.Typeflag, h.Size = tar.TypeReg, int64(len(content))
		case "symlink":
			h.Typeflag, h.Linkname, content = tar.TypeSymlink, content, ""
		case "hardlink":
			h.Typeflag, h.Linkname, content = tar.TypeLink, content, ""
		case "fifo":
			h.Typeflag = tar.TypeFifo
		default:
			return nil, fmt.Errorf("%q is no type of entry", w[0])
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(tw, content); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return squeeze(name, buf.Bytes())
}

func squeeze(name string, data []byte) ([]byte, error) {
	ondemand.Compress()
	var buf bytes.Buffer
	var w io.WriteCloser
	var err error
	switch filepath.Ext(name) {
	case ".gz", ".tgz":
		w = gzip.NewWriter(&buf)
	case ".xz":
		w, err = xz.NewWriter(&buf)
	case ".zst":
		w, err = zstd.NewWriter(&buf)
	default:
		return data, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// Handler serves the "http:" sections of cases, each with the time epoch; a file whose name contains "untimed" has none.
func Handler(cases []*Case) (http.Handler, error) {
	files := map[string][]byte{}
	for _, c := range cases {
		for _, f := range c.sections {
			name, ok := strings.CutPrefix(f.Name, "http:")
			if !ok {
				continue
			}
			name, data, err := decode(name, f.Data)
			if err != nil {
				return nil, fmt.Errorf("case %s: %w", c.Name, err)
			}
			files["/"+c.Name+"/"+name] = data
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		at := epoch
		if strings.Contains(r.URL.Path, "untimed") {
			at = time.Time{}
		}
		http.ServeContent(w, r, "", at, bytes.NewReader(data))
	}), nil
}
