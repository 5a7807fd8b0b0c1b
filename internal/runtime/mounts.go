package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"conex/internal/linux/mount"
	"conex/internal/safepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountOptions is what a spec's list of mount options means. The attributes of a list are those of the mount itself; with an "r"
// before them ("rro") also those of the mounts below it.
type mountOptions struct {
	set, clr    uint64 // MOUNT_ATTR_*
	rset, rclr  uint64
	propagation uint64
	alone       bool // the propagation is not that of the mounts below
	bind        bool
	recursive   bool
	copyUp      bool // a tmpfs begins with what it covers
	idmap       bool // shown with other ids; ridmap: with the mounts below it
	ridmap      bool
	params      []mount.Param // for the file system itself
}

var attrOptions = map[string]struct {
	set   bool
	attr  uint64
	clear uint64
}{
	"ro": {true, unix.MOUNT_ATTR_RDONLY, 0}, "rw": {false, unix.MOUNT_ATTR_RDONLY, 0},
	"nosuid": {true, unix.MOUNT_ATTR_NOSUID, 0}, "suid": {false, unix.MOUNT_ATTR_NOSUID, 0},
	"nodev": {true, unix.MOUNT_ATTR_NODEV, 0}, "dev": {false, unix.MOUNT_ATTR_NODEV, 0},
	"noexec": {true, unix.MOUNT_ATTR_NOEXEC, 0}, "exec": {false, unix.MOUNT_ATTR_NOEXEC, 0},
	"noatime":     {true, unix.MOUNT_ATTR_NOATIME, unix.MOUNT_ATTR__ATIME},
	"strictatime": {true, unix.MOUNT_ATTR_STRICTATIME, unix.MOUNT_ATTR__ATIME},
	"relatime":    {true, 0, unix.MOUNT_ATTR__ATIME}, "nodiratime": {true, unix.MOUNT_ATTR_NODIRATIME, 0},
	"nosymfollow": {true, unix.MOUNT_ATTR_NOSYMFOLLOW, 0},
}

var propagationOptions = map[string]uint64{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE, "slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED, "unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE,
}

func parseMountOptions(opts []string) mountOptions {
	m := mountOptions{propagation: unix.MS_PRIVATE}
	for _, o := range opts {
		if a, ok := attrOptions[o]; ok {
			apply(&m.set, &m.clr, a.set, a.attr, a.clear)
			continue
		}
		if a, ok := attrOptions[strings.TrimPrefix(o, "r")]; ok {
			apply(&m.rset, &m.rclr, a.set, a.attr, a.clear)
			continue
		}
		if p, ok := propagationOptions[o]; ok {
			m.propagation, m.alone = p, !strings.HasPrefix(o, "r")
			continue
		}
		switch o {
		case "bind":
			m.bind = true
		case "rbind":
			m.bind, m.recursive = true, true
		case "tmpcopyup":
			m.copyUp = true
		case "idmap":
			m.idmap = true
		case "ridmap":
			m.idmap, m.ridmap = true, true
		case "defaults", "async", "":
		default:
			k, v, hasValue := strings.Cut(o, "=")
			m.params = append(m.params, mount.Param{Key: k, Value: v, Flag: !hasValue})
		}
	}
	return m
}

func apply(sets, clears *uint64, set bool, attr, clear uint64) {
	*clears |= clear
	if set {
		*sets |= attr
		return
	}
	*sets &^= attr
	*clears |= attr
}

// attributes gives a tree of mounts what the options say. One call in the usual case.
func (m *mountOptions) attributes(tree *os.File) error {
	// The times' attributes are one field, cleared as a whole before one is set (mount_setattr(2)).
	clears := func(set, clr uint64) uint64 { return clr &^ (set &^ unix.MOUNT_ATTR__ATIME) }
	if !m.recursive && m.rset|m.rclr == 0 && m.propagation != unix.MS_SHARED { // one mount, nothing is below it
		return mount.SetAttr(tree, m.set, clears(m.set, m.clr), m.propagation, false)
	}
	if m.alone && m.propagation != unix.MS_SHARED || m.set|m.clr == 0 && m.rset|m.rclr == 0 {
		if err := mount.SetAttr(tree, 0, 0, m.propagation, !m.alone || m.propagation == unix.MS_SHARED); err != nil {
			return err
		}
		if m.rset|m.rclr != 0 {
			if err := mount.SetAttr(tree, m.rset, clears(m.rset, m.rclr), 0, true); err != nil {
				return err
			}
		}
	} else if err := mount.SetAttr(tree, m.rset, clears(m.rset, m.rclr), m.propagation, true); err != nil {
		return err
	}
	if m.set|m.clr == 0 {
		return nil
	}
	return mount.SetAttr(tree, m.set, clears(m.set, m.clr), 0, false)
}

