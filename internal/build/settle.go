package build

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	// place is the step's cgroup. The file says it where it is not in conex's own: its parent, relative to each hierarchy's root, or with
	// systemd the whole.
	place cgroup.Place
}

func own(state, id, parent string, systemd bool) (*running, error) {
	place, err := cgroup.ForContainer("build-"+id, parent, systemd)
	if err != nil {
		return nil, err
	}
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
	r := &running{path: path, lock: l, place: place}
	note := parent
	if systemd {
		note = place.String()
	}
	if note != "" {
		if _, err := l.File().WriteString(note); err != nil {
			r.release()
			return nil, err
		}
	}
	return r, nil
}

// placeOf reads what own has written.
func placeOf(note, id string) (cgroup.Place, error) {
	if strings.HasSuffix(note, ":conex:build-"+id) {
		return cgroup.Parse(note, true)
	}
	return cgroup.ForContainer("build-"+id, note, false)
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

// NewGuest makes one, whose cgroup is made by conex or systemd. When its process dies, however it dies, the next Settle takes down what is left of it.
func NewGuest(state string, systemd bool) (*Guest, error) {
	r, err := own(state, disk.RandomID(), "", systemd)
	if err != nil {
		return nil, err
	}
	return &Guest{r}, nil
}

// Cgroup is the process's.
func (p *Guest) Cgroup() cgroup.Place { return p.r.place }

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
		note, err := io.ReadAll(l.File())
		if err == nil {
			err = settleOne(ctx, id, string(note), nets)
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

func settleOne(ctx context.Context, id, note string, nets *network.Manager) error {
	place, err := placeOf(note, id)
	if err != nil {
		return err
	}
	cg, err := cgroup.Open(place)
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
