package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/image"
	"conex/internal/linux/mount"
	"conex/internal/ocispec"

	mevents "github.com/moby/moby/api/types/events"
	apii "github.com/moby/moby/api/types/image"
)

// RemoveImageRequest are the flags of `rmi`.
type RemoveImageRequest struct {
	// Force removes what several repositories refer to or a stopped container uses; never what a running one uses.
	Force bool
	// NoPrune keeps untagged parents; conex has none.
	NoPrune bool
}

// ImageConflictError says why an image can't be removed, in Docker's words. errors.Is makes it image.ErrInUse and ErrConflict.
type ImageConflictError struct {
	// Message is the whole text.
	Message string
	// Forced is true when Force would help.
	Forced bool
}

func (e *ImageConflictError) Error() string { return e.Message }

// Is makes errors.Is(err, image.ErrInUse) and errors.Is(err, ErrConflict) true.
func (e *ImageConflictError) Is(target error) bool {
	return target == image.ErrInUse || target == ErrConflict
}

func imageConflict(id ocispec.Digest, forceHelps bool, why string) error {
	how := "cannot be forced"
	if forceHelps {
		how = "must be forced"
	}
	return &ImageConflictError{fmt.Sprintf("conflict: unable to delete %s (%s) - %s", shortDigest(id), how, why), forceHelps}
}

// RemoveImage removes a reference and, when it was the image's last, the image with the layers that nothing else uses; named by its
// id, the image with all its references. What it did is told in order, as Docker tells it: Untagged, then Deleted.
func (e *Engine) RemoveImage(ctx context.Context, name string, req RemoveImageRequest) ([]apii.DeleteResponse, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	img, err := images.Resolve(name)
	if err != nil && !errors.Is(err, image.ErrDamaged) { // a damaged image can go too
		return nil, classify(err)
	}
	users, err := e.containersOf(ctx, img.ID)
	if err != nil {
		return nil, err
	}
	r := &imageRemoval{e: e, images: images, img: img, users: users, force: req.Force}
	byID := isIDPrefix(img.ID, name) && !r.isName(name)
	if byID || singleReference(img) {
		if err := e.mountedConflict(img.ID); err != nil {
			return nil, err
		}
	}
	if byID {
		err = r.byID()
	} else {
		err = r.byName(ctx, name)
	}
	if len(r.gone) > 0 {
		// What follows is cleaning up, which a Ctrl-C shall not leave half done.
		res, serr := e.sweep(context.WithoutCancel(ctx))
		e.afterWrite(ctx, r.unheld(res))
		r.swept(res)
		err = errors.Join(err, serr)
	}
	return r.done, classify(err)
}

// imageUser is a container that is made of an image.
type imageUser struct {
	id      string
	running bool
}