// mountEntry makes the mount m, number i of the spec's (-1: none of them), inside root. It runs on the container's thread, in its
// namespaces, before pivot_root.
func (r *rootfs) mountEntry(root *os.File, i int, m specs.Mount) error {
	o := parseMountOptions(m.Options)
	o.bind = o.bind || m.Type == "bind"
	var tree *os.File
	var err error
	isDir := true
	if o.bind {
		tree, err = r.source(i, m, o)
		if err == nil {
			var st unix.Stat_t
			if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
				tree.Close()
				return err
			}
			isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		}
	} else {
		tree, err = r.newMount(m, o)
		if err == nil && o.copyUp {
			if err = copyUp(root, tree, m.Destination); err != nil {
				tree.Close()
			}
		}
	}
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	defer tree.Close()
	point := mountPoint
	if !o.bind && (m.Type != "tmpfs" || filepath.Clean(m.Destination) == "/dev") {
		point = ordinaryFolder
	}
	at, err := point(root, m.Destination, isDir)
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	defer at.Close()
	if err := mount.Attach(tree, at); err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	return nil
}

// newMount makes a file system of its own.
func (r *rootfs) newMount(m specs.Mount, o mountOptions) (*os.File, error) {
	source := m.Source
	if source == "" {
		source = m.Type
	}
	params := append([]mount.Param{{Key: "source", Value: source}}, o.params...)
	if r.users != nil { // the file system is the host's, and takes the host's ids
		for i, p := range params {
			id, err := strconv.ParseUint(p.Value, 10, 32)
			if err != nil || p.Key != "uid" && p.Key != "gid" {
				continue
			}
			out := r.users.outside(uint32(id), p.Key == "gid")
			if out < 0 {
				return nil, fmt.Errorf("option %s=%s: the container's user namespace does not map it", p.Key, p.Value)
			}
			params[i].Value = strconv.Itoa(out)
		}
	}
	if m.Type == "tmpfs" && !slices.ContainsFunc(params, func(p mount.Param) bool { return p.Key == "mode" }) {
		params = append(params, mount.Param{Key: "mode", Value: "1777"})
	}
	t, err := mount.New(m.Type, params, int(o.set|o.rset))
	if r.users != nil && errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: in a user namespace the kernel shows nothing new of a %s of which the host itself sees only a part", err, m.Type)
	}
	return t, err
}

// mountPoint opens, and makes where it is missing, the folder or file at path inside root. Whatever links the image has
// there, the result lies inside root (CVE-2021-30465: the handle is what gets mounted on, no path is looked up again).
func mountPoint(root *os.File, path string, isDir bool) (*os.File, error) {
	at, err := safepath.Open(root, path, unix.O_PATH, 0)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return at, err
	}
	if isDir {
		return safepath.MkdirAll(root, path, 0o755)
	}
	// A link that leads nowhere, as /etc/resolv.conf often is: what it means is made, parents included.
	for range maxLinks {
		target, err := safepath.Readlink(root, path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			// Not cleaned: ".." behind a link is the kernel's to resolve.
			target = filepath.Dir(path) + "/" + target
		}
		path = target
	}
	return safepath.MakeFile(root, path, 0o755)
}

// maxLinks is the kernel's own limit of symbolic links in one resolution.
const maxLinks = 40

// ordinaryFolder is mountPoint for /proc, /sys, /dev and the like, which the image must not have put elsewhere: what is mounted
// or masked below them by path later would miss them (CVE-2019-16884, CVE-2019-19921, CVE-2023-27561).
func ordinaryFolder(root *os.File, path string, _ bool) (*os.File, error) {
	at, err := safepath.OpenNoLinks(root, path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		made, merr := safepath.MkdirAll(root, path, 0o755)
		if merr != nil {
			return nil, merr
		}
		made.Close()
		at, err = safepath.OpenNoLinks(root, path, unix.O_PATH|unix.O_DIRECTORY, 0)
	}
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("the image has no ordinary folder there but a link or a file: %w", err)
	}
	return at, err
}

// inProc are the places below /proc that a mount may cover, as runc allows them; anything else could fool a security module.
var inProc = []string{
	"cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "net/dev",
	"sys/kernel/ns_last_pid", "sys/crypto/fips_enabled",
}

