// Package archive owns the forms in which images travel as files: what `save` writes and `load` reads.
//
//	docker-archive   a tar with manifest.json, which names configs, layers and tags; Docker's before 25 wrote a folder a layer
//	oci-archive      a tar of an OCI image layout: oci-layout, index.json, blobs/sha256/<hex>
//	both in one      what Docker writes since 25, and what Write makes for docker-archive
//	folders          an OCI image layout, or what `skopeo copy dir:` and `podman save --format docker-dir` make
//
// An archive comes from strangers. Nothing of it is written anywhere under a name that it gives; what it says is bounded in number and
// size before it is believed, and every digest in it is checked against the bytes. Layers are the caller's business: a Layer opens
// its bytes, and who stores them compares them with DiffID and Blob.
package archive

import (
	"errors"
	"fmt"
	"io"

	"conex/internal/image"
	"conex/internal/ocispec"
)

// ErrRefused is what errors.Is finds in every error that blames the archive and not the machine.
var ErrRefused = errors.New("archive refused")

// refusal is an ErrRefused with words of its own.
type refusal struct{ err error }

func (r *refusal) Error() string        { return r.err.Error() }
func (r *refusal) Unwrap() error        { return r.err }
func (r *refusal) Is(target error) bool { return target == ErrRefused }

func refuse(format string, args ...any) error { return &refusal{fmt.Errorf(format, args...)} }

// Bounds of what an archive may hold. Memory and time of reading one follow from them.
const (
	// MaxList bounds manifest.json and index.json, in bytes: some ten thousand images.
	MaxList = 8 << 20
	// MaxManifest bounds a manifest or an index among the blobs, in bytes.
	MaxManifest = 4 << 20
	// MaxLayers is how many layers an image may have: more the kernel does not mount at a time.
	MaxLayers = 500
	// maxEntries bounds the entries of a tar, maxImages the images in it, maxTexts the bytes of their configs and manifests together.
	maxEntries = 150_000
	maxImages  = 10_000
	maxTexts   = 48 << 20
	// maxParts bounds the objects and lists in one JSON document.
	maxParts = 100_000
	// maxDepth is how deep an index may lie in others.
	maxDepth = 4
	// maxSpool bounds what a stream may hold beside its layers, in bytes, maxSkipped what in it is too large to be of use: some of a
	// compressed stream's bytes can stand for a thousand times as many.
	maxSpool   = 256 << 20
	maxSkipped = 16 << 30
)

// Archive is an archive that was read: what is in it is known and checked, but for the layers' contents.
type Archive struct {
	// Images are the images, each once, in the archive's order.
	Images []Image
	// Tags are the names, in the archive's order.
	Tags []Tag
	// Indexes are the image indexes that tags lead to, byte by byte.
	Indexes map[ocispec.Digest][]byte

	src source
}

// Close closes what the archive is read from.
func (a *Archive) Close() error { return a.src.Close() }

// Tag is one name in an archive.
type Tag struct {
	Reference image.Reference
	// Index is the image index that the name leads to, "" for a name of one image.
	Index ocispec.Digest
	// Images are the ids of the images that the name leads to: several where an index has several platforms.
	Images []ocispec.Digest
}

// Image is one image in an archive.
type Image struct {
	// ID is the digest of RawConfig.
	ID ocispec.Digest
	// Platform is what the config says.
	Platform ocispec.Platform
	// RawConfig is the config byte by byte.
	RawConfig []byte
	// Manifest is the manifest byte by byte; nil if the archive has none, or none but a description of its own uncompressed layers.
	Manifest []byte
	// Layers belong to the config's diffIDs, in their order.
	Layers []Layer
}

// Layer is one layer of an image in an archive.
type Layer struct {
	// DiffID is what the config says that the uncompressed tar is.
	DiffID ocispec.Digest
	// Blob describes the bytes as the manifest does. Without a manifest it has the size alone.
	Blob ocispec.Descriptor
	// Name is the entry's, for messages.
	Name string
	// Taken is what became of the layer that came in a stream; nil: Open it.
	Taken *Taken

	open func() (io.ReadCloser, error)
}

// Open opens the layer's bytes, compressed or not. They are not verified.
func (l Layer) Open() (io.ReadCloser, error) { return l.open() }

// Taken is what became of an entry of a stream.
type Taken struct {
	// DiffID is the digest of the uncompressed tar.
	DiffID ocispec.Digest
	// Digest and Size are of the bytes in the archive.
	Digest ocispec.Digest
	Size   int64
	// Err says why the entry is no layer. It matters only if an image has it.
	Err error
}
