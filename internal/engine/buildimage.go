package engine

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"conex/internal/archive"
	"conex/internal/build"
	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"

	mevents "github.com/moby/moby/api/types/events"
)

// packer makes the manifest of an image that was built as an output wants it. Equal builds on equal bases give equal manifests: layers
// of the base keep the form of the base's manifest, all others are compressed by conex's own recipe, whatever other forms of them are known.
type packer struct {
	o   *buildOutput
	out *BuildOutput
	img image.Image
	// wants are the forms that layers of the base have to keep.
	wants []*ocispec.Descriptor
}

func (o *buildOutput) packer(x *build.Export, out *BuildOutput) *packer {
	p := &packer{o: o, out: out, img: imageOf(x), wants: make([]*ocispec.Descriptor, len(x.Layers))}
	if out.Force || x.From.ID == "" {
		return p
	}
	if _, m := o.e.manifestOf(x.From); m != nil {
		for i := range min(x.Base, len(m.Layers)) {
			// Without a compression a layer is no form that a registry should get, unless that is what was asked for.
			if kindOf(m.Layers[i].MediaType) != compress.None || out.Compression == compress.None {
				p.wants[i] = &m.Layers[i]
			}
		}
	}
	return p
}

// manifest describes the image with layers in these forms.
func (p *packer) manifest(forms []ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	mt, ct := p.out.mediaTypes()
	m := ocispec.Manifest{MediaType: mt, Layers: []ocispec.Descriptor{}}
	m.SchemaVersion = 2
	m.Config = ocispec.Descriptor{MediaType: ct, Digest: p.img.ID, Size: int64(len(p.img.RawConfig))}
	for _, d := range forms {
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: layerType(kindOf(d.MediaType), p.out.DockerTypes), Digest: d.Digest, Size: d.Size})
	}
	m.Annotations = p.out.Annotations
	raw, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	return p.describe(mt, raw), raw, nil
}

// describe is the manifest's descriptor as --metadata-file and indexes have it.
func (p *packer) describe(mediaType string, raw []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: ocispec.FromBytes(raw), Size: int64(len(raw))}
	d.Annotations = map[string]string{"config.digest": string(p.img.ID)}
	if !p.img.Created.IsZero() {
		d.Annotations["org.opencontainers.image.created"] = p.img.Created.UTC().Format(time.RFC3339)
	}
	maps.Copy(d.Annotations, p.out.DescriptorAnnotations)
	plat := p.img.Config.Platform
	d.Platform = &plat
	return d
}

// saver reads and compresses layers for archives.
func (p *packer) saver(ctx context.Context, progress func(current, total int64)) *saver {
	return &saver{e: p.o.e, ctx: ctx, images: p.o.images, layers: p.o.layers, lease: p.o.lease, told: map[ocispec.Digest]int64{}, progress: sumProgress(progress)}
}

// blobs are the image's layers in their forms, as something that can be read. close frees them.
func (p *packer) blobs(ctx context.Context, progress func(current, total int64)) (list []archive.Blob, close func(), err error) {
	s := p.saver(ctx, progress)
	seen := map[ocispec.Digest]archive.Blob{}
	for i, id := range p.img.Layers() {
		b, ok := seen[id]
		if !ok {
			if b, err = p.blob(s, id, p.wants[i]); err != nil {
				s.close()
				return nil, nil, err
			}
			seen[id] = b
		}
		list = append(list, b)
	}
	return list, s.close, nil
}

// blob opens a layer as it was wanted, or by the recipe.
func (p *packer) blob(s *saver, id ocispec.Digest, want *ocispec.Descriptor) (archive.Blob, error) {
	info, err := s.layers.Stat(id)
	if err != nil {
		return archive.Blob{}, err
	}
	kind, level := p.out.Compression, p.out.level()
	if want != nil {
		if want.Digest == id {
			return archive.Blob{Descriptor: *want, Open: s.openLayer(id)}, nil
		}
		if err := s.lease.Claim(want.Digest); err != nil {
			return archive.Blob{}, err
		}
		if s.e.Blobs().Intact(want.Digest, want.Size) {
			return archive.Blob{Descriptor: *want, Open: s.openBlob(want.Digest)}, nil
		}
		if b, ok, err := s.again(id, *want); ok || err != nil {
			return b, err
		}
		if kind = kindOf(want.MediaType); kind != p.out.Compression {
			level = compress.DefaultLevel(kind)
		}
	}
	if kind == compress.None {
		return archive.Blob{Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: info.Size}, Open: s.openLayer(id)}, nil
	}
	b, err := s.squeezed(id, info.Size, kind, level)
	if err == nil {
		err = p.o.noteForm(id, b.Descriptor, kind, level)
	}
	return b, err
}

