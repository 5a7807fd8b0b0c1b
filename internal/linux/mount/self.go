package mount

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ReadOnlySelf opens this program's own file through a read-only mount of its own, to be executed as /proc/self/fd/<n>.
// A process started so can't be used to overwrite the program on the host: whoever gets hold of its /proc/<pid>/exe, from
// inside a container even, finds a read-only file system behind it (CVE-2019-5736).
func ReadOnlySelf() (*os.File, error) {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil, fmt.Errorf("find own program: %w", err)
	}
	m, err := Clone(unix.AT_FDCWD, path, false)
	if err != nil { // the file was replaced or deleted meanwhile, or this is a process that may not mount
		return os.Open("/proc/self/exe")
	}
	if err := SetAttr(m, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID, 0, unix.MS_PRIVATE, false); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}
