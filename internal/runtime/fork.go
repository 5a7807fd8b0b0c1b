package runtime

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"conex/internal/linux/caps"
	"conex/internal/linux/cgroup"
	"conex/internal/linux/mount"
	"conex/internal/linux/nsfork"
	"conex/internal/linux/seccomp"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// launch is everything the program of a container's process is made from, for its first one and for those of exec.
type launch struct {
	process *specs.Process
	linux   *specs.Linux
	user    User
	// named says that the user came by Docker's rules, which take a non-root user's effective capabilities away.
	named   bool
	path    string
	env     []string
	stdio   [3]*os.File
	console *console
	filter  seccompFilter
	// users is the container's user namespace, nil without.
	users *userNamespace
	// dies says that the process dies with the thread that makes it; life is a pipe that ends with this process then.
	dies bool
	life *os.File
	// hold, preserve and noKeyring are as in Config.
	hold      *Hold
	preserve  int
	noKeyring bool
}

// fork makes the container's first process. It runs on the container's thread, which it leaves inside the new root.
func (b *box) fork(r *rootfs) (p *process, err error) {
	defer func() {
		if err != nil && r.console != nil {
			r.console.master.Close()
		}
	}()
	cfg := b.cfg
	l := &launch{
		process: cfg.Spec.Process, linux: cfg.Spec.Linux, user: r.user, named: cfg.User != "" || len(cfg.GroupAdd) > 0,
		path: r.path, env: r.env, stdio: cfg.Stdio, console: r.console,
		dies: cfg.DieWithParent, hold: cfg.Hold, preserve: cfg.PreserveFDs, noKeyring: cfg.NoKeyring, users: r.users,
	}
	if l.filter, err = filter(cfg.Spec, cfg.DefaultSeccomp, cfg.SeccompCache); err != nil {
		return nil, err
	}
	if l.dies {
		if l.life, err = b.openLife(); err != nil {
			return nil, err
		}
		defer l.life.Close()
	}
	// All that reads the host's files comes before the new root.
	var prog nsfork.Program
	into, err := b.intoCgroup(&prog, r)
	if into != nil {
		defer into.Close()
	}
	for _, fd := range b.entrances {
		defer unix.Close(fd)
	}
	if err != nil {
		return nil, err
	}
	var null *os.File
	if l.needsNull() {
		host, err := hostNull()
		if err != nil {
			return nil, err
		}
		if null, err = containerNull(r.root, host); err != nil {
			return nil, err
		}
		if null != host {
			defer null.Close()
		}
	}
	if b.timens != nil {
		prog.Call("join time namespace", unix.SYS_SETNS, b.timens, unix.CLONE_NEWTIME)
	}
	fork := uint64(b.flags & unix.CLONE_NEWPID)
	if r.users != nil {
		proc, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		defer proc.Close()
		if err := r.users.enter(&prog, cfg.Spec.Process, proc, fork != 0); err != nil {
			return nil, err
		}
		fork = 0
	}
	hooks, err := b.hooks(&prog)
	if err != nil {
		return nil, err
	}
	if hooks != nil {
		defer hooks.close()
	}
	if b.flags&unix.CLONE_NEWCGROUP != 0 {
		prog.Call("make cgroup namespace", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	}
	r.enter(&prog)
	if err := l.program(&prog, null); err != nil {
		return nil, err
	}
	attr := nsfork.Attr{Flags: fork, Cgroup: into, Init: cfg.Init, Share: b.mayShare(fork), Blocking: b.alone && r.console == nil}
	if hooks != nil {
		attr.Forked = hooks.run
	}
	pid, pidfd, err := prog.Start(attr)
	if err != nil {
		return nil, startError(err, cfg.Spec.Process)
	}
	b.cg.Started()
	var master *os.File
	if r.console != nil {
		master = r.console.master
	}
	b.mu.Lock()
	b.root, r.root = r.root, nil
	b.mu.Unlock()
	return newProcess(pid, pidfd, master), nil
}

// leastShared is the least limit of memory, in bytes, under which a child may share ours: far above what it takes of the kernel's memory
// until it executes, in mounts and open files, so that it is not killed for want of it, and we with it.
const leastShared = 16 << 20

// mayShare reports whether the child, made with these flags, may have this process's memory until it executes. It must be alone in a pid
// namespace, where nobody can look into it, and this process must be one that may die when the machine's memory runs out: not a monitor.
func (b *box) mayShare(flags uint64) bool {
	if !b.alone || flags&unix.CLONE_NEWPID == 0 || b.flags&unix.CLONE_NEWTIME != 0 {
		return false
	}
	r := b.cfg.Spec.Linux.Resources
	return r == nil || r.Memory == nil || r.Memory.Limit == nil || *r.Memory.Limit <= 0 || *r.Memory.Limit >= leastShared
}

// enter makes the new root the child's and finishes it. The old one lands on top of it and is taken away from there, so no folder for
// it is needed (pivot_root(2)); what the host sees of it stays.
func (r *rootfs) enter(prog *nsfork.Program) {
	prog.Call("enter root file system", unix.SYS_FCHDIR, r.root)
	if r.cfg.NoPivot {
		prog.Call("move root file system", unix.SYS_MOUNT, ".", "/", 0, unix.MS_MOVE, 0)
		prog.Call("chroot", unix.SYS_CHROOT, ".")
	} else {
		prog.Call("pivot_root", unix.SYS_PIVOT_ROOT, ".", ".")
	}
	unmount := func() {
		if !r.cfg.NoPivot {
			prog.Call("unmount old root", unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
		}
		prog.Call("enter root file system", unix.SYS_CHDIR, "/")
	}
	if r.users == nil {
		unmount()
		r.lateMounts(prog)
	} else {
		// The kernel lets a user namespace have a /proc only while it sees another one in full: the host's.
		r.lateMounts(prog)
		unmount()
	}
	if p := rootPropagation(r.cfg.Spec); p == unix.MS_SHARED || p == unix.MS_UNBINDABLE { // not before: pivot_root refuses it
		prog.Call("set propagation of the root file system", unix.SYS_MOUNT, 0, "/", 0, int(p)|unix.MS_REC, 0)
	}
}

// openLife returns the end of a pipe that nothing comes from, not waiting for anything; the other one is closed with the container.
func (b *box) openLife() (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b.life = w
	fd, err := unix.FcntlInt(r.Fd(), unix.F_DUPFD_CLOEXEC, 3) // the streams go below
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "life")
	return f, unix.SetNonblock(fd, true) // only now: a file that knows of it undoes it when it is asked for its descriptor
}

// intoCgroup sees to it that the child will be in its cgroup, and returns the v2 folder for clone3, nil where there is none. Under Run the
// child of a plain container enters v1's hierarchies itself, first of all: the thread, which otherwise does it for its child, would have to be
// gone before they can be removed. A hook or an init beside it would not wait for that.
func (b *box) intoCgroup(prog *nsfork.Program, r *rootfs) (*os.File, error) {
	if !b.alone || b.cfg.Init || b.cfg.Spec.Hooks != nil || r.users != nil {
		return enterCgroup(b.cg)
	}
	into, err := b.cg.FD()
	if err != nil {
		return nil, err
	}
	b.entrances, err = b.cg.Entrances()
	for _, fd := range b.entrances {
		prog.Call("enter cgroup", unix.SYS_WRITE, nsfork.FD(fd), "0", 1)
	}
	return into, err
}

// enterCgroup moves the thread into the v1 hierarchies and returns the v2 folder for clone3, nil where there is none.
func enterCgroup(cg cgroup.Manager) (*os.File, error) {
	into, err := cg.FD()
	if err != nil {
		return nil, err
	}
	if err := cg.EnterThread(); err != nil {
		if into != nil {
			into.Close()
		}
		return nil, err
	}
	return into, nil
}

// startError turns a failed execve into what the command line shows.
func startError(err error, p *specs.Process) error {
	var e *nsfork.Error
	if errors.As(err, &e) && e.Call == "execve" {
		return &ExecError{Path: p.Args[0], Err: e.Errno}
	}
	if errors.As(err, &e) && e.Call == "chdir" {
		return &ExecError{Path: p.Args[0], Err: fmt.Errorf("chdir to working directory %q: %w", p.Cwd, e.Errno)}
	}
	return fmt.Errorf("start container process: %w", err)
}

// seccompFilter is a compiled profile and the flags to load it with; without a program there is no filter.
type seccompFilter struct {
	program []unix.SockFilter
	flags   uint
}

// filter compiles the profile of s, or with byDefault the default one.
func filter(s *specs.Spec, byDefault bool, cache string) (f seccompFilter, err error) {
	p := s.Linux.Seccomp
	if p == nil && !byDefault {
		return f, nil
	}
	if p == nil {
		var bounding []string
		if c := s.Process.Capabilities; c != nil {
			bounding = c.Bounding
		}
		if cache != "" { // the common path: the big profile is not even built
			f.flags = unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
			f.program, err = seccomp.CachedDefault(cache, bounding)
			return f, err
		}
		p = seccomp.Default(bounding)
	}
	if f.flags, err = seccomp.Flags(p); err != nil {
		return f, err
	}
	if cache != "" {
		f.program, err = seccomp.Cached(cache, p)
	} else {
		f.program, err = seccomp.Compile(p)
	}
	return f, err
}

// lateMounts adds the mounts that need the child's namespaces: /proc, what covers parts of it, and cgroup2.
func (r *rootfs) lateMounts(prog *nsfork.Program) {
	newMount := func(fstype string, attr int) nsfork.Ref {
		fs := prog.Call("open file system type "+fstype, unix.SYS_FSOPEN, fstype, unix.FSOPEN_CLOEXEC)
		prog.Call("name "+fstype, unix.SYS_FSCONFIG, fs, unix.FSCONFIG_SET_STRING, "source", fstype, 0)
		prog.Call("mount "+fstype, unix.SYS_FSCONFIG, fs, unix.FSCONFIG_CMD_CREATE, 0, 0, 0)
		return prog.Call("mount "+fstype, unix.SYS_FSMOUNT, fs, unix.FSMOUNT_CLOEXEC, attr)
	}
	attach := func(tree, at any, path string) {
		flags := unix.MOVE_MOUNT_F_EMPTY_PATH
		if path == "" {
			flags |= unix.MOVE_MOUNT_T_EMPTY_PATH
		}
		prog.Call("attach mount "+path, unix.SYS_MOVE_MOUNT, tree, "", at, path, flags)
	}
	if r.proc != nil {
		attach(newMount("proc", r.procAttr), r.proc, "")
	}
	for _, l := range r.late {
		switch {
		case l.tree == nil:
			attach(newMount("cgroup2", l.attr), l.at, "")
		default:
			attach(l.tree, unix.AT_FDCWD, l.path)
		}
	}
	attr := &mount.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	for _, p := range r.procReadonly {
		tree := prog.Call("protect "+p, unix.SYS_OPEN_TREE, unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		prog.Call("protect "+p, unix.SYS_MOUNT_SETATTR, tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attr, int(mount.MountAttrSize))
		attach(tree, unix.AT_FDCWD, p)
	}
}

// needsNull reports whether one of the process's streams is the null device.
func (l *launch) needsNull() bool { return l.console == nil && slices.Contains(l.stdio[:], nil) }

// program adds what every process of a container does between fork and execve, in this order: its streams, then
// terminal and limits, then privileges. It runs in the child, as root in the container's namespaces until the ids change.
func (l *launch) program(prog *nsfork.Program, null *os.File) error {
	p := l.process
	for i := range 3 {
		f := l.stdio[i]
		if l.console != nil {
			f = l.console.slave
		}
		if f == nil {
			f = null
		}
		if l.user.UID != 0 || l.users != nil {
			if err := ownPipe(f, l.users.uid(l.user.UID)); err != nil {
				return err
			}
		}
		if int(f.Fd()) <= 2 { // dup3 of a low number onto another one could close what a later one needs
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 10)
			if err != nil {
				return err
			}
			f = os.NewFile(uintptr(fd), f.Name())
		}
		prog.Call("set standard stream", unix.SYS_DUP3, f, i, 0)
	}
	// Before the first path that the image or the user chose: nothing of ours can be named by it. And as early as can be: until
	// then a container with CAP_SYS_PTRACE can look at our descriptors in the child of an exec.
	switch {
	case l.hold != nil:
		prog.CloseOthers(3+l.preserve, l.hold.FIFO, l.hold.Report)
	case l.life != nil:
		prog.CloseOthers(3+l.preserve, l.life)
	default:
		prog.CloseOthers(3 + l.preserve)
	}
	// Ignored signals survive execve; whoever started conex with nohup does not mean its containers.
	dfl := make([]byte, 32)          // struct sigaction of zeros: SIG_DFL
	for sig := 1; sig <= 64; sig++ { // the real-time ones too: a posix_spawn(3) of glibc leaves 32 and 33 ignored
		if sig != int(unix.SIGKILL) && sig != int(unix.SIGSTOP) {
			prog.Call("reset signals", unix.SYS_RT_SIGACTION, sig, dfl, 0, 8)
		}
	}
	unblockSignals(prog)
	prog.Call("setsid", unix.SYS_SETSID)
	if l.console != nil {
		prog.Call("take terminal", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	if err := rlimits(prog, p.Rlimits); err != nil {
		return err
	}
	if !l.noKeyring {
		prog.Try("session keyring", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0)
	}
	if err := attributes(prog, p); err != nil {
		return err
	}
	if err := containerAttributes(prog, l.linux); err != nil {
		return err
	}
	if p.OOMScoreAdj != nil && l.users == nil {
		setOOMScore(prog, nil, "/proc/self/oom_score_adj", *p.OOMScoreAdj)
	}
	umask := 0o022
	if p.User.Umask != nil {
		umask = int(*p.User.Umask)
	}
	prog.Call("umask", unix.SYS_UMASK, umask)
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	// As root first, who can enter every folder but those of a network file system; else as the user.
	asRoot := prog.Try("chdir", unix.SYS_CHDIR, cwd)
	if !p.NoNewPrivileges {
		l.seccomp(prog) // needs CAP_SYS_ADMIN, which goes with the next steps
	}
	if err := l.privileges(prog); err != nil {
		return err
	}
	prog.Unless(prog.Call("chdir", unix.SYS_CHDIR, cwd), asRoot)
	if l.hold != nil {
		prog.Hold(l.hold.FIFO, l.hold.Report)
	}
	if p.NoNewPrivileges {
		prog.Call("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		l.seccomp(prog)
	}
	if l.dies { // only now: a change of ids takes it away
		prog.Call("die with the parent", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, int(unix.SIGKILL), 0, 0, 0)
		if l.life != nil { // of a parent that is dead by now no signal comes: then its pipe has ended, and reading it doesn't fail
			ended := prog.Try("parent", unix.SYS_READ, nsfork.FD(int(l.life.Fd())), make([]byte, 8), 1)
			prog.OnlyIf(prog.Call("end", unix.SYS_EXIT_GROUP, 128+int(unix.SIGKILL)), ended)
		}
	}
	prog.Exec(l.path, p.Args, l.env)
	return nil
}

// unblockSignals lets all signals through, whatever whoever started conex, or conex itself, has blocked.
func unblockSignals(prog *nsfork.Program) {
	prog.Call("unblock signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, make([]byte, 8), 0, 8)
}

// setOOMScore adds the writing of the child's oom_score_adj, at path as seen from dir, nil for an absolute path.
func setOOMScore(prog *nsfork.Program, dir *os.File, path string, adj int) {
	score := fmt.Appendf(nil, "%d", adj)
	var at any = unix.AT_FDCWD
	if dir != nil {
		at = dir
	}
	fd := prog.Call("open oom_score_adj", unix.SYS_OPENAT, at, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	prog.Call("set oom_score_adj", unix.SYS_WRITE, fd, score, len(score))
}

// rlimitPointer is the argument of prlimit64(2).
func rlimitPointer(l unix.Rlimit) *unix.Rlimit { return &l }

// ownPipe gives a pipe to the user, who could otherwise not open /dev/stdout again, as daemons do that log to it. Files and
// devices keep their owner.
func ownPipe(f *os.File, uid int) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("standard stream: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	if err := unix.Fchown(int(f.Fd()), uid, -1); err != nil && err != unix.EPERM && err != unix.EROFS && err != unix.EINVAL {
		return fmt.Errorf("give a standard stream to user %d: %w", uid, err)
	}
	return nil
}

func (l *launch) seccomp(prog *nsfork.Program) {
	if len(l.filter.program) == 0 {
		return
	}
	fprog := &unix.SockFprog{Len: uint16(len(l.filter.program)), Filter: &l.filter.program[0]}
	prog.Call("load seccomp filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, l.filter.flags, fprog)
}

// privileges sets capabilities and ids (capabilities(7)).
func (l *launch) privileges(prog *nsfork.Program) error {
	c := l.process.Capabilities
	if c == nil {
		c = &specs.LinuxCapabilities{}
	}
	var masks [5]uint64
	for i, names := range [][]string{c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient} {
		m, err := caps.Mask(names)
		if err != nil {
			return err
		}
		masks[i] = m
	}
	bounding, effective, permitted, inheritable, ambient := masks[0], masks[1], masks[2], masks[3], masks[4]
	if l.named && l.user.UID != 0 {
		effective, permitted = ambient, ambient
		inheritable &= ambient
	}
	ambient &= permitted & inheritable // the kernel has no others; what runc writes as an example asks for some
	have := caps.Available()
	if l.users != nil {
		have = caps.Known() // who enters a user namespace has all of them in it, what he lacked outside too
	}
	for bit := range 64 {
		if have&(1<<bit) != 0 && bounding&(1<<bit) == 0 {
			prog.Call("drop capability", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, bit, 0, 0, 0)
		}
	}
	groups := make([]byte, 0, 4*len(l.user.Groups))
	for _, g := range l.user.Groups {
		groups = append(groups, byte(g), byte(g>>8), byte(g>>16), byte(g>>24))
	}
	prog.Call("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	prog.Call("set groups", unix.SYS_SETGROUPS, len(l.user.Groups), groups)
	gid, uid := int(l.user.GID), int(l.user.UID)
	prog.Call("set group id", unix.SYS_SETRESGID, gid, gid, gid)
	prog.Call("set user id", unix.SYS_SETRESUID, uid, uid, uid)
	prog.Call("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0)
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{
		{Effective: uint32(effective), Permitted: uint32(permitted), Inheritable: uint32(inheritable)},
		{Effective: uint32(effective >> 32), Permitted: uint32(permitted >> 32), Inheritable: uint32(inheritable >> 32)},
	}
	prog.Call("set capabilities", unix.SYS_CAPSET, header, data)
	prog.Call("clear ambient capabilities", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for bit := range 64 {
		if ambient&(1<<bit) != 0 {
			prog.Call("raise ambient capability", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, bit, 0, 0)
		}
	}
	return nil
}

var rlimitNumbers = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_STACK": unix.RLIMIT_STACK,
	"RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

// maxFiles is the limit of open files where none is asked for; some programs loop over every number below the limit.
const maxFiles = 1 << 20

func rlimits(prog *nsfork.Program, limits []specs.POSIXRlimit) error {
	files := false
	for _, l := range limits {
		n, ok := rlimitNumbers[strings.ToUpper(l.Type)]
		if !ok {
			return fmt.Errorf("limit %s: unknown", l.Type)
		}
		files = files || n == unix.RLIMIT_NOFILE
		v := &unix.Rlimit{Cur: l.Soft, Max: l.Hard}
		prog.Call("set limit "+l.Type, unix.SYS_PRLIMIT64, 0, n, v, 0)
	}
	if files {
		return nil
	}
	// The Go runtime raised our own soft limit at its start: set what a container expects.
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		return err
	}
	hard := min(own.Max, maxFiles)
	prog.Call("set limit RLIMIT_NOFILE", unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: hard, Max: hard}, 0)
	return nil
}

// checkStrings refuses what execve(2) would cut off: an image's config is JSON and may hold NUL bytes.
func checkStrings(p *specs.Process) error {
	for _, s := range slices.Concat(p.Args, p.Env, []string{p.Cwd}) {
		if strings.IndexByte(s, 0) >= 0 {
			return fmt.Errorf("command, environment or working directory holds a NUL byte: %.100q", s)
		}
	}
	return nil
}
