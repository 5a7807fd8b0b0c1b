package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"conex/internal/compress"
	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// source is where the files of an archive are.
type source interface {
	// find returns the regular file of that name; fs.ErrNotExist if there is none.
	find(name string) (file, error)
	// has reports whether there is anything of that name.
	has(name string) bool
	Close() error
}

// file is one file of an archive.
type file struct {
	name  string
	size  int64
	taken *Taken // of a stream: its content went to the caller; open is nil then
	open  func() (io.ReadCloser, error)
}

// entry is what is remembered of a tar's entry.
type entry struct {
	kind      kind
	off, size int64
	link      string // of links: the name that it leads to
	taken     *Taken
}

type kind byte

const (
	plain   kind = iota
	link         // symbolic or hard
	sparse       // stored without its holes
	skipped      // of a stream: too large for what it is
)

// maxLinks is how many links in a row are followed. Docker's old archives have one.
const maxLinks = 8

// entries is a tar's directory over a file that holds the contents.
type entries struct {
	m    map[string]entry
	data io.ReaderAt
	end  func() error
}

func (e *entries) Close() error { return e.end() }

func (e *entries) has(name string) bool { _, ok := e.m[name]; return ok }

func (e *entries) find(name string) (file, error) {
	at := name
	for range maxLinks {
		x, ok := e.m[at]
		if !ok {
			return file{}, fs.ErrNotExist
		}
		switch x.kind {
		case link:
			at = x.link
			continue
		case sparse:
			return file{}, refuse("%s is stored without its holes: pack the archive without --sparse", name)
		case skipped:
			return file{}, refuse("%s has %d bytes and is no layer", name, x.size)
		}
		f := file{name: name, size: x.size, taken: x.taken}
		if x.taken == nil {
			f.open = func() (io.ReadCloser, error) { return io.NopCloser(io.NewSectionReader(e.data, x.off, x.size)), nil }
		}
		return f, nil
	}
	return file{}, refuse("%s is a link that leads to more than %d others", name, maxLinks)
}

// directory reads the headers of a tar. take gets every regular file and fills in where its content is; r's position is at its
// content then.
func directory(ctx context.Context, r *position, take func(h *tar.Header, name string, content io.Reader) (entry, error)) (map[string]entry, error) {
	m := map[string]entry{}
	tr := tar.NewReader(io.Reader(r))
	if r.at != nil {
		tr = tar.NewReader(seekable{r})
	}
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if err == io.EOF {
			if n == 0 {
				return nil, refuse("the archive is empty")
			}
			return m, nil
		}
		if err != nil {
			return nil, r.blame(err, n)
		}
		if n == maxEntries {
			return nil, refuse("the archive has more than %d entries", maxEntries)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		name, err := entryName(h.Name)
		if err != nil {
			return nil, err
		}
		var x entry
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeRegA, tar.TypeCont: //nolint:staticcheck // TypeRegA: old archives have it
			if layertar.IsSparse(h) {
				x.kind = sparse
				break
			}
			x, err = take(h, name, tr)
		case tar.TypeGNUSparse:
			x = entry{kind: sparse}
		case tar.TypeSymlink:
			x.kind = link
			x.link, err = entryName(path.Join(path.Dir(name), h.Linkname))
			if path.IsAbs(h.Linkname) {
				err = refuse("entry %s leads out of the archive, to %s", quote(h.Name), quote(h.Linkname))
			}
		case tar.TypeLink:
			x.kind = link
			x.link, err = entryName(h.Linkname)
		default: // folders, which nothing here is asked about, and what has no place in an archive
			continue
		}
		if err != nil {
			return nil, r.blame(err, n)
		}
		if _, twice := m[name]; twice && (name == dockerList || name == ociList || name == ociMark) {
			return nil, refuse("the archive has %s twice", name)
		}
		m[name] = x
	}
}

// entryName returns the name under which an entry is known, and refuses one that leads out of the archive.
func entryName(s string) (string, error) {
	c := path.Clean(s)
	if s == "" || path.IsAbs(s) || c == ".." || strings.HasPrefix(c, "../") || strings.IndexByte(s, 0) >= 0 {
		return "", refuse("entry %s leads out of the archive", quote(s))
	}
	return c, nil
}

// quote makes a stranger's name fit for a message of one line.
func quote(s string) string {
	if len(s) > 100 {
		s = s[:100] + "..."
	}
	return strconv.Quote(s)
}

// position is a reader that knows where it stands and keeps an error of the source apart from the tar reader's. archive/tar reads
// headers block by block and nothing ahead, so at an entry the position is that of its content.
type position struct {
	r   io.Reader
	at  io.ReaderAt // nil for a stream
	n   int64
	err error
}

func (p *position) Read(b []byte) (n int, err error) {
	if p.at != nil {
		n, err = p.at.ReadAt(b, p.n)
		if n > 0 && err == io.EOF {
			err = nil
		}
	} else {
		n, err = p.r.Read(b)
	}
	p.n += int64(n)
	if err != nil && err != io.EOF {
		p.err = err
	}
	return n, err
}

// seekable is a position of which contents are skipped without reading them.
type seekable struct{ *position }

func (s seekable) Seek(off int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || off < 0 {
		return 0, errors.New("a tar is read forwards")
	}
	s.n += off
	return s.n, nil
}

