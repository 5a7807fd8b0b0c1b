package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"conex/internal/collect"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// ImageMount is an image that is mounted on the host. The mount is all that says so: it lies at <state>/mounts/<hex of the id>, and an
// empty folder there is an image that is not mounted.
type ImageMount struct {
	ID ocispec.Digest `json:"id"`
	// Repositories are the image's tags.
	Repositories []string `json:"repositories"`
	Path         string   `json:"mountpoint"`
}

// MountImage mounts an image's file system, read-only, and returns where. It stays until UnmountImage, Teardown or a reboot, and the
// image can't be removed meanwhile. An image that is mounted stays as it is.
func (e *Engine) MountImage(ctx context.Context, name string) (string, error) {
	images, err := e.Images()
	if err != nil {
		return "", err
	}
	img, err := images.Resolve(name)
	if err != nil {
		return "", classify(err)
	}
	l, err := e.lockMounts(ctx)
	if err != nil {
		return "", err
	}
	defer l.Release()
	at := e.mountPath(img.ID)
	if mounted, err := mount.IsRoot(at); mounted || err != nil {
		return at, err
	}
	lease, err := collect.Hold(e.root, append(slices.Clone(img.Layers()), img.ID)...)
	if err != nil {
		return "", err
	}
	defer lease.Close()
	tree, err := e.imageTree(ctx, img)
	if err != nil {
		return "", fmt.Errorf("mount %s: %w", name, err)
	}
	defer tree.Close()
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	target, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer target.Close()
	if err := mount.Attach(tree, target); err != nil {
		return "", err
	}
	// From here on the mount protects the image. Removed since we looked?
	if _, err := images.Find(string(img.ID)); err != nil {
		return "", classify(errors.Join(err, unmountImage(at, true)))
	}
	return at, nil
}

// imageTree makes a detached read-only mount of an image's layers. Nobody is to run or use what lies there: no set-user-ID, no devices.
func (e *Engine) imageTree(ctx context.Context, img image.Image) (*os.File, error) {
	return e.layerTree(ctx, img.Layers())
}

// layerTree is imageTree for layers.
func (e *Engine) layerTree(ctx context.Context, ids []ocispec.Digest) (*os.File, error) {
	const attr = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	if len(ids) == 0 {
		return mount.New("tmpfs", []mount.Param{{Key: "mode", Value: "755"}}, attr)
	}
	lower, err := e.imageLower(ctx, ls, ids)
	if err != nil {
		return nil, err
	}
	tree, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
	if err != nil {
		return nil, err
	}
	if err := mount.SetAttr(tree, attr, 0, 0, true); err != nil {
		tree.Close()
		return nil, err
	}
	return tree, nil
}

// imageLower are the mounted folders of an image's layers, top first, with an empty one below where they are fewer than two: a single
// folder would be shown as it is, with its marks of deleted files.
func (e *Engine) imageLower(ctx context.Context, ls *layers.Store, ids []ocispec.Digest) ([]string, error) {
	lower, err := ls.Lower(ctx, ids)
	if err != nil || len(lower) > 1 {
		return lower, err
	}
	empty := filepath.Join(e.cfg.State, "mounts", "empty")
	if err := os.MkdirAll(empty, 0o755); err != nil {
		return nil, err
	}
	return append(lower, empty), nil
}

// MountedImages lists the images that are mounted, by name.
func (e *Engine) MountedImages(context.Context) ([]ImageMount, error) {
	ids, err := e.mountedIDs()
	if err != nil {
		return nil, err
	}
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	list := []ImageMount{}
	for _, id := range ids {
		img, err := images.Get(id)
		if err != nil && !errors.Is(err, image.ErrNotFound) && !errors.Is(err, image.ErrDamaged) {
			return nil, err
		}
		list = append(list, ImageMount{id, notNil(img.RepoTags), e.mountPath(id)})
	}
	slices.SortStableFunc(list, func(a, b ImageMount) int { return slices.Compare(a.Repositories, b.Repositories) })
	return list, nil
}

