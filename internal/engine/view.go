package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/linux/mount"
	"conex/internal/linux/pidfd"
	"conex/internal/linux/thread"
	"conex/internal/linux/userns"
	"conex/internal/safepath"
	"conex/internal/treecopy"
	"conex/internal/undo"

	apic "github.com/moby/moby/api/types/container"
	apimount "github.com/moby/moby/api/types/mount"
	"golang.org/x/sys/unix"
)

// view is a container's file system with what is mounted in it, seen from outside: root is for package safepath alone, since what
// is in there is not ours. Nothing of it shows in the host's mount namespace, and all ends with this process at the latest.
type view struct {
	root *os.File
	back undo.Stack
	// ids are those of the container's user namespace, which owners are seen with in a running one; nil: an id is an id.
	ids *treecopy.IDs
}

// do runs f, which makes files in the view, as whoever may.
func (v *view) do(f func() error) error {
	if v.ids == nil {
		return f()
	}
	done := make(chan error, 1)
	thread.Go(func() { // which makes files as the container's root until it ends
		err := userns.FilesAs(v.ids.First, v.ids.First)
		if err == nil {
			err = f()
		}
		done <- err
	})
	return <-done
}

func (v *view) Close() { v.back.Run() }

// view opens a container's file system: of a running one what its processes see at this moment, of another one its layers with its volumes
// and bind mounts, as it would have them. With write the one that does not run can't be started or removed until Close.
func (e *Engine) view(ctx context.Context, n *container.Snapshot, write bool) (*view, error) {
	id := n.Record.ID
	for {
		a := n.Alive()
		switch {
		case a != nil && a.Status == container.Restarting && write:
			return nil, conflict("container %s is restarting, wait until the container is running", id)
		case a != nil && a.Status != container.Restarting:
			v, err := liveView(id, a)
			if v != nil && n.Record.Options.Users != nil {
				v.ids = (*treecopy.IDs)(n.Record.Options.Users)
			}
			if v != nil || err != nil {
				return v, err
			}
		default:
			v, err := e.stillView(ctx, n.Record, write)
			if !errors.Is(err, container.ErrBusy) {
				return v, err
			}
		}
		// It has ended or begun since we looked.
		var err error
		if n, err = e.lookAgain(ctx, id); err != nil {
			return nil, err
		}
	}
}

// lookAgain is snapshot for who has seen a container's process end before its monitor has said so, which it does at once.
func (e *Engine) lookAgain(ctx context.Context, id string) (*container.Snapshot, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(time.Millisecond):
		return e.snapshot(ctx, id)
	}
}

