package build

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Kinds of entries that are no steps.
const (
	KindMount   = "mount"   // the folder of a RUN --mount=type=cache
	KindContext = "stat"    // what is known of a context's files
	KindFiles   = "files"   // the names of files that a step read
	KindHistory = "history" // what is recorded of a build
	KindTree    = "tree"    // the files of a git repository or of an archive that was fetched
	KindURL     = "url"     // a file that was fetched
	KindDamaged = "damaged" // a record that can't be read: a miss, and nobody needs it
)

// Entry is what the cache holds of one thing: a step with all records that lead to its layer, a cache mount, a context.
type Entry struct {
	// ID is the layer's digest in hex, else the record's key or the mount's name.
	ID string
	// Kind is the step's ("run", "copy" ...) or one of the constants; Title is how the step was shown.
	Kind, Title string
	// Layer is the layer that the step made, "" for none. Its space is not in Space.
	Layer ocispec.Digest
	// Paths are the files, or the folder, that go with the entry.
	Paths         []string
	Created, Used time.Time
	// Space is what Paths take.
	Space disk.Space
}

// Step reports whether the entry is the result of a step, a mount or something fetched: what people count when they count a cache.
func (e Entry) Step() bool {
	return e.Kind != KindContext && e.Kind != KindFiles && e.Kind != KindHistory && e.Kind != KindDamaged
}

// Entries lists everything in the cache and the history, what was used last at the end. Folders and lock files are not in it.
func Entries(root *disk.Root, m *disk.Meter) ([]Entry, error) {
	byID := map[string]*Entry{}
	for _, class := range []string{byDefinition, byContent} {
		err := walkFiles(root.Path("buildcache", class), func(path string, info fs.FileInfo) error {
			return addRecord(byID, m, path, info)
		})
		if err != nil {
			return nil, fmt.Errorf("read build cache: %w", err)
		}
	}
	err := walkFiles(root.Path("buildcache", "stat"), func(path string, info fs.FileInfo) error {
		return addPath(byID, m, Entry{ID: "stat-" + info.Name(), Kind: KindContext}, path, info.ModTime())
	})
	if err != nil {
		return nil, fmt.Errorf("read build cache: %w", err)
	}
	err = walkFiles(root.Path("buildcache", "files"), func(path string, info fs.FileInfo) error {
		if disk.IsTemp(info.Name()) && time.Since(info.ModTime()) < time.Hour {
			return nil // it is just being written
		}
		return addPath(byID, m, Entry{ID: "files-" + info.Name(), Kind: KindFiles, Created: info.ModTime()}, path, info.ModTime())
	})
	if err != nil {
		return nil, fmt.Errorf("read build cache: %w", err)
	}
	mounts, err := os.ReadDir(root.Path("buildcache", "mount"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read build cache: %w", err)
	}
	for _, d := range mounts {
		if !d.IsDir() {
			continue
		}
		path := root.Path("buildcache", "mount", d.Name())
		used := mountUsed(path)
		if err := addPath(byID, m, Entry{ID: d.Name(), Kind: KindMount, Created: used}, path, used); err != nil {
			return nil, err
		}
	}
	if err := OpenHistory(root).entries(byID, m); err != nil {
		return nil, err
	}
	if err := addFetched(root, byID, m); err != nil {
		return nil, fmt.Errorf("read build cache: %w", err)
	}
	list := make([]Entry, 0, len(byID))
	for _, e := range byID {
		list = append(list, *e)
	}
	slices.SortFunc(list, func(a, b Entry) int { return cmp.Or(a.Used.Compare(b.Used), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

// mountUsed is when a step last took a cache mount: that is when its lock was opened for it, or when its top folder last changed.
func mountUsed(dir string) time.Time {
	var t time.Time
	for _, p := range []string{dir, dir + ".lock"} {
		if info, err := os.Lstat(p); err == nil && info.ModTime().After(t) {
			t = info.ModTime()
		}
	}
	return t
}

func addRecord(byID map[string]*Entry, m *disk.Meter, path string, info fs.FileInfo) error {
	if disk.IsTemp(info.Name()) && time.Since(info.ModTime()) < time.Hour {
		return nil // it is just being written
	}
	var rec Record
	err := disk.ReadJSON(path, &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	e := Entry{ID: rec.Key, Kind: rec.Kind, Title: rec.Title, Layer: rec.Layer, Created: cmp.Or(rec.Made, rec.Created)}
	if err != nil || rec.Key != info.Name() {
		e = Entry{ID: info.Name(), Kind: KindDamaged, Created: info.ModTime()}
	} else if ocispec.Validate(rec.Layer) == nil {
		e.ID = rec.Layer.Encoded()
	} else {
		e.Layer = ""
	}
	return addPath(byID, m, e, path, info.ModTime())
}

// addPath adds a path to the entry that e describes, which may be known already.
func addPath(byID map[string]*Entry, m *disk.Meter, e Entry, path string, used time.Time) error {
	sp, err := m.Tree(path)
	if err != nil {
		return err
	}
	have := byID[e.ID]
	if have == nil {
		have = &e
		byID[e.ID] = have
	}
	if have.Title == "" {
		have.Title = e.Title
	}
	if e.Created.Before(have.Created) {
		have.Created = e.Created
	}
	if used.After(have.Used) {
		have.Used = used
	}
	have.Paths = append(have.Paths, path)
	have.Space = have.Space.Plus(sp)
	return nil
}

// walkFiles calls fn for each file below dir. What vanishes meanwhile, and dir itself, may be missing.
func walkFiles(dir string, fn func(path string, info fs.FileInfo) error) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(path, info)
	})
}

// Forget removes an entry's files. ok is false when it is in use or was used since it was listed: then it stays, in whole or in
// part. Its layer, if nothing else needs that, goes with the next sweep.
func Forget(root *disk.Root, e Entry) (ok bool, err error) {
	if e.Kind == KindMount || e.Kind == KindTree {
		dir := e.Paths[0]
		l, err := disk.TryAcquire(dir + ".lock")
		if errors.Is(err, disk.ErrLocked) {
			return false, nil // a step runs with it
		}
		if err != nil {
			return false, fmt.Errorf("forget cache mount: %w", err)
		}
		if e.Kind == KindTree {
			_ = os.Remove(dir + ".lock") // while it is locked, as in cache.lock
		}
		trash, err := root.TrashLater(dir)
		l.Release()
		if err == nil && trash != "" {
			err = os.RemoveAll(trash)
		}
		return err == nil, err
	}
	if e.Kind == KindHistory {
		err := dropBuild(e.Paths[0])
		return err == nil, err
	}
	ok = true
	for _, p := range e.Paths {
		if strings.HasSuffix(p, ".lock") {
			continue
		}
		info, err := os.Lstat(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("forget cached step: %w", err)
		}
		if info.ModTime().After(e.Used) {
			ok = false
			continue
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("forget cached step: %w", err)
		}
	}
	return ok, nil
}
