package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"
	"conex/internal/safepath"
	"conex/internal/undo"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
)

// CommitRequest asks to make an image of a container.
type CommitRequest struct {
	Container string
	// Reference is the tag for the image; "" leaves it untagged.
	Reference string
	// Author and Message go into the image's history.
	Author, Message string
	// Changes are Dockerfile instructions for the image's config, as in ImportRequest.
	Changes []string
	// NoPause leaves the container's processes running meanwhile: files may be in the image that no moment had together.
	NoPause bool
	// Version is what the image says that it was made by.
	Version string
	// Torn is told of files that were cut off while they were read; only with NoPause. May be nil.
	Torn func(path string)
}

// Commit makes an image of what a container's image and its changes since are, and returns its id. What is mounted is not in it. Unless
// NoPause, a running container stands still while its changes are read, and goes on whatever happens to this process.
func (e *Engine) Commit(ctx context.Context, req CommitRequest) (id string, err error) {
	var ref image.Reference
	if req.Reference != "" {
		if ref, err = image.ParseReference(req.Reference); err != nil {
			return "", classify(err)
		}
		if ref.Digest() != "" {
			return "", invalid("refusing to create a tag with a digest reference")
		}
	}
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return "", err
	}
	rec := n.Record
	conf := imageConfigOf(rec.Config)
	if err := dockerfile.ApplyChanges(&conf, req.Changes); err != nil {
		return "", &kindError{ErrInvalid, err}
	}
	if err := e.root.Sweep(); err != nil { // as in Pull
		return "", err
	}
	lease, err := collect.NewLease(e.root)
	if err != nil {
		return "", err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	base, err := e.baseConfig(rec.ImageID)
	if err != nil {
		return "", err
	}
	layer, err := e.commitLayer(ctx, n, req)
	if err != nil {
		return "", fmt.Errorf("commit %s: %w", rec.Name, err)
	}
	raw, err := committed(base, conf, rec, req, layer)
	if err != nil {
		return "", err
	}
	images, err := e.Images()
	if err != nil {
		return "", err
	}
	var refs []image.Reference
	if !ref.IsZero() {
		refs = append(refs, ref)
	}
	img, err := images.AddTagged(ctx, raw, "", "", "", refs...)
	if err != nil {
		return "", err
	}
	attrs := map[string]string{"imageID": string(img.ID), "comment": req.Message}
	if !ref.IsZero() {
		attrs["imageRef"] = ref.Familiar()
	}
	e.event(rec, "commit", attrs)
	return string(img.ID), nil
}

// committed is the new image's config. Without a layer only its history and settings are new.
func committed(base ocispec.Image, conf ocispec.ImageConfig, rec *container.Record, req CommitRequest, layer ocispec.Digest) ([]byte, error) {
	now := time.Now().UTC()
	c := struct {
		ocispec.Image
		Container     string `json:"container,omitempty"`
		DockerVersion string `json:"docker_version,omitempty"`
	}{base, rec.ID, req.Version}
	c.Created, c.Author, c.Config = &now, req.Author, conf
	c.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: append([]ocispec.Digest{}, rec.Layers...)}
	if layer != "" {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, layer)
	}
	c.History = append(append([]ocispec.History{}, base.History...), ocispec.History{
		Created: &now, Author: req.Author, Comment: req.Message, CreatedBy: strings.Join(rec.Config.Cmd, " "), EmptyLayer: layer == "",
	})
	raw, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("commit %s: encode config: %w", rec.Name, err)
	}
	return raw, nil
}

// baseConfig reads the config of the image that a container was made of. It is there even when the image was removed by force.
func (e *Engine) baseConfig(id ocispec.Digest) (ocispec.Image, error) {
	raw, err := e.Blobs().ReadAll(id, image.MaxConfig)
	if err != nil {
		return ocispec.Image{}, fmt.Errorf("config of image %s: %w", id, err)
	}
	return image.ParseConfig(raw)
}

// commitLayer makes a layer of a container's changes; "" when there are none.
func (e *Engine) commitLayer(ctx context.Context, n *container.Snapshot, req CommitRequest) (_ ocispec.Digest, err error) {
	rec := n.Record
	ls, err := e.Layers()
	if err != nil {
		return "", err
	}
	if !req.NoPause {
		release, err := e.still(ctx, n)
		if err != nil {
			return "", err
		}
		defer func() {
			if rerr := release(); err == nil {
				err = rerr
			}
		}()
	}
	upper := e.Containers().Dir(rec.ID, "upper")
	exclude, err := e.mountPoints(ctx, rec, upper)
	if err != nil {
		return "", err
	}
	w, err := ls.NewWriter(ctx)
	if err != nil {
		return "", err
	}
	defer w.Close() // without effect after Commit
	if req.NoPause {
		err = w.AddLiveUpper(upper, exclude, func(path string) {
			if req.Torn != nil {
				req.Torn(path)
			}
		})
	} else {
		err = w.AddUpper(upper, exclude)
	}
	if err != nil {
		return "", err
	}
	if _, err := e.Containers().Load(rec.ID); err != nil {
		return "", classify(err) // removed meanwhile: what was written may be half of it
	}
	if w.Entries() == 0 {
		return "", nil
	}
	info, err := w.Commit()
	if err != nil {
		return "", err
	}
	return info.DiffID, ls.Sync(info.DiffID)
}

