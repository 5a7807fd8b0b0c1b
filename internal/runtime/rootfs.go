package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/mount"
	"conex/internal/linux/tty"
	"conex/internal/safepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// rootfs builds a container's root file system on the container's thread and enters it. What needs the new pid or cgroup
// namespace is left to the forked child, as handles that are ready to be attached.
type rootfs struct {
	cfg        *Config
	cgroup     string // the cgroup's path in each hierarchy
	cgroupMade <-chan error
	cgroupErr  error
	joined     bool

	// users is the container's user namespace, nil without.
	users *userNamespace
	// trees are sources of mounts that were opened early, by their place in the spec's list.
	trees map[int]*os.File

	root *os.File
	late []lateMount // attached by the child
	proc *os.File    // where the child attaches its /proc; nil when the spec has none
	// masks is what hides folders, once there is one.
	masks *os.File
	// procAttr and procReadonly complete it.
	procAttr     int
	procReadonly []string

	user    User
	path    string // the command, found
	env     []string
	console *console
}

// lateMount is attached by the child below its /proc or after it entered its cgroup namespace.
type lateMount struct {
	tree *os.File // a prepared mount; nil: a cgroup2 mount to make
	at   *os.File // where; nil: at path, which exists only then
	path string
	attr int
}

// console is a terminal: the side we keep and the one the container gets.
type console struct{ master, slave *os.File }

func (r *rootfs) close() {
	for _, f := range append([]*os.File{r.root, r.proc, r.masks}, r.lateFiles()...) {
		if f != nil {
			f.Close()
		}
	}
	for _, t := range r.trees {
		t.Close()
	}
	if r.console != nil {
		r.console.slave.Close()
	}
}

func (r *rootfs) lateFiles() []*os.File {
	var out []*os.File
	for _, l := range r.late {
		out = append(out, l.tree, l.at)
	}
	return out
}

// joinCgroup waits until the cgroup exists.
func (r *rootfs) joinCgroup() error {
	if !r.joined {
		r.cgroupErr, r.joined = <-r.cgroupMade, true
	}
	return r.cgroupErr
}

func (r *rootfs) build() (err error) {
	spec := r.cfg.Spec
	defer func() {
		if err != nil && r.console != nil {
			r.console.master.Close()
		}
	}()
	unix.Umask(0) // of this thread alone, since CLONE_FS was unshared
	// Nothing we mount shall show on the host; what the host unmounts shall not be held by us.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, t := range r.cfg.Trees {
		if err := showTree(t); err != nil {
			return err
		}
	}
	if err := r.mountRoot(); err != nil {
		return err
	}
	if err := r.mountAll(); err != nil {
		return err
	}
	if err := r.network(); err != nil {
		return err
	}
	if err := r.process(); err != nil {
		return err
	}
	if spec.Root.Readonly {
		if err := mount.SetAttr(r.root, unix.MOUNT_ATTR_RDONLY, 0, 0, false); err != nil {
			return fmt.Errorf("make the root file system read-only: %w", err)
		}
	}
	if err := r.joinCgroup(); err != nil {
		return err
	}
	return nil
}

func showTree(t Tree) error {
	at, err := os.OpenFile(t.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("show mount: %w", err)
	}
	defer at.Close()
	return mount.Attach(t.Mount, at)
}

