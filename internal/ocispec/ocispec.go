// Package ocispec gathers the OCI and Docker structs and digests that conex speaks, under one name.
//
// It only renames the official modules (image-spec 1.1, go-digest, Docker's image extension), so that the rest of
// conex has one import for them and a reader one place to look.
package ocispec

import (
	"crypto/sha256" // go-digest asks crypto for it
	"encoding/hex"
	"hash"
	"strings"

	"conex/internal/ondemand"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Digest names bytes by their hash, "sha256:<hex>".
type Digest = digest.Digest

// Descriptor, Manifest, Index, Platform, RootFS and History are the image-spec's structs.
type (
	Descriptor = v1.Descriptor
	Manifest   = v1.Manifest
	Index      = v1.Index
	Platform   = v1.Platform
	RootFS     = v1.RootFS
	History    = v1.History
)

// Image is an image config as Docker writes it: the OCI config plus Healthcheck, OnBuild and Shell.
type Image = dockerspec.DockerOCIImage

// ImageConfig is the execution part of an Image.
type ImageConfig = dockerspec.DockerOCIImageConfig

// Healthcheck is Docker's HEALTHCHECK; Test[0] is NONE, CMD or CMD-SHELL.
type Healthcheck = dockerspec.HealthcheckConfig

// Media types of manifests, configs and layers: OCI's and Docker's schema 2.
const (
	MediaTypeImageIndex     = v1.MediaTypeImageIndex
	MediaTypeImageManifest  = v1.MediaTypeImageManifest
	MediaTypeImageConfig    = v1.MediaTypeImageConfig
	MediaTypeImageLayer     = v1.MediaTypeImageLayer
	MediaTypeImageLayerGzip = v1.MediaTypeImageLayerGzip
	MediaTypeImageLayerZstd = v1.MediaTypeImageLayerZstd

	MediaTypeDockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerConfig       = "application/vnd.docker.container.image.v1+json"
	MediaTypeDockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	MediaTypeDockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
)

// sha256Prefix is how nearly every digest begins. For them conex does without what go-digest makes first: expressions, and a list of
// algorithms.
const sha256Prefix = string(digest.SHA256) + ":"

// FromBytes returns the sha256 digest of b.
func FromBytes(b []byte) Digest {
	sum := sha256.Sum256(b)
	return Digest(sha256Prefix + hex.EncodeToString(sum[:]))
}

// FromHash returns the digest that h has come to. h is a sha256.
func FromHash(h hash.Hash) Digest { return Digest(sha256Prefix + hex.EncodeToString(h.Sum(nil))) }

// ParseDigest checks s and returns it as a Digest.
func ParseDigest(s string) (Digest, error) {
	d := Digest(s)
	return d, Validate(d)
}

// Validate says what is wrong with a digest, by go-digest's errors: its form, its length, or an algorithm that go-digest does not know. Its
// own method does the same only after ondemand.Digest.
func Validate(d Digest) error {
	if sum, ok := strings.CutPrefix(string(d), sha256Prefix); ok && len(sum) == 2*sha256.Size && strings.Trim(sum, "0123456789abcdef") == "" {
		return nil
	}
	ondemand.Digest()
	return d.Validate()
}
