package engine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"conex/internal/compress"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/layers"
	"conex/internal/layertar"
	"conex/internal/safepath"
	"conex/internal/treecopy"
	"conex/internal/volume"

	mevents "github.com/moby/moby/api/types/events"
)

// VolumeSnapshotRequest asks to keep a volume's content.
type VolumeSnapshotRequest struct {
	Volume string
	// Snapshot is its name; empty is the time.
	Snapshot string
	// NoPause leaves containers that run with the volume running meanwhile: files may be in the snapshot that no moment had together.
	NoPause bool
}

// SnapshotVolume keeps a volume's present content as a snapshot and returns its name, VOLUME@SNAPSHOT.
func (e *Engine) SnapshotVolume(ctx context.Context, req VolumeSnapshotRequest) (name string, err error) {
	if req.Snapshot == "" {
		req.Snapshot = time.Now().UTC().Format("20060102-150405.000")
	}
	if err := e.readyToWrite("snapshot " + req.Volume); err != nil {
		return "", err
	}
	u, done, err := e.readVolume(ctx, "snapshot", req.Volume, req.NoPause)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := u.Snapshot(ctx, req.Snapshot); err != nil {
		return "", classify(err)
	}
	return req.Volume + "@" + req.Snapshot, nil
}

// readyToWrite sweeps what somebody who was killed has left. A root that is mounted read-only it says at once.
func (e *Engine) readyToWrite(what string) error {
	if err := e.root.Writable(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return e.root.Sweep()
}

// readVolume begins to read a volume whole. Unless noPause, containers that run with it stand still until done.
func (e *Engine) readVolume(ctx context.Context, what, name string, noPause bool) (u *volume.Use, done func() error, err error) {
	if u, err = e.Volumes().Use(name); err != nil {
		return nil, nil, volumeError(what, name, err)
	}
	var releases []func() error
	done = func() error {
		errs := []error{}
		for _, f := range slices.Backward(releases) {
			errs = append(errs, f())
		}
		return errors.Join(append(errs, u.Release())...)
	}
	if noPause {
		return u, done, nil
	}
	running, err := e.volumeRunning(ctx, name)
	for i := 0; err == nil && i < len(running); i++ {
		var release func() error
		if release, err = e.still(ctx, running[i]); err == nil {
			releases = append(releases, release)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, done())
	}
	return u, done, nil
}

func (e *Engine) removeSnapshot(ctx context.Context, name, snapshot string) error {
	vols := e.Volumes()
	if _, err := vols.Get(name); err != nil {
		return volumeError("get", name, err)
	}
	if err := vols.HasSnapshot(name, snapshot); err != nil {
		return classify(err)
	}
	return classify(vols.RemoveSnapshot(ctx, name, snapshot))
}

// cutSnapshot splits VOLUME@SNAPSHOT. Without the latter snapshot is "".
func cutSnapshot(ref string) (name, snapshot string, err error) {
	name, snapshot, named := strings.Cut(ref, "@")
	if named {
		if err := volume.CheckSnapshotName(snapshot); err != nil {
			return "", "", invalid("%s: %w", ref, err)
		}
	}
	return name, snapshot, nil
}

// VolumeSnapshot is a snapshot of a volume.
type VolumeSnapshot struct {
	Volume, Name string
	Created      time.Time
}

// VolumeSnapshots lists the snapshots of the named volumes, or of all, oldest first.
func (e *Engine) VolumeSnapshots(_ context.Context, names []string) ([]VolumeSnapshot, error) {
	vols := e.Volumes()
	if len(names) == 0 {
		var err error
		if names, err = vols.List(); err != nil {
			return nil, err
		}
		slices.Sort(names)
	}
	var out []VolumeSnapshot
	for _, name := range names {
		if _, err := vols.Get(name); err != nil {
			return nil, volumeError("get", name, err)
		}
		list, err := vols.Snapshots(name)
		if err != nil {
			return nil, err
		}
		for _, s := range list {
			out = append(out, VolumeSnapshot{name, s.Name, s.Created})
		}
	}
	return out, nil
}

// CloneVolume makes a new volume of another one's content, or of a snapshot's (VOLUME@SNAPSHOT), with its labels and size. Unless
// noPause, containers that run with the source stand still meanwhile.
func (e *Engine) CloneVolume(ctx context.Context, from, to string, noPause bool) (err error) {
	name, snapshot, err := cutSnapshot(from)
	if err != nil {
		return err
	}
	if err := volume.CheckName(to); err != nil {
		return classify(err)
	}
	vols := e.Volumes()
	if _, err := vols.Get(to); err == nil {
		return conflict("clone %s: volume %s exists already", from, to)
	}
	if err := e.readyToWrite("clone " + from); err != nil {
		return err
	}
	u, done, err := e.readVolume(ctx, "clone", name, noPause || snapshot != "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	v := volume.Volume{Name: to, Created: time.Now().UTC(), Labels: u.Volume.Labels}
	if !u.Volume.Mounted() {
		v.Options = u.Volume.Options
	}
	made, err := vols.Create(v, disk.Durable, func(data string) error {
		if err := u.CopyTo(ctx, data, snapshot); err != nil {
			return err
		}
		return disk.SyncFS(data)
	})
	if err != nil {
		return classify(err)
	}
	if !made {
		return conflict("clone %s: volume %s exists already", from, to)
	}
	e.volumeEvent(mevents.ActionCreate, to)
	return nil
}

// RestoreVolume puts a snapshot's content in the place of its volume's. keep, unless "", is a new snapshot's name, which what was there
// becomes; otherwise it is gone. No container may run with the volume.
func (e *Engine) RestoreVolume(ctx context.Context, name, snapshot, keep string) error {
	return e.replaceVolume(ctx, "restore", name, func(vols *volume.Store, v *volume.Volume) error {
		if err := vols.HasSnapshot(name, snapshot); err != nil {
			return classify(err)
		}
		return vols.Replace(v, keep, func(data string) error { return vols.CopySnapshot(ctx, name, snapshot, data) })
	})
}

// replaceVolume calls fn with a volume that nobody uses.
func (e *Engine) replaceVolume(ctx context.Context, what, name string, fn func(*volume.Store, *volume.Volume) error) error {
	if err := e.root.Sweep(); err != nil {
		return err
	}
	vols := e.Volumes()
	if _, err := vols.Get(name); err != nil {
		return volumeError(what, name, err)
	}
	return volume.WhenFree(ctx, func() error {
		// Settles containers whose monitors died, too: their processes would go on writing.
		running, err := e.volumeRunning(ctx, name)
		if err != nil {
			return err
		}
		if len(running) > 0 {
			return conflict("%s %s: volume is in use - [%s]: stop these containers first", what, name, strings.Join(containerIDs(running), ", "))
		}
		l, err := vols.TryAlone(name)
		if err != nil {
			return volumeError(what, name, err)
		}
		defer l.Release()
		if running, err = e.volumeRunning(ctx, name); err != nil {
			return err
		}
		if len(running) > 0 { // since we looked
			return disk.ErrLocked
		}
		v, err := vols.Get(name)
		if err != nil {
			return err
		}
		return classify(fn(vols, &v))
	})
}

func containerIDs(list []*container.Snapshot) []string {
	var ids []string
	for _, n := range list {
		ids = append(ids, n.Record.ID)
	}
	return ids
}

// VolumeExportRequest asks for a volume's content as a tar.
type VolumeExportRequest struct {
	// Volume is its name, or VOLUME@SNAPSHOT.
	Volume string
	Output io.Writer
	// Compression is "gzip", "zstd" or "none", also "".
	Compression string
	// NoPause is as VolumeSnapshotRequest's.
	NoPause bool
	// Torn is told of files that were cut off while they were read. May be nil.
	Torn func(path string)
}

// ExportVolume writes a volume's content as a tar: owners, modes, times, extended attributes and hard links are in it.
func (e *Engine) ExportVolume(ctx context.Context, req VolumeExportRequest) (err error) {
	kind := compress.None
	if req.Compression != "" {
		if kind, err = compress.ParseKind(req.Compression); err != nil {
			return invalid("%w", err)
		}
	}
	name, snapshot, err := cutSnapshot(req.Volume)
	if err != nil {
		return err
	}
	u, done, err := e.readVolume(ctx, "export", name, req.NoPause || snapshot != "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	dir, err := u.Open(snapshot)
	if err != nil {
		return classify(err)
	}
	defer dir.Close()
	w, err := compress.NewWriter(req.Output, kind, compress.DefaultLevel(kind))
	if err != nil {
		return err
	}
	err = layers.WriteEntry(ctx, w, dir, ".", ".", nil, func(path string) {
		if req.Torn != nil {
			req.Torn(path)
		}
	})
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("export %s: %w", req.Volume, err)
	}
	return nil
}

// VolumeImportRequest asks to make a tar a volume's content.
type VolumeImportRequest struct {
	Volume string
	// Input is a tar, plain or compressed.
	Input io.Reader
	// Replace puts it in the place of what the volume has; without, a volume that has something is left alone. Keep, unless "", is a new
	// snapshot's name, which that becomes.
	Replace bool
	Keep    string
}

// ImportVolume makes a tar the content of a volume, which is made if it does not exist. It becomes so at once and as a whole, or not at all.
func (e *Engine) ImportVolume(ctx context.Context, req VolumeImportRequest) error {
	if err := volume.CheckName(req.Volume); err != nil {
		return classify(err)
	}
	fill := func(data string) error {
		if err := extractVolume(ctx, req.Input, data); err != nil {
			return fmt.Errorf("import %s: %w", req.Volume, err)
		}
		return nil
	}
	vols := e.Volumes()
	if _, err := vols.Get(req.Volume); errors.Is(err, volume.ErrNotFound) {
		if err := e.root.Sweep(); err != nil {
			return err
		}
		made, err := vols.Create(volume.Volume{Name: req.Volume, Created: time.Now().UTC()}, disk.Durable, func(data string) error {
			if err := fill(data); err != nil {
				return err
			}
			return disk.SyncFS(data)
		})
		if err != nil {
			return classify(err)
		}
		if made {
			e.volumeEvent(mevents.ActionCreate, req.Volume)
			return nil
		}
		return conflict("import %s: somebody else has made that volume meanwhile", req.Volume)
	}
	return e.replaceVolume(ctx, "import", req.Volume, func(vols *volume.Store, v *volume.Volume) error {
		if !req.Replace {
			full, err := vols.Full(v)
			if err != nil {
				return err
			}
			if full {
				return conflict("import %s: the volume has data: --replace puts the archive in its place, --keep NAME keeps what is there as a snapshot", req.Volume)
			}
		}
		return vols.Replace(v, req.Keep, fill)
	})
}

// extractVolume puts what is in a tar of anybody's making into an empty folder of ours.
func extractVolume(ctx context.Context, in io.Reader, data string) error {
	r, _, err := compress.Reader(bufio.NewReaderSize(endable(ctx, in), 256<<10))
	if err != nil {
		return err
	}
	defer r.Close()
	root, err := safepath.OpenRoot(data)
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = treecopy.Extract(ctx, r, root, "", treecopy.Options{KeepOwner: true, SetID: true, Caps: true, Devices: true, Top: true, Complete: true})
	var bad *layertar.EntryError
	if errors.As(err, &bad) {
		return &kindError{ErrInvalid, err}
	}
	return err
}

// VolumeUsageRequest asks what volumes take.
type VolumeUsageRequest struct{ Volumes []string }

// VolumeSpace is what a volume takes, in bytes.
type VolumeSpace struct {
	Name string
	// Size is the length of its files, Disk what they take; Shared of that is in blocks that other files have too, -1 where the file
	// system does not say.
	Size, Disk, Shared int64
	Files              int64
	// Snapshots are counted apart: SnapshotDisk is what they take, of which SnapshotShared is shared.
	Snapshots                    int
	SnapshotDisk, SnapshotShared int64
	// Limit is the volume's size option, 0 without.
	Limit int64
	Links int
}

// VolumeUsage measures volumes, all of them if none is named.
func (e *Engine) VolumeUsage(ctx context.Context, req VolumeUsageRequest) ([]VolumeSpace, error) {
	vols := e.Volumes()
	names := req.Volumes
	if len(names) == 0 {
		var err error
		if names, err = vols.List(); err != nil {
			return nil, err
		}
		slices.Sort(names)
	}
	users, err := e.volumeUsers()
	if err != nil {
		return nil, err
	}
	var out []VolumeSpace
	for _, name := range names {
		u, err := vols.Use(name)
		if err != nil {
			if len(req.Volumes) == 0 && errors.Is(err, volume.ErrNotFound) {
				continue
			}
			return nil, volumeError("get", name, err)
		}
		sp, err := spaceOf(ctx, vols, u)
		if err = errors.Join(err, u.Release()); err != nil {
			return nil, err
		}
		sp.Links = len(users[name])
		out = append(out, sp)
	}
	return out, nil
}

func spaceOf(ctx context.Context, vols *volume.Store, u *volume.Use) (VolumeSpace, error) {
	out := VolumeSpace{Name: u.Volume.Name}
	limit, err := u.Volume.Size()
	if err != nil {
		return out, err
	}
	out.Limit = limit
	var m disk.Meter
	sp, err := m.Tree(u.Dir)
	if err != nil {
		return out, err
	}
	out.Size, out.Disk, out.Files = sp.Size, sp.Disk, sp.Files
	if out.Shared, err = volume.Shared(ctx, u.Dir); err != nil {
		return out, err
	}
	list, err := vols.Snapshots(u.Volume.Name)
	if err != nil {
		return out, err
	}
	out.Snapshots = len(list)
	for _, s := range list {
		dir := vols.SnapshotData(u.Volume.Name, s.Name)
		sp, err := m.Tree(dir)
		if err != nil {
			return out, err
		}
		shared, err := volume.Shared(ctx, dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return out, err
		}
		out.SnapshotDisk += sp.Disk
		out.SnapshotShared += max(shared, 0)
	}
	return out, nil
}
