package engine

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"conex/internal/archive"
	"conex/internal/blobs"
	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/config"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"

	mevents "github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"
)

// LoadRequest asks to take the images of an archive in.
type LoadRequest struct {
	// Input is a file, plain or compressed, or a folder; "" reads Stdin.
	Input string
	Stdin io.Reader
	// Platforms are which images of an index to take, os[/arch[/variant]] each; none means all that the archive has.
	Platforms []string
	// Progress receives events.
	Progress Progress
}

// Loaded is one name, or one image without a name, that a load brought.
type Loaded struct {
	// Reference is the familiar name, "" for an image without one.
	Reference string
	// ID is the image that it leads to.
	ID string
	// Replaced is the id of the image that had the name before and is still here, "" if there was none or the same.
	Replaced string
}

// Load takes all images of an archive in. Layers that exist are not written again. A nil error promises that the images are whole,
// verified and on the disk; after an error no image of the archive was added and no tag moved, as far as the archive is to blame.
func (e *Engine) Load(ctx context.Context, req LoadRequest) (_ []Loaded, err error) {
	l := &loader{e: e, progress: req.Progress.serial(false)}
	for _, p := range req.Platforms {
		want, err := registry.ParsePlatform(p)
		if err != nil {
			return nil, &kindError{ErrInvalid, err}
		}
		l.platforms = append(l.platforms, want)
	}
	if l.images, err = e.Images(); err != nil {
		return nil, err
	}
	if l.layers, err = e.Layers(); err != nil {
		return nil, err
	}
	if err := e.root.Sweep(); err != nil { // as in Pull
		return nil, err
	}
	in, err := openArchive(ctx, req)
	if err != nil {
		return nil, err
	}
	defer in.close()
	lease, err := collect.Hold(e.root)
	if err != nil {
		return nil, err
	}
	l.lease, l.layers = lease, l.layers.Claiming(lease.Claim)
	images, loaded, err := l.load(ctx, in)
	if err != nil {
		err = loadError(in.name, err)
	}
	if cerr := e.closeLease(ctx, lease); err == nil {
		err = cerr
	}
	err = l.tidy(ctx, images, err)
	var kept int64
	for d := range l.kept {
		if n, serr := e.Blobs().Size(d); serr == nil { // else it is not kept
			kept += n
		}
	}
	e.afterWrite(ctx, kept)
	if err != nil {
		return nil, err
	}
	for _, id := range slices.Compact(loadedIDs(loaded)) {
		e.imageEvent(mevents.ActionLoad, id, id, nil)
	}
	return loaded, nil
}

// loadedIDs are the ids of what was loaded, sorted.
func loadedIDs(all []Loaded) []string {
	ids := make([]string, len(all))
	for i, l := range all {
		ids[i] = l.ID
	}
	slices.Sort(ids)
	return ids
}

// loadError says which archive is meant.
func loadError(name string, err error) error {
	err = fmt.Errorf("load %s: %w", name, err)
	if errors.Is(err, archive.ErrRefused) || errors.Is(err, layers.ErrDigest) {
		return &kindError{ErrInvalid, err}
	}
	return classify(err)
}

// input is what an archive is read from: one of the three.
type input struct {
	name   string
	dir    string
	file   *os.File // plain, with parts that can be read in any order
	size   int64
	stream io.Reader

	closers []func() error
}

func (in *input) close() {
	for _, c := range slices.Backward(in.closers) {
		c() //nolint:errcheck // only read
	}
}

// openArchive finds out how the input can be read.
func openArchive(ctx context.Context, req LoadRequest) (*input, error) {
	in := &input{name: "standard input"}
	r := req.Stdin
	if req.Input != "" {
		in.name = req.Input
		f, err := os.Open(req.Input)
		if err != nil {
			return nil, err
		}
		in.closers = append(in.closers, f.Close)
		st, err := f.Stat()
		if err != nil {
			in.close()
			return nil, err
		}
		if st.IsDir() {
			in.dir = req.Input
			return in, nil
		}
		r = f
	}
	if r == nil {
		return nil, invalid("load: there is no input")
	}
	if f, ok := r.(*os.File); ok && isPlainFile(f, in) {
		return in, nil
	}
	z, _, err := compress.Reader(endable(ctx, r))
	if err != nil {
		in.close()
		return nil, fmt.Errorf("load %s: %w", in.name, err)
	}
	in.closers = append(in.closers, z.Close)
	in.stream = z
	return in, nil
}

