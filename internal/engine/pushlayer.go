package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"conex/internal/blobs"
	"conex/internal/compress"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// kindOf tells a layer's compression from its media type, OCI's or Docker's.
func kindOf(mediaType string) compress.Kind {
	switch {
	case strings.HasSuffix(mediaType, "gzip"):
		return compress.Gzip
	case strings.HasSuffix(mediaType, "zstd"):
		return compress.Zstd
	}
	return compress.None
}

// layerType returns the media type of a layer in OCI's or Docker's words; Docker has none for zstd.
func layerType(kind compress.Kind, docker bool) string {
	switch {
	case kind == compress.Zstd:
		return ocispec.MediaTypeImageLayerZstd
	case kind == compress.Gzip && docker:
		return ocispec.MediaTypeDockerLayerGzip
	case kind == compress.Gzip:
		return ocispec.MediaTypeImageLayerGzip
	case docker:
		return ocispec.MediaTypeDockerLayer
	}
	return ocispec.MediaTypeImageLayer
}

// recipe says how conex's own compressor made a blob, so that it can be made again, byte by byte.
func recipe(kind compress.Kind, level int) string { return fmt.Sprintf("%s:%d", kind, level) }

// parseRecipe reads what recipe wrote.
func parseRecipe(s string) (kind compress.Kind, level int, ok bool) {
	k, l, found := strings.Cut(s, ":")
	kind, err := compress.ParseKind(k)
	if !found || err != nil {
		return "", 0, false
	}
	if _, err := fmt.Sscanf(l, "%d", &level); err != nil || compress.CheckLevel(kind, level) != nil {
		return "", 0, false
	}
	return kind, level, true
}

// layer makes the registry have a layer and returns its descriptor there. want is the form that the image's manifest asks for; nil
// leaves the choice of the form.
func (p *pusher) layer(ctx context.Context, id ocispec.Digest, want *ocispec.Descriptor) (ocispec.Descriptor, error) {
	forms, err := p.forms(id, want)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	short := shortDigest(id)
	sent := func(f layers.Blob, action string) (ocispec.Descriptor, error) {
		p.progress.emit(Event{ID: short, Action: action, Current: f.Size, Total: f.Size})
		f.Sources = []string{p.ref.Name()}
		err := p.layers.AddBlob(id, f)
		return ocispec.Descriptor{MediaType: f.MediaType, Digest: f.Digest, Size: f.Size}, err
	}
	for _, f := range forms {
		_, ok, err := p.client.HasBlob(ctx, p.ep, p.ref.Path(), f.Digest)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if ok {
			return sent(f, "Layer already exists")
		}
	}
	for _, f := range forms {
		for _, src := range f.Sources {
			from, ok := strings.CutPrefix(src, p.ref.Domain()+"/")
			if !ok || from == p.ref.Path() {
				continue
			}
			mounted, err := p.client.MountBlob(ctx, p.ep, p.ref.Path(), f.Digest, from)
			if err != nil {
				return ocispec.Descriptor{}, err
			}
			if mounted {
				return sent(f, "Mounted from "+from)
			}
		}
	}
	for _, f := range forms {
		ok, err := p.existing(ctx, id, f)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", f.Digest, err)
		}
		if ok {
			return sent(f, "Pushed")
		}
	}
	kind, level := p.kind, p.level
	if want != nil { // its own form is lost: the same kind, then
		if kind = kindOf(want.MediaType); kind != p.kind {
			level = compress.DefaultLevel(kind)
		}
		for _, f := range forms {
			if k, l, ok := parseRecipe(f.Recipe); ok {
				kind, level = k, l
			}
		}
	}
	f, err := p.compress(ctx, id, kind, level)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", id, err)
	}
	return sent(f, "Pushed")
}

// forms lists the compressed forms in which a layer may be sent, the best first.
func (p *pusher) forms(id ocispec.Digest, want *ocispec.Descriptor) ([]layers.Blob, error) {
	known, err := p.layers.Blobs(id)
	if err != nil {
		return nil, err
	}
	if want != nil {
		for _, f := range known {
			if f.Digest == want.Digest {
				f.MediaType = want.MediaType
				return []layers.Blob{f}, nil
			}
		}
		return []layers.Blob{{Digest: want.Digest, Size: want.Size, MediaType: want.MediaType}}, nil
	}
	return slices.DeleteFunc(known, func(f layers.Blob) bool {
		return kindOf(f.MediaType) != p.kind || p.anew && f.Recipe != recipe(p.kind, p.level)
	}), nil
}

// existing sends a form whose bytes are somewhere: here, as the uncompressed layer itself, or in a registry that it came from. ok is
// false when they are not, or have to be made again by their recipe.
func (p *pusher) existing(ctx context.Context, id ocispec.Digest, f layers.Blob) (ok bool, err error) {
	up := registry.Upload{Digest: f.Digest, Size: f.Size}
	send := func(open func() (io.ReadCloser, error)) (bool, error) {
		up.Open = func() (io.ReadCloser, error) {
			rc, err := open()
			if err != nil {
				return nil, err
			}
			return p.counted(rc, id, f.Size), nil
		}
		return true, p.client.PutBlob(ctx, p.ep, p.ref.Path(), up)
	}
	switch {
	case f.Digest == id:
		return send(func() (io.ReadCloser, error) { return p.tar(id) })
	case p.e.Blobs().Intact(f.Digest, f.Size):
		ok, err := send(func() (io.ReadCloser, error) {
			rc, _, err := p.e.Blobs().Open(f.Digest)
			return rc, err
		})
		if !errors.Is(err, blobs.ErrMismatch) {
			return ok, err
		}
		// Damaged since it was kept. The layer itself is another file; the registry has refused what came.
		if err := p.e.Blobs().Remove(f.Digest); err != nil {
			return false, err
		}
	}
	if _, _, again := parseRecipe(f.Recipe); again {
		return false, nil
	}
	for _, src := range f.Sources {
		from, err := image.ParseReference(src)
		if err != nil || from.Domain() == p.ref.Domain() { // no use: mounting it has failed, or it is gone there
			continue
		}
		open, err := p.fetch(ctx, from, f)
		if err != nil {
			continue // not there any more, or out of reach: the next source, in the end compression, serves as well
		}
		p.progress.emit(Event{ID: shortDigest(id), Action: "Copying from " + src})
		return send(open)
	}
	return false, nil
}

