package image

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// TagIndex points ref to images of several platforms at once: those of index that are here. Without index (""), with one id, it is
// Tag. Images of the same index that the tag led to already stay; those of another index leave it. What the tag means where no
// platform is asked for is this machine's image if there is one, else the first of ids.
func (s *Store) TagIndex(ref Reference, index ocispec.Digest, ids ...ocispec.Digest) error {
	if len(ids) == 0 {
		return fmt.Errorf("tag %s: no image", ref.Familiar())
	}
	if index == "" && len(ids) == 1 {
		return s.Tag(ids[0], ref)
	}
	if ref.IsZero() || ref.Digest() != "" {
		return fmt.Errorf("refusing to create a tag with a digest reference: %s", ref.Familiar())
	}
	path := s.tagPath(ref)
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.Release()
	var old tagRecord
	all := slices.Clone(ids)
	if err := disk.ReadJSON(path, &old); err == nil && index != "" && old.Index == index {
		all = append(all, old.variants()...)
	}
	var here []ocispec.Digest
	for _, id := range all {
		idp, err := s.idPath(id)
		if err != nil {
			return err
		}
		if _, err := os.Lstat(idp); err == nil && !slices.Contains(here, id) {
			here = append(here, id)
		} else if err != nil && slices.Contains(ids, id) {
			return &NotFoundError{string(id)}
		}
	}
	rec := tagRecord{Reference: ref.String(), ID: s.prefer(here), Index: index, Tagged: time.Now().UTC()}
	for _, id := range here {
		if id != rec.ID {
			rec.Others = append(rec.Others, id)
		}
	}
	slices.Sort(rec.Others)
	if old.Reference == rec.Reference && old.ID == rec.ID && old.Index == index && slices.Equal(old.Others, rec.Others) {
		return nil
	}
	return disk.WriteJSON(path, rec, disk.Durable)
}

// prefer returns the id whose image fits this machine best, the first if none does.
func (s *Store) prefer(ids []ocispec.Digest) ocispec.Digest {
	if len(ids) == 1 {
		return ids[0]
	}
	if id, ok := s.fitting(ids, registry.HostPlatform()); ok {
		return id
	}
	return ids[0]
}

// fitting returns the id whose image fits a platform best.
func (s *Store) fitting(ids []ocispec.Digest, want ocispec.Platform) (best ocispec.Digest, ok bool) {
	bestFit := -1
	for _, id := range ids {
		raw, err := s.blobs.ReadAll(id, MaxConfig)
		if err != nil {
			continue // a damaged image fits nothing
		}
		c, err := ParseConfig(raw)
		if err != nil {
			continue
		}
		if fit := registry.Fits(want, c.Platform); fit >= 0 && (bestFit < 0 || fit < bestFit) {
			best, bestFit = id, fit
		}
	}
	return best, bestFit >= 0
}

// byDigest returns the ids of the images that a reference by digest leads to: several when it is an index's. None is ErrNotFound.
func (s *Store) byDigest(ref Reference) ([]ocispec.Digest, error) {
	want := ref.WithDigest(ref.Digest()).String()
	recs, err := s.ids()
	if err != nil {
		return nil, err
	}
	var ids []ocispec.Digest
	for _, rec := range recs {
		if slices.Contains(rec.RepoDigests, want) {
			ids = append(ids, rec.ID)
		}
	}
	if len(ids) == 0 {
		return nil, &NotFoundError{ref.Familiar()}
	}
	return ids, nil
}

// variantsOf returns the ids that a name or id leads to, the preferred one first, and the index behind it, "" for none or unknown.
func (s *Store) variantsOf(nameOrID string) ([]ocispec.Digest, ocispec.Digest, error) {
	if ref, err := ParseReference(nameOrID); err == nil {
		if ref.Digest() != "" {
			ids, err := s.byDigest(ref)
			if err != nil {
				return nil, "", err
			}
			first := s.prefer(ids)
			ids = append([]ocispec.Digest{first}, slices.DeleteFunc(ids, func(id ocispec.Digest) bool { return id == first })...)
			index := ocispec.Digest("")
			if rec, err := s.record(first); err == nil && rec.Manifest != ref.Digest() {
				index = ref.Digest()
			}
			return ids, index, nil
		}
		var t tagRecord
		if err := disk.ReadJSON(s.tagPath(ref), &t); err == nil {
			return t.variants(), t.Index, nil
		}
	}
	id, err := s.resolveID(nameOrID)
	if err != nil {
		return nil, "", err
	}
	return []ocispec.Digest{id}, "", nil
}

// Variants returns the images of all platforms that nameOrID leads to (see Resolve), the preferred one first, and the digest of the
// index behind them, "" for none. With ErrDamaged the images have their ids and names.
func (s *Store) Variants(nameOrID string) ([]Image, ocispec.Digest, error) {
	ids, index, err := s.variantsOf(nameOrID)
	if err != nil {
		return nil, "", err
	}
	var imgs []Image
	var errs []error
	for _, id := range ids {
		img, err := s.Get(id)
		if errors.Is(err, ErrNotFound) && len(ids) > 1 {
			continue // deleted meanwhile
		}
		imgs, errs = append(imgs, img), append(errs, named(err, nameOrID))
	}
	return imgs, index, errors.Join(errs...)
}

// ResolvePlatform is Resolve for one platform: of the images that nameOrID leads to, the one that fits best. None that fits is
// ErrNotFound.
func (s *Store) ResolvePlatform(nameOrID string, want ocispec.Platform) (Image, error) {
	ids, _, err := s.variantsOf(nameOrID)
	if err != nil {
		return Image{}, err
	}
	id, ok := s.fitting(ids, want)
	if !ok {
		name := nameOrID
		if ref, err := ParseReference(nameOrID); err == nil {
			name = ref.Familiar()
		}
		return Image{}, &NotFoundError{name + " for platform " + registry.FormatPlatform(want)}
	}
	img, err := s.Get(id)
	return img, named(err, nameOrID)
}

// dropVariant takes id out of a tag. The caller holds the store's lock.
func (s *Store) dropVariant(t tagRecord, id ocispec.Digest) error {
	ref, err := ParseReference(t.Reference)
	if err != nil {
		return err
	}
	rest := slices.DeleteFunc(t.variants(), func(o ocispec.Digest) bool { return o == id })
	if len(rest) == 0 {
		return s.root.Trash(s.tagPath(ref))
	}
	t.ID = s.prefer(rest)
	t.Others = slices.DeleteFunc(rest, func(o ocispec.Digest) bool { return o == t.ID })
	return disk.WriteJSON(s.tagPath(ref), t, disk.Durable)
}

// Indexes returns the digests of the indexes that tags lead to or that images were pulled by, for package collect: blobs to keep.
func (s *Store) Indexes() ([]ocispec.Digest, error) {
	tags, err := s.tags()
	if err != nil {
		return nil, err
	}
	var ds []ocispec.Digest
	for _, recs := range tags {
		for _, t := range recs {
			if t.Index != "" {
				ds = append(ds, t.Index)
			}
		}
	}
	recs, err := s.ids()
	if err != nil {
		return nil, err
	}
	for _, rec := range recs {
		for _, d := range rec.RepoDigests {
			if ref, err := ParseReference(d); err == nil {
				ds = append(ds, ref.Digest()) // of the manifest or of the index above it
			}
		}
	}
	slices.Sort(ds)
	return slices.Compact(ds), nil
}
