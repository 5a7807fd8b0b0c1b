// Package image owns images/: which images exist, which references point to them, and what their configs say.
//
// An image is named by the digest of its config, as Docker's classic store does; config and manifest bytes lie in the blob
// store, layers in the layer store. Files, all JSON:
//
//	images/<escaped reference>.json  {"reference","id","index","others","tagged"}: one per tag, "/" written as %2F
//	images/by-id/<hex>.json          {"id","manifest","repoDigests","added"}: one per image; an image without tags has only this
//	images/lock                      flock: every change holds it; readers take no lock
package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/blobs"
	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/plainjson"
)

var (
	// ErrNotFound says that no image has the given name; the error's text is Docker's "No such image: x:latest".
	ErrNotFound = errors.New("no such image")
	// ErrAmbiguous says that a short id fits several images.
	ErrAmbiguous = errors.New("ambiguous image id")
	// ErrDamaged says that an image's config can't be read. Storing the same image again heals it.
	ErrDamaged = errors.New("image is damaged")
	// ErrInUse says that an image can't be deleted because something needs it.
	ErrInUse = errors.New("image is in use")
)

// NotFoundError is ErrNotFound for one name.
type NotFoundError struct {
	// Name is the reference in its familiar form, or the id.
	Name string
}

func (e *NotFoundError) Error() string { return "No such image: " + e.Name }

// Is makes errors.Is(err, ErrNotFound) true.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// MaxConfig bounds an image config, in bytes. Real ones have a few thousand.
const MaxConfig = 4 << 20

// Image is one image as the store holds it. It is a value: later changes of the store don't show in it.
type Image struct {
	// ID is the digest of RawConfig.
	ID ocispec.Digest
	// Config is RawConfig decoded.
	Config ocispec.Image
	// RawConfig is the config byte by byte as it came or was made.
	RawConfig []byte
	// Manifest is the digest of the manifest that the image was pulled by, "" for an image made here.
	Manifest ocispec.Digest
	// RepoTags and RepoDigests are the familiar references that lead here, sorted: nginx:latest, nginx@sha256:...
	RepoTags, RepoDigests []string
	// Created is the config's time, the zero time if it has none.
	Created time.Time
	// LastTagged is when the newest of the tags was set, the zero time without tags.
	LastTagged time.Time
}

// Layers returns the diffIDs, base first.
func (i Image) Layers() []ocispec.Digest { return i.Config.RootFS.DiffIDs }

// Store is the image store of one root. It keeps nothing in memory; any number of processes may use one at a time.
type Store struct {
	root   *disk.Root
	blobs  *blobs.Store
	layers *layers.Store
}

// Open returns the store in root. The layer store ls serves Size alone and may be nil where that is not called.
func Open(root *disk.Root, bs *blobs.Store, ls *layers.Store) *Store {
	return &Store{root: root, blobs: bs, layers: ls}
}

// tagRecord is images/<escaped reference>.json.
type tagRecord struct {
	Reference string `json:"reference"`
	// ID is the image that the tag means where no platform is asked for.
	ID ocispec.Digest `json:"id"`
	// Index is the image index that the tag leads to in its registry or archive, "" for none.
	Index ocispec.Digest `json:"index,omitempty"`
	// Others are the images of further platforms of Index that are here.
	Others []ocispec.Digest `json:"others,omitempty"`
	Tagged time.Time        `json:"tagged"`
}

// variants are all images that the tag leads to.
func (t tagRecord) variants() []ocispec.Digest {
	return append([]ocispec.Digest{t.ID}, t.Others...)
}

// idRecord is images/by-id/<hex>.json.
type idRecord struct {
	ID          ocispec.Digest `json:"id"`
	Manifest    ocispec.Digest `json:"manifest,omitempty"`
	RepoDigests []string       `json:"repoDigests,omitempty"` // full form
	Added       time.Time      `json:"added"`
}

