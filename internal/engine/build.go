package engine

import (
	"context"
	"errors"
	"io"
	"sync"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/image"
	"conex/internal/runtime"
)

// BuildRequest says what to build; see build.Request, which has the same fields.
type BuildRequest struct {
	// Context is a folder, or "-" for a Dockerfile or a tar on Stdin.
	Context string
	Stdin   io.Reader
	// Dockerfile is -f: a path, "-" for Stdin, "" for Dockerfile in the context.
	Dockerfile string
	// Tags are -t.
	Tags []string
	// BuildArgs are --build-arg; nil is a name without a value anywhere.
	BuildArgs map[string]*string
	// Target is the stage to build, "" the last.
	Target string
	// NoCache runs every step; Pull asks the registry for every base image.
	NoCache, Pull bool
	// Labels are --label.
	Labels map[string]string
	// Platform is os/arch; only this machine's is possible.
	Platform string
	// Display receives events, one at a time. Nil: nobody looks.
	Display build.Display
}

// BuildResult is a finished build.
type BuildResult struct {
	// ID is the image's, "sha256:...".
	ID string
	// Cached says that no step had to run.
	Cached bool
}

// Build builds an image from a Dockerfile. A nil error promises that the image is recorded, tagged and survives a power loss. An error
// that a place in the Dockerfile is to blame for is a *build.StepError or a *dockerfile.ParseError.
func (e *Engine) Build(ctx context.Context, req BuildRequest) (res BuildResult, err error) {
	ls, err := e.Layers()
	if err != nil {
		return res, err
	}
	images, err := e.Images()
	if err != nil {
		return res, err
	}
	// What a killed build left in staging goes now. Two folders are read.
	if err := e.root.Sweep(); err != nil {
		return res, err
	}
	lease, err := collect.NewLease(e.root)
	if err != nil {
		return res, err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	b := &build.Builder{
		Root: e.root, State: e.cfg.State, Layers: ls, Images: images, Runtime: runtime.New(), Networks: e.Networks(),
		DNS: e.cfg.DNS, DNSSearch: e.cfg.DNSSearch, Base: e.buildBase,
	}
	out, err := b.Build(ctx, build.Request{
		Context: req.Context, Stdin: req.Stdin, Dockerfile: req.Dockerfile, Tags: req.Tags, BuildArgs: req.BuildArgs, Target: req.Target,
		NoCache: req.NoCache, Pull: req.Pull, Labels: req.Labels, Platform: req.Platform, Display: req.Display,
	})
	return BuildResult{ID: string(out.ID), Cached: out.Cached}, err
}

// buildBase finds the image that a FROM names: here, or in its registry.
func (e *Engine) buildBase(ctx context.Context, ref string, pull bool, progress func(current, total int64)) (image.Image, error) {
	images, err := e.Images()
	if err != nil {
		return image.Image{}, err
	}
	if !pull {
		img, err := images.Resolve(ref)
		if !errors.Is(err, image.ErrNotFound) && !errors.Is(err, image.ErrDamaged) {
			return img, err
		}
	}
	img, _, err := e.Pull(ctx, PullRequest{Reference: ref, Progress: sumProgress(progress)})
	return img, err
}

// sumProgress adds up the bytes of all layers of a pull.
func sumProgress(report func(current, total int64)) Progress {
	var mu sync.Mutex
	current, total := map[string]int64{}, map[string]int64{}
	return func(ev Event) {
		if ev.ID == "" || ev.Total == 0 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		current[ev.ID], total[ev.ID] = ev.Current, ev.Total
		var c, t int64
		for id := range total {
			c, t = c+current[id], t+total[id]
		}
		report(c, t)
	}
}
