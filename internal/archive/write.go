package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"time"

	"conex/internal/image"
	"conex/internal/ocispec"
)

// Format is a form of archives that Write makes.
type Format string

// The formats.
const (
	// Docker is manifest.json with uncompressed layers, in the frame of an OCI layout, as Docker writes it since 25.
	Docker Format = "docker-archive"
	// OCI is an OCI layout alone.
	OCI Format = "oci-archive"
)

// Blob is content by its digest.
type Blob struct {
	ocispec.Descriptor
	// Open opens the content, which Write verifies.
	Open func() (io.ReadCloser, error)
}

// Item is one image to write.
type Item struct {
	// Config is the config byte by byte.
	Config []byte
	// Platform is what index.json says that the image is for.
	Platform ocispec.Platform
	// Manifest is the manifest byte by byte, and its layers are Layers; nil: one is made.
	Manifest []byte
	// Layers are as a manifest describes them, in the order of the config's diffIDs.
	Layers []Blob
	// TopLayer is the last diffID, "" without layers: Docker's file repositories names it.
	TopLayer ocispec.Digest
	// Annotations are those of the manifest's descriptor in index.json.
	Annotations map[string]string
}

// Set is what a name leads to: an image, or several of one index.
type Set struct {
	// References are the names; none is an image by its digest alone.
	References []image.Reference
	// Index is the index that the names lead to, byte by byte; nil for a single image.
	Index []byte
	Items []Item
}

// MakeManifest makes the manifest of an image with such layers. Equal images give equal bytes.
func MakeManifest(config []byte, layers []Blob) ([]byte, error) {
	m := ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: ocispec.FromBytes(config), Size: int64(len(config))},
		Layers:    []ocispec.Descriptor{},
	}
	m.SchemaVersion = 2
	for _, l := range layers {
		m.Layers = append(m.Layers, l.Descriptor)
	}
	return json.Marshal(m)
}

// Describe returns the descriptor of a manifest or index.
func Describe(raw []byte, fallback string) (ocispec.Descriptor, error) {
	var t struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(raw, &t); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("decode manifest: %w", err)
	}
	if t.MediaType == "" {
		t.MediaType = fallback
	}
	return ocispec.Descriptor{MediaType: t.MediaType, Digest: ocispec.FromBytes(raw), Size: int64(len(raw))}, nil
}

// Write writes an archive of the sets to w, forwards, each blob once. Equal sets give equal bytes. Layers go through written, if
// given: it hears how many bytes of a blob are done. Content that is not what its descriptor says is an error; the archive is
// incomplete after any.
func Write(ctx context.Context, w io.Writer, f Format, sets []Set, written func(d ocispec.Descriptor, n int64)) error {
	p, err := newPlan(f, sets)
	if err != nil {
		return err
	}
	t := &writer{ctx: ctx, w: w, written: written}
	defer t.stop()
	for _, x := range p.texts {
		if err := t.bytes(x.name, x.content); err != nil {
			return err
		}
	}
	for _, b := range p.layers {
		if err := t.blob(b); err != nil {
			return fmt.Errorf("write layer %s: %w", b.Digest, err)
		}
	}
	return t.end()
}

type text struct {
	name    string
	content []byte
}

// plan is an archive that is known to the byte but for its layers' contents.
type plan struct {
	texts  []text
	layers []Blob
	seen   map[ocispec.Digest]bool
	blobs  []text
	docker []dockerEntry
	// repos is Docker's file repositories: repository, tag, layer.
	repos map[string]map[string]string
	index ocispec.Index
}

