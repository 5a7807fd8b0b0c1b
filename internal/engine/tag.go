package engine

import (
	"context"
	"errors"

	"conex/internal/image"
)

// Tag points the reference target to the image that source names. What target pointed to before stays, untagged.
func (e *Engine) Tag(ctx context.Context, source, target string) error {
	ref, err := image.ParseReference(target)
	if err != nil {
		return err
	}
	if ref.Digest() != "" {
		return errors.New("refusing to create a tag with a digest reference")
	}
	images, err := e.Images()
	if err != nil {
		return err
	}
	img, err := images.Resolve(source)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return images.Tag(img.ID, ref)
}
