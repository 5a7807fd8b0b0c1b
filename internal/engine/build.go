package engine

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
	"conex/internal/runtime"
)

// BuildRequest says what to build and what to do with it.
type BuildRequest struct {
	build.Request
	// Tags are the references to give to the image.
	Tags []string
	// Outputs are what to do with the result; none, and Load in addition to others, is the image store. Push sends the image to the
	// registries of its tags, in addition to the store where no output says otherwise.
	Outputs    []BuildOutput
	Push, Load bool
	// From are caches to look in when a step is not known here, To those to write.
	From, To []BuildCache
	// Annotations are "[TYPE:]KEY=VALUE", for the manifests of all outputs.
	Annotations []string
	// Verify builds a second time without cache, throws the result away, and says what is different: the error is a
	// *build.Difference then.
	Verify bool
	// File lets an output write to a file, of which nothing is left if writing fails, or for "-" to standard output.
	File func(dest string, write func(io.Writer) error) error
}

// BuildResult says what came of a build.
type BuildResult struct {
	build.Result
	// Metadata is what --metadata-file says, by buildx's keys.
	Metadata map[string]any
}

// Build builds an image from a Dockerfile. A nil error promises that the image is recorded, tagged and survives a power loss. An error
// that a place in the Dockerfile is to blame for is a *build.StepError or a *dockerfile.ParseError.
func (e *Engine) Build(ctx context.Context, req BuildRequest) (res BuildResult, err error) {
	if err := e.validateCgroupParent(req.CgroupParent); err != nil {
		return res, err
	}
	ls, err := e.Layers()
	if err != nil {
		return res, err
	}
	out, err := e.buildOutput(&req)
	if err != nil {
		return res, err
	}
	defer out.close()
	req.Export, req.Names = out.export, out.names()
	res.Metadata = out.metadata
	// Each layer is claimed before it is made or found, so a build of hours keeps no sweep from its work.
	lease, err := collect.Hold(e.root)
	if err != nil {
		return res, err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	out.lease, out.layers = lease, ls.Claiming(lease.Claim)
	b := &build.Builder{
		Root: e.root, State: e.cfg.State, Layers: out.layers, Runtime: runtime.New(), Networks: e.Networks(),
		DNS: e.cfg.DNS, DNSSearch: e.cfg.DNSSearch, SystemdCgroup: e.systemdCgroup(), Parallel: e.cfg.Build.MaxParallelism, Base: e.claimingBase(lease),
	}
	out.builder = b
	before, _, err := disk.Free(e.root.Path())
	if err != nil {
		return res, err
	}
	begun := time.Now()
	res.Result, err = b.Build(ctx, req.Request)
	if e.rootFull(err) && req.Context != "-" && req.Dockerfile != "-" && e.makeRoom(ctx, begun) {
		res.Result, err = b.Build(ctx, req.Request) // the steps that were done are cached
	}
	var wrote int64
	if err != nil || !res.Cached {
		// What cache mounts have grown by shows in the free space alone.
		after, _, ferr := disk.Free(e.root.Path())
		err = errors.Join(err, ferr)
		wrote = max(before-after, e.layersSize(ls, res.Made))
	}
	e.afterWrite(ctx, wrote)
	if e.rootFull(err) {
		e.makeRoom(ctx, time.Time{}) // the steps that were done too: others need the room more than the next try
	}
	return res, err
}

// claimingBase is buildBase for a build's lease: what it returns stays.
func (e *Engine) claimingBase(lease *collect.Lease) func(context.Context, string, ocispec.Platform, bool, func(current, total int64)) (image.Image, error) {
	return func(ctx context.Context, ref string, plat ocispec.Platform, pull bool, progress func(current, total int64)) (image.Image, error) {
		for {
			img, err := e.buildBase(ctx, ref, plat, pull, progress)
			if err != nil {
				return img, err
			}
			if err := lease.Claim(append(slices.Clone(img.Layers()), img.ID)...); err != nil {
				return img, err
			}
			images, err := e.Images()
			if err != nil {
				return img, err
			}
			// Removed between our look and our claim: look again.
			if _, err := images.Find(string(img.ID)); !errors.Is(err, image.ErrNotFound) {
				return img, err
			}
		}
	}
}

// buildBase finds the image that a FROM names: here, or in its registry; or in an OCI layout that --build-context names.
func (e *Engine) buildBase(ctx context.Context, ref string, plat ocispec.Platform, pull bool, progress func(current, total int64)) (image.Image, error) {
	if where, ok := strings.CutPrefix(ref, layoutScheme); ok {
		return e.layoutImage(ctx, where, plat, sumProgress(progress))
	}
	images, err := e.Images()
	if err != nil {
		return image.Image{}, err
	}
	want := "" // this machine's: then an image that says nothing of platforms will do
	if registry.FormatPlatform(plat) != registry.FormatPlatform(registry.HostPlatform()) {
		want = registry.FormatPlatform(plat)
	}
	if !pull {
		var img image.Image
		if want == "" {
			img, err = images.Find(ref)
			if err == nil && img.Config.Architecture != "" && registry.Fits(plat, img.Config.Platform) < 0 {
				err = image.ErrNotFound
			}
		} else {
			img, err = images.ResolvePlatform(ref, plat)
		}
		if !errors.Is(err, image.ErrNotFound) && !errors.Is(err, image.ErrDamaged) {
			return img, err
		}
	}
	img, _, err := e.Pull(ctx, PullRequest{Reference: ref, Platform: want, Progress: sumProgress(progress)})
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
