package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

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
	p := &puller{e: e, ref: ref, client: e.registryClient(), images: images, layers: ls, progress: req.Progress.serial(req.Quiet)}
	defer p.client.Close()
	begun := time.Now()
	img, status, err := p.pull(ctx, want, req.Platform != "")
	if e.rootFull(err) && e.makeRoom(ctx, begun) {
		img, status, err = p.pull(ctx, want, req.Platform != "")
	}
	e.afterWrite(ctx, p.kept)
	if e.rootFull(err) {
		err = errors.Join(err, e.giveBack(ctx))
	}
	if err != nil {
		return image.Image{}, PullStatus{}, pullError(ref, err)
	}
	p.progress.emit(Event{Message: "Digest: " + string(status.Digest)})
	if status.Downloaded {
		p.progress.emit(Event{Message: "Status: Downloaded newer image for " + ref.Familiar()})
	} else {
		p.progress.emit(Event{Message: "Status: Image is up to date for " + ref.Familiar()})
	}
	e.referenceEvent(mevents.ActionPull, ref, img.Config.Config.Labels)
	return img, status, nil
}

// PullAll pulls every tag of a repository, one after the other. It ends with the first error; what was pulled stays.
func (e *Engine) PullAll(ctx context.Context, req PullRequest) error {
	ref, err := image.ParseReference(req.Reference)
	if err != nil {
		return classify(err)
	}
	if image.HasTag(req.Reference) {
		return invalid("tag can't be used with --all-tags/-a")
	}
	client := e.registryClient()
	tags, err := client.Tags(ctx, ref.Domain(), ref.Path())
	client.Close()
	if err != nil {
		return pullError(ref, err)
	}
	if len(tags) == 0 {
		return &kindError{ErrNotFound, fmt.Errorf("repository %s has no tags", ref.FamiliarName())}
	}
	slices.Sort(tags)
	for _, tag := range tags {
		req.Reference = ref.Name() + ":" + tag
		if _, _, err := e.Pull(ctx, req); err != nil {
			return err
		}
	}
	return nil
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
	kept     int64             // bytes of compressed layers that it left in the store
}

// pulled is what a reference leads to in its registry, for one platform.
type pulled struct {
	// top is the manifest or index that the reference names, index its bytes if it is one.
	top   ocispec.Descriptor
	index []byte
	// desc and raw are the platform's manifest.
	desc     ocispec.Descriptor
	raw      []byte
	manifest ocispec.Manifest
	conf     []byte
	diffIDs  []ocispec.Digest
}

// digests are all that must stay while the image is not recorded.
func (m *pulled) digests() []ocispec.Digest {
	ds := append([]ocispec.Digest{m.manifest.Config.Digest, m.desc.Digest, m.top.Digest}, m.diffIDs...)
	for _, l := range m.manifest.Layers {
		ds = append(ds, l.Digest)
	}
	return ds
}

func (p *puller) pull(ctx context.Context, want ocispec.Platform, explicit bool) (image.Image, PullStatus, error) {
	fail := func(err error) (image.Image, PullStatus, error) { return image.Image{}, PullStatus{}, err }
	name := p.ref.Tag()
	if p.ref.Digest() != "" {
		name = string(p.ref.Digest())
	}
	m, err := p.resolve(ctx, name, want, explicit)
	if err != nil {
		return fail(err)
	}
	// Said once there is something to pull, as Docker does it.
	p.progress.emit(Event{ID: name, Action: "Pulling from " + p.ref.Path()})
	// The lease comes before the look at what exists, so that no sweep can take a layer between look and record.
	lease, err := collect.Hold(p.e.root, m.digests()...)
	if err != nil {
		return fail(err)
	}
	defer lease.Close()
	before, _, err := p.images.Variants(p.ref.String())
	if err != nil && !errors.Is(err, image.ErrNotFound) && !errors.Is(err, image.ErrDamaged) {
		return fail(err)
	}
	if err := p.fetchLayers(ctx, m); err != nil {
		return fail(err)
	}
	if m.index != nil {
		if _, err := p.e.Blobs().PutBytes(m.index); err != nil {
			return fail(err)
		}
	}
	if _, err := p.e.Blobs().PutBytes(m.raw); err != nil {
		return fail(err)
	}
	var index ocispec.Digest
	if m.index != nil {
		index = m.top.Digest
	}
	var refs []image.Reference
	if p.ref.Digest() == "" {
		refs = append(refs, p.ref)
	}
	img, err := p.images.AddTagged(ctx, m.conf, m.desc.Digest, p.ref.WithDigest(m.top.Digest).String(), index, refs...)
	if err != nil {
		return fail(err)
	}
	// With its tags. Somebody may have removed it already, which does not make this pull one that failed.
	if tagged, err := p.images.Get(img.ID); err == nil {
		img = tagged
	} else if !errors.Is(err, image.ErrNotFound) {
		return fail(err)
	}
	known := slices.ContainsFunc(before, func(b image.Image) bool { return b.ID == img.ID })
	return img, PullStatus{Digest: m.top.Digest, Downloaded: !known}, nil
}

