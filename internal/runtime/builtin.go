package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"conex/internal/linux/cgroup"
	"conex/internal/linux/thread"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Builtin is the runtime in this binary.
type Builtin struct{}

// New returns the built-in runtime. It makes the process undumpable: between fork and execve a child inside the
// container is still this program, and a container's root could otherwise reach it through /proc/<pid>/exe (CVE-2019-5736).
func New() Runtime {
	hide()
	return Builtin{}
}

var hide = sync.OnceFunc(func() {
	// Fails on no kernel that conex runs on.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
})

// namespaceFlags maps the spec's namespaces to clone flags.
var namespaceFlags = map[specs.LinuxNamespaceType]int{
	specs.PIDNamespace: unix.CLONE_NEWPID, specs.NetworkNamespace: unix.CLONE_NEWNET, specs.MountNamespace: unix.CLONE_NEWNS,
	specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS, specs.CgroupNamespace: unix.CLONE_NEWCGROUP,
	specs.TimeNamespace: unix.CLONE_NEWTIME,
	specs.UserNamespace: unix.CLONE_NEWUSER,
}

// box is a container of the built-in runtime.
//
// Create starts its thread and returns when the network namespace exists. The thread goes on with the mounts; Start waits
// for it and lets it fork. The thread ends after that (with DieWithParent when the process has), or when Delete closes quit.
type box struct {
	cfg *Config
	cg  cgroup.Manager
	// place is the cgroup's.
	place cgroup.Place

	flags int // namespaces to make, without those to join
	join  []specs.LinuxNamespace
	// userPath is the user namespace to join. It is not entered as the others are, see userNamespace.
	userPath string

	netns     *os.File
	life      *os.File         // DieWithParent: open as long as this process may be the parent
	timens    *os.File         // a time namespace for the child to join
	alone     bool             // Run's: nobody works on the network beside this thread
	entrances []int            // v1's, for the child to enter by
	named     chan error       // the network namespace exists, or why not
	prepared  chan error       // the root file system stands, or why not
	start     chan chan result // Start's request
	quit      chan struct{}
	ended     chan struct{} // the thread has done its work

	mu      sync.Mutex
	started bool
	deleted bool
	init    *process
	// root is the container's root folder, for exec: joining the mount namespace leads to that namespace's root, which is another
	// one where conex itself runs in a chroot.
	root *os.File
	// user is the container's user namespace, nil without.
	user *userNamespace
}

type result struct {
	p   *process
	err error
}

// Create implements Runtime.
func (Builtin) Create(ctx context.Context, cfg *Config) (Container, error) {
	b, err := newBox(cfg)
	if err != nil {
		return nil, err
	}
	thread.Go(b.thread)
	if err := <-b.named; err != nil {
		return nil, errors.Join(err, b.Delete())
	}
	return b, nil
}

