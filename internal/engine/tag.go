package engine

import (
	"context"

	"conex/internal/image"
	"conex/internal/ocispec"

	mevents "github.com/moby/moby/api/types/events"
)

// Tag points the reference target to the image that source names, or to the images of all platforms that it leads to. What target pointed to before stays, untagged.
func (e *Engine) Tag(ctx context.Context, source, target string) error {
	ref, err := image.ParseReference(target)
	if err != nil {
		return classify(err)
	}
	if ref.Digest() != "" {
		return invalid("refusing to create a tag with a digest reference")
	}
	images, err := e.Images()
	if err != nil {
		return err
	}
	imgs, index, err := images.Variants(source) // of all platforms
	if err != nil {
		return classify(err)
	}
	var ids []ocispec.Digest
	for _, img := range imgs {
		ids = append(ids, img.ID)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := images.TagIndex(ref, index, ids...); err != nil {
		return classify(err)
	}
	e.imageEvent(mevents.ActionTag, string(imgs[0].ID), ref.Familiar(), imgs[0].Config.Config.Labels)
	return nil
}
