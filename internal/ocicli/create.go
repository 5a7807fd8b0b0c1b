package ocicli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/nsfork"
	"conex/internal/linux/pidfd"
	"conex/internal/ocicli/shield"
	"conex/internal/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// startOptions are the flags of create and run.
type startOptions struct {
	bundle, consoleSocket, pidFile string
	noPivot, noKeyring             bool
	preserve                       int
	detach, keep                   bool
}

func (o *startOptions) register(fs *flag.FlagSet) {
	fs.StringVar(&o.bundle, "bundle", ".", "")
	fs.StringVar(&o.bundle, "b", ".", "")
	fs.StringVar(&o.consoleSocket, "console-socket", "", "")
	fs.StringVar(&o.pidFile, "pid-file", "", "")
	fs.BoolVar(&o.noPivot, "no-pivot", false, "")
	fs.BoolVar(&o.noKeyring, "no-new-keyring", false, "")
	fs.IntVar(&o.preserve, "preserve-fds", 0, "")
}

var errNoConsole = errors.New("cannot allocate tty: a process with a terminal that is left alone needs --console-socket")

func createCommand(fs *flag.FlagSet) func(*app, []string) error {
	var o startOptions
	o.register(fs)
	return func(a *app, args []string) error {
		spec, bundle, raw, err := a.bundle(&o)
		if err != nil {
			return err
		}
		if spec.Process.Terminal && o.consoleSocket == "" {
			return errNoConsole
		}
		c, p, err := a.make(args[0], &o, true, spec, bundle, raw)
		if err != nil {
			return err
		}
		err = o.announce(p)
		if err == nil {
			err = c.save(p.Pid())
		}
		if err != nil {
			return errors.Join(err, a.undo(c))
		}
		c.lock.Release()
		return nil
	}
}

func runCommand(fs *flag.FlagSet) func(*app, []string) error {
	var o startOptions
	o.register(fs)
	fs.BoolVar(&o.detach, "detach", false, "")
	fs.BoolVar(&o.detach, "d", false, "")
	fs.BoolVar(&o.keep, "keep", false, "")
	fs.Bool("no-subreaper", false, "") // ours never is one
	return func(a *app, args []string) error { return a.run(args[0], &o) }
}

func (a *app) run(id string, o *startOptions) error {
	spec, bundle, raw, err := a.bundle(o)
	if err != nil {
		return err
	}
	terminal := spec.Process.Terminal
	if terminal && o.detach && o.consoleSocket == "" {
		return errNoConsole
	}
	// Without hooks that come between create and start the process need not be held.
	hold := spec.Hooks != nil && len(spec.Hooks.StartContainer) > 0
	c, p, err := a.make(id, o, hold, spec, bundle, raw)
	if err != nil {
		return err
	}
	front, err := o.foreground(p)
	if err == nil {
		err = c.save(p.Pid())
	}
	if err == nil && hold {
		err = a.start(c)
	}
	if err == nil && spec.Hooks != nil {
		err = runtime.RunHooks("poststart", spec.Hooks.Poststart, c.state(specs.StateRunning, p.Pid()))
	}
	if err != nil {
		if front != nil {
			front.end()
		}
		return errors.Join(err, a.undo(c))
	}
	if o.detach {
		c.lock.Release()
		return nil
	}
	if err := c.lock.Pause(); err != nil {
		return err
	}
	st, err := front.wait(p)
	if err != nil {
		return err
	}
	if !o.keep {
		err := c.lock.Resume()
		if errors.Is(err, fs.ErrNotExist) { // deleted by somebody else, who may have made another with its name
			return code(st.Code)
		}
		if err == nil {
			err = a.dispose(c, spec)
		}
		if err != nil {
			return err
		}
	}
	return code(st.Code)
}

// code is a process's exit code as a command's result.
func code(n int) error {
	if n == 0 {
		return nil
	}
	return exitCode(n)
}

// foreground hands the terminal to whoever asked for it by --console-socket, or to the user, and writes the pid file.
func (o *startOptions) foreground(p runtime.Process) (*front, error) {
	if err := o.announce(p); err != nil {
		return nil, err
	}
	if o.detach {
		return nil, nil
	}
	var console *os.File
	if o.consoleSocket == "" {
		console = p.Console()
	}
	return newFront(p, console)
}

