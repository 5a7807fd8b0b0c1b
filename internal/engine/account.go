package engine

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"conex/internal/build"
	"conex/internal/config"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sync/errgroup"
)

// account is a DiskUsage in the making.
type account struct {
	e     *Engine
	u     DiskUsage
	meter disk.Meter
	other map[string]*Usage

	images     []image.Image
	files      []image.File
	containers []*container.Snapshot
	entries    []build.Entry
	layers     map[ocispec.Digest]layerUsage
	// forms are the layers by the digests of their compressed forms.
	forms map[ocispec.Digest]ocispec.Digest
	// own is what the image's config, manifest and records take.
	own map[ocispec.Digest]int64
	// counted are paths of images and names that have been added.
	counted map[string]bool
	// Who has a layer, and who has an image: running and other containers.
	ofImage, ofContainer, ofCache map[ocispec.Digest]bool
	// mounted are images that image mount shows.
	mounted map[ocispec.Digest]bool
}

type layerUsage struct {
	disk, content int64
	forms         int64 // what its compressed forms take
}

func (a *account) read(ctx context.Context) error {
	images, err := a.e.Images()
	if err != nil {
		return err
	}
	// Of a damaged image nothing is known but its name: its layers show as unused. system check says what to do.
	if a.images, err = images.List(); err != nil && !errors.Is(err, image.ErrDamaged) {
		return err
	}
	if a.files, err = images.Files(); err != nil {
		return err
	}
	if a.containers, err = a.e.snapshots(ctx); err != nil {
		return err
	}
	if a.entries, err = build.Entries(a.e.root, &a.meter); err != nil {
		return err
	}
	a.ofImage, a.ofContainer, a.ofCache = map[ocispec.Digest]bool{}, map[ocispec.Digest]bool{}, map[ocispec.Digest]bool{}
	mounted, err := a.e.mountedIDs()
	if err != nil {
		return err
	}
	a.mounted = map[ocispec.Digest]bool{}
	for _, id := range mounted {
		a.mounted[id] = true
	}
	for _, img := range a.images {
		for _, l := range img.Layers() {
			a.ofImage[l] = true
		}
	}
	for _, n := range a.containers {
		_, layers := n.Record.Digests()
		for _, l := range layers {
			a.ofContainer[l] = true
		}
	}
	for _, en := range a.entries {
		if en.Layer != "" {
			a.ofCache[en.Layer] = true
		}
	}
	return nil
}

// addLayers measures all layers: few files each with the driver erofs, trees with dir.
func (a *account) addLayers(ctx context.Context) error {
	ls, err := a.e.Layers()
	if err != nil {
		return err
	}
	names, err := os.ReadDir(a.e.root.Path("layers"))
	if err != nil {
		return err
	}
	a.layers, a.forms = map[ocispec.Digest]layerUsage{}, map[ocispec.Digest]ocispec.Digest{}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, d := range names {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			path := a.e.root.Path("layers", d.Name())
			sp, err := a.meter.Tree(path)
			if err != nil {
				return err
			}
			id := ocispec.Digest("sha256:" + d.Name())
			known := ocispec.Validate(id) == nil && d.IsDir()
			var l layerUsage
			var blobs []layers.Blob
			if known {
				info, err := ls.Peek(id)
				if err != nil {
					info.ContentSize = sp.Size // damaged, or going away
				}
				l.disk, l.content = sp.Disk, info.ContentSize
				if blobs, err = ls.Blobs(id); err != nil {
					blobs = nil // damaged: system check says so
				}
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case known:
				a.layers[id] = l
				for _, b := range blobs {
					a.forms[b.Digest] = id
				}
				a.u.LayersSize += l.disk
				if !a.ofImage[id] && !a.ofContainer[id] && !a.ofCache[id] {
					a.put(otherLayers, sp.Disk, true)
				}
			case d.IsDir() && strings.HasPrefix(d.Name(), "chain-"):
				a.put(otherRecords, sp.Disk, false)
			default:
				a.put(otherUnknown, sp.Disk, false)
			}
			return nil
		})
	}
	return g.Wait()
}

