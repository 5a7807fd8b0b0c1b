package layers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Blob is a compressed form of a layer's tar: what registries and archives have of it. Many forms of one layer may exist, since
// two compressors seldom give the same bytes.
type Blob struct {
	// Digest names the compressed bytes, Size is their number.
	Digest ocispec.Digest `json:"digest"`
	Size   int64          `json:"size"`
	// MediaType is what the manifest that brought it said, in OCI's or Docker's words.
	MediaType string `json:"mediaType"`
	// Recipe says how conex's own compressor made it and can make it again; "" for what somebody else made.
	Recipe string `json:"recipe,omitempty"`
	// Sources are the repositories that are known to hold it, "docker.io/library/nginx", the latest one first.
	Sources []string `json:"sources,omitempty"`
}

// Bounds of blobs.json: what is more than that, the oldest first, is forgotten, which costs a compression or an upload at worst.
const (
	maxBlobs   = 16
	maxSources = 16
)

// Blobs lists the compressed forms of a layer that are known, the latest first; none is no error. Whether the blob store has
// their bytes is another question.
func (s *Store) Blobs(id ocispec.Digest) ([]Blob, error) {
	if err := ocispec.Validate(id); err != nil {
		return nil, fmt.Errorf("layer %q: %w", id, err)
	}
	var list []Blob
	err := disk.ReadJSON(s.blobsPath(id), &list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("blobs of layer %s: %w", id, err)
	}
	return list, nil
}

func (s *Store) blobsPath(id ocispec.Digest) string { return filepath.Join(s.dir(id), "blobs.json") }

// AddBlob notes a compressed form of a layer, or further sources of one that is known. It is volatile: after a power loss the
// note may be missing. A layer that does not exist is ErrNotFound.
func (s *Store) AddBlob(id ocispec.Digest, b Blob) error {
	if err := errors.Join(ocispec.Validate(id), ocispec.Validate(b.Digest)); err != nil {
		return fmt.Errorf("layer %q, blob %q: %w", id, b.Digest, err)
	}
	if list, err := s.Blobs(id); err == nil && len(list) > 0 && list[0].covers(b) {
		return nil // nothing new: the usual case of a second pull
	}
	// The lock lies outside of the layer, so that nothing is written into one that Remove is taking away.
	l, err := disk.Acquire(filepath.Join(s.state, id.Encoded()+".lock"))
	if err != nil {
		return err
	}
	defer l.Release()
	if _, err := os.Lstat(s.dir(id)); errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("layer %s: %w", id, ErrNotFound), os.Remove(l.File().Name()))
	}
	list, err := s.Blobs(id)
	var syntax *json.SyntaxError
	if err != nil && !errors.As(err, &syntax) {
		return err // one that a power loss cut short is written anew
	}
	if k := slices.IndexFunc(list, func(o Blob) bool { return o.Digest == b.Digest }); k >= 0 {
		for _, src := range list[k].Sources {
			if !slices.Contains(b.Sources, src) {
				b.Sources = append(slices.Clone(b.Sources), src)
			}
		}
		if b.Recipe == "" {
			b.Recipe = list[k].Recipe
		}
		list = slices.Delete(list, k, k+1)
	}
	b.Sources = b.Sources[:min(len(b.Sources), maxSources)]
	list = append([]Blob{b}, list...)
	return disk.WriteJSON(s.blobsPath(id), list[:min(len(list), maxBlobs)], disk.Volatile)
}

// covers reports whether a note of b would add nothing.
func (o Blob) covers(b Blob) bool {
	if o.Digest != b.Digest || o.Size != b.Size || o.MediaType != b.MediaType {
		return false
	}
	for _, s := range b.Sources {
		if !slices.Contains(o.Sources, s) {
			return false
		}
	}
	return true
}
