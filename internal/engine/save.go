package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/archive"
	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"

	mevents "github.com/moby/moby/api/types/events"
)

// SaveRequest asks to write images into an archive.
type SaveRequest struct {
	// Images are names or ids. A repository without a tag means all its tags, as in Docker.
	Images []string
	// Platforms are which images of an index to write, os[/arch[/variant]] each, or "all" for those that are here. None is the one that
	// the name means without a platform.
	Platforms []string
	// Format is "docker-archive" or "oci-archive"; "" is the first.
	Format string
	// Compression of the layers: "none", "gzip" or "zstd". "" leaves them as they are in an oci-archive that can have the
	// original manifests, and is "none" elsewhere.
	Compression string
	// Output gets the archive.
	Output io.Writer
	// Progress receives events.
	Progress Progress
}

// Save writes images into an archive. It returns remarks for the user: which manifests are not those that were pulled. The same
// images give the same bytes. A nil error promises that every layer written was compared with its digest.
func (e *Engine) Save(ctx context.Context, req SaveRequest) ([]string, error) {
	s, err := e.newSaver(ctx, req)
	if err != nil {
		return nil, err
	}
	defer s.close()
	names, err := s.resolve(req.Images)
	if err != nil {
		return nil, classify(err)
	}
	lease, err := collect.Hold(e.root, digestsOf(names)...)
	if err != nil {
		return nil, err
	}
	defer lease.Close()
	s.lease = lease
	var sets []archive.Set
	for _, n := range names {
		if err := stillThere(s.images, n.images); err != nil {
			return nil, classify(err)
		}
		set, err := s.set(n)
		if err != nil {
			return nil, classify(err)
		}
		sets = append(sets, set)
	}
	if err := archive.Write(ctx, req.Output, s.format, sets, s.written); err != nil {
		return nil, fmt.Errorf("save: %w", err)
	}
	for _, n := range names {
		for _, img := range n.images {
			e.imageEvent(mevents.ActionSave, string(img.ID), string(img.ID), img.Config.Config.Labels)
		}
	}
	return s.remarks, nil
}

// saver is one save at work.
type saver struct {
	e         *Engine
	ctx       context.Context //nolint:containedctx // a saver is one call of Save
	images    *image.Store
	layers    *layers.Store
	format    archive.Format
	kind      compress.Kind // "": not asked for
	all       bool
	platforms []ocispec.Platform
	progress  Progress
	remarks   []string
	told      map[ocispec.Digest]int64
	lease     *collect.Lease
	stage     *disk.Stage // of layers that are compressed for this archive; nil before there are any
}

func (e *Engine) newSaver(ctx context.Context, req SaveRequest) (*saver, error) {
	s := &saver{e: e, ctx: ctx, format: archive.Format(cmp.Or(req.Format, string(archive.Docker))), progress: req.Progress,
		told: map[ocispec.Digest]int64{}}
	if s.format != archive.Docker && s.format != archive.OCI {
		return nil, invalid("unknown format %q: there are %s and %s", req.Format, archive.Docker, archive.OCI)
	}
	if req.Compression != "" {
		kind, err := compress.ParseKind(req.Compression)
		if err != nil || kind != compress.None && kind != compress.Gzip && kind != compress.Zstd {
			return nil, invalid("unknown compression %q: there are none, gzip and zstd", req.Compression)
		}
		s.kind = kind
	}
	for _, p := range req.Platforms {
		if p == "all" {
			s.all = true
			continue
		}
		want, err := registry.ParsePlatform(p)
		if err != nil {
			return nil, &kindError{ErrInvalid, err}
		}
		s.platforms = append(s.platforms, want)
	}
	if s.all && len(s.platforms) > 0 {
		return nil, invalid("--platform all stands alone")
	}
	var err error
	if s.images, err = e.Images(); err != nil {
		return nil, err
	}
	s.layers, err = e.Layers()
	return s, err
}

