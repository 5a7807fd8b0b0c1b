package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/quota"

	"golang.org/x/sys/unix"
)

// Kernels: what conex was tried down to, and what it is made for.
const (
	oldestMajor, oldestMinor = 5, 14 // quotactl_fd, cgroup.kill
	bestMajor, bestMinor     = 6, 12 // EROFS from files
)

func kernel(_ context.Context, _ *Host, r *Result) {
	r.Found = "Linux " + release() + " on " + architecture
	switch {
	case !atLeast(release(), oldestMajor, oldestMinor):
		r.Worse(Broken, fmt.Sprintf("Linux %s is older than %d.%d, the oldest that conex can run on", release(), oldestMajor, oldestMinor), "boot a newer kernel")
	case !atLeast(release(), bestMajor, bestMinor):
		r.Worse(Degraded, fmt.Sprintf("Linux %s lacks EROFS from files: layers are unpacked, which is slower", release()), fmt.Sprintf("a kernel from %d.%d on has it", bestMajor, bestMinor))
	}
}

// processes asks for the calls that start a container. Wrong arguments make them answer without doing anything.
func processes(_ context.Context, _ *Host, r *Result) {
	r.Found = "clone3, pidfd_open, pidfd_send_signal, close_range"
	for _, c := range []struct {
		name string
		nr   uintptr
	}{{"clone3", unix.SYS_CLONE3}, {"pidfd_open", unix.SYS_PIDFD_OPEN}, {"close_range", unix.SYS_CLOSE_RANGE}, {"openat2", unix.SYS_OPENAT2}} {
		bad := ^uintptr(0)
		if c.name == "close_range" {
			if has(c.nr, bad, 0, bad) { // first behind last
				continue
			}
		} else if has(c.nr, 0, 0, 0) {
			continue
		}
		if c.name == "clone3" {
			r.Worse(Degraded, "clone3 is missing or filtered: processes start some 10 ms later, by the stage", "allow it in the seccomp profile that conex runs under")
			continue
		}
		r.Worse(Broken, c.name+" is missing or filtered by seccomp", "boot a newer kernel, or allow it in the seccomp profile that conex runs under")
	}
}

func namespaces(_ context.Context, _ *Host, r *Result) {
	kinds := []string{"mnt", "pid", "net", "ipc", "uts", "cgroup", "user", "time"}
	var missing []string
	for _, k := range kinds {
		if _, err := os.Lstat("/proc/self/ns/" + k); err != nil {
			missing = append(missing, k)
		}
		if n, ok := sysctl("user.max_" + k + "_namespaces"); ok && n == 0 {
			level := Broken
			if k == "user" || k == "time" {
				level = Degraded
			}
			r.Worse(level, fmt.Sprintf("user.max_%s_namespaces is 0: no %s namespace can be made", k, k), fmt.Sprintf("sysctl user.max_%s_namespaces=15000", k))
		}
	}
	for _, k := range missing {
		switch k {
		case "time":
			r.Note("no time namespaces (CONFIG_TIME_NS); no flag needs them")
		case "user":
			r.Worse(Degraded, "no user namespaces (CONFIG_USER_NS): --userns and idmap are refused", "a kernel with CONFIG_USER_NS")
		default:
			r.Worse(Broken, "no "+k+" namespaces", "a kernel that has them")
		}
	}
	if r.Level == OK {
		r.Found = "all that containers use, user namespaces too"
	}
	if n, ok := sysctl("kernel.unprivileged_userns_clone"); ok && n == 0 {
		r.Note("kernel.unprivileged_userns_clone is 0: users make none; root's containers do")
	}
}

func mounts(_ context.Context, _ *Host, r *Result) {
	r.Found = "fsopen, open_tree, move_mount, mount_setattr"
	for _, c := range []struct {
		name string
		nr   uintptr
	}{{"fsopen", unix.SYS_FSOPEN}, {"open_tree", unix.SYS_OPEN_TREE}, {"move_mount", unix.SYS_MOVE_MOUNT}, {"mount_setattr", unix.SYS_MOUNT_SETATTR}} {
		if !has(c.nr, ^uintptr(0), 0, ^uintptr(0)) {
			r.Worse(Broken, c.name+" is missing or filtered by seccomp", "Linux 5.12 or newer has it; allow it in the seccomp profile that conex runs under")
		}
	}
	if !atLeast(release(), 6, 15) {
		r.Note("overlays of detached mounts came with Linux 6.15: with --userns layers are attached for a moment instead")
	}
}

