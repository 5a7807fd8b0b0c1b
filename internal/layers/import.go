package layers

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"conex/internal/disk"
	"conex/internal/layertar"
	"conex/internal/ocispec"
)

// content is what a driver makes a layer of: layer.tar, and sparse.data of spill bytes, in one folder, and their tree.
type content struct {
	tree  *layertar.Tree
	size  int64  // of layer.tar
	crc   uint32 // of layer.tar
	spill int64  // of sparse.data; 0: there is none
}

// Import reads an uncompressed tar to its end and keeps it as a layer: hashed, written and indexed in one pass. With want
// given, another content is refused with ErrDigest, and a layer that the store has already is returned without reading.
// A hostile, damaged or truncated tar is a *layertar.EntryError, one line that names the entry. After an error nothing
// is left behind. A nil error promises that the layer is there for every process until it is removed, through crashes of
// conex; through a power loss only after Sync. Two processes may import one layer at once; both succeed.
func (s *Store) Import(ctx context.Context, tar io.Reader, want ocispec.Digest) (Info, error) {
	if want != "" {
		if err := s.Claim(want); err != nil {
			return Info{}, err
		}
		if info, err := s.Stat(want); err == nil {
			return info, nil
		}
	}
	st, err := s.root.Stage()
	if err != nil {
		return Info{}, err
	}
	defer st.Close() // nothing is in it when published; a failure to remove rubbish is the sweeper's business
	c, id, err := s.receive(ctx, st.Dir, tar)
	if err != nil {
		return Info{}, fmt.Errorf("import layer: %w", err)
	}
	if want != "" && id != want {
		return Info{}, fmt.Errorf("import layer: %w: the content is %s, expected %s", ErrDigest, id, want)
	}
	if err := s.Claim(id); err != nil {
		return Info{}, err
	}
	return s.publish(ctx, st, id, c)
}

// receive stores a tar and what is sparse in it in dir, and reads its tree.
func (s *Store) receive(ctx context.Context, dir string, tar io.Reader) (content, ocispec.Digest, error) {
	f, err := os.OpenFile(filepath.Join(dir, "layer.tar"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return content{}, "", err
	}
	out := newSink(f)
	out.past = s.drv.name() == DriverEROFS
	c, err := scan(&tee{ctx: ctx, src: tar, sink: out}, filepath.Join(dir, "sparse.data"))
	id, serr := out.finish()
	if err == nil {
		err = serr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	c.size, c.crc = out.n, out.crc
	return c, id, err
}

// scan reads a tree and keeps what is sparse in it at spill.
func scan(t *tee, spill string) (content, error) {
	defer t.release()
	sp := &spillFile{path: spill}
	tree, err := layertar.Scan(t, sp)
	if cerr := sp.Close(); err == nil {
		err = cerr
	}
	return content{tree: tree, spill: sp.n}, err
}

// publish turns a stage with layer.tar into a layer.
func (s *Store) publish(ctx context.Context, st *disk.Stage, id ocispec.Digest, c content) (Info, error) {
	drv := s.drv
	if c.size%layertar.Block != 0 {
		// The kernel gives no file whose last block the tar does not have as a whole: an input/output error. umoci ends its tars
		// with the content of the last file, so such layers are unpacked.
		drv = dirDriver{}
	}
	if err := s.complete(ctx, drv, st.Dir, id, c, time.Now()); err != nil {
		return Info{}, fmt.Errorf("import layer %s: %w", id, err)
	}
	if _, err := st.Publish(s.dir(id)); err != nil {
		return Info{}, fmt.Errorf("import layer %s: %w", id, err)
	}
	// Ours or the one that somebody else published first.
	return s.Stat(id)
}

// complete makes the driver's form and meta.json in a folder that holds layer.tar.
func (s *Store) complete(ctx context.Context, drv driver, dir string, id ocispec.Digest, c content, created time.Time) error {
	m := meta{
		Info: Info{
			DiffID: id, Size: c.size, ContentSize: c.tree.ContentSize(), Entries: c.tree.Entries(),
			Created: created.UTC().Truncate(time.Microsecond),
		},
		Driver: drv.name(), Boot: disk.BootID(), Format: formatVersion, Spill: c.spill,
		CRC32C: &c.crc,
	}
	implied := c.tree.Implied()
	if m.Implied = len(implied); m.Implied > 0 {
		if err := disk.WriteJSON(filepath.Join(dir, "implied.json"), implied, disk.Volatile); err != nil {
			return err
		}
	}
	var err error
	if m.DiskSize, err = drv.finish(ctx, dir, c); err != nil {
		return err
	}
	return disk.WriteJSON(filepath.Join(dir, "meta.json"), m, disk.Volatile)
}

// formatVersion counts changes of what the drivers write beside the contents.
const formatVersion = 1
