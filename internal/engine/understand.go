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

func (e *Engine) analyzer() (analyze.Store, error) {
	images, err := e.Images()
	if err != nil {
		return analyze.Store{}, err
	}
	ls, err := e.Layers()
	return analyze.Store{Images: images, Layers: ls}, err
}
