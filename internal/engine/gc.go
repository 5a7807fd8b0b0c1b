package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/config"
	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/ocispec"
)

// What conex keeps without being asked to, and may drop to stay within its bounds ([gc] in the configuration), is called the stock:
// compressed layers, parts of blobs that nobody fetches at present, the build cache with the layers that nothing else holds, and layers
// that nothing uses. Never in it is what a container, an image (with a tag or without) or a live lease uses.
//
//	gc.json        stock: an estimate that is too high rather than too low, so that nobody has to walk the store to see that all is well
//	gc.json.lock   flock: guards it
//	gc.json.run    flock: one process collects at a time

// stock is gc.json.
type stock struct {
	// Used is what the stock takes, in bytes: exact after a collection, plus what was written since.
	Used int64 `json:"used"`
	// Fixed says that the last collection found nothing more to drop, and nothing was written since.
	Fixed bool `json:"fixed,omitempty"`
}

// headroom is the part of the budget that a collection leaves free, so that not every build collects again.
const headroom = 0.1

func (e *Engine) stockPath() string { return e.root.Path("gc.json") }

// afterWrite is to be called when something was stored or became unused, with the bytes that it takes at most (0: nothing, a look at the
// free space alone). It collects if a bound is crossed: a statfs and one small file in the usual case. It returns no error, since what
// the caller has done is done: what can't be collected now is when the next one comes by, and system check says why.
func (e *Engine) afterWrite(ctx context.Context, wrote int64) {
	if !e.cfg.GC.On() {
		return
	}
	free, total, err := disk.Free(e.root.Path())
	if err != nil {
		return
	}
	budget, minFree := e.cfg.GC.Limits(total)
	if wrote == 0 && free >= minFree {
		return
	}
	st, err := e.addStock(wrote)
	if err != nil || st.Used <= budget && free >= minFree || st.Fixed {
		return
	}
	_, _ = e.collect(context.WithoutCancel(ctx), budget, minFree, time.Time{}) // see above
}

// addStock counts what was written, and reads the estimate.
func (e *Engine) addStock(wrote int64) (stock, error) {
	var st stock
	if wrote == 0 {
		err := disk.ReadJSON(e.stockPath(), &st)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return st, err
	}
	err := disk.Update(e.stockPath(), 0o600, disk.Volatile, func(old []byte) ([]byte, error) {
		if err := json.Unmarshal(old, &st); err != nil {
			st = stock{} // none yet, or cut short by a power loss: the next collection counts anew
		}
		st.Used, st.Fixed = st.Used+wrote, false
		return json.Marshal(st)
	})
	return st, err
}

// forgoable is one thing of the stock.
type forgoable struct {
	size int64
	used time.Time
	// rank is the order in which kinds go, the lowest first.
	rank int
	blob ocispec.Digest                          // a compressed layer, which the sweep takes
	drop func(ctx context.Context) (bool, error) // anything else
}

// Ranks of forgoable, in the order in which they go.
const (
	rankFetchable = iota // compressed layers that a registry has
	rankDownload         // parts of blobs
	rankCache            // cached steps and cache mounts, by last use
	rankBlob             // compressed layers of archives: when they are gone a push has another digest
)

// collect drops what is unused, and of the stock as much as it takes to stay within budget and to have minFree bytes free, nothing that was
// used at before or later unless that is zero. It returns what came free. While another process collects it does nothing.
func (e *Engine) collect(ctx context.Context, budget, minFree int64, before time.Time) (freed int64, err error) {
	run, err := disk.TryAcquire(e.root.Path("gc.json.run"))
	if errors.Is(err, disk.ErrLocked) {
		return 0, nil
	}
	if err != nil && !noSpace(err) { // for want of room it goes without: two at a time do double work, no harm
		return 0, err
	}
	defer run.Release()
	list, used, err := e.stock(ctx)
	if errors.Is(err, errDeferred) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	free, _, err := disk.Free(e.root.Path())
	if err != nil {
		return 0, err
	}
	need := minFree - free
	if used > budget {
		need = max(need, used-int64(float64(budget)*(1-headroom)))
	}
	slices.SortStableFunc(list, func(a, b forgoable) int { return cmp.Or(cmp.Compare(a.rank, b.rank), a.used.Compare(b.used)) })
	drop := map[ocispec.Digest]bool{}
	var dropped int64
	kept := false
	for _, f := range list {
		if dropped >= need || !before.IsZero() && !f.used.Before(before) {
			kept = true
			continue
		}
		if f.drop == nil {
			drop[f.blob] = true
		} else if ok, err := f.drop(ctx); err != nil {
			return 0, err
		} else if !ok {
			continue
		}
		dropped += f.size
	}
	if _, err := e.sweepForms(ctx, func(d ocispec.Digest) bool { return !drop[d] }); err != nil {
		return 0, err
	}
	after, _, err := disk.Free(e.root.Path())
	if err != nil {
		return 0, err
	}
	raw, err := json.Marshal(stock{Used: max(0, used-dropped), Fixed: !kept})
	if err != nil {
		return 0, err
	}
	l, err := disk.Acquire(e.stockPath() + ".lock")
	if err != nil {
		return 0, err
	}
	defer l.Release()
	return max(0, after-free), disk.WriteFile(e.stockPath(), raw, 0o600, disk.Volatile)
}

