package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/volume"

	"github.com/moby/moby/api/types/mount"
)

func deadLeases(root *disk.Root) ([]string, error) { return collect.Dead(root) }

// references reads every record and follows what it names, while no image changes and no sweep runs.
func (c *checker) references(ctx context.Context) error {
	return collect.Still(ctx, c.e.root, func() error {
		return c.images.Locked(func() error {
			for _, step := range []func() error{c.imageRecords, c.containerRecords, c.volumes, c.networks, c.unused} {
				if err := step(); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

func (c *checker) imageRecords() error {
	files, err := c.images.Files()
	if err != nil {
		return err
	}
	known := map[ocispec.Digest]bool{}
	for _, f := range files {
		if f.Record && f.Err == nil {
			known[f.IDs[0]] = true
		}
	}
	for _, f := range files {
		path := f.Path
		away := func(context.Context) (string, error) { return c.moveAway(path, "images-"+filepath.Base(path)) }
		switch {
		case f.Record && f.Err == nil:
			c.report.Images++
			c.imageRecord(f, files)
		case f.Record:
			c.add(Finding{Severity: Damaged, Kind: "image", Name: path, Problem: "its record can't be used: " + f.Err.Error(),
				Advice: "pull, load or build the image again; " + repairs + "puts the record into quarantine", fix: away})
		case f.Tag && f.Err != nil:
			c.add(Finding{Severity: Damaged, Kind: "tag", Name: path, Problem: "it can't be used: " + f.Err.Error(),
				Advice: repairs + "puts it into quarantine; then tag, pull or build again", fix: away})
		case f.Tag && !known[f.IDs[0]]:
			c.add(Finding{Severity: Damaged, Kind: "tag", Name: familiar(f.Reference), Problem: "it leads to image " + shortName(f.IDs[0]) + ", which is not here",
				Advice: "pull it again; " + repairs + "puts it into quarantine", fix: away})
		case f.Tag:
			for _, d := range f.Blobs {
				if !c.e.Blobs().Has(d) || c.lost[d] != "" {
					c.add(Finding{Severity: Damaged, Kind: "tag", Name: familiar(f.Reference), Problem: "its image index " + shortName(d) + " is damaged or gone",
						Advice: repairs + "fetches it again", image: f.IDs[0]})
				}
			}
		}
	}
	return nil
}

func familiar(ref string) string {
	if r, err := image.ParseReference(ref); err == nil {
		return r.Familiar()
	}
	return ref
}

// imageRecord follows what a readable record names.
func (c *checker) imageRecord(f image.File, files []image.File) {
	id := f.IDs[0]
	name := shortName(id)
	for _, t := range files {
		if t.Tag && t.Err == nil && slices.Contains(t.IDs, id) {
			name = familiar(t.Reference)
			break
		}
	}
	var wrong []string
	raw, err := c.e.Blobs().ReadAll(id, image.MaxConfig)
	var conf ocispec.Image
	if err == nil {
		conf, err = image.ParseConfig(raw)
	}
	if err != nil {
		wrong = append(wrong, "its config can't be read ("+err.Error()+"), so that no sweep can tell what it needs")
	}
	for _, d := range f.Blobs {
		if !c.e.Blobs().Has(d) || c.lost[d] != "" {
			wrong = append(wrong, "its manifest "+shortName(d)+" is damaged or gone: a push would not be bit-exact")
		}
	}
	wrong = append(wrong, c.missing(conf.RootFS.DiffIDs)...)
	if len(wrong) == 0 {
		return
	}
	fd := Finding{Severity: Damaged, Kind: "image", Name: name, Problem: strings.Join(wrong, "; "), image: id}
	if len(f.RepoDigests) > 0 {
		fd.Advice = repairs + "fetches what is missing from " + familiar(f.RepoDigests[0])
	} else {
		fd.Advice = "load or build it again: no registry is known to have it"
	}
	c.add(fd)
}

// missing says which of the layers are not there or damaged.
func (c *checker) missing(ids []ocispec.Digest) []string {
	var out []string
	for _, l := range distinct(ids) {
		if _, err := c.layers.Peek(l); errors.Is(err, layers.ErrNotFound) {
			out = append(out, "its layer "+shortName(l)+" is gone")
		} else if why := c.lost[l]; why != "" {
			out = append(out, "its layer "+shortName(l)+" "+why)
		}
	}
	return out
}

func (c *checker) containerRecords() error {
	cs, vols := c.e.Containers(), c.e.Volumes()
	ids, err := cs.List()
	if err != nil {
		return err
	}
	for _, id := range ids {
		r, err := cs.Load(id)
		if errors.Is(err, container.ErrNotFound) {
			if cs.Hollow(id) {
				c.add(Finding{Severity: Leftover, Kind: "container", Name: id[:12], Problem: "a power loss left the folder of a container that was to be removed at its end",
					Advice: "conex reconcile, which runs at boot, removes it", fix: func(context.Context) (string, error) { return "removed", c.e.dropHollow(id) }})
			}
			continue
		}
		c.report.Containers++
		if err != nil {
			c.add(Finding{Severity: Damaged, Kind: "container", Name: id[:12], Problem: "its record can't be read: " + err.Error() + "; it can't run, and no sweep can tell what it needs",
				Advice: "bring config.json back from a backup; or copy what you need from " + cs.Dir(id, "upper") + ", then move " + cs.Dir(id) + " away"})
			continue
		}
		_, layers := r.Digests()
		if wrong := c.missing(layers); len(wrong) > 0 {
			c.add(Finding{Severity: Damaged, Kind: "container", Name: r.Name, Problem: strings.Join(wrong, "; ") + ": it can't start",
				Advice: "pull, load or build " + r.Image + " again, as it was; the container's own files are in " + cs.Dir(id, "upper"),
				fix: func(context.Context) (string, error) {
					for _, l := range layers {
						if _, err := c.layers.Peek(l); err != nil {
							return "", err
						}
					}
					return "its layers are here again", nil
				}})
		}
		for _, d := range []string{"upper", "work", "log", "files"} {
			if fi, err := os.Lstat(cs.Dir(id, d)); err != nil || !fi.IsDir() {
				if _, err := cs.Load(id); err != nil {
					break // removed meanwhile
				}
				c.add(Finding{Severity: Damaged, Kind: "container", Name: r.Name, Problem: "its folder " + d + " is gone", Advice: "make it, empty, or remove the container"})
			}
		}
		for _, m := range r.Mounts {
			if _, err := os.Lstat(vols.Data(m.Name)); m.Type == mount.TypeVolume && errors.Is(err, os.ErrNotExist) {
				c.add(Finding{Severity: Damaged, Kind: "container", Name: r.Name, Problem: "its volume " + m.Name + " is gone: it can't start",
					Advice: "bring it back from a backup, or remove the container"})
			}
		}
	}
	return nil
}

func (c *checker) volumes() error {
	vols := c.e.Volumes()
	names, err := vols.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		c.report.Volumes++
		dir := c.e.root.Path("volumes", name)
		if fi, err := os.Lstat(vols.Data(name)); err != nil || !fi.IsDir() {
			c.add(Finding{Severity: Damaged, Kind: "volume", Name: name, Problem: "it has no folder _data", Advice: "bring it back from a backup, or move " + dir + " away"})
			continue
		}
		if _, err := vols.Get(name); err == nil {
			continue
		}
		c.add(Finding{Severity: Damaged, Kind: "volume", Name: name, Problem: "its record can't be read; its content is there", Advice: repairs + "writes the record anew",
			fix: func(context.Context) (string, error) {
				v := volume.Volume{Name: name, Created: time.Now().UTC()}
				if fi, err := os.Lstat(dir); err == nil {
					v.Created = fi.ModTime().UTC()
				}
				return "its record is written anew", disk.WriteJSON(filepath.Join(dir, "meta.json"), v, disk.Durable)
			}})
	}
	return nil
}

func (c *checker) networks() error {
	files, err := filepath.Glob(c.e.root.Path("networks", "*.json"))
	if err != nil {
		return err
	}
	for _, path := range files {
		var v struct{ ID, Interface string }
		raw, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = json.Unmarshal(raw, &v)
		}
		if err == nil && v.ID == strings.TrimSuffix(filepath.Base(path), ".json") {
			continue
		}
		if err == nil {
			err = fmt.Errorf("it speaks of %q", v.ID)
		}
		c.add(Finding{Severity: Damaged, Kind: "network", Name: filepath.Base(path), Problem: "its record can't be used: " + err.Error(),
			Advice: repairs + "puts it into quarantine; the next container makes its network anew",
			fix:    func(context.Context) (string, error) { return c.moveAway(path, "network-"+filepath.Base(path)) }})
	}
	return nil
}

// unused finds layers and blobs that nothing names. A running pull or build may be about to, so they are leftovers at most, and none
// while one runs.
func (c *checker) unused() error {
	marks, all, err := collect.Marks(c.e.stores(c.images, c.layers), c.e.markContainers, c.e.markBuildCache, c.e.markMounts)
	if err != nil {
		return nil //nolint:nilerr // what can't be read is a finding already, and without it nothing is known to be unused
	}
	if all {
		return nil
	}
	entries, err := os.ReadDir(c.e.root.Path("layers"))
	if err != nil {
		return err
	}
	blobs, err := c.e.Blobs().List()
	if err != nil {
		return err
	}
	add := func(kind string, d ocispec.Digest) {
		c.add(Finding{Severity: Leftover, Kind: kind, Name: string(d), Problem: "nothing uses it", Advice: "the next prune or removal of an image removes it",
			fix: func(ctx context.Context) (string, error) {
				_, err := c.e.sweep(ctx)
				return "removed", err
			}})
	}
	for _, d := range entries {
		id := ocispec.Digest("sha256:" + d.Name())
		if ocispec.Validate(id) != nil {
			continue
		}
		if !marks[id] {
			add("layer", id)
			continue
		}
		if forms, err := c.layers.Blobs(id); err == nil {
			for _, b := range forms {
				marks[b.Digest] = true
			}
		}
	}
	for _, d := range blobs {
		if !marks[d] && c.lost[d] == "" {
			add("blob", d)
		}
	}
	return nil
}

// names compares containers and links, while no name changes.
func (c *checker) names(context.Context) error {
	cs := c.e.Containers()
	links, nameless, err := cs.StaleNames()
	if err != nil {
		return err
	}
	for _, name := range links {
		c.add(Finding{Severity: Leftover, Kind: "name", Name: name, Problem: "it leads to no container of that name", Advice: "nothing: the name is free to take",
			fix: func(context.Context) (string, error) { return "removed", cs.MendName(name, "") }})
	}
	for _, r := range nameless {
		c.add(Finding{Severity: Damaged, Kind: "container", Name: r.Name, Problem: "its name leads elsewhere or nowhere: it is found by its id " + r.ID[:12] + " only",
			Advice: repairs + "links it again",
			fix:    func(context.Context) (string, error) { return "linked again", cs.MendName(r.Name, r.ID) }})
	}
	return nil
}

// strays looks for what is not conex's.
func (c *checker) strays(context.Context) error {
	hex := func(name string, isDir bool) bool { return ocispec.Validate(ocispec.Digest("sha256:"+name)) == nil }
	either := func(fs ...func(string, bool) bool) func(string, bool) bool {
		return func(n string, d bool) bool {
			return slices.ContainsFunc(fs, func(f func(string, bool) bool) bool { return f(n, d) })
		}
	}
	only := func(names ...string) func(string, bool) bool {
		return func(n string, _ bool) bool { return slices.Contains(names, n) }
	}
	suffix := func(s string) func(string, bool) bool {
		return func(n string, _ bool) bool { return strings.HasSuffix(n, s) }
	}
	anything := func(string, bool) bool { return true }
	rules := []struct {
		dir string
		ok  func(name string, isDir bool) bool
	}{
		{"", either(only(rootFiles...), only("blobs", "quarantine"), func(n string, isDir bool) bool { return isDir && slices.Contains(disk.Folders, n) })},
		{"blobs", only("sha256")},
		{"blobs/sha256", func(n string, isDir bool) bool { return hex(n, isDir) && !isDir }},
		{"downloads", func(n string, isDir bool) bool { return hex(strings.TrimSuffix(n, ".lock"), isDir) && !isDir }},
		{"images", either(only("lock", "by-id"), suffix(".json"))},
		{"manifests", either(only("lock"), suffix(".json"))},
		{"images/by-id", func(n string, isDir bool) bool { return hex(strings.TrimSuffix(n, ".json"), isDir) && !isDir }},
		{"layers", func(n string, isDir bool) bool { return isDir && (hex(n, isDir) || strings.HasPrefix(n, "chain-")) }},
		{"containers", func(n string, isDir bool) bool { return isDir && hex(n, isDir) }},
		{"networks", either(suffix(".json"), suffix(".lock"))},
		{"volumes", func(n string, isDir bool) bool { return isDir && volume.CheckName(n) == nil }},
		{"buildcache", only("def", "content", "lock", "stat", "files", "mount", "tree", "http")},
		{"builds", either(only("swept"), func(n string, isDir bool) bool { return isDir && len(n) == 16 })},
		{"leases", func(_ string, isDir bool) bool { return !isDir }},
		{"staging", anything}, {"trash", anything}, {"names", anything},
	}
	for _, r := range rules {
		dir := c.e.root.Path(r.dir)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, d := range entries {
			path := filepath.Join(dir, d.Name())
			if r.ok(d.Name(), d.IsDir()) || disk.IsTemp(d.Name()) {
				continue
			}
			if _, err := os.Lstat(path); err != nil {
				continue // gone
			}
			c.add(Finding{Severity: Orphan, Kind: "file", Name: path, Problem: "it is not conex's", Advice: repairs + "puts it into quarantine",
				fix: func(context.Context) (string, error) { return c.moveAway(path, "stray-"+d.Name()) }})
		}
	}
	return nil
}

// temporaries lists files that a WriteFile left which did not live to rename them.
func (c *checker) temporaries() []string {
	var list []string
	root := c.e.root
	dirs := []string{root.Path(), root.Path("images"), root.Path("images", "by-id"), root.Path("networks"), root.Path("leases"), root.Path("buildcache", "stat"), root.Path("builds")}
	for _, pattern := range []string{root.Path("containers", "*"), root.Path("volumes", "*"), root.Path("layers", "*"), root.Path("buildcache", "*", "??"), root.Path("builds", "*", "*")} {
		if m, err := filepath.Glob(pattern); err == nil {
			dirs = append(dirs, m...)
		}
	}
	for _, d := range dirs {
		entries, err := os.ReadDir(d)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if fi, err := e.Info(); disk.IsTemp(e.Name()) && err == nil && time.Since(fi.ModTime()) > stale {
				list = append(list, filepath.Join(d, e.Name()))
			}
		}
	}
	return list
}