// put adds one thing to a row of the rest.
func (a *account) put(what string, size int64, reclaimable bool) {
	if size == 0 {
		return
	}
	o := a.other[what]
	o.Total++
	o.Size += size
	if reclaimable {
		o.Reclaimable += size
	} else {
		o.Active++
	}
}

func (a *account) addImages(context.Context) error {
	a.own = map[ocispec.Digest]int64{}
	known := map[ocispec.Digest]bool{}
	a.counted = map[string]bool{}
	own := func(id ocispec.Digest, path string) error {
		if a.counted[path] {
			return nil
		}
		a.counted[path] = true
		sp, err := a.meter.One(path)
		a.own[id] += sp.Disk
		a.u.Images.Size += sp.Disk
		return err
	}
	for _, img := range a.images {
		known[img.ID] = true
	}
	for _, f := range a.files {
		id := ocispec.Digest("")
		if f.Err == nil && len(f.IDs) > 0 {
			id = f.IDs[0]
		}
		if !known[id] {
			continue // addRest finds it
		}
		if err := own(id, f.Path); err != nil {
			return err
		}
		config := f.IDs
		if f.Tag {
			config = nil
		}
		for _, d := range slices.Concat(config, f.Blobs) {
			if err := own(id, a.blobPath(d)); err != nil {
				return err
			}
		}
	}
	containersOf := map[ocispec.Digest]int{}
	for _, n := range a.containers {
		containersOf[n.Record.ImageID]++
	}
	users := map[ocispec.Digest]int{} // images by layer
	for _, img := range a.images {
		for _, l := range distinct(img.Layers()) {
			users[l]++
		}
	}
	keep := map[ocispec.Digest]bool{}
	for _, img := range a.images {
		a.u.Images.Total++
		iu := ImageUsage{ID: img.ID, RepoTags: img.RepoTags, RepoDigests: img.RepoDigests, Created: img.Created, Containers: containersOf[img.ID], Disk: a.own[img.ID]}
		for _, l := range distinct(img.Layers()) {
			lu := a.layers[l]
			if users[l] > 1 {
				iu.Shared += lu.content
			} else {
				iu.Unique += lu.content
				iu.Disk += lu.disk
			}
			if iu.Containers > 0 || a.mounted[img.ID] {
				keep[l] = true
			}
		}
		iu.Size = iu.Shared + iu.Unique
		if iu.Containers > 0 || a.mounted[img.ID] {
			a.u.Images.Active++
		} else {
			a.u.Images.Reclaimable += a.own[img.ID]
		}
		a.u.ImageList = append(a.u.ImageList, iu)
	}
	for l := range a.ofImage {
		a.u.Images.Size += a.layers[l].disk
		if !keep[l] && !a.ofContainer[l] && !a.ofCache[l] {
			a.u.Images.Reclaimable += a.layers[l].disk
		}
	}
	return nil
}

func (a *account) blobPath(d ocispec.Digest) string {
	return a.e.root.Path("blobs", "sha256", d.Encoded())
}

func distinct(ds []ocispec.Digest) []ocispec.Digest {
	out := slices.Clone(ds)
	slices.Sort(out)
	return slices.Compact(out)
}

func (a *account) addContainers(context.Context) error {
	running := map[ocispec.Digest]bool{}
	for _, n := range a.containers {
		r := n.Record
		upper, all, err := a.folder(a.e.Containers().Dir(r.ID), "upper")
		if err != nil {
			return err
		}
		link := a.e.root.Path("names", r.Name)
		sp, err := a.meter.One(link)
		if err != nil {
			return err
		}
		a.counted[link] = true
		all = all.Plus(sp)
		alive := n.Alive() != nil
		a.u.Containers.add(all.Disk, alive)
		cu := ContainerUsage{ID: r.ID, Name: r.Name, Image: r.Image, Command: commandText(r), Created: r.Created, Status: n.StatusText(time.Now()), Size: upper.Size, Disk: all.Disk}
		for _, m := range r.Mounts {
			if m.Type == mount.TypeVolume {
				cu.LocalVolumes++
			}
		}
		a.u.ContainerList = append(a.u.ContainerList, cu)
		_, layers := r.Digests()
		for _, l := range layers {
			running[l] = running[l] || alive
		}
	}
	for l := range a.ofContainer {
		if a.ofImage[l] {
			continue
		}
		a.u.Containers.Size += a.layers[l].disk
		if !running[l] && !a.ofCache[l] {
			a.u.Containers.Reclaimable += a.layers[l].disk
		}
	}
	return nil
}

