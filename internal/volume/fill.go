package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"conex/internal/disk"

	"golang.org/x/sys/unix"
)

// Fill gives a volume that exists and is empty what fill puts into a folder. With fill nil, or something in the volume, nothing is done.
// A nil error promises that it survives a power loss, if fill promises that of the content.
//
// The content is made aside, so a crash leaves all of it or nothing; whoever runs with the volume meanwhile sees it come. What is
// mounted from elsewhere is filled in place, and again from the beginning after a crash.
func (s *Store) Fill(ctx context.Context, name string, fill func(dir string) error) error {
	if fill == nil {
		return nil
	}
	u, err := s.Use(name)
	if err != nil {
		return err
	}
	if err = u.fill(ctx, fill); errors.Is(err, ErrNothing) {
		err = nil
	}
	return errors.Join(err, u.Release())
}

func (u *Use) fill(ctx context.Context, fill func(dir string) error) error {
	if full, err := u.full(); full || err != nil {
		return err
	}
	s, name := u.store, u.Volume.Name
	l, err := disk.AcquireContext(ctx, s.path(name, "fill.lock")) // of several at a time, one fills it
	if err != nil {
		return err
	}
	defer l.Release()
	if full, err := u.full(); full || err != nil {
		return err
	}
	if u.Volume.Mounted() {
		mark := s.path(name, "filling")
		if err := disk.WriteFile(mark, nil, 0o600, disk.Durable); err != nil {
			return err
		}
		err := fill(u.Dir)
		if err == nil || errors.Is(err, ErrNothing) {
			// The mark goes when all is on the disk, and does not come back: what is there then may be replaced.
			err = errors.Join(err, disk.SyncFS(u.Dir), os.Remove(mark), disk.SyncDir(s.path(name)))
		}
		return err
	}
	st, err := s.root.Stage()
	if err != nil {
		return err
	}
	defer st.Close()
	data, err := s.makeData(st.Dir, &u.Volume, u.Dir)
	if err != nil {
		return err
	}
	if err := fill(data); err != nil {
		return err
	}
	if err := s.fits(data, &u.Volume); err != nil {
		return err
	}
	if _, err := disk.Publish(data, s.path(name, "fill")); err != nil {
		return err
	}
	if err := s.pourLocked(name); err != nil {
		return err
	}
	return disk.SyncDir(u.Dir)
}

// Full reports whether there is something in a volume. The caller has it alone.
func (s *Store) Full(v *Volume) (bool, error) {
	if err := s.pour(v.Name); err != nil {
		return false, err
	}
	return (&Use{Dir: s.Data(v.Name), Volume: *v, store: s}).full()
}

// full reports whether there is something in the volume.
func (u *Use) full() (bool, error) {
	if u.Volume.Mounted() {
		if _, err := os.Lstat(u.store.path(u.Volume.Name, "filling")); err == nil {
			return false, nil
		}
	}
	d, err := os.Open(u.Dir)
	if err != nil {
		return false, fmt.Errorf("open volume %s: %w", u.Volume.Name, err)
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(2)
		if err == io.EOF {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		for _, n := range names {
			if n != "lost+found" || !u.Volume.Mounted() {
				return true, nil
			}
		}
	}
}

// pour finishes a fill that somebody who was killed began.
func (s *Store) pour(name string) error {
	if _, err := os.Lstat(s.path(name, "fill")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := disk.Acquire(s.path(name, "fill.lock"))
	if err != nil {
		return err
	}
	defer l.Release()
	return s.pourLocked(name)
}

// pourLocked moves what is in fill, which is whole, into the volume. What somebody has made there meanwhile stays. Idempotent.
func (s *Store) pourLocked(name string) error {
	from, to := s.path(name, "fill"), s.Data(name)
	src, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	names, err := src.Readdirnames(-1)
	if err != nil {
		return err
	}
	// Before anything comes in, since that changes the time.
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return err
	}
	for _, n := range names {
		if _, err := disk.Publish(filepath.Join(from, n), filepath.Join(to, n)); err != nil {
			return err
		}
	}
	dst, err := os.Open(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := attributes(int(dst.Fd()), "", fmt.Sprintf("/proc/self/fd/%d", src.Fd()), &st); err != nil {
		return err
	}
	return s.root.Trash(from)
}
