// Package mirror owns the registry that tests and demonstrations pull from: images of a conex store as an OCI layout with
// compressed layers, served on a loopback address as docker.io would serve them.
//
// It stands in for `save` and `push`: it reads the store through the same packages as the engine, and what it serves is
// what any registry would.
package mirror

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/klauspost/pgzip"

	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/ondemand"
)

// TarOpener opens a layer's uncompressed tar by its diffID: layers.Store's OpenTar.
type TarOpener func(diffID ocispec.Digest) (io.ReadCloser, layers.Info, error)

// refAnnotation names a manifest in index.json, by its whole reference (image-spec, annotations).
const refAnnotation = "org.opencontainers.image.ref.name"

// Export writes every tagged image of the store to the OCI layout in dir. Layers that are there already are not written
// again, blobs that no image needs any more are deleted. A second Export into the same folder must not run beside it.
func Export(ctx context.Context, images *image.Store, open TarOpener, dir string) error {
	for _, d := range []string{"blobs/sha256", "by-diffid"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return fmt.Errorf("export: %w", err)
		}
	}
	list, err := images.List()
	if err != nil {
		return err
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	keep := map[string]bool{}
	for _, img := range list {
		if len(img.RepoTags) == 0 {
			continue
		}
		desc, err := exportImage(ctx, img, open, dir, keep)
		if err != nil {
			return fmt.Errorf("export %s: %w", img.RepoTags[0], err)
		}
		for _, t := range img.RepoTags {
			ref, err := image.ParseReference(t)
			if err != nil {
				return fmt.Errorf("export: %q: %w", t, err)
			}
			d := desc
			d.Annotations = map[string]string{refAnnotation: ref.String()}
			index.Manifests = append(index.Manifests, d)
		}
	}
	if err := disk.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644, disk.Durable); err != nil {
		return err
	}
	if err := disk.WriteJSON(filepath.Join(dir, "index.json"), index, disk.Durable); err != nil {
		return err
	}
	return sweep(dir, keep)
}

func exportImage(ctx context.Context, img image.Image, open TarOpener, dir string, keep map[string]bool) (ocispec.Descriptor, error) {
	config, err := putBytes(dir, ocispec.MediaTypeImageConfig, img.RawConfig, keep)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config}
	m.SchemaVersion = 2
	for _, diffID := range img.Layers() {
		l, err := exportLayer(ctx, diffID, open, dir)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", diffID, err)
		}
		keep[l.Digest.Encoded()] = true
		m.Layers = append(m.Layers, l)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := putBytes(dir, ocispec.MediaTypeImageManifest, raw, keep)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc.Platform = &ocispec.Platform{Architecture: img.Config.Architecture, OS: img.Config.OS, Variant: img.Config.Variant}
	return desc, nil
}

// exportLayer compresses one layer into blobs/, and notes its descriptor in by-diffid/ so that this happens once.
func exportLayer(ctx context.Context, diffID ocispec.Digest, open TarOpener, dir string) (desc ocispec.Descriptor, err error) {
	if err := ctx.Err(); err != nil {
		return desc, err
	}
	note := filepath.Join(dir, "by-diffid", diffID.Encoded()+".json")
	err = disk.ReadJSON(note, &desc)
	if err == nil {
		if st, err := os.Stat(blobPath(dir, desc.Digest)); err == nil && st.Size() == desc.Size {
			return desc, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return desc, err
	}
	tar, _, err := open(diffID)
	if err != nil {
		return desc, err
	}
	defer tar.Close()
	tmp, err := os.CreateTemp(dir, "layer")
	if err != nil {
		return desc, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	packed, plain := sha256.New(), sha256.New()
	size := &counter{w: io.MultiWriter(tmp, packed)}
	// The fast level: this is a fixture, and its making waits in front of every test.
	ondemand.Compress()
	zw, err := pgzip.NewWriterLevel(size, pgzip.BestSpeed)
	if err != nil {
		return desc, err
	}
	if _, err := io.Copy(io.MultiWriter(zw, plain), tar); err != nil {
		return desc, err
	}
	if err := zw.Close(); err != nil {
		return desc, err
	}
	if got := ocispec.FromHash(plain); got != diffID {
		return desc, fmt.Errorf("the store's tar has digest %s", got)
	}
	if err := tmp.Close(); err != nil {
		return desc, err
	}
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: ocispec.FromHash(packed), Size: size.n}
	if err := os.Rename(tmp.Name(), blobPath(dir, desc.Digest)); err != nil {
		return desc, err
	}
	return desc, disk.WriteJSON(note, desc, disk.Durable)
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func blobPath(dir string, d ocispec.Digest) string {
	return filepath.Join(dir, "blobs", "sha256", d.Encoded())
}

func putBytes(dir, mediaType string, b []byte, keep map[string]bool) (ocispec.Descriptor, error) {
	d := ocispec.FromBytes(b)
	keep[d.Encoded()] = true
	if err := disk.WriteFile(blobPath(dir, d), b, 0o644, disk.Durable); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}, nil
}

// sweep deletes the blobs and notes that no manifest in index.json leads to.
func sweep(dir string, keep map[string]bool) error {
	entries, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			if err := os.Remove(filepath.Join(dir, "blobs", "sha256", e.Name())); err != nil {
				return fmt.Errorf("export: %w", err)
			}
		}
	}
	notes, err := os.ReadDir(filepath.Join(dir, "by-diffid"))
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for _, e := range notes {
		path := filepath.Join(dir, "by-diffid", e.Name())
		var desc ocispec.Descriptor
		if err := disk.ReadJSON(path, &desc); err != nil {
			return err
		}
		if !keep[desc.Digest.Encoded()] {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("export: %w", err)
			}
		}
	}
	return nil
}
