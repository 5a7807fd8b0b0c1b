package layers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"conex/internal/disk"
	"conex/internal/layers/erofsindex"
	"conex/internal/layertar"
	"conex/internal/linux/mount"

	"golang.org/x/sys/unix"
)

// erofsDriver keeps the tar as it is and lets the kernel mount it through an index. Linux 6.12 or newer, root.
type erofsDriver struct{}

func (erofsDriver) name() string { return DriverEROFS }

func (erofsDriver) finish(_ context.Context, dir string, c content) (int64, error) {
	n, err := writeIndex(filepath.Join(dir, "index.erofs"), c)
	return n + c.size + c.spill, err
}

// writeIndex makes a new file with the index and returns its length.
func writeIndex(path string, c content) (int64, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	err = erofsindex.Write(f, c.tree, c.size, c.spill)
	var n int64
	if err == nil {
		n, err = f.Seek(0, io.SeekCurrent)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return n, err
}

func (erofsDriver) openTar(dir string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(dir, "layer.tar"))
}

// verify hashes the tar, makes its index once more and compares that with the one at hand.
func (erofsDriver) verify(ctx context.Context, dir string, m meta) error {
	f, err := os.Open(filepath.Join(dir, "layer.tar"))
	if err != nil {
		return err
	}
	defer f.Close()
	out := newSink(io.Discard)
	t := &tee{ctx: ctx, src: f, sink: out}
	defer t.release()
	var spill bytes.Buffer
	tree, err := layertar.Scan(t, &spill)
	id, serr := out.finish()
	if errors.Is(err, layertar.ErrRefused) {
		return fmt.Errorf("%w: %w", ErrDigest, err)
	}
	if err == nil {
		err = serr
	}
	if err != nil {
		return err
	}
	if id != m.DiffID {
		return fmt.Errorf("%w: layer.tar has %s", ErrDigest, id)
	}
	if m.Format != formatVersion {
		return nil
	}
	var index bytes.Buffer
	if err := erofsindex.Write(&index, tree, m.Size, m.Spill); err != nil {
		return err
	}
	for name, want := range map[string][]byte{"index.erofs": index.Bytes(), "sparse.data": spill.Bytes()} {
		if name == "sparse.data" && m.Spill == 0 {
			continue
		}
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%w: %s is not what layer.tar gives", ErrDigest, name)
		}
	}
	return nil
}

func (erofsDriver) lower(ctx context.Context, s *Store, m meta) (string, error) {
	at := filepath.Join(s.state, m.DiffID.Encoded())
	if isMounted(at) {
		return at, nil
	}
	l, err := disk.AcquireContext(ctx, at+".lock")
	if err != nil {
		return "", err
	}
	defer l.Release()
	if isMounted(at) {
		return at, nil
	}
	dir := s.dir(m.DiffID)
	var devices []string
	if m.Size > 0 { // a tar may have no bytes at all
		devices = append(devices, filepath.Join(dir, "layer.tar"))
	}
	if m.Spill > 0 {
		devices = append(devices, filepath.Join(dir, "sparse.data"))
	}
	for try := 0; ; try++ {
		err = mountIndex(filepath.Join(dir, "index.erofs"), devices, at)
		if _, serr := os.Lstat(dir); errors.Is(serr, os.ErrNotExist) {
			// Removed since the caller looked. Remove holds this lock, so it is over: leave nothing in its place.
			return "", errors.Join(ErrNotFound, unmount(at), os.Remove(at+".lock"))
		}
		// Removed and imported again, between our looks: importers take no lock. The same name is the same content.
		if !errors.Is(err, os.ErrNotExist) || try == maxRemounts {
			return at, err
		}
	}
}

// maxRemounts bounds the search for a layer that others remove and import.
const maxRemounts = 3

// isMounted reports whether an EROFS is mounted at path.
func isMounted(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && uint32(st.Type) == unix.EROFS_SUPER_MAGIC_V1
}

// mountIndex mounts an index and the files that it points into at a folder, which it makes. Nobody may run or use what lies
// there but through a container's overlay: no set-user-ID, no devices.
func mountIndex(index string, devices []string, at string) error {
	m, err := openIndex(index, devices)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	target, err := os.OpenFile(at, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer target.Close()
	return mount.Attach(m, target)
}

// openIndex makes a detached mount of an index.
func openIndex(index string, devices []string) (*os.File, error) {
	params := []mount.Param{{Key: "source", Value: index}}
	direct := len(devices) > 0
	for _, d := range devices {
		params = append(params, mount.Param{Key: "device", Value: d})
		direct = direct && canDirect(d)
	}
	for k, p := range params {
		if len(p.Value) > 255 { // what fsconfig(2) takes
			f, err := os.OpenFile(p.Value, unix.O_PATH|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			defer f.Close() // the file system has opened it by then
			params[k].Value = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		}
	}
	const attr = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID
	if direct {
		m, err := mount.New("erofs", append(params, mount.Param{Key: "directio", Flag: true}), attr)
		if !errors.Is(err, unix.EINVAL) {
			return m, err
		}
		// 6.12 to 6.14 mount files but do not know directio.
	}
	return mount.New("erofs", params, attr)
}

// canDirect reports whether the file can be read past the page cache in the blocks that an index uses. If it could only
// in larger ones, every read of the mount would fail.
func canDirect(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_DIOALIGN, &st)
	return err == nil && st.Mask&unix.STATX_DIOALIGN != 0 &&
		st.Dio_offset_align > 0 && st.Dio_offset_align <= erofsindex.BlockSize &&
		st.Dio_mem_align > 0 && st.Dio_mem_align <= erofsindex.BlockSize
}
