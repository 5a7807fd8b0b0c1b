package runtime

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/nsfork"
	"conex/internal/linux/seccomp"
	"conex/internal/linux/thread"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// External is an OCI runtime in another program, such as runc or crun, called by its command line.
//
// The root file system is mounted in a mount namespace of our own, in which `create` is executed: nobody else ever sees it, and the
// container's own mount namespace, a copy, keeps it from then on. The processes that the runtime leaves behind become our children,
// since we are their reaper (PR_SET_CHILD_SUBREAPER), so that their end is seen as that of any child.
//
//	thread: new mount namespace, overlay on Scratch, config.json     create: the process waits for its start
//	Start:                                                           start
//	Exec:                                                            exec --detach
//	Delete:                                                          delete --force
type External struct {
	// Path is the runtime's program.
	Path string
	// State is a folder for the runtime's own state and for bundles, gone at a reboot.
	State string
	// Limit is how long a command of the runtime may take before it is killed; zero is commandLimit.
	Limit time.Duration
}

// commandLimit is what the kubelet grants a runtime too. Ours are done in a fraction of a second; what starts a virtual machine takes seconds.
const commandLimit = 2 * time.Minute

// NewExternal returns the runtime at path. It makes this process the reaper of what runtimes leave behind.
func NewExternal(path, state string) Runtime {
	hide()
	reaper()
	return External{Path: path, State: state}
}

var reaper = sync.OnceFunc(func() {
	// Fails on no kernel that conex runs on.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
})

// foreign is a container of an external runtime.
type foreign struct {
	rt    External
	cfg   *Config
	dir   string // the bundle, and other files of ours
	cg    cgroup.Manager
	netns *os.File
	// aside is where the root file system was mounted for the runtime, "" for Scratch.
	aside string

	console *os.File
	execs   atomic.Int64

	mu   sync.Mutex
	init *process
}

// Create implements Runtime.
func (e External) Create(ctx context.Context, cfg *Config) (Container, error) {
	if err := e.check(cfg); err != nil {
		return nil, err
	}
	place, err := cgroup.Parse(cfg.Spec.Linux.CgroupsPath, cfg.SystemdCgroup)
	if err != nil {
		return nil, err
	}
	f := &foreign{rt: e, cfg: cfg, dir: filepath.Join(e.State, "bundles", cfg.ID)}
	if f.cg, err = cgroup.Open(place); err != nil {
		return nil, err
	}
	// A monitor that was killed has left the runtime's state.
	if _, err := os.Lstat(f.dir); err == nil {
		if err := f.Delete(); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(f.program(), []byte(e.Path), 0o600); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	thread.Go(func() { done <- f.create(ctx) })
	if err := <-done; err != nil {
		return nil, errors.Join(err, f.Delete())
	}
	return f, nil
}

// check refuses what only the built-in runtime does.
func (e External) check(cfg *Config) error {
	const only = "create container: %s needs the runtime conex"
	if err := check(cfg); err != nil {
		return err
	}
	switch {
	case cfg.Init:
		return fmt.Errorf(only, "--init")
	case slices.ContainsFunc(cfg.Spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace && n.Path != "" }):
		return fmt.Errorf(only, "a user namespace that exists")
	case cfg.DieWithParent || cfg.Hold != nil:
		return fmt.Errorf(only, "this kind of container")
	}
	return nil
}

