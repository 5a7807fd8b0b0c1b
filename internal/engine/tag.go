package engine

import (
	"context"

	"conex/internal/image"
)

// Tag points the reference target to the image that source names. What target pointed to before stays, untagged.
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
	img, err := images.Resolve(source)
	if err != nil {
		return classify(err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return classify(images.Tag(img.ID, ref))
}