// resolve finds out what the reference means for a platform. Manifests and configs that are here already are not fetched.
func (p *puller) resolve(ctx context.Context, name string, want ocispec.Platform, explicit bool) (*pulled, error) {
	m, err := p.top(ctx, name)
	if err != nil {
		return nil, err
	}
	m.desc = m.top
	if registry.IsIndex(m.top.MediaType) {
		m.index = m.raw
		if m.desc, err = registry.Select(m.index, want); err != nil {
			return nil, err
		}
		if m.raw, err = p.e.Blobs().ReadAll(m.desc.Digest, registry.MaxManifest); err != nil {
			if m.raw, err = p.client.Manifest(ctx, p.ep, p.ref.Path(), m.desc); err != nil {
				return nil, err
			}
		}
	}
	if m.manifest, err = registry.DecodeManifest(m.raw); err != nil {
		return nil, err
	}
	if m.conf, err = p.config(ctx, m.manifest.Config); err != nil {
		return nil, err
	}
	c, err := image.ParseConfig(m.conf)
	if err != nil {
		return nil, err
	}
	if explicit && registry.Fits(want, c.Platform) < 0 {
		return nil, fmt.Errorf("%w: the image is for %s, not for %s", registry.ErrNoPlatform, registry.FormatPlatform(c.Platform), registry.FormatPlatform(want))
	}
	m.diffIDs = c.RootFS.DiffIDs
	if len(m.diffIDs) != len(m.manifest.Layers) {
		return nil, fmt.Errorf("manifest has %d layers, its config %d: %w", len(m.manifest.Layers), len(m.diffIDs), registry.ErrMismatch)
	}
	return m, nil
}

