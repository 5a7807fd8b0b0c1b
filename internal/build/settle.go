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
	"conex/internal/linux/mount"
	"conex/internal/network"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// running marks a RUN step in the state folder: build/<id>.lock, held under flock by the building process. When it dies, however it
// dies, the next Settle finds the file unlocked and takes down what is left of the step.
type running struct {
	path string
	lock *disk.Lock
	// mounts are what attach made, until detach.
	mounts []string
}

// attach shows a detached mount, for a moment, in the host's mount namespace: the container's thread can take mounts only from the
// namespace that it comes from. The place is build/<id>.<n>, where Settle finds it after a crash.
func (r *running) attach(m *os.File) (dir string, err error) {
	dir = fmt.Sprintf("%s.%d", strings.TrimSuffix(r.path, ".lock"), len(r.mounts))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	r.mounts = append(r.mounts, dir)
	at, err := safepath.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer at.Close()
	return dir, mount.Attach(m, at)
}

// detach takes back what attach showed. What a container has of it stays there.
func (r *running) detach() error {
	var errs []error
	for _, dir := range r.mounts {
		errs = append(errs, unmount(dir))
	}
	r.mounts = nil
	return errors.Join(errs...)
}

func unmount(dir string) error {
	// EINVAL: nothing is mounted there, since the builder died before it was.
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
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
	return &running{path: path, lock: l}, nil
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
		for _, m := range entries {
			if strings.HasPrefix(m.Name(), id+".") && m.IsDir() {
				err = errors.Join(err, unmount(filepath.Join(dir, m.Name())))
			}
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
