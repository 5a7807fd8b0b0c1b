package engine

import (
	"context"

	"conex/internal/analyze"
)

// AnalyzeImage looks at what each layer of an image did. It reads the headers of the layers and no contents.
func (e *Engine) AnalyzeImage(ctx context.Context, name string) (*analyze.Image, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	img, err := s.Image(ctx, name)
	return img, classify(err)
}

// DiffImages compares two images by what a container would see of them.
func (e *Engine) DiffImages(ctx context.Context, a, b string, opt analyze.DiffOptions) (*analyze.Difference, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	d, err := s.Diff(ctx, a, b, opt)
	return d, classify(err)
}

// ImageTree shows which images share which layers, or with a name what that image is made of. image.ErrDamaged comes with the tree of all
// other images.
func (e *Engine) ImageTree(ctx context.Context, name string) (*analyze.Tree, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	t, err := s.Tree(ctx, name)
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
