package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"conex/internal/archive"
	"conex/internal/build"
	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"

	"golang.org/x/sync/errgroup"
)

// Types of caches that travel.
const (
	CacheInline   = "inline"   // in the image's config
	CacheRegistry = "registry" // an artifact of a registry
	CacheLocal    = "local"    // an OCI layout in a folder
)

// BuildCache is one --cache-to or --cache-from.
type BuildCache struct {
	Type string
	// Ref is where it lies in a registry; Dir is a layout's folder, Tag its name there, Digest the manifest's instead of a name.
	Ref      image.Reference
	Dir, Tag string
	Digest   string
	// Max takes the steps of all stages, Mounts the cache mounts too. IgnoreError lets the build go on when the export fails.
	Max, Mounts, IgnoreError bool
	// Compression and Level are those of layers that have to be compressed.
	Compression compress.Kind
	Level       int
}

// ParseCacheFrom reads --cache-from, ParseCacheTo --cache-to, in buildx's grammar: type=TYPE,key=value..., or a reference alone.
func ParseCacheFrom(s string) (BuildCache, error) { return parseCache(s, false) }

// ParseCacheTo is ParseCacheFrom for --cache-to.
func ParseCacheTo(s string) (BuildCache, error) { return parseCache(s, true) }

func parseCache(s string, to bool) (c BuildCache, err error) {
	list, err := fields(s)
	if err != nil {
		return c, &kindError{ErrInvalid, err}
	}
	attrs := map[string]string{}
	for _, f := range list {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			if len(list) > 1 {
				return c, invalid("invalid value %s", f)
			}
			k, v = "ref", f
			attrs["type"] = CacheRegistry
		}
		attrs[strings.ToLower(strings.TrimSpace(k))] = v
	}
	c.Type, c.Compression, c.Tag = attrs["type"], compress.Gzip, image.DefaultTag
	switch c.Type {
	case "":
		return c, invalid("type required for cache: %q", s)
	case CacheRegistry, CacheLocal:
	case CacheInline:
		if !to {
			return c, invalid("--cache-from type=inline: name the image itself, type=registry,ref=IMAGE")
		}
	case "gha", "s3", "azblob":
		return c, invalid("a cache of type=%s is refused: conex keeps caches in registries and folders (type=registry, inline or local)", c.Type)
	default:
		return c, invalid("cache type %q is not known: use registry, inline or local", c.Type)
	}
	level := ""
	for k, v := range attrs {
		if err := c.set(k, v, to, &level); err != nil {
			return c, err
		}
	}
	c.Level = compress.DefaultLevel(c.Compression)
	if level != "" {
		if c.Level, err = strconv.Atoi(level); err != nil {
			return c, invalid("non-integer value %s specified for compression-level", level)
		}
	}
	if err := compress.CheckLevel(c.Compression, c.Level); err != nil {
		return c, &kindError{ErrInvalid, err}
	}
	switch {
	case c.Type == CacheRegistry && c.Ref.IsZero():
		return c, invalid("ref is required for a cache of type=registry")
	case c.Type == CacheLocal && c.Dir == "":
		return c, invalid("%s is required for a cache of type=local", map[bool]string{true: "dest", false: "src"}[to])
	}
	return c, nil
}

// set takes one attribute.
func (c *BuildCache) set(key, value string, to bool, level *string) (err error) {
	flag := func(b *bool) error {
		on, err := strconv.ParseBool(value)
		if err != nil {
			return invalid("non-bool value specified for %s: %s", key, value)
		}
		*b = on
		return nil
	}
	unused, folder := true, map[bool]string{true: "dest", false: "src"}[to]
	switch {
	case key == "type":
	case key == "ref" && c.Type == CacheRegistry:
		if c.Ref, err = image.ParseReference(value); err != nil {
			return &kindError{ErrInvalid, fmt.Errorf("invalid cache reference %q: %w", value, err)}
		}
		if to && c.Ref.Digest() != "" {
			return invalid("invalid cache reference %q: a cache is written to a tag", value)
		}
	case key == folder && c.Type == CacheLocal:
		c.Dir = value
	case key == "tag" && c.Type == CacheLocal:
		c.Tag = value
	case key == "digest" && c.Type == CacheLocal && !to:
		c.Digest = value
	case key == "mounts" && c.Type != CacheInline:
		return flag(&c.Mounts)
	case !to:
		return invalid("--cache-from type=%s has no attribute %s", c.Type, key)
	case key == "mode":
		switch value {
		case "min", "max":
			c.Max = value == "max"
		default:
			return invalid("mode=%s: a cache has mode min or max", value)
		}
		if c.Max && c.Type == CacheInline {
			return invalid("mode=max is not supported by type=inline: the image has the layers of its own steps alone")
		}
	case key == "ignore-error":
		return flag(&c.IgnoreError)
	case c.Type == CacheInline:
		return invalid("--cache-to type=inline has no attribute %s", key)
	case key == "compression":
		if value == "estargz" {
			return invalid("compression=estargz is refused: use gzip, zstd or uncompressed")
		}
		if c.Compression, err = compress.ParseKind(value); err != nil {
			return invalid("unsupported compression type %s: use uncompressed, gzip or zstd", value)
		}
	case key == "compression-level":
		*level = value
	case key == "force-compression", key == "image-manifest", key == "oci-mediatypes":
		// All layers have the compression, the artifact always is an OCI image manifest.
		if err := flag(&unused); err != nil {
			return err
		}
		if !unused && key != "force-compression" {
			return invalid("%s=false is refused: a cache of conex's is an OCI image manifest, which registries keep", key)
		}
	default:
		return invalid("--cache-to type=%s has no attribute %s", c.Type, key)
	}
	return nil
}

