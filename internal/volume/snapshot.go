package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/mount"

	"golang.org/x/sys/unix"
)

// Snapshot is what a snapshot's meta.json says: a volume's content at one time. It lies with its volume and goes with it.
type Snapshot struct {
	Name    string    `json:"-"`
	Created time.Time `json:"created"`
}

// SnapshotData returns the folder of a snapshot's content.
func (s *Store) SnapshotData(name, snapshot string) string {
	return s.path(name, "snapshots", snapshot, "_data")
}

// Snapshots lists a volume's snapshots, oldest first.
func (s *Store) Snapshots(name string) ([]Snapshot, error) {
	entries, err := os.ReadDir(s.path(name, "snapshots"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list snapshots of volume %s: %w", name, err)
	}
	var all []Snapshot
	for _, e := range entries {
		snap := Snapshot{Name: e.Name()}
		err := disk.ReadJSON(s.path(name, "snapshots", e.Name(), "meta.json"), &snap)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, snap)
	}
	slices.SortFunc(all, func(a, b Snapshot) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return all, nil
}

// HasSnapshot returns nil if a volume has a snapshot of that name, otherwise ErrNotFound.
func (s *Store) HasSnapshot(name, snapshot string) error {
	err := CheckSnapshotName(snapshot)
	if err == nil {
		_, err = os.Lstat(s.SnapshotData(name, snapshot))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return &missingSnapshot{name, snapshot}
	}
	return err
}

// missingSnapshot is ErrNotFound about a snapshot.
type missingSnapshot struct{ volume, name string }

func (e *missingSnapshot) Error() string        { return "volume " + e.volume + " has no snapshot " + e.name }
func (e *missingSnapshot) Is(target error) bool { return target == ErrNotFound }

// Snapshot keeps the volume's present content under a name. ErrExists if it is taken. A nil error promises that the snapshot survives a
// power loss.
func (u *Use) Snapshot(ctx context.Context, snapshot string) error {
	s, name := u.store, u.Volume.Name
	if err := CheckSnapshotName(snapshot); err != nil {
		return err
	}
	if s.HasSnapshot(name, snapshot) == nil {
		return fmt.Errorf("snapshot %s@%s: %w", name, snapshot, ErrExists)
	}
	st, err := s.root.Stage()
	if err != nil {
		return err
	}
	defer st.Close()
	snap := Snapshot{Created: time.Now().UTC()} // before the copy, so no file in it is younger
	if err := os.Mkdir(filepath.Join(st.Dir, "_data"), 0o755); err != nil {
		return err
	}
	if err := u.CopyTo(ctx, filepath.Join(st.Dir, "_data"), ""); err != nil {
		return err
	}
	if err := disk.WriteJSON(filepath.Join(st.Dir, "meta.json"), snap, disk.Volatile); err != nil {
		return err
	}
	if err := disk.SyncFS(st.Dir); err != nil {
		return err
	}
	return s.publishSnapshot(st, name, snapshot)
}

func (s *Store) publishSnapshot(st *disk.Stage, name, snapshot string) error {
	all := s.path(name, "snapshots")
	switch err := os.Mkdir(all, 0o700); {
	case err == nil:
		if err := disk.SyncDir(s.path(name)); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	won, err := st.Publish(filepath.Join(all, snapshot))
	if err == nil && !won {
		return fmt.Errorf("snapshot %s@%s: %w", name, snapshot, ErrExists)
	}
	return errors.Join(err, disk.SyncDir(all))
}

// RemoveSnapshot deletes a snapshot, as soon as nobody reads it.
func (s *Store) RemoveSnapshot(ctx context.Context, name, snapshot string) error {
	if err := s.HasSnapshot(name, snapshot); err != nil {
		return err
	}
	l, err := disk.AcquireContext(ctx, s.path(name, "snapshots", snapshot, "lock"))
	if err != nil {
		return err
	}
	defer l.Release()
	return s.root.Trash(s.path(name, "snapshots", snapshot))
}

// CopyTo copies the volume's content, or a snapshot's, into the empty folder dir, shared with it where the file system can. Whoever runs
// with the volume may change it meanwhile.
func (u *Use) CopyTo(ctx context.Context, dir, snapshot string) error {
	src, err := u.Open(snapshot)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := CopyTree(ctx, dir, src, CopyOptions{Live: snapshot == ""}); err != nil {
		return fmt.Errorf("copy volume %s: %w", u.Volume.Name, err)
	}
	return nil
}

// CopySnapshot is CopyTo of a snapshot for who has the volume alone.
func (s *Store) CopySnapshot(ctx context.Context, name, snapshot, dir string) error {
	u := &Use{Dir: s.Data(name), Volume: Volume{Name: name}, store: s}
	defer func() { u.snapshot.Release() }()
	return u.CopyTo(ctx, dir, snapshot)
}

// Open opens the volume's content, or a snapshot's, to read. Devices in it can't be opened through it, whoever puts them in the place of
// files.
func (u *Use) Open(snapshot string) (*os.File, error) {
	dir := u.Dir
	if snapshot != "" {
		if err := u.store.HasSnapshot(u.Volume.Name, snapshot); err != nil {
			return nil, err
		}
		l, err := disk.AcquireReader(u.store.path(u.Volume.Name, "snapshots", snapshot, "lock"))
		if err != nil {
			return nil, err
		}
		u.snapshot.Release()
		u.snapshot = l
		if err := u.store.HasSnapshot(u.Volume.Name, snapshot); err != nil { // removed while we waited
			return nil, err
		}
		dir = u.store.SnapshotData(u.Volume.Name, snapshot)
	}
	tree, err := mount.Clone(unix.AT_FDCWD, dir, false)
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	if err := mount.SetAttr(tree, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOEXEC, 0, unix.MS_PRIVATE, false); err != nil {
		return nil, err
	}
	return openAt(int(tree.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY)
}

// Replace puts what make makes in a folder in the place of the volume's content, at once and as a whole. keep, unless "", names a snapshot
// which the old content becomes; otherwise it is gone. The caller has the volume alone. A nil error promises that the new content survives a
// power loss.
func (s *Store) Replace(v *Volume, keep string, make func(data string) error) error {
	if v.Mounted() {
		return fmt.Errorf("volume %s: what is mounted there (type=%s) can't be replaced as a whole", v.Name, v.Options["type"])
	}
	if keep != "" {
		if err := CheckSnapshotName(keep); err != nil {
			return err
		}
		if s.HasSnapshot(v.Name, keep) == nil {
			return fmt.Errorf("snapshot %s@%s: %w", v.Name, keep, ErrExists)
		}
	}
	if err := s.pour(v.Name); err != nil {
		return err
	}
	st, err := s.root.Stage()
	if err != nil {
		return err
	}
	defer st.Close()
	data, err := s.makeData(st.Dir, v, "")
	if err != nil {
		return err
	}
	if err := make(data); err != nil {
		return err
	}
	if err := s.fits(data, v); err != nil {
		return err
	}
	if keep != "" {
		if err := disk.WriteJSON(filepath.Join(st.Dir, "meta.json"), Snapshot{Created: time.Now().UTC()}, disk.Volatile); err != nil {
			return err
		}
	}
	if err := disk.SyncFS(st.Dir); err != nil {
		return err
	}
	if keep != "" {
		// For a moment the snapshot has the new content: a crash leaves the old one where it was.
		if err := s.publishSnapshot(st, v.Name, keep); err != nil {
			return err
		}
		data = s.SnapshotData(v.Name, keep)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, data, unix.AT_FDCWD, s.Data(v.Name), unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("replace content of volume %s: %w", v.Name, err)
	}
	return errors.Join(disk.SyncDir(s.path(v.Name)), disk.SyncDir(filepath.Dir(data)))
}