// newBox checks the configuration; nothing is made yet.
func newBox(cfg *Config) (*box, error) {
	if err := check(cfg); err != nil {
		return nil, err
	}
	place, err := cgroup.Parse(cfg.Spec.Linux.CgroupsPath, cfg.SystemdCgroup)
	if err != nil {
		return nil, err
	}
	cg, err := cgroup.Open(place)
	if err != nil {
		return nil, err
	}
	b := &box{
		cfg: cfg, cg: cg, place: place,
		named: make(chan error, 1), prepared: make(chan error, 1),
		start: make(chan chan result), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	for _, ns := range cfg.Spec.Linux.Namespaces {
		switch {
		case ns.Path != "" && ns.Type == specs.UserNamespace:
			b.userPath = ns.Path
		case ns.Path != "":
			b.join = append(b.join, ns)
		default:
			b.flags |= namespaceFlags[ns.Type]
		}
	}
	return b, nil
}

// Run is Create and Start at once, for who has nothing to do between them, and leaves the container to those who Open it. One thread makes
// everything, one after the other: on a machine with work for all its processors that is sooner done than with others beside it, since
// every thread that is woken up costs more than the shorter of these steps.
func Run(cfg *Config) (Process, error) {
	hide()
	if cfg.DieWithParent {
		return nil, errors.New("run container: nobody is left that it could die with")
	}
	b, err := newBox(cfg)
	if err != nil {
		return nil, err
	}
	b.started, b.alone = true, true
	reply := make(chan result, 1)
	thread.Go(func() {
		defer close(b.ended)
		p, err := b.run()
		reply <- result{p, err}
	})
	r := <-reply
	if r.err != nil {
		if err := b.Delete(); err != nil && !strings.Contains(err.Error(), r.err.Error()) { // else it is the same trouble
			r.err = errors.Join(r.err, err)
		}
		return nil, r.err
	}
	<-b.ended
	b.free()
	return r.p, nil
}

// run is the life of Run's thread.
func (b *box) run() (*process, error) {
	made := make(chan error, 1)
	if !b.cfg.InCgroup {
		if err := b.cg.Create(b.cfg.Spec.Linux.Resources); err != nil { // while this thread is a thread of the host's
			return nil, err
		}
	}
	made <- nil
	r := &rootfs{cfg: b.cfg, cgroup: b.place.Path, cgroupMade: made}
	defer r.close()
	if err := b.enter(r); err != nil {
		return nil, err
	}
	if err := r.build(); err != nil {
		return nil, err
	}
	return b.fork(r)
}

// Open returns a container whose first process was started by another process of ours with the same configuration, for Exec, Cgroup
// and Delete. os.ErrProcessDone says that the process has ended; Delete works all the same.
func Open(cfg *Config, pid int) (Container, error) {
	hide()
	place, err := cgroup.Parse(cfg.Spec.Linux.CgroupsPath, cfg.SystemdCgroup)
	if err != nil {
		return nil, err
	}
	cg, err := cgroup.Open(place)
	if err != nil {
		return nil, err
	}
	b := &box{cfg: cfg, cg: cg, place: place, quit: make(chan struct{}), ended: make(chan struct{}), started: true}
	close(b.ended)
	if pid <= 0 {
		return b, os.ErrProcessDone
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err == unix.ESRCH {
		return b, os.ErrProcessDone
	}
	if err != nil {
		return b, fmt.Errorf("open container process %d: %w", pid, err)
	}
	b.init = newProcess(pid, os.NewFile(uintptr(fd), "pidfd"), nil)
	if hasNamespace(cfg.Spec, specs.UserNamespace) {
		if b.user, err = openUserNamespace(pid); errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return b, os.ErrProcessDone
		} else if err != nil {
			return b, err
		}
	}
	b.root, err = os.OpenFile(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return b, os.ErrProcessDone
	}
	if err != nil {
		return b, fmt.Errorf("open container's root file system: %w", err)
	}
	return b, nil
}

// check refuses what this runtime can't do, before anything is made.
func check(cfg *Config) error {
	s := cfg.Spec
	switch {
	case s == nil || s.Linux == nil || s.Process == nil || s.Root == nil:
		return errors.New("create container: spec without process, root or linux part")
	case len(s.Process.Args) == 0:
		return errors.New("no command specified")
	case s.Linux.CgroupsPath == "":
		return errors.New("create container: spec without a cgroups path")
	case s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "":
		return errors.New("create container: SELinux labels are not supported")
	case cfg.RootFS.Dir == "" && len(cfg.RootFS.Lower) == 0:
		return errors.New("create container: no root file system")
	}
	if err := checkStrings(s.Process); err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	if err := checkMappings(s.Linux); err != nil {
		return err
	}
	mnt := false
	for _, ns := range s.Linux.Namespaces {
		if namespaceFlags[ns.Type] == 0 {
			return fmt.Errorf("create container: %s namespaces are not supported", ns.Type)
		}
		mnt = mnt || ns.Type == specs.MountNamespace && ns.Path == ""
	}
	if !mnt {
		return errors.New("create container: a mount namespace of its own is needed")
	}
	for _, m := range s.Mounts {
		if err := checkMount(m); err != nil {
			return err
		}
	}
	return checkExtras(cfg)
}

func checkMount(m specs.Mount) error {
	if !filepath.IsAbs(m.Destination) {
		return fmt.Errorf("mount %q: the destination must be an absolute path", m.Destination)
	}
	if m.Type == "proc" || !below(m.Destination, "/proc") {
		return nil
	}
	for _, ok := range inProc {
		if filepath.Clean(m.Destination) == "/proc/"+ok {
			return nil
		}
	}
	return fmt.Errorf("mount %s: mounts inside /proc are refused, they could deceive the container's programs about their confinement", m.Destination)
}

// NetNS implements Container.
func (b *box) NetNS() *os.File { return b.netns }

// Cgroup implements Container.
func (b *box) Cgroup() cgroup.Manager { return b.cg }

// Start implements Container.
func (b *box) Start(ctx context.Context) (Process, error) {
	b.mu.Lock()
	if b.started || b.deleted {
		b.mu.Unlock()
		return nil, errors.New("start container: it was started already")
	}
	b.started = true
	b.mu.Unlock()
	if err := <-b.prepared; err != nil {
		return nil, err
	}
	reply := make(chan result, 1)
	b.start <- reply
	r := <-reply
	if r.err != nil {
		return nil, r.err
	}
	b.mu.Lock()
	b.init = r.p
	b.mu.Unlock()
	return r.p, nil
}

// Delete implements Container.
func (b *box) Delete() error {
	b.mu.Lock()
	if !b.deleted {
		b.deleted = true
		close(b.quit)
	}
	b.mu.Unlock()
	<-b.ended
	b.free()
	if b.cfg.InCgroup {
		if b.init != nil {
			_ = b.init.Signal(unix.SIGKILL) // it has ended if this fails
		}
		return nil
	}
	if err := b.cg.Kill(); err != nil && !errors.Is(err, cgroup.ErrNotExist) {
		return fmt.Errorf("delete container: %w", err)
	}
	if err := b.cg.Delete(); err != nil {
		return fmt.Errorf("delete container: %w", err)
	}
	return nil
}

// free closes what is open of the container.
func (b *box) free() {
	if b.netns != nil {
		b.netns.Close()
	}
	if b.timens != nil {
		b.timens.Close()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.root != nil {
		b.root.Close()
		b.root = nil
	}
	b.user.close()
	b.user = nil
}

// enter makes and joins namespaces.
func (b *box) enter(r *rootfs) error {
	if b.userPath != "" || b.flags&unix.CLONE_NEWUSER != 0 {
		return b.enterUserNamespaces(r)
	}
	return b.enterNamespaces(r)
}

// thread is the life of the container's thread. Everything here runs in the namespaces that it makes.
func (b *box) thread() {
	defer close(b.ended)
	made := make(chan error, 1)
	r := &rootfs{cfg: b.cfg, cgroup: b.place.Path, cgroupMade: made}
	defer r.close()
	if err := b.enter(r); err != nil {
		b.named <- err
		return
	}
	if b.cfg.InCgroup {
		made <- nil
	} else {
		go func() { made <- b.cg.Create(b.cfg.Spec.Linux.Resources) }() // on another thread, beside the mounts
	}
	b.named <- nil
	if err := r.build(); err != nil {
		r.joinCgroup() // Delete removes it: it must not appear after that
		b.prepared <- err
		return
	}
	b.prepared <- nil
	select {
	case <-b.quit:
	case reply := <-b.start:
		p, err := b.fork(r)
		r.close()
		reply <- result{p, err}
		if err == nil && b.cfg.DieWithParent { // whose death signal comes when this thread ends (prctl(2))
			select {
			case <-p.done:
			case <-b.quit:
			}
		}
		if b.life != nil {
			b.life.Close()
		}
	}
}

// enterNamespaces makes and joins namespaces, the network's first, so that others can work on it while this thread goes on.
func (b *box) enterNamespaces(r *rootfs) error {
	if b.flags&unix.CLONE_NEWNET != 0 && !b.alone {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		f, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		if err != nil {
			return err
		}
		b.netns = f
	}
	if err := b.joinNamespaces(); err != nil {
		return err
	}
	if r.early() {
		if err := r.collect(); err != nil {
			return err
		}
	}
	// The pid namespace comes with the fork, the cgroup namespace after the child is in its cgroup.
	flags := b.flags &^ (unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP)
	if !b.alone {
		flags &^= unix.CLONE_NEWNET
	}
	if err := unix.Unshare(flags | unix.CLONE_FS); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if flags&unix.CLONE_NEWTIME != 0 { // made for the children of this thread alone, who enter it at their fork
		return setClocks(b.cfg.Spec.Linux.TimeOffsets)
	}
	return nil
}

// joinNamespaces enters those that exist.
func (b *box) joinNamespaces() error {
	for _, ns := range b.join {
		f, err := os.Open(ns.Path)
		if err != nil {
			return fmt.Errorf("join %s namespace: %w", ns.Type, err)
		}
		if ns.Type == specs.TimeNamespace { // only a process of one thread can: the child does it
			b.timens = f
			continue
		}
		err = unix.Setns(int(f.Fd()), namespaceFlags[ns.Type])
		f.Close()
		if err != nil {
			return fmt.Errorf("join %s namespace %s: %w", ns.Type, ns.Path, err)
		}
	}
	return nil
}

// Namespaces lists the types of namespaces that containers can have.
func Namespaces() []string {
	var out []string
	for t := range namespaceFlags {
		out = append(out, string(t))
	}
	slices.Sort(out)
	return out
}
