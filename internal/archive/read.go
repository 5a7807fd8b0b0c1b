package archive

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// Names of what an archive is known by.
const (
	dockerList = "manifest.json"
	dockerTags = "repositories"
	ociList    = "index.json"
	ociMark    = "oci-layout"
	blobDir    = "blobs/sha256/"
)

// Annotations of the descriptors in index.json that name images.
const (
	// annotationName is the whole reference, as containerd and Docker write it.
	annotationName = "io.containerd.image.name"
	// annotationRef is a reference (podman, skopeo), or a tag alone (Docker, umoci), which names nothing without its repository.
	annotationRef = "org.opencontainers.image.ref.name"
	// annotationAttests marks manifests that describe another one and are no images.
	annotationAttests = "vnd.docker.reference.type"
)

// dockerEntry is an entry of Docker's manifest.json.
type dockerEntry struct {
	Config       string
	RepoTags     []string
	Layers       []string
	LayerSources map[ocispec.Digest]ocispec.Descriptor `json:",omitempty"`
}

// opener is one archive being read.
type opener struct {
	ctx context.Context //nolint:containedctx // an opener is one call of open
	src source
	a   *Archive
	// texts is how many bytes of configs, manifests and indexes were read, steps how many descriptors were looked at.
	texts, steps int
	byID         map[ocispec.Digest]int // an image's place in a.Images
	byManifest   map[ocispec.Digest]int // -1: no image
	byTag        map[string]int
}

// open reads what src has.
func open(ctx context.Context, src source) (*Archive, error) {
	a := &Archive{Indexes: map[ocispec.Digest][]byte{}, src: src}
	o := &opener{ctx: ctx, src: src, a: a, byID: map[ocispec.Digest]int{}, byManifest: map[ocispec.Digest]int{}, byTag: map[string]int{}}
	list, isDocker := src.has(dockerList), src.has(ociList)
	switch {
	case !list && !isDocker && src.has(dockerTags):
		return nil, refuse("the archive has no %s: Docker before 1.10 wrote it; load it there and save it anew", dockerList)
	case !list && !isDocker:
		return nil, refuse("no image archive: there is neither %s nor %s in it", dockerList, ociList)
	}
	if src.has(ociList) {
		if err := o.layout(); err != nil {
			return nil, err
		}
	}
	if src.has(dockerList) {
		if err := o.docker(); err != nil {
			return nil, err
		}
	}
	if len(a.Images) == 0 {
		return nil, refuse("the archive holds no image")
	}
	return a, nil
}

// text reads a blob of which the whole is kept in memory, verified.
func (o *opener) text(d ocispec.Descriptor, max int64) ([]byte, error) {
	name, err := blobName(d.Digest)
	if err != nil {
		return nil, err
	}
	b, err := read(o.src, name, max)
	if err != nil {
		return nil, err
	}
	if d.Size != int64(len(b)) {
		return nil, refuse("%s has %d bytes, its descriptor says %d", name, len(b), d.Size)
	}
	if got := ocispec.FromBytes(b); got != d.Digest {
		return nil, refuse("%s has the content of %s", name, got)
	}
	return b, o.count(len(b))
}

// count bounds the bytes that are kept in memory.
func (o *opener) count(n int) error {
	if o.texts += n; o.texts > maxTexts {
		return refuse("the archive's configs and manifests have more than %d MiB", maxTexts>>20)
	}
	return o.ctx.Err()
}

func blobName(d ocispec.Digest) (string, error) {
	if err := ocispec.Validate(d); err != nil || d.Algorithm() != "sha256" {
		return "", refuse("digest %s is not a sha256", quote(string(d)))
	}
	return blobDir + d.Encoded(), nil
}

// bounded refuses JSON that would take many times its size once decoded: megabytes of "{},{},{}".
func bounded(name string, raw []byte) error {
	if n := bytes.Count(raw, []byte("{")) + bytes.Count(raw, []byte("[")); n > maxParts {
		return refuse("%s has %d objects and lists, at most %d are allowed", name, n, maxParts)
	}
	return nil
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == ocispec.MediaTypeDockerManifest
}

func isConfig(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageConfig || mediaType == ocispec.MediaTypeDockerConfig
}

// isLayer reports whether a media type is that of a layer that can be read: others are encrypted, or no layers.
func isLayer(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		ocispec.MediaTypeDockerLayer, ocispec.MediaTypeDockerLayerGzip, "application/vnd.docker.image.rootfs.diff.tar.zstd":
		return true
	}
	return strings.HasPrefix(mediaType, "application/vnd.oci.image.layer.nondistributable.v1.tar") ||
		strings.HasPrefix(mediaType, "application/vnd.docker.image.rootfs.foreign.diff.tar")
}

