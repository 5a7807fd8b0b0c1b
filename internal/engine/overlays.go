package engine

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"

	"conex/internal/container"
	lmount "conex/internal/linux/mount"
	"conex/internal/safepath"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"
)

// overlays reads overlay=.
func (m *mounter) overlays() error {
	for dst, val := range m.rec.Options.Overlay {
		dst = path.Clean(dst)
		at := slices.IndexFunc(m.rec.Mounts, func(p apic.MountPoint) bool { return p.Destination == dst })
		if at < 0 || m.rec.Mounts[at].Type != mount.TypeBind && m.rec.Mounts[at].Type != mount.TypeVolume {
			return invalid("overlay is for bind mounts and volumes: %s is none", dst)
		}
		p := &m.rec.Mounts[at]
		switch {
		case val != container.OverlayDiscard && val != container.OverlayKeep:
			return invalid("invalid overlay %q of %s: neither %s nor %s", val, dst, container.OverlayDiscard, container.OverlayKeep)
		case !p.RW:
			return invalid("overlay and read-only exclude each other: nothing could be written to %s", dst)
		case m.rec.More[dst].Owner != nil:
			return invalid("overlay and idmap exclude each other: what the container writes to %s does not go to the source", dst)
		case p.Propagation != "" && p.Propagation != mount.PropagationRPrivate:
			return invalid("overlay and the propagation %s exclude each other: a copy on write of %s shows no mounts", p.Propagation, dst)
		}
		if p.Type == mount.TypeBind {
			if fi, err := os.Stat(p.Source); err == nil && !fi.IsDir() {
				return invalid("overlay is for folders: %s is none", p.Source)
			}
		}
		m.more(dst, func(d *container.Mount) { d.Overlay = val })
		p.Mode = "overlay=" + val
	}
	return nil
}

// overlayTree shows an overlay mount of a container that does not run, read-only: what is written to it then would go nowhere.
func (e *Engine) overlayTree(_ context.Context, rec *container.Record, m apic.MountPoint, sub, source string) (*os.File, error) {
	dir, err := safepath.OpenRoot(source)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	at, err := safepath.Open(dir, "/"+sub, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("subpath %s: %w", sub, err)
	}
	defer at.Close()
	lower := []string{fmt.Sprintf("/proc/self/fd/%d", at.Fd())}
	upper := filepath.Join(e.Containers().OverlayDir(rec.ID, m.Destination), "upper")
	if _, err := os.Lstat(upper); err == nil {
		lower = append([]string{upper}, lower...)
	}
	return lmount.Overlay(lmount.OverlayOptions{Lower: lower})
}
