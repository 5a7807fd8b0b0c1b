package build

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"conex/internal/ocispec"
)

// Media types of caches that travel.
const (
	// CacheConfigType is the type of a cache's config, and of the artifact as a whole.
	CacheConfigType = "application/vnd.conex.buildcache.config.v1+json"
	// buildkitCacheType is that of BuildKit's caches.
	buildkitCacheType = "application/vnd.buildkit.cacheconfig.v0"
)

// Bounds of a cache that comes from elsewhere.
const (
	MaxCacheManifest = 4 << 20
	MaxCacheConfig   = 32 << 20
	maxCacheRecords  = 50_000
	maxCacheLayers   = 2000
	maxCacheMounts   = 100
	maxText          = 1000
)

// cacheVersion is the version of CacheConfig.
const cacheVersion = 1

// ErrBuildKitCache says that a cache is BuildKit's.
var ErrBuildKitCache = errors.New("it is a cache of BuildKit's, which conex can't read; make one with conex build --cache-to")

// CacheConfig is the config of a cache that travels, in the frame of an OCI manifest, or in an image's config: what steps gave what
// layers. The manifest's layers are the compressed forms of Layers, in the same order.
type CacheConfig struct {
	Version int `json:"version"`
	// Keys is how keys were made; other keys are of no use.
	Keys    string        `json:"keys"`
	Layers  []CacheLayer  `json:"layers,omitempty"`
	Records []CacheRecord `json:"records"`
	Mounts  []CacheMount  `json:"mounts,omitempty"`
}

// CacheLayer is a layer, and how its compressed form was made if that is known.
type CacheLayer struct {
	DiffID ocispec.Digest `json:"diffID"`
	Recipe string         `json:"recipe,omitempty"`
}

// CacheRecord is a Record without what its key was made of.
type CacheRecord struct {
	// Class is def or content.
	Class   string         `json:"class"`
	Key     string         `json:"key"`
	Kind    string         `json:"kind"`
	Layer   ocispec.Digest `json:"layer,omitempty"`
	Created time.Time      `json:"created"`
	Took    time.Duration  `json:"took,omitempty"`
}

// CacheMount is what was in a RUN --mount=type=cache, as a layer.
type CacheMount struct {
	// Name is the folder's, which stands for all that tells caches apart; ID is what people call it.
	Name  string         `json:"name"`
	ID    string         `json:"id"`
	Layer ocispec.Digest `json:"layer"`
	UID   uint32         `json:"uid,omitempty"`
	GID   uint32         `json:"gid,omitempty"`
	Mode  uint32         `json:"mode,omitempty"`
}

// remoteCache is a cache that was read and checked.
type remoteCache struct {
	records map[string]CacheRecord // by class/key
	blobs   map[ocispec.Digest]ocispec.Descriptor
	recipes map[ocispec.Digest]string
	mounts  map[string]CacheMount // by name
}

// decodeCache reads a cache from its manifest and config, which are a stranger's: what is wrong with them is said, never done. What is
// not known (newer records' kinds, say) is left out.
func decodeCache(manifest, config []byte) (*remoteCache, error) {
	if len(manifest) > MaxCacheManifest || len(config) > MaxCacheConfig {
		return nil, errors.New("its manifest or config is too large")
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return nil, fmt.Errorf("decode manifest: %w", err)
	}
	if len(m.Layers) > maxCacheLayers {
		return nil, fmt.Errorf("its manifest has %d layers, more than %d", len(m.Layers), maxCacheLayers)
	}
	for _, d := range m.Layers {
		if err := sha256Only(d.Digest); err != nil || d.Size < 0 {
			return nil, fmt.Errorf("its manifest names %q of %d bytes, which is no sha256 or no size", clip(string(d.Digest)), d.Size)
		}
	}
	switch {
	case isBuildKitCache(&m):
		return nil, ErrBuildKitCache
	case m.Config.MediaType == CacheConfigType:
		var c CacheConfig
		if err := json.Unmarshal(config, &c); err != nil {
			return nil, fmt.Errorf("decode config: %w", err)
		}
		return c.check(m.Layers)
	}
	return decodeInline(&m, config)
}

// isBuildKitCache recognizes BuildKit's caches, which are a manifest or an index.
func isBuildKitCache(m *ocispec.Manifest) bool {
	if m.Config.MediaType == buildkitCacheType {
		return true
	}
	return strings.Contains(m.MediaType, "index") || strings.Contains(m.MediaType, "list")
}