// create runs on a thread of its own, which ends with it: the namespaces that it makes last as long as the container's.
func (f *foreign) create(ctx context.Context) error {
	spec, err := f.spec()
	if err != nil {
		return err
	}
	users, err := ownUsers(spec)
	if err != nil {
		return err
	}
	defer users.close()
	if v, ok := spec.Linux.Sysctl[pingGroups]; ok { // written by the runtime, in the namespace
		spec.Linux.Sysctl[pingGroups] = users.groups(v, false)
	}
	net := slices.IndexFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace && n.Path == "" })
	if net >= 0 && users == nil {
		// On another thread: the runtime, executed from this one, takes its own namespace for the host's.
		made := make(chan error, 1)
		thread.Go(func() {
			var err error
			f.netns, err = newNetNS()
			made <- err
		})
		if err := <-made; err != nil {
			return err
		}
		spec.Linux.Namespaces[net].Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.netns.Fd())
	}
	r := &rootfs{cfg: f.cfg, users: users}
	defer r.close()
	if r.early() {
		if err := r.collect(); err != nil {
			return err
		}
	}
	if err := ownMounts(); err != nil {
		return err
	}
	for _, t := range f.cfg.Trees {
		if err := showTree(t); err != nil {
			return err
		}
	}
	var at *place
	if users != nil {
		if at, err = f.newPlace(users); err != nil {
			return err
		}
	}
	if spec.Root.Path, err = f.root(r, at); err != nil {
		return err
	}
	if err := f.prepare(r, &at, spec); err != nil {
		return err
	}
	if err := f.nodes(r, at, spec); err != nil {
		return err
	}
	if err := f.identify(r.root, spec.Process, f.cfg.User, f.cfg.GroupAdd, f.cfg.Exact); err != nil {
		return err
	}
	if u := spec.Process.User; u.UID != 0 || u.GID != 0 {
		if err := users.check(User{UID: u.UID, GID: u.GID, Groups: u.AdditionalGids}); err != nil {
			return err
		}
	}
	b, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(f.dir, "config.json"), b, 0o600)
	}
	if err != nil {
		return err
	}
	// The folders for limits that the kernel counts by, and the v2 tree's, by which everything of a container is found and killed.
	if !f.cfg.SystemdCgroup {
		if err := f.cg.Create(nil); err != nil {
			return err
		}
	}
	pid, console, err := f.launch(ctx, spec.Process, f.cfg.Stdio, "create", "--bundle", f.dir)
	if err != nil {
		return err
	}
	f.console = console
	if f.init, err = f.child(pid, console); err != nil {
		return err
	}
	if net >= 0 && users != nil { // made by the runtime, so that it belongs to the user namespace
		if f.netns, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
			return fmt.Errorf("open container's network namespace: %w", err)
		}
	}
	pids, err := f.cg.Pids()
	if err == nil && !slices.Contains(pids, pid) { // a runtime that does not know the v2 tree beside v1's
		err = f.cg.AddProcess(pid)
	}
	return err
}

// newNetNS makes a network namespace. The calling thread ends in it.
func newNetNS() (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
}

// spec is the configuration as another runtime takes it: what Config says beside its Spec, written down in the spec.
func (f *foreign) spec() (*specs.Spec, error) {
	s, err := clone(f.cfg.Spec)
	if err != nil {
		return nil, err
	}
	s.Version = plainVersion
	if s.Linux.Seccomp == nil && f.cfg.DefaultSeccomp {
		var bounding []string
		if c := s.Process.Capabilities; c != nil {
			bounding = c.Bounding
		}
		s.Linux.Seccomp = seccomp.Default(bounding)
	}
	for k := range s.Linux.Sysctl {
		// Docker's defaults for a network of the container's own; other sysctls for the host were refused at create.
		if strings.HasPrefix(k, "net.") && !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace && n.Path == "" }) {
			delete(s.Linux.Sysctl, k)
		}
	}
	for i, l := range s.Process.Rlimits {
		s.Process.Rlimits[i] = AllowedRlimit(l)
	}
	s.Hooks = nil
	return s, nil
}

// plainVersion is the specification's version that our specs need; some runtimes refuse later ones unread.
const plainVersion = "1.0.2"

// clone copies a spec, so that changes stay ours.
func clone[T any](v *T) (*T, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	c := new(T)
	return c, json.Unmarshal(b, c)
}

// identify writes the user down as numbers, with the capabilities that Docker leaves it.
func (f *foreign) identify(root *os.File, p *specs.Process, user string, groupAdd []string, exact bool) error {
	u, err := processUser(root, p, user, groupAdd, exact)
	if err != nil {
		return err
	}
	p.User.UID, p.User.GID, p.User.AdditionalGids = u.UID, u.GID, u.Groups
	if !exact {
		p.Env = environment(p.Env, u)
	}
	if c := p.Capabilities; c != nil && u.UID != 0 && (user != "" || len(groupAdd) > 0) {
		c.Effective, c.Permitted = c.Ambient, c.Ambient
	}
	return nil
}

