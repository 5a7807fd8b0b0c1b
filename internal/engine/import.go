package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"conex/internal/collect"
	"conex/internal/compress"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"

	mevents "github.com/moby/moby/api/types/events"
)

// ImportRequest asks to make an image of one layer from a tar.
type ImportRequest struct {
	// Source is a file, an http(s) URL, or "-" for Stdin: a tar, plain or compressed with gzip, zstd or bzip2.
	Source string
	// Stdin is read when Source is "-".
	Stdin io.Reader
	// Reference is the tag for the image; "" leaves it untagged.
	Reference string
	// Message becomes the comment in the image's history; "" says where it came from.
	Message string
	// Platform is os[/arch[/variant]]; "" is this machine's.
	Platform string
	// Changes are Dockerfile instructions (CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR) for
	// the image's config.
	Changes []string
	// Progress receives events.
	Progress Progress
}

// Import makes an image of one layer from a tar and returns its id. After an error nothing is left.
func (e *Engine) Import(ctx context.Context, req ImportRequest) (id string, err error) {
	var ref image.Reference
	if req.Reference != "" {
		if ref, err = image.ParseReference(req.Reference); err != nil {
			return "", classify(err)
		}
		if ref.Digest() != "" {
			return "", invalid("cannot import digest reference")
		}
	}
	plat, err := registry.ParsePlatform(req.Platform)
	if err != nil {
		return "", &kindError{ErrInvalid, err}
	}
	var c ocispec.Image
	c.Platform = plat
	if err := dockerfile.ApplyChanges(&c.Config, req.Changes); err != nil {
		return "", &kindError{ErrInvalid, err}
	}
	images, err := e.Images()
	if err != nil {
		return "", err
	}
	ls, err := e.Layers()
	if err != nil {
		return "", err
	}
	if err := e.root.Sweep(); err != nil { // as in Pull
		return "", err
	}
	src, err := openSource(ctx, req)
	if err != nil {
		return "", err
	}
	defer src.Close()
	lease, err := collect.Hold(e.root)
	if err != nil {
		return "", err
	}
	defer func() {
		if cerr := e.closeLease(ctx, lease); err == nil {
			err = cerr
		}
	}()
	counted := &readCounter{r: src, tell: func(n int64) { req.Progress.emit(Event{Action: "Importing", Current: n}) }}
	r, _, err := compress.Reader(counted)
	if err != nil {
		return "", fmt.Errorf("import %s: %w", req.Source, err)
	}
	defer r.Close()
	info, err := ls.Claiming(lease.Claim).Import(ctx, r, "")
	if err != nil {
		return "", fmt.Errorf("import %s: %w", req.Source, err)
	}
	if err := ls.Sync(info.DiffID); err != nil {
		return "", err
	}
	now := time.Now().UTC()
	c.Created = &now
	c.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []ocispec.Digest{info.DiffID}}
	if req.Message == "" {
		req.Message = "Imported from " + req.Source
	}
	c.History = []ocispec.History{{Created: &now, Comment: req.Message}}
	raw, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("import %s: encode config: %w", req.Source, err)
	}
	var refs []image.Reference
	if !ref.IsZero() {
		refs = append(refs, ref)
	}
	img, err := images.AddTagged(ctx, raw, "", "", "", refs...)
	if err != nil {
		return "", err
	}
	e.afterWrite(ctx, 0)
	e.imageEvent(mevents.ActionImport, string(img.ID), string(img.ID), c.Config.Labels)
	return string(img.ID), nil
}

// openSource opens what the request names.
func openSource(ctx context.Context, req ImportRequest) (io.ReadCloser, error) {
	switch {
	case req.Source == "-":
		if req.Stdin == nil {
			return nil, errors.New("import from standard input: there is none")
		}
		return io.NopCloser(endable(ctx, req.Stdin)), nil
	case strings.HasPrefix(req.Source, "http://"), strings.HasPrefix(req.Source, "https://"):
		hr, err := http.NewRequestWithContext(ctx, http.MethodGet, req.Source, nil)
		if err != nil {
			return nil, fmt.Errorf("import: %w", err)
		}
		req.Progress.emit(Event{Message: "Downloading from " + req.Source})
		resp, err := http.DefaultClient.Do(hr)
		if err != nil {
			return nil, fmt.Errorf("import: %w", err)
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
			return nil, fmt.Errorf("import %s: the server answers %s", req.Source, resp.Status)
		}
		return resp.Body, nil
	}
	return os.Open(req.Source)
}