// layout reads index.json.
func (o *opener) layout() error {
	raw, err := read(o.src, ociList, MaxList)
	if err != nil {
		return err
	}
	idx, err := decodeIndex(ociList, raw)
	if err != nil {
		return err
	}
	for _, d := range idx.Manifests {
		refs := referencesIn(d.Annotations)
		switch {
		case registry.IsIndex(d.MediaType):
			err = o.index(d, refs)
		case isManifest(d.MediaType) || d.MediaType == "":
			var at int
			if at, err = o.manifest(d, false); err == nil && at >= 0 {
				o.tag(refs, "", at)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// referencesIn returns what a descriptor's annotations name.
func referencesIn(annotations map[string]string) []image.Reference {
	for _, key := range []string{annotationName, annotationRef} {
		v := annotations[key]
		if key == annotationRef && !strings.ContainsAny(v, ":/") {
			continue
		}
		if ref, err := image.ParseReference(v); err == nil && ref.Digest() == "" {
			return []image.Reference{ref}
		}
	}
	return nil
}

func decodeIndex(name string, raw []byte) (ocispec.Index, error) {
	var both struct {
		ocispec.Index
		Config json.RawMessage `json:"config"`
		Layers json.RawMessage `json:"layers"`
	}
	if err := bounded(name, raw); err != nil {
		return both.Index, err
	}
	if err := json.Unmarshal(raw, &both); err != nil {
		return both.Index, refuse("%s is damaged: %w", name, err)
	}
	if both.Config != nil || both.Layers != nil {
		// Read as an index by one and as a manifest by another: CVE-2021-41190.
		return both.Index, refuse("%s is both an index and a manifest", name)
	}
	return both.Index, nil
}

// index reads an image index that refs lead to. Of its platforms an archive may hold some.
func (o *opener) index(d ocispec.Descriptor, refs []image.Reference) error {
	var found []int
	raw, err := o.platforms(d, 1, &found)
	if err != nil {
		return err
	}
	if len(found) == 0 {
		return nil
	}
	o.a.Indexes[d.Digest] = raw
	o.tag(refs, d.Digest, found...)
	return nil
}

// platforms gathers the images that an index leads to.
func (o *opener) platforms(d ocispec.Descriptor, depth int, found *[]int) ([]byte, error) {
	if depth > maxDepth {
		return nil, refuse("an index lies in more than %d others", maxDepth-1)
	}
	raw, err := o.text(d, MaxManifest)
	if err != nil {
		return nil, err
	}
	idx, err := decodeIndex("index "+string(d.Digest), raw)
	if err != nil {
		return nil, err
	}
	for _, c := range idx.Manifests {
		if registry.IsIndex(c.MediaType) {
			if _, err := o.platforms(c, depth+1, found); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			continue
		}
		if !isManifest(c.MediaType) || c.Annotations[annotationAttests] != "" {
			continue
		}
		at, err := o.manifest(c, true)
		if err != nil {
			return nil, err
		}
		if at >= 0 && !slices.Contains(*found, at) {
			*found = append(*found, at)
		}
	}
	return raw, nil
}

// manifest reads a manifest and returns its image's place, -1 if it describes no image. With partial an image that is not here,
// or not as a whole, is none.
func (o *opener) manifest(d ocispec.Descriptor, partial bool) (int, error) {
	if o.steps++; o.steps > maxImages {
		return -1, refuse("the archive names more than %d manifests", maxImages)
	}
	if at, ok := o.byManifest[d.Digest]; ok {
		return at, nil
	}
	at, err := o.readManifest(d)
	if partial && errors.Is(err, fs.ErrNotExist) {
		return -1, nil // it may be here under another name: not remembered
	}
	if err == nil {
		o.byManifest[d.Digest] = at
	}
	return at, err
}

func (o *opener) readManifest(d ocispec.Descriptor) (int, error) {
	raw, err := o.text(d, MaxManifest)
	if err != nil {
		return -1, err
	}
	m, err := decodeManifest("manifest "+string(d.Digest), raw)
	if err != nil || !isConfig(m.Config.MediaType) {
		return -1, err
	}
	if m.Config.Size > image.MaxConfig {
		return -1, refuse("config %s has %d bytes, at most %d are allowed", m.Config.Digest, m.Config.Size, image.MaxConfig)
	}
	config, err := o.text(m.Config, image.MaxConfig)
	if err != nil {
		return -1, err
	}
	return o.blobs(config, raw, m, func(d ocispec.Digest) (string, error) { return blobName(d) })
}

func decodeManifest(name string, raw []byte) (ocispec.Manifest, error) {
	var both struct {
		ocispec.Manifest
		Manifests json.RawMessage `json:"manifests"`
	}
	if err := bounded(name, raw); err != nil {
		return both.Manifest, err
	}
	if err := json.Unmarshal(raw, &both); err != nil {
		return both.Manifest, refuse("%s is damaged: %w", name, err)
	}
	if both.SchemaVersion == 1 {
		return both.Manifest, refuse("%s is of schema 1, a format withdrawn in 2019: push or save the image again with a current tool", name)
	}
	if both.Manifests != nil {
		return both.Manifest, refuse("%s is both an index and a manifest", name)
	}
	return both.Manifest, nil
}

// blobs makes the image of a manifest whose layers are files that fileOf names.
func (o *opener) blobs(config, manifest []byte, m ocispec.Manifest, fileOf func(ocispec.Digest) (string, error)) (int, error) {
	img := Image{RawConfig: config, Manifest: manifest}
	if len(m.Layers) > MaxLayers {
		return -1, tooManyLayers(len(m.Layers))
	}
	for _, d := range m.Layers {
		if !isLayer(d.MediaType) {
			return -1, refuse("layer %s is of type %s, which can't be read", quote(string(d.Digest)), quote(d.MediaType))
		}
		name, err := fileOf(d.Digest)
		if err != nil {
			return -1, err
		}
		l, err := o.layer(name)
		if err != nil {
			return -1, err
		}
		if l.Blob.Size != d.Size {
			return -1, refuse("%s has %d bytes, its manifest says %d", name, l.Blob.Size, d.Size)
		}
		if l.Taken != nil && l.Taken.Err == nil && l.Taken.Digest != d.Digest {
			return -1, refuse("%s has the content of %s", name, l.Taken.Digest)
		}
		l.Blob = d
		img.Layers = append(img.Layers, l)
	}
	return o.add(img)
}

func tooManyLayers(n int) error {
	return refuse("an image has %d layers, more than the %d that can be mounted", n, MaxLayers)
}

// layer finds a layer's file.
func (o *opener) layer(name string) (Layer, error) {
	f, err := o.src.find(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Layer{}, missing{name}
	}
	if err != nil {
		return Layer{}, err
	}
	return Layer{Name: name, Blob: ocispec.Descriptor{Size: f.size}, Taken: f.taken, open: f.open}, nil
}

// add adds an image, and returns its place; an image that is here already gets what it lacks.
func (o *opener) add(img Image) (int, error) {
	img.ID = ocispec.FromBytes(img.RawConfig)
	if at, ok := o.byID[img.ID]; ok {
		return at, nil
	}
	if err := bounded("config "+string(img.ID), img.RawConfig); err != nil {
		return -1, err
	}
	c, err := image.ParseConfig(img.RawConfig)
	if err != nil {
		return -1, refuse("image %s: %w", img.ID, err)
	}
	img.Platform = c.Platform
	ids := c.RootFS.DiffIDs
	if len(img.Layers) != len(ids) {
		return -1, refuse("image %s: invalid manifest, layers length mismatch: expected %d, got %d", img.ID, len(ids), len(img.Layers))
	}
	for i := range img.Layers {
		l := &img.Layers[i]
		l.DiffID = ids[i]
		switch t := l.Taken; {
		case t == nil:
		case t.Err != nil:
			return -1, refuse("%s: %w", quote(l.Name), t.Err)
		case t.DiffID != l.DiffID:
			return -1, refuse("%s has the content of %s, its image expects %s", quote(l.Name), t.DiffID, l.DiffID)
		}
	}
	if len(o.a.Images) == maxImages {
		return -1, refuse("the archive holds more than %d images", maxImages)
	}
	o.byID[img.ID] = len(o.a.Images)
	o.a.Images = append(o.a.Images, img)
	return o.byID[img.ID], nil
}

// tag makes refs lead to images. A name that leads somewhere already is left: index.json, which is read first, knows more.
func (o *opener) tag(refs []image.Reference, index ocispec.Digest, images ...int) {
	for _, ref := range refs {
		key := ref.String()
		at, ok := o.byTag[key]
		if !ok {
			at = len(o.a.Tags)
			o.byTag[key] = at
			o.a.Tags = append(o.a.Tags, Tag{Reference: ref, Index: index})
		}
		t := &o.a.Tags[at]
		if ok && t.Index == "" {
			continue
		}
		for _, i := range images {
			if id := o.a.Images[i].ID; !slices.Contains(t.Images, id) {
				t.Images = append(t.Images, id)
			}
		}
	}
}

// docker reads manifest.json.
func (o *opener) docker() error {
	raw, err := read(o.src, dockerList, MaxList)
	if err != nil {
		return err
	}
	if b := bytes.TrimLeft(raw, " \t\r\n"); len(b) > 0 && b[0] == '{' {
		return o.transport(raw)
	}
	if err := bounded(dockerList, raw); err != nil {
		return err
	}
	var list []dockerEntry
	if err := json.Unmarshal(raw, &list); err != nil {
		return refuse("%s is damaged: %w", dockerList, err)
	}
	if len(list) > maxImages {
		return refuse("the archive names more than %d images", maxImages)
	}
	for i := range o.a.Images {
		if selfMade(o.a.Images[i]) {
			o.a.Images[i].Manifest = nil
		}
	}
	for _, e := range list {
		if err := o.dockerImage(e); err != nil {
			return err
		}
	}
	return nil
}

// selfMade reports whether a manifest describes the uncompressed layers that docker-archives have: nobody ever pushed the image so.
func selfMade(img Image) bool {
	for _, l := range img.Layers {
		if l.Blob.Digest != l.DiffID {
			return false
		}
	}
	return true
}

func (o *opener) dockerImage(e dockerEntry) error {
	refs := make([]image.Reference, 0, len(e.RepoTags))
	for _, s := range e.RepoTags {
		ref, err := image.ParseReference(s)
		if err != nil || ref.Digest() != "" {
			return refuse("invalid tag %s", quote(s))
		}
		refs = append(refs, ref)
	}
	name, err := entryName(e.Config)
	if err != nil {
		return err
	}
	named, isNamed := namedBy(name)
	if at, ok := o.byID[named]; ok && isNamed {
		o.tag(refs, "", at)
		return o.ctx.Err()
	}
	config, err := read(o.src, name, image.MaxConfig)
	if err != nil {
		return err
	}
	if err := o.count(len(config)); err != nil {
		return err
	}
	if id := ocispec.FromBytes(config); isNamed && named != id {
		return refuse("%s has the content of %s", name, id)
	}
	if len(e.Layers) > MaxLayers {
		return tooManyLayers(len(e.Layers))
	}
	img := Image{RawConfig: config}
	for _, n := range e.Layers {
		if n, err = entryName(n); err != nil {
			return err
		}
		l, err := o.layer(n)
		if err != nil {
			return err
		}
		if d, ok := namedBy(n); ok {
			if l.Taken != nil && l.Taken.Err == nil && l.Taken.Digest != d {
				return refuse("%s has the content of %s", n, l.Taken.Digest)
			}
			l.Blob.Digest = d
		}
		img.Layers = append(img.Layers, l)
	}
	at, err := o.add(img)
	if err != nil {
		return err
	}
	o.tag(refs, "", at)
	return nil
}

// namedBy returns the digest that a file's name promises: blobs/sha256/<hex>, or <hex>.json for a config.
func namedBy(name string) (ocispec.Digest, bool) {
	hexa, ok := strings.CutPrefix(name, blobDir)
	if !ok {
		hexa, ok = strings.CutSuffix(name, ".json")
	}
	d := ocispec.Digest("sha256:" + path.Base(hexa))
	return d, ok && ocispec.Validate(d) == nil
}

// transport reads a folder whose manifest.json is a manifest, beside which its blobs lie under their hex digits.
func (o *opener) transport(raw []byte) error {
	if err := o.count(len(raw)); err != nil {
		return err
	}
	m, err := decodeManifest(dockerList, raw)
	if err != nil {
		return err
	}
	if !isConfig(m.Config.MediaType) {
		return refuse("%s is no list of images, nor the manifest of one", dockerList)
	}
	fileOf := func(d ocispec.Digest) (string, error) {
		name, err := blobName(d)
		return path.Base(name), err
	}
	name, err := fileOf(m.Config.Digest)
	if err != nil {
		return err
	}
	config, err := read(o.src, name, image.MaxConfig)
	if err != nil {
		return err
	}
	if got := ocispec.FromBytes(config); got != m.Config.Digest {
		return refuse("%s has the content of %s", name, got)
	}
	if err := o.count(len(config)); err != nil {
		return err
	}
	_, err = o.blobs(config, raw, m, fileOf)
	return err
}
