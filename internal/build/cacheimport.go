package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/safepath"
	"conex/internal/volume"

	"golang.org/x/sys/unix"
)

// CacheSource is a place with the results of builds elsewhere, --cache-from. It is asked when a step is not known here.
type CacheSource struct {
	// Name is how it is shown: "registry.example.com/app:cache".
	Name string
	// Mounts says that cache mounts which are not here are taken from it.
	Mounts bool
	// Load reads the manifest and the config, verified. It is called once a build, when something is first looked for.
	Load func(ctx context.Context) (manifest, config []byte, err error)
	// Fetch makes a layer be in the store of layers, which verifies it. recipe says how its blob was made, if that is known.
	Fetch func(ctx context.Context, blob ocispec.Descriptor, layer ocispec.Digest, recipe string, progress func(current, total int64)) error
}

// maxFetches is how many layers are fetched at a time.
const maxFetches = 4

// importer looks for steps in caches that are elsewhere. Nothing is asked before something is missing here, and no layer is fetched
// before a step is found to have it.
type importer struct {
	sources []CacheSource
	journal *journal
	layers  *layers.Store

	once  sync.Once
	found []*remoteCache // by source; nil where it could not be read
	slots chan struct{}

	mu      sync.Mutex
	fetches map[fetchKey]*fetch
}

// fetchKey is a layer of a source: another one may have it where the first has lied.
type fetchKey struct {
	source int
	id     ocispec.Digest
}

// fetch is a layer on its way, or what became of it.
type fetch struct {
	done chan struct{}
	err  error
	told bool // the user knows of err
}

// newImporter returns nil when there is nowhere to look.
func newImporter(b *Builder, req *Request, j *journal) *importer {
	if len(req.CacheFrom) == 0 {
		return nil
	}
	return &importer{sources: req.CacheFrom, journal: j, layers: b.Layers, slots: make(chan struct{}, maxFetches), fetches: map[fetchKey]*fetch{}}
}

// load reads all sources at once. One that can't be read is told of and not asked again: the build goes on without it, as in BuildKit.
func (i *importer) load(ctx context.Context) {
	i.once.Do(func() {
		i.found = make([]*remoteCache, len(i.sources))
		var wg sync.WaitGroup
		for k, s := range i.sources {
			v := i.journal.vertex("", "importing cache manifest from "+s.Name)
			v.start()
			wg.Go(func() {
				manifest, config, err := s.Load(ctx)
				if err == nil {
					i.found[k], err = decodeCache(manifest, config)
				}
				switch {
				case ctx.Err() != nil:
					v.end(Canceled, "", nil)
				case err != nil:
					v.end(Failed, "", err)
				default:
					v.end(Done, "", nil)
				}
			})
		}
		wg.Wait()
	})
}

// lookup finds a record and makes its layer be here. v shows what is fetched. A layer that can't be had is a miss that is told of.
func (i *importer) lookup(ctx context.Context, class, key string, v *vertex) (Record, bool, error) {
	if i == nil {
		return Record{}, false, nil
	}
	i.load(ctx)
	for k, c := range i.found {
		if c == nil {
			continue
		}
		r, ok := c.records[class+"/"+key]
		if !ok {
			continue
		}
		if r.Layer != "" {
			if err := i.fetch(ctx, k, r.Layer, v); err != nil {
				if ctx.Err() != nil {
					return Record{}, false, ctx.Err()
				}
				i.tell(fetchKey{k, r.Layer}, err)
				continue
			}
		}
		return Record{
			Key: key, Kind: r.Kind, Layer: r.Layer, Created: r.Created.UTC(), Took: r.Took, Import: i.sources[k].Name,
		}, true, nil
	}
	return Record{}, false, ctx.Err()
}

// tell warns of a layer that can't be had, once.
func (i *importer) tell(key fetchKey, err error) {
	i.mu.Lock()
	f := i.fetches[key]
	told := f != nil && f.told
	if f != nil {
		f.told = true
	}
	i.mu.Unlock()
	if !told {
		i.journal.emit(Event{Kind: Warning, Text: fmt.Sprintf("cache %s: %v", i.sources[key.source].Name, err)})
	}
}