// fileName escapes a tag's reference for the file system. The result is the reference itself but for its slashes; one too
// long for a file name keeps its beginning and a hash tells it from its like (the file's content has the whole).
func fileName(r Reference) string {
	n := strings.ReplaceAll(r.String(), "/", "%2F")
	if len(n) > 200 {
		sum := sha256.Sum256([]byte(n))
		n = n[:160] + "~" + hex.EncodeToString(sum[:16])
	}
	return n + ".json"
}

func (s *Store) tagPath(r Reference) string { return s.root.Path("images", fileName(r)) }

func (s *Store) idPath(id ocispec.Digest) (string, error) {
	hexa, ok := strings.CutPrefix(string(id), "sha256:")
	if !ok || !isHex64(hexa) {
		return "", &NotFoundError{string(id)}
	}
	return s.root.Path("images", "by-id", hexa+".json"), nil
}

func (s *Store) lock() (*disk.Lock, error) { return disk.Acquire(s.root.Path("images", "lock")) }

// Add records the image with that config: the config becomes a blob, the id record is written. manifest is "" for an image made
// here; repoDigest is the full or familiar reference by digest it was pulled by, "" for none. Adding an image that exists adds
// what is new and is no error; when nothing is new, nothing is written. A nil error promises that image and config survive a
// power loss. The layers must exist, and a lease must hold them until Add returns. The Image comes without tags, as from Find.
func (s *Store) Add(ctx context.Context, rawConfig []byte, manifest ocispec.Digest, repoDigest string) (Image, error) {
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	id := ocispec.FromBytes(rawConfig)
	if _, err := ParseConfig(rawConfig); err != nil {
		return Image{}, fmt.Errorf("image %s: %w", id, err)
	}
	if repoDigest != "" {
		r, err := ParseReference(repoDigest)
		if err != nil {
			return Image{}, fmt.Errorf("image %s: %q: %w", id, repoDigest, err)
		}
		if r.Digest() == "" {
			return Image{}, fmt.Errorf("image %s: %q has no digest", id, repoDigest)
		}
		repoDigest = r.WithDigest(r.Digest()).String()
	}
	path, err := s.idPath(id)
	if err != nil {
		return Image{}, err
	}
	// The lock also keeps Sweep's look at the blobs apart from the moment when the config is there and its record is not.
	l, err := s.lock()
	if err != nil {
		return Image{}, err
	}
	defer l.Release()
	if _, err := s.blobs.PutBytes(rawConfig); err != nil {
		return Image{}, fmt.Errorf("image %s: %w", id, err)
	}
	rec := idRecord{ID: id, Added: time.Now().UTC()}
	err = disk.ReadJSON(path, &rec)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Image{}, err
	}
	changed := err != nil
	if manifest != "" && rec.Manifest != manifest {
		rec.Manifest, changed = manifest, true
	}
	if repoDigest != "" && !slices.Contains(rec.RepoDigests, repoDigest) {
		rec.RepoDigests, changed = append(rec.RepoDigests, repoDigest), true
	}
	if changed {
		if err := s.writeID(path, rec); err != nil {
			return Image{}, err
		}
	}
	return s.load(rec, nil)
}

func (s *Store) writeID(path string, rec idRecord) error {
	slices.Sort(rec.RepoDigests)
	err := disk.WriteJSON(path, rec, disk.Durable)
	if errors.Is(err, fs.ErrNotExist) { // the folder is made with the first image
		if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
			return fmt.Errorf("record image: %w", err)
		}
		if err := disk.SyncDir(s.root.Path("images")); err != nil {
			return fmt.Errorf("record image: %w", err)
		}
		err = disk.WriteJSON(path, rec, disk.Durable)
	}
	return err
}

// ParseConfig decodes an image config and refuses one that no container could be made of.
func ParseConfig(raw []byte) (ocispec.Image, error) {
	var c ocispec.Image
	if len(raw) > MaxConfig {
		return c, fmt.Errorf("config has %d bytes, at most %d are allowed", len(raw), MaxConfig)
	}
	if err := plainjson.Unmarshal(raw, &c); err != nil {
		return c, fmt.Errorf("decode config: %w", err)
	}
	for _, d := range c.RootFS.DiffIDs {
		if hexa, ok := strings.CutPrefix(string(d), "sha256:"); !ok || !isHex64(hexa) {
			return c, fmt.Errorf("config names layer %q, which is not a sha256", string(d))
		}
	}
	return c, nil
}