// name is how a cache is shown.
func (c *BuildCache) name() string {
	if c.Type == CacheLocal {
		return c.Dir
	}
	return c.Ref.Familiar()
}

// source makes a cache something that a build can look in.
func (o *buildOutput) source(c *BuildCache) build.CacheSource {
	s := build.CacheSource{Name: c.name(), Mounts: c.Mounts}
	if c.Type == CacheLocal {
		l := archive.OpenLayout(c.Dir)
		s.Load = func(context.Context) (manifest, config []byte, err error) { return loadLayout(l, c) }
		s.Fetch = func(ctx context.Context, blob ocispec.Descriptor, id ocispec.Digest, recipe string, progress func(current, total int64)) error {
			return o.fromLayout(ctx, l, blob, id, recipe, progress)
		}
		return s
	}
	r := &remoteCache{o: o, ref: c.Ref}
	s.Load, s.Fetch = r.load, r.fetch
	return s
}

// readBlob reads a small blob to its end, where the reader verifies it.
func readBlob(rc io.ReadCloser, err error, limit int64) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it has more than %d bytes", limit)
	}
	return b, err
}

func loadLayout(l archive.Layout, c *BuildCache) (manifest, config []byte, err error) {
	name := c.Tag
	if c.Digest != "" {
		name = c.Digest
	}
	d, err := l.Resolve(name)
	if err != nil {
		return nil, nil, err
	}
	rc, err := l.Blob(d)
	if manifest, err = readBlob(rc, err, build.MaxCacheManifest); err != nil {
		return nil, nil, err
	}
	if registry.IsIndex(d.MediaType) {
		if build.IsBuildKitCache(manifest) {
			return nil, nil, build.ErrBuildKitCache
		}
		return nil, nil, fmt.Errorf("%s is an index, no cache", d.Digest)
	}
	cd, err := cacheConfigOf(manifest)
	if err != nil {
		return nil, nil, err
	}
	rc, err = l.Blob(cd)
	config, err = readBlob(rc, err, build.MaxCacheConfig)
	return manifest, config, err
}

// cacheConfigOf finds the config in a manifest of a cache, whatever its type.
func cacheConfigOf(manifest []byte) (ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return m.Config, fmt.Errorf("decode manifest: %w", err)
	}
	if err := ocispec.Validate(m.Config.Digest); err != nil || m.Config.Digest.Algorithm() != "sha256" || m.Config.Size < 0 || m.Config.Size > build.MaxCacheConfig {
		return m.Config, fmt.Errorf("it is no cache: its manifest names no config")
	}
	return m.Config, nil
}

// fromLayout takes a layer out of a folder.
func (o *buildOutput) fromLayout(ctx context.Context, l archive.Layout, blob ocispec.Descriptor, id ocispec.Digest, recipe string, progress func(current, total int64)) error {
	rc, err := l.Blob(blob)
	if err != nil {
		return err
	}
	defer rc.Close()
	r, _, err := compress.Reader(&readCounter{r: rc, tell: func(n int64) { progress(n, blob.Size) }})
	if err != nil {
		return fmt.Errorf("layer %s: %w", blob.Digest, err)
	}
	defer r.Close()
	if _, err := o.layers.Import(ctx, r, id); err != nil {
		return fmt.Errorf("layer %s: %w", blob.Digest, err)
	}
	return o.noteBlob(id, blob, recipe, nil)
}

