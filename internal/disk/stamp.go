package disk

import (
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Stamp tells whether a file, or what a folder lists, is still what it was when it was read: take the stamp first, then read.
type Stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
	// young stamps say nothing, since the kernel's clock for files stands still for some milliseconds: a second change could bear the same time.
	young bool
}

// settling is how long a change is young. The kernel's clock for files moves at least a hundred times a second.
const settling = 100 * time.Millisecond

// StampOf looks at a path, following links.
func StampOf(path string) (Stamp, error) {
	now := time.Now()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Stamp{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return stampOf(&st, now), nil
}

// StampInMemory is StampOf for what lies in the state folder, where the kernel answers without waiting, by who asks so often that Go's scheduler
// need not know of each time.
func StampInMemory(path string) (Stamp, error) {
	now := time.Now()
	var st unix.Stat_t
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return Stamp{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	at := unix.AT_FDCWD
	_, _, errno := syscall.RawSyscall6(unix.SYS_NEWFSTATAT, uintptr(at), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&st)), 0, 0, 0)
	if errno != 0 {
		return Stamp{}, &os.PathError{Op: "stat", Path: path, Err: errno}
	}
	return stampOf(&st, now), nil
}

func stampOf(st *unix.Stat_t, now time.Time) Stamp {
	changed := time.Unix(st.Ctim.Unix())
	return Stamp{
		dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim, //nolint:unconvert // Dev's type differs between machines
		young: now.Sub(changed) < settling, // also when the clock was put back since
	}
}

// Still reports whether what was read after s was taken is what there is now.
func (s Stamp) Still(now Stamp) bool {
	young := s.young
	s.young, now.young = false, false
	return !young && s == now
}