// saved is what one or several names lead to.
type saved struct {
	refs   []image.Reference
	index  ocispec.Digest
	images []image.Image
}

func digestsOf(names []*saved) []ocispec.Digest {
	var ds []ocispec.Digest
	for _, n := range names {
		ds = append(ds, n.index)
		for _, img := range n.images {
			ds = append(append(ds, img.ID, img.Manifest), img.Layers()...)
		}
	}
	return slices.DeleteFunc(ds, func(d ocispec.Digest) bool { return d == "" })
}

// resolve finds the images. Names of one image become one.
func (s *saver) resolve(names []string) ([]*saved, error) {
	var list []*saved
	for _, name := range names {
		refs, err := s.references(name)
		if err != nil {
			return nil, err
		}
		targets := []string{name}
		if len(refs) > 0 {
			targets = nil
			for _, r := range refs {
				targets = append(targets, r.String())
			}
		}
		for i, target := range targets {
			n, err := s.variants(target)
			if err != nil {
				return nil, err
			}
			if len(refs) > 0 {
				n.refs = refs[i : i+1]
			}
			at := slices.IndexFunc(list, n.same)
			if at < 0 {
				list = append(list, n)
			} else if len(refs) > 0 && !slices.Contains(list[at].refs, refs[i]) {
				list[at].refs = append(list[at].refs, refs[i])
			}
		}
	}
	return list, nil
}

func (n *saved) same(o *saved) bool {
	return n.index == o.index && slices.EqualFunc(n.images, o.images, func(a, b image.Image) bool { return a.ID == b.ID })
}

// references returns the tags that a name means: none for an id or a digest, all of a repository that is named without a tag.
func (s *saver) references(name string) ([]image.Reference, error) {
	ref, err := image.ParseReference(name)
	if err != nil || ref.Digest() != "" {
		return nil, nil // Resolve says what is wrong with it, if it is no id
	}
	all, err := s.images.References()
	if err != nil {
		return nil, err
	}
	bare := !strings.HasSuffix(name, ":"+ref.Tag())
	var refs []image.Reference
	for _, t := range all {
		if t.Reference == ref || bare && t.Reference.Name() == ref.Name() {
			refs = append(refs, t.Reference)
		}
	}
	return refs, nil
}

// variants finds the images of the wanted platforms.
func (s *saver) variants(name string) (*saved, error) {
	imgs, index, err := s.images.Variants(name)
	if err != nil {
		return nil, err
	}
	n := &saved{}
	switch {
	case s.all:
		n.images = imgs
	case len(s.platforms) == 0:
		n.images = imgs[:1]
	}
	for _, want := range s.platforms {
		best, bestFit := -1, -1
		for i, img := range imgs {
			if fit := registry.Fits(want, img.Config.Platform); fit >= 0 && (best < 0 || fit < bestFit) {
				best, bestFit = i, fit
			}
		}
		if best < 0 {
			return nil, &kindError{ErrNotFound, fmt.Errorf("image with reference %s was found but does not provide the specified platform (%s)",
				name, registry.FormatPlatform(want))}
		}
		if !slices.ContainsFunc(n.images, func(i image.Image) bool { return i.ID == imgs[best].ID }) {
			n.images = append(n.images, imgs[best])
		}
	}
	if len(n.images) > 1 || s.all && index != "" {
		n.index = index
	}
	return n, nil
}

