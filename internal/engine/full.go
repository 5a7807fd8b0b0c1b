package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"conex/internal/disk"

	"github.com/docker/go-units"
)

// noSpace reports whether an error came of a full disk or an exhausted quota.
func noSpace(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// rootFull is noSpace about the root's file system, as far as the error tells: making room there helps nobody who filled another.
func (e *Engine) rootFull(err error) bool {
	var pe *fs.PathError
	if errors.As(err, &pe) && !e.owns(pe.Path) {
		return false
	}
	return noSpace(err)
}

// giveBack removes what an action has stored that found no room for the rest, and parts of blobs that nobody is fetching. Otherwise all
// that would stay for the next try.
func (e *Engine) giveBack(ctx context.Context) error {
	_, err := e.dropParts()
	_, serr := e.sweep(context.WithoutCancel(ctx))
	return errors.Join(err, serr)
}

// dropParts removes the parts of blobs that nobody is fetching, and says what they took.
func (e *Engine) dropParts() (int64, error) {
	parts, err := e.Blobs().Downloads()
	errs := []error{err}
	var freed int64
	for _, p := range parts {
		if disk.Held(e.root.Path("downloads", p.Digest.Encoded()+".lock")) {
			continue
		}
		freed += p.DiskSize
		errs = append(errs, e.Blobs().DropDownload(p.Digest))
	}
	return freed, errors.Join(errs...)
}

// Hint says what to do about an error of the machine's, "" when there is nothing to add to it: which file system is full, how much of it
// is free, and which commands show and free what conex has on it. Monitors report their errors as text, and programs in RUN steps
// theirs, so the words count too.
func (e *Engine) Hint(err error) string {
	text := strings.ToLower(err.Error())
	full := noSpace(err) || strings.Contains(text, syscall.ENOSPC.Error()) || strings.Contains(text, syscall.EDQUOT.Error())
	switch {
	case full:
	case errors.Is(err, syscall.EROFS) || strings.Contains(err.Error(), e.root.Path()+"/") && strings.Contains(text, syscall.EROFS.Error()):
		return fmt.Sprintf("the file system of %s or %s is mounted read-only", e.root.Path(), e.cfg.State)
	case errors.Is(err, syscall.EIO):
		return "the disk reports an error: see dmesg; 'conex system check' tells what is damaged"
	default:
		return ""
	}
	// What is written for the user, as save does with -o, lies elsewhere.
	var pe *fs.PathError
	if errors.As(err, &pe) && !e.owns(pe.Path) {
		free, total, ferr := disk.Free(pe.Path)
		if ferr != nil {
			return ""
		}
		return fmt.Sprintf("%s of %s are free there", units.HumanSize(float64(free)), units.HumanSize(float64(total)))
	}
	// The root's unless the error names the state folder, or only that is full.
	where, what := e.root.Path(), "'conex system df' shows what takes it, 'conex system prune' frees what is unused"
	free, total, ferr := disk.Free(where)
	if sfree, stotal, serr := disk.Free(e.cfg.State); serr == nil && (strings.Contains(err.Error(), e.cfg.State+"/") || sfree < 64<<10 && ferr == nil && free > 1<<20) {
		where, free, total, ferr, what = e.cfg.State, sfree, stotal, nil, "it is a file system in memory: make it larger or clear it"
	}
	if ferr != nil {
		return what
	}
	if left, counted := disk.FreeFiles(where); counted && left < 64 { // those that were made are given back
		return fmt.Sprintf("the file system of %s can have no more files: %d of its inodes are free; %s", where, left, what)
	}
	given := ""
	if free > 1<<20 { // else nobody would understand what was missing
		given = "what was written is given back: "
	}
	return fmt.Sprintf("%s%s of %s are free for %s; %s", given, units.HumanSize(float64(free)), units.HumanSize(float64(total)), where, what)
}

// owns reports whether a path lies in the root or the state folder. So do names without a folder, which are relative to an open one: that is
// how layers are unpacked.
func (e *Engine) owns(path string) bool {
	return !filepath.IsAbs(path) || strings.HasPrefix(path, e.root.Path()+"/") || strings.HasPrefix(path, e.cfg.State+"/")
}