// below reports whether path is dir or lies in it, by the words alone.
func below(path, dir string) bool {
	path = filepath.Clean("/" + path)
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// makeDev fills the container's fresh /dev: nodes and the standard links. The thread's umask is 0 here.
func (r *rootfs) makeDev(devices []specs.LinuxDevice) error {
	dev, err := safepath.MkdirAll(r.root, "/dev", 0o755)
	if err != nil {
		return err
	}
	defer dev.Close()
	for _, d := range standardDevices {
		if err := r.makeNode(dev, specs.LinuxDevice{Path: d.path, Type: "c", Major: d.major, Minor: d.minor}); err != nil {
			return err
		}
	}
	for _, d := range devices {
		if err := r.makeNode(dev, d); err != nil {
			return err
		}
	}
	for _, l := range [][2]string{
		{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"},
		{"/proc/kcore", "core"}, {"pts/ptmx", "ptmx"},
	} {
		if l[1] == "core" && unix.Access(l[0], unix.F_OK) != nil {
			continue // a kernel without it
		}
		if err := unix.Symlinkat(l[0], int(dev.Fd()), l[1]); err != nil && err != unix.EEXIST {
			return fmt.Errorf("link /dev/%s: %w", l[1], err)
		}
	}
	return nil
}

// makeNode makes a device in the container; dev is its /dev.
func (r *rootfs) makeNode(dev *os.File, d specs.LinuxDevice) error {
	parent := dev
	if dir := filepath.Dir(d.Path); dir != "/dev" {
		var err error
		if parent, err = safepath.MkdirAll(r.root, dir, 0o755); err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
		defer parent.Close()
	}
	mode := uint32(0o666)
	if d.FileMode != nil {
		mode = uint32(d.FileMode.Perm())
	}
	switch d.Type {
	case "c", "u":
		mode |= unix.S_IFCHR
	case "b":
		mode |= unix.S_IFBLK
	case "p":
		mode |= unix.S_IFIFO
	default:
		return fmt.Errorf("device %s: type %q is none of c, b, p", d.Path, d.Type)
	}
	name := filepath.Base(d.Path)
	err := unix.Mknodat(int(parent.Fd()), name, mode, int(unix.Mkdev(uint32(d.Major), uint32(d.Minor))))
	if err == unix.EEXIST {
		// Of an earlier run, outside of /dev. Anything else there would be taken for the device.
		st, serr := safepath.Lstat(parent, name)
		if serr == nil && st.Mode&unix.S_IFMT == mode&unix.S_IFMT && st.Rdev == unix.Mkdev(uint32(d.Major), uint32(d.Minor)) {
			return nil
		}
		return fmt.Errorf("device %s: something else has this name already", d.Path)
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", d.Path, err)
	}
	if d.UID != nil || d.GID != nil {
		uid, gid := -1, -1
		if d.UID != nil {
			uid = r.users.uid(*d.UID)
		}
		if d.GID != nil {
			gid = r.users.gid(*d.GID)
		}
		if err := unix.Fchownat(int(parent.Fd()), name, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	return nil
}

// maskTree returns a detached mount that hides what is at host (the same kernel file system as the container's): an empty
// read-only folder, or /dev/null over a file. nil when the kernel has no such path.
func (r *rootfs) maskTree(host string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return nil, nil //nolint:nilerr // nothing there to hide
	}
	return r.maskOf(st.Mode&unix.S_IFMT == unix.S_IFDIR)
}

// maskOf returns what hides a folder or a file. All folders are hidden by the same one, where the kernel can show a mount again that is
// attached nowhere (Linux 6.15).
func (r *rootfs) maskOf(isDir bool) (*os.File, error) {
	if !isDir {
		return nullTree()
	}
	if r.masks != nil {
		if t, err := mount.Clone(int(r.masks.Fd()), "", false); err == nil {
			return t, nil
		}
	}
	t, err := mount.New("tmpfs", []mount.Param{{Key: "source", Value: "tmpfs"}, {Key: "size", Value: "0"}, {Key: "nr_inodes", Value: "1"}},
		unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	if r.masks == nil {
		fd, err := unix.FcntlInt(t.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Close()
			return nil, fmt.Errorf("hide folder: %w", err)
		}
		r.masks = os.NewFile(uintptr(fd), "tmpfs")
	}
	return t, nil
}

// MountOptions lists the options of mounts that have a meaning here; others go to the file system.
func MountOptions() []string {
	out := []string{"async", "bind", "defaults", "idmap", "rbind", "ridmap", "tmpcopyup"}
	for o := range attrOptions {
		out = append(out, o)
		if o != "relatime" {
			out = append(out, "r"+o)
		}
	}
	for o := range propagationOptions {
		out = append(out, o)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
