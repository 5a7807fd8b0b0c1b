package volume

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of linux/fiemap.h and linux/fs.h.
const (
	fsIocFiemap        = 0xc020660b
	fiemapExtentLast   = 0x1
	fiemapExtentShared = 0x2000
)

// fiemapExtent is struct fiemap_extent.
type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

// fiemapBatch is how many extents are asked for at a time.
const fiemapBatch = 128

// fiemap is struct fiemap with room for extents.
type fiemap struct {
	start, length          uint64
	flags, mapped, room, _ uint32
	extents                [fiemapBatch]fiemapExtent
}

// Shared adds up what of the files below dir lies in blocks that other files have too, in bytes; -1 where the file system shares none.
func Shared(ctx context.Context, dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if st.Type != unix.BTRFS_SUPER_MAGIC && st.Type != unix.XFS_SUPER_MAGIC {
		return -1, nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	var total int64
	err = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || !d.Type().IsRegular() {
			return nil //nolint:nilerr // it has gone, or counts nothing
		}
		f, err := root.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil //nolint:nilerr // as above
		}
		defer f.Close()
		n, err := sharedBlocks(f)
		total += n
		if err != nil {
			return fmt.Errorf("look which blocks of %s are shared: %w", path, err)
		}
		return nil
	})
	return total, err
}

func sharedBlocks(f *os.File) (int64, error) {
	var m fiemap
	var total int64
	for {
		m.length, m.room, m.mapped = ^uint64(0)-m.start, fiemapBatch, 0
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
			if errno == unix.EOPNOTSUPP || errno == unix.ENOTTY {
				return total, nil
			}
			return total, errno
		}
		for _, x := range m.extents[:m.mapped] {
			if x.flags&fiemapExtentShared != 0 {
				total += int64(x.length)
			}
			if x.flags&fiemapExtentLast != 0 {
				return total, nil
			}
			m.start = x.logical + x.length
		}
		if m.mapped == 0 {
			return total, nil
		}
	}
}
