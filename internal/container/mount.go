package container

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"

	"conex/internal/ocispec"
)

// Mount is what a record knows of a mount beside Docker's MountPoint.
type Mount struct {
	// Options are a tmpfs's.
	Options string `json:"options,omitempty"`
	// Flag says that it comes from --tmpfs, which Docker's list of mounts leaves out.
	Flag bool `json:"flag,omitempty"`
	// NonRecursive leaves the mounts below a bind's source out; WritableBelow leaves them writable in a read-only one.
	NonRecursive  bool `json:"nonRecursive,omitempty"`
	WritableBelow bool `json:"writableBelow,omitempty"`
	// MustExist is a bind whose source is never made.
	MustExist bool `json:"mustExist,omitempty"`
	// Subpath is a path in the volume or image, which is mounted instead of the whole.
	Subpath string `json:"subpath,omitempty"`
	// Layers are an image's, base first; Image is its id.
	Image  ocispec.Digest   `json:"image,omitempty"`
	Layers []ocispec.Digest `json:"layers,omitempty"`
	// Owner is whom files of the container's user belong to in a bind's source; nil: themselves.
	Owner *Owner `json:"owner,omitempty"`
	// Overlay is OverlayDiscard or OverlayKeep: what is mounted is a copy on write of the source.
	Overlay string `json:"overlay,omitempty"`
}

// OverlayDir is where the changes of the overlay mount at dst lie: upper and work.
func (s *Store) OverlayDir(id, dst string) string {
	sum := sha256.Sum256([]byte(dst))
	return s.Dir(id, "overlay", hex.EncodeToString(sum[:8]))
}

// Owner is a user and a group of the host, or with Source whoever owns the source.
type Owner struct {
	Source bool   `json:"source,omitempty"`
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
}

// IDs is a range of the host's ids which are a container's own, from its root on.
type IDs struct {
	First uint32 `json:"first"`
	Size  uint32 `json:"size"`
}

// Digests are the images and layers that a container needs: its own and those that are mounted into it.
func (r *Record) Digests() (images, layers []ocispec.Digest) {
	images, layers = []ocispec.Digest{r.ImageID}, r.Layers
	for _, m := range r.More {
		if m.Image != "" {
			images = append(images, m.Image)
			layers = append(layers[:len(layers):len(layers)], m.Layers...)
		}
	}
	return images, layers
}

// UsesImage reports whether a container is made of an image, or has it mounted.
func (r *Record) UsesImage(id ocispec.Digest) bool {
	if r.ImageID == id {
		return true
	}
	for _, m := range r.More {
		if m.Image == id {
			return true
		}
	}
	return false
}

// VolumesInUse reports which of these volumes some container has. What can't be read uses everything.
func (s *Store) VolumesInUse(names []string) (map[string]bool, error) {
	used := map[string]bool{}
	if len(names) == 0 {
		return used, nil
	}
	ids, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		r, err := s.Load(id)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			for _, n := range names {
				used[n] = true
			}
			return used, nil //nolint:nilerr // it may have any of them
		}
		for _, m := range r.Mounts {
			used[m.Name] = used[m.Name] || m.Name != ""
		}
		for _, n := range r.Anonymous {
			used[n] = true
		}
	}
	return used, nil
}