// mountRoot puts the root file system on the scratch folder.
func (r *rootfs) mountRoot() error {
	var tree *os.File
	var err error
	if dir := r.cfg.RootFS.Dir; dir != "" {
		tree, err = mount.Clone(unix.AT_FDCWD, dir, true)
	} else {
		tree, err = mount.Overlay(mount.OverlayOptions{
			Lower: r.cfg.RootFS.Lower, Upper: r.cfg.RootFS.Upper, Work: r.cfg.RootFS.Work, Volatile: r.cfg.RootFS.Volatile,
			Users: r.users.mapping(), UpperAsIs: r.cfg.RootFS.UpperAsIs,
		})
	}
	if err != nil {
		return err
	}
	r.root = tree
	if r.users != nil && r.cfg.RootFS.Upper != "" {
		// Overlayfs goes on read-only when it can't make its work folder; the container's root has no part in what ext4 keeps for the host's.
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(tree.Fd()), &st); err != nil {
			return fmt.Errorf("mount overlay: %w", err)
		}
		if st.Flags&unix.ST_RDONLY != 0 {
			return fmt.Errorf("mount overlay: nothing can be written below %s, for the container's root: is the disk full, or mounted read-only", filepath.Dir(r.cfg.RootFS.Upper))
		}
	}
	fd, err := unix.Open(r.cfg.Scratch, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open scratch folder: %w", &fs.PathError{Op: "open", Path: r.cfg.Scratch, Err: err})
	}
	at := os.NewFile(uintptr(fd), r.cfg.Scratch)
	defer at.Close()
	if err := mount.Attach(tree, at); err != nil {
		return err
	}
	if rootPropagation(r.cfg.Spec) == unix.MS_SLAVE {
		return nil // as it is: slaves of the host's, as build made them
	}
	return mount.SetAttr(tree, 0, 0, unix.MS_PRIVATE, true)
}

// rootPropagation is the spec's rootfsPropagation; private by default.
func rootPropagation(s *specs.Spec) uint64 {
	if p, ok := propagationOptions[s.Linux.RootfsPropagation]; ok {
		return p
	}
	return unix.MS_PRIVATE
}

// mountAll makes the spec's mounts in order.
func (r *rootfs) mountAll() error {
	spec := r.cfg.Spec
	for i, m := range spec.Mounts {
		var err error
		switch {
		case m.Type == "proc":
			r.procAttr = int(parseMountOptions(m.Options).set)
			if r.proc, err = ordinaryFolder(r.root, m.Destination, true); err != nil {
				err = fmt.Errorf("mount %s: %w", m.Destination, err)
			}
		case m.Type == "cgroup" || m.Type == "cgroup2":
			err = r.mountCgroup(m)
		case below(m.Destination, "/proc"):
			err = r.mountInProc(i, m)
		default:
			err = r.mountEntry(r.root, i, m)
			if err == nil && filepath.Clean(m.Destination) == "/dev" && m.Type == "tmpfs" {
				err = r.makeDev(spec.Linux.Devices)
			}
		}
		if err != nil {
			return err
		}
	}
	if r.cfg.Exact && !slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == "/dev" }) {
		if err := r.makeDev(spec.Linux.Devices); err != nil {
			return err
		}
	}
	if spec.Process.Terminal {
		if err := r.openConsole(); err != nil {
			return err
		}
	}
	return r.mask()
}

// mountInProc prepares a mount below /proc, which the child attaches once its /proc stands.
func (r *rootfs) mountInProc(i int, m specs.Mount) error {
	o := parseMountOptions(m.Options)
	if !o.bind && m.Type != "bind" {
		return fmt.Errorf("mount %s: only bind mounts can be made inside /proc", m.Destination)
	}
	o.recursive = false
	tree, err := r.source(i, m, o)
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	r.late = append(r.late, lateMount{tree: tree, path: filepath.Clean(m.Destination)})
	return nil
}

// mask hides MaskedPaths and protects ReadonlyPaths. Those in a /proc of the container's own are left to the child.
func (r *rootfs) mask() error {
	for _, p := range r.cfg.Spec.Linux.MaskedPaths {
		if r.proc != nil && below(p, "/proc") {
			tree, err := r.maskTree(p) // the kernel has the same there
			if err != nil {
				return fmt.Errorf("mask %s: %w", p, err)
			}
			if tree != nil {
				r.late = append(r.late, lateMount{tree: tree, path: filepath.Clean(p)})
			}
			continue
		}
		if err := r.cover(p, func(at *os.File, isDir bool) (*os.File, error) { return r.maskOf(isDir) }); err != nil {
			return fmt.Errorf("mask %s: %w", p, err)
		}
	}
	for _, p := range r.cfg.Spec.Linux.ReadonlyPaths {
		if r.proc != nil && below(p, "/proc") {
			if _, err := os.Lstat(p); err == nil {
				r.procReadonly = append(r.procReadonly, filepath.Clean(p))
			}
			continue
		}
		err := r.cover(p, func(at *os.File, _ bool) (*os.File, error) {
			tree, err := mount.Clone(int(at.Fd()), "", true)
			if err == nil {
				err = mount.SetAttr(tree, unix.MOUNT_ATTR_RDONLY, 0, unix.MS_PRIVATE, true)
			}
			return tree, err
		})
		if err != nil {
			return fmt.Errorf("protect %s: %w", p, err)
		}
	}
	return nil
}