// announce sends the terminal and writes the pid file.
func (o *startOptions) announce(p runtime.Process) error {
	return announce(p, o.consoleSocket, o.pidFile)
}

func announce(p runtime.Process, consoleSocket, pidFile string) error {
	if consoleSocket != "" && p.Console() != nil {
		err := sendConsole(consoleSocket, p.Console())
		if cerr := p.Console().Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
	if pidFile == "" {
		return nil
	}
	return disk.WriteFile(pidFile, []byte(strconv.Itoa(p.Pid())), 0o644, disk.Volatile)
}

// bundle reads the bundle's configuration.
func (a *app) bundle(o *startOptions) (*specs.Spec, string, []byte, error) {
	bundle, err := filepath.Abs(o.bundle)
	if err != nil {
		return nil, "", nil, err
	}
	raw, err := readConfig(bundle)
	if err != nil {
		return nil, "", nil, err
	}
	spec, err := parseSpec(raw)
	return spec, bundle, raw, err
}

// make creates a container up to its first process, which waits for the start with hold, and runs without.
func (a *app) make(id string, o *startOptions, hold bool, spec *specs.Spec, bundle string, raw []byte) (_ *container, _ runtime.Process, err error) {
	if !spec.Process.Terminal && o.consoleSocket != "" {
		return nil, nil, errors.New("--console-socket: the process has no terminal")
	}
	preserve, err := preserved(o.preserve, spec.Process)
	if err != nil {
		return nil, nil, err
	}
	completeSpec(spec, id, bundle, a.systemdCgroup)
	a.allow(spec.Process)
	if st, err := os.Stat(spec.Root.Path); err != nil {
		return nil, nil, fmt.Errorf("rootfs: %w", err)
	} else if !st.IsDir() {
		return nil, nil, fmt.Errorf("rootfs %s is not a folder", spec.Root.Path)
	}
	c, err := a.create(id, raw)
	if err != nil {
		return nil, nil, err
	}
	c.spec = spec
	c.rec = record{Bundle: bundle, RootFS: spec.Root.Path, Created: time.Now().UTC(), Systemd: a.systemdCgroup, NoKeyring: o.noKeyring}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.remove())
		}
	}()
	cfg := &runtime.Config{
		ID: id, Spec: spec, RootFS: runtime.RootFS{Dir: spec.Root.Path}, Scratch: spec.Root.Path, Exact: true,
		Stdio: [3]*os.File{os.Stdin, os.Stdout, os.Stderr}, State: c.state, NoPivot: o.noPivot, NoKeyring: o.noKeyring, PreserveFDs: preserve,
		SystemdCgroup: a.systemdCgroup,
	}
	if spec.Linux.Seccomp != nil {
		cfg.SeccompCache = seccompCache(a.root)
	}
	if hold {
		if cfg.Hold, err = c.hold(); err != nil {
			return nil, nil, err
		}
		defer cfg.Hold.FIFO.Close()
		defer cfg.Hold.Report.Close()
	}
	p, err := runtime.Run(cfg)
	if err != nil {
		return nil, nil, err
	}
	return c, p, nil
}

// allow leaves out what this host can't give, capabilities and higher limits, and says so.
func (a *app) allow(p *specs.Process) {
	if lacking := heldCapabilities(p.Capabilities); len(lacking) > 0 {
		a.warn(fmt.Errorf("ignoring unknown or unavailable capabilities: %s", strings.Join(lacking, " ")))
	}
	for i, l := range p.Rlimits {
		if got := runtime.AllowedRlimit(l); got != l {
			a.warn(fmt.Errorf("%s: this host does not let us raise it from %d to %d", l.Type, got.Hard, l.Hard))
			p.Rlimits[i] = got
		}
	}
}

