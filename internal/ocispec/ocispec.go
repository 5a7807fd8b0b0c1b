// Package ocispec gathers the OCI and Docker structs and digests that conex speaks, under one name.
//
// It only renames the official modules (image-spec 1.1, go-digest, Docker's image extension), so that the rest of
// conex has one import for them and a reader one place to look.
package ocispec

import (
	_ "crypto/sha256" // go-digest asks crypto for it

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

// FromBytes returns the sha256 digest of b.
func FromBytes(b []byte) Digest { return digest.FromBytes(b) }

// ParseDigest checks s and returns it as a Digest.
func ParseDigest(s string) (Digest, error) { return digest.Parse(s) }
