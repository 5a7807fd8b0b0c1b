package engine

import (
	"context"
	"errors"

	"conex/internal/build"
	"conex/internal/container"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/volume"
)

// Usage is one row of `system df`. Sizes are in bytes.
type Usage struct {
	// Total and Active count things, and those of them that something uses.
	Total, Active int
	// Size is what they take, Reclaimable what would be freed by removing those that nothing uses.
	Size, Reclaimable int64
}

// DiskUsage says where the disk space goes.
type DiskUsage struct {
	Images, Containers, Volumes, BuildCache Usage
	// LayersSize is what all layers take on disk, each counted once.
	LayersSize int64
}

// DiskUsage adds up. Layers that several images share count once.
func (e *Engine) DiskUsage(ctx context.Context) (DiskUsage, error) {
	var u DiskUsage
	if err := e.Settle(ctx); err != nil {
		return u, err
	}
	all, err := e.snapshots(ctx)
	if err != nil {
		return u, err
	}
	usedImages, usedLayers, usedVolumes := map[ocispec.Digest]bool{}, map[ocispec.Digest]bool{}, map[string]bool{}
	for _, n := range all {
		usedImages[n.Record.ImageID] = true
		for _, d := range n.Record.Layers {
			usedLayers[d] = true
		}
		for _, m := range n.Record.Mounts {
			if m.Name != "" {
				usedVolumes[m.Name] = true
			}
		}
		if err := u.Containers.addContainer(e, n); err != nil {
			return u, err
		}
	}
	if err := e.imageUsage(&u, usedImages, usedLayers); err != nil {
		return u, err
	}
	vols := volume.Open(e.root)
	names, err := vols.List()
	if err != nil {
		return u, err
	}
	for _, name := range names {
		size, err := treeSize(vols.Data(name))
		if err != nil {
			return u, err
		}
		u.Volumes.add(size, usedVolumes[name])
	}
	return u, nil
}

// cacheUsage counts the layers that only the build cache holds, and its own files.
func (e *Engine) cacheUsage(u *Usage, counted map[ocispec.Digest]bool, ls *layers.Store) error {
	err := build.Mark(e.root, func(ids ...ocispec.Digest) {
		for _, id := range ids {
			if counted[id] {
				continue
			}
			counted[id] = true
			if info, err := ls.Stat(id); err == nil { // a lost layer takes no space
				u.add(info.ContentSize, false)
			}
		}
	})
	if err != nil {
		return err
	}
	size, err := treeSize(e.root.Path("buildcache"))
	u.Size += size
	u.Reclaimable += size
	return err
}

// PruneBuildCache forgets all cached build steps and cache mounts, and removes the layers that nothing else uses. It returns the bytes
// that came free; deferred says that a pull or build runs, and the layers go when it ends.
func (e *Engine) PruneBuildCache(ctx context.Context) (freed int64, deferred bool, err error) {
	n, err := build.Prune(e.root)
	if err != nil {
		return n, false, err
	}
	res, err := e.sweep(ctx)
	return n + res.Bytes, res.Deferred, err
}

func (u *Usage) add(size int64, used bool) {
	u.Total++
	u.Size += size
	if used {
		u.Active++
	} else {
		u.Reclaimable += size
	}
}

func (u *Usage) addContainer(e *Engine, n *container.Snapshot) error {
	size, err := treeSize(e.Containers().Dir(n.Record.ID, "upper"))
	if err != nil {
		return err
	}
	u.add(size, n.Alive() != nil)
	return nil
}

// imageUsage counts images, and each layer of theirs once; a layer is reclaimable when no container stands on it.
func (e *Engine) imageUsage(u *DiskUsage, usedImages, usedLayers map[ocispec.Digest]bool) error {
	images, err := e.Images()
	if err != nil {
		return err
	}
	ls, err := e.Layers()
	if err != nil {
		return err
	}
	list, err := images.List()
	if err != nil {
		return err
	}
	seen := map[ocispec.Digest]bool{}
	for _, img := range list {
		u.Images.Total++
		if usedImages[img.ID] {
			u.Images.Active++
		}
		for _, d := range img.Layers() {
			if seen[d] {
				continue
			}
			seen[d] = true
			info, err := ls.Stat(d)
			if errors.Is(err, layers.ErrNotFound) {
				continue // a lost layer takes no space
			}
			if err != nil {
				return err
			}
			u.Images.Size += info.ContentSize
			if !usedLayers[d] {
				u.Images.Reclaimable += info.ContentSize
			}
		}
	}
	for d := range usedLayers {
		seen[d] = true
	}
	if err := e.cacheUsage(&u.BuildCache, seen, ls); err != nil {
		return err
	}
	stored, err := ls.List()
	if err != nil {
		return err
	}
	for _, l := range stored {
		u.LayersSize += l.DiskSize
	}
	return nil
}
