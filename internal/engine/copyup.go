package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"conex/internal/container"
	"conex/internal/linux/mount"
	"conex/internal/safepath"
	"conex/internal/volume"

	"golang.org/x/sys/unix"
)

// copyUp fills a new volume with what the image has at dst, as Docker does. An image that has nothing there, or no folder, leaves it
// empty.
func (e *Engine) copyUp(ctx context.Context, rec *container.Record, dst, data string) error {
	if len(rec.Layers) == 0 {
		return nil
	}
	ls, err := e.Layers()
	if err != nil {
		return err
	}
	lower, err := ls.Lower(ctx, rec.Layers)
	if err != nil {
		return err
	}
	root, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
	if err != nil {
		return err
	}
	defer root.Close() // the mount is attached nowhere and goes with it
	src, err := safepath.Open(root, dst, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	if err := volume.CopyTree(data, src); err != nil {
		return fmt.Errorf("copy %s of the image: %w", dst, err)
	}
	return nil
}
