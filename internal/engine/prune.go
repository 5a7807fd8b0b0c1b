package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/volume"

	mevents "github.com/moby/moby/api/types/events"
	apii "github.com/moby/moby/api/types/image"
)

// PruneRequest says what shall be removed of the things that nothing uses.
type PruneRequest struct {
	Containers, Networks, Images, Volumes, BuildCache bool
	// AllImages removes also images that have a name, AllCache also cached steps whose layers an image has, AllVolumes also volumes that
	// somebody gave a name.
	AllImages, AllCache, AllVolumes bool
	// KeepStorage lets so many bytes of the build cache stay, of what was used last.
	KeepStorage int64
	// MaxUsed, if not 0, lets the build cache take so many bytes; MinFree, if not 0, removes from it until so many are free. KeepStorage stays in
	// any case.
	MaxUsed, MinFree int64
	// ListCache asks for what was removed of the build cache.
	ListCache bool
	// Filters are Docker's: until (not for volumes), label and label!; those of CacheUsage when the build cache alone is meant.
	Filters map[string][]string
}

// cacheAlone reports whether nothing but the build cache is meant, whose filters are others.
func (r *PruneRequest) cacheAlone() bool {
	return r.BuildCache && !r.Containers && !r.Networks && !r.Images && !r.Volumes
}

// PruneReport says what a prune removed.
type PruneReport struct {
	// Networks are names, as Docker has them.
	Containers, Networks, Volumes []string
	// Images tells what was done in order, as RemoveImage does.
	Images []apii.DeleteResponse
	// BuildCache has the keys of the steps that were forgotten.
	BuildCache []string
	// Cache is what went of the build cache, if it was asked for.
	Cache []CacheItem
	// Bytes is the space that came free.
	Bytes int64
	// Deferred says that a pull, build or the like is under way: layers go when it ends.
	Deferred bool
}

// Prune removes what nothing uses: first containers that don't run, then networks and volumes, images and cached build steps that no container and
// no live lease uses, in the end the layers that are left over. What it did before an error is in the report.
func (e *Engine) Prune(ctx context.Context, req PruneRequest) (rep PruneReport, err error) {
	defer func() {
		if err == nil {
			e.pruneEvents(req, &rep)
		}
	}()
	f, err := newPruneFilter(&req)
	if err != nil {
		return rep, err
	}
	if err := e.Settle(ctx); err != nil {
		return rep, err
	}
	if req.Containers {
		if err := e.pruneContainers(ctx, f, &rep); err != nil {
			return rep, err
		}
	}
	if req.Networks {
		if err := e.pruneNetworks(ctx, f, &rep); err != nil {
			return rep, err
		}
	}
	if req.Volumes {
		if err := e.pruneVolumes(ctx, req, f, &rep); err != nil {
			return rep, err
		}
	}
	if !req.Images && !req.BuildCache {
		return rep, nil
	}
	var removal *imageRemoval
	if req.Images {
		if removal, err = e.pruneImages(ctx, req, f); removal != nil {
			rep.Images = removal.done
		}
		if err != nil {
			return rep, err
		}
	}
	if req.BuildCache {
		o := build.PruneOptions{Before: f.until, Keep: req.KeepStorage}
		if req.cacheAlone() {
			if o, err = e.cachePrune(&req); err != nil {
				return rep, err
			}
		}
		if !req.AllCache {
			images, err := e.Images()
			if err != nil {
				return rep, err
			}
			if o.Images, err = images.List(); err != nil {
				return rep, err
			}
		}
		var before []CacheItem
		if req.ListCache {
			if before, err = e.CacheUsage(ctx, nil); err != nil {
				return rep, err
			}
		}
		keys, n, err := build.Prune(e.root, o)
		rep.BuildCache, rep.Bytes = keys, rep.Bytes+n
		if err == nil && req.ListCache {
			rep.Cache, err = e.cacheGone(ctx, before)
		}
		if err != nil {
			return rep, err
		}
	}
	if req.Images && req.BuildCache {
		n, err := e.dropParts()
		rep.Bytes += n
		if err != nil {
			return rep, err
		}
	}
	// Records are gone: what follows is cleaning up, which a Ctrl-C shall not leave half done.
	res, err := e.sweep(context.WithoutCancel(ctx))
	rep.Bytes += res.Bytes
	rep.Deferred = res.Deferred
	if removal != nil {
		removal.swept(res)
		rep.Images = removal.done
	}
	return rep, err
}

// pruneEvents announces what a prune removed, a type each. Docker counts the bytes of each, we those of all.
func (e *Engine) pruneEvents(req PruneRequest, rep *PruneReport) {
	attrs := map[string]string{"reclaimed": strconv.FormatInt(rep.Bytes, 10)}
	for _, k := range []struct {
		done bool
		kind mevents.Type
	}{
		{req.Containers, mevents.ContainerEventType}, {req.Networks, mevents.NetworkEventType}, {req.Volumes, mevents.VolumeEventType}, {req.Images, mevents.ImageEventType},
		{req.BuildCache, mevents.BuilderEventType},
	} {
		if k.done {
			e.announce(k.kind, mevents.ActionPrune, "", attrs)
		}
	}
}

func (e *Engine) pruneContainers(ctx context.Context, f *pruneFilter, rep *PruneReport) error {
	all, err := e.snapshots(ctx)
	if err != nil {
		return err
	}
	for _, n := range all {
		r := n.Record
		if n.Alive() != nil || !f.match(r.Created, r.Config.Labels) {
			continue
		}
		size, err := treeSize(e.Containers().Dir(r.ID, "upper"))
		if err != nil {
			return err
		}
		err = e.RemoveContainer(ctx, RemoveRequest{Container: r.ID})
		if errors.Is(err, ErrConflict) || errors.Is(err, ErrNotFound) {
			continue // somebody has started or removed it since
		}
		if err != nil {
			return err
		}
		rep.Containers, rep.Bytes = append(rep.Containers, r.ID), rep.Bytes+size
	}
	return nil
}