// folder measures a folder as a whole, and one of the folders in it.
func (a *account) folder(dir, inner string) (in, all disk.Space, err error) {
	if in, err = a.meter.Tree(dir + "/" + inner); err != nil {
		return in, all, err
	}
	if all, err = a.meter.One(dir); err != nil {
		return in, all, err
	}
	all = all.Plus(in)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return in, all, err
	}
	for _, d := range entries {
		if d.Name() == inner {
			continue
		}
		sp, err := a.meter.Tree(dir + "/" + d.Name())
		if err != nil {
			return in, all, err
		}
		all = all.Plus(sp)
	}
	return in, all, nil
}

func (a *account) addVolumes(context.Context) error {
	links := map[string]int{}
	for _, n := range a.containers {
		for _, m := range n.Record.Mounts {
			if m.Type == mount.TypeVolume {
				links[m.Name]++
			}
		}
	}
	vols := a.e.Volumes()
	names, err := vols.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		data, all, err := a.folder(a.e.root.Path("volumes", name), "_data")
		if err != nil {
			return err
		}
		a.u.Volumes.add(all.Disk, links[name] > 0)
		v, err := vols.Get(name)
		if err != nil {
			v.Anonymous = false // system check says what is wrong with it
		}
		a.u.VolumeList = append(a.u.VolumeList, VolumeUsage{Name: name, Anonymous: v.Anonymous, Links: links[name], Size: data.Size, Disk: all.Disk})
	}
	return nil
}

func (a *account) addCache(context.Context) error {
	for _, en := range a.entries {
		if en.Kind == build.KindHistory {
			a.put(otherHistory, en.Space.Disk, false)
			continue
		}
		a.u.BuildCache.Size += en.Space.Disk
		a.u.BuildCache.Reclaimable += en.Space.Disk
		shared := en.Layer != "" && (a.ofImage[en.Layer] || a.ofContainer[en.Layer])
		own := en.Space
		if en.Layer != "" {
			l := a.layers[en.Layer]
			own = own.Plus(disk.Space{Disk: l.disk, Size: l.content})
			if !shared {
				a.u.BuildCache.Size += l.disk
				a.u.BuildCache.Reclaimable += l.disk
			}
		}
		if !en.Step() {
			continue
		}
		a.u.BuildCache.Total++
		if shared {
			a.u.BuildCache.Active++
		}
		a.u.CacheList = append(a.u.CacheList, CacheUsage{
			ID: en.ID, Type: en.Kind, Title: en.Title, Created: en.Created, LastUsed: en.Used, Size: own.Size, Disk: own.Disk, Shared: shared,
		})
	}
	return nil
}

// addBlobs counts what addImages left in blobs/.
func (a *account) addBlobs(context.Context) error {
	list, err := os.ReadDir(a.e.root.Path("blobs", "sha256"))
	if err != nil {
		return err
	}
	for _, d := range list {
		id := ocispec.Digest("sha256:" + d.Name())
		valid := ocispec.Validate(id) == nil
		if valid && a.counted[a.blobPath(id)] {
			continue
		}
		sp, err := a.meter.Tree(a.e.root.Path("blobs", "sha256", d.Name()))
		if err != nil {
			return err
		}
		switch {
		case !valid:
			a.put(otherUnknown, sp.Disk, false)
		case a.forms[id] != "":
			// What their layers' removal frees is counted there by total; here, what goes under pressure.
			a.put(otherBlobs, sp.Disk, a.e.cfg.KeepBlobs != config.KeepAlways)
			l := a.layers[a.forms[id]]
			l.forms += sp.Disk
			a.layers[a.forms[id]] = l
		default:
			a.put(otherLoose, sp.Disk, true)
		}
	}
	return nil
}