// top gets the manifest or index that the reference names. A tag that is here is only asked about: registries count what is fetched, and
// it seldom has moved.
func (p *puller) top(ctx context.Context, name string) (*pulled, error) {
	m := &pulled{}
	var err error
	if _, here := p.images.IDOf(p.ref); here == nil && p.ref.Digest() == "" {
		if m.top, p.ep, err = p.client.HeadManifest(ctx, p.ref.Domain(), p.ref.Path(), name); err != nil {
			return nil, err
		}
		if m.raw, err = p.e.Blobs().ReadAll(m.top.Digest, registry.MaxManifest); err == nil && int64(len(m.raw)) == m.top.Size {
			return m, nil
		}
	}
	m.top, m.raw, p.ep, err = p.client.Resolve(ctx, p.ref.Domain(), p.ref.Path(), name)
	return m, err
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

// fetchLayers makes all layers be there, on the disk, and notes in which compressed forms they came. A layer that occurs twice in an
// image is fetched once.
func (p *puller) fetchLayers(ctx context.Context, m *pulled) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxDownloads)
	seen := map[ocispec.Digest]bool{}
	var had, todo []int
	for i, id := range m.diffIDs {
		if seen[id] {
			continue
		}
		seen[id] = true
		desc := m.manifest.Layers[i]
		_, err := p.layers.Stat(id)
		if err == nil {
			p.progress.emit(Event{ID: shortDigest(desc.Digest), Action: "Already exists"})
			had = append(had, i)
			continue
		}
		if !errors.Is(err, layers.ErrNotFound) {
			return err
		}
		p.progress.emit(Event{ID: shortDigest(desc.Digest), Action: "Pulling fs layer", Total: desc.Size})
		todo = append(todo, i)
	}
	for _, i := range todo[min(maxDownloads, len(todo)):] {
		p.progress.emit(Event{ID: shortDigest(m.manifest.Layers[i].Digest), Action: "Waiting", Total: m.manifest.Layers[i].Size})
	}
	for _, i := range todo {
		g.Go(func() error { return p.fetchLayer(gctx, m.manifest.Layers[i], m.diffIDs[i]) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := p.layers.Sync(m.diffIDs...); err != nil {
		return err
	}
	for _, i := range todo {
		// Only now: a blob in the store is one that survives a power loss.
		if err := p.e.keepDownload(m.manifest.Layers[i].Digest, m.manifest.Layers[i].Size); err != nil {
			return err
		}
		p.kept += m.manifest.Layers[i].Size
	}
	for _, i := range had {
		// A pull that was killed may have left what it made these layers of.
		if err := p.e.settleDownload(m.manifest.Layers[i]); err != nil {
			return err
		}
	}
	for i, id := range m.diffIDs {
		d := m.manifest.Layers[i]
		if err := p.layers.AddBlob(id, layers.Blob{Digest: d.Digest, Size: d.Size, MediaType: d.MediaType, Sources: []string{p.ref.Name()}}); err != nil {
			return err
		}
	}
	return nil
}

// keepDownload makes a blob of a complete download, or removes it where the configuration wants no compressed layers.
func (e *Engine) keepDownload(d ocispec.Digest, size int64) error {
	if e.cfg.KeepBlobs == config.KeepNever {
		return e.Blobs().DropDownload(d)
	}
	return e.Blobs().Keep(d, size)
}

// settleDownload is keepDownload for what a killed process has left.
func (e *Engine) settleDownload(d ocispec.Descriptor) error {
	if e.cfg.KeepBlobs == config.KeepNever {
		return e.Blobs().DropDownload(d.Digest)
	}
	return e.Blobs().Settle(d.Digest, d.Size)
}

// fetchLayer makes one layer be there. What a try that was interrupted has left of its blob is not fetched again; should that turn out
// to be damaged, the layer is fetched once more from its beginning.
func (p *puller) fetchLayer(ctx context.Context, desc ocispec.Descriptor, diffID ocispec.Digest) error {
	for {
		dl, err := p.e.Blobs().Download(ctx, desc.Digest, desc.Size, func() {
			p.progress.emit(Event{ID: shortDigest(desc.Digest), Action: "Waiting"}) // another process fetches it
		})
		if err != nil {
			return fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
		resumed := dl.Have() > 0
		err = p.receive(ctx, dl, desc, diffID)
		switch {
		case err == nil:
			return dl.Close()
		case (dl.Broken() || ctx.Err() != nil) && !errors.Is(err, registry.ErrMismatch) && !errors.Is(err, syscall.ENOSPC):
			return errors.Join(err, dl.Close()) // the next try goes on here
		}
		if derr := dl.Discard(); derr != nil || !resumed || errors.Is(err, syscall.ENOSPC) {
			return errors.Join(err, derr)
		}
	}
}

// receive streams a blob through the decompressor into the layer store.
func (p *puller) receive(ctx context.Context, dl *blobs.Download, desc ocispec.Descriptor, diffID ocispec.Digest) error {
	id := shortDigest(desc.Digest)
	done := func() { p.progress.emit(Event{ID: id, Action: "Pull complete", Current: desc.Size, Total: desc.Size}) }
	if _, err := p.layers.Stat(diffID); err == nil {
		done() // by the process that we waited for
		return nil
	}
	had := dl.Have()
	p.progress.emit(Event{ID: id, Action: "Downloading", Current: had, Total: desc.Size})
	src := dl.Reader(ctx, func(ctx context.Context, off int64) (io.ReadCloser, error) {
		return p.client.RawBlob(ctx, p.ep, p.ref.Path(), desc, off)
	})
	defer src.Close()
	counted := &readCounter{r: src, tell: func(n int64) {
		if n > had { // what was here before does not come now
			p.progress.emit(Event{ID: id, Action: "Downloading", Current: n, Total: desc.Size})
		}
	}}
	r, _, err := compress.Reader(counted)
	if err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer r.Close()
	_, err = p.layers.Import(ctx, r, diffID)
	if errors.Is(err, blobs.ErrMismatch) {
		err = fmt.Errorf("%s: %w (%w)", p.ep, registry.ErrMismatch, err)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	done()
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
