package build

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"
)

// Prune forgets every step and what is known of contexts, and empties the cache mounts that no running step uses. Layers that only the
// cache needed go with the next sweep. Builds that run meanwhile go on; they find fewer steps cached. It returns the bytes freed here.
func Prune(root *disk.Root) (int64, error) {
	var freed int64
	for _, class := range []string{byDefinition, byContent, "stat"} {
		err := filepath.WalkDir(root.Path("buildcache", class), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || e.IsDir() {
				return err // folders stay: somebody may be writing into them
			}
			if info, err := e.Info(); err == nil {
				freed += info.Size()
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		})
		if err != nil {
			return freed, fmt.Errorf("prune build cache: %w", err)
		}
	}
	n, err := pruneMounts(root)
	return freed + n, err
}

func pruneMounts(root *disk.Root) (int64, error) {
	base := root.Path("buildcache", "mount")
	entries, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("prune cache mounts: %w", err)
	}
	var freed int64
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".lock") {
			continue
		}
		dir := filepath.Join(base, e.Name())
		l, err := disk.TryAcquire(dir + ".lock")
		if errors.Is(err, disk.ErrLocked) {
			continue // a step runs with it
		}
		if err != nil {
			return freed, fmt.Errorf("prune cache mounts: %w", err)
		}
		size := treeSize(dir)
		err = root.Trash(dir)
		l.Release()
		if err != nil {
			return freed, fmt.Errorf("prune cache mounts: %w", err)
		}
		freed += size
	}
	return freed, nil
}

// treeSize adds up the sizes of the regular files below dir, as far as they can be read.
func treeSize(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error { // the function returns no error
		if err != nil || !e.Type().IsRegular() {
			return nil //nolint:nilerr // what vanished takes no space
		}
		if info, err := e.Info(); err == nil {
			n += info.Size()
		}
		return nil
	})
	return n
}