// launch runs a command of the runtime that leaves a process behind, and returns that with its terminal.
func (f *foreign) launch(ctx context.Context, p *specs.Process, stdio [3]*os.File, args ...string) (pid int, console *os.File, err error) {
	name := fmt.Sprintf("%s-%d", args[0], f.execs.Add(1))
	pidFile := filepath.Join(f.dir, name+".pid")
	defer os.Remove(pidFile)
	args = append(args, "--pid-file", pidFile)
	var l *consoleListener
	if p.Terminal {
		if l, err = listenConsole(filepath.Join(f.dir, name+".sock")); err != nil {
			return 0, nil, err
		}
		defer l.close()
		args = append(args, "--console-socket", l.path)
		stdio = [3]*os.File{}
	}
	if err := f.call(ctx, p.Args[0], stdio, append(args, f.cfg.ID)...); err != nil {
		return 0, nil, err
	}
	b, err := os.ReadFile(pidFile)
	if err == nil {
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil, fmt.Errorf("%s %s succeeded without a process", f.rt.Path, args[0])
	}
	if err != nil {
		return 0, nil, fmt.Errorf("%s: process id: %w", f.rt.Path, err)
	}
	if l != nil {
		if console, err = l.receive(); err != nil {
			return 0, nil, fmt.Errorf("%s: terminal: %w", f.rt.Path, err)
		}
	}
	return pid, console, nil
}

// call runs a command of the runtime to its end, at the latest ctx's or the limit. command is what the container's user asked for, for an error
// about it.
func (f *foreign) call(ctx context.Context, command string, stdio [3]*os.File, args ...string) error {
	log := filepath.Join(f.dir, "log")
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	global := []string{f.rt.Path, "--root", filepath.Join(f.rt.State, "runtime"), "--log", log, "--log-format", "json"}
	if f.cfg.SystemdCgroup {
		global = append(global, "--systemd-cgroup")
	}
	// crun gives its container's standard streams to the container's user, the host's null device too.
	null, err := hostNull()
	if err != nil {
		return err
	}
	var prog nsfork.Program
	for i := range 3 {
		from := stdio[i]
		if from == nil {
			from = null
		}
		if int(from.Fd()) <= 2 {
			fd, err := unix.FcntlInt(from.Fd(), unix.F_DUPFD_CLOEXEC, 10)
			if err != nil {
				return err
			}
			from = os.NewFile(uintptr(fd), from.Name())
			defer from.Close()
		}
		prog.Call("set standard stream", unix.SYS_DUP3, from, i, 0)
	}
	prog.Call("make process group", unix.SYS_SETPGID, 0, 0)
	prog.CloseOthers(3)
	prog.Exec(f.rt.Path, append(global, args...), os.Environ())
	pid, pidfd, err := prog.Start(nsfork.Attr{})
	if err != nil {
		return fmt.Errorf("execute runtime %s: %w", f.rt.Path, err)
	}
	proc := newProcess(pid, pidfd, nil)
	limit := cmp.Or(f.rt.Limit, commandLimit)
	ctx, done := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no end after %v", limit))
	defer done()
	// With what it has begun and is still of its group: its own helpers, and a container's process that is not one yet.
	late := context.AfterFunc(ctx, func() { _ = unix.Kill(-pid, unix.SIGKILL) })
	st, err := proc.Wait()
	if !late() && err == nil && st.Code != 0 {
		return fmt.Errorf("%s %s: %w, it was killed", f.rt.Path, args[0], context.Cause(ctx))
	}
	if err != nil {
		return err
	}
	if st.Code == 0 {
		return nil
	}
	return foreignError(filepath.Base(f.rt.Path), args[0], command, st.Code, lastError(log))
}