// cover mounts what with makes on path inside the root, whatever links lead there; no such path is no error.
func (r *rootfs) cover(path string, with func(at *os.File, isDir bool) (*os.File, error)) error {
	at, err := safepath.Open(r.root, path, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer at.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(at.Fd()), &st); err != nil {
		return err
	}
	tree, err := with(at, st.Mode&unix.S_IFMT == unix.S_IFDIR)
	if tree != nil {
		defer tree.Close()
	}
	if err != nil {
		return err
	}
	return mount.Attach(tree, at)
}

// mountCgroup shows the container its own cgroup at m.Destination: on v2 through a cgroup namespace, on v1 one folder a
// controller.
func (r *rootfs) mountCgroup(m specs.Mount) error {
	attr := parseMountOptions(m.Options).set
	info := cgroup.Probe()
	if info.Version == "2" {
		at, err := ordinaryFolder(r.root, m.Destination, true)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		r.late = append(r.late, lateMount{at: at, attr: int(attr)})
		return nil
	}
	if err := r.joinCgroup(); err != nil {
		return err
	}
	at, err := ordinaryFolder(r.root, m.Destination, true)
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	defer at.Close()
	tmpfs := specs.Mount{Type: "tmpfs", Source: "tmpfs"}
	tree, err := r.newMount(tmpfs, parseMountOptions([]string{"nosuid", "noexec", "nodev", "mode=755"}))
	if err == nil {
		defer tree.Close()
		err = mount.Attach(tree, at)
	}
	if err == nil {
		err = r.showHierarchies(int(tree.Fd()), info.Mounts, parseMountOptions(m.Options))
	}
	if err == nil && attr&unix.MOUNT_ATTR_RDONLY != 0 {
		err = mount.SetAttr(tree, unix.MOUNT_ATTR_RDONLY, 0, 0, false)
	}
	if err != nil {
		return fmt.Errorf("mount %s: %w", m.Destination, err)
	}
	return nil
}

