package engine

import (
	"context"

	"conex/internal/analyze"
	"conex/internal/image"
)

// AnalyzeImage looks at what each layer of an image did, with a platform (os[/arch[/variant]]) of the image of a name which fits it. It reads the
// headers of the layers and no contents.
func (e *Engine) AnalyzeImage(ctx context.Context, name, platform string) (*analyze.Image, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	img, err := findImage(s.Images, name, platform)
	if err != nil {
		return nil, err
	}
	found, err := s.Image(ctx, img)
	return found, classify(err)
}

// ImageID returns the id of the image that a name leads to, with a platform of the one which fits it.
func (e *Engine) ImageID(_ context.Context, name, platform string) (string, error) {
	images, err := e.Images()
	if err != nil {
		return "", err
	}
	img, err := findImage(images, name, platform)
	return string(img.ID), err
}

// findImage is Resolve, or with a platform ResolvePlatform.
func findImage(images *image.Store, name, platform string) (image.Image, error) {
	var img image.Image
	var err error
	if platform == "" {
		img, err = images.Resolve(name)
	} else {
		img, err = variantFor(images, name, platform)
	}
	return img, classify(err)
}

// DiffImages compares two images by what a container would see of them, with a platform those of the names which fit it.
func (e *Engine) DiffImages(ctx context.Context, a, b, platform string, opt analyze.DiffOptions) (*analyze.Difference, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	x, err := findImage(s.Images, a, platform)
	if err != nil {
		return nil, err
	}
	y, err := findImage(s.Images, b, platform)
	if err != nil {
		return nil, err
	}
	d, err := s.Diff(ctx, x, y, opt)
	return d, classify(err)
}

// ImageTree shows which images share which layers, or with a name what that image is made of. image.ErrDamaged comes with the tree of all
// other images.
func (e *Engine) ImageTree(ctx context.Context, name string) (*analyze.Tree, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	var only *image.Image
	if name != "" {
		img, err := findImage(s.Images, name, "")
		if err != nil {
			return nil, err
		}
		only = &img
	}
	t, err := s.Tree(ctx, only)
	return t, classify(err)
}

func (e *Engine) analyzer() (analyze.Store, error) {
	images, err := e.Images()
	if err != nil {
		return analyze.Store{}, err
	}
	ls, err := e.Layers()
	return analyze.Store{Images: images, Layers: ls}, err
}
