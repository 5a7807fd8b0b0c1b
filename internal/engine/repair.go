package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"

	"golang.org/x/sync/errgroup"
)

// parallel runs fn for each item, as many at a time as there are processors.
func parallel[T any](ctx context.Context, items []T, fn func(context.Context, T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, it := range items {
		g.Go(func() error { return fn(ctx, it) })
	}
	return g.Wait()
}

// quarantine returns a new place in quarantine/ for what is called so.
func (c *checker) quarantine(what string) (string, error) {
	if err := os.MkdirAll(c.e.root.Path("quarantine"), 0o700); err != nil {
		return "", fmt.Errorf("quarantine: %w", err)
	}
	base := c.e.root.Path("quarantine", time.Now().UTC().Format("20060102-150405-")+what)
	to := base
	for n := 1; ; n++ {
		if _, err := os.Lstat(to); errors.Is(err, os.ErrNotExist) {
			return to, nil
		}
		to = fmt.Sprintf("%s.%d", base, n)
	}
}

// moveAway puts a file or folder into quarantine.
func (c *checker) moveAway(path, what string) (string, error) {
	to, err := c.quarantine(what)
	if err != nil {
		return "", err
	}
	if _, err := disk.Publish(path, to); errors.Is(err, os.ErrNotExist) {
		return "it is gone", nil
	} else if err != nil {
		return "", err
	}
	return "moved to " + to, nil
}

// repair mends what it can: first what the images stand on, then the images, then what stands on them.
func (c *checker) repair(ctx context.Context) error {
	fs := c.report.Findings
	passes := []func(f *Finding) bool{
		func(f *Finding) bool { return f.Kind == "folder" || f.Kind == "layer" || f.Kind == "blob" },
		func(f *Finding) bool { return f.image != "" },
		func(f *Finding) bool { return true },
	}
	images := map[ocispec.Digest]error{}
	for _, pass := range passes {
		for i := range fs {
			f := &fs[i]
			if !pass(f) || f.Repaired != "" || f.RepairError != "" {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			var did string
			var err error
			switch {
			case f.image != "":
				var done bool
				if err, done = images[f.image]; !done {
					err = c.refetch(ctx, f.image)
					images[f.image] = err
				}
				did = "fetched again"
			case f.fix != nil:
				did, err = f.fix(ctx)
			default:
				continue
			}
			if err != nil {
				f.RepairError = err.Error()
				continue
			}
			f.Repaired = did
		}
	}
	c.dropReplaced()
	return nil
}

// dropReplaced removes from quarantine what has been fetched again.
func (c *checker) dropReplaced() {
	for i := range c.report.Findings {
		f := &c.report.Findings[i]
		to, moved := strings.CutPrefix(f.Repaired, "moved to ")
		if !moved {
			continue
		}
		id := ocispec.Digest(f.Name)
		back := false
		switch f.Kind {
		case "layer":
			_, err := c.layers.Peek(id)
			back = err == nil
		case "blob":
			back = c.e.Blobs().Has(id)
		}
		if back && c.e.root.Trash(to) == nil {
			f.Repaired = "fetched again"
		}
	}
}

// refetch gets what an image lacks from a registry that is known to have it. One whose config is lost, and that nobody has, is put into
// quarantine with its tags: while it is there nothing can tell what it needs.
func (c *checker) refetch(ctx context.Context, id ocispec.Digest) error {
	files, err := c.images.Files()
	if err != nil {
		return err
	}
	var record image.File
	for _, f := range files {
		if f.Record && f.Err == nil && f.IDs[0] == id {
			record = f
		}
	}
	raw, rerr := c.e.Blobs().ReadAll(id, image.MaxConfig)
	var platform string
	if rerr == nil {
		conf, err := image.ParseConfig(raw)
		if host := registry.HostPlatform(); err == nil && (conf.OS != host.OS || conf.Architecture != host.Architecture) {
			platform = registry.FormatPlatform(conf.Platform)
		}
	}
	err = errors.New("no registry is known to have it: load or build it again")
	for _, d := range record.RepoDigests {
		if _, _, err = c.e.Pull(ctx, PullRequest{Reference: d, Platform: platform, Quiet: true}); err != nil {
			continue
		}
		var img image.Image
		if img, err = c.images.Get(id); err != nil {
			continue
		}
		for _, l := range img.Layers() {
			if _, lerr := c.layers.Peek(l); lerr != nil {
				err = lerr
			}
		}
		if err == nil {
			return nil
		}
	}
	if rerr == nil || record.Path == "" {
		return err
	}
	for _, f := range files {
		if f.Tag && f.Err == nil && f.IDs[0] == id || f.Path == record.Path {
			did, merr := c.moveAway(f.Path, "images-"+shortDigest(id)+"-"+f.Path[strings.LastIndexByte(f.Path, '/')+1:])
			err = errors.Join(err, merr)
			if merr == nil {
				err = fmt.Errorf("%w; its record is %s", err, did)
			}
		}
	}
	return err
}
