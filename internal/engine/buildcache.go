package engine

import (
	"context"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/build"
	"conex/internal/disk"
	"conex/internal/ocispec"
)

// CacheItem is one thing of the build cache, in the terms of buildx du.
type CacheItem struct {
	ID string
	// Type is BuildKit's word for it: regular, exec.cachemount, source.local, source.git.checkout, source.http, internal; Kind is conex's.
	Type, Kind, Description string
	// Shared says that an image or container has the layer too; Reclaimable, that a prune may take it now.
	Shared, Reclaimable, Mutable bool
	// Size is what it takes on the disk, with a layer that an image has counted in full.
	Size              int64
	Created, LastUsed time.Time
}

// cacheTypes are BuildKit's words for what conex keeps.
var cacheTypes = map[string]string{
	build.KindMount: "exec.cachemount", build.KindContext: "source.local", build.KindFiles: "internal", build.KindDamaged: "internal",
	build.KindTree: "source.git.checkout", build.KindURL: "source.http",
}

// CacheUsage lists the build cache, what was used last first, as far as it fits all filters: id, type, description (a part or, between
// slashes, a regular expression), until or unused-for, shared, private, reclaimable, inuse, mutable, immutable.
func (e *Engine) CacheUsage(_ context.Context, filters map[string][]string) ([]CacheItem, error) {
	ok, err := cacheFilter(filters)
	if err != nil {
		return nil, err
	}
	entries, err := build.Entries(e.root, &disk.Meter{})
	if err != nil {
		return nil, err
	}
	own, err := e.cacheLayerSize()
	if err != nil {
		return nil, err
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	var list []CacheItem
	for _, en := range slices.Backward(entries) {
		if en.Kind == build.KindHistory {
			continue
		}
		it := cacheItem(e.root, en)
		if en.Layer != "" {
			it.Shared = own(en.Layer) == 0
			it.Size += e.layersSize(ls, []ocispec.Digest{en.Layer})
		}
		if ok(it) {
			list = append(list, it)
		}
	}
	return list, nil
}

func cacheItem(root *disk.Root, en build.Entry) CacheItem {
	it := CacheItem{ID: en.ID, Type: cacheTypes[en.Kind], Kind: en.Kind, Description: en.Title, Size: en.Space.Disk, Created: en.Created, LastUsed: en.Used, Reclaimable: true}
	switch en.Kind {
	case build.KindMount:
		it.Mutable = true
		it.Reclaimable = !disk.Held(en.Paths[0] + ".lock")
	case build.KindContext, build.KindFiles:
		it.Description = map[string]string{build.KindContext: "hashes of a context's files", build.KindFiles: "list of the files that a step read"}[en.Kind]
	case build.KindDamaged:
		it.Description = "a record that can't be read"
	}
	if it.Type == "" {
		it.Type = "regular"
	}
	if it.Description == "" {
		it.Description = map[string]string{build.KindMount: "cache mount", build.KindTree: "files of a fetched repository or archive", build.KindURL: "a fetched file"}[en.Kind]
	}
	return it
}

// cacheFilter makes a test of du's and prune's filters.
func cacheFilter(filters map[string][]string) (func(CacheItem) bool, error) {
	var tests []func(CacheItem) bool
	add := func(t func(CacheItem) bool) { tests = append(tests, t) }
	flags := map[string]func(CacheItem) bool{
		"shared": func(i CacheItem) bool { return i.Shared }, "private": func(i CacheItem) bool { return !i.Shared },
		"mutable": func(i CacheItem) bool { return i.Mutable }, "immutable": func(i CacheItem) bool { return !i.Mutable },
		"reclaimable": func(i CacheItem) bool { return i.Reclaimable }, "inuse": func(i CacheItem) bool { return !i.Reclaimable },
	}
	for key, vals := range filters {
		if is := flags[key]; is != nil {
			for _, v := range vals {
				want, err := strconv.ParseBool(v)
				if err != nil && v != "" {
					return nil, invalid("invalid filter '%s=%s'", key, v)
				}
				add(func(i CacheItem) bool { return is(i) == (want || v == "") })
			}
			continue
		}
		switch key {
		case "until", "unused-for":
			for _, v := range vals {
				t, err := parseUntil(v, time.Now())
				if err != nil {
					return nil, invalid("invalid filter '%s=%s': %w", key, v, err)
				}
				add(func(i CacheItem) bool { return i.LastUsed.Before(t) })
			}
		case "id":
			add(func(i CacheItem) bool {
				return slices.ContainsFunc(vals, func(v string) bool { return strings.HasPrefix(i.ID, v) })
			})
		case "type":
			add(func(i CacheItem) bool {
				return slices.ContainsFunc(vals, func(v string) bool { return v == i.Type || v == i.Kind })
			})
		case "description":
			for _, v := range vals {
				if len(v) < 2 || v[0] != '/' || v[len(v)-1] != '/' {
					add(func(i CacheItem) bool { return strings.Contains(i.Description, v) })
					continue
				}
				re, err := regexp.Compile(v[1 : len(v)-1])
				if err != nil {
					return nil, invalid("invalid filter 'description=%s': %w", v, err)
				}
				add(func(i CacheItem) bool { return re.MatchString(i.Description) })
			}
		default:
			return nil, invalid("invalid filter '%s'", key)
		}
	}
	return func(i CacheItem) bool {
		return !slices.ContainsFunc(tests, func(t func(CacheItem) bool) bool { return !t(i) })
	}, nil
}

// cacheGone lists what is in the cache no more.
func (e *Engine) cacheGone(ctx context.Context, before []CacheItem) ([]CacheItem, error) {
	after, err := e.CacheUsage(ctx, nil)
	gone := []CacheItem{}
	for _, it := range before {
		if !slices.ContainsFunc(after, func(o CacheItem) bool { return o.ID == it.ID }) {
			gone = append(gone, it)
		}
	}
	return gone, err
}

// cachePrune says what a request lets stay of the build cache.
func (e *Engine) cachePrune(req *PruneRequest) (build.PruneOptions, error) {
	o := build.PruneOptions{Keep: req.KeepStorage}
	var err error
	if len(req.Filters) > 0 {
		test, err := cacheFilter(req.Filters)
		if err != nil {
			return o, err
		}
		own, err := e.cacheLayerSize()
		if err != nil {
			return o, err
		}
		o.Only = func(en build.Entry) bool {
			it := cacheItem(e.root, en)
			it.Shared = en.Layer != "" && own(en.Layer) == 0
			return test(it)
		}
	}
	if req.MaxUsed > 0 || req.MinFree > 0 || o.Keep > 0 {
		if o.LayerSize, err = e.cacheLayerSize(); err != nil {
			return o, err
		}
	}
	if req.MaxUsed <= 0 && req.MinFree <= 0 {
		return o, nil
	}
	stay := int64(math.MaxInt64)
	if req.MaxUsed > 0 {
		stay = req.MaxUsed
	}
	if free, _, err := disk.Free(e.root.Path()); err != nil {
		return o, err
	} else if free < req.MinFree {
		entries, err := build.Entries(e.root, &disk.Meter{})
		if err != nil {
			return o, err
		}
		var used int64
		for _, en := range entries {
			if en.Kind == build.KindHistory {
				continue
			}
			used += en.Space.Disk
			if en.Layer != "" {
				used += o.LayerSize(en.Layer)
			}
		}
		stay = min(stay, max(1, used-(req.MinFree-free))) // 1: nothing
	}
	o.Keep = max(stay, req.KeepStorage)
	return o, nil
}