// fetch finds a blob in another registry and returns what reads it from there.
func (p *pusher) fetch(ctx context.Context, from image.Reference, f layers.Blob) (func() (io.ReadCloser, error), error) {
	ep, err := p.client.PushEndpoint(ctx, from.Domain(), from.Path())
	if err != nil {
		return nil, err
	}
	if _, ok, err := p.client.HasBlob(ctx, ep, from.Path(), f.Digest); err != nil || !ok {
		return nil, fmt.Errorf("blob %s is not in %s: %w", f.Digest, from.Name(), blobs.ErrNotFound)
	}
	desc := ocispec.Descriptor{Digest: f.Digest, Size: f.Size}
	return func() (io.ReadCloser, error) { return p.client.Blob(ctx, ep, from.Path(), desc) }, nil
}

// tar opens a layer's tar; the reader verifies.
func (p *pusher) tar(id ocispec.Digest) (io.ReadCloser, error) {
	rc, _, err := p.layers.OpenVerified(id)
	return rc, err
}

// counted shows what is read of a layer.
func (p *pusher) counted(rc io.ReadCloser, id ocispec.Digest, size int64) io.ReadCloser {
	p.progress.emit(Event{ID: shortDigest(id), Action: "Pushing", Total: size})
	return struct {
		io.Reader
		io.Closer
	}{&readCounter{r: rc, tell: func(n int64) {
		p.progress.emit(Event{ID: shortDigest(id), Action: "Pushing", Current: n, Total: size})
	}}, rc}
}

// compress sends a layer that is compressed on the way, and returns what came of it.
func (p *pusher) compress(ctx context.Context, id ocispec.Digest, kind compress.Kind, level int) (layers.Blob, error) {
	info, err := p.layers.Stat(id)
	if err != nil {
		return layers.Blob{}, err
	}
	var sum *summed
	up := registry.Upload{Size: -1, Open: func() (io.ReadCloser, error) {
		rc, err := p.tar(id)
		if err != nil {
			return nil, err
		}
		sum = &summed{rc: squeeze(p.counted(rc, id, info.Size), kind, level), hash: sha256.New()}
		return sum, nil
	}, Sum: func() ocispec.Digest { return sum.digest() }}
	if err := p.client.PutBlob(ctx, p.ep, p.ref.Path(), up); err != nil {
		return layers.Blob{}, err
	}
	return layers.Blob{Digest: sum.digest(), Size: sum.n, MediaType: layerType(kind, false), Recipe: recipe(kind, level)}, nil
}

// summed hashes and counts what is read.
type summed struct {
	rc   io.ReadCloser
	hash hash.Hash
	n    int64
}

func (s *summed) Read(b []byte) (int, error) {
	n, err := s.rc.Read(b)
	s.hash.Write(b[:n])
	s.n += int64(n)
	return n, err
}

func (s *summed) Close() error { return s.rc.Close() }

func (s *summed) digest() ocispec.Digest {
	return ocispec.Digest("sha256:" + hex.EncodeToString(s.hash.Sum(nil)))
}

// squeeze reads r compressed. Its goroutine ends before Close returns, which closes r.
func squeeze(r io.ReadCloser, kind compress.Kind, level int) io.ReadCloser {
	pr, pw := io.Pipe()
	s := &squeezed{PipeReader: pr, src: r, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		z, err := compress.NewWriter(pw, kind, level)
		if err == nil {
			_, err = io.Copy(z, struct{ io.Reader }{r})
			if cerr := z.Close(); err == nil {
				err = cerr
			}
		}
		pw.CloseWithError(err) // nil is io.EOF
	}()
	return s
}

type squeezed struct {
	*io.PipeReader
	src  io.ReadCloser
	done chan struct{}
}

// Close ends the compression, if need be in the middle.
func (s *squeezed) Close() error {
	s.PipeReader.Close() // never fails, says package io
	<-s.done
	return s.src.Close()
}

// config makes the registry have an image's config.
func (p *pusher) config(ctx context.Context, img image.Image) error {
	_, ok, err := p.client.HasBlob(ctx, p.ep, p.ref.Path(), img.ID)
	if err != nil || ok {
		return err
	}
	for _, name := range img.RepoDigests {
		from, err := image.ParseReference(name)
		if err != nil || from.Domain() != p.ref.Domain() || from.Path() == p.ref.Path() {
			continue
		}
		if mounted, err := p.client.MountBlob(ctx, p.ep, p.ref.Path(), img.ID, from.Path()); err != nil || mounted {
			return err
		}
	}
	return p.client.PutBlob(ctx, p.ep, p.ref.Path(), registry.Upload{Digest: img.ID, Size: int64(len(img.RawConfig)), Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(img.RawConfig)), nil
	}})
}