// initOf opens the first process of a running container; nil when there is none any more. The monitor's word for its number may be older
// than the number's next owner, so it is the container's only if it is in its cgroup, held by its descriptor meanwhile.
func initOf(id string, a *container.State) (*os.File, error) {
	p, err := pidfd.Open(a.Pid)
	if errors.Is(err, pidfd.ErrExited) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.Pid))
	if gone(p, err) || err == nil && !strings.Contains(string(groups), id) {
		p.Close()
		return nil, nil
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// gone reports whether a process has ended, and err, if any, comes of that: one that nobody has waited for yet has nothing left in /proc.
func gone(p *os.File, err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(pidfd.SendSignal(p, 0), pidfd.ErrExited)
}

// liveView opens what the first process of a running container sees; nil when there is none any more.
func liveView(id string, a *container.State) (*view, error) {
	p, err := initOf(id, a)
	if p == nil {
		return nil, err
	}
	defer p.Close()
	root, err := safepath.OpenRoot(fmt.Sprintf("/proc/%d/root", a.Pid))
	if gone(p, err) {
		if root != nil {
			root.Close()
		}
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("file system of container %s: %w", id[:12], err)
	}
	v := &view{root: root}
	v.back.Add(func() { root.Close() })
	return v, nil
}

// stillView makes the mounts of a container that does not run. ErrBusy says that it does.
func (e *Engine) stillView(ctx context.Context, rec *container.Record, write bool) (_ *view, err error) {
	v := &view{}
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if write {
		if err := e.lockStill(ctx, rec.ID, &v.back); err != nil {
			return nil, err
		}
	}
	held := slices.Clone(rec.Layers)
	for _, m := range rec.More {
		held = append(held, m.Layers...)
	}
	lease, err := collect.Hold(e.root, held...)
	if err != nil {
		return nil, err
	}
	v.back.Add(func() { lease.Close() })
	if write {
		v.root, err = e.writableTree(ctx, rec)
	} else {
		v.root, err = e.mergedTree(ctx, rec)
	}
	if err != nil {
		return nil, err
	}
	v.back.Add(func() { v.root.Close() })
	mounts := slices.DeleteFunc(slices.Clone(rec.Mounts), func(m apic.MountPoint) bool {
		return m.Type != apimount.TypeBind && m.Type != apimount.TypeVolume && m.Type != apimount.TypeImage
	})
	if len(mounts) > 0 {
		err = e.showMounts(ctx, v, rec, mounts, write)
	}
	if len(mounts) == 0 && write && rec.HostConfig.ReadonlyRootfs {
		err = mount.SetAttr(v.root, unix.MOUNT_ATTR_RDONLY, 0, 0, false)
	}
	if err != nil {
		return nil, err
	}
	return v, nil
}

// lockStill keeps a container that does not run from being started or removed until back runs.
func (e *Engine) lockStill(ctx context.Context, id string, back *undo.Stack) error {
	cs := e.Containers()
	l, err := cs.LockIdle(ctx, id)
	if err != nil {
		return err
	}
	if _, err := cs.Load(id); err != nil {
		if errors.Is(err, container.ErrNotFound) {
			err = errors.Join(err, cs.RemoveRun(id)) // which our lock has made
		}
		l.Release()
		return classify(err)
	}
	back.Add(func() { l.Release() })
	return nil
}

// writableTree is mergedTree to write to; the caller has the container's lock.
func (e *Engine) writableTree(ctx context.Context, rec *container.Record) (*os.File, error) {
	ls, err := e.Layers()
	if err != nil {
		return nil, err
	}
	lower, err := ls.Lower(ctx, rec.Layers)
	if err != nil {
		return nil, err
	}
	cs := e.Containers()
	if len(lower) == 0 {
		return mount.Clone(unix.AT_FDCWD, cs.Dir(rec.ID, "upper"), false)
	}
	return mount.Overlay(mount.OverlayOptions{Lower: lower, Upper: cs.Dir(rec.ID, "upper"), Work: cs.Dir(rec.ID, "work")})
}

// showMounts puts a container's binds and volumes where the container has them: in a mount namespace of a thread that lasts as long as
// the view, since older kernels mount nothing on what is mounted nowhere.
func (e *Engine) showMounts(ctx context.Context, v *view, rec *container.Record, mounts []apic.MountPoint, write bool) error {
	slices.SortStableFunc(mounts, func(a, b apic.MountPoint) int { // parents before what is mounted in them
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	trees := make([]*os.File, 0, len(mounts))
	defer func() {
		for _, t := range trees {
			t.Close()
		}
	}()
	for _, m := range mounts {
		t, err := e.mountTree(ctx, rec, m)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		trees = append(trees, t)
	}
	ready, quit := make(chan error, 1), make(chan struct{})
	thread.Go(func() { // ends with the view
		err := attachAll(v.root, e.cfg.State, mounts, trees, write)
		if err == nil && write && rec.HostConfig.ReadonlyRootfs { // here, where it is mounted
			err = mount.SetAttr(v.root, unix.MOUNT_ATTR_RDONLY, 0, 0, false)
		}
		ready <- err
		if err == nil {
			<-quit
		}
	})
	err := <-ready
	if errors.Is(err, errNoMountPoint) {
		// Never started: make what its start would make, and look again.
		if err := e.makeMountPoints(ctx, rec, mounts); err != nil {
			return err
		}
		v.root.Close()
		tree, err := e.mergedTree(ctx, rec)
		if err != nil {
			return err
		}
		v.root = tree
		return e.showMounts(ctx, v, rec, mounts, true)
	}
	if err != nil {
		return err
	}
	done := sync.OnceFunc(func() { close(quit) })
	v.back.Add(done)
	return nil
}

// errNoMountPoint says that a read-only view has nothing there to mount on.
var errNoMountPoint = errors.New("no mount point")

// attachAll runs on a thread that is to have a mount namespace of its own. at is an existing folder, covered in there.
func attachAll(root *os.File, at string, mounts []apic.MountPoint, trees []*os.File, make bool) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	place, err := safepath.OpenRoot(at)
	if err != nil {
		return err
	}
	defer place.Close()
	if err := mount.Attach(root, place); err != nil {
		return err
	}
	for i, m := range mounts {
		target, err := mountTarget(root, m.Destination, trees[i], make)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		err = mount.Attach(trees[i], target)
		target.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// mountTarget opens what a mount covers, and makes it where it is missing.
func mountTarget(root *os.File, path string, tree *os.File, make bool) (*os.File, error) {
	at, err := safepath.Open(root, path, unix.O_PATH, 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return at, err
	}
	if !make {
		return nil, errNoMountPoint
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return safepath.MkdirAll(root, path, 0o755)
	}
	return safepath.MakeFile(root, path, 0o755)
}

// mountTree is a bind mount, volume or image as a mount that is attached nowhere. A lease holds the image's layers.
func (e *Engine) mountTree(ctx context.Context, rec *container.Record, m apic.MountPoint) (*os.File, error) {
	more := rec.More[m.Destination]
	t, err := e.mountSource(ctx, rec, m, more)
	if err != nil {
		return nil, err
	}
	if more.Subpath != "" && more.Overlay == "" {
		at, err := safepath.Open(t, more.Subpath, unix.O_PATH, 0)
		if err == nil {
			var part *os.File
			part, err = mount.Clone(int(at.Fd()), "", true)
			at.Close()
			t.Close()
			t = part
		}
		if err != nil {
			return nil, fmt.Errorf("subpath %s: %w", more.Subpath, err)
		}
	}
	set := uint64(0)
	if !m.RW {
		set = unix.MOUNT_ATTR_RDONLY
	}
	if err := mount.SetAttr(t, set, 0, unix.MS_PRIVATE, true); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (e *Engine) mountSource(ctx context.Context, rec *container.Record, m apic.MountPoint, more container.Mount) (*os.File, error) {
	source := m.Source
	switch m.Type {
	case apimount.TypeImage:
		return e.layerTree(ctx, more.Layers)
	case apimount.TypeVolume:
		u, err := e.Volumes().Use(m.Name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = u.Release() }() // the mount that is made here lasts; what stays of the volume's own, the next settler takes
		source = u.Dir
	}
	if more.Overlay != "" {
		return e.overlayTree(ctx, rec, m, more.Subpath, source)
	}
	t, err := mount.Clone(unix.AT_FDCWD, source, !more.NonRecursive)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bind source path does not exist: %s", m.Source)
	}
	return t, err
}

// makeMountPoints makes in a container's writable layer what its mounts cover. The container does not run.
func (e *Engine) makeMountPoints(ctx context.Context, rec *container.Record, mounts []apic.MountPoint) error {
	var back undo.Stack
	defer back.Run()
	if err := e.lockStill(ctx, rec.ID, &back); err != nil {
		return err
	}
	tree, err := e.writableTree(ctx, rec)
	if err != nil {
		return err
	}
	defer tree.Close()
	for _, m := range mounts {
		t, err := e.mountTree(ctx, rec, m)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		at, err := mountTarget(tree, m.Destination, t, true)
		t.Close()
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		at.Close()
	}
	return nil
}