// lastError is the last message of level error in a runtime's log.
func lastError(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 1 << 20
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return ""
	}
	msg := ""
	for line := range bytes.Lines(b) {
		var e struct{ Level, Msg string }
		if json.Unmarshal(line, &e) == nil && e.Level == "error" && e.Msg != "" {
			msg = e.Msg
		}
	}
	return msg
}

// foreignError gives a runtime's message the form of our own; it is known by the words that Docker looks for.
func foreignError(runtime, call, command string, code int, msg string) error {
	var cause error
	switch {
	case call != "create" && call != "start" && call != "exec":
	case strings.Contains(msg, "executable file ") && strings.Contains(msg, "not found in $PATH"):
		cause = ErrCommandNotFound
	case strings.Contains(msg, strconv.Quote(command)) && strings.Contains(msg, "no such file or directory"):
		cause = unix.ENOENT
	case strings.Contains(msg, strconv.Quote(command)) && strings.Contains(msg, "permission denied"), strings.Contains(msg, "open executable: Permission denied"):
		cause = unix.EACCES
	case strings.Contains(strings.ToLower(msg), "exec format error"):
		cause = unix.ENOEXEC
	}
	if cause != nil {
		return &ExecError{Path: command, Err: cause}
	}
	if msg == "" {
		msg = "exit status " + strconv.Itoa(code)
	}
	// On one line, and nothing that a terminal obeys: names of the container's choice stand in it.
	msg = strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) && !unicode.IsSpace(r) {
			return unicode.ReplacementChar
		}
		return r
	}, msg)), " ")
	return fmt.Errorf("%s %s: %s", runtime, call, msg)
}

// NetNS implements Container.
func (f *foreign) NetNS() *os.File { return f.netns }

// Cgroup implements Container.
func (f *foreign) Cgroup() cgroup.Manager { return f.cg }

// Start implements Container.
func (f *foreign) Start(ctx context.Context) (Process, error) {
	if err := f.call(ctx, f.cfg.Spec.Process.Args[0], [3]*os.File{}, "start", f.cfg.ID); err != nil {
		return nil, err
	}
	return f.init, nil
}

// Exec implements Container.
func (f *foreign) Exec(ctx context.Context, cfg *ExecConfig) (Process, error) {
	if cfg.Process == nil || len(cfg.Process.Args) == 0 {
		return nil, errors.New("exec: no command specified")
	}
	if err := checkStrings(cfg.Process); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	p, err := clone(cfg.Process)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenFile(fmt.Sprintf("/proc/%d/root", f.init.Pid()), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, errors.New("exec: the container is not running")
	}
	defer root.Close()
	if err := f.identify(root, p, cfg.User, cfg.GroupAdd, cfg.Exact); err != nil {
		return nil, err
	}
	// Its own complaint about a command comes without a reason of the kernel's, with some runtimes.
	if _, err := findCommand(root, p.Args[0], p.Cwd, p.Env); err != nil {
		return nil, err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(f.dir, fmt.Sprintf("process-%d.json", f.execs.Add(1)))
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(file)
	var pid int
	var console *os.File
	done := make(chan struct{})
	thread.Go(func() { // which may get mounts of its own
		defer close(done)
		if err = f.showAside(); err == nil {
			pid, console, err = f.launch(ctx, p, cfg.Stdio, "exec", "--detach", "--process", file)
		}
	})
	<-done
	if err != nil {
		return nil, err
	}
	return f.child(pid, console)
}

// child is the process that the runtime has left behind by its word. Only one of ours can be waited for, and may be put into the container's
// cgroup, whose processes are killed in the end.
func (f *foreign) child(pid int, console *os.File) (*process, error) {
	pidfd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err == nil {
		var ours bool
		if ours, err = isChild(pid); err == nil && !ours {
			err = errors.New("it is not one that the runtime has left to its caller")
		}
		if err != nil {
			unix.Close(pidfd)
		}
	}
	if err != nil {
		if console != nil {
			console.Close()
		}
		return nil, fmt.Errorf("%s: process %d: %w", f.rt.Path, pid, err)
	}
	return newProcess(pid, os.NewFile(uintptr(pidfd), "pidfd"), console), nil
}

// isChild reports whether a process is a child of this one.
func isChild(pid int) (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false, err
	}
	// The name stands in parentheses and may hold anything, ")" too.
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	return len(f) > 1 && string(f[1]) == strconv.Itoa(os.Getpid()), nil
}