// set prepares what is written for a name.
func (s *saver) set(n *saved) (archive.Set, error) {
	set := archive.Set{References: n.refs}
	name := shortDigest(n.images[0].ID)
	if len(n.refs) > 0 {
		name = n.refs[0].Familiar()
	}
	var manifests []ocispec.Descriptor
	for _, img := range n.images {
		it, err := s.item(name, img)
		if err != nil {
			return set, err
		}
		if it.Manifest == nil {
			if it.Manifest, err = archive.MakeManifest(it.Config, it.Layers); err != nil {
				return set, err
			}
		}
		d, err := archive.Describe(it.Manifest, ocispec.MediaTypeImageManifest)
		if err != nil {
			return set, err
		}
		d.Platform = &it.Platform
		manifests = append(manifests, d)
		set.Items = append(set.Items, it)
	}
	if n.index == "" && len(n.images) == 1 {
		return set, nil
	}
	if raw, ok := s.originalIndex(n.index, manifests); ok {
		set.Index = raw
		return set, nil
	}
	if n.index != "" && s.format == archive.OCI {
		s.remarks = append(s.remarks, fmt.Sprintf("%s: not all that its index names is here, so the index in the archive is not %s", name, n.index))
	}
	idx := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests}
	idx.SchemaVersion = 2
	raw, err := json.Marshal(idx)
	set.Index = raw
	return set, err
}

// originalIndex returns the index byte by byte, if all that it names is written as it names it.
func (s *saver) originalIndex(d ocispec.Digest, manifests []ocispec.Descriptor) ([]byte, bool) {
	if d == "" {
		return nil, false
	}
	raw, err := s.e.Blobs().ReadAll(d, archive.MaxManifest)
	if err != nil {
		return nil, false
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, false
	}
	for _, m := range idx.Manifests {
		if !slices.ContainsFunc(manifests, func(o ocispec.Descriptor) bool { return o.Digest == m.Digest }) {
			return nil, false
		}
	}
	return raw, true
}

// item prepares one image: with the manifest and the bytes that it came with if they are here and wanted, else with layers of ours.
func (s *saver) item(name string, img image.Image) (archive.Item, error) {
	it := archive.Item{Config: img.RawConfig, Platform: img.Config.Platform}
	ids := img.Layers()
	if len(ids) > 0 {
		it.TopLayer = ids[len(ids)-1]
	}
	if s.format == archive.OCI && s.kind == "" && img.Manifest != "" {
		ok, err := s.original(&it, img)
		if err != nil {
			return it, err
		}
		if ok {
			return it, nil
		}
		s.remarks = append(s.remarks, fmt.Sprintf("%s: its compressed layers are not here any more, so the manifest in the archive is not %s", name, img.Manifest))
	}
	it.Layers = nil
	for _, id := range ids {
		b, err := s.layer(id)
		if err != nil {
			return it, err
		}
		it.Layers = append(it.Layers, b)
	}
	return it, nil
}

// original fills in the manifest that the image came by, and reports whether all of its layers are here.
func (s *saver) original(it *archive.Item, img image.Image) (bool, error) {
	raw, m := s.e.manifestOf(img)
	if m == nil {
		return false, nil
	}
	var packed []ocispec.Digest
	for _, d := range m.Layers {
		packed = append(packed, d.Digest)
	}
	if err := s.lease.Add(packed...); err != nil { // before the look whether they are here
		return false, err
	}
	for i, d := range m.Layers {
		b := archive.Blob{Descriptor: d, Open: s.openBlob(d.Digest)}
		if d.Digest == img.Layers()[i] {
			b.Open = s.openLayer(d.Digest)
		} else if n, err := s.e.Blobs().Size(d.Digest); err != nil || n != d.Size {
			again, ok, err := s.again(img.Layers()[i], d)
			if err != nil || !ok {
				return false, err
			}
			b = again
		}
		it.Layers = append(it.Layers, b)
	}
	it.Manifest = raw
	return true, nil
}

