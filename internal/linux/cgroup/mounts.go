package cgroup

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Info says what this machine's cgroups offer.
type Info struct {
	// Version is "1", "2", "hybrid" (v1's controllers beside a v2 tree) or "" when nothing is mounted.
	Version string
	// Controllers are those that limits can be set with, ordered by name.
	Controllers []string
	// Mounts maps each v1 controller to its mount point, and Named the hierarchy that systemd keeps.
	Mounts map[string]string
	// Unified is the mount point of the v2 tree, "" if there is none.
	Unified string
	// SwapLimit says that memory and swap together can be limited (--memory-swap).
	SwapLimit bool
	// Kill says that the kernel kills a whole cgroup at once (cgroup.kill, Linux 5.14).
	Kill bool
}

// Probe looks at what is mounted and what the kernel offers there.
func Probe() Info {
	m := mounts()
	info := Info{Mounts: m.v1, Unified: m.unified}
	switch {
	case len(m.v1) > 0 && m.unified != "":
		info.Version = "hybrid"
	case len(m.v1) > 0:
		info.Version = "1"
	case m.unified != "":
		info.Version = "2"
	}
	for c := range m.v1 {
		if c != Named {
			info.Controllers = append(info.Controllers, c)
		}
	}
	if len(m.v1) > 0 {
		info.SwapLimit = exists(filepath.Join(m.v1["memory"], "memory.memsw.limit_in_bytes"))
	} else if s, err := readFile(filepath.Join(m.unified, "cgroup.controllers")); err == nil {
		info.Controllers = append(strings.Fields(s), "devices", "freezer") // by BPF and by cgroup.freeze
		// The root of the v2 tree has no memory.swap.max, so ask whether the kernel can swap at all.
		info.SwapLimit = slices.Contains(info.Controllers, "memory") && exists("/proc/swaps")
	}
	slices.Sort(info.Controllers)
	if m.unified != "" {
		// Like memory.swap.max, cgroup.kill isn't in the root; it came together with the release number 5.14.
		info.Kill = kernelAtLeast(5, 14)
	}
	return info
}

// Unified reports whether the v2 tree has the controllers.
func Unified() bool { return len(mounts().v1) == 0 }

func exists(path string) bool {
	return unix.Access(path, unix.F_OK) == nil
}

// kernelAtLeast compares uname's release.
func kernelAtLeast(major, minor int) bool {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return false
	}
	var got [2]int
	i := 0
	for _, c := range uts.Release {
		if c == '.' {
			if i++; i == len(got) {
				break
			}
			continue
		}
		if c < '0' || c > '9' {
			break
		}
		got[i] = got[i]*10 + int(c-'0')
	}
	return got[0] > major || got[0] == major && got[1] >= minor
}

// mountTable is where the hierarchies are.
type mountTable struct {
	// v1 maps controllers to mount points; controllers that are mounted together share one.
	v1      map[string]string
	unified string
}

// roots lists the mount points, each once.
func (m *mountTable) roots() []string {
	var out []string
	for _, dir := range m.v1 {
		out = append(out, dir)
	}
	if m.unified != "" {
		out = append(out, m.unified)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Named is the hierarchy without a controller in which systemd keeps its units on a machine with cgroup v1: what it ends with a
// service is what it finds there.
const Named = "name=systemd"

// v1Controllers are all that Linux has had.
var v1Controllers = [...]string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}

// mounts looks where the hierarchies are, once per process: they are mounted at boot. It asks for the usual places one by one,
// some 20 µs; the list of mounts, which can have thousands of lines on a busy host, is read only if nothing is there.
var mounts = sync.OnceValue(func() *mountTable {
	m := probeDir("/sys/fs/cgroup")
	if len(m.v1) == 0 && m.unified == "" {
		if f, err := os.Open("/proc/self/mountinfo"); err == nil {
			defer f.Close()
			m = parseMountinfo(bufio.NewScanner(f))
		}
	}
	if len(m.v1) == 1 && m.v1[Named] != "" { // for old programs, on a machine whose controllers are v2's
		m.v1 = nil
	}
	return m
})

// probeDir looks for hierarchies in the usual folder.
func probeDir(dir string) *mountTable {
	m := &mountTable{v1: map[string]string{}}
	switch fsType(dir) {
	case unix.CGROUP2_SUPER_MAGIC:
		m.unified = dir
		return m
	case 0:
		return m
	}
	for _, c := range append(v1Controllers[:len(v1Controllers):len(v1Controllers)], Named) {
		path := filepath.Join(dir, strings.TrimPrefix(c, "name="))
		if fsType(path) != unix.CGROUP_SUPER_MAGIC {
			continue
		}
		// cpu -> cpu,cpuacct: two controllers in one hierarchy, in which a folder must be made and entered once.
		if target, err := os.Readlink(path); err == nil && !filepath.IsAbs(target) {
			path = filepath.Join(dir, target)
		}
		m.v1[c] = path
	}
	if u := filepath.Join(dir, "unified"); fsType(u) == unix.CGROUP2_SUPER_MAGIC {
		m.unified = u
	}
	return m
}

// fsType returns the magic number of the filesystem at path, 0 if there is no such path.
func fsType(path string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0
	}
	return int64(st.Type)
}

// parseMountinfo finds cgroup filesystems in the format of proc_pid_mountinfo(5).
func parseMountinfo(s *bufio.Scanner) *mountTable {
	m := &mountTable{v1: map[string]string{}}
	for s.Scan() {
		before, after, ok := strings.Cut(s.Text(), " - ")
		pre, post := strings.Fields(before), strings.Fields(after)
		if !ok || len(pre) < 5 || len(post) < 3 {
			continue
		}
		switch point := unescape(pre[4]); post[0] {
		case "cgroup2":
			if m.unified == "" {
				m.unified = point
			}
		case "cgroup":
			for o := range strings.SplitSeq(post[2], ",") {
				if (o == Named || slices.Contains(v1Controllers[:], o)) && m.v1[o] == "" {
					m.v1[o] = point
				}
			}
		}
	}
	return m
}

// unescape undoes the octal escapes of space, tab, newline and backslash in a mount point.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
