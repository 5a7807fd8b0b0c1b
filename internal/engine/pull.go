package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"

	"golang.org/x/sync/errgroup"
)

// maxDownloads is how many layers of one image are fetched at a time, Docker's default.
const maxDownloads = 3

// PullRequest asks for one image of a registry.
type PullRequest struct {
	// Reference is what to pull, as people write it; without tag and digest it means :latest.
	Reference string
	// Platform is os[/arch[/variant]]; "" is this machine's, and then an image that says nothing of platforms is taken as it is.
	Platform string
	// Quiet silences Progress.
	Quiet bool
	// Progress receives events, one at a time, though from several goroutines.
	Progress Progress
}

// PullStatus says what a pull found.
type PullStatus struct {
	// Digest is that of the manifest or index that the reference leads to.
	Digest ocispec.Digest
	// Downloaded is false when the reference led to this very image before.
	Downloaded bool
}

// Pull fetches an image from its registry or a mirror, layer by layer, and tags it. Layers that exist are not fetched. A nil error
// promises that the whole image is there and verified; after an error the tag is as it was, and layers that were complete stay for
// the next try until something sweeps.
func (e *Engine) Pull(ctx context.Context, req PullRequest) (image.Image, PullStatus, error) {
	ref, err := image.ParseReference(req.Reference)
	if err != nil {
		return image.Image{}, PullStatus{}, classify(err)
	}
	want, err := registry.ParsePlatform(req.Platform)
	if err != nil {
		return image.Image{}, PullStatus{}, &kindError{ErrInvalid, err}
	}
	images, err := e.Images()
	if err != nil {
		return image.Image{}, PullStatus{}, err
	}
	ls, err := e.Layers()
	if err != nil {
		return image.Image{}, PullStatus{}, err
	}
	// A pull that was killed left half a layer in staging: this is when its place is wanted back. Two folders are read.
	if err := e.root.Sweep(); err != nil {
		return image.Image{}, PullStatus{}, err
	}
	p := &puller{e: e, ref: ref, client: registry.New(e.cfg.Registry), images: images, layers: ls, progress: req.Progress.serial(req.Quiet)}
	defer p.client.Close()
	img, status, err := p.pull(ctx, want, req.Platform != "")
	if err != nil {
		return image.Image{}, PullStatus{}, pullError(ref, err)
	}
	p.progress.emit(Event{Message: "Digest: " + string(status.Digest)})
	if status.Downloaded {
		p.progress.emit(Event{Message: "Status: Downloaded newer image for " + ref.Familiar()})
	} else {
		p.progress.emit(Event{Message: "Status: Image is up to date for " + ref.Familiar()})
	}
	return img, status, nil
}

// serial returns a Progress that may be called by several goroutines at a time; nil if there is nobody to tell.
func (p Progress) serial(quiet bool) Progress {
	if p == nil || quiet {
		return nil
	}
	var mu sync.Mutex
	return func(ev Event) {
		mu.Lock()
		defer mu.Unlock()
		p(ev)
	}
}

// pullError says what failed, in Docker's words where Docker has some. A registry that denies counts as one that has no such
// image: many don't tell strangers which it is.
func pullError(ref image.Reference, err error) error {
	notFound := func(format string, name string) error {
		return &kindError{ErrNotFound, fmt.Errorf(format+": %w", name, registry.Cause(err))}
	}
	switch {
	case errors.Is(err, registry.ErrManifestUnknown):
		return notFound("manifest for %s not found", ref.Familiar())
	case errors.Is(err, registry.ErrNameUnknown):
		return notFound("repository %s not found", ref.FamiliarName())
	case errors.Is(err, registry.ErrDenied):
		return notFound("pull access denied for %s, repository does not exist or may require 'docker login'", ref.FamiliarName())
	}
	return classify(fmt.Errorf("pull %s: %w", ref.Familiar(), err))
}

// puller is one pull at work.
type puller struct {
	e        *Engine
	ref      image.Reference
	client   *registry.Client
	images   *image.Store
	layers   *layers.Store
	progress Progress
	ep       registry.Endpoint // where the manifest was found; the blobs come from there too
}

