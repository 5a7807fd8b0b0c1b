package layers

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// WriteTree writes the tree below root, a handle of a folder, to w as a tar: in byte order of the names in each folder, without an entry
// for root itself, with owners, times to the nanosecond, devices, hard links and the extended attributes that a layer may have. Sockets
// are left out. Equal trees give equal bytes.
//
// The tree may change meanwhile: what has gone when its turn comes is left out, a file is as long as it is when its turn comes, and
// changed is told of each file that was cut off after that: zeros stand for what is missing.
func WriteTree(ctx context.Context, w io.Writer, root *os.File, changed func(path string)) error {
	return WriteTreeAt(ctx, w, root, nil, changed)
}

// WriteTreeAt is WriteTree with one modification time for everything, unless when is nil.
func WriteTreeAt(ctx context.Context, w io.Writer, root *os.File, when *time.Time, changed func(path string)) error {
	dir, err := open(int(root.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	out := bufio.NewWriterSize(w, 256<<10)
	t := &treeWriter{ctx: ctx, tar: tar.NewWriter(out), when: when}
	u := &treeWalk{write: t.entry, changed: changed, seen: map[[2]uint64]string{}}
	if err := u.walk(dir, ""); err != nil {
		return err
	}
	if err := t.tar.Close(); err != nil {
		return err
	}
	return out.Flush()
}

// WriteEntry is WriteTree for one name in the folder dir, a file or a folder with what is in it, under the name as; "." and "" are dir
// itself. id, unless nil, says what a user's or group's number is to be in the tar.
func WriteEntry(ctx context.Context, w io.Writer, dir *os.File, name, as string, id func(int) int, changed func(path string)) error {
	out := bufio.NewWriterSize(w, 256<<10)
	t := &treeWriter{ctx: ctx, tar: tar.NewWriter(out), id: id}
	u := &treeWalk{write: t.entry, changed: changed, seen: map[[2]uint64]string{}}
	if err := u.entry(dir, name, as); err != nil {
		return err
	}
	if err := t.tar.Close(); err != nil {
		return err
	}
	return out.Flush()
}

// treeWriter writes entries to a tar that is no layer.
type treeWriter struct {
	ctx context.Context //nolint:containedctx // one WriteTree, which it spans
	tar *tar.Writer
	buf []byte
	// when, if set, is every entry's time.
	when *time.Time
	// id, if set, says what a user's or group's number is to be.
	id func(int) int
}

func (t *treeWriter) entry(h *tar.Header, content io.Reader) error {
	n, err := normal(h)
	if err != nil {
		return &layertar.EntryError{Name: h.Name, Err: err}
	}
	if t.when != nil {
		n.ModTime = *t.when
	}
	if t.id != nil {
		n.Uid, n.Gid = t.id(n.Uid), t.id(n.Gid)
	}
	if err := t.ctx.Err(); err != nil {
		return err
	}
	if err := t.tar.WriteHeader(n); err != nil {
		return fmt.Errorf("write tar entry %q: %w", h.Name, err)
	}
	if n.Size == 0 {
		return nil
	}
	if t.buf == nil {
		t.buf = make([]byte, 256<<10)
	}
	for left := n.Size; left > 0; {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		k, err := content.Read(t.buf[:min(int64(len(t.buf)), left)])
		left -= int64(k)
		if k > 0 {
			if _, werr := t.tar.Write(t.buf[:k]); werr != nil {
				return werr
			}
		}
		if err != nil && (err != io.EOF || left > 0) {
			return fmt.Errorf("read %s: %w", n.Name, err)
		}
	}
	return nil
}