// noteBlob remembers the form in which a layer came. A recipe is believed: a false one gives an image manifest another digest, not other
// content.
func (o *buildOutput) noteBlob(id ocispec.Digest, blob ocispec.Descriptor, how string, sources []string) error {
	kind, level, ok := parseRecipe(how)
	if !ok {
		how = ""
	} else {
		how = recipe(kind, level)
	}
	return o.layers.AddBlob(id, layers.Blob{Digest: blob.Digest, Size: blob.Size, MediaType: blob.MediaType, Recipe: how, Sources: sources})
}

// remoteCache is a cache in a registry.
type remoteCache struct {
	o   *buildOutput
	ref image.Reference
	ep  registry.Endpoint
}

func (r *remoteCache) client() *registry.Client {
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	if r.o.client == nil {
		r.o.client = r.o.e.registryClient()
	}
	return r.o.client
}

func (r *remoteCache) load(ctx context.Context) (manifest, config []byte, err error) {
	name := r.ref.Tag()
	if r.ref.Digest() != "" {
		name = string(r.ref.Digest())
	}
	d, manifest, ep, err := r.client().Resolve(ctx, r.ref.Domain(), r.ref.Path(), name)
	if err != nil {
		return nil, nil, pullError(r.ref, err)
	}
	r.ep = ep
	if registry.IsIndex(d.MediaType) {
		if build.IsBuildKitCache(manifest) {
			return nil, nil, build.ErrBuildKitCache
		}
		if d, err = registry.Select(manifest, registry.HostPlatform()); err != nil {
			return nil, nil, err
		}
		if manifest, err = r.client().Manifest(ctx, ep, r.ref.Path(), d); err != nil {
			return nil, nil, err
		}
	}
	cd, err := cacheConfigOf(manifest)
	if err != nil {
		return nil, nil, err
	}
	rc, err := r.client().Blob(ctx, ep, r.ref.Path(), cd)
	config, err = readBlob(rc, err, build.MaxCacheConfig)
	return manifest, config, err
}

// fetch is a pull of one layer.
func (r *remoteCache) fetch(ctx context.Context, blob ocispec.Descriptor, id ocispec.Digest, recipe string, progress func(current, total int64)) error {
	if err := r.o.lease.Claim(blob.Digest); err != nil {
		return err
	}
	p := &puller{e: r.o.e, ref: r.ref, client: r.client(), images: r.o.images, layers: r.o.layers, ep: r.ep, progress: sumProgress(progress)}
	if err := p.fetchLayer(ctx, blob, id); err != nil {
		return err
	}
	// The layer is what counts; its blob is in the registry.
	if err := r.o.e.Blobs().DropDownload(blob.Digest); err != nil {
		return err
	}
	return r.o.noteBlob(id, blob, recipe, []string{r.ref.Name()})
}

// caches checks --cache-from and --cache-to and lets the build look in the first.
func (o *buildOutput) caches() error {
	for i := range o.req.From {
		o.req.CacheFrom = append(o.req.CacheFrom, o.source(&o.req.From[i]))
	}
	if v := o.req.BuildArgs["BUILDKIT_INLINE_CACHE"]; v != nil {
		if on, err := strconv.ParseBool(*v); err == nil && on {
			o.req.To = append(o.req.To, BuildCache{Type: CacheInline})
		}
	}
	for _, c := range o.req.To {
		if c.Type != CacheInline {
			continue
		}
		o.inline = true
		if o.req.Squash != "" || slices.ContainsFunc(o.outputs, func(out *BuildOutput) bool { return out.Rewrite }) {
			return invalid("--cache-to type=inline can't be had with --squash or rewrite-timestamp: the layers of the steps are not in the image then")
		}
	}
	return nil
}

// exportCaches writes the caches that --cache-to asks for.
func (o *buildOutput) exportCaches(ctx context.Context, x *build.Export) error {
	for i := range o.req.To {
		c := &o.req.To[i]
		if c.Type == CacheInline {
			continue
		}
		err := x.Step("exporting cache to "+c.Type, func(progress func(current, total int64)) (string, error) {
			return o.exportCache(ctx, x, c, progress)
		})
		if err != nil && (!c.IgnoreError || ctx.Err() != nil) {
			return err
		}
	}
	return nil
}

