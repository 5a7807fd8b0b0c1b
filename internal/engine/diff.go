package engine

import (
	"context"
	"os"

	"conex/internal/collect"
	"conex/internal/layers"
	"conex/internal/linux/mount"

	apic "github.com/moby/moby/api/types/container"
)

// Diff lists what has changed in a container's file system since it was made, running or not: in the order of the paths, a folder before
// what is in it. What conex itself puts there is not among it.
func (e *Engine) Diff(ctx context.Context, name string) ([]apic.FilesystemChange, error) {
	n, err := e.snapshot(ctx, name)
	if err != nil {
		return nil, err
	}
	rec := n.Record
	lease, err := collect.Hold(e.root, rec.Layers...)
	if err != nil {
		return nil, err
	}
	defer lease.Close()
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	lower, err := ls.Lower(ctx, rec.Layers)
	if err != nil {
		return nil, err
	}
	var tree *os.File
	if len(lower) > 0 {
		if tree, err = mount.Overlay(mount.OverlayOptions{Lower: lower}); err != nil {
			return nil, err
		}
		defer tree.Close()
	}
	upper := e.Containers().Dir(rec.ID, "upper")
	exclude, err := e.mountPoints(ctx, rec, upper)
	if err != nil {
		return nil, err
	}
	list, err := layers.Changes(upper, tree, exclude)
	if err != nil {
		return nil, err
	}
	if _, err := e.Containers().Load(rec.ID); err != nil {
		return nil, classify(err) // removed meanwhile: it was half of it
	}
	out := make([]apic.FilesystemChange, len(list))
	for i, c := range list {
		out[i] = apic.FilesystemChange{Kind: apic.ChangeType(c.Kind), Path: c.Path}
	}
	return out, nil
}