// Delete implements Container.
func (f *foreign) Delete() error {
	var errs []error
	var left error // what the runtime left to us
	if _, err := os.Lstat(f.dir); err == nil {
		left = f.call(context.Background(), "", [3]*os.File{}, "delete", "--force", f.cfg.ID)
	}
	if err := f.cg.Kill(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		errs = append(errs, fmt.Errorf("delete container: %w", err))
	}
	f.mu.Lock()
	if f.netns != nil {
		f.netns.Close()
		f.netns = nil
	}
	init := f.init
	f.mu.Unlock()
	if init != nil {
		_ = init.Signal(unix.SIGKILL) // an error means that it has ended
		_, err := init.Wait()         // a start that failed leaves a process that nobody else collects
		errs = append(errs, err)
	}
	if err := f.cg.Delete(); err != nil {
		errs = append(errs, fmt.Errorf("delete container: %w", err))
	}
	if left != nil { // its processes and cgroups are gone all the same; now what it wrote down
		if err := os.RemoveAll(filepath.Join(f.rt.State, "runtime", f.cfg.ID)); err != nil {
			errs = append(errs, left, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(f.dir)
}

// program is the file that says which runtime has the container.
func (f *foreign) program() string { return filepath.Join(f.dir, "program") }

// ForgetExternal removes what an external runtime with its state in a folder knows of a container whose owner died, and whose processes
// are gone. It costs one look when it knows nothing.
func ForgetExternal(state, id string) error {
	f := &foreign{rt: External{State: state}, cfg: &Config{ID: id}, dir: filepath.Join(state, "bundles", id)}
	path, err := os.ReadFile(f.program())
	if errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(f.dir)
	}
	if err != nil {
		return err
	}
	f.rt.Path = string(path)
	if err := f.call(context.Background(), "", [3]*os.File{}, "delete", "--force", id); err != nil {
		// Uninstalled, perhaps. What it has of its own goes all the same.
		if rerr := os.RemoveAll(filepath.Join(state, "runtime", id)); rerr != nil {
			return errors.Join(err, rerr)
		}
	}
	return os.RemoveAll(f.dir)
}

// consoleListener waits for a terminal that a runtime sends.
type consoleListener struct {
	fd, dir int
	file    string // the socket
	path    string // how the runtime finds it
}

// maxSocketPath is what fits into a Unix socket's address.
const maxSocketPath = 107

func listenConsole(path string) (l *consoleListener, err error) {
	l = &consoleListener{fd: -1, dir: -1, file: path, path: path}
	defer func() {
		if err != nil {
			l.close()
			err = fmt.Errorf("console socket: %w", err)
		}
	}()
	if len(path) > maxSocketPath {
		// Through the folder's descriptor, ours, for both of us.
		if l.dir, err = unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return nil, err
		}
		l.path = fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), l.dir, filepath.Base(path))
	}
	if l.fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, err
	}
	if err = unix.Bind(l.fd, &unix.SockaddrUnix{Name: l.path}); err != nil {
		return nil, err
	}
	return l, unix.Listen(l.fd, 1)
}

func (l *consoleListener) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
		os.Remove(l.file)
	}
	if l.dir >= 0 {
		unix.Close(l.dir)
	}
}

// receive takes the terminal that the runtime, which has ended, must have sent.
func (l *consoleListener) receive() (*os.File, error) {
	conn, _, err := unix.Accept4(l.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, err
	}
	defer unix.Close(conn)
	name, oob := make([]byte, unix.PathMax), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(conn, name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.New("no descriptor was sent")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("no descriptor was sent")
	}
	if err := unix.SetNonblock(fds[0], true); err != nil { // for the poller: reading costs no thread
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "/dev/ptmx"), nil
}
