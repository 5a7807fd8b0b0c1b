package engine

import (
	"context"
	"fmt"

	"conex/internal/build"
	"conex/internal/image"
)

// buildOutput does with an image that was built what its request asks for.
type buildOutput struct {
	images *image.Store
	tags   []image.Reference
}

// buildOutput checks what a request wants done with the image, before anything is built.
func (e *Engine) buildOutput(req *BuildRequest) (*buildOutput, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	o := &buildOutput{images: images}
	for _, t := range req.Tags {
		ref, err := image.ParseReference(t)
		if err != nil {
			return nil, fmt.Errorf("invalid tag %q: %w", t, err)
		}
		if ref.Digest() != "" {
			return nil, fmt.Errorf("invalid tag %q: refusing to create a tag with a digest reference", t)
		}
		o.tags = append(o.tags, ref)
	}
	return o, nil
}

// names are the tags in full.
func (o *buildOutput) names() []string {
	var names []string
	for _, ref := range o.tags {
		names = append(names, ref.String())
	}
	return names
}

// export records the image and gives it its tags.
func (o *buildOutput) export(ctx context.Context, x *build.Export) error {
	err := x.Step("exporting to image", func(func(current, total int64)) (string, error) {
		img, err := o.images.Add(ctx, x.Config, "", "")
		return string(img.ID), err
	})
	if err != nil {
		return err
	}
	for _, ref := range o.tags {
		err := x.Step("naming to "+ref.String(), func(func(current, total int64)) (string, error) {
			_, err := o.images.AddTagged(ctx, x.Config, "", "", "", ref)
			return "", err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