// addRest counts everything that the others did not: each entry of the root by what its name says.
func (a *account) addRest(context.Context) error {
	root := a.e.root
	one := func(what string, reclaimable bool, elem ...string) error {
		sp, err := a.meter.One(root.Path(elem...))
		a.put(what, sp.Disk, reclaimable)
		return err
	}
	tree := func(what string, reclaimable bool, elem ...string) error {
		sp, err := a.meter.Tree(root.Path(elem...))
		a.put(what, sp.Disk, reclaimable)
		return err
	}
	entries, err := os.ReadDir(root.Path())
	if err != nil {
		return err
	}
	errs := []error{one(otherRecords, false)}
	for _, d := range entries {
		name := d.Name()
		switch name {
		case "staging", "trash", "leases", "downloads", "quarantine":
			what := map[string]string{"staging": otherStaging, "trash": otherTrash, "leases": otherLeases, "downloads": otherDownloads, "quarantine": otherQuarantine}[name]
			errs = append(errs, one(otherRecords, false, name))
			sub, err := os.ReadDir(root.Path(name))
			errs = append(errs, err)
			for _, s := range sub {
				kind := what
				if strings.HasSuffix(s.Name(), ".lock") || s.Name() == "pending" || s.Name() == "left" {
					kind = otherRecords
				}
				errs = append(errs, tree(kind, name == "trash" || name == "downloads", name, s.Name()))
			}
		case "blobs":
			errs = append(errs, one(otherRecords, false, name), one(otherRecords, false, name, "sha256"), a.strangers(name, "sha256"))
		case "layers":
			errs = append(errs, one(otherRecords, false, name))
		case "manifests":
			errs = append(errs, tree(otherRecords, false, name))
		case "images":
			errs = append(errs, one(otherRecords, false, name), one(otherRecords, false, name, "by-id"), a.imageFiles())
		case "containers":
			known := map[string]bool{}
			for _, n := range a.containers {
				known[n.Record.ID] = true
			}
			errs = append(errs, one(otherRecords, false, name), a.unclaimed(name, known))
		case "volumes":
			known := map[string]bool{}
			for _, v := range a.u.VolumeList {
				known[v.Name] = true
			}
			errs = append(errs, one(otherRecords, false, name), a.unclaimed(name, known))
		case "buildcache":
			errs = append(errs, a.cacheFolders(name))
		case "builds":
			errs = append(errs, a.cacheFolders(name))
		case "names":
			errs = append(errs, one(otherRecords, false, name))
			links, err := os.ReadDir(root.Path(name))
			errs = append(errs, err)
			for _, l := range links {
				if !a.counted[root.Path(name, l.Name())] {
					errs = append(errs, one(otherRecords, false, name, l.Name()))
				}
			}
		case "networks":
			errs = append(errs, tree(otherRecords, false, name))
		default:
			what := otherUnknown
			if slices.Contains(rootFiles, name) {
				what = otherRecords
			}
			errs = append(errs, tree(what, false, name))
		}
	}
	return errors.Join(errs...)
}

// rootFiles are the files that lie in the root itself.
var rootFiles = []string{"version", "names.lock", "volumes.lock", "oci-layout", "index.json", "gc.json", "gc.json.lock", "gc.json.run"}

// strangers counts what lies in a folder that holds only the named folders.
func (a *account) strangers(dir string, known ...string) error {
	m := map[string]bool{}
	for _, k := range known {
		m[k] = true
	}
	return a.unclaimed(dir, m)
}

