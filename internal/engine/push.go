package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"

	mevents "github.com/moby/moby/api/types/events"
	"golang.org/x/sync/errgroup"
)

// maxUploads is how many layers of one image are sent at a time.
const maxUploads = 3

// PushRequest asks to send images to the registry that their name says.
type PushRequest struct {
	// Reference is what to push, as people write it; without a tag it means :latest.
	Reference string
	// AllTags sends every tag of the repository.
	AllTags bool
	// Platform is os[/arch[/variant]]; "" sends a whole index where all of it is here, else this machine's image.
	Platform string
	// Compression is gzip or zstd: layers are sent in this form, whatever they came in. "" sends pulled layers as they came, and
	// others with gzip.
	Compression string
	// Level is the compression's level; nil is its default.
	Level *int
	// Quiet silences Progress.
	Quiet bool
	// Progress receives events, one at a time, though from several goroutines.
	Progress Progress
}

// PushStatus is one tag that was sent.
type PushStatus struct {
	// Tag names it in its repository; Digest and Size (in bytes) are its manifest's or index's.
	Tag    string
	Digest ocispec.Digest
	Size   int64
}

// Push sends images. Layers that the registry has are not sent, those that another repository of the same registry has are mounted from
// there. A pulled layer is sent bit by bit as it came, as long as its compressed form is here, can be fetched from where it came from,
// or can be made again; else it is compressed anew, and Progress says that the digest changes. A nil error promises that every tag
// leads to its image in the registry.
func (e *Engine) Push(ctx context.Context, req PushRequest) ([]PushStatus, error) {
	ref, err := image.ParseReference(req.Reference)
	if err != nil {
		return nil, classify(err)
	}
	if ref.Digest() != "" {
		return nil, invalid("cannot push a digest reference: %s", ref.Familiar())
	}
	if req.AllTags && image.HasTag(req.Reference) {
		return nil, invalid("tag can't be used with --all-tags/-a")
	}
	p, err := e.newPusher(req, ref)
	if err != nil {
		return nil, err
	}
	defer p.client.Close()
	tags := []image.Reference{ref}
	if req.AllTags {
		if tags, err = tagsOf(p.images, ref); err != nil {
			return nil, err
		}
	}
	if _, _, err := p.images.Variants(tags[0].String()); errors.Is(err, image.ErrNotFound) {
		return nil, &kindError{ErrNotFound, fmt.Errorf("An image does not exist locally with the tag: %s", ref.FamiliarName())} //nolint:staticcheck // Docker's words
	}
	p.progress.emit(Event{Message: "The push refers to repository [" + ref.Name() + "]"})
	var done []PushStatus
	for _, t := range tags {
		st, err := p.tag(ctx, t)
		if err != nil {
			return done, pushError(t, err)
		}
		e.referenceEvent(mevents.ActionPush, t, nil)
		p.progress.emit(Event{Message: fmt.Sprintf("%s: digest: %s size: %d", st.Tag, st.Digest, st.Size)})
		done = append(done, st)
	}
	return done, nil
}

// tagsOf returns all tags of a repository, sorted.
func tagsOf(images *image.Store, ref image.Reference) ([]image.Reference, error) {
	all, err := images.References()
	if err != nil {
		return nil, err
	}
	var tags []image.Reference
	for _, t := range all {
		if t.Reference.Name() == ref.Name() {
			tags = append(tags, t.Reference)
		}
	}
	if len(tags) == 0 {
		return nil, &kindError{ErrNotFound, fmt.Errorf("An image does not exist locally with the tag: %s", ref.FamiliarName())} //nolint:staticcheck // Docker's words
	}
	return tags, nil
}

func pushError(ref image.Reference, err error) error {
	if errors.Is(err, registry.ErrDenied) {
		return fmt.Errorf("push access denied for %s, log in with 'login %s': %w", ref.FamiliarName(), ref.Domain(), registry.Cause(err))
	}
	return classify(fmt.Errorf("push %s: %w", ref.Familiar(), err))
}

// pusher is one push at work.
type pusher struct {
	e        *Engine
	ref      image.Reference
	client   *registry.Client
	ep       registry.Endpoint
	images   *image.Store
	layers   *layers.Store
	platform *ocispec.Platform
	progress Progress
	// kind and level are the compression for layers that have to be compressed. convert sends layers that came in another kind so too,
	// anew all of them: somebody asked for this very level.
	kind          compress.Kind
	level         int
	convert, anew bool
}