// blame says whose fault an error is that came after n entries: the source's, or the archive's.
func (p *position) blame(err error, n int) error {
	switch {
	case p.err != nil:
		return p.err
	case errors.Is(err, ErrRefused):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse("the archive is cut short")
	case errors.Is(err, tar.ErrHeader) && n == 0:
		return refuse("this is no tar")
	case errors.Is(err, tar.ErrHeader):
		return refuse("the archive is damaged after its entry number %d", n)
	}
	return err
}

// File reads an uncompressed tar of size bytes whose parts can be read in any order. Close does not close f.
func File(ctx context.Context, f io.ReaderAt, size int64) (*Archive, error) {
	p := &position{at: io.NewSectionReader(f, 0, size)}
	m, err := directoryAt(ctx, p, size)
	if err != nil {
		return nil, err
	}
	return open(ctx, &entries{m, f, func() error { return nil }})
}

func directoryAt(ctx context.Context, p *position, size int64) (map[string]entry, error) {
	return directory(ctx, p, func(h *tar.Header, name string, _ io.Reader) (entry, error) {
		if h.Size > size-p.n {
			return entry{}, refuse("the archive is cut short in %s", quote(name))
		}
		return entry{off: p.n, size: h.Size}, nil
	})
}

// Stream reads a tar as it comes, to its end. What looks like a layer goes to take, at once, as the bytes in the archive; the rest is
// kept in spool, an empty file, which Close does not close. take must not return an error for content that is no layer, but a Taken
// with Err. name is the entry's.
func Stream(ctx context.Context, r io.Reader, spool *os.File, take func(ctx context.Context, name string, r io.Reader, size int64) (*Taken, error)) (*Archive, error) {
	p := &position{r: r}
	var spooled, passed int64
	block := make([]byte, tarBlock)
	m, err := directory(ctx, p, func(h *tar.Header, name string, content io.Reader) (entry, error) {
		head := block[:min(h.Size, tarBlock)]
		if _, err := io.ReadFull(content, head); err != nil {
			return entry{}, noEOF(err)
		}
		x := entry{size: h.Size, off: spooled}
		content = io.MultiReader(bytes.NewReader(head), content)
		switch {
		case layerLike(head):
			t, err := take(ctx, name, content, h.Size)
			if err != nil {
				return entry{}, err
			}
			x.taken = t
			return x, nil
		case h.Size > MaxList && (name == dockerList || name == ociList):
			return entry{}, refuse("%s has %d bytes, at most %d are allowed", quote(name), h.Size, MaxList)
		case h.Size > MaxList:
			if passed += h.Size; passed < 0 || passed > maxSkipped {
				return entry{}, refuse("the archive holds more than %d GiB that is no layer", maxSkipped>>30)
			}
			x.kind = skipped
			return x, nil
		}
		if spooled+h.Size > maxSpool {
			return entry{}, refuse("the archive holds more than %d MiB beside its layers", maxSpool>>20)
		}
		n, err := io.Copy(spool, content)
		spooled += n
		return x, noEOF(err)
	})
	if err != nil {
		return nil, err
	}
	// What follows the end is read too: a compressed stream has its checksum there.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	return open(ctx, &entries{m, spool, func() error { return nil }})
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

const tarBlock = 512

// layerLike reports whether a file that begins with head may be a layer: compressed, or a tar by the checksum of its first header, or
// an empty tar.
func layerLike(head []byte) bool {
	if compress.Detect(head) != compress.None {
		return true
	}
	if len(head) < tarBlock {
		return false
	}
	sum, zero := 0, true
	for i, c := range head {
		zero = zero && c == 0
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int(c)
	}
	if zero {
		return true
	}
	want, err := strconv.ParseInt(strings.Trim(string(head[148:156]), " \x00"), 8, 32)
	return err == nil && int(want) == sum
}

// folder is an archive that lies unpacked in a folder, which nothing in it can lead out of.
type folder struct{ root *os.Root }

func (f folder) Close() error { return f.root.Close() }

func (f folder) has(name string) bool { _, err := f.root.Lstat(name); return err == nil }

func (f folder) find(name string) (file, error) {
	if _, err := entryName(name); err != nil {
		return file{}, err
	}
	// Not to hang in a fifo.
	open := func() (*os.File, error) { return f.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) }
	o, err := open()
	if err != nil {
		return file{}, err
	}
	defer o.Close()
	st, err := o.Stat()
	if err != nil {
		return file{}, err
	}
	if !st.Mode().IsRegular() {
		return file{}, refuse("%s is no file", quote(name))
	}
	return file{name: name, size: st.Size(), open: func() (io.ReadCloser, error) { return open() }}, nil
}

// Dir reads a folder.
func Dir(ctx context.Context, name string) (*Archive, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	a, err := open(ctx, folder{root})
	if err != nil {
		root.Close()
	}
	return a, err
}

// read returns the whole of a file that may have max bytes.
func read(src source, name string, max int64) ([]byte, error) {
	f, err := src.find(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, missing{name}
	}
	if err != nil {
		return nil, err
	}
	if f.taken != nil {
		return nil, refuse("%s should be JSON, and is a tar or compressed", quote(name))
	}
	if f.size > max {
		return nil, refuse("%s has %d bytes, at most %d are allowed", quote(name), f.size, max)
	}
	r, err := f.open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b := make([]byte, f.size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read %s: %w", quote(name), noEOF(err))
	}
	return b, nil
}

// missing is the refusal of an archive that names what it does not have.
type missing struct{ name string }

func (m missing) Error() string        { return "the archive has no " + quote(m.name) }
func (m missing) Is(target error) bool { return target == ErrRefused || target == fs.ErrNotExist }
