package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"conex/internal/layers"
	"conex/internal/ocispec"

	apii "github.com/moby/moby/api/types/image"
)

// History lists the steps that made an image, newest first. The first item carries the image's id and tags, the others
// "<missing>", since the images between were never kept.
func (e *Engine) History(_ context.Context, name string) ([]apii.HistoryResponseItem, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	img, err := images.Resolve(name)
	if err != nil {
		return nil, classify(err)
	}
	ids := img.Layers()
	size := func() (int64, error) { // of the next layer, base first
		if len(ids) == 0 {
			return 0, nil
		}
		info, err := ls.Stat(ids[0])
		if err != nil && !errors.Is(err, layers.ErrNotFound) {
			return 0, fmt.Errorf("history of %s: %w", name, err)
		}
		ids = ids[1:]
		return info.ContentSize, nil
	}
	var items []apii.HistoryResponseItem
	add := func(h ocispec.History) error {
		item := apii.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}
		if h.Created != nil {
			item.Created = unixSeconds(*h.Created)
		}
		if !h.EmptyLayer {
			var err error
			if item.Size, err = size(); err != nil {
				return err
			}
		}
		items = append([]apii.HistoryResponseItem{item}, items...)
		return nil
	}
	for _, h := range img.Config.History {
		if err := add(h); err != nil {
			return nil, err
		}
	}
	for len(ids) > 0 { // layers that the history doesn't tell of
		if err := add(ocispec.History{Created: img.Config.Created}); err != nil {
			return nil, err
		}
	}
	if len(items) > 0 {
		items[0].ID, items[0].Tags = string(img.ID), img.RepoTags
	}
	return items, nil
}

// unixSeconds returns t in seconds since 1970, 0 for the zero time.
func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