// showHierarchies mounts the cgroup's folder of each v1 hierarchy in dir, a tmpfs of the container's that nobody else has seen yet: so the
// names in it mean what is made of them here.
func (r *rootfs) showHierarchies(dir int, mounts map[string]string, o mountOptions) error {
	made := map[string]bool{}
	for _, c := range slices.Sorted(maps.Keys(mounts)) {
		name := filepath.Base(mounts[c])
		if name != c && c != cgroup.Named { // several controllers in one hierarchy: "cpu,cpuacct" and links to it
			if err := unix.Symlinkat(name, dir, c); err != nil && err != unix.EEXIST {
				return fmt.Errorf("link %s: %w", c, err)
			}
		}
		if made[name] {
			continue
		}
		tree, err := mount.Clone(unix.AT_FDCWD, filepath.Join(mounts[c], r.cgroup), false)
		if errors.Is(err, fs.ErrNotExist) {
			continue // not in this hierarchy
		}
		if err != nil {
			return err
		}
		made[name] = true
		err = o.attributes(tree)
		if err == nil {
			err = unix.Mkdirat(dir, name, 0o755)
		}
		if err == nil {
			err = unix.MoveMount(int(tree.Fd()), "", dir, name, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
		tree.Close()
		if err != nil {
			return fmt.Errorf("show %s: %w", name, err)
		}
	}
	return nil
}

// openConsole opens a terminal in the container's own devpts and puts it on /dev/console.
func (r *rootfs) openConsole() error {
	c, err := openTerminal(r.root)
	if err != nil {
		return err
	}
	r.console = c
	if s := r.cfg.Spec.Process.ConsoleSize; s != nil {
		if err := tty.SetSize(int(c.slave.Fd()), tty.Size{Rows: uint16(s.Height), Cols: uint16(s.Width)}); err != nil {
			return err
		}
	}
	tree, err := mount.Clone(int(c.slave.Fd()), "", false)
	if err != nil {
		return fmt.Errorf("mount /dev/console: %w", err)
	}
	defer tree.Close()
	at, err := mountPoint(r.root, "/dev/console", false)
	if err != nil {
		return fmt.Errorf("mount /dev/console: %w", err)
	}
	defer at.Close()
	return mount.Attach(tree, at)
}

// openTerminal opens a new terminal of the devpts at dev/pts inside root. Both ends come from handles: a container that puts
// something else at a path of it gets nowhere (CVE-2025-52565).
func openTerminal(root *os.File) (*console, error) {
	// Non-blocking, so that it goes into the Go runtime's poller: reading costs no thread. Fd() would undo that.
	ptmx, err := safepath.OpenNoLinks(root, "dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	rc, err := ptmx.SyscallConn()
	if err != nil {
		ptmx.Close()
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	var st unix.Statfs_t
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Fstatfs(int(fd), &st) }); err != nil || serr != nil || st.Type != unix.DEVPTS_SUPER_MAGIC {
		ptmx.Close()
		return nil, errors.New("open terminal: the container's /dev/pts is not a devpts")
	}
	slave, _, err := tty.OpenPTY(ptmx)
	if err != nil {
		ptmx.Close()
		return nil, fmt.Errorf("open terminal: %w", err)
	}
	return &console{ptmx, slave}, nil
}

// network sets the namespaced sysctls and names. The calling thread is in the container's namespaces and sees the host's /proc.
func (r *rootfs) network() error {
	spec := r.cfg.Spec
	own := func(t specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path == "" })
	}
	// A namespace that is joined may be the host's by way of another container.
	foreign := func(t specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t && n.Path != "" && !isOwn(n) })
	}
	for k, v := range spec.Linux.Sysctl {
		need := specs.IPCNamespace
		if strings.HasPrefix(k, "net.") {
			need = specs.NetworkNamespace
		} else if k == "kernel.domainname" || k == "kernel.hostname" {
			need = specs.UTSNamespace
		} else if !strings.HasPrefix(k, "kernel.msg") && !strings.HasPrefix(k, "kernel.sem") && !strings.HasPrefix(k, "kernel.shm") && !strings.HasPrefix(k, "fs.mqueue.") {
			return fmt.Errorf("sysctl %s: not namespaced, setting it would change the host", k)
		}
		if !own(need) && !foreign(need) {
			return fmt.Errorf("sysctl %s: not allowed in the host's %s namespace", k, need)
		}
		if k == pingGroups {
			v = r.users.groups(v, true)
		}
		path := filepath.Join("/proc/sys", strings.ReplaceAll(k, ".", "/"))
		if !strings.HasPrefix(path, "/proc/sys/") {
			return fmt.Errorf("sysctl %s: not a name", k)
		}
		if err := os.WriteFile(path, []byte(v), 0); err != nil && !(errors.Is(err, fs.ErrNotExist) && byDefault(k)) {
			return fmt.Errorf("sysctl %s=%s: %w", k, v, err)
		}
	}
	if spec.Hostname != "" && own(specs.UTSNamespace) {
		if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
			return fmt.Errorf("set host name %s: %w", spec.Hostname, err)
		}
	}
	if spec.Domainname != "" && own(specs.UTSNamespace) {
		if err := unix.Setdomainname([]byte(spec.Domainname)); err != nil {
			return fmt.Errorf("set domain name %s: %w", spec.Domainname, err)
		}
	}
	return nil
}

// byDefault reports whether a sysctl is Docker's default, which a kernel may lack.
func byDefault(name string) bool {
	_, ok := DefaultSpec().Linux.Sysctl[name]
	return ok
}

// isOwn reports whether a namespace to join is the one that this process, not its thread, is in.
func isOwn(n specs.LinuxNamespace) bool {
	names := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts"}
	var theirs, ours unix.Stat_t
	err := unix.Stat(n.Path, &theirs)
	if err == nil {
		err = unix.Stat("/proc/self/ns/"+names[n.Type], &ours)
	}
	return err != nil || theirs.Dev == ours.Dev && theirs.Ino == ours.Ino
}