// newPlan lays out the archive: lists first, so that who reads it as a stream knows what comes.
func newPlan(f Format, sets []Set) (*plan, error) {
	p := &plan{seen: map[ocispec.Digest]bool{}, repos: map[string]map[string]string{}}
	p.index.SchemaVersion, p.index.MediaType = 2, ocispec.MediaTypeImageIndex
	p.index.Manifests = []ocispec.Descriptor{}
	shared := sharedTags(sets)
	for _, s := range sets {
		if err := p.add(s, shared); err != nil {
			return nil, err
		}
	}
	index, err := json.Marshal(p.index)
	if err != nil {
		return nil, err
	}
	mark, err := json.Marshal(map[string]string{"imageLayoutVersion": "1.0.0"})
	if err != nil {
		return nil, err
	}
	p.texts = []text{{ociMark, mark}, {ociList, index}}
	if f == Docker {
		list, err := json.Marshal(p.docker)
		if err != nil {
			return nil, err
		}
		p.texts = append(p.texts, text{dockerList, list})
		if len(p.repos) > 0 {
			repos, err := json.Marshal(p.repos)
			if err != nil {
				return nil, err
			}
			p.texts = append(p.texts, text{dockerTags, repos})
		}
	}
	p.texts = append(append(p.texts, text{"blobs/", nil}, text{blobDir, nil}), p.blobs...)
	return p, nil
}

// sharedTags returns the tags that images of several repositories have: alone they would name none of them.
func sharedTags(sets []Set) map[string]bool {
	first, shared := map[string]int{}, map[string]bool{}
	for i, s := range sets {
		for _, r := range s.References {
			if at, ok := first[r.Tag()]; ok && at != i {
				shared[r.Tag()] = true
			}
			first[r.Tag()] = i
		}
	}
	return shared
}

func (p *plan) add(s Set, shared map[string]bool) error {
	var top ocispec.Descriptor
	for i, it := range s.Items {
		d, err := p.item(it)
		if err != nil {
			return err
		}
		top = d
		p.dockerItem(it, s.References, i == 0)
	}
	if s.Index != nil {
		var err error
		if top, err = Describe(s.Index, ocispec.MediaTypeImageIndex); err != nil {
			return err
		}
		p.blob(top.Digest, s.Index)
	}
	if len(s.References) == 0 {
		p.index.Manifests = append(p.index.Manifests, top)
	}
	for _, r := range s.References {
		d := top
		d.Annotations = maps.Clone(top.Annotations)
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[annotationName], d.Annotations[annotationRef] = r.String(), r.Tag()
		if shared[r.Tag()] {
			d.Annotations[annotationRef] = r.String()
		}
		p.index.Manifests = append(p.index.Manifests, d)
	}
	return nil
}

// item adds an image's blobs and returns its manifest's descriptor.
func (p *plan) item(it Item) (ocispec.Descriptor, error) {
	raw := it.Manifest
	if raw == nil {
		var err error
		if raw, err = MakeManifest(it.Config, it.Layers); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	d, err := Describe(raw, ocispec.MediaTypeImageManifest)
	if err != nil {
		return d, err
	}
	d.Platform, d.Annotations = &it.Platform, it.Annotations
	p.blob(ocispec.FromBytes(it.Config), it.Config)
	p.blob(d.Digest, raw)
	for _, l := range it.Layers {
		if !p.seen[l.Digest] {
			p.seen[l.Digest] = true
			p.layers = append(p.layers, l)
		}
	}
	return d, nil
}

func (p *plan) blob(d ocispec.Digest, content []byte) {
	if !p.seen[d] {
		p.seen[d] = true
		p.blobs = append(p.blobs, text{blobDir + d.Encoded(), content})
	}
}

// dockerItem adds an image to what Docker reads. Of the platforms of an index, which it does not know there, the first has the names.
func (p *plan) dockerItem(it Item, refs []image.Reference, named bool) {
	e := dockerEntry{Config: blobDir + ocispec.FromBytes(it.Config).Encoded(), Layers: []string{}, LayerSources: map[ocispec.Digest]ocispec.Descriptor{}}
	for _, l := range it.Layers {
		e.Layers = append(e.Layers, blobDir+l.Digest.Encoded())
		e.LayerSources[l.Digest] = l.Descriptor
	}
	if named {
		for _, r := range refs {
			e.RepoTags = append(e.RepoTags, r.Familiar())
			if it.TopLayer == "" {
				continue
			}
			if p.repos[r.FamiliarName()] == nil {
				p.repos[r.FamiliarName()] = map[string]string{}
			}
			p.repos[r.FamiliarName()][r.Tag()] = it.TopLayer.Encoded()
		}
	}
	p.docker = append(p.docker, e)
}

// writer writes a tar. It does without archive/tar's for the contents, to hash a block while the next one is read and written.
type writer struct {
	ctx     context.Context //nolint:containedctx // a writer is one call of Write
	w       io.Writer
	written func(ocispec.Descriptor, int64)

	free, full chan []byte
	sum        chan string
}

const (
	blockSize = 1 << 20
	depth     = 4 // blocks on their way
)

var zeros [2 * tarBlock]byte

// header writes an entry's header: the same for the same entry at any time, on any machine.
func (t *writer) header(name string, size int64) error {
	if err := t.ctx.Err(); err != nil {
		return err
	}
	var buf bytes.Buffer
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0)}
	if name[len(name)-1] == '/' {
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
	}
	if err := tar.NewWriter(&buf).WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	_, err := t.w.Write(buf.Bytes())
	return err
}