// unclaimed counts what in a folder is not known.
func (a *account) unclaimed(dir string, known map[string]bool) error {
	entries, err := os.ReadDir(a.e.root.Path(dir))
	if err != nil {
		return err
	}
	for _, d := range entries {
		if known[d.Name()] {
			continue
		}
		sp, err := a.meter.Tree(a.e.root.Path(dir, d.Name()))
		if err != nil {
			return err
		}
		a.put(otherUnknown, sp.Disk, false)
	}
	return nil
}

// imageFiles counts the files of images/ that belong to no image.
func (a *account) imageFiles() error {
	known := map[ocispec.Digest]bool{}
	for _, img := range a.images {
		known[img.ID] = true
	}
	for _, f := range a.files {
		if f.Err == nil && len(f.IDs) > 0 && known[f.IDs[0]] {
			continue
		}
		sp, err := a.meter.Tree(f.Path)
		if err != nil {
			return err
		}
		what := otherRecords
		if f.Stray {
			what = otherUnknown
		}
		a.put(what, sp.Disk, false)
	}
	return nil
}

// cacheFolders counts the folders and locks of the build cache or its history, which stay when it is emptied.
func (a *account) cacheFolders(name string) error {
	claimed := map[string]bool{}
	for _, en := range a.entries {
		for _, p := range en.Paths {
			claimed[p] = true
		}
	}
	var walk func(dir string) error
	walk = func(dir string) error {
		sp, err := a.meter.One(dir)
		if err != nil {
			return err
		}
		a.put(otherRecords, sp.Disk, false)
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, d := range entries {
			p := dir + "/" + d.Name()
			switch {
			case claimed[p]:
			case d.IsDir():
				err = walk(p)
			default:
				var sp disk.Space
				if sp, err = a.meter.One(p); err == nil {
					a.put(otherRecords, sp.Disk, false)
				}
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	return walk(a.e.root.Path(name))
}

// total adds the rows up, and what a prune of everything unused frees.
func (a *account) total() {
	for _, w := range otherOrder {
		if o := a.other[w]; o.Size > 0 {
			a.u.Other.Total += o.Total
			a.u.Other.Active += o.Active
			a.u.Other.Size += o.Size
			a.u.Other.Reclaimable += o.Reclaimable
			a.u.OtherList = append(a.u.OtherList, OtherUsage{What: w, Usage: *o})
		}
	}
	rows := []Usage{a.u.Images, a.u.Containers, a.u.Volumes, a.u.BuildCache, a.u.Other}
	for _, r := range rows {
		a.u.Size += r.Size
	}
	keepImages, keepLayers, volumes := map[ocispec.Digest]bool{}, map[ocispec.Digest]bool{}, map[string]bool{}
	var stopped int64
	for i, n := range a.containers {
		if s := n.Status(); s != apic.StateRunning && s != apic.StateRestarting {
			stopped += a.u.ContainerList[i].Disk
			continue
		}
		images, layers := n.Record.Digests()
		for _, id := range images {
			keepImages[id] = true
		}
		for _, l := range layers {
			keepLayers[l] = true
		}
		for _, m := range n.Record.Mounts {
			volumes[m.Name] = true
		}
	}
	// Compressed layers go with their layers.
	a.u.Reclaimable = stopped + a.u.Other.Reclaimable - a.other[otherBlobs].Reclaimable
	for id := range a.mounted {
		keepImages[id] = true
	}
	for _, img := range a.images {
		if !keepImages[img.ID] {
			a.u.Reclaimable += a.own[img.ID]
			continue
		}
		for _, l := range img.Layers() {
			keepLayers[l] = true
		}
	}
	for id, l := range a.layers {
		if keepLayers[id] {
			continue
		}
		a.u.Reclaimable += l.forms
		if a.ofImage[id] || a.ofContainer[id] || a.ofCache[id] {
			a.u.Reclaimable += l.disk
		}
	}
	for _, en := range a.entries {
		a.u.Reclaimable += en.Space.Disk
	}
	for _, v := range a.u.VolumeList {
		if !volumes[v.Name] && v.Anonymous {
			a.u.Reclaimable += v.Disk
		}
	}
}
