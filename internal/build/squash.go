package build

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"conex/internal/ocispec"
)

// What --squash makes one layer of.
const (
	SquashNew = "new" // what the build added to its base
	SquashAll = "all" // everything
)

// squash replaces layers by one that shows the same.
func (x *Export) squash(ctx context.Context, mode string) error {
	base := x.Base
	switch mode {
	case "":
		return nil
	case SquashAll:
		base = 0
	case SquashNew:
	default:
		return fmt.Errorf("--squash=%s: it is %q or %q", mode, SquashNew, SquashAll)
	}
	added := x.Layers[base:]
	if len(added) < 2 {
		return nil
	}
	return x.Step("squashing "+plural(len(added), "layer"), func(func(current, total int64)) (string, error) {
		layer, err := x.derived(ctx, "squash", append(slices.Clone(x.Layers[:base]), added...), fmt.Sprint(base), func() (ocispec.Digest, error) {
			info, err := x.b.Layers.Squash(ctx, x.Layers[:base], added)
			return info.DiffID, err
		})
		if err != nil {
			return "", err
		}
		img := x.Image
		img.RootFS.DiffIDs = slices.Clone(x.Layers[:base])
		img.History = nil
		left := base // of the history's layers that stay
		for _, h := range x.Image.History {
			if !h.EmptyLayer {
				if h.EmptyLayer = left <= 0; !h.EmptyLayer {
					left--
				}
			}
			img.History = append(img.History, h)
		}
		last := ocispec.History{Created: x.Image.Created, Comment: "squashed " + plural(len(added), "layer"), CreatedBy: "SQUASH", EmptyLayer: layer == ""}
		img.History = append(img.History, last)
		if layer != "" {
			img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, layer)
		}
		x.Base = base
		return string(layer), x.Replace(img)
	})
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// Rewritten is the same result with times that are later than SOURCE_DATE_EPOCH set to it, in all layers but the base's.
func (x *Export) Rewritten(ctx context.Context) (*Export, error) {
	if x.Epoch == nil {
		return nil, errors.New("there is no SOURCE_DATE_EPOCH to set times to")
	}
	out := *x
	if len(x.Layers) == x.Base {
		return &out, nil
	}
	title := fmt.Sprintf("rewriting layers with source-date-epoch %d", x.Epoch.Unix())
	err := x.Step(title, func(progress func(current, total int64)) (string, error) {
		img := x.Image
		img.RootFS.DiffIDs = slices.Clone(x.Layers)
		done := map[ocispec.Digest]ocispec.Digest{}
		for i, id := range x.Layers[x.Base:] {
			layer, ok := done[id]
			if !ok {
				var err error
				layer, err = x.derived(ctx, "rewrite", []ocispec.Digest{id}, fmt.Sprint(x.Epoch.Unix()), func() (ocispec.Digest, error) {
					return x.b.clamp(ctx, id, *x.Epoch)
				})
				if err != nil {
					return "", err
				}
				done[id] = layer
			}
			img.RootFS.DiffIDs[x.Base+i] = layer
			progress(int64(i+1), int64(len(x.Layers)-x.Base))
		}
		return "", out.Replace(img)
	})
	return &out, err
}

// derived is a layer that make computes of others, from the cache if it was made before.
func (x *Export) derived(ctx context.Context, kind string, from []ocispec.Digest, how string, make func() (ocispec.Digest, error)) (ocispec.Digest, error) {
	op, err := json.Marshal(how)
	if err != nil {
		return "", err
	}
	in := result{layers: from}
	key := keyOf(byContent, kind, op, []string{in.key()})
	rec, hit, err := x.cache.get(byContent, key)
	if err != nil {
		return "", err
	}
	if !hit {
		begun := time.Now()
		layer, err := make()
		if err != nil {
			return "", err
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
		rec = Record{Key: key, Kind: kind, Op: op, Inputs: []string{in.key()}, Layer: layer, Created: begun.UTC(), Took: time.Since(begun)}
		if err := x.cache.put(byContent, rec); err != nil {
			return "", err
		}
	}
	if rec.Layer == "" {
		return "", nil
	}
	return rec.Layer, x.b.Layers.Sync(rec.Layer)
}

// clamp copies a layer with no time later than when.
func (b *Builder) clamp(ctx context.Context, id ocispec.Digest, when time.Time) (_ ocispec.Digest, err error) {
	src, _, err := b.Layers.OpenVerified(id)
	if err != nil {
		return "", err
	}
	defer src.Close()
	w, err := b.Layers.NewWriter(ctx)
	if err != nil {
		return "", err
	}
	defer w.Close() // without effect after Commit
	tr := tar.NewReader(src)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", fmt.Errorf("read layer %s: %w", id, err)
		}
		if h.ModTime.After(when) {
			h.ModTime = when
		}
		if err := w.WriteEntry(h, tr); err != nil {
			return "", fmt.Errorf("rewrite layer %s: %w", id, err)
		}
	}
	if _, err := io.Copy(io.Discard, src); err != nil {
		return "", fmt.Errorf("read layer %s: %w", id, err)
	}
	info, err := w.Commit()
	return info.DiffID, err
}