func (t *writer) pad(size int64) error {
	if rest := size % tarBlock; rest > 0 {
		_, err := t.w.Write(zeros[:tarBlock-rest])
		return err
	}
	return nil
}

func (t *writer) bytes(name string, content []byte) error {
	if err := t.header(name, int64(len(content))); err != nil {
		return err
	}
	if _, err := t.w.Write(content); err != nil {
		return err
	}
	return t.pad(int64(len(content)))
}

func (t *writer) end() error {
	_, err := t.w.Write(zeros[:])
	return err
}

// blob writes a layer and compares it with its descriptor.
func (t *writer) blob(b Blob) error {
	if err := t.header(blobDir+b.Digest.Encoded(), b.Size); err != nil {
		return err
	}
	r, err := b.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	got, err := t.copy(r, b.Descriptor)
	if err != nil {
		return err
	}
	if got != b.Digest.Encoded() {
		return fmt.Errorf("it is damaged: its content is sha256:%s; pull or build its image again", got)
	}
	return t.pad(b.Size)
}

// copy writes what r has, which must be as long as d says, and returns its digest. The hash is a second goroutine's, which stop ends.
func (t *writer) copy(r io.Reader, d ocispec.Descriptor) (string, error) {
	if t.free == nil {
		t.free, t.full, t.sum = make(chan []byte, depth), make(chan []byte, depth), make(chan string)
		for range depth {
			t.free <- make([]byte, blockSize)
		}
		go func() {
			h := sha256.New()
			for b := range t.full {
				if len(b) == 0 { // the end of a layer
					t.sum <- hex.EncodeToString(h.Sum(nil))
					h.Reset()
					continue
				}
				h.Write(b)
				t.free <- b[:blockSize]
			}
		}()
	}
	var done int64
	var failed error
	for done < d.Size && failed == nil {
		if failed = t.ctx.Err(); failed != nil {
			break
		}
		b := <-t.free
		n, err := io.ReadFull(r, b[:min(blockSize, d.Size-done)])
		if n > 0 {
			// Hashed while it is written: who hashes may still read it when Write returns, so it comes back by free alone.
			t.full <- b[:n]
			_, failed = t.w.Write(b[:n])
			if done += int64(n); t.written != nil {
				t.written(d, done)
			}
		} else {
			t.free <- b
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = fmt.Errorf("it is damaged: %d bytes of %d; pull or build its image again", done, d.Size)
		}
		if failed == nil {
			failed = err
		}
	}
	t.full <- nil
	return <-t.sum, failed
}

// stop ends the goroutine of copy, which has nothing to do when copy is not running.
func (t *writer) stop() {
	if t.full != nil {
		close(t.full)
	}
}