func (e *Engine) newPusher(req PushRequest, ref image.Reference) (*pusher, error) {
	p := &pusher{e: e, ref: ref, kind: compress.Gzip, convert: req.Compression != "", anew: req.Level != nil, progress: req.Progress.serial(req.Quiet)}
	if req.Platform != "" {
		want, err := registry.ParsePlatform(req.Platform)
		if err != nil {
			return nil, &kindError{ErrInvalid, err}
		}
		p.platform = &want
	}
	if req.Compression != "" {
		kind, err := compress.ParseKind(req.Compression)
		if err != nil || kind != compress.Gzip && kind != compress.Zstd {
			return nil, invalid("compression %q: layers are pushed with gzip or zstd", req.Compression)
		}
		p.kind = kind
	}
	p.level = compress.DefaultLevel(p.kind)
	if req.Level != nil {
		p.level = *req.Level
	}
	if err := compress.CheckLevel(p.kind, p.level); err != nil {
		return nil, &kindError{ErrInvalid, err}
	}
	var err error
	if p.images, err = e.Images(); err != nil {
		return nil, err
	}
	if p.layers, err = e.Layers(); err != nil {
		return nil, err
	}
	p.client = e.registryClient()
	return p, nil
}

// tag sends what one tag leads to.
func (p *pusher) tag(ctx context.Context, ref image.Reference) (PushStatus, error) {
	st := PushStatus{Tag: ref.Tag()}
	imgs, index, err := p.images.Variants(ref.String())
	if err != nil {
		return st, err
	}
	if p.platform != nil {
		img, err := p.images.ResolvePlatform(ref.String(), *p.platform)
		if err != nil {
			return st, err
		}
		imgs, index = []image.Image{img}, ""
	}
	// Everything stays while it is sent.
	var ids []ocispec.Digest
	for _, img := range imgs {
		ids = append(append(ids, img.ID, img.Manifest), img.Layers()...)
	}
	lease, err := collect.Hold(p.e.root, ids...)
	if err != nil {
		return st, err
	}
	defer lease.Close()
	if err := stillThere(p.images, imgs); err != nil {
		return st, err
	}
	if p.ep.Host == "" {
		if p.ep, err = p.client.PushEndpoint(ctx, ref.Domain(), ref.Path()); err != nil {
			return st, err
		}
	}
	var top ocispec.Descriptor
	var raw []byte
	if index != "" {
		top, raw, err = p.index(ctx, ref, index, imgs)
	}
	if err == nil && raw == nil {
		top, raw, err = p.image(ctx, imgs[0])
	}
	if err != nil {
		return st, err
	}
	if st.Digest, err = p.client.PutManifest(ctx, p.ep, ref.Path(), ref.Tag(), top.MediaType, raw); err != nil {
		return st, err
	}
	st.Size = int64(len(raw))
	if _, err := p.e.Blobs().PutBytes(raw); err != nil {
		return st, err
	}
	for _, img := range imgs {
		if _, err := p.images.Add(ctx, img.RawConfig, "", ref.WithDigest(st.Digest).String()); err != nil {
			return st, err
		}
		if registry.IsIndex(top.MediaType) {
			continue
		}
		if img.Manifest == "" { // the first manifest of an image that was made here
			if _, err := p.images.Add(ctx, img.RawConfig, st.Digest, ""); err != nil {
				return st, err
			}
		}
		break
	}
	return st, nil
}

// index sends an index with all its images. Without all of them here it sends nothing, says so and returns nil: a registry takes no
// index whose manifests it does not have.
func (p *pusher) index(ctx context.Context, ref image.Reference, d ocispec.Digest, imgs []image.Image) (ocispec.Descriptor, []byte, error) {
	top := ocispec.Descriptor{Digest: d}
	raw, err := p.e.Blobs().ReadAll(d, registry.MaxManifest)
	if err != nil {
		return top, nil, nil //nolint:nilerr // a lost index leaves the image to be sent
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return top, nil, fmt.Errorf("decode index %s: %w", d, err)
	}
	find := func(m ocispec.Descriptor) int {
		return slices.IndexFunc(imgs, func(i image.Image) bool { return i.Manifest == m.Digest })
	}
	here := 0
	for _, m := range idx.Manifests {
		if find(m) >= 0 {
			here++
		}
	}
	if here < len(idx.Manifests) {
		p.progress.emit(Event{Message: fmt.Sprintf("Only %d of the %d images of the index %s are here: %s is pushed without it, with another digest than it was pulled by",
			here, len(idx.Manifests), shortDigest(d), registry.FormatPlatform(imgs[0].Config.Platform))})
		return top, nil, nil
	}
	changed := false
	for i, m := range idx.Manifests {
		desc, mraw, err := p.image(ctx, imgs[find(m)])
		if err != nil {
			return top, nil, err
		}
		if _, err := p.client.PutManifest(ctx, p.ep, ref.Path(), string(desc.Digest), desc.MediaType, mraw); err != nil {
			return top, nil, err
		}
		if desc.Digest != m.Digest {
			changed = true
			idx.Manifests[i].Digest, idx.Manifests[i].Size, idx.Manifests[i].MediaType = desc.Digest, desc.Size, desc.MediaType
			if _, err := p.e.Blobs().PutBytes(mraw); err != nil {
				return top, nil, err
			}
		}
	}
	if changed {
		if raw, err = json.Marshal(idx); err != nil {
			return top, nil, err
		}
	}
	top.MediaType, top.Digest, top.Size = idx.MediaType, ocispec.FromBytes(raw), int64(len(raw))
	if top.MediaType == "" {
		top.MediaType = ocispec.MediaTypeImageIndex
	}
	return top, raw, nil
}

