package layers

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/layertar"
)

// Writer makes a new layer entry by entry: each is appended to the tar, hashed and indexed as it goes by. Use it from one
// goroutine.
type Writer struct {
	ctx   context.Context //nolint:containedctx // a Writer is one operation, which the context of NewWriter spans
	store *Store
	stage *disk.Stage
	file  *os.File
	sink  *sink
	tar   *tar.Writer
	tree  *layertar.Tree
	buf   []byte
	n     int   // entries so far
	err   error // the first failure: the tar is unusable from then on
}

// NewWriter begins a new layer. Close the writer, after or instead of Commit.
func (s *Store) NewWriter(ctx context.Context) (*Writer, error) {
	st, err := s.root.Stage()
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(st.Dir, "layer.tar"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, errors.Join(err, st.Close())
	}
	out := newSink(f)
	out.past = s.drv.name() == DriverEROFS
	return &Writer{ctx: ctx, store: s, stage: st, file: f, sink: out, tar: tar.NewWriter(out), tree: layertar.NewTree()}, nil
}

// WriteEntry appends an entry; content gives exactly h.Size bytes for a regular file and is ignored for everything else.
// h is not changed. What can't belong to a layer's identity is left out: user and group names, access and change times,
// the format, extended attributes that layertar drops. Extended attributes are PAX records "SCHILY.xattr.<name>".
// The rules of layertar.Tree.Add hold; after an error the writer can only be closed.
func (w *Writer) WriteEntry(h *tar.Header, content io.Reader) error {
	if w.err == nil {
		if w.stage == nil {
			return errors.New("write to a closed layer")
		}
		w.err = w.write(h, content)
	}
	return w.err
}

func (w *Writer) write(h *tar.Header, content io.Reader) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	n, err := normal(h)
	if err != nil {
		return &layertar.EntryError{Name: h.Name, Err: err}
	}
	if err := w.tar.WriteHeader(n); err != nil {
		return fmt.Errorf("write tar entry %q: %w", h.Name, err)
	}
	if _, err := w.tree.Add(n, w.sink.n); err != nil {
		return err
	}
	w.n++
	if n.Size == 0 {
		return nil
	}
	if content == nil {
		return fmt.Errorf("write tar entry %q: no content", h.Name)
	}
	if w.buf == nil {
		w.buf = make([]byte, 128<<10)
	}
	left := n.Size
	for left > 0 {
		k, err := content.Read(w.buf[:min(int64(len(w.buf)), left)])
		if k > 0 {
			if _, werr := w.tar.Write(w.buf[:k]); werr != nil {
				return fmt.Errorf("write tar entry %q: %w", h.Name, werr)
			}
			left -= int64(k)
		}
		if err == io.EOF && left > 0 {
			return fmt.Errorf("write tar entry %q: it ended %d bytes early, did somebody change it?", h.Name, left)
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("write tar entry %q: %w", h.Name, err)
		}
	}
	return nil
}

// Lookup returns what was written to a path ("a/b", "" for the root) so far, or nil; a folder that was only used is something too, which is
// Implied. It is not to be changed, and means nothing after Commit.
func (w *Writer) Lookup(path string) *layertar.Inode { return w.tree.Lookup(path) }

// Entries returns how many entries were written.
func (w *Writer) Entries() int { return w.n }

// normal returns the header as it goes into the tar: equal files give equal bytes.
func normal(h *tar.Header) (*tar.Header, error) {
	name, err := cleanName(h.Name)
	if err != nil {
		return nil, err
	}
	n := &tar.Header{
		Typeflag: h.Typeflag, Name: name, Mode: h.Mode & 0o7777, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Format: tar.FormatPAX,
	}
	if n.ModTime.IsZero() {
		n.ModTime = time.Unix(0, 0)
	}
	switch h.Typeflag {
	case tar.TypeReg, 0: // callers with a zero Typeflag mean a regular file
		n.Typeflag, n.Size = tar.TypeReg, h.Size
		if n.Size < 0 {
			return nil, errors.New("negative size")
		}
	case tar.TypeDir:
		n.Name += "/"
		if name == "" {
			n.Name = "./"
		}
	case tar.TypeLink:
		if n.Linkname, err = cleanName(h.Linkname); err != nil {
			return nil, fmt.Errorf("hard link to %q: %w", h.Linkname, err)
		}
	case tar.TypeSymlink:
		n.Linkname, n.Mode = h.Linkname, 0o777
	case tar.TypeChar, tar.TypeBlock:
		n.Devmajor, n.Devminor = h.Devmajor, h.Devminor
	}
	for k, v := range h.PAXRecords {
		if x, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && n.Typeflag != tar.TypeLink && layertar.KeepXattr(x) {
			if n.PAXRecords == nil {
				n.PAXRecords = map[string]string{}
			}
			n.PAXRecords[k] = v
		}
	}
	return n, nil
}

func cleanName(name string) (string, error) {
	parts, err := layertar.Split(name)
	return strings.Join(parts, "/"), err
}

// Commit ends the tar and publishes the layer; see Store.Import for what a nil error promises. Equal entries in equal order
// give an equal diffID.
func (w *Writer) Commit() (Info, error) {
	if w.stage == nil {
		return Info{}, errors.New("commit of a closed layer")
	}
	defer w.Close() // it has nothing left to say after a success
	if w.err != nil {
		return Info{}, w.err
	}
	if err := w.tar.Close(); err != nil {
		return Info{}, fmt.Errorf("write layer: %w", err)
	}
	id, err := w.sink.finish()
	crc := w.sink.crc
	w.sink = nil
	if cerr := w.file.Close(); err == nil {
		err = cerr
	}
	w.file = nil
	if err != nil {
		return Info{}, fmt.Errorf("write layer: %w", err)
	}
	if err := w.store.Claim(id); err != nil {
		return Info{}, err
	}
	if info, err := w.store.Stat(id); err == nil {
		return info, nil // a step that gave what we have already
	}
	st, err := os.Lstat(filepath.Join(w.stage.Dir, "layer.tar"))
	if err != nil {
		return Info{}, err
	}
	w.tree.Finish()
	return w.store.publish(w.ctx, w.stage, id, content{tree: w.tree, size: st.Size(), crc: crc})
}

// Close gives the layer up if it was not committed. Idempotent.
func (w *Writer) Close() error {
	if w.stage == nil {
		return nil
	}
	if w.sink != nil {
		_, _ = w.sink.finish() // only to end its goroutines
		w.sink = nil
	}
	if w.file != nil {
		w.file.Close() // the file goes away
		w.file = nil
	}
	err := w.stage.Close()
	w.stage = nil
	return err
}
