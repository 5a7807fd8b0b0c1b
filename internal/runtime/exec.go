package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"conex/internal/linux/nsfork"
	"conex/internal/linux/thread"
	"conex/internal/linux/tty"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Exec implements Container.
func (b *box) Exec(ctx context.Context, cfg *ExecConfig) (Process, error) {
	b.mu.Lock()
	init := b.init
	users := b.user
	rootFD := -1
	if b.root != nil {
		fd, err := unix.FcntlInt(b.root.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			b.mu.Unlock()
			return nil, fmt.Errorf("exec: %w", err)
		}
		rootFD = fd
	}
	if users != nil { // of its own, since Delete closes the other
		fd, err := unix.FcntlInt(users.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			b.mu.Unlock()
			return nil, fmt.Errorf("exec: %w", err)
		}
		users = &userNamespace{os.NewFile(uintptr(fd), "user namespace"), users.uidMap, users.gidMap}
		defer users.close()
	}
	b.mu.Unlock()
	if init == nil || rootFD < 0 {
		return nil, errors.New("exec: the container is not running")
	}
	root := os.NewFile(uintptr(rootFD), "/")
	defer root.Close()
	if cfg.Process == nil || len(cfg.Process.Args) == 0 {
		return nil, errors.New("exec: no command specified")
	}
	if err := errors.Join(checkStrings(cfg.Process), checkProcess(cfg.Process)); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	l := &launch{process: cfg.Process, linux: b.cfg.Spec.Linux, named: cfg.User != "" || len(cfg.GroupAdd) > 0, stdio: cfg.Stdio, preserve: cfg.PreserveFDs, users: users}
	var err error
	if l.filter, err = filter(b.cfg.Spec, b.cfg.DefaultSeccomp, b.cfg.SeccompCache); err != nil {
		return nil, err
	}
	reply := make(chan result, 1)
	thread.Go(func() {
		p, err := b.execThread(init, root, cfg, l)
		reply <- result{p, err}
	})
	r := <-reply
	if r.err != nil {
		return nil, r.err
	}
	return r.p, nil
}

// joinCall names the call by which a process of an exec joins the container's namespaces.
const joinCall = "join the container's namespaces"

// execThread prepares a process that joins the container's namespaces, and forks it.
func (b *box) execThread(init *process, root *os.File, cfg *ExecConfig, l *launch) (p *process, err error) {
	host, err := hostNull() // while /proc is the host's
	if err != nil {
		return nil, err
	}
	if err := setAffinity(cfg.Process.ExecCPUAffinity, false); err != nil {
		return nil, err
	}
	into, err := enterCgroup(b.cg)
	if err != nil {
		return nil, err
	}
	if into != nil {
		defer into.Close()
	}
	if err := setAffinity(cfg.Process.ExecCPUAffinity, true); err != nil {
		return nil, err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	// Whatever is done below is done through root: the thread stays where it is, and its child joins the namespaces.
	rc, err := init.pidfd.SyscallConn()
	if err != nil {
		return nil, errors.New("exec: the container is not running")
	}
	var serr error
	pidfd := -1
	cerr := rc.Control(func(fd uintptr) {
		if serr = unix.Setns(int(fd), unix.CLONE_NEWPID); serr == nil { // for the child
			pidfd, serr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
		}
	})
	if cerr != nil || serr == unix.ESRCH {
		return nil, errors.New("exec: the container is not running")
	}
	if serr != nil {
		return nil, fmt.Errorf("exec: join the container's process ids: %w", serr)
	}
	defer unix.Close(pidfd)
	var prog nsfork.Program
	join := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	if hasNamespace(b.cfg.Spec, specs.TimeNamespace) {
		join |= unix.CLONE_NEWTIME
	}
	prog.Call(joinCall, unix.SYS_SETNS, nsfork.FD(pidfd), join)
	if l.users != nil {
		proc, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		defer proc.Close()
		if err := l.users.enter(&prog, cfg.Process, proc, false); err != nil {
			return nil, err
		}
	}
	// From here on paths mean the container's files, which are not ours to trust.
	prog.Call("umask", unix.SYS_UMASK, 0)
	prog.Call("enter root file system", unix.SYS_FCHDIR, root)
	prog.Call("enter root file system", unix.SYS_CHROOT, ".")
	null, err := containerNull(root, host)
	if err != nil {
		return nil, err
	}
	if null != host {
		defer null.Close()
	}
	if l.user, err = processUser(root, cfg.Process, cfg.User, cfg.GroupAdd, cfg.Exact); err != nil {
		return nil, err
	}
	if err := l.users.check(l.user); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	l.env = environment(cfg.Process.Env, l.user)
	if l.path, err = findCommand(root, cmp.Or(cfg.Path, cfg.Process.Args[0]), cfg.Process.Cwd, l.env); err != nil {
		return nil, err
	}
	var master *os.File
	if cfg.Process.Terminal {
		if l.console, err = openTerminal(root); err != nil {
			return nil, err
		}
		defer l.console.slave.Close()
		master = l.console.master
		defer func() {
			if err != nil {
				master.Close()
			}
		}()
		if err := l.console.slave.Chown(l.users.uid(l.user.UID), l.users.gid(5)); err != nil {
			return nil, fmt.Errorf("exec: give the terminal to user %d: %w", l.user.UID, err)
		}
		if s := cfg.Process.ConsoleSize; s != nil {
			if err := tty.SetSize(int(l.console.slave.Fd()), tty.Size{Rows: uint16(s.Height), Cols: uint16(s.Width)}); err != nil {
				return nil, fmt.Errorf("exec: %w", err)
			}
		}
	}
	if err := l.program(&prog, null); err != nil {
		return nil, err
	}
	pid, child, err := prog.Start(nsfork.Attr{Cgroup: into})
	var fe *nsfork.Error
	if errors.As(err, &fe) && fe.Call == "clone3" && fe.Errno == unix.ENOMEM {
		// What the kernel says of a pid namespace whose first process is ending (pid_namespaces(7)).
		return nil, fmt.Errorf("exec: the container is not running, or memory is short: %w", fe.Errno)
	}
	if errors.As(err, &fe) && fe.Call == joinCall && fe.Errno == unix.ESRCH {
		return nil, errors.New("exec: the container is not running")
	}
	if err != nil {
		return nil, startError(err, cfg.Process)
	}
	return newProcess(pid, child, master), nil
}