// image sends an image's layers and config and returns its manifest, which is not sent: the one that it came by if every layer went as
// it came, else a new one.
func (p *pusher) image(ctx context.Context, img image.Image) (ocispec.Descriptor, []byte, error) {
	var desc ocispec.Descriptor
	raw, old := p.e.manifestOf(img)
	ids := img.Layers()
	wants := make([]*ocispec.Descriptor, len(ids))
	for i := range ids {
		if old != nil && !p.anew && (!p.convert || kindOf(old.Layers[i].MediaType) == p.kind) {
			wants[i] = &old.Layers[i]
		}
	}
	sent, err := p.send(ctx, img, wants)
	if err != nil {
		return desc, nil, err
	}
	conf := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: img.ID, Size: int64(len(img.RawConfig))}
	same := old != nil
	for i := range ids {
		same = same && sent[i].Digest == old.Layers[i].Digest
	}
	if same {
		return ocispec.Descriptor{MediaType: manifestType(old), Digest: img.Manifest, Size: int64(len(raw))}, raw, nil
	}
	m := newManifest(old, conf, sent)
	if raw, err = json.Marshal(m); err != nil {
		return desc, nil, err
	}
	desc = ocispec.Descriptor{MediaType: m.MediaType, Digest: ocispec.FromBytes(raw), Size: int64(len(raw))}
	if old != nil {
		p.progress.emit(Event{Message: fmt.Sprintf("The digest changes from %s to %s: layers were compressed anew", img.Manifest, desc.Digest)})
	}
	return desc, raw, nil
}

// send makes the registry have an image's layers and config and returns what the layers are there, each in the form of its place in wants;
// nil leaves the choice.
func (p *pusher) send(ctx context.Context, img image.Image, wants []*ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	ids := img.Layers()
	sent := make([]ocispec.Descriptor, len(ids))
	first := map[ocispec.Digest]int{}
	for i, id := range ids {
		if _, ok := first[id]; !ok {
			first[id] = i
			p.progress.emit(Event{ID: shortDigest(id), Action: "Preparing"})
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxUploads)
	for i, id := range ids {
		if first[id] != i {
			continue
		}
		g.Go(func() (err error) {
			sent[i], err = p.layer(gctx, id, wants[i])
			return err
		})
	}
	g.Go(func() error { return p.config(gctx, img) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, id := range ids {
		sent[i] = sent[first[id]]
	}
	return sent, nil
}

// manifestOf returns the manifest that an image came by, byte by byte and decoded; nil if there is none, or none any more that fits it.
func (e *Engine) manifestOf(img image.Image) ([]byte, *ocispec.Manifest) {
	if img.Manifest == "" {
		return nil, nil
	}
	raw, err := e.Blobs().ReadAll(img.Manifest, registry.MaxManifest)
	if err != nil {
		return nil, nil // lost or damaged: as good as none
	}
	m, err := registry.DecodeManifest(raw)
	if err != nil || m.Config.Digest != img.ID || len(m.Layers) != len(img.Layers()) {
		return nil, nil
	}
	return raw, &m
}

// manifestType returns a manifest's media type; documents of OCI's form need not say it.
func manifestType(m *ocispec.Manifest) string {
	if m.MediaType != "" {
		return m.MediaType
	}
	if m.Config.MediaType == ocispec.MediaTypeDockerConfig {
		return ocispec.MediaTypeDockerManifest
	}
	return ocispec.MediaTypeImageManifest
}

// newManifest makes a manifest of what was sent. It is Docker's if the old one was and can be again, else OCI's.
func newManifest(old *ocispec.Manifest, conf ocispec.Descriptor, sent []ocispec.Descriptor) ocispec.Manifest {
	docker := old != nil && manifestType(old) == ocispec.MediaTypeDockerManifest
	for _, d := range sent {
		docker = docker && kindOf(d.MediaType) != compress.Zstd
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: conf, Layers: []ocispec.Descriptor{}}
	m.SchemaVersion = 2
	if docker {
		m.MediaType, m.Config.MediaType = ocispec.MediaTypeDockerManifest, ocispec.MediaTypeDockerConfig
	}
	if old != nil {
		m.Annotations = old.Annotations
	}
	for _, d := range sent {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: layerType(kindOf(d.MediaType), docker), Digest: d.Digest, Size: d.Size})
	}
	return m
}
