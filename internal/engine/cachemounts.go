package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/disk"
)

// CacheMount is the folder of a RUN --mount=type=cache.
type CacheMount struct {
	// ID is the mount's id, which is its target where RUN gives none; Name is the folder's, and is taken for the id everywhere.
	ID, Name string
	// Owner is MODE:UID:GID where RUN asks for them: caches with other ones are others.
	Owner string
	// Size is what it takes on disk, in bytes, Files how many files it has.
	Size, Files int64
	LastUsed    time.Time
	// InUse says that a build step has it at this moment.
	InUse bool
}

// CacheMounts lists the cache mounts.
func (e *Engine) CacheMounts(context.Context) ([]CacheMount, error) {
	list, err := build.Mounts(e.root, &disk.Meter{})
	if err != nil {
		return nil, err
	}
	out := make([]CacheMount, len(list))
	for i, m := range list {
		out[i] = CacheMount{ID: m.ID, Name: m.Name, Owner: m.Owner, Size: m.Space.Disk, Files: m.Space.Files, LastUsed: m.Used, InUse: m.Busy}
	}
	return out, nil
}

// ExportCacheMount writes a cache mount as a tar. One that a step uses is a conflict.
func (e *Engine) ExportCacheMount(ctx context.Context, id string, w io.Writer) error {
	return mountError(build.ExportMount(ctx, e.root, id, w))
}

// CacheMountImport says which cache mount to make.
type CacheMountImport = build.MountImport

// ImportCacheMount makes a cache mount of a tar, compressed or not. One that exists stays, which is an error, unless Replace is set.
func (e *Engine) ImportCacheMount(ctx context.Context, req CacheMountImport, tar io.Reader) (err error) {
	ls, err := e.Layers()
	if err != nil {
		return err
	}
	if err := e.root.Sweep(); err != nil { // as in Pull
		return err
	}
	lease, err := collect.Hold(e.root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.closeLease(ctx, lease)) }()
	r, _, err := compress.Reader(endable(ctx, tar))
	if err != nil {
		return fmt.Errorf("import cache mount %s: %w", req.ID, err)
	}
	defer r.Close()
	return mountError(build.ImportMount(ctx, e.root, ls.Claiming(lease.Claim), req, r))
}

// RemoveCacheMount forgets a cache mount. One that a step uses is a conflict.
func (e *Engine) RemoveCacheMount(id string) error { return mountError(build.RemoveMount(e.root, id)) }

func mountError(err error) error {
	switch {
	case errors.Is(err, build.ErrNoMount):
		return &kindError{ErrNotFound, err}
	case errors.Is(err, build.ErrMountBusy):
		return &kindError{ErrConflict, err}
	}
	return err
}
