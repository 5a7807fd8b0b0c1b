package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
}

func own(state, id string) (*running, error) {
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
	return &running{path, l}, nil
}

func (r *running) release() {
	if r.lock == nil {
		return
	}
	os.Remove(r.path)
	r.lock.Release()
	r.lock = nil
}

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
		err = settleOne(ctx, id, nets)
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

func settleOne(ctx context.Context, id string, nets *network.Manager) error {
	cg, err := cgroup.New("conex/build-" + id)
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
	return nets.Detach(ctx, id)
}
