package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"conex/internal/compress"
)

// The big image: 10 layers, 15,000 files, 512 MB, of which gzip makes 243.
const (
	bigLayers = 10
	bigFiles  = 15_000
	bigSize   = 512 << 20
	bigName   = "bench-big"
)

// kinds are the forms in which the big image is in the registry, each under a tag of that name.
var kinds = []compress.Kind{compress.Gzip, compress.Zstd}

// bigImage is the big image in all its forms.
type bigImage struct {
	layout  string              // an OCI layout
	archive string              // as docker save writes it
	blobs   map[string][]string // the digests that each tag needs, the manifest first
}

// writeBig makes the big image below dir, the same bytes each time.
func writeBig(dir string) (*bigImage, error) {
	img := &bigImage{layout: filepath.Join(dir, "layout"), archive: filepath.Join(dir, "big.tar"), blobs: map[string][]string{}}
	if err := os.MkdirAll(filepath.Join(img.layout, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	f, err := os.Create(img.archive)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	archive := tar.NewWriter(f)
	var diffIDs, names []string
	layers := map[compress.Kind][]any{}
	text := newProse()
	for i := range bigLayers {
		plain, err := bigLayer(text, i)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(plain)
		diffIDs = append(diffIDs, "sha256:"+hex.EncodeToString(sum[:]))
		names = append(names, hex.EncodeToString(sum[:])+"/layer.tar")
		if err := addFile(archive, names[i], plain); err != nil {
			return nil, err
		}
		for _, kind := range kinds {
			var packed bytes.Buffer
			w, err := compress.NewWriter(&packed, kind, compress.DefaultLevel(kind))
			if err != nil {
				return nil, err
			}
			if _, err := w.Write(plain); err != nil {
				return nil, err
			}
			if err := w.Close(); err != nil {
				return nil, err
			}
			desc, err := img.put("application/vnd.oci.image.layer.v1.tar+"+string(kind), packed.Bytes(), kind)
			if err != nil {
				return nil, err
			}
			layers[kind] = append(layers[kind], desc)
		}
	}
	config, err := json.Marshal(map[string]any{"architecture": runtime.GOARCH, "os": "linux", "created": "2001-09-09T01:46:40Z",
		"config": map[string]any{}, "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}})
	if err != nil {
		return nil, err
	}
	var manifests []any
	for _, kind := range kinds {
		desc, err := img.put("application/vnd.oci.image.config.v1+json", config, kind)
		if err != nil {
			return nil, err
		}
		manifest, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": manifestType, "config": desc, "layers": layers[kind]})
		if err != nil {
			return nil, err
		}
		m, err := img.put(manifestType, manifest, kind)
		if err != nil {
			return nil, err
		}
		m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": bigName + ":" + string(kind)}
		manifests = append(manifests, m)
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": manifests})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(img.layout, "index.json"), index, 0o644); err != nil {
		return nil, err
	}
	if err := addFile(archive, "config.json", config); err != nil {
		return nil, err
	}
	list, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{bigName + ":latest"}, "Layers": names}})
	if err != nil {
		return nil, err
	}
	if err := addFile(archive, "manifest.json", list); err != nil {
		return nil, err
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	return img, f.Close()
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// put stores a blob for a tag and describes it.
func (img *bigImage) put(mediaType string, data []byte, tag compress.Kind) (map[string]any, error) {
	sum := sha256.Sum256(data)
	name := hex.EncodeToString(sum[:])
	img.blobs[string(tag)] = append([]string{name}, img.blobs[string(tag)]...)
	return map[string]any{"mediaType": mediaType, "digest": "sha256:" + name, "size": len(data)}, os.WriteFile(img.blob(name), data, 0o644)
}

func (img *bigImage) blob(name string) string {
	return filepath.Join(img.layout, "blobs", "sha256", name)
}

// seed makes a docker-registry's folder of the layout, without copying the blobs.
func (img *bigImage) seed(root string) error {
	v2 := filepath.Join(root, "docker", "registry", "v2")
	link := func(name string, path ...string) error {
		dir := filepath.Join(append([]string{v2, "repositories", bigName}, path...)...)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "link"), []byte("sha256:"+name), 0o644)
	}
	for tag, names := range img.blobs {
		for _, name := range names {
			dir := filepath.Join(v2, "blobs", "sha256", name[:2], name)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			if err := os.Link(img.blob(name), filepath.Join(dir, "data")); err != nil && !os.IsExist(err) {
				return err
			}
			if err := link(name, "_layers", "sha256", name); err != nil {
				return err
			}
		}
		manifest := names[0]
		for _, path := range [][]string{{"revisions", "sha256", manifest}, {"tags", tag, "current"}, {"tags", tag, "index", "sha256", manifest}} {
			if err := link(manifest, append([]string{"_manifests"}, path...)...); err != nil {
				return err
			}
		}
	}
	return nil
}

func addFile(tw *tar.Writer, name string, data []byte) error {
	h := &tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644, Typeflag: tar.TypeReg, ModTime: time.Unix(1e9, 0)}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := tw.Write(data)
	return err
}

// bigLayer makes the tar of one layer: small files and a few large ones, in folders of 100.
func bigLayer(text *prose, layer int) ([]byte, error) {
	const files, size = bigFiles / bigLayers, bigSize / bigLayers
	weights := make([]float64, files)
	sum := 0.0
	for i := range weights {
		weights[i] = text.r.ExpFloat64() * text.r.ExpFloat64()
		sum += weights[i]
	}
	var buf bytes.Buffer
	buf.Grow(size + size/16)
	tw := tar.NewWriter(&buf)
	data := make([]byte, 0, 1<<20)
	for i, w := range weights {
		if i%100 == 0 {
			dir := &tar.Header{Name: fmt.Sprintf("big/l%d/d%02d/", layer, i/100), Mode: 0o755, Typeflag: tar.TypeDir, ModTime: time.Unix(1e9, 0)}
			if err := tw.WriteHeader(dir); err != nil {
				return nil, err
			}
		}
		data = text.append(data[:0], int(w/sum*(size-files*1024)))
		if err := addFile(tw, fmt.Sprintf("big/l%d/d%02d/f%04d", layer, i/100, i), data); err != nil {
			return nil, err
		}
	}
	err := tw.Close()
	return buf.Bytes(), err
}

// prose makes content that compresses as programs and texts do: words, of which few are frequent, with noise between.
type prose struct {
	r     *rand.Rand
	noise *rand.ChaCha8
	// draws has each word as often as it is to be.
	draws [1 << 16][]byte
}

func newProse() *prose {
	noise := rand.NewChaCha8([32]byte{3})
	p := &prose{r: rand.New(noise), noise: noise}
	words := make([][]byte, 6000)
	for i := range words {
		w := make([]byte, 3+p.r.IntN(16))
		for j := range w {
			w[j] = byte(96 + p.r.ExpFloat64()*9)
		}
		words[i] = w
	}
	zipf := rand.NewZipf(p.r, 1.3, 4, uint64(len(words)-1))
	for i := range p.draws {
		p.draws[i] = words[zipf.Uint64()]
	}
	return p
}

func (p *prose) append(b []byte, n int) []byte {
	var noise [96]byte
	for len(b) < n {
		x := p.noise.Uint64()
		if x>>56 < 16 {
			k := 1 + x>>16%uint64(len(noise))
			p.noise.Read(noise[:k])
			b = append(b, noise[:k]...)
			continue
		}
		b = append(b, p.draws[x&0xffff]...)
	}
	return b[:n]
}