// noteForm remembers what a layer is when it is compressed, so that nobody need do that again to know.
func (o *buildOutput) noteForm(id ocispec.Digest, d ocispec.Descriptor, kind compress.Kind, level int) error {
	return o.layers.AddBlob(id, layers.Blob{Digest: d.Digest, Size: d.Size, MediaType: layerType(kind, false), Recipe: recipe(kind, level)})
}

// forms finds out what the layers are in their forms, without keeping the bytes: for the manifest of an image that stays here. What is
// known is not computed.
func (p *packer) forms(ctx context.Context, progress func(current, total int64)) ([]ocispec.Descriptor, error) {
	var out []ocispec.Descriptor
	for i, id := range p.img.Layers() {
		if w := p.wants[i]; w != nil {
			out = append(out, *w)
			continue
		}
		if p.out.Compression == compress.None {
			info, err := p.o.layers.Stat(id)
			if err != nil {
				return nil, err
			}
			out = append(out, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: info.Size})
			continue
		}
		known, err := p.o.layers.Blobs(id)
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(known, func(f layers.Blob) bool { return f.Recipe == recipe(p.out.Compression, p.out.level()) }); i >= 0 {
			out = append(out, ocispec.Descriptor{MediaType: known[i].MediaType, Digest: known[i].Digest, Size: known[i].Size})
			continue
		}
		d, err := p.measure(ctx, id, progress)
		if err != nil {
			return nil, fmt.Errorf("compress layer %s: %w", id, err)
		}
		out = append(out, d)
	}
	return out, nil
}

// measure compresses a layer to see what comes of it.
func (p *packer) measure(ctx context.Context, id ocispec.Digest, progress func(current, total int64)) (ocispec.Descriptor, error) {
	rc, info, err := p.o.layers.OpenTar(id)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	counted := struct {
		io.Reader
		io.Closer
	}{&readCounter{r: rc, tell: func(n int64) { progress(n, info.Size) }}, rc}
	sum := &summed{rc: squeeze(counted, p.out.Compression, p.out.level()), hash: sha256.New()}
	stop := context.AfterFunc(ctx, func() { sum.Close() })
	_, err = io.Copy(io.Discard, struct{ io.Reader }{sum})
	if stop() {
		sum.Close()
	} else {
		err = ctx.Err()
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: layerType(p.out.Compression, false), Digest: sum.digest(), Size: sum.n}
	return d, p.o.noteForm(id, d, p.out.Compression, p.out.level())
}

// image puts the image into the store, to registries, or both.
func (o *buildOutput) image(ctx context.Context, x *build.Export, out *BuildOutput) error {
	p := o.packer(x, out)
	var manifest ocispec.Digest
	var desc *ocispec.Descriptor
	if out.Packed || len(out.Annotations) > 0 || out.Canonical || out.Dangling != "" {
		err := x.Step("exporting manifest", func(progress func(current, total int64)) (string, error) {
			forms, err := p.forms(ctx, progress)
			if err != nil {
				return "", err
			}
			d, raw, err := p.manifest(forms)
			if err != nil {
				return "", err
			}
			if err := o.lease.Claim(d.Digest); err != nil {
				return "", err
			}
			if _, err := o.e.Blobs().PutBytes(raw); err != nil {
				return "", err
			}
			manifest, desc = d.Digest, &d
			return string(d.Digest), nil
		})
		if err != nil {
			return err
		}
	}
	if out.stored() {
		if err := o.store(ctx, x, out, manifest); err != nil {
			return err
		}
	}
	o.report(x, out, desc)
	if !out.Push {
		return nil
	}
	if len(out.Names) == 0 {
		return invalid("tag is needed when pushing to registry")
	}
	for _, ref := range out.Names {
		if err := o.push(ctx, x, p, ref); err != nil {
			return err
		}
	}
	return nil
}