// fileSystems are those that the kernel knows now; a module would come when it is asked for.
func fileSystems() []string {
	var out []string
	for line := range strings.Lines(text("/proc/filesystems")) {
		f := strings.Fields(line)
		if len(f) > 0 {
			out = append(out, f[len(f)-1])
		}
	}
	return out
}

// module reports whether modprobe would find a module: it is on the disk, compressed or not.
func module(name string) bool {
	dir := "/lib/modules/" + release()
	b, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return false
	}
	return strings.Contains(string(b), "/"+name+".ko")
}

func overlay(_ context.Context, h *Host, r *Result) {
	known := fileSystems()
	there := func(name, mod string) bool { return slices.Contains(known, name) || module(mod) }
	r.Found = "overlayfs, EROFS"
	if !there("overlay", "overlay") {
		r.Worse(Broken, "overlayfs is missing: no container has a root", "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS")
	}
	if h.Config.StorageDriver == "dir" {
		r.Found = "overlayfs; layers as folders, as the configuration says"
		return
	}
	if !there("erofs", "erofs") && atLeast(release(), bestMajor, bestMinor) {
		r.Worse(Degraded, "EROFS is missing: layers are unpacked, which is slower", "modprobe erofs, or a kernel with CONFIG_EROFS_FS and CONFIG_EROFS_FS_BACKED_BY_FILE")
	}
	if !isRoot() {
		r.Note("whether EROFS mounts from files could not be tried: that takes root")
		return
	}
	// What the engine found when it tried, this boot.
	if s := text(filepath.Join(h.Config.State, "layers", "driver.json")); strings.Contains(s, `"driver":"dir"`) || strings.Contains(s, `"driver": "dir"`) {
		r.Worse(Degraded, "the storage driver is dir: EROFS could not be mounted from a file", "`conex info` says why; a kernel from 6.12 on with CONFIG_EROFS_FS_BACKED_BY_FILE can")
	}
}

func seccompFilter(_ context.Context, _ *Host, r *Result) {
	avail := text("/proc/sys/kernel/seccomp/actions_avail")
	if avail == "" {
		r.Worse(Broken, "seccomp is missing: containers would have every system call, and don't start but with --security-opt seccomp=unconfined", "a kernel with CONFIG_SECCOMP_FILTER")
		return
	}
	r.Found = "filters"
	r.Note("actions: %s", avail)
}

func lsm(_ context.Context, _ *Host, r *Result) {
	r.Found = "neither AppArmor nor SELinux: isolation is namespaces, capabilities and seccomp"
	if text("/sys/module/apparmor/parameters/enabled") == "Y" {
		r.Found = "AppArmor; containers get a profile with --security-opt apparmor=NAME only"
	}
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
		r.Found = "SELinux"
		if text("/sys/fs/selinux/enforce") == "1" {
			r.Worse(Degraded, "SELinux enforces, and conex sets no labels: a policy may refuse containers what they need", "look for denials with `ausearch -m avc`")
		}
	}
	if l := text("/sys/kernel/security/lsm"); l != "" {
		r.Note("active: %s", l)
	}
}

// usefulCaps are the capabilities whose lack is felt, with what for.
var usefulCaps = []struct {
	bit   uint
	name  string
	level string
	why   string
}{
	{unix.CAP_SYS_ADMIN, "SYS_ADMIN", Broken, "no namespace and no mount can be made"},
	{unix.CAP_NET_ADMIN, "NET_ADMIN", Broken, "no network can be made; --network host and none work"},
	{unix.CAP_SETUID, "SETUID", Broken, "no container runs as another user"},
	{unix.CAP_SETGID, "SETGID", Broken, "no container runs as another group"},
	{unix.CAP_SETPCAP, "SETPCAP", Broken, "no capability can be dropped"},
	{unix.CAP_MKNOD, "MKNOD", Degraded, "devices can't be made, and whiteouts of the driver dir neither"},
	{unix.CAP_SYS_RESOURCE, "SYS_RESOURCE", Degraded, "--ulimit can't go above the limits of whoever starts a container, --oom-score-adj not below"},
	{unix.CAP_SYS_PTRACE, "SYS_PTRACE", Degraded, "`cp`, `debug` and health probes of other users' processes may be refused"},
}

