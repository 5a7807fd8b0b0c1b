package monitor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"conex/internal/container"
	"conex/internal/linux/quota"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/volume"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"
)

// sources says where a run's mounts come from, as far as the record does not.
type sources struct {
	// images has the layers of images, by destination; volumes the folders of volumes, by name; overlays those of copies on write, by destination.
	images   map[string][]string
	volumes  map[string]string
	overlays map[string]runtime.Overlay
}

// sources holds the container's volumes for the run, and makes the folders that its overlay mounts write to.
func (r *run) sources() (sources, error) {
	m := r.m
	out := sources{images: m.req.Images}
	for _, p := range m.rec.Mounts {
		from := p.Source
		if p.Type == mount.TypeVolume {
			if out.volumes[p.Name] == "" {
				u, err := volume.Open(m.root, m.req.State).Use(p.Name)
				if err != nil {
					return out, err
				}
				r.volumes = append(r.volumes, u)
				if out.volumes == nil {
					out.volumes = map[string]string{}
				}
				out.volumes[p.Name] = u.Dir
			}
			from = out.volumes[p.Name]
		}
		more := m.rec.More[p.Destination]
		if more.Overlay == "" {
			continue
		}
		o, err := m.overlay(p, more, from)
		if err != nil {
			return out, fmt.Errorf("mount %s: %w", p.Destination, err)
		}
		if out.overlays == nil {
			out.overlays = map[string]runtime.Overlay{}
		}
		out.overlays[p.Destination] = o
	}
	return out, nil
}

// leaveVolumes lets others have the run's volumes alone. Idempotent.
func (r *run) leaveVolumes() error {
	var errs []error
	for _, u := range r.volumes {
		errs = append(errs, u.Release())
	}
	r.volumes = nil
	return errors.Join(errs...)
}

// leaveSources ends what sources began. Idempotent.
func (r *run) leaveSources() error {
	errs := []error{r.leaveVolumes()}
	for dst, more := range r.m.rec.More {
		if more.Overlay == container.OverlayDiscard {
			errs = append(errs, r.m.root.Trash(r.m.store.OverlayDir(r.m.rec.ID, dst)))
		}
	}
	return errors.Join(errs...)
}

// overlay makes the folders of an overlay mount of the folder from. One whose changes are to be discarded begins anew: a crash may
// have left it.
func (m *monitor) overlay(p apic.MountPoint, more container.Mount, from string) (runtime.Overlay, error) {
	dir := m.store.OverlayDir(m.rec.ID, p.Destination)
	o := runtime.Overlay{Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), Volatile: more.Overlay == container.OverlayDiscard}
	if o.Volatile {
		if err := m.root.Trash(dir); err != nil {
			return o, err
		}
	}
	if err := os.MkdirAll(o.Work, 0o700); err != nil {
		return o, err
	}
	if _, err := os.Lstat(o.Upper); !errors.Is(err, fs.ErrNotExist) {
		return o, err
	}
	// The overlay's top is the upper folder's own, so that begins as the source's; made aside, since a crash must not leave a part.
	src, err := safepath.OpenRoot(from)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) {
			return o, fmt.Errorf("overlay is for folders: %s is none", from)
		}
		return o, err
	}
	defer src.Close()
	st, err := safepath.Stat(src, filepath.Join("/", more.Subpath))
	if err != nil {
		return o, fmt.Errorf("cannot access path %s: %w", more.Subpath, errors.Unwrap(err))
	}
	fresh := filepath.Join(dir, "fresh")
	if err := os.RemoveAll(fresh); err != nil {
		return o, err
	}
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return o, err
	}
	if err := os.Lchown(fresh, int(st.Uid), int(st.Gid)); err != nil {
		return o, err
	}
	if err := unix.Chmod(fresh, st.Mode&0o7777); err != nil {
		return o, err
	}
	if m.rec.Options.Project != 0 { // --storage-opt size bounds it too
		size, err := container.StorageSize(m.rec.HostConfig)
		if err != nil {
			return o, err
		}
		for _, d := range []string{o.Work, fresh} {
			if err := quota.Limit(d, m.rec.Options.Project, size); err != nil {
				return o, err
			}
		}
	}
	return o, os.Rename(fresh, o.Upper)
}