// errDeferred says that an open lease would keep a sweep from doing anything.
var errDeferred = errors.New("an open lease protects everything")

// layersSize adds up what layers take.
func (e *Engine) layersSize(ls *layers.Store, ids []ocispec.Digest) int64 {
	var n int64
	for _, id := range distinct(ids) {
		if info, err := ls.Peek(id); err == nil { // else it is gone
			n += info.DiskSize
		}
	}
	return n
}

// cacheLayerSize returns what layers take that neither image, container nor lease has, by their digests.
func (e *Engine) cacheLayerSize() (func(ocispec.Digest) int64, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	marks, _, err := collect.Marks(e.stores(images, ls), e.markContainers, e.markMounts)
	return func(d ocispec.Digest) int64 {
		if marks[d] {
			return 0
		}
		return e.layersSize(ls, []ocispec.Digest{d})
	}, err
}

// stock lists what may be dropped, and what all of it takes. Layers that nothing uses at all are in the sum alone: each sweep takes them.
func (e *Engine) stock(ctx context.Context) (list []forgoable, used int64, err error) {
	images, err := e.Images()
	if err != nil {
		return nil, 0, err
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, 0, err
	}
	marks, open, err := collect.Marks(e.stores(images, ls), e.markContainers, e.markMounts)
	if err != nil {
		return nil, 0, err
	}
	if open {
		return nil, 0, errDeferred
	}
	var m disk.Meter
	names, err := os.ReadDir(e.root.Path("layers"))
	if err != nil {
		return nil, 0, err
	}
	sizes := map[ocispec.Digest]int64{} // of layers that neither image, container nor lease has
	for _, d := range names {
		id := ocispec.Digest("sha256:" + d.Name())
		if ocispec.Validate(id) != nil {
			continue
		}
		if !marks[id] {
			info, err := ls.Peek(id)
			if err != nil {
				continue // damaged or going away
			}
			sizes[id] = info.DiskSize
			used += info.DiskSize
		}
		forms, err := ls.Blobs(id)
		if err != nil || e.cfg.KeepBlobs == config.KeepAlways {
			continue
		}
		for _, b := range forms {
			info, err := os.Lstat(e.root.Path("blobs", "sha256", b.Digest.Encoded()))
			if err != nil || marks[b.Digest] {
				continue
			}
			f := forgoable{size: disk.Allocated(info), used: info.ModTime(), rank: rankBlob, blob: b.Digest}
			if len(b.Sources) > 0 {
				f.rank = rankFetchable
			}
			used += f.size
			list = append(list, f)
		}
	}
	downloads, err := e.Blobs().Downloads()
	if err != nil {
		return nil, 0, err
	}
	for _, p := range downloads {
		if disk.Held(e.root.Path("downloads", p.Digest.Encoded()+".lock")) || marks[p.Digest] {
			continue
		}
		used += p.DiskSize
		list = append(list, forgoable{size: p.DiskSize, used: p.Used, rank: rankDownload,
			drop: func(context.Context) (bool, error) { return true, e.Blobs().DropDownload(p.Digest) }})
	}
	entries, err := build.Entries(e.root, &m)
	if err != nil {
		return nil, 0, err
	}
	for _, en := range entries {
		used += en.Space.Disk
		if en.Layer != "" && marks[en.Layer] {
			continue // an image or a running build has the layer: the record alone frees nothing
		}
		list = append(list, forgoable{size: en.Space.Disk + sizes[en.Layer], used: en.Used, rank: rankCache,
			drop: func(context.Context) (bool, error) { return build.Forget(e.root, en) }})
	}
	return list, used, ctx.Err()
}

// makeRoom drops all of the stock that was not used since before, for who has just found the disk full. It reports whether anything came
// free, so that it is worth trying again.
func (e *Engine) makeRoom(ctx context.Context, before time.Time) bool {
	if !e.cfg.GC.On() {
		return false
	}
	ctx = context.WithoutCancel(ctx)
	if err := e.root.Sweep(); err != nil {
		return false
	}
	freed, err := e.collect(ctx, 0, 0, before)
	return err == nil && freed > 0
}
