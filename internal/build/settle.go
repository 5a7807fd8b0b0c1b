package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"conex/internal/disk"
	"conex/internal/linux/cgroup"
	"conex/internal/network"
)

// running marks a RUN step in the state folder: build/<id>.lock, held under flock by the building process. When it dies, however it
// dies, the next Settle finds the file unlocked and takes down what is left of the step.
type running struct {
	path string
	lock *disk.Lock
	// parent is the cgroup that the step's own is made in, relative to each hierarchy's root. The file says it where it is not conex's own.
	parent string
}

// cgroup is the step's.
func (r *running) cgroup() string {
	return "/" + cgroupOf(r.parent, strings.TrimSuffix(filepath.Base(r.path), ".lock"))
}

func cgroupOf(parent, id string) string {
	return strings.TrimPrefix(path.Join("/", cmp.Or(parent, "conex"), "build-"+id), "/")
}

func own(state, id, parent string) (*running, error) {
	dir := filepath.Join(state, "build")
	path := filepath.Join(dir, id+".lock")
	l, err := disk.Acquire(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		l, err = disk.Acquire(path)
	}
	if err != nil {
		return nil, err
	}
	r := &running{path: path, lock: l, parent: parent}
	if parent != "" {
		if _, err := l.File().WriteString(parent); err != nil {
			r.release()
			return nil, err
		}
	}
	return r, nil
}

func (r *running) release() {
	if r.lock == nil {
		return
	}
	os.Remove(r.path)
	r.lock.Release()
	r.lock = nil
}

// Guest is a running process outside of any build that is settled as a RUN step is: conex debug's.
type Guest struct{ r *running }

// NewGuest makes one. When its process dies, however it dies, the next Settle takes down what is left of it.
func NewGuest(state string) (*Guest, error) {
	r, err := own(state, disk.RandomID(), "")
	if err != nil {
		return nil, err
	}
	return &Guest{r}, nil
}

// Cgroup is the process's, relative to each hierarchy's root.
func (p *Guest) Cgroup() string { return p.r.cgroup() }

// Release forgets it, once nothing runs in it.
func (p *Guest) Release() { p.r.release() }

// Settle ends the RUN steps of builders that are dead: it kills what still runs of them and frees cgroup and address. Their folders lie
// in staging/, which disk.Root.Sweep clears. nets may be nil. Cheap when there is nothing to do.
func Settle(ctx context.Context, state string, nets *network.Manager) error {
	dir := filepath.Join(state, "build")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("settle builds: %w", err)
	}
	var errs []error
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".lock")
		if !ok {
			continue
		}
		path := filepath.Join(dir, e.Name())
		l, err := disk.TryAcquire(path)
		if errors.Is(err, disk.ErrLocked) {
			continue // it is alive
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		parent, err := io.ReadAll(l.File())
		if err == nil {
			err = settleOne(ctx, id, string(parent), nets)
		}
		if err == nil {
			err = os.Remove(path)
		}
		l.Release()
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("settle builds: %w", err)
	}
	return nil
}

func settleOne(ctx context.Context, id, parent string, nets *network.Manager) error {
	cg, err := cgroup.New(cgroupOf(parent, id))
	if err != nil {
		return err
	}
	if err := cg.Kill(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		return err
	}
	if err := cg.Delete(); err != nil {
		return err
	}
	if nets == nil {
		return nil
	}
	return nets.DetachDead(ctx, id)
}