func capabilities(_ context.Context, _ *Host, r *Result) {
	if !isRoot() {
		r.Worse(Unknown, fmt.Sprintf("this is user %d: containers need root for now", os.Geteuid()), "sudo conex doctor")
		return
	}
	var eff uint64
	for line := range strings.Lines(text("/proc/thread-self/status")) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if _, err := fmt.Sscanf(strings.TrimSpace(v), "%x", &eff); err != nil {
				r.Worse(Unknown, "the capabilities could not be read", "")
				return
			}
		}
	}
	r.Found = "all that containers need"
	for _, c := range usefulCaps {
		if eff&(1<<c.bit) == 0 {
			r.Worse(c.level, "CAP_"+c.name+" is missing: "+c.why, "give it to whatever conex runs in")
		}
	}
}

func cgroups(_ context.Context, h *Host, r *Result) {
	p := cgroup.Probe()
	if p.Version == "" {
		r.Worse(Broken, "no cgroups are mounted: nothing can be limited, nor ended for sure", "mount -t cgroup2 none /sys/fs/cgroup")
		return
	}
	driver := h.Config.CgroupDriver
	if driver == "" {
		driver = "cgroupfs"
	}
	r.Found = fmt.Sprintf("version %s, driver %s", p.Version, driver)
	r.Note("controllers: %s", strings.Join(p.Controllers, " "))
	if p.Version != "2" {
		r.Note("version %s costs each start some milliseconds (one folder a hierarchy); version 2 alone: boot with systemd.unified_cgroup_hierarchy=1", p.Version)
	}
	if driver == "systemd" {
		if _, err := os.Stat("/run/systemd/system"); err != nil {
			r.Worse(Broken, "cgroup-driver is systemd, and systemd does not run here", `set cgroup-driver = "cgroupfs"`)
		}
	}
	for _, c := range []struct{ name, level, why string }{
		{"memory", Degraded, "--memory is refused"}, {"cpu", Degraded, "--cpus is refused"}, {"pids", Degraded, "--pids-limit is refused"},
		{"devices", Broken, "devices can't be forbidden"}, {"cpuset", Degraded, "--cpuset-cpus is refused"}, {"freezer", Degraded, "`pause` is refused"},
	} {
		if !slices.Contains(p.Controllers, c.name) {
			r.Worse(c.level, "no controller "+c.name+": "+c.why, "a kernel with it, or take it out of cgroup_disable= on the kernel's command line")
		}
	}
	if p.Unified != "" && p.Version == "2" && isRoot() {
		if f, err := os.OpenFile(filepath.Join(p.Unified, "cgroup.procs"), os.O_WRONLY, 0); err != nil {
			r.Worse(Broken, "cgroups can't be written ("+errors.Unwrap(err).Error()+")", "mount /sys/fs/cgroup read-write")
		} else {
			f.Close()
		}
	}
}

func limits(_ context.Context, _ *Host, r *Result) {
	f := cgroup.Limits()
	r.Found = "memory, swap, CPU, pids, block I/O"
	var missing []string
	for _, l := range []struct {
		ok   bool
		flag string
	}{
		{f.MemorySwap || !f.Memory, "--memory-swap"}, {f.MemorySwappiness || cgroup.Unified(), "--memory-swappiness"}, {f.CPUQuota, "--cpus"}, {f.CPUShares, "--cpu-shares"},
		{f.IOThrottle, "--device-read-bps"}, {f.IOWeight, "--blkio-weight"},
	} {
		if !l.ok {
			missing = append(missing, l.flag)
		}
	}
	if !f.CPURealtime {
		r.Note("no --cpu-rt-runtime (CONFIG_RT_GROUP_SCHED)")
	}
	if len(missing) > 0 {
		mend := "a kernel with those controllers' options"
		if slices.Contains(missing, "--memory-swap") {
			mend = "boot with swapaccount=1, or a kernel with CONFIG_SWAP"
		}
		r.Worse(Degraded, strings.Join(missing, ", ")+" can't be honoured and are refused or warned of", mend)
	}
}

func quotas(_ context.Context, h *Host, r *Result) {
	err := quota.Check(existing(h.Config.Root))
	switch {
	case err == nil:
		r.Found = "project quotas: --storage-opt size= and volume sizes work"
	case !isRoot():
		r.Worse(Unknown, "whether sizes of containers and volumes can be bound takes root to see", "")
	default:
		// Nothing that runs without asking for it needs this.
		r.Found = "no project quotas: --storage-opt size= and volume sizes are refused"
		r.Note("ext4: tune2fs -O project,quota on the unmounted device, mount with prjquota; xfs: mount with prjquota")
	}
}
