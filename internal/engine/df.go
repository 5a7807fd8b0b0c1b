package engine

import (
	"context"
	"time"

	"conex/internal/ocispec"
)

// Usage is one row of `system df`. Sizes are bytes that are allocated on the disk, as du counts them.
type Usage struct {
	// Total and Active count things, and those of them that something uses.
	Total, Active int
	// Size is what they take, Reclaimable what would come free by removing those that nothing uses.
	Size, Reclaimable int64
}

// DiskUsage says where the disk space goes. Every file below the root counts in one of the rows, so Size is what du says of the root.
type DiskUsage struct {
	// Images are layers, configs, manifests and records of images. Reclaimable is what `image prune -a` frees.
	Images Usage
	// Containers are writable layers, logs and records, and layers whose image is gone; active ones run.
	Containers Usage
	// Volumes are active while a container names them.
	Volumes Usage
	// BuildCache is cached steps with the layers that no image or container has, and cache mounts. Reclaimable is what `builder prune -a`
	// frees.
	BuildCache Usage
	// Other is everything else.
	Other Usage
	// Size is the sum of the rows; Reclaimable is what `system prune -a --volumes` frees. That may be more than the sum of the rows' Images,
	// Containers and BuildCache: a layer can be held by an unused image and the build cache both.
	Size, Reclaimable int64
	// LayersSize is what all layers take, each counted once.
	LayersSize int64

	ImageList     []ImageUsage
	ContainerList []ContainerUsage
	VolumeList    []VolumeUsage
	CacheList     []CacheUsage
	OtherList     []OtherUsage
}

// ImageUsage is one image. Size, Shared and Unique are the sizes of files, as `images` shows them; Disk is what the layers that no other
// image has, and the image's own records, take on the disk.
type ImageUsage struct {
	ID                   ocispec.Digest
	RepoTags             []string
	RepoDigests          []string
	Created              time.Time
	Size, Shared, Unique int64
	Disk                 int64
	Containers           int
}

// ContainerUsage is one container. Size is the length of the files in its writable layer, Disk what all of its folder takes.
type ContainerUsage struct {
	ID, Name, Image, Command string
	Created                  time.Time
	Status                   string
	LocalVolumes             int
	Size, Disk               int64
}

// VolumeUsage is one volume. Links counts the containers that name it.
type VolumeUsage struct {
	Name string
	// Anonymous volumes are those that system prune --volumes removes.
	Anonymous  bool
	Links      int
	Size, Disk int64
}

// CacheUsage is one cached step or cache mount. Shared says that an image or container has its layer too, whose space counts there.
type CacheUsage struct {
	ID, Type, Title   string
	Created, LastUsed time.Time
	Size, Disk        int64
	Shared            bool
}

// OtherUsage is a kind of files that belong to none of the other rows. What says what, in plain words.
type OtherUsage struct {
	What string
	Usage
}

// Words of the rows of OtherUsage, in their order.
const (
	otherBlobs      = "compressed layers, kept for a push"
	otherDownloads  = "downloads"
	otherLayers     = "layers that nothing uses, until the next sweep"
	otherLoose      = "blobs that nothing uses, until the next sweep"
	otherStaging    = "being made"
	otherTrash      = "being deleted"
	otherLeases     = "leases"
	otherQuarantine = "quarantine, of system check --repair"
	otherHistory    = "build history"
	otherRecords    = "folders, locks and records"
	otherUnknown    = "not conex's: system check lists it"
)

var otherOrder = []string{otherBlobs, otherDownloads, otherLayers, otherLoose, otherStaging, otherTrash, otherLeases, otherQuarantine, otherHistory, otherRecords, otherUnknown}

// DiskUsage adds up. Layers that several things share count once: for an image, else a container, else the build cache.
func (e *Engine) DiskUsage(ctx context.Context) (DiskUsage, error) {
	if err := e.Settle(ctx); err != nil {
		return DiskUsage{}, err
	}
	a := &account{e: e, other: map[string]*Usage{}}
	for _, w := range otherOrder {
		a.other[w] = &Usage{}
	}
	for _, step := range []func(context.Context) error{
		a.read, a.addLayers, a.addImages, a.addContainers, a.addVolumes, a.addCache, a.addBlobs, a.addRest,
	} {
		if err := step(ctx); err != nil {
			return DiskUsage{}, err
		}
	}
	a.total()
	return a.u, nil
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