func (p *puller) pull(ctx context.Context, want ocispec.Platform, explicit bool) (image.Image, PullStatus, error) {
	fail := func(err error) (image.Image, PullStatus, error) { return image.Image{}, PullStatus{}, err }
	name := p.ref.Tag()
	if p.ref.Digest() != "" {
		name = string(p.ref.Digest())
	}
	p.progress.emit(Event{ID: name, Action: "Pulling from " + p.ref.Path()})
	top, raw, ep, err := p.client.Resolve(ctx, p.ref.Domain(), p.ref.Path(), name)
	if err != nil {
		return fail(err)
	}
	p.ep = ep
	desc := top
	if registry.IsIndex(top.MediaType) {
		if desc, err = registry.Select(raw, want); err != nil {
			return fail(err)
		}
		if raw, err = p.client.Manifest(ctx, ep, p.ref.Path(), desc); err != nil {
			return fail(err)
		}
	}
	m, err := registry.DecodeManifest(raw)
	if err != nil {
		return fail(err)
	}
	conf, err := p.config(ctx, m.Config)
	if err != nil {
		return fail(err)
	}
	c, err := image.ParseConfig(conf)
	if err != nil {
		return fail(err)
	}
	if explicit && registry.Fits(want, c.Platform) < 0 {
		return fail(fmt.Errorf("%w: the image is for %s, not for %s", registry.ErrNoPlatform, registry.FormatPlatform(c.Platform), registry.FormatPlatform(want)))
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return fail(fmt.Errorf("manifest has %d layers, its config %d: %w", len(m.Layers), len(c.RootFS.DiffIDs), registry.ErrMismatch))
	}
	// The lease comes before the look at what exists, so that no sweep can take a layer between look and record.
	lease, err := collect.Hold(p.e.root, append([]ocispec.Digest{m.Config.Digest, desc.Digest}, c.RootFS.DiffIDs...)...)
	if err != nil {
		return fail(err)
	}
	defer lease.Close()
	before, err := p.images.IDOf(p.ref)
	if err != nil && !errors.Is(err, image.ErrNotFound) {
		return fail(err)
	}
	if err := p.fetchLayers(ctx, m.Layers, c.RootFS.DiffIDs); err != nil {
		return fail(err)
	}
	if err := p.layers.Sync(c.RootFS.DiffIDs...); err != nil {
		return fail(err)
	}
	if _, err := p.e.Blobs().PutBytes(raw); err != nil {
		return fail(err)
	}
	img, err := p.images.Add(ctx, conf, desc.Digest, p.ref.WithDigest(top.Digest).String())
	if err != nil {
		return fail(err)
	}
	if p.ref.Digest() == "" {
		if err := p.images.Tag(img.ID, p.ref); err != nil {
			return fail(err)
		}
	}
	if img, err = p.images.Get(img.ID); err != nil {
		return fail(err)
	}
	return img, PullStatus{Digest: top.Digest, Downloaded: before != img.ID}, nil
}

// config fetches the image's config, or reads it when an image here has it.
func (p *puller) config(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > image.MaxConfig {
		return nil, fmt.Errorf("config has %d bytes, at most %d are allowed: %w", desc.Size, image.MaxConfig, registry.ErrUnsupported)
	}
	if b, err := p.e.Blobs().ReadAll(desc.Digest, image.MaxConfig); err == nil {
		return b, nil // anything wrong with the stored one is healed by storing the fetched one again
	}
	rc, err := p.client.Blob(ctx, p.ep, p.ref.Path(), desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// fetchLayers makes all layers be there. One that occurs twice in an image is fetched once.
func (p *puller) fetchLayers(ctx context.Context, descs []ocispec.Descriptor, diffIDs []ocispec.Digest) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxDownloads)
	seen := map[ocispec.Digest]bool{}
	var todo []int
	for i, id := range diffIDs {
		if seen[id] {
			continue
		}
		seen[id] = true
		_, err := p.layers.Stat(id)
		if err == nil {
			p.progress.emit(Event{ID: shortDigest(descs[i].Digest), Action: "Already exists"})
			continue
		}
		if !errors.Is(err, layers.ErrNotFound) {
			return err
		}
		p.progress.emit(Event{ID: shortDigest(descs[i].Digest), Action: "Pulling fs layer"})
		todo = append(todo, i)
	}
	for _, i := range todo {
		g.Go(func() error { return p.fetchLayer(ctx, descs[i], diffIDs[i]) })
	}
	return g.Wait()
}

// fetchLayer streams one layer from the registry through the decompressor into the layer store; nothing lies on disk twice.
func (p *puller) fetchLayer(ctx context.Context, desc ocispec.Descriptor, diffID ocispec.Digest) error {
	id := shortDigest(desc.Digest)
	rc, err := p.client.Blob(ctx, p.ep, p.ref.Path(), desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	counted := &readCounter{r: rc, tell: func(n int64) {
		p.progress.emit(Event{ID: id, Action: "Downloading", Current: n, Total: desc.Size})
	}}
	r, _, err := compress.Reader(counted)
	if err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer r.Close()
	if _, err := p.layers.Import(ctx, r, diffID); err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	p.progress.emit(Event{ID: id, Action: "Pull complete", Current: desc.Size, Total: desc.Size})
	return nil
}

// shortDigest is the first 12 digits of a digest, as people see layers and images.
func shortDigest(d ocispec.Digest) string {
	s := d.Encoded()
	return s[:min(12, len(s))]
}

// readCounter tells how many bytes were read, ten times a second at most.
type readCounter struct {
	r    io.Reader
	n    int64
	last time.Time
	tell func(n int64)
}

func (c *readCounter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if now := time.Now(); now.Sub(c.last) >= 100*time.Millisecond {
		c.last = now
		c.tell(c.n)
	}
	return n, err
}
