package image

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// tags returns all tag records, by image.
func (s *Store) tags() (map[ocispec.Digest][]tagRecord, error) {
	entries, err := os.ReadDir(s.root.Path("images"))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	m := make(map[ocispec.Digest][]tagRecord, len(entries))
	for _, e := range entries {
		if disk.IsTemp(e.Name()) || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		var rec tagRecord
		if err := disk.ReadJSON(s.root.Path("images", e.Name()), &rec); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue // untagged since ReadDir
			}
			return nil, tornTag(err)
		}
		for _, id := range rec.variants() {
			m[id] = append(m[id], rec)
		}
	}
	return m, nil
}

// tornTag says what to do about a tag's file that can't be read: only a hand can have made it so.
func tornTag(err error) error {
	return fmt.Errorf("the file of a tag is damaged: remove it, then tag, pull or build again: %w", err)
}

// idNames returns the hexadecimal ids of all images.
func (s *Store) idNames() ([]string, error) {
	entries, err := os.ReadDir(s.root.Path("images", "by-id"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var names []string
	for _, e := range entries {
		if n, ok := strings.CutSuffix(e.Name(), ".json"); ok && isHex64(n) {
			names = append(names, n)
		}
	}
	return names, nil
}

// ids returns all image records.
func (s *Store) ids() ([]idRecord, error) {
	names, err := s.idNames()
	if err != nil {
		return nil, err
	}
	recs := make([]idRecord, 0, len(names))
	for _, n := range names {
		rec, err := s.record(ocispec.Digest("sha256:" + n))
		if errors.Is(err, ErrNotFound) {
			continue // deleted since ReadDir
		}
		if err != nil {
			return nil, err
		}
		recs = append(recs, rec)
	}
	return recs, nil
}

func (s *Store) record(id ocispec.Digest) (idRecord, error) {
	var rec idRecord
	path, err := s.idPath(id)
	if err != nil {
		return rec, err
	}
	if err := disk.ReadJSON(path, &rec); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return rec, &NotFoundError{string(id)}
		}
		return rec, err
	}
	return rec, nil
}