// store records the image and gives it its names.
func (o *buildOutput) store(ctx context.Context, x *build.Export, out *BuildOutput, manifest ocispec.Digest) error {
	err := x.Step("exporting to image", func(func(current, total int64)) (string, error) {
		img, err := o.images.Add(ctx, x.Config, manifest, "")
		return string(img.ID), err
	})
	if err != nil {
		return err
	}
	for _, ref := range out.Names {
		err := x.Step("naming to "+ref.String(), func(func(current, total int64)) (string, error) {
			img, err := o.images.AddTagged(ctx, x.Config, manifest, "", "", ref)
			if err == nil {
				o.e.imageEvent(mevents.ActionTag, string(img.ID), ref.Familiar(), img.Config.Config.Labels)
			}
			return "", err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// push sends the image to where a name leads.
func (o *buildOutput) push(ctx context.Context, x *build.Export, p *packer, ref image.Reference) error {
	name := ref.String()
	if p.out.ByDigest {
		name = ref.Name()
	}
	return x.Step("pushing "+name, func(progress func(current, total int64)) (string, error) {
		d, err := o.send(ctx, p, ref, progress)
		if err != nil {
			return "", pushError(ref, err)
		}
		if p.out.stored() {
			if err := o.pushed(ctx, p, ref, d); err != nil {
				return "", err
			}
		}
		o.report(x, p.out, &d)
		return string(d.Digest), nil
	})
}

// pusherTo connects to a name's registry.
func (o *buildOutput) pusherTo(ctx context.Context, ref image.Reference, kind compress.Kind, level int, progress func(current, total int64)) (*pusher, error) {
	p := &pusher{
		e: o.e, ref: ref, images: o.images, layers: o.layers, client: o.e.registryClient(), progress: Progress(sumProgress(progress)).serial(false),
		kind: kind, level: level, anew: true,
	}
	var err error
	if p.ep, err = p.client.PushEndpoint(ctx, ref.Domain(), ref.Path()); err != nil {
		p.client.Close()
		return nil, err
	}
	return p, nil
}

func (o *buildOutput) send(ctx context.Context, p *packer, ref image.Reference, progress func(current, total int64)) (ocispec.Descriptor, error) {
	to, err := o.pusherTo(ctx, ref, p.out.Compression, p.out.level(), progress)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer to.client.Close()
	forms, err := to.send(ctx, p.img, p.wants)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, raw, err := p.manifest(forms)
	if err != nil {
		return d, err
	}
	at := ref.Tag()
	if p.out.ByDigest {
		at = string(d.Digest)
	}
	if d.Digest, err = to.client.PutManifest(ctx, to.ep, ref.Path(), at, d.MediaType, raw); err != nil {
		return d, err
	}
	if !p.out.stored() {
		return d, nil
	}
	if err := o.lease.Claim(d.Digest); err != nil {
		return d, err
	}
	_, err = o.e.Blobs().PutBytes(raw)
	return d, err
}

// pushed notes at a stored image where it can be fetched again.
func (o *buildOutput) pushed(ctx context.Context, p *packer, ref image.Reference, d ocispec.Descriptor) error {
	_, err := o.images.Add(ctx, p.img.RawConfig, d.Digest, ref.WithDigest(d.Digest).String())
	return err
}

// archived writes the image as an archive, or an OCI layout's folder.
func (o *buildOutput) archived(ctx context.Context, x *build.Export, out *BuildOutput) error {
	title := "exporting to " + out.Type + " image format"
	return x.Step(title, func(progress func(current, total int64)) (string, error) {
		p := o.packer(x, out)
		list, done, err := p.blobs(ctx, progress)
		if err != nil {
			return "", err
		}
		defer done()
		var forms []ocispec.Descriptor
		for _, b := range list {
			forms = append(forms, b.Descriptor)
		}
		d, raw, err := p.manifest(forms)
		if err != nil {
			return "", err
		}
		it := archive.Item{Config: p.img.RawConfig, Platform: p.img.Config.Platform, Manifest: raw, Layers: list, Annotations: maps.Clone(d.Annotations)}
		delete(it.Annotations, "config.digest")
		if ids := p.img.Layers(); len(ids) > 0 {
			it.TopLayer = ids[len(ids)-1]
		}
		sets := []archive.Set{{References: out.Names, Items: []archive.Item{it}}}
		if out.Folder {
			err = archive.WriteFolder(ctx, out.Dest, sets)
		} else {
			format := archive.OCI
			if out.Type == OutputDocker {
				format = archive.Docker
			}
			err = o.write(out, progress, func(w io.Writer) error { return archive.Write(ctx, w, format, sets, nil) })
		}
		if err != nil {
			return "", err
		}
		o.report(x, out, &d)
		return string(d.Digest), nil
	})
}

// report collects what --metadata-file says of an output. d is the manifest's descriptor; nil when there is none, and then the config's
// digest stands for it, as in Docker's own image store.
func (o *buildOutput) report(x *build.Export, out *BuildOutput, d *ocispec.Descriptor) {
	m := o.metadata
	id := string(x.ID())
	m["containerimage.config.digest"] = id
	if d == nil {
		if _, ok := m["containerimage.digest"]; !ok {
			m["containerimage.digest"] = id
		}
	} else {
		m["containerimage.digest"], m["containerimage.descriptor"] = string(d.Digest), *d
	}
	var names string
	for _, r := range out.Names {
		if names != "" {
			names += ","
		}
		names += r.String()
		if out.Canonical && d != nil {
			names += "," + r.WithDigest(d.Digest).String()
		}
	}
	if out.Dangling != "" && d != nil && (!out.IfUnnamed || names == "") {
		if ref, err := image.ParseReference(out.Dangling); err == nil {
			if names != "" {
				names += ","
			}
			names += ref.WithDigest(d.Digest).String()
		}
	}
	if names != "" {
		m["image.name"] = names
	}
}