// has reports whether a source has a record.
func (i *importer) has(ctx context.Context, class, key string) bool {
	if i == nil {
		return false
	}
	i.load(ctx)
	for _, c := range i.found {
		if c == nil {
			continue
		}
		if _, ok := c.records[class+"/"+key]; ok {
			return true
		}
	}
	return false
}

// fetch makes a layer of a source be here. Whoever asks second waits for the first.
func (i *importer) fetch(ctx context.Context, source int, id ocispec.Digest, v *vertex) error {
	if err := i.layers.Claim(id); err != nil {
		return err
	}
	if _, err := i.layers.Stat(id); err == nil || !errors.Is(err, layers.ErrNotFound) {
		return err
	}
	i.mu.Lock()
	key := fetchKey{source, id}
	f, other := i.fetches[key]
	if !other {
		f = &fetch{done: make(chan struct{})}
		i.fetches[key] = f
	}
	i.mu.Unlock()
	if other {
		select {
		case <-f.done:
			return f.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer close(f.done)
	select {
	case i.slots <- struct{}{}:
		defer func() { <-i.slots }()
	case <-ctx.Done():
		f.err = ctx.Err()
		return f.err
	}
	progress := func(current, total int64) {}
	if v != nil {
		v.start()
		progress = v.progress
	}
	c := i.found[source]
	f.err = i.sources[source].Fetch(ctx, c.blobs[id], id, c.recipes[id], progress)
	return f.err
}

// mount fills the new folder of a cache mount with what a source has of it. ok is false when none has.
func (i *importer) mount(ctx context.Context, name, dir string, v *vertex) (ok bool, err error) {
	if i == nil {
		return false, nil
	}
	any := false
	for _, s := range i.sources {
		any = any || s.Mounts
	}
	if !any {
		return false, nil
	}
	i.load(ctx)
	for k, c := range i.found {
		if c == nil || !i.sources[k].Mounts {
			continue
		}
		m, have := c.mounts[name]
		if !have {
			continue
		}
		if err := i.fetch(ctx, k, m.Layer, v); err != nil {
			return false, fmt.Errorf("cache %s: %w", i.sources[k].Name, err)
		}
		return true, fillMount(ctx, i.layers, m, dir)
	}
	return false, nil
}

// fillMount copies a layer into the folder of a cache mount. Devices are left out.
func fillMount(ctx context.Context, ls *layers.Store, m CacheMount, dir string) error {
	lower, err := ls.Lower(ctx, []ocispec.Digest{m.Layer})
	if err != nil {
		return err
	}
	src, err := safepath.OpenRoot(lower[len(lower)-1])
	if err != nil {
		return err
	}
	defer src.Close()
	tree, err := safepath.Open(src, "/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer tree.Close()
	if err := volume.MergeTree(ctx, dir, tree, volume.MergeOptions{NoDevices: true}); err != nil {
		return err
	}
	mode := m.Mode & 0o7777
	if mode == 0 { // a tar that says it itself
		var st unix.Stat_t
		if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
			return err
		}
		m.UID, m.GID, mode = st.Uid, st.Gid, st.Mode&0o7777
	}
	if err := os.Chown(dir, int(m.UID), int(m.GID)); err != nil {
		return err
	}
	return unix.Chmod(dir, mode)
}

// find asks the cache here, then those elsewhere, whose records are kept.
func (s *solver) find(ctx context.Context, class, key string, n *node) (Record, bool, error) {
	rec, ok, err := s.cache.get(class, key)
	if err != nil || ok {
		return rec, ok, err
	}
	rec, ok, err = s.imports.lookup(ctx, class, key, n.vertex)
	if err != nil || !ok {
		return rec, false, err
	}
	rec.Op, rec.Title = n.opJSON, n.title
	n.imported = rec.Import
	return rec, true, s.cache.put(class, rec)
}
