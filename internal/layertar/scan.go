package layertar

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
)

// Scan reads an uncompressed tar to its end, the bytes after its end marker included, and returns its tree, finished.
// r is read strictly forwards and never past its end, so that a caller can hash and store what goes by.
//
// The content of sparse files goes to spill, in chunks of SparseChunk bytes without the holes; a nil spill drops it.
// A tar that is hostile, damaged or cut short is an *EntryError; an error of r or spill is passed on as it is.
func Scan(r io.Reader, spill io.Writer) (*Tree, error) {
	t := NewTree()
	c := &counter{r: r}
	tr := tar.NewReader(c)
	sp := &spiller{w: spill}
	last := ""
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			if c.err != nil {
				return nil, c.err
			}
			return nil, &EntryError{Name: last, Err: plain(err)}
		}
		last = h.Name
		// archive/tar reads headers block by block and nothing ahead, so the content begins here.
		i, err := t.Add(h, c.n)
		if err != nil {
			return nil, err
		}
		if i == nil || !i.Sparse || h.Typeflag == tar.TypeLink {
			continue // the next header skips the content
		}
		if i.Extents, err = sp.store(tr, i.Size); err != nil {
			if c.err != nil {
				return nil, c.err
			}
			if sp.err != nil {
				return nil, sp.err
			}
			return nil, &EntryError{Name: h.Name, Err: plain(err)}
		}
	}
	if c.err != nil {
		return nil, c.err
	}
	if _, err := io.CopyBuffer(io.Discard, onlyReader{c}, make([]byte, 64<<10)); err != nil {
		return nil, err
	}
	t.Finish()
	return t, nil
}

// plain says in one line what archive/tar found, at the entry that it stood at.
func plain(err error) error {
	if errors.Is(err, tar.ErrHeader) {
		return errors.New("no valid tar header follows")
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the tar is cut short here")
	}
	return err
}

// onlyReader hides Seek, which io.Copy's helpers have no use for.
type onlyReader struct{ io.Reader }

// Discarder is a reader that can skip n bytes without copying them to anybody. Fewer are skipped at the end only, which is
// io.EOF.
type Discarder interface{ Discard(n int64) (int64, error) }

// counter counts what was read, and keeps an error of the source apart from the tar reader's.
type counter struct {
	r   io.Reader
	n   int64
	err error
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.note(int64(n), err)
	return n, err
}

func (c *counter) note(n int64, err error) {
	c.n += n
	if err != nil && err != io.EOF {
		c.err = err
	}
}

// Seek only skips forwards. archive/tar calls it for contents that nobody read, which spares them a copy.
func (c *counter) Seek(off int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || off < 0 {
		return 0, errors.New("a tar is read forwards")
	}
	var n int64
	var err error
	if d, ok := c.r.(Discarder); ok {
		n, err = d.Discard(off)
	} else {
		n, err = io.CopyN(io.Discard, c.r, off)
	}
	c.note(n, err)
	if err == io.EOF {
		err = nil // the read that follows meets the end again and reports it
	}
	return c.n, err
}

// spiller stores the chunks of sparse files that are not zero.
type spiller struct {
	w   io.Writer
	at  int64
	err error
}

func (s *spiller) store(r io.Reader, size int64) ([]Extent, error) {
	var out []Extent
	var zeros [SparseChunk]byte
	buf := make([]byte, SparseChunk)
	for off := int64(0); off < size; off += SparseChunk {
		n := min(SparseChunk, size-off)
		clear(buf)
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if bytes.Equal(buf, zeros[:]) {
			continue
		}
		if s.w != nil {
			if _, err := s.w.Write(buf); err != nil {
				s.err = err
				return nil, err
			}
		}
		out = append(out, Extent{Off: off, At: s.at})
		s.at += SparseChunk
	}
	// A sparse map may end before the stored data does; whatever is left is read over by the next header.
	return out, nil
}
