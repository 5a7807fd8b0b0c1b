package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/linux/mount"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/volume"

	"golang.org/x/sys/unix"
)

// copyUp fills a new volume with what the image has at dst, as Docker does. An image that has nothing there, or no folder, is
// volume.ErrNothing. In a volume of other ids (idmap=UID:GID) what is the container's user's belongs to those. With merge data may have a part of it.
// With disk.Durable, and without merge, the content is on the disk when it returns.
func (e *Engine) copyUp(ctx context.Context, rec *container.Record, dst, data string, merge bool, d disk.Durability) error {
	if len(rec.Layers) == 0 {
		return volume.ErrNothing
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
		return volume.ErrNothing
	}
	if err != nil {
		return err
	}
	defer src.Close()
	if merge {
		err = volume.MergeTree(ctx, data, src, volume.MergeOptions{Top: true})
	} else {
		o := volume.CopyOptions{Durable: d == disk.Durable}
		if o.Owner, err = volumeOwner(root, rec, rec.More[dst].Owner); err == nil {
			err = volume.CopyTree(ctx, data, src, o)
		}
	}
	if err != nil {
		return fmt.Errorf("copy %s of the image: %w", dst, err)
	}
	return nil
}

// volumeOwner says whom a file of the image belongs to in a volume that own is asked for; nil: whom it belonged to.
func volumeOwner(root *os.File, rec *container.Record, own *container.Owner) (func(uid, gid uint32) (uint32, uint32), error) {
	if own == nil || own.Source {
		return nil, nil
	}
	seen, err := runtime.ResolveUser(root, rec.Config.User, nil)
	if err != nil {
		return nil, err
	}
	return func(uid, gid uint32) (uint32, uint32) {
		if uid == seen.UID {
			uid = own.UID
		}
		if gid == seen.GID {
			gid = own.GID
		}
		return uid, gid
	}, nil
}
