package build

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// CacheOptions say what of a build's cache travels.
type CacheOptions struct {
	// Max takes the steps of all stages, not only those that the image consists of.
	Max bool
	// Mounts takes cache mounts along.
	Mounts bool

	inline bool // only what is the same on every machine
}

// Cache gathers what a build knows of its steps, with the layers that they need, which are here. The config's Layers have no recipes yet.
// Neither what a step says nor what its keys were made of is in it: build arguments could be read there.
func (x *Export) Cache(ctx context.Context, o CacheOptions) (*CacheConfig, error) {
	c := &CacheConfig{Version: cacheVersion, Keys: version, Records: []CacheRecord{}}
	g := &gathering{x: x, c: c, layers: map[ocispec.Digest]bool{}, seen: map[string]bool{}}
	nodes := x.steps
	if !o.Max {
		nodes = nil
		for n := x.tip; n != nil && n.fixed == nil; n = n.inputs[0] {
			nodes = append([]*node{n}, nodes...)
		}
	}
	byOp := map[string][]*node{} // those whose content records are looked for
	for _, n := range nodes {
		if n.fixed != nil || n.isLeaf() || n.defKey == "" {
			continue
		}
		rec, ok, err := g.definition(ctx, n)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if exact, err := g.exact(ctx, n, rec); err != nil {
			return nil, err
		} else if exact {
			continue
		}
		if n.selects != nil && n.inputs[0].solved {
			if err := g.here(byContent, n.seenKey([]result{n.inputs[0].res})); err != nil {
				return nil, err
			}
		}
		byOp[rec.Kind+"\x00"+string(rec.Layer)] = append(byOp[rec.Kind+"\x00"+string(rec.Layer)], n)
	}
	if len(byOp) > 0 && !o.inline {
		if err := g.contents(byOp); err != nil {
			return nil, err
		}
	}
	if o.Mounts {
		if err := g.mounts(ctx, nodes); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// gathering collects records.
type gathering struct {
	x      *Export
	c      *CacheConfig
	layers map[ocispec.Digest]bool
	seen   map[string]bool
}

// definition adds what is known of a step by its definition. What is only elsewhere, since a hit further on made it needless, is fetched:
// else a cache that is passed on from build to build would lose it.
func (g *gathering) definition(ctx context.Context, n *node) (Record, bool, error) {
	rec, ok, err := g.x.cache.get(byDefinition, n.defKey)
	if err == nil && !ok {
		rec, ok, err = g.x.imports.lookup(ctx, byDefinition, n.defKey, nil)
	}
	if err != nil || !ok {
		return rec, false, err
	}
	return rec, true, g.add(byDefinition, rec)
}

// here adds a record of this machine's cache, if there is one.
func (g *gathering) here(class, key string) error {
	rec, ok, err := g.x.cache.get(class, key)
	if err != nil || !ok {
		return err
	}
	return g.add(class, rec)
}

func (g *gathering) add(class string, rec Record) error {
	if g.seen[class+rec.Key] {
		return nil
	}
	g.seen[class+rec.Key] = true
	g.need(rec.Layer, "")
	g.c.Records = append(g.c.Records, CacheRecord{Class: class, Key: rec.Key, Kind: rec.Kind, Layer: rec.Layer, Created: rec.Created, Took: rec.Took})
	return nil
}

func (g *gathering) need(id ocispec.Digest, recipe string) {
	if id != "" && !g.layers[id] {
		g.layers[id] = true
		g.c.Layers = append(g.c.Layers, CacheLayer{DiffID: id, Recipe: recipe})
	}
}

// exact adds the record by content of a step that stands on a file system alone, of which the key is known without a look at the cache.
func (g *gathering) exact(ctx context.Context, n *node, rec Record) (bool, error) {
	in := make([]result, len(n.inputs))
	for i, input := range n.inputs {
		switch {
		case input.isLeaf():
		case i > 0 || !input.solved || n.selects != nil:
			return false, nil
		default:
			in[i] = input.res
		}
	}
	key, _, err := n.contentKey(ctx, in, "")
	if err != nil {
		return false, err
	}
	rec.Key = key
	return true, g.add(byContent, rec)
}

// contents adds the records by content of steps with a kind and a layer.
func (g *gathering) contents(byOp map[string][]*node) error {
	return walkFiles(g.x.b.Root.Path("buildcache", byContent), func(path string, info fs.FileInfo) error {
		if disk.IsTemp(info.Name()) {
			return nil
		}
		var rec Record
		if err := disk.ReadJSON(path, &rec); err != nil || rec.Key != info.Name() {
			return nil //nolint:nilerr // gone, or torn: a miss
		}
		for _, n := range byOp[rec.Kind+"\x00"+string(rec.Layer)] {
			var op bytes.Buffer
			if json.Compact(&op, rec.Op) == nil && bytes.Equal(op.Bytes(), n.opJSON) {
				return g.here(byContent, rec.Key)
			}
		}
		return nil
	})
}

// mounts adds the cache mounts that the steps use, as layers.
func (g *gathering) mounts(ctx context.Context, nodes []*node) error {
	done := map[string]bool{}
	for _, n := range nodes {
		op, ok := n.op.(runOp)
		if !ok {
			continue
		}
		in := make([]result, len(n.inputs))
		for i, input := range n.inputs {
			in[i] = input.res
		}
		for _, m := range op.Mounts {
			if m.Type != "cache" || m.Input > 0 && !n.inputs[m.Input].solved {
				continue
			}
			name := mountName(m.identity(in))
			if done[name] {
				continue
			}
			done[name] = true
			cm, ok, err := packMount(ctx, g.x.b.Root, g.x.b.Layers, name, m.ID)
			if err != nil {
				return fmt.Errorf("cache mount %s: %w", m.ID, err)
			}
			if ok {
				g.need(cm.Layer, "")
				g.c.Mounts = append(g.c.Mounts, cm)
			}
		}
	}
	return nil
}

// packMount makes a layer of what is in a cache mount, while no step uses it. ok is false when there is no such mount.
func packMount(ctx context.Context, root *disk.Root, ls *layers.Store, name, id string) (m CacheMount, ok bool, err error) {
	dir := root.Path("buildcache", "mount", name)
	l, err := disk.AcquireContext(ctx, dir+".lock")
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err != nil {
		return m, false, err
	}
	defer l.Release()
	f, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return m, false, nil
	}
	if err != nil {
		return m, false, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return m, false, err
	}
	w, err := ls.NewWriter(ctx)
	if err != nil {
		return m, false, err
	}
	defer w.Close() // without effect after Commit
	if err := w.AddTree(f); err != nil {
		return m, false, err
	}
	info, err := w.Commit()
	return CacheMount{Name: name, ID: clip(id), Layer: info.DiffID, UID: st.Uid, GID: st.Gid, Mode: st.Mode & 0o7777}, err == nil, err
}

// Inline puts the cache of the image's own steps into its config, in which an image that is pulled brings it.
func (x *Export) Inline(ctx context.Context) error {
	c, err := x.Cache(ctx, CacheOptions{inline: true})
	if err != nil {
		return err
	}
	have := map[ocispec.Digest]bool{}
	for _, id := range x.Layers {
		have[id] = true
	}
	in := &CacheConfig{Version: c.Version, Keys: c.Keys, Records: []CacheRecord{}}
	for _, r := range c.Records {
		if r.Layer != "" && !have[r.Layer] {
			continue
		}
		// Nothing that is different on another machine.
		if r.Took = 0; x.Epoch != nil {
			r.Created = *x.Epoch
		}
		in.Records = append(in.Records, r)
	}
	x.inline = in
	return x.Replace(x.Image)
}