// UnmountImage takes an image's mount away and returns the image's id. One that is in use is ErrConflict, unless forced: then those who
// have files open in it keep them.
func (e *Engine) UnmountImage(ctx context.Context, name string, force bool) (ocispec.Digest, error) {
	ids, err := e.mountedIDs()
	if err != nil {
		return "", err
	}
	images, err := e.Images()
	if err != nil {
		return "", err
	}
	img, err := images.Resolve(name)
	if err != nil && !errors.Is(err, image.ErrDamaged) {
		return "", classify(err)
	}
	if !slices.Contains(ids, img.ID) {
		return "", conflict("image %s is not mounted", name)
	}
	return img.ID, e.unmountImages(ctx, []ocispec.Digest{img.ID}, force)
}

// UnmountAllImages is UnmountImage for all that are mounted.
func (e *Engine) UnmountAllImages(ctx context.Context, force bool) ([]ocispec.Digest, error) {
	ids, err := e.mountedIDs()
	if err != nil {
		return nil, err
	}
	return ids, e.unmountImages(ctx, ids, force)
}

func (e *Engine) unmountImages(ctx context.Context, ids []ocispec.Digest, force bool) error {
	if len(ids) == 0 {
		return nil
	}
	l, err := e.lockMounts(ctx)
	if err != nil {
		return err
	}
	defer l.Release()
	var errs []error
	for _, id := range ids {
		errs = append(errs, unmountImage(e.mountPath(id), force))
	}
	return errors.Join(errs...)
}

func unmountImage(at string, force bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if force {
		flags |= unix.MNT_DETACH
	}
	for {
		mounted, err := mount.IsRoot(at)
		if err != nil {
			return err
		}
		if !mounted {
			break
		}
		if err := unix.Unmount(at, flags); err != nil {
			if err == unix.EBUSY {
				return conflict("the image mounted at %s is in use: leave the folder, or unmount by force", at)
			}
			return fmt.Errorf("unmount %s: %w", at, err)
		}
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (e *Engine) mountPath(id ocispec.Digest) string {
	return filepath.Join(e.cfg.State, "mounts", id.Encoded())
}

// lockMounts is held to mount and unmount images.
func (e *Engine) lockMounts(ctx context.Context) (*disk.Lock, error) {
	dir := filepath.Join(e.cfg.State, "mounts")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return disk.AcquireContext(ctx, filepath.Join(dir, "lock"))
}

// mountedIDs lists the images that are mounted.
func (e *Engine) mountedIDs() ([]ocispec.Digest, error) {
	entries, err := os.ReadDir(filepath.Join(e.cfg.State, "mounts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []ocispec.Digest
	for _, d := range entries {
		id := ocispec.Digest("sha256:" + d.Name())
		if !d.IsDir() || ocispec.Validate(id) != nil {
			continue
		}
		mounted, err := mount.IsRoot(e.mountPath(id))
		if err != nil {
			return nil, err
		}
		if mounted {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// markMounts marks the images that are mounted. One may have lost its record, if its removal and the mount came together.
func (e *Engine) markMounts(mark func(...ocispec.Digest)) error {
	ids, err := e.mountedIDs()
	if err != nil {
		return err
	}
	for _, id := range ids {
		mark(id)
		if c, err := e.baseConfig(id); err == nil { // a damaged image: nothing else can say what it is made of
			mark(c.RootFS.DiffIDs...)
		}
	}
	return nil
}

// mountedConflict is the error for the removal of an image that is mounted, nil for one that isn't.
func (e *Engine) mountedConflict(id ocispec.Digest) error {
	at := e.mountPath(id)
	mounted, err := mount.IsRoot(at)
	if err != nil || !mounted {
		return err
	}
	return imageConflict(id, false, "image is mounted at "+at+": unmount it first (image unmount "+shortDigest(id)+")")
}