// process finds the user, the working folder and the command inside the root.
func (r *rootfs) process() error {
	p := r.cfg.Spec.Process
	var err error
	r.user, err = processUser(r.root, p, r.cfg.User, r.cfg.GroupAdd, r.cfg.Exact)
	if err != nil {
		return err
	}
	if err := r.users.check(r.user); err != nil {
		return err
	}
	if p.Cwd != "" && p.Cwd != "/" {
		d, err := safepath.MkdirAll(r.root, p.Cwd, 0o755)
		switch {
		case errors.Is(err, unix.ENOTDIR):
			return fmt.Errorf("cannot mkdir: %s is not a directory", p.Cwd)
		case err != nil && !errors.Is(err, unix.EROFS):
			return fmt.Errorf("working directory %s: %w", p.Cwd, err)
		}
		if d != nil {
			d.Close()
		}
	}
	if r.console != nil {
		if err := r.console.slave.Chown(r.users.uid(r.user.UID), r.users.gid(5)); err != nil {
			return fmt.Errorf("give the terminal to user %d: %w", r.user.UID, err)
		}
	}
	r.env = environment(p.Env, r.user)
	r.path, err = findCommand(r.root, p.Args[0], p.Cwd, r.env)
	return err
}

// hasNamespace reports whether the spec gives the container a namespace of that type, a new or a joined one.
func hasNamespace(s *specs.Spec, t specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
}

// processUser is the user that a process runs as: user resolved, or the spec's numbers, with exact those alone.
func processUser(root *os.File, p *specs.Process, user string, groupAdd []string, exact bool) (User, error) {
	if exact {
		u := User{UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids, Home: "/"}
		// An image without a passwd file, or with a hostile one, has no home.
		if named, err := ResolveUser(root, strconv.Itoa(int(u.UID)), nil); err == nil {
			u.Home = named.Home
		}
		return u, nil
	}
	// Root by default too has the groups that the image's files give it.
	if user != "" || len(groupAdd) > 0 || p.User.UID == 0 && p.User.GID == 0 && p.User.AdditionalGids == nil {
		return ResolveUser(root, user, groupAdd)
	}
	u, err := ResolveUser(root, strconv.Itoa(int(p.User.UID))+":"+strconv.Itoa(int(p.User.GID)), nil)
	u.Groups = p.User.AdditionalGids
	return u, err
}

// environment adds HOME where it is missing, as Docker does.
func environment(env []string, u User) []string {
	for _, e := range env {
		if strings.HasPrefix(e, "HOME=") && e != "HOME=" {
			return env
		}
	}
	out := slices.DeleteFunc(slices.Clone(env), func(e string) bool { return e == "HOME=" })
	return append(out, "HOME="+u.Home)
}

// findCommand looks for the command as execvp(3) would, inside root.
func findCommand(root *os.File, name, cwd string, env []string) (string, error) {
	if name == "" {
		return "", &ExecError{Path: name, Err: ErrCommandNotFound}
	}
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join("/", cwd, name)
		}
		if err := executable(root, path); err != nil {
			return "", &ExecError{Path: name, Err: err}
		}
		return path, nil
	}
	search := DefaultPath
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	found := error(ErrCommandNotFound)
	for _, dir := range strings.Split(search, ":") {
		if dir == "" {
			dir = "."
		}
		path := filepath.Join(dir, name)
		if !filepath.IsAbs(path) {
			path = filepath.Join("/", cwd, path)
		}
		err := executable(root, path)
		if err == nil {
			return path, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			found = err
		}
	}
	return "", &ExecError{Path: name, Err: found}
}

// executable says whether the file at path could be executed; execve(2) has the last word.
func executable(root *os.File, path string) error {
	st, err := safepath.Stat(root, path)
	if err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) {
			return fmt.Errorf("stat %s: %w", path, errno)
		}
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fmt.Errorf("is a directory: %w", unix.EACCES)
	}
	if st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}