// hold makes what the first process waits with.
func (c *container) hold() (*runtime.Hold, error) {
	if err := unix.Mkfifo(c.file("start"), 0o600); err != nil {
		return nil, fmt.Errorf("make start pipe: %w", err)
	}
	// For both ways, so that neither opening waits for the other end and reading never finds an end.
	fifo, err := os.OpenFile(c.file("start"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	report, err := os.OpenFile(c.file("report"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		fifo.Close()
		return nil, err
	}
	h := &runtime.Hold{FIFO: fifo, Report: report}
	return h, nil
}

// undo takes back a creation that failed after the process was there.
func (a *app) undo(c *container) error {
	c.lock.Release()
	return a.remove(c.id, true)
}

// preserved is how many descriptors from 3 on the process inherits: those of --preserve-fds, and those of a socket-activated service,
// which it is told of as its number 1.
func preserved(n int, p *specs.Process) (int, error) {
	if n < 0 {
		return 0, fmt.Errorf("--preserve-fds %d is negative", n)
	}
	if s := os.Getenv("LISTEN_FDS"); s != "" {
		more, err := strconv.Atoi(s)
		if err != nil || more < 0 {
			return 0, fmt.Errorf("LISTEN_FDS=%s is no number of descriptors", s)
		}
		p.Env = append(p.Env, "LISTEN_FDS="+s, "LISTEN_PID=1")
		n += more
	}
	for fd := 3; fd < 3+n; fd++ {
		// One of our own is close-on-exec; what was given to us can't be.
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return 0, fmt.Errorf("please check that preserved-fds %d...%d are open: %d is not", 3, 3+n-1, fd)
		}
	}
	return n, nil
}

func startCommand(*flag.FlagSet) func(*app, []string) error {
	return func(a *app, args []string) error {
		c, err := a.openLocked(args[0])
		if err != nil {
			return err
		}
		defer c.lock.Release()
		switch status := c.status(); status {
		case specs.StateCreated:
		case specs.StateStopped:
			return errors.New("cannot start a container that has stopped")
		case specs.StateRunning, "paused":
			return errors.New("cannot start an already running container")
		default:
			return fmt.Errorf("cannot start a container in the %s state", status)
		}
		if err := a.start(c); err != nil {
			return err
		}
		if h := c.spec.Hooks; h != nil {
			if err := runtime.RunHooks("poststart", h.Poststart, c.state(specs.StateRunning, c.rec.Pid)); err != nil {
				cg, cerr := c.cgroup()
				if cerr == nil {
					cerr = cg.Kill()
				}
				return errors.Join(err, cerr)
			}
		}
		return nil
	}
}

// start lets the waiting process go on and returns when it has executed its command, or says why it could not.
func (a *app) start(c *container) error {
	spec, err := c.config()
	if err != nil {
		return err
	}
	if h := spec.Hooks; h != nil && len(h.StartContainer) > 0 {
		if !a.shielded {
			shield.Execute() // from the beginning; the lock goes with this program
		}
		if err := c.startHooks(h.StartContainer); err != nil {
			if p, perr := os.FindProcess(c.rec.Pid); perr == nil && c.alive() {
				err = errors.Join(err, p.Kill())
			}
			return err
		}
	}
	fd, err := unix.Open(c.file("start"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.ENXIO {
		return errors.New("cannot start a container that has stopped")
	}
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	// execve closes the process's end, and so does its death.
	fds := []unix.PollFd{{Fd: int32(fd)}}
	for {
		n, err := unix.Poll(fds, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("start: %w", err)
		}
		if n > 0 {
			break
		}
	}
	b, err := os.ReadFile(c.file("report"))
	if err != nil {
		return err
	}
	if err := nsfork.ReadReport(b); err != nil {
		c.awaitEnd()
		return &runtime.ExecError{Path: spec.Process.Args[0], Err: errors.Unwrap(err)}
	}
	return nil
}

// exitTimeout bounds the wait for a process that is about to end by itself.
const exitTimeout = 5 * time.Second

// awaitEnd waits until a process that has reported its failure is gone, so that the state is the right one at once.
func (c *container) awaitEnd() {
	fd, err := pidfd.Open(c.rec.Pid)
	if err != nil {
		return // it is
	}
	defer fd.Close()
	ctx, cancel := context.WithTimeout(context.Background(), exitTimeout)
	defer cancel()
	_ = pidfd.Poll(ctx, fd) // without it the state is right a moment later
}

// startHooks runs hooks inside the container, with what its process will have.
func (c *container) startHooks(hooks []specs.Hook) error {
	cfg, err := c.runtimeConfig()
	if err != nil {
		return err
	}
	box, err := runtime.Open(cfg, c.rec.Pid)
	if err != nil {
		return err
	}
	return runtime.RunHooksIn(box, cfg.Spec.Process, hooks, c.state(specs.StateCreated, 1))
}
