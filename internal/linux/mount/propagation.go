package mount

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Propagation says of the mount that path lies on where it is, and whether it shares its mounts with others or receives theirs
// (mount_namespaces(7)).
func Propagation(path string) (at string, shared, slave bool, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st); err != nil {
		return "", false, false, &fs.PathError{Op: "look for mount", Path: path, Err: err}
	}
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return "", false, false, err
	}
	defer f.Close()
	id := strconv.FormatUint(st.Mnt_id, 10)
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		// proc(5): id, parent, device, root, mount point, options, optional fields up to a dash.
		fields := strings.Split(s.Text(), " ")
		if fields[0] != id || len(fields) < 7 {
			continue
		}
		for _, o := range fields[6:] {
			if o == "-" {
				break
			}
			shared = shared || strings.HasPrefix(o, "shared:")
			slave = slave || strings.HasPrefix(o, "master:")
		}
		return unescape(fields[4]), shared, slave, nil
	}
	if err := s.Err(); err != nil {
		return "", false, false, err
	}
	return "", false, false, fmt.Errorf("look for mount of %s: number %s is not in /proc/self/mountinfo", path, id)
}

// unescape turns the kernel's \040 and the like back.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
