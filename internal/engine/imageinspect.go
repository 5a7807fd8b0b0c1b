package engine

import (
	"context"
	"time"

	"conex/internal/image"
	"conex/internal/ocispec"

	apii "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
)

// InspectImage tells all about one image; with a platform (os[/arch[/variant]]) about that of the images of a name which fits it.
func (e *Engine) InspectImage(_ context.Context, name, platform string) (apii.InspectResponse, error) {
	var r apii.InspectResponse
	images, err := e.Images()
	if err != nil {
		return r, err
	}
	var img image.Image
	if platform == "" {
		img, err = images.Resolve(name)
	} else {
		img, err = variantFor(images, name, platform)
	}
	if err != nil {
		return r, classify(err)
	}
	size, err := images.Size(img)
	if err != nil {
		return r, err
	}
	ls, err := e.Layers()
	if err != nil {
		return r, err
	}
	driver, _ := ls.Driver()
	c := img.Config
	r = apii.InspectResponse{
		ID: string(img.ID), RepoTags: notNil(img.RepoTags), RepoDigests: notNil(img.RepoDigests),
		Author: c.Author, Config: &c.Config,
		Architecture: c.Architecture, Variant: c.Variant, Os: c.OS, OsVersion: c.OSVersion,
		Size: size, RootFS: apii.RootFS{Type: "layers"},
		GraphDriver: &storage.DriverData{Name: driver, Data: map[string]string{}},
		Metadata:    apii.Metadata{LastTagTime: img.LastTagged},
	}
	if !img.Created.IsZero() {
		r.Created = img.Created.Format(time.RFC3339Nano)
	}
	if n := len(c.History); n > 0 {
		r.Comment = c.History[n-1].Comment
	}
	if raw, m := e.manifestOf(img); m != nil {
		r.Descriptor = &ocispec.Descriptor{MediaType: manifestType(m), Digest: img.Manifest, Size: int64(len(raw))}
	}
	for _, d := range img.Layers() {
		r.RootFS.Layers = append(r.RootFS.Layers, string(d))
	}
	return r, nil
}
