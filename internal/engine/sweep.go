package engine

import (
	"context"
	"errors"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// sweep removes layers and blobs that no image (mounted ones too), container, step of the build cache or live lease uses.
func (e *Engine) sweep(ctx context.Context) (collect.Result, error) {
	return e.sweepForms(ctx, func(ocispec.Digest) bool { return true })
}

// sweepForms is sweep that also lets the compressed layers go that keep does not want, or the configuration.
func (e *Engine) sweepForms(ctx context.Context, keep func(ocispec.Digest) bool) (collect.Result, error) {
	images, err := e.Images()
	if err != nil {
		return collect.Result{}, err
	}
	ls, err := e.Layers()
	if err != nil {
		return collect.Result{}, err
	}
	s := e.stores(images, ls)
	s.KeepForm = keep
	if e.cfg.KeepBlobs == config.KeepNever {
		s.KeepForm = func(ocispec.Digest) bool { return false }
	}
	res, err := collect.Sweep(ctx, s, e.markContainers, e.markBuildCache, e.markMounts)
	if err == nil {
		err = e.Containers().ClearNames()
	}
	return res, err
}

func (e *Engine) stores(images *image.Store, ls *layers.Store) collect.Stores {
	return collect.Stores{Root: e.root, Images: images, Layers: ls, Blobs: e.Blobs()}
}

// markContainers marks what containers are made of.
func (e *Engine) markContainers(mark func(...ocispec.Digest)) error {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return err
	}
	for _, id := range ids {
		r, err := cs.Load(id)
		if errors.Is(err, container.ErrNotFound) {
			continue // removed since List
		}
		if err != nil {
			return err
		}
		images, layers := r.Digests()
		mark(images...)
		mark(layers...)
	}
	return nil
}

// markBuildCache marks the layers that cached steps made.
func (e *Engine) markBuildCache(mark func(...ocispec.Digest)) error { return build.Mark(e.root, mark) }

// closeLease ends the lease of a build or the like, and does the sweep that somebody had to put off because of it.
func (e *Engine) closeLease(ctx context.Context, l *collect.Lease) error {
	if err := l.Close(); err != nil {
		return err
	}
	if !collect.Pending(e.root) && !collect.Left(e.root) {
		return nil
	}
	_, err := e.sweep(context.WithoutCancel(ctx))
	return err
}