// layer is a layer in the wanted compression.
func (s *saver) layer(id ocispec.Digest) (archive.Blob, error) {
	info, err := s.layers.Stat(id)
	if err != nil {
		return archive.Blob{}, err
	}
	if s.kind == "" || s.kind == compress.None {
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: info.Size}
		return archive.Blob{Descriptor: d, Open: s.openLayer(id)}, nil
	}
	known, err := s.layers.Blobs(id)
	if err != nil {
		return archive.Blob{}, err
	}
	for _, f := range known {
		if kindOf(f.MediaType) != s.kind {
			continue
		}
		if err := s.lease.Add(f.Digest); err != nil {
			return archive.Blob{}, err
		}
		if n, err := s.e.Blobs().Size(f.Digest); err == nil && n == f.Size {
			d := ocispec.Descriptor{MediaType: layerType(s.kind, false), Digest: f.Digest, Size: f.Size}
			return archive.Blob{Descriptor: d, Open: s.openBlob(f.Digest)}, nil
		}
	}
	return s.squeezed(id, info.Size, s.kind, compress.DefaultLevel(s.kind))
}

// again makes the compressed form of a layer anew that was made here and is here no more.
func (s *saver) again(id ocispec.Digest, want ocispec.Descriptor) (archive.Blob, bool, error) {
	known, err := s.layers.Blobs(id)
	if err != nil {
		return archive.Blob{}, false, err
	}
	for _, f := range known {
		kind, level, ok := parseRecipe(f.Recipe)
		if f.Digest != want.Digest || !ok {
			continue
		}
		info, err := s.layers.Stat(id)
		if err != nil {
			return archive.Blob{}, false, err
		}
		b, err := s.squeezed(id, info.Size, kind, level)
		same := b.Digest == want.Digest && b.Size == want.Size // not if another version of conex made it
		b.Descriptor = want
		return b, same, err
	}
	return archive.Blob{}, false, nil
}

// squeezed compresses a layer into the stage.
func (s *saver) squeezed(id ocispec.Digest, size int64, kind compress.Kind, level int) (b archive.Blob, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("compress layer %s: %w", id, err)
		}
	}()
	if s.stage == nil {
		if s.stage, err = s.e.root.Stage(); err != nil {
			return b, err
		}
	}
	tar, _, err := s.layers.OpenTar(id)
	if err != nil {
		return b, err
	}
	label := shortDigest(id)
	src := &readCounter{r: tar, tell: func(n int64) {
		s.progress.emit(Event{ID: label, Action: "Compressing", Current: n, Total: size})
	}}
	sum := &summed{rc: squeeze(struct {
		io.Reader
		io.Closer
	}{src, tar}, kind, level), hash: sha256.New()}
	defer sum.Close()
	path := filepath.Join(s.stage.Dir, id.Encoded())
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return b, err
	}
	stop := context.AfterFunc(s.ctx, func() { sum.Close() })
	_, err = io.Copy(f, struct{ io.Reader }{sum})
	if stop(); s.ctx.Err() != nil {
		err = s.ctx.Err()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return b, err
	}
	b.Descriptor = ocispec.Descriptor{MediaType: layerType(kind, false), Digest: sum.digest(), Size: sum.n}
	b.Open = func() (io.ReadCloser, error) { return os.Open(path) }
	return b, nil
}

// close takes the stage away.
func (s *saver) close() {
	if s.stage != nil {
		s.stage.Close() // a failure to remove rubbish is the sweeper's business
	}
}

func (s *saver) openLayer(id ocispec.Digest) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) {
		r, _, err := s.layers.OpenTar(id)
		return r, err
	}
}

func (s *saver) openBlob(d ocispec.Digest) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) {
		r, _, err := s.e.Blobs().Open(d)
		return r, err
	}
}

// written tells how far a layer is.
func (s *saver) written(d ocispec.Descriptor, n int64) {
	action := "Saving layer"
	told, begun := s.told[d.Digest]
	switch {
	case n == d.Size:
		action = "Saved"
	case !begun:
		s.progress.emit(Event{ID: shortDigest(d.Digest), Action: action, Total: d.Size}) // rates and sums begin at nothing
	case n-told < 4<<20:
		return
	}
	s.told[d.Digest] = n
	s.progress.emit(Event{ID: shortDigest(d.Digest), Action: action, Current: n, Total: d.Size})
}