// isPlainFile reports whether f is a file that is not compressed and stands at its beginning, and makes it the input.
func isPlainFile(f *os.File, in *input) bool {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return false
	}
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != 0 {
		return false
	}
	head := make([]byte, 6)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF || compress.Detect(head[:n]) != compress.None {
		return false
	}
	in.file, in.size = f, st.Size()
	return true
}

// loader is one load at work.
type loader struct {
	e         *Engine
	images    *image.Store
	layers    *layers.Store // claims what it stores for lease
	lease     *collect.Lease
	platforms []ocispec.Platform
	progress  Progress

	mu sync.Mutex
	// took are the layers that were written, kept the compressed forms of layers that lie among the downloads, with their sizes.
	took []ocispec.Digest
	kept map[ocispec.Digest]int64
}

// note remembers a layer that was written, noteKept a compressed form.
func (l *loader) note(d ocispec.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took = append(l.took, d)
}

func (l *loader) noteKept(d ocispec.Digest, size int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept == nil {
		l.kept = map[ocispec.Digest]int64{}
	}
	l.kept[d] = size
}

func (l *loader) load(ctx context.Context, in *input) (_ []archive.Image, _ []Loaded, err error) {
	var a *archive.Archive
	switch {
	case in.dir != "":
		a, err = archive.Dir(ctx, in.dir)
	case in.file != nil:
		a, err = archive.File(ctx, in.file, in.size)
	default:
		var spool *os.File
		if spool, err = l.spool(in); err != nil {
			return nil, nil, err
		}
		a, err = archive.Stream(ctx, in.stream, spool, l.fromStream)
	}
	if err != nil {
		return nil, nil, err
	}
	defer a.Close()
	if err := l.choose(a); err != nil {
		return nil, nil, err
	}
	if err := l.claim(a); err != nil { // before the looks at what is here
		return nil, nil, err
	}
	if err := l.allLayers(ctx, a.Images); err != nil {
		return nil, nil, err
	}
	loaded, err := l.record(ctx, a)
	return a.Images, loaded, err
}

// spool makes the file for what comes in a stream beside the layers.
func (l *loader) spool(in *input) (*os.File, error) {
	st, err := l.e.root.Stage()
	if err != nil {
		return nil, err
	}
	in.closers = append(in.closers, st.Close)
	f, err := os.OpenFile(st.Dir+"/spool", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		in.closers = append(in.closers, f.Close)
	}
	return f, err
}

// choose leaves the images of the wanted platforms.
func (l *loader) choose(a *archive.Archive) error {
	if len(l.platforms) == 0 {
		return nil
	}
	keep := map[ocispec.Digest]bool{}
	var has []string
	for _, want := range l.platforms {
		found := false
		for _, img := range a.Images {
			if registry.Fits(want, img.Platform) >= 0 {
				keep[img.ID], found = true, true
			}
			if p := registry.FormatPlatform(img.Platform); !slices.Contains(has, p) {
				has = append(has, p)
			}
		}
		if !found {
			return &kindError{ErrNotFound, fmt.Errorf("no image for platform %s, there are %s", registry.FormatPlatform(want), strings.Join(has[:min(len(has), 10)], ", "))}
		}
	}
	a.Images = slices.DeleteFunc(a.Images, func(i archive.Image) bool { return !keep[i.ID] })
	for i := range a.Tags {
		a.Tags[i].Images = slices.DeleteFunc(a.Tags[i].Images, func(id ocispec.Digest) bool { return !keep[id] })
	}
	a.Tags = slices.DeleteFunc(a.Tags, func(t archive.Tag) bool { return len(t.Images) == 0 })
	return nil
}

