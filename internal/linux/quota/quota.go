// Package quota bounds folders by the project quotas of ext4 and xfs.
//
// A folder carries a project number which everything made in it inherits; the file system counts and bounds what a number has. It must
// be mounted with prjquota.
package quota

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNotSupported says that a folder's file system does not count projects.
var ErrNotSupported = errors.New("the file system is not mounted with project quotas (prjquota)")

// Numbers of linux/quota.h and linux/fs.h.
const (
	prjQuota    = 2
	setQuota    = 0x800008
	getInfo     = 0x800005
	subCmdShift = 8
	// blockLimits says which fields of dqblk count (QIF_BLIMITS).
	blockLimits = 1
	// blockSize is what limits are counted in (QIF_DQBLKSIZE).
	blockSize = 1024

	getXattr       = 0x801c581f // FS_IOC_FSGETXATTR
	setXattr       = 0x401c5820 // FS_IOC_FSSETXATTR
	projectInherit = 0x200      // FS_XFLAG_PROJINHERIT
)

// fsxattr is struct fsxattr.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

// dqblk is struct if_dqblk.
type dqblk struct {
	hard, soft, space                         uint64
	inodeHard, inodeSoft, inodes, time, itime uint64
	valid                                     uint32
	_                                         uint32
}

// Check returns nil when project quotas of dir's file system count and can be set, otherwise ErrNotSupported.
func Check(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	var info [64]byte // struct if_dqinfo is shorter
	err = quotactl(d, getInfo, 0, unsafe.Pointer(&info))
	if errors.Is(err, unix.ESRCH) { // "no such process" tells nobody that no quota is on
		return ErrNotSupported
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	return nil
}

// Limit gives dir, an empty folder, the project number, and lets all that has the number take up bytes at most.
func Limit(dir string, number uint32, bytes int64) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	var x fsxattr
	if err := ioctl(d, getXattr, unsafe.Pointer(&x)); err != nil {
		return fmt.Errorf("read project of %s: %w", dir, err)
	}
	x.projid = number
	x.xflags |= projectInherit
	if err := ioctl(d, setXattr, unsafe.Pointer(&x)); err != nil {
		return fmt.Errorf("set project of %s: %w", dir, err)
	}
	q := dqblk{hard: uint64(bytes+blockSize-1) / blockSize, valid: blockLimits}
	q.soft = q.hard
	if err := quotactl(d, setQuota, number, unsafe.Pointer(&q)); err != nil {
		return fmt.Errorf("set quota of %s: %w", dir, err)
	}
	return nil
}

// Project is the number that dir carries, 0 for none.
func Project(dir string) (uint32, error) {
	d, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	var x fsxattr
	if err := ioctl(d, getXattr, unsafe.Pointer(&x)); err != nil {
		if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
			return 0, ErrNotSupported
		}
		return 0, fmt.Errorf("read project of %s: %w", dir, err)
	}
	return x.projid, nil
}

func ioctl(f *os.File, req uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// quotactl is quotactl_fd(2): it needs no name of the block device, which a container of ours could not have (Linux 5.14).
func quotactl(f *os.File, cmd int, id uint32, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(cmd<<subCmdShift|prjQuota), uintptr(id), uintptr(arg), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
