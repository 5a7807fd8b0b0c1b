package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/linux/quota"

	apic "github.com/moby/moby/api/types/container"
)

// firstProject is where the project numbers of containers begin, above those that administrators write into /etc/projid.
const firstProject = 1 << 24

// validateStorage refuses --storage-opt where the file system of the writable layers can't do it.
func (e *Engine) validateStorage(_ context.Context, _ *apic.Config, hc *apic.HostConfig) error {
	size, err := container.StorageSize(hc)
	if err != nil {
		return invalid("%w", err)
	}
	if size == 0 {
		return nil
	}
	if err := quota.Check(e.root.Path("containers")); err != nil {
		if errors.Is(err, quota.ErrNotSupported) {
			return invalid("--storage-opt is supported only for overlay over xfs or ext4 with project quotas ('pquota' or 'prjquota' mount option): %w", err)
		}
		return err
	}
	return nil
}

// giveNumbers gives a container the ids and the project number that it asks for. The lock is held until the record that has them is
// written: records are all that says which are taken, so they come free with their container, however that goes. It is nil when
// there is nothing to give.
func (e *Engine) giveNumbers(ctx context.Context, rec *container.Record) (lock *disk.Lock, err error) {
	_, ids, err := usersMode(rec.HostConfig.UsernsMode)
	if err != nil {
		return nil, err
	}
	size, err := container.StorageSize(rec.HostConfig)
	if err != nil || size == 0 && ids == 0 {
		return nil, err
	}
	if lock, err = disk.AcquireContext(ctx, e.root.Path("numbers.lock")); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Release()
			lock = nil
		}
	}()
	taken, err := e.takenNumbers()
	if err != nil {
		return lock, err
	}
	if ids > 0 {
		if rec.Options.Users, err = e.findUsers(taken.ids, ids); err != nil {
			return lock, err
		}
	}
	if size > 0 {
		if err := e.volumeProjects(taken.projects); err != nil {
			return lock, err
		}
		rec.Options.Project = freeProject(taken.projects)
	}
	return lock, nil
}

// numbers are those that containers have.
type numbers struct {
	ids      []container.IDs
	projects map[uint32]bool
}

func (e *Engine) takenNumbers() (numbers, error) {
	out := numbers{projects: map[uint32]bool{}}
	cs := e.Containers()
	all, err := cs.List()
	if err != nil {
		return out, err
	}
	for _, id := range all {
		r, err := cs.Load(id)
		if errors.Is(err, container.ErrNotFound) {
			continue
		}
		if err != nil {
			return out, fmt.Errorf("look which ids are taken: %w", err)
		}
		if r.Options.Users != nil {
			out.ids = append(out.ids, *r.Options.Users)
		}
		out.projects[r.Options.Project] = true
	}
	return out, nil
}

// volumeNumber gives a project number to a volume, see volume.Store.
func (e *Engine) volumeNumber() (uint32, func(), error) {
	if err := quota.Check(e.root.Path("volumes")); err != nil {
		return 0, nil, err
	}
	lock, err := disk.Acquire(e.root.Path("numbers.lock"))
	if err != nil {
		return 0, nil, err
	}
	taken, err := e.takenNumbers()
	if err == nil {
		err = e.volumeProjects(taken.projects)
	}
	if err != nil {
		lock.Release()
		return 0, nil, err
	}
	return freeProject(taken.projects), lock.Release, nil
}

// volumeProjects adds the numbers that volumes have.
func (e *Engine) volumeProjects(taken map[uint32]bool) error {
	of, err := e.Volumes().Projects()
	maps.Copy(taken, of)
	return err
}

func freeProject(taken map[uint32]bool) uint32 {
	n := uint32(firstProject)
	for taken[n] {
		n++
	}
	return n
}