// claim protects all that the archive's images need until they are recorded.
func (l *loader) claim(a *archive.Archive) error {
	var ds []ocispec.Digest
	for _, img := range a.Images {
		ds = append(ds, img.ID)
		if img.Manifest != nil {
			ds = append(ds, ocispec.FromBytes(img.Manifest))
		}
		for _, x := range img.Layers {
			ds = append(ds, x.DiffID)
			if x.Blob.Digest != "" {
				ds = append(ds, x.Blob.Digest)
			}
		}
	}
	for d := range a.Indexes {
		ds = append(ds, d)
	}
	return l.lease.Claim(ds...)
}

// allLayers makes the layers of all images be there, on the disk.
func (l *loader) allLayers(ctx context.Context, images []archive.Image) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(min(runtime.NumCPU(), maxDownloads))
	seen := map[ocispec.Digest]bool{}
	var ids []ocispec.Digest
	for _, img := range images {
		for _, x := range img.Layers {
			if seen[x.DiffID] {
				continue
			}
			seen[x.DiffID] = true
			ids = append(ids, x.DiffID)
			if x.Taken != nil {
				continue
			}
			_, err := l.layers.Stat(x.DiffID)
			if err != nil && !errors.Is(err, layers.ErrNotFound) {
				return err
			}
			if err == nil && !l.wantsBlob(x) {
				l.progress.emit(Event{ID: shortDigest(x.DiffID), Action: "Already exists"})
				continue
			}
			g.Go(func() error { return l.fromFile(gctx, x) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := l.layers.Sync(ids...); err != nil {
		return err
	}
	for d, size := range l.kept {
		if err := l.e.keepDownload(d, size); err != nil {
			return err
		}
	}
	return nil
}

// wantsBlob reports whether the compressed form of a layer is to be kept and is not here yet.
func (l *loader) wantsBlob(x archive.Layer) bool {
	if x.Blob.Digest == "" || x.Blob.Digest == x.DiffID || l.e.cfg.KeepBlobs == config.KeepNever {
		return false
	}
	if !l.e.Blobs().Has(x.Blob.Digest) {
		return true
	}
	known, err := l.layers.Blobs(x.DiffID)
	return err != nil || !slices.ContainsFunc(known, func(b layers.Blob) bool { return b.Digest == x.Blob.Digest })
}

// fromFile takes a layer in that can be opened.
func (l *loader) fromFile(ctx context.Context, x archive.Layer) error {
	r, err := x.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = l.take(ctx, r, x.Blob, x.DiffID, shortDigest(x.DiffID))
	if err != nil {
		return fmt.Errorf("%s: %w", x.Name, err)
	}
	return nil
}

// fromStream takes an entry of a stream in that looks like a layer. If its name is the digest of a layer that is here it is passed over.
func (l *loader) fromStream(ctx context.Context, name string, r io.Reader, size int64) (*archive.Taken, error) {
	desc := ocispec.Descriptor{Size: size}
	if hexa, ok := strings.CutPrefix(name, "blobs/sha256/"); ok {
		if d := ocispec.Digest("sha256:" + hexa); ocispec.Validate(d) == nil {
			desc.Digest = d
			if err := l.lease.Claim(d); err != nil {
				return nil, err
			}
			if _, err := l.layers.Stat(d); err == nil {
				l.progress.emit(Event{ID: shortDigest(d), Action: "Already exists"})
				return &archive.Taken{DiffID: d, Digest: d, Size: size}, nil
			}
		}
	}
	t, err := l.take(ctx, r, desc, "", labelOf(name))
	switch {
	case err == nil:
		return t, nil
	case ctx.Err() != nil, errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EIO), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, err
	}
	return &archive.Taken{Size: size, Err: err}, nil
}

// take stores a layer: its tar, and its compressed form where that is wanted. desc is what is known of the bytes; a digest in it is
// verified. want is the diffID, "" if that is not known either; label is what people see of the layer.
func (l *loader) take(ctx context.Context, r io.Reader, desc ocispec.Descriptor, want ocispec.Digest, label string) (*archive.Taken, error) {
	counted := &readCounter{r: r, tell: func(n int64) {
		l.progress.emit(Event{ID: label, Action: "Loading layer", Current: n, Total: desc.Size})
	}}
	t, err := l.store(ctx, counted, desc, want)
	if err != nil {
		return nil, err
	}
	l.note(t.DiffID)
	l.progress.emit(Event{ID: label, Action: "Loaded", Current: desc.Size, Total: desc.Size})
	return t, nil
}

// labelOf shortens the name of an entry to twelve digits: blobs/sha256/<hex>, <hex>/layer.tar, <hex>.tar.
func labelOf(name string) string {
	name = strings.TrimSuffix(strings.TrimSuffix(name, "/layer.tar"), ".tar")
	name = name[strings.LastIndexByte(name, '/')+1:]
	return name[:min(12, len(name))]
}

func (l *loader) store(ctx context.Context, r io.Reader, desc ocispec.Descriptor, want ocispec.Digest) (*archive.Taken, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	kind := compress.Detect(head)
	t := &archive.Taken{Digest: desc.Digest, Size: desc.Size}
	if kind == compress.None {
		if want == "" {
			want = desc.Digest
		}
		if desc.Digest != "" && want != desc.Digest {
			return nil, fmt.Errorf("%w: it is not compressed, and should be %s as well as %s", layers.ErrDigest, desc.Digest, want)
		}
		info, err := l.layers.Import(ctx, br, want)
		t.DiffID = info.DiffID
		if t.Digest == "" {
			t.Digest = info.DiffID
		}
		return t, err
	}
	src, end, err := l.compressedSource(ctx, br, desc)
	if err != nil {
		return nil, err
	}
	info, err := l.importCompressed(ctx, src, want)
	if err = end(err); err != nil {
		return nil, err
	}
	t.DiffID = info.DiffID
	if desc.Digest != "" {
		mediaType := desc.MediaType
		if mediaType == "" {
			mediaType = map[compress.Kind]string{compress.Gzip: ocispec.MediaTypeImageLayerGzip, compress.Zstd: ocispec.MediaTypeImageLayerZstd}[kind]
		}
		if mediaType != "" {
			err = l.layers.AddBlob(info.DiffID, layers.Blob{Digest: desc.Digest, Size: desc.Size, MediaType: mediaType})
		}
	}
	return t, err
}

func (l *loader) importCompressed(ctx context.Context, src io.Reader, want ocispec.Digest) (layers.Info, error) {
	z, _, err := compress.Reader(src)
	if err != nil {
		return layers.Info{}, err
	}
	defer z.Close()
	if want == "" {
		return l.layers.Import(ctx, z, want)
	}
	info, err := l.layers.Stat(want)
	if err != nil {
		return l.layers.Import(ctx, z, want)
	}
	// The layer is here in another form: this one counts if it is the same.
	h := sha256.New()
	if _, err := io.Copy(h, z); err != nil {
		return info, err
	}
	if got := ocispec.Digest("sha256:" + hex.EncodeToString(h.Sum(nil))); got != want {
		return info, fmt.Errorf("%w: the content is %s, expected %s", layers.ErrDigest, got, want)
	}
	return info, nil
}

// compressedSource returns a reader of a compressed layer that verifies it, and keeps it if the configuration wants that. end takes the
// error that came of reading.
func (l *loader) compressedSource(ctx context.Context, r io.Reader, desc ocispec.Descriptor) (src io.Reader, end func(error) error, err error) {
	if desc.Digest == "" {
		return r, func(err error) error { return err }, nil
	}
	if l.e.cfg.KeepBlobs == config.KeepNever || l.e.Blobs().Has(desc.Digest) {
		v, err := blobs.Verify(io.NopCloser(r), desc.Digest)
		return v, func(err error) error { return err }, err
	}
	dl, err := l.e.Blobs().Download(ctx, desc.Digest, desc.Size, nil)
	if err != nil {
		return nil, nil, err
	}
	rc := dl.Reader(ctx, func(_ context.Context, off int64) (io.ReadCloser, error) {
		if _, err := io.CopyN(io.Discard, r, off); err != nil { // a pull that was interrupted has left this much
			return nil, err
		}
		return io.NopCloser(r), nil
	})
	return rc, func(err error) error {
		if cerr := rc.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return errors.Join(err, dl.Discard())
		}
		l.noteKept(desc.Digest, desc.Size)
		return dl.Close()
	}, nil
}

// record makes images and tags of what is there.
func (l *loader) record(ctx context.Context, a *archive.Archive) ([]Loaded, error) {
	byID := map[ocispec.Digest]archive.Image{}
	tagged := map[ocispec.Digest]bool{}
	for _, img := range a.Images {
		byID[img.ID] = img
		if err := l.add(ctx, img); err != nil {
			return nil, err
		}
	}
	var loaded []Loaded
	for _, t := range a.Tags {
		if raw := a.Indexes[t.Index]; raw != nil {
			if _, err := l.e.Blobs().PutBytes(raw); err != nil {
				return nil, err
			}
		}
		before, err := l.images.IDOf(t.Reference)
		if err != nil && !errors.Is(err, image.ErrNotFound) {
			return nil, err
		}
		for {
			if err = l.images.TagIndex(t.Reference, t.Index, t.Images...); !errors.Is(err, image.ErrNotFound) {
				break
			}
			for _, id := range t.Images { // a prune took them, as they had no name yet
				if err := l.add(ctx, byID[id]); err != nil {
					return nil, err
				}
			}
		}
		if err != nil {
			return nil, err
		}
		for _, id := range t.Images {
			tagged[id] = true
		}
		n := Loaded{Reference: t.Reference.Familiar(), ID: string(t.Images[0])}
		if before != "" && !slices.Contains(t.Images, before) {
			n.Replaced = string(before)
		}
		loaded = append(loaded, n)
	}
	for _, img := range a.Images {
		if !tagged[img.ID] {
			loaded = append(loaded, Loaded{ID: string(img.ID)})
		}
	}
	return loaded, nil
}

// add records one image.
func (l *loader) add(ctx context.Context, img archive.Image) error {
	raw, err := l.manifestOf(img)
	if err != nil {
		return err
	}
	manifest := ocispec.Digest("")
	if raw != nil {
		if manifest, err = l.e.Blobs().PutBytes(raw); err != nil {
			return err
		}
	}
	_, err = l.images.Add(ctx, img.RawConfig, manifest, "")
	return err
}

// manifestOf returns the manifest to record for an image: none if one is recorded whose bytes are here.
func (l *loader) manifestOf(img archive.Image) ([]byte, error) {
	if img.Manifest == nil {
		return nil, nil
	}
	old, err := l.images.Get(img.ID)
	if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrDamaged) {
		return img.Manifest, nil
	}
	if err != nil || old.Manifest != "" && l.e.Blobs().Has(old.Manifest) {
		return nil, err
	}
	return img.Manifest, nil
}

// tidy takes away what was written and nothing uses: all of it after an error, else what no image of the archive had.
func (l *loader) tidy(ctx context.Context, images []archive.Image, err error) error {
	unused := err != nil && len(l.took) > 0
	used := map[ocispec.Digest]bool{}
	for _, img := range images {
		for _, x := range img.Layers {
			used[x.DiffID] = true
		}
	}
	for _, d := range l.took {
		unused = unused || !used[d]
	}
	if err != nil {
		for d := range l.kept {
			err = errors.Join(err, l.e.Blobs().DropDownload(d))
		}
	}
	if !unused {
		return err
	}
	_, serr := l.e.sweep(context.WithoutCancel(ctx))
	return errors.Join(err, serr)
}
