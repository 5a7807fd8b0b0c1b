package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/layers"
	"conex/internal/linux/mount"
)

// ExportRequest asks for a container's file system.
type ExportRequest struct {
	Container string
	// Output gets the tar.
	Output io.Writer
	// Torn is told of files that were cut off while they were read: zeros stand in the tar for what is missing. May be nil.
	Torn func(path string)
}

// Export writes the file system of a container, running or not, as a tar: its image's layers with its own changes on top. Mount points
// are in it, what is mounted on them is not.
func (e *Engine) Export(ctx context.Context, req ExportRequest) error {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return err
	}
	rec := n.Record
	lease, err := collect.Hold(e.root, rec.Layers...)
	if err != nil {
		return err
	}
	defer lease.Close()
	tree, err := e.mergedTree(ctx, rec)
	if err != nil {
		return err
	}
	defer tree.Close()
	torn := func(path string) {
		if req.Torn != nil {
			req.Torn(path)
		}
	}
	if err := layers.WriteTree(ctx, req.Output, tree, torn); err != nil {
		return fmt.Errorf("export %s: %w", rec.Name, err)
	}
	// Its files went one by one before our eyes: what was written may be half of it.
	if _, err := e.Containers().Load(rec.ID); errors.Is(err, container.ErrNotFound) {
		return conflict("container %s was removed while it was exported", rec.Name)
	}
	e.event(rec, "export", nil)
	return nil
}

// mergedTree makes a read-only mount that shows what the container's root is made of, attached nowhere: it is gone when it is closed,
// at the latest with the process. The writable layer is the topmost lower folder of it, so it is only read, even while the container
// runs. A lease must hold the layers.
func (e *Engine) mergedTree(ctx context.Context, rec *container.Record) (*os.File, error) {
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	lower, err := ls.Lower(ctx, rec.Layers)
	if err != nil {
		return nil, err
	}
	return mount.Overlay(mount.OverlayOptions{Lower: append([]string{e.Containers().Dir(rec.ID, "upper")}, lower...)})
}