// IsBuildKitCache reports whether an index is a cache of BuildKit's.
func IsBuildKitCache(index []byte) bool {
	var i ocispec.Index
	if json.Unmarshal(index, &i) != nil {
		return false
	}
	for _, d := range i.Manifests {
		if d.MediaType == buildkitCacheType {
			return true
		}
	}
	return false
}

// imageWithCache is an image config with a cache in it.
type imageWithCache struct {
	ocispec.Image
	Cache *CacheConfig `json:"conex.buildcache.v1,omitempty"`
}

// decodeInline reads the cache in an image's config.
func decodeInline(m *ocispec.Manifest, config []byte) (*remoteCache, error) {
	var img struct {
		RootFS ocispec.RootFS  `json:"rootfs"`
		Cache  *CacheConfig    `json:"conex.buildcache.v1"`
		Other  json.RawMessage `json:"moby.buildkit.cache.v0"`
	}
	if err := json.Unmarshal(config, &img); err != nil {
		return nil, fmt.Errorf("decode image config: %w", err)
	}
	if img.Cache == nil {
		if img.Other != nil {
			return nil, ErrBuildKitCache
		}
		return nil, errors.New("the image has no cache in it; build it with --cache-to type=inline")
	}
	if len(img.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("its manifest has %d layers, its config %d", len(m.Layers), len(img.RootFS.DiffIDs))
	}
	img.Cache.Layers = nil
	for _, id := range img.RootFS.DiffIDs {
		img.Cache.Layers = append(img.Cache.Layers, CacheLayer{DiffID: id})
	}
	img.Cache.Mounts = nil
	return img.Cache.check(m.Layers)
}

// check makes a cache of a config whose layers have these forms.
func (c *CacheConfig) check(forms []ocispec.Descriptor) (*remoteCache, error) {
	if c.Version != cacheVersion {
		return nil, fmt.Errorf("it has version %d, this conex reads %d", c.Version, cacheVersion)
	}
	if len(c.Layers) != len(forms) {
		return nil, fmt.Errorf("its manifest has %d layers, its config %d", len(forms), len(c.Layers))
	}
	if len(c.Records) > maxCacheRecords || len(c.Mounts) > maxCacheMounts {
		return nil, fmt.Errorf("it has %d records and %d mounts, more than %d and %d", len(c.Records), len(c.Mounts), maxCacheRecords, maxCacheMounts)
	}
	r := &remoteCache{
		records: map[string]CacheRecord{}, blobs: map[ocispec.Digest]ocispec.Descriptor{}, recipes: map[ocispec.Digest]string{}, mounts: map[string]CacheMount{},
	}
	for i, l := range c.Layers {
		if err := sha256Only(l.DiffID); err != nil {
			return nil, err
		}
		r.blobs[l.DiffID], r.recipes[l.DiffID] = forms[i], clip(l.Recipe)
	}
	if c.Keys != version {
		return r, nil // by another conex: nothing in it can be found
	}
	for _, rec := range c.Records {
		if key, err := hex.DecodeString(rec.Key); err != nil || len(key) != 32 || rec.Key != strings.ToLower(rec.Key) {
			return nil, fmt.Errorf("it has a record with the key %q", clip(rec.Key))
		}
		if rec.Class != byDefinition && rec.Class != byContent {
			continue
		}
		if rec.Layer != "" {
			if _, ok := r.blobs[rec.Layer]; !ok {
				return nil, fmt.Errorf("a record names the layer %q, which it does not have", clip(string(rec.Layer)))
			}
		}
		if y := rec.Created.UTC().Year(); y < 1970 || y > 9999 || rec.Took < 0 {
			return nil, fmt.Errorf("a record has an impossible time")
		}
		rec.Kind = clip(rec.Kind)
		r.records[rec.Class+"/"+rec.Key] = rec
	}
	for _, m := range c.Mounts {
		if _, ok := r.blobs[m.Layer]; !ok || !isMountName(m.Name) {
			return nil, fmt.Errorf("the cache mount %q has no name or no layer", clip(m.ID))
		}
		r.mounts[m.Name] = m
	}
	return r, nil
}

func sha256Only(d ocispec.Digest) error {
	if err := ocispec.Validate(d); err != nil || d.Algorithm() != "sha256" {
		return fmt.Errorf("%q is no sha256", clip(string(d)))
	}
	return nil
}

// clip makes a stranger's text fit to be shown: one line of printable characters, not too long.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
}