// pruneVolumes removes volumes that no container has.
func (e *Engine) pruneVolumes(ctx context.Context, req PruneRequest, f *pruneFilter, rep *PruneReport) error {
	trash, err := e.trashVolumes(ctx, req, f, rep)
	errs := []error{err}
	for _, t := range trash {
		size, err := treeSize(filepath.Join(t, "_data"))
		errs = append(errs, err, os.RemoveAll(t))
		rep.Bytes += size
	}
	return errors.Join(errs...)
}

// trashVolumes takes away what pruneVolumes deletes, and returns where that lies. It holds the volumes' lock, so that nobody is making a container
// that has a volume and no record yet.
func (e *Engine) trashVolumes(ctx context.Context, req PruneRequest, f *pruneFilter, rep *PruneReport) (trash []string, err error) {
	vols := e.Volumes()
	l, err := vols.LockUnused(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Release()
	all, err := e.snapshots(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, n := range all {
		for _, m := range n.Record.Mounts {
			used[m.Name] = true
		}
		for _, v := range n.Record.Anonymous {
			used[v] = true
		}
	}
	names, err := vols.List()
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var errs []error
	for _, name := range names {
		v, err := vols.Get(name)
		if errors.Is(err, volume.ErrNotFound) {
			continue // what a crash left of one: nobody can have put anything into it
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if used[name] || !v.Anonymous && !req.AllVolumes || !f.match(v.Created, v.Labels) || len(v.Options) > 0 {
			continue // Docker leaves what has options: who made those wants it
		}
		if kept, err := vols.Snapshots(name); err != nil {
			return trash, err
		} else if len(kept) > 0 {
			continue // somebody wants what was in it
		}
		at, err := vols.TryTrash(name)
		if errors.Is(err, disk.ErrLocked) {
			continue // somebody reads it: it is in use
		}
		if err != nil {
			return trash, err
		}
		e.volumeEvent(mevents.ActionDestroy, name)
		trash, rep.Volumes = append(trash, at), append(rep.Volumes, name)
	}
	return trash, errors.Join(errs...)
}

// pruneImages removes the records of images. Nobody can take a lease on an image meanwhile, so none is lost between somebody's look
// and his use.
func (e *Engine) pruneImages(ctx context.Context, req PruneRequest, f *pruneFilter) (*imageRemoval, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	r := &imageRemoval{e: e, images: images}
	return r, collect.Exclusive(ctx, e.root, func(held map[ocispec.Digest]bool) error {
		used, err := e.imagesOfContainers(ctx)
		if err != nil {
			return err
		}
		mounted, err := e.mountedIDs()
		if err != nil {
			return err
		}
		for _, id := range mounted {
			used[id] = true
		}
		list, err := images.List()
		if err != nil {
			return err
		}
		for _, img := range list {
			if held[img.ID] || used[img.ID] || len(img.RepoTags) > 0 && !req.AllImages || !f.match(img.Created, img.Config.Config.Labels) {
				continue
			}
			if err := r.remove(img.ID); err != nil && !errors.Is(err, image.ErrNotFound) {
				return err
			}
		}
		return nil
	})
}

// imagesOfContainers lists the images that containers are made of.
func (e *Engine) imagesOfContainers(ctx context.Context) (map[ocispec.Digest]bool, error) {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return nil, err
	}
	used := map[ocispec.Digest]bool{}
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		rec, err := cs.Load(id)
		if errors.Is(err, container.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		images, _ := rec.Digests()
		for _, id := range images {
			used[id] = true
		}
	}
	return used, nil
}

// pruneFilter is a request's filters, checked.
type pruneFilter struct {
	// until is the time before which a thing must have been made, or a cached step used; zero: any.
	until           time.Time
	labels, without []string
}

// newPruneFilter also takes the filters that only say again what a flag says.
func newPruneFilter(req *PruneRequest) (*pruneFilter, error) {
	f := &pruneFilter{}
	if req.cacheAlone() {
		_, err := cacheFilter(req.Filters)
		return f, err
	}
	for key, vals := range req.Filters {
		if len(vals) == 0 {
			continue
		}
		last := vals[len(vals)-1]
		switch {
		case key == "until" && req.Volumes && req.Images:
			return nil, invalid(`the "until" filter is not supported with "--volumes"`)
		case key == "until" && !req.Volumes:
			if len(vals) > 1 {
				return nil, invalid("more than one until filter specified")
			}
			t, err := parseUntil(last, time.Now())
			if err != nil {
				return nil, invalid("invalid filter 'until=%s': %w", last, err)
			}
			f.until = t
		case key == "label":
			f.labels = vals
		case key == "label!":
			f.without = vals
		case key == "dangling" && req.Images && !req.Containers, key == "all" && req.Volumes && !req.Images:
			b, err := strconv.ParseBool(last)
			if err != nil {
				return nil, invalid("invalid filter '%s=%s'", key, last)
			}
			if key == "all" {
				req.AllVolumes = req.AllVolumes || b
			} else {
				req.AllImages = !b
			}
		default:
			return nil, invalid("invalid filter '%s'", key)
		}
	}
	return f, nil
}

func (f *pruneFilter) match(made time.Time, labels map[string]string) bool {
	if !f.until.IsZero() && !made.Before(f.until) {
		return false
	}
	return hasLabels(labels, f.labels) && !slices.ContainsFunc(f.without, func(l string) bool { return hasLabels(labels, []string{l}) })
}