// AddTagged is Add, and TagIndex of refs to the image, which index names unless it is "". Whoever removes images between the two, as a
// prune does to those without a tag, does not make it fail: then it begins again.
func (s *Store) AddTagged(ctx context.Context, rawConfig []byte, manifest ocispec.Digest, repoDigest string, index ocispec.Digest, refs ...Reference) (Image, error) {
	for {
		img, err := s.Add(ctx, rawConfig, manifest, repoDigest)
		for _, ref := range refs {
			if err == nil {
				err = s.TagIndex(ref, index, img.ID)
			}
		}
		if errors.Is(err, ErrNotFound) {
			continue // Add looks at ctx
		}
		return img, err
	}
}

// Tag points ref to the image id, away from the one it pointed to before, which stays. A reference by digest is refused. When ref
// points there already nothing is written.
func (s *Store) Tag(id ocispec.Digest, ref Reference) error {
	if ref.IsZero() || ref.Digest() != "" {
		return fmt.Errorf("refusing to create a tag with a digest reference: %s", ref.Familiar())
	}
	idp, err := s.idPath(id)
	if err != nil {
		return err
	}
	path := s.tagPath(ref)
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.Release()
	if _, err := os.Lstat(idp); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return &NotFoundError{string(id)}
		}
		return err
	}
	var old tagRecord
	if err := disk.ReadJSON(path, &old); err == nil && old.ID == id && old.Reference == ref.String() && old.Index == "" {
		return nil
	}
	return disk.WriteJSON(path, tagRecord{Reference: ref.String(), ID: id, Tagged: time.Now().UTC()}, disk.Durable)
}

// Untag removes a tag, or with a digest in ref that digest from its image's RepoDigests, and returns the id it led to. The image
// stays. A reference that leads nowhere is ErrNotFound.
func (s *Store) Untag(ref Reference) (ocispec.Digest, error) {
	l, err := s.lock()
	if err != nil {
		return "", err
	}
	defer l.Release()
	if ref.Digest() != "" {
		return s.forgetDigest(ref.WithDigest(ref.Digest()))
	}
	var rec tagRecord
	if err := disk.ReadJSON(s.tagPath(ref), &rec); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", &NotFoundError{ref.Familiar()}
		}
		return "", err
	}
	return rec.ID, s.root.Trash(s.tagPath(ref))
}

// forgetDigest takes a digest off all images that were pulled by it: the platforms of one index share it.
func (s *Store) forgetDigest(ref Reference) (ocispec.Digest, error) {
	recs, err := s.ids()
	if err != nil {
		return "", err
	}
	id := ocispec.Digest("")
	for _, rec := range recs {
		i := slices.Index(rec.RepoDigests, ref.String())
		if i < 0 {
			continue
		}
		rec.RepoDigests = slices.Delete(rec.RepoDigests, i, i+1)
		path, err := s.idPath(rec.ID)
		if err != nil {
			return "", err
		}
		if err := s.writeID(path, rec); err != nil {
			return "", err
		}
		id = rec.ID
	}
	if id == "" {
		return "", &NotFoundError{ref.Familiar()}
	}
	return id, nil
}

// Delete removes the image's record and every tag that points to it. Config, manifest and layers stay until package collect
// finds them unused. An image that does not exist is ErrNotFound.
func (s *Store) Delete(id ocispec.Digest) error {
	path, err := s.idPath(id)
	if err != nil {
		return err
	}
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.Release()
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return &NotFoundError{string(id)}
	}
	tags, err := s.tags()
	if err != nil {
		return err
	}
	// Tags go first: after a crash in between, the image is dangling rather than a tag leading nowhere.
	for _, t := range tags[id] {
		if err := s.dropVariant(t, id); err != nil {
			return err
		}
	}
	return s.root.Trash(path)
}

// Locked runs fn while no image can be added, tagged or deleted. Package collect uses it to look at blobs.
func (s *Store) Locked(fn func() error) error {
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.Release()
	return fn()
}
