package build

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
)

// PruneOptions choose what Prune removes; the zero value is everything.
type PruneOptions struct {
	// Images keeps the steps that gave these images a layer, or their time of creation.
	Images []image.Image
	// Before keeps what was used at that time or later; zero: nothing.
	Before time.Time
	// Keep lets what was used last stay, as much as fits into so many bytes; 0: nothing. LayerSize is what a layer takes that nothing but the
	// cache holds, 0 for others.
	Keep      int64
	LayerSize func(ocispec.Digest) int64
	// Only, if set, spares the entries that it refuses.
	Only func(Entry) bool
}

// within lists the files and folders of the entries that Keep and Only let stay.
func (o PruneOptions) within(root *disk.Root) (map[string]bool, error) {
	stay := map[string]bool{}
	if o.Keep <= 0 && o.Only == nil {
		return stay, nil
	}
	entries, err := Entries(root, &disk.Meter{})
	if err != nil {
		return nil, err
	}
	spare := func(e *Entry) {
		for _, p := range e.Paths {
			stay[p] = true
		}
	}
	left := o.Keep
	for _, e := range slices.Backward(entries) { // what was used last comes first
		if e.Kind == KindHistory {
			continue
		}
		if o.Only != nil && !o.Only(e) {
			spare(&e)
		}
		if o.Keep <= 0 || left < 0 {
			continue
		}
		left -= e.Space.Disk
		if e.Layer != "" {
			left -= o.LayerSize(e.Layer)
		}
		if left >= 0 {
			spare(&e)
		}
	}
	return stay, nil
}

// keeper tells which files of the cache are to stay.
func (o PruneOptions) keeper() func(path string, info fs.FileInfo) bool {
	layers, times := map[ocispec.Digest]bool{}, map[time.Time]bool{}
	for _, img := range o.Images {
		for _, h := range img.Config.History {
			if h.Created != nil {
				times[h.Created.UTC()] = true
			}
		}
		for _, d := range img.Layers() {
			layers[d] = true
		}
	}
	return func(path string, info fs.FileInfo) bool {
		if !o.Before.IsZero() && !info.ModTime().Before(o.Before) {
			return true
		}
		var rec Record
		if len(o.Images) == 0 || disk.ReadJSON(path, &rec) != nil {
			return false
		}
		return layers[rec.Layer] || rec.Layer == "" && times[rec.Created.UTC()]
	}
}

// Prune forgets steps and what is known of contexts, and empties the cache mounts that no running step uses. Layers that only the
// cache needed go with the next sweep. Builds that run meanwhile go on; they find fewer steps cached. It returns the keys of the steps
// and the bytes freed here.
func Prune(root *disk.Root, o PruneOptions) (keys []string, freed int64, err error) {
	keep := o.keeper()
	stay, err := o.within(root)
	if err != nil {
		return nil, 0, err
	}
	for _, class := range []string{byDefinition, byContent, "stat", "files"} {
		err := filepath.WalkDir(root.Path("buildcache", class), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || e.IsDir() {
				return err // folders stay: somebody may be writing into them
			}
			if disk.IsTemp(e.Name()) {
				return nil // a record that somebody writes at this moment
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) || err == nil && (stay[path] || keep(path, info)) {
				return nil
			}
			if err == nil {
				err = os.Remove(path)
			}
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			freed += disk.Allocated(info)
			if class == byDefinition {
				keys = append(keys, e.Name())
			}
			return nil
		})
		if err != nil {
			return keys, freed, fmt.Errorf("prune build cache: %w", err)
		}
	}
	n, err := pruneMounts(root, o.Before, stay)
	if err != nil {
		return keys, freed + n, err
	}
	f, err := pruneFetched(root, o.Before, stay)
	return keys, freed + n + f, err
}

// pruneMounts removes cache mounts. When one was last used is when its lock was last taken.
func pruneMounts(root *disk.Root, before time.Time, stay map[string]bool) (int64, error) {
	base := root.Path("buildcache", "mount")
	entries, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("prune cache mounts: %w", err)
	}
	var freed int64
	var m disk.Meter
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".lock") {
			continue
		}
		dir := filepath.Join(base, e.Name())
		if stay[dir] {
			continue
		}
		l, err := disk.TryAcquire(dir + ".lock")
		if errors.Is(err, disk.ErrLocked) {
			continue // a step runs with it
		}
		if err != nil {
			return freed, fmt.Errorf("prune cache mounts: %w", err)
		}
		if st, serr := l.File().Stat(); !before.IsZero() && (serr != nil || !st.ModTime().Before(before)) {
			l.Release()
			continue
		}
		sp, err := m.Tree(dir)
		if err == nil {
			err = root.Trash(dir)
		}
		l.Release()
		if err != nil {
			return freed, fmt.Errorf("prune cache mounts: %w", err)
		}
		freed += sp.Disk
	}
	return freed, nil
}
