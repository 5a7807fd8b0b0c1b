package build

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// addFetched lists what came from elsewhere: trees, and files with the records that lead to them.
func addFetched(root *disk.Root, byID map[string]*Entry, m *disk.Meter) error {
	trees, err := os.ReadDir(root.Path("buildcache", treeFolder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range trees {
		info, err := d.Info()
		if !d.IsDir() || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		path := root.Path("buildcache", treeFolder, d.Name())
		e := Entry{ID: d.Name(), Kind: KindTree, Created: info.ModTime()}
		var ti treeInfo
		if disk.ReadJSON(filepath.Join(path, "info.json"), &ti) == nil {
			e.Title, e.Created = strings.TrimSpace(ti.Source+" "+ti.Commit), ti.Created
		}
		if err := addPath(byID, m, e, path, info.ModTime()); err != nil {
			return err
		}
	}
	return walkFiles(root.Path("buildcache", httpFolder), func(path string, info fs.FileInfo) error {
		if disk.IsTemp(info.Name()) {
			return nil
		}
		name, isBody := strings.CutSuffix(info.Name(), ".body")
		e := Entry{ID: name, Kind: KindURL, Created: info.ModTime()}
		if !isBody {
			var rec httpRecord
			if err := disk.ReadJSON(path, &rec); err != nil || ocispec.Validate(rec.Digest) != nil {
				e.Kind = KindDamaged
			} else {
				e.ID, e.Title = rec.Digest.Encoded(), rec.URL
			}
		}
		return addPath(byID, m, e, path, info.ModTime())
	})
}

// pruneFetched removes what came from elsewhere and was not used since before, unless a build uses it now. Files may be used on: whoever
// has one open keeps it.
func pruneFetched(root *disk.Root, before time.Time, stay map[string]bool) (freed int64, err error) {
	byID := map[string]*Entry{}
	if err := addFetched(root, byID, &disk.Meter{}); err != nil {
		return 0, fmt.Errorf("prune build cache: %w", err)
	}
	for _, e := range byID {
		if stay[e.Paths[0]] || !before.IsZero() && !e.Used.Before(before) {
			continue
		}
		ok, err := Forget(root, *e)
		if err != nil {
			return freed, err
		}
		if ok {
			freed += e.Space.Disk
		}
	}
	return freed, nil
}