// Exists returns nil when there is an image, ErrNotFound when there is none.
func (s *Store) Exists(id ocispec.Digest) error {
	path, err := s.idPath(id)
	if err == nil {
		_, err = os.Lstat(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &NotFoundError{string(id)}
	}
	return err
}

// load makes the Image of a record. With ErrDamaged it returns all of it but what the config says.
func (s *Store) load(rec idRecord, tags map[ocispec.Digest][]tagRecord) (Image, error) {
	img := Image{ID: rec.ID, Manifest: rec.Manifest}
	for _, t := range tags[rec.ID] {
		ref, err := ParseReference(t.Reference)
		if err != nil {
			return Image{}, fmt.Errorf("image %s: tag %q: %w", rec.ID, t.Reference, err)
		}
		img.RepoTags = append(img.RepoTags, ref.Familiar())
		if t.Tagged.After(img.LastTagged) {
			img.LastTagged = t.Tagged
		}
	}
	for _, d := range rec.RepoDigests {
		ref, err := ParseReference(d)
		if err != nil {
			return Image{}, fmt.Errorf("image %s: %q: %w", rec.ID, d, err)
		}
		img.RepoDigests = append(img.RepoDigests, ref.Familiar())
	}
	slices.Sort(img.RepoTags)
	slices.Sort(img.RepoDigests)
	raw, err := s.blobs.ReadAll(rec.ID, MaxConfig)
	if err == nil {
		img.Config, err = ParseConfig(raw)
	}
	if err != nil {
		return img, fmt.Errorf("%w: pull or build it again, or remove it: %s: %w", ErrDamaged, rec.ID, err)
	}
	img.RawConfig = raw
	if img.Config.Created != nil {
		img.Created = *img.Config.Created
	}
	return img, nil
}

// Get returns the image with that id, or ErrNotFound.
func (s *Store) Get(id ocispec.Digest) (Image, error) {
	rec, err := s.record(id)
	if err != nil {
		return Image{}, err
	}
	tags, err := s.tags()
	if err != nil {
		return Image{}, err
	}
	return s.load(rec, tags)
}

// Lookup returns the image that ref points to, or ErrNotFound. With a digest in ref the tag does not matter, as in Docker.
func (s *Store) Lookup(ref Reference) (Image, error) {
	id, err := s.IDOf(ref)
	if err != nil {
		return Image{}, err
	}
	img, err := s.Get(id)
	if errors.Is(err, ErrNotFound) {
		return Image{}, &NotFoundError{ref.Familiar()}
	}
	return img, err
}

// IDOf returns the id that ref leads to, or ErrNotFound. It does not read the image, so it works for one whose config is damaged.
func (s *Store) IDOf(ref Reference) (ocispec.Digest, error) {
	if ref.Digest() == "" {
		var t tagRecord
		switch err := disk.ReadJSON(s.tagPath(ref), &t); {
		case err == nil:
			return t.ID, nil
		case errors.Is(err, fs.ErrNotExist):
			return "", &NotFoundError{ref.Familiar()}
		default:
			return "", tornTag(err)
		}
	}
	ids, err := s.byDigest(ref)
	if err != nil {
		return "", err
	}
	return s.prefer(ids), nil
}

// Resolve returns the image that people mean by nameOrID: a full id (with or without sha256:), a reference by tag or digest, or
// the beginning of an id, in this order, which is Docker's. A beginning that fits several images is ErrAmbiguous; what fits
// nothing is ErrNotFound; what can be neither name nor id is ErrReference. With ErrDamaged the Image has its id and names.
func (s *Store) Resolve(nameOrID string) (Image, error) {
	id, err := s.resolveID(nameOrID)
	if err != nil {
		return Image{}, err
	}
	img, err := s.Get(id)
	return img, named(err, nameOrID)
}

// Find is Resolve for who wants to run an image and not to show it: it leaves RepoTags and LastTagged empty, and so costs the same
// with a thousand tags in the store as with one.
func (s *Store) Find(nameOrID string) (Image, error) {
	id, err := s.resolveID(nameOrID)
	if err != nil {
		return Image{}, err
	}
	rec, err := s.record(id)
	if err != nil {
		return Image{}, named(err, nameOrID)
	}
	return s.load(rec, nil)
}

// named makes an ErrNotFound speak of the name that was asked for: the image was deleted between name and record.
func named(err error, nameOrID string) error {
	if ref, perr := ParseReference(nameOrID); perr == nil && errors.Is(err, ErrNotFound) {
		return &NotFoundError{ref.Familiar()}
	}
	return err
}

func (s *Store) resolveID(nameOrID string) (ocispec.Digest, error) {
	hexa := strings.TrimPrefix(nameOrID, "sha256:")
	if isHex64(hexa) {
		return ocispec.Digest("sha256:" + hexa), nil
	}
	ref, err := ParseReference(nameOrID)
	if err != nil {
		return "", err
	}
	id, err := s.IDOf(ref)
	if !errors.Is(err, ErrNotFound) || !isHex(hexa) {
		return id, err
	}
	names, lerr := s.idNames()
	if lerr != nil {
		return "", lerr
	}
	found := ""
	for _, n := range names {
		if !strings.HasPrefix(n, hexa) {
			continue
		}
		if found != "" {
			return "", fmt.Errorf("%w: %s fits sha256:%s and sha256:%s, among others; give more digits", ErrAmbiguous, nameOrID, found[:12], n[:12])
		}
		found = n
	}
	if found == "" {
		return "", err
	}
	return ocispec.Digest("sha256:" + found), nil
}

// List returns all images, newest first. With ErrDamaged these are all but the damaged ones.
func (s *Store) List() ([]Image, error) {
	// Records before tags: an image tagged in between then shows its tag, and a tag whose image came later is left out.
	recs, err := s.ids()
	if err != nil {
		return nil, err
	}
	tags, err := s.tags()
	if err != nil {
		return nil, err
	}
	images := make([]Image, 0, len(recs))
	var damaged []error
	for _, rec := range recs {
		img, err := s.load(rec, tags)
		if err != nil {
			if _, gone := s.record(rec.ID); errors.Is(gone, ErrNotFound) {
				continue // deleted while we read
			}
			if !errors.Is(err, ErrDamaged) {
				return nil, err
			}
			damaged = append(damaged, err)
			continue
		}
		images = append(images, img)
	}
	slices.SortFunc(images, func(a, b Image) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.ID, b.ID))
	})
	return images, errors.Join(damaged...)
}

// Tagged is one tag.
type Tagged struct {
	Reference Reference
	ID        ocispec.Digest
	// At is when the tag was set to this image.
	At time.Time
}

// References returns all tags, sorted by reference.
func (s *Store) References() ([]Tagged, error) {
	tags, err := s.tags()
	if err != nil {
		return nil, err
	}
	var all []Tagged
	for id, recs := range tags {
		for _, t := range recs {
			if t.ID != id {
				continue // another platform's image of the same tag
			}
			ref, err := ParseReference(t.Reference)
			if err != nil {
				return nil, fmt.Errorf("tag %q: %w", t.Reference, err)
			}
			all = append(all, Tagged{ref, id, t.Tagged})
		}
	}
	slices.SortFunc(all, func(a, b Tagged) int { return cmp.Compare(a.Reference.String(), b.Reference.String()) })
	return all, nil
}

// Size returns the sum of the layers' content in bytes, which is what `images` shows. A layer that several images share counts
// in each. One that is missing (a power loss damaged it; pulling the image again brings it back) counts nothing: an image must be
// listed to be repaired.
func (s *Store) Size(img Image) (int64, error) {
	sizes, err := s.Sizes([]Image{img})
	if err != nil {
		return 0, err
	}
	return sizes[0], nil
}

// Sizes returns the Size of each image, looking at each layer once.
func (s *Store) Sizes(images []Image) ([]int64, error) {
	known := map[ocispec.Digest]int64{}
	sizes := make([]int64, len(images))
	for i, img := range images {
		for _, d := range img.Layers() {
			n, ok := known[d]
			if !ok {
				info, err := s.layers.Stat(d)
				if err != nil && !errors.Is(err, layers.ErrNotFound) {
					return nil, fmt.Errorf("size of image %s: %w", img.ID, err)
				}
				n = info.ContentSize
				known[d] = n
			}
			sizes[i] += n
		}
	}
	return sizes, nil
}
