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

// HistoryItem is a step of an image: Docker's item, and which layer it made.
type HistoryItem struct {
	apii.HistoryResponseItem
	// Layer is the layer's diffID, "" for a step that made none.
	Layer ocispec.Digest
	// SharedWith are the other images here that have the layer: a tag of each, or its short id.
	SharedWith []string
}

// History lists the steps that made an image, newest first. The first item carries the image's id and tags, the others
// "<missing>", since the images between were never kept.
// With a platform it is the image of that platform.
func (e *Engine) History(_ context.Context, name, platform string) ([]HistoryItem, error) {
	s, err := e.analyzer()
	if err != nil {
		return nil, err
	}
	ls := s.Layers
	img, err := findImage(s.Images, name, platform)
	if err != nil {
		return nil, err
	}
	sharers, err := s.Sharers(img)
	if err != nil {
		return nil, err
	}
	ids := img.Layers()
	layer := func(item *HistoryItem) error { // the next one, base first
		if len(ids) == 0 {
			return nil
		}
		info, err := ls.Stat(ids[0])
		if err != nil && !errors.Is(err, layers.ErrNotFound) {
			return fmt.Errorf("history of %s: %w", name, err)
		}
		item.Layer, item.SharedWith, item.Size = ids[0], sharers[ids[0]], info.ContentSize
		ids = ids[1:]
		return nil
	}
	var items []HistoryItem
	add := func(h ocispec.History) error {
		item := HistoryItem{HistoryResponseItem: apii.HistoryResponseItem{ID: "<missing>", Comment: h.Comment, CreatedBy: h.CreatedBy}}
		if h.Created != nil {
			item.Created = unixSeconds(*h.Created)
		}
		if !h.EmptyLayer {
			if err := layer(&item); err != nil {
				return err
			}
		}
		items = append([]HistoryItem{item}, items...)
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
