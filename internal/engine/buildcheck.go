package engine

import (
	"context"
	"errors"
	"slices"

	"conex/internal/build"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

type (
	// BuildCheckResult is what the build checks found.
	BuildCheckResult = build.CheckResult
	// BuildOutline is what a target takes from outside.
	BuildOutline = build.Outline
	// BuildTargets are the stages of a Dockerfile.
	BuildTargets = build.Targets
)

// BuildCheck holds a Dockerfile against the build checks without building it. Of base images that are not here only the config is
// fetched, and not kept.
func (e *Engine) BuildCheck(ctx context.Context, req BuildRequest) (BuildCheckResult, error) {
	return e.planBuilder().Check(ctx, req.Request)
}

// BuildOutline tells which arguments, secrets and agents a target takes, without building it.
func (e *Engine) BuildOutline(ctx context.Context, req BuildRequest) (BuildOutline, error) {
	return e.planBuilder().Outline(ctx, req.Request)
}

// BuildTargets lists the stages of a Dockerfile.
func (e *Engine) BuildTargets(ctx context.Context, req BuildRequest) (BuildTargets, error) {
	return e.planBuilder().Targets(ctx, req.Request)
}

// planBuilder plans and can't run anything.
func (e *Engine) planBuilder() *build.Builder {
	return &build.Builder{Root: e.root, State: e.cfg.State, Base: e.buildBaseConfig}
}

// buildBaseConfig finds the config of the image that a FROM names: here, or in its registry.
func (e *Engine) buildBaseConfig(ctx context.Context, ref string, plat ocispec.Platform, pull bool, _ func(current, total int64)) (image.Image, error) {
	images, err := e.Images()
	if err != nil {
		return image.Image{}, err
	}
	host := registry.FormatPlatform(plat) == registry.FormatPlatform(registry.HostPlatform())
	if !pull {
		var img image.Image
		if host {
			img, err = images.Resolve(ref)
		} else {
			img, err = images.ResolvePlatform(ref, plat)
		}
		if !errors.Is(err, image.ErrNotFound) && !errors.Is(err, image.ErrDamaged) {
			return img, err
		}
	}
	r, err := image.ParseReference(ref)
	if err != nil {
		return image.Image{}, classify(err)
	}
	p := &puller{e: e, ref: r, client: e.registryClient(), images: images}
	defer p.client.Close()
	name := r.Tag()
	if r.Digest() != "" {
		name = string(r.Digest())
	}
	m, err := p.resolve(ctx, name, plat, !host)
	if err != nil {
		return image.Image{}, pullError(r, err)
	}
	c, err := image.ParseConfig(m.conf)
	if err != nil {
		return image.Image{}, err
	}
	return image.Image{ID: m.manifest.Config.Digest, Config: c, RawConfig: slices.Clone(m.conf)}, nil
}