// containersOf lists the containers of an image, having settled those whose monitor died: they don't run.
func (e *Engine) containersOf(ctx context.Context, id ocispec.Digest) ([]imageUser, error) {
	cs := e.Containers()
	ids, err := cs.List()
	if err != nil {
		return nil, err
	}
	var users []imageUser
	for _, cid := range ids {
		rec, err := cs.Load(cid)
		if errors.Is(err, container.ErrNotFound) || err == nil && !rec.UsesImage(id) {
			continue
		}
		if err != nil {
			return nil, err
		}
		snap, err := e.snapshot(ctx, cid)
		if errors.Is(err, container.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		users = append(users, imageUser{cid, snap.Alive() != nil})
	}
	return users, nil
}

// isIDPrefix reports whether name is the beginning of id, with or without "sha256:".
func isIDPrefix(id ocispec.Digest, name string) bool {
	return strings.HasPrefix(string(id), name) || strings.HasPrefix(id.Encoded(), name)
}

// imageRemoval is one `rmi` at work.
type imageRemoval struct {
	e      *Engine
	images *image.Store
	img    image.Image
	users  []imageUser
	force  bool
	done   []apii.DeleteResponse
	// gone are the images that were removed, each with its place in done, behind which its layers belong.
	gone []goneImage
}

type goneImage struct {
	layers []ocispec.Digest
	at     int
}

// isName reports whether name is a reference to the image, for names that read like ids.
func (r *imageRemoval) isName(name string) bool {
	ref, err := image.ParseReference(name)
	if err != nil {
		return false
	}
	_, err = r.images.IDOf(ref)
	return err == nil
}

// byName removes the reference name, and the image if that was the last.
func (r *imageRemoval) byName(ctx context.Context, name string) error {
	ref, err := image.ParseReference(name)
	if err != nil {
		return err
	}
	if !r.force && singleReference(r.img) && len(r.users) > 0 {
		return &ImageConflictError{fmt.Sprintf("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
			name, r.users[0].id[:12], shortDigest(r.img.ID)), true}
	}
	variants, _, err := r.images.Variants(name)
	if err != nil && !errors.Is(err, image.ErrDamaged) {
		return err
	}
	if err := r.untag(ref); err != nil {
		return err
	}
	for _, v := range variants {
		if ref.Digest() == "" {
			// The last tag of a repository takes its digests along.
			if err := r.untagDigests(v.ID, ref.Name()); err != nil {
				return err
			}
		}
		img, err := r.images.Get(v.ID)
		if errors.Is(err, image.ErrNotFound) {
			continue
		}
		if err != nil && !errors.Is(err, image.ErrDamaged) {
			return err
		}
		if len(img.RepoTags)+len(img.RepoDigests) > 0 {
			continue // named otherwise
		}
		if users, err := r.e.containersOf(ctx, v.ID); err != nil || len(users) > 0 {
			if err != nil {
				return err
			}
			continue // kept for its containers without a name
		}
		if mounted, err := mount.IsRoot(r.e.mountPath(v.ID)); err != nil || mounted {
			if err != nil {
				return err
			}
			continue
		}
		if err := r.remove(v.ID); err != nil {
			return err
		}
	}
	return nil
}

// untagDigests removes an image's digests in a repository that has no tag of it any more.
func (r *imageRemoval) untagDigests(id ocispec.Digest, repo string) error {
	img, err := r.images.Get(id)
	if errors.Is(err, image.ErrNotFound) {
		return nil
	}
	if err != nil && !errors.Is(err, image.ErrDamaged) {
		return err
	}
	inRepo := func(list []string) (refs []image.Reference, err error) {
		for _, s := range list {
			ref, err := image.ParseReference(s)
			if err != nil {
				return nil, err
			}
			if ref.Name() == repo {
				refs = append(refs, ref)
			}
		}
		return refs, nil
	}
	tags, err := inRepo(img.RepoTags)
	if err != nil || len(tags) > 0 {
		return err
	}
	digests, err := inRepo(img.RepoDigests)
	if err != nil {
		return err
	}
	for _, d := range digests {
		if err := r.untag(d); err != nil {
			return err
		}
	}
	return nil
}

// byID removes the image with all its references.
func (r *imageRemoval) byID() error {
	for _, u := range r.users {
		if u.running {
			return imageConflict(r.img.ID, false, "image is being used by running container "+u.id[:12])
		}
	}
	if !r.force {
		if !singleReference(r.img) {
			return imageConflict(r.img.ID, true, "image is referenced in multiple repositories")
		}
		if len(r.users) > 0 {
			return imageConflict(r.img.ID, true, "image is being used by stopped container "+r.users[0].id[:12])
		}
	}
	return r.remove(r.img.ID)
}

// untag removes one reference and says so.
func (r *imageRemoval) untag(ref image.Reference) error {
	if ref.Digest() != "" {
		ref = ref.WithDigest(ref.Digest())
	}
	if _, err := r.images.Untag(ref); err != nil {
		return err
	}
	r.done = append(r.done, apii.DeleteResponse{Untagged: ref.Familiar()})
	r.e.imageEvent(mevents.ActionUnTag, string(r.img.ID), string(r.img.ID), r.img.Config.Config.Labels)
	return nil
}

// remove removes an image with the references that are left. Its layers go with the next sweep.
func (r *imageRemoval) remove(id ocispec.Digest) error {
	img, err := r.images.Get(id)
	if err != nil && !errors.Is(err, image.ErrDamaged) {
		return err
	}
	if err := r.images.Delete(img.ID); err != nil {
		return err
	}
	for _, s := range slices.Concat(img.RepoTags, img.RepoDigests) {
		r.done = append(r.done, apii.DeleteResponse{Untagged: s})
		r.e.imageEvent(mevents.ActionUnTag, string(img.ID), string(img.ID), img.Config.Config.Labels)
	}
	r.e.imageEvent(mevents.ActionDelete, string(img.ID), string(img.ID), img.Config.Config.Labels)
	r.done = append(r.done, apii.DeleteResponse{Deleted: string(img.ID)})
	r.gone = append(r.gone, goneImage{img.Layers(), len(r.done)})
	return nil
}

// unheld adds up the layers of the images that are gone which a sweep left: the build cache has them alone, as far as anybody knows.
func (r *imageRemoval) unheld(res collect.Result) int64 {
	ls, err := r.e.Layers()
	if err != nil {
		return 0
	}
	var left []ocispec.Digest
	for _, g := range r.gone {
		for _, d := range g.layers {
			if !slices.Contains(res.Layers, d) {
				left = append(left, d)
			}
		}
	}
	return r.e.layersSize(ls, left)
}

// swept tells of the layers that a sweep removed, topmost first, each behind the last image that had it.
func (r *imageRemoval) swept(res collect.Result) {
	left := map[ocispec.Digest]bool{}
	for _, d := range res.Layers {
		left[d] = true
	}
	for _, g := range slices.Backward(r.gone) {
		var rows []apii.DeleteResponse
		for _, d := range slices.Backward(g.layers) {
			if left[d] {
				delete(left, d)
				rows = append(rows, apii.DeleteResponse{Deleted: string(d)})
			}
		}
		r.done = slices.Insert(r.done, g.at, rows...)
	}
}

// singleReference reports whether all of an image's references are one tag and the digests of its repository, so that removing the image
// surprises nobody.
func singleReference(img image.Image) bool {
	if len(img.RepoTags) > 1 {
		return false
	}
	repos := map[string]bool{}
	for _, s := range slices.Concat(img.RepoTags, img.RepoDigests) {
		if ref, err := image.ParseReference(s); err == nil {
			repos[ref.Name()] = true
		}
	}
	return len(repos) <= 1
}