func (o *buildOutput) exportCache(ctx context.Context, x *build.Export, c *BuildCache, progress func(current, total int64)) (string, error) {
	conf, err := x.Cache(ctx, build.CacheOptions{Max: c.Max, Mounts: c.Mounts})
	if err != nil {
		return "", err
	}
	if c.Type == CacheLocal {
		return o.cacheToLayout(ctx, x, c, conf, progress)
	}
	to, err := o.pusherTo(ctx, c.Ref, c.Compression, c.Level, progress)
	if err != nil {
		return "", err
	}
	defer to.client.Close()
	forms := make([]ocispec.Descriptor, len(conf.Layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxUploads)
	for i, l := range conf.Layers {
		g.Go(func() (err error) {
			forms[i], err = to.layer(gctx, l.DiffID, nil)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return "", pushError(c.Ref, err)
	}
	m, config, manifest, err := cacheManifest(c, conf, forms)
	if err != nil {
		return "", err
	}
	up := registry.Upload{Digest: m.Config.Digest, Size: m.Config.Size, Open: func() (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader(string(config))), nil
	}}
	if _, ok, err := to.client.HasBlob(ctx, to.ep, c.Ref.Path(), up.Digest); err != nil || !ok {
		if err == nil {
			err = to.client.PutBlob(ctx, to.ep, c.Ref.Path(), up)
		}
		if err != nil {
			return "", pushError(c.Ref, err)
		}
	}
	d, err := to.client.PutManifest(ctx, to.ep, c.Ref.Path(), c.Ref.Tag(), m.MediaType, manifest)
	if err != nil {
		return "", pushError(c.Ref, err)
	}
	return c.Ref.Familiar() + "@" + string(d), nil
}

// cacheManifest makes config and manifest of a cache whose layers have these forms.
func cacheManifest(c *BuildCache, conf *build.CacheConfig, forms []ocispec.Descriptor) (m ocispec.Manifest, config, manifest []byte, err error) {
	for i := range conf.Layers {
		conf.Layers[i].Recipe = recipe(c.Compression, c.Level)
	}
	if config, err = json.Marshal(conf); err != nil {
		return m, nil, nil, err
	}
	if len(config) > build.MaxCacheConfig {
		return m, nil, nil, fmt.Errorf("the cache has %d bytes of records, more than %d", len(config), build.MaxCacheConfig)
	}
	m.SchemaVersion, m.MediaType, m.ArtifactType = 2, ocispec.MediaTypeImageManifest, build.CacheConfigType
	m.Config = ocispec.Descriptor{MediaType: build.CacheConfigType, Digest: ocispec.FromBytes(config), Size: int64(len(config))}
	m.Layers = []ocispec.Descriptor{}
	for _, f := range forms {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: layerType(kindOf(f.MediaType), false), Digest: f.Digest, Size: f.Size})
	}
	manifest, err = json.Marshal(m)
	return m, config, manifest, err
}

// cacheToLayout writes a cache into a folder. Layers that are there in the wanted form are neither compressed nor written again.
func (o *buildOutput) cacheToLayout(ctx context.Context, x *build.Export, c *BuildCache, conf *build.CacheConfig, progress func(current, total int64)) (string, error) {
	l := archive.OpenLayout(c.Dir)
	p := &packer{o: o, out: &BuildOutput{Compression: c.Compression, Level: &c.Level}, img: imageOf(x)}
	s := p.saver(ctx, progress)
	defer s.close()
	var forms []ocispec.Descriptor
	for _, cl := range conf.Layers {
		known, err := o.layers.Blobs(cl.DiffID)
		if err != nil {
			return "", err
		}
		if i := slices.IndexFunc(known, func(f layers.Blob) bool {
			return f.Recipe == recipe(c.Compression, c.Level) && l.Has(ocispec.Descriptor{Digest: f.Digest, Size: f.Size})
		}); i >= 0 {
			forms = append(forms, ocispec.Descriptor{MediaType: known[i].MediaType, Digest: known[i].Digest, Size: known[i].Size})
			continue
		}
		b, err := p.blob(s, cl.DiffID, nil)
		if err == nil {
			err = l.Put(ctx, b)
		}
		if err != nil {
			return "", err
		}
		forms = append(forms, b.Descriptor)
	}
	m, config, manifest, err := cacheManifest(c, conf, forms)
	if err != nil {
		return "", err
	}
	for _, b := range [][]byte{config, manifest} {
		if err := l.PutBytes(ctx, b); err != nil {
			return "", err
		}
	}
	d := ocispec.Descriptor{MediaType: m.MediaType, ArtifactType: m.ArtifactType, Digest: ocispec.FromBytes(manifest), Size: int64(len(manifest))}
	if err := l.Tag(c.Tag, d); err != nil {
		return "", err
	}
	return c.Dir + "@" + string(d.Digest), nil
}

// close frees what caches held.
func (o *buildOutput) close() {
	if o.client != nil {
		o.client.Close()
	}
}
