package build

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/layers"

	"golang.org/x/sys/unix"
)

// Errors about cache mounts.
var (
	ErrNoMount   = errors.New("no such cache mount")
	ErrMountBusy = errors.New("a build step uses it at this moment")
)

// maxIdentity bounds what is written down of a cache's identity, in bytes.
const maxIdentity = 4096

// noteMount writes what a cache mount is into its lock file, since the folder's name does not tell it. The lock is held, shared at least.
func noteMount(dir, identity string) error {
	st, err := os.Stat(dir + ".lock")
	if err != nil || st.Size() > 0 {
		return err
	}
	if len(identity) > maxIdentity {
		identity, _, _ = strings.Cut(identity, "\x00")
	}
	return os.WriteFile(dir+".lock", []byte(identity), 0o600)
}

// isMountName reports whether a string has the form of a cache mount's folder name.
func isMountName(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == 16 && s == strings.ToLower(s)
}

// Mount is a cache mount, the folder of RUN --mount=type=cache.
type Mount struct {
	// ID is what RUN calls it, or its target; "" for one of an older conex, which did not write that down. Name is its folder's.
	ID, Name string
	// Owner is MODE:UID:GID where RUN asks for them.
	Owner string
	// Used is when a step last had it; Busy says that one has it now.
	Used  time.Time
	Busy  bool
	Space disk.Space
}

// Mounts lists all cache mounts by id.
func Mounts(root *disk.Root, m *disk.Meter) ([]Mount, error) {
	entries, err := os.ReadDir(root.Path("buildcache", "mount"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read cache mounts: %w", err)
	}
	var list []Mount
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		dir := root.Path("buildcache", "mount", e.Name())
		c := Mount{Name: e.Name(), Used: mountUsed(dir), Busy: inUse(dir + ".lock")}
		if raw, err := os.ReadFile(dir + ".lock"); err == nil && len(raw) <= maxIdentity {
			c.ID, _, _ = strings.Cut(string(raw), "\x00")
			if _, owner, ok := strings.Cut(string(raw), "\x00owner\x00"); ok {
				c.Owner = owner
			}
		}
		if c.Space, err = m.Tree(dir); err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b Mount) int { return strings.Compare(a.ID+"\x00"+a.Name, b.ID+"\x00"+b.Name) })
	return list, nil
}

// inUse reports whether somebody holds a lock, shared or alone.
func inUse(path string) bool {
	l, err := disk.TryAcquire(path)
	if err != nil {
		return errors.Is(err, disk.ErrLocked)
	}
	l.Release()
	return false
}

// findMount finds a cache mount by its id or its folder's name.
func findMount(root *disk.Root, id string) (dir string, err error) {
	list, err := Mounts(root, &disk.Meter{})
	if err != nil {
		return "", err
	}
	var names []string
	for _, m := range list {
		if m.Name == id {
			return root.Path("buildcache", "mount", m.Name), nil
		}
		if m.ID == id {
			names = append(names, m.Name)
		}
	}
	switch len(names) {
	case 0:
		return "", fmt.Errorf("%w: %s", ErrNoMount, id)
	case 1:
		return root.Path("buildcache", "mount", names[0]), nil
	}
	return "", fmt.Errorf("several cache mounts have the id %s: say which, %s", id, strings.Join(names, " or "))
}

// lockMount takes a cache mount for itself, at once.
func lockMount(dir, id string) (*disk.Lock, error) {
	l, err := disk.TryAcquire(dir + ".lock")
	if errors.Is(err, disk.ErrLocked) {
		return nil, fmt.Errorf("cache mount %s: %w", id, ErrMountBusy)
	}
	return l, err
}

// takeMount finds a cache mount and takes it for itself.
func takeMount(root *disk.Root, id string) (dir string, l *disk.Lock, err error) {
	if dir, err = findMount(root, id); err != nil {
		return "", nil, err
	}
	l, err = lockMount(dir, id)
	return dir, l, err
}

// ExportMount writes what is in a cache mount as a tar. No step has it meanwhile.
func ExportMount(ctx context.Context, root *disk.Root, id string, w io.Writer) error {
	dir, l, err := takeMount(root, id)
	if err != nil {
		return err
	}
	defer l.Release()
	f, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err = writeRoot(f, w); err == nil {
		err = layers.WriteTree(ctx, w, f, nil)
	}
	if err != nil {
		return fmt.Errorf("export cache mount %s: %w", id, err)
	}
	return nil
}

// writeRoot writes a tar entry for the folder itself, so that its owner and mode travel too.
func writeRoot(f *os.File, w io.Writer) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	var buf bytes.Buffer
	h := &tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if err := tar.NewWriter(&buf).WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(buf.Bytes())
	return err
}

// MountImport says which cache mount to make.
type MountImport struct {
	// ID is that of RUN --mount=type=cache, or its target.
	ID string
	// Owned says that RUN gives it a mode, user or group: then it is another cache than one without.
	Owned    bool
	Mode     uint32
	UID, GID int
	// Replace throws one that exists away.
	Replace bool
}

// ImportMount makes a cache mount of a tar, uncompressed, which is a stranger's: a hostile one is refused as that of a layer is. ls claims
// what it makes.
func ImportMount(ctx context.Context, root *disk.Root, ls *layers.Store, o MountImport, tar io.Reader) (err error) {
	id := o.ID
	if id == "" || len(id) > maxIdentity || strings.ContainsRune(id, 0) {
		return errors.New("a cache mount needs an id")
	}
	op := mountOp{ID: id, Owned: o.Owned, Mode: o.Mode, UID: o.UID, GID: o.GID}
	identity := op.identity(nil)
	dir := root.Path("buildcache", "mount", mountName(identity))
	if !o.Owned { // whatever RUN says of its owner
		have, err := findMount(root, id)
		if err == nil {
			dir = have
		} else if !errors.Is(err, ErrNoMount) {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	l, err := lockMount(dir, id)
	if err != nil {
		return err
	}
	defer l.Release()
	if _, err := os.Lstat(dir); err == nil && !o.Replace {
		return fmt.Errorf("cache mount %s exists already: --replace takes the new one instead", id)
	}
	info, err := ls.Import(ctx, tar, "")
	if err != nil {
		return fmt.Errorf("import cache mount %s: %w", id, err)
	}
	st, err := root.Stage()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	fresh := filepath.Join(st.Dir, "mount")
	if err := os.Mkdir(fresh, 0o700); err != nil {
		return err
	}
	m := CacheMount{ID: id, Layer: info.DiffID}
	if o.Owned {
		m.UID, m.GID, m.Mode = uint32(o.UID), uint32(o.GID), o.Mode
	}
	if err := fillMount(ctx, ls, m, fresh); err != nil {
		return fmt.Errorf("import cache mount %s: %w", id, err)
	}
	if err := root.Trash(dir); err != nil {
		return err
	}
	if err := noteMount(dir, identity); err != nil {
		return err
	}
	_, err = disk.Publish(fresh, dir)
	return err
}

// RemoveMount forgets a cache mount.
func RemoveMount(root *disk.Root, id string) error {
	dir, l, err := takeMount(root, id)
	if err != nil {
		return err
	}
	defer l.Release()
	return root.Trash(dir)
}
