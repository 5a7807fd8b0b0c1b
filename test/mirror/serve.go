package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
)

// Handler returns a registry (OCI distribution spec, /v2/) that holds the images of the layout in dir under the names they
// were exported by, without their registry's name: what a mirror of docker.io answers. Pushes go to memory and are gone
// with the handler; the layout is only read. requests, if not nil, is called with each request.
func Handler(dir string, requests func(*http.Request)) (http.Handler, error) {
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)),
		registry.WithBlobHandler(&layoutBlobs{dir: dir, pushed: registry.NewInMemoryBlobHandler()}))
	var index ocispec.Index
	if err := disk.ReadJSON(filepath.Join(dir, "index.json"), &index); err != nil {
		return nil, err
	}
	for _, m := range index.Manifests {
		ref, err := image.ParseReference(m.Annotations[refAnnotation])
		if err != nil {
			return nil, fmt.Errorf("serve %s: %w", dir, err)
		}
		raw, err := os.ReadFile(blobPath(dir, m.Digest))
		if err != nil {
			return nil, fmt.Errorf("serve %s: %w", ref, err)
		}
		req := httptest.NewRequest(http.MethodPut, "/v2/"+ref.Path()+"/manifests/"+ref.Tag(), bytes.NewReader(raw))
		req.Header.Set("Content-Type", m.MediaType)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		if w.Code != http.StatusCreated {
			return nil, fmt.Errorf("serve %s: %s", ref, w.Body)
		}
	}
	if requests == nil {
		return h, nil
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests(r)
		h.ServeHTTP(w, r)
	}), nil
}

// layoutBlobs reads the layout's blobs, and keeps pushed ones in memory.
type layoutBlobs struct {
	dir    string
	pushed registry.BlobHandler
}

func (b *layoutBlobs) Stat(ctx context.Context, repo string, h v1.Hash) (int64, error) {
	st, err := os.Stat(filepath.Join(b.dir, "blobs", h.Algorithm, h.Hex))
	if errors.Is(err, fs.ErrNotExist) {
		return b.pushed.(registry.BlobStatHandler).Stat(ctx, repo, h)
	}
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (b *layoutBlobs) Get(ctx context.Context, repo string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(b.dir, "blobs", h.Algorithm, h.Hex))
	if errors.Is(err, fs.ErrNotExist) {
		return b.pushed.Get(ctx, repo, h)
	}
	return f, err
}

func (b *layoutBlobs) Put(ctx context.Context, repo string, h v1.Hash, rc io.ReadCloser) error {
	return b.pushed.(registry.BlobPutHandler).Put(ctx, repo, h, rc)
}
