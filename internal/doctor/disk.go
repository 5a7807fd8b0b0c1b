package doctor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// existing is the nearest folder above path that there is: where it would be made.
func existing(path string) string {
	for path != "/" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		path = filepath.Dir(path)
	}
	return path
}

// fsNames are file systems by their magic numbers, with what is wrong with them below a root.
var fsNames = map[int64]struct{ name, level, why string }{
	unix.EXT4_SUPER_MAGIC:      {"ext4", OK, ""},
	unix.XFS_SUPER_MAGIC:       {"xfs", OK, ""},
	unix.BTRFS_SUPER_MAGIC:     {"btrfs", OK, ""},
	0xf2f52010:                 {"f2fs", OK, ""},
	0x2fc12fc1:                 {"zfs", Degraded, "overlayfs works on it from OpenZFS 2.2 on"},
	unix.TMPFS_MAGIC:           {"tmpfs", Degraded, "images and volumes are lost at a reboot, and lie in memory"},
	unix.NFS_SUPER_MAGIC:       {"nfs", Broken, "overlayfs writes to no network file system"},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", Broken, "overlayfs has no writable layer on overlayfs"},
	unix.ECRYPTFS_SUPER_MAGIC:  {"ecryptfs", Broken, "overlayfs does not work on it"},
	unix.FUSE_SUPER_MAGIC:      {"fuse", Degraded, "overlayfs may refuse to write to it"},
	unix.MSDOS_SUPER_MAGIC:     {"vfat", Broken, "it has neither owners nor links"},
}

func fsOf(path string) (name, level, why string, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return "", "", "", err
	}
	f, ok := fsNames[int64(st.Type)]
	if !ok {
		return fmt.Sprintf("file system %#x", st.Type), OK, "", nil
	}
	return f.name, f.level, f.why, nil
}

func rootFolder(_ context.Context, h *Host, r *Result) {
	root := h.Config.Root
	at := existing(root)
	name, level, why, err := fsOf(at)
	if err != nil {
		r.Worse(Unknown, fmt.Sprintf("%s could not be looked at (%v)", at, err), "")
		return
	}
	r.Found = root + " on " + name
	if at != root {
		r.Found += " (not made yet)"
	}
	if level != OK {
		r.Worse(level, fmt.Sprintf("%s is on %s: %s", root, name, why), "put --root on ext4, xfs or btrfs")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err == nil {
		if st.Flags&unix.ST_RDONLY != 0 {
			r.Worse(Broken, root+" is mounted read-only", "mount -o remount,rw; look for errors in dmesg")
		}
		if st.Flags&unix.ST_NODEV != 0 {
			r.Note("mounted nodev: devices in containers are tmpfs's, so that does no harm")
		}
	}
	if name == "xfs" || name == "btrfs" {
		r.Note("copies may share blocks (reflink), if the file system was made so")
	} else {
		r.Note("copies share no blocks (no reflink on %s)", name)
	}
	if v := text(filepath.Join(root, "version")); v != "" && v != disk.Version {
		r.Worse(Broken, fmt.Sprintf("%s holds layout version %s, this conex knows %s", root, v, disk.Version), "use a newer conex, or another --root")
	}
}

// Shares of the file system below which inodes are scarce.
const scarceInodes = 0.02

func space(_ context.Context, h *Host, r *Result) {
	at := existing(h.Config.Root)
	free, total, err := disk.Free(at)
	if err != nil || total == 0 {
		r.Worse(Unknown, fmt.Sprintf("the space at %s could not be looked at (%v)", at, err), "")
		return
	}
	budget, minFree := h.Config.GC.Limits(total)
	r.Found = fmt.Sprintf("%s of %s free", units.HumanSize(float64(free)), units.HumanSize(float64(total)))
	r.Note("what is kept for later: %s at most; %s are to stay free (gc in the configuration)", units.HumanSize(float64(budget)), units.HumanSize(float64(minFree)))
	const mend = "conex system prune, or make room"
	switch {
	case free == 0:
		r.Worse(Broken, "no space is left at "+at, mend)
	case free < minFree:
		r.Worse(Degraded, fmt.Sprintf("%s of %s free, less than the %s that are to stay: nothing is kept for later", units.HumanSize(float64(free)), units.HumanSize(float64(total)), units.HumanSize(float64(minFree))), mend)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil || st.Files == 0 {
		return // btrfs counts none
	}
	r.Note("%d of %d inodes free", st.Ffree, st.Files)
	switch share := float64(st.Ffree) / float64(st.Files); {
	case st.Ffree == 0:
		r.Worse(Broken, "no inode is left at "+at+": no file can be made", mend)
	case share < scarceInodes:
		r.Worse(Degraded, fmt.Sprintf("%d of %d inodes free at %s", st.Ffree, st.Files, at), mend)
	}
}

func stateFolder(_ context.Context, h *Host, r *Result) {
	state := h.Config.State
	at := existing(state)
	name, _, _, err := fsOf(at)
	if err != nil {
		r.Worse(Unknown, fmt.Sprintf("%s could not be looked at (%v)", at, err), "")
		return
	}
	r.Found = state + " on " + name
	if name != "tmpfs" {
		r.Worse(Degraded, fmt.Sprintf("%s is on %s, not on a tmpfs: states outlive a reboot (they are told by the boot id) and wear the disk", state, name), "put --state on a tmpfs such as /run")
	}
	if free, _, err := disk.Free(at); err == nil && free < 4<<20 {
		r.Worse(Broken, fmt.Sprintf("%s has %s free: no container can be started", state, units.HumanSize(float64(free))), "make room, or a larger tmpfs: mount -o remount,size=")
	}
}

func programs(_ context.Context, _ *Host, r *Result) {
	self, err := os.Executable()
	if err != nil {
		r.Worse(Unknown, "conex's own place could not be found ("+err.Error()+")", "")
		return
	}
	if strings.HasSuffix(self, " (deleted)") {
		r.Worse(Degraded, "conex was replaced while this ran", "run it again")
		return
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	r.Found = self
	for _, p := range []struct{ name, what string }{
		{"conex-runtime", "other engines can use conex's runtime by the link or `conex runtime` only"},
		{"conex-explore", "`conex image explore` has no full screen"},
	} {
		path := filepath.Join(filepath.Dir(self), p.name)
		fi, err := os.Stat(path)
		if err != nil {
			r.Worse(Degraded, fmt.Sprintf("%s is not beside %s: %s", p.name, self, p.what), "make install, which installs all three")
			continue
		}
		if fi.Mode()&0o111 == 0 {
			r.Worse(Degraded, path+" is not executable", "chmod 755 "+path)
		}
	}
	if fi, err := os.Stat(self); err == nil && fi.Mode()&0o022 != 0 {
		r.Worse(Degraded, self+" can be written by others than its owner: who does becomes root", "chmod 755 "+self)
	}
}
