package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"conex/internal/archive"
	"conex/internal/collect"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
	"conex/internal/safepath"
)

// layoutScheme begins the reference of an image in a folder: oci-layout://PATH[:TAG][@DIGEST].
const layoutScheme = "oci-layout://"

// layoutImage takes an image of an OCI layout in, without a name.
func (e *Engine) layoutImage(ctx context.Context, where string, plat ocispec.Platform, progress Progress) (_ image.Image, err error) {
	l := &loader{e: e, progress: progress.serial(false)}
	if l.images, err = e.Images(); err != nil {
		return image.Image{}, err
	}
	if l.layers, err = e.Layers(); err != nil {
		return image.Image{}, err
	}
	dir, tag, digest := splitLayout(where)
	id, err := layoutConfig(dir, tag, digest, plat)
	if err != nil {
		return image.Image{}, fmt.Errorf("%s%s: %w", layoutScheme, where, err)
	}
	if img, err := l.images.Find(string(id)); err == nil {
		return img, nil
	}
	a, err := archive.Dir(ctx, dir)
	if err != nil {
		return image.Image{}, loadError(dir, err)
	}
	defer a.Close()
	a.Images = slices.DeleteFunc(a.Images, func(i archive.Image) bool { return i.ID != id })
	a.Tags = nil
	if len(a.Images) == 0 {
		return image.Image{}, fmt.Errorf("%s%s: it is no image of files", layoutScheme, where)
	}
	lease, err := collect.Hold(e.root)
	if err != nil {
		return image.Image{}, err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	l.lease, l.layers = lease, l.layers.Claiming(lease.Claim)
	err = l.claim(a)
	if err == nil {
		err = l.allLayers(ctx, a.Images)
	}
	if err == nil {
		_, err = l.record(ctx, a)
	}
	if err != nil {
		return image.Image{}, l.tidy(ctx, a.Images, loadError(dir, err))
	}
	return l.images.Find(string(id))
}

// splitLayout takes PATH[:TAG][@DIGEST] apart.
func splitLayout(s string) (dir, tag string, digest ocispec.Digest) {
	if i := strings.LastIndex(s, "@"); i >= 0 {
		s, digest = s[:i], ocispec.Digest(s[i+1:])
	}
	if i := strings.LastIndex(s, ":"); i > strings.LastIndex(s, "/") {
		s, tag = s[:i], s[i+1:]
	}
	return s, tag, digest
}

// layoutConfig finds the config of the image that a tag or a digest names in a layout. Without either it is the tag latest, or the one
// image that there is.
func layoutConfig(dir, tag string, digest ocispec.Digest, plat ocispec.Platform) (ocispec.Digest, error) {
	root, err := safepath.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	if digest != "" {
		if err := ocispec.Validate(digest); err != nil {
			return "", fmt.Errorf("digest %s: %w", digest, err)
		}
		return configOf(root, ocispec.Descriptor{Digest: digest}, plat, 0)
	}
	raw, err := safepath.ReadFile(root, "index.json", archive.MaxList)
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("it has no index.json: it is no OCI layout")
	}
	if err != nil {
		return "", err
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return "", fmt.Errorf("index.json: %w", err)
	}
	want := tag
	if want == "" {
		want = "latest"
	}
	for _, d := range idx.Manifests {
		name := d.Annotations["org.opencontainers.image.ref.name"]
		if full, err := image.ParseReference(name); err == nil && strings.ContainsAny(name, ":/") {
			name = full.Tag()
		}
		if name == want {
			return configOf(root, d, plat, 0)
		}
	}
	if tag == "" && len(idx.Manifests) == 1 {
		return configOf(root, idx.Manifests[0], plat, 0)
	}
	return "", fmt.Errorf("it has no image of the tag %s", want)
}

// maxNested is how deep indexes may lie in indexes.
const maxNested = 4

// configOf follows a descriptor to the config of the platform's image.
func configOf(root *os.File, d ocispec.Descriptor, plat ocispec.Platform, depth int) (ocispec.Digest, error) {
	if err := ocispec.Validate(d.Digest); err != nil || depth > maxNested {
		return "", fmt.Errorf("index.json is damaged: digest %q", d.Digest)
	}
	raw, err := safepath.ReadFile(root, "blobs/sha256/"+d.Digest.Encoded(), archive.MaxList)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("it does not hold %s", d.Digest)
	}
	if err != nil {
		return "", err
	}
	if got := ocispec.FromBytes(raw); got != d.Digest {
		return "", fmt.Errorf("%s has the content of %s", d.Digest, got)
	}
	var m struct {
		Config    ocispec.Descriptor   `json:"config"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("%s: %w", d.Digest, err)
	}
	if m.Config.Digest != "" {
		return m.Config.Digest, ocispec.Validate(m.Config.Digest)
	}
	best, rank := -1, 0
	for i, c := range m.Manifests {
		if c.Platform == nil {
			continue
		}
		if r := registry.Fits(plat, *c.Platform); r >= 0 && (best < 0 || r < rank) {
			best, rank = i, r
		}
	}
	if best < 0 && len(m.Manifests) == 1 {
		best = 0 // what it is for, its config says
	}
	if best < 0 {
		return "", fmt.Errorf("it has no image for %s", registry.FormatPlatform(plat))
	}
	return configOf(root, m.Manifests[best], plat, depth+1)
}