// still keeps a container's files as they are until release: a running one is frozen, another one can't be started or removed. The
// error of release says that it was stopped or killed meanwhile.
func (e *Engine) still(ctx context.Context, n *container.Snapshot) (release func() error, err error) {
	id := n.Record.ID
	for {
		if a := n.Alive(); a != nil {
			if a.Status == container.Restarting {
				return nil, conflict("container %s is restarting, wait until the container is running", id)
			}
			f, err := e.client(id).Freeze(ctx)
			if err == nil {
				return f.Thaw, nil
			}
			var ce *control.Error
			if !errors.Is(err, control.ErrGone) && (!errors.As(err, &ce) || ce.Status != http.StatusConflict) {
				// Also what a monitor says that an older conex started, which does not know how.
				return nil, fmt.Errorf("pause: %w (--pause=false commits it as it runs)", err)
			}
			// It has ended since we looked.
		}
		var lock undo.Stack
		if err = e.lockStill(ctx, id, &lock); err == nil {
			return func() error { lock.Run(); return nil }, nil
		}
		if !errors.Is(err, container.ErrBusy) {
			return nil, err
		}
		if n, err = e.snapshot(ctx, id); err != nil {
			return nil, err
		}
	}
}

// mountPoints finds what is in a container's writable layer only because the monitor mounts something there: what Docker keeps in a
// layer of its own, below. Mount points of volumes and binds are the container's, as in Docker.
func (e *Engine) mountPoints(ctx context.Context, rec *container.Record, upper string) (exclude func(path string) bool, err error) {
	out := map[string]bool{}
	for _, dir := range []string{"dev", "proc", "sys"} {
		if names, err := os.ReadDir(filepath.Join(upper, dir)); err == nil && len(names) == 0 {
			out[dir] = true
		}
	}
	for _, file := range []string{"etc/hosts", "etc/hostname", "etc/resolv.conf"} {
		if st, err := os.Lstat(filepath.Join(upper, file)); err == nil && st.Mode().IsRegular() && st.Size() == 0 {
			out[file] = true
		}
	}
	names, err := os.ReadDir(filepath.Join(upper, "etc"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return nil, err
	}
	rest := 0
	for _, n := range names {
		if !out["etc/"+n.Name()] {
			rest++
		}
	}
	if err == nil && rest == 0 && len(names) > 0 {
		// The folder is there for its mount points alone, unless somebody changed its attributes.
		if out["etc"], err = e.sameFolder(ctx, rec, upper, "etc"); err != nil {
			return nil, err
		}
	}
	return func(path string) bool { return out[path] }, nil
}

// sameFolder reports whether a folder of the writable layer has the owner and mode that it has in the image, or is not in the image.
func (e *Engine) sameFolder(ctx context.Context, rec *container.Record, upper, path string) (bool, error) {
	var now unix.Stat_t
	if err := unix.Lstat(filepath.Join(upper, path), &now); err != nil {
		return false, err
	}
	ls, err := e.Layers()
	if err != nil {
		return false, err
	}
	lower, err := ls.Lower(ctx, rec.Layers)
	if err != nil || len(lower) == 0 {
		return err == nil, err
	}
	tree, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
	if err != nil {
		return false, err
	}
	defer tree.Close()
	f, err := safepath.OpenNoLinks(tree, path, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	var was unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &was); err != nil {
		return false, err
	}
	return was.Mode == now.Mode && was.Uid == now.Uid && was.Gid == now.Gid, nil
}

// imageConfigOf is the part of a container's config that an image has.
func imageConfigOf(c *apic.Config) ocispec.ImageConfig {
	var out ocispec.ImageConfig
	out.User, out.Env, out.Entrypoint, out.Cmd, out.Volumes = c.User, c.Env, c.Entrypoint, c.Cmd, c.Volumes
	out.WorkingDir, out.Labels, out.StopSignal, out.Healthcheck, out.Shell, out.OnBuild = c.WorkingDir, c.Labels, c.StopSignal, c.Healthcheck, c.Shell, c.OnBuild
	for p := range c.ExposedPorts {
		if out.ExposedPorts == nil {
			out.ExposedPorts = map[string]struct{}{}
		}
		out.ExposedPorts[p.String()] = struct{}{}
	}
	return out
}
