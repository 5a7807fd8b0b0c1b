package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/image"
	"conex/internal/linux/caps"
	"conex/internal/linux/mount"
	"conex/internal/linux/userns"
	"conex/internal/ocispec"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/undo"

	apic "github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// DebugTarget is where a debug shell shows the file system that it is about.
const DebugTarget = "/target"

// DebugRequest asks for a command of a toolbox image beside a container or image.
type DebugRequest struct {
	// Name is a container, or an image.
	Name string
	// Image is the toolbox; "" is the configuration's. Pull says when to ask the registry for it, as in CreateRequest.
	Image, Pull string
	Progress    Progress
	// Args is the command; none is a shell, Shell if it is set. Script is a line for that shell.
	Args          []string
	Shell, Script string
	// User is one of the toolbox's, root by default. WorkingDir is by default the container's, below DebugTarget.
	User, WorkingDir string
	Env              []string
	Privileged       bool
	// Console is what the command talks to.
	Console build.Console
	// Note is told, before anything runs, what is debugged: "running container", "stopped container", "image". May be nil.
	Note func(what, name string)
}

// Debug runs a command with the tools of an image and returns its exit code. Of a running container it is in the pid, network, ipc and
// uts namespaces and in the cgroup, and DebugTarget is the container's file system, its mounts included, to be changed at will. Of a stopped
// container or an image DebugTarget is a copy whose changes are thrown away, as is what is changed in the toolbox. The command ends with this process,
// however that ends.
func (e *Engine) Debug(ctx context.Context, req DebugRequest) (code int, err error) {
	if req.Script != "" && len(req.Args) > 0 {
		return 0, invalid("a command and a line for the shell can't be used together")
	}
	if err := build.Settle(ctx, e.cfg.State, e.Networks()); err != nil {
		return 0, err
	}
	t, err := e.debugTarget(ctx, req.Name)
	if err != nil {
		return 0, err
	}
	defer t.back.Run()
	box, lease, err := e.imageFor(ctx, CreateRequest{Config: &apic.Config{Image: cmp.Or(req.Image, e.cfg.Debug.Image)}, Pull: req.Pull, Progress: req.Progress})
	if err != nil {
		return 0, classify(err)
	}
	defer lease.Close()
	ls, err := e.Layers()
	if err != nil {
		return 0, err
	}
	lower, err := ls.Lower(ctx, box.Layers())
	if err != nil {
		return 0, err
	}
	if len(lower) == 0 {
		return 0, invalid("image %s is empty: it has no tools", cmp.Or(req.Image, e.cfg.Debug.Image))
	}
	args, err := debugCommand(lower, &req)
	if err != nil {
		return 0, err
	}
	cfg, err := e.debugConfig(t, box.Config, &req, args)
	if err != nil {
		return 0, err
	}
	// What is changed goes into memory that nobody but the process sees, and that ends with it.
	scratch, err := mount.New("tmpfs", []mount.Param{{Key: "source", Value: "debug"}, {Key: "mode", Value: "700"}}, 0)
	if err != nil {
		return 0, err
	}
	defer scratch.Close()
	for _, d := range []string{"root", "upper", "work", "target", "shm"} {
		if err := unix.Mkdirat(int(scratch.Fd()), d, 0o755); err != nil {
			return 0, fmt.Errorf("make folder: %w", err)
		}
	}
	if err := unix.Fchownat(int(scratch.Fd()), "upper", t.uid, t.gid, 0); err != nil {
		return 0, fmt.Errorf("make folder: %w", err)
	}
	at := filepath.Join(e.cfg.State, "c") // covered in the command's mount namespace alone
	cfg.Scratch = at + "/root"
	cfg.RootFS = runtime.RootFS{Lower: lower, Upper: at + "/upper", Work: at + "/work", Volatile: true, UpperAsIs: true}
	cfg.Trees = []runtime.Tree{{Mount: scratch, Dir: at}, {Mount: t.tree, Dir: at + "/target"}}
	bind := func(from, to string, opts ...string) {
		cfg.Spec.Mounts = append(cfg.Spec.Mounts, specs.Mount{Type: "bind", Source: from, Destination: to, Options: append([]string{"rbind", "rprivate"}, opts...)})
	}
	bind(at+"/target", DebugTarget)
	if t.shm != nil {
		cfg.Trees = append(cfg.Trees, runtime.Tree{Mount: t.shm, Dir: at + "/shm"})
		cfg.Spec.Mounts = slices.DeleteFunc(cfg.Spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/shm" })
		bind(at+"/shm", "/dev/shm", "nosuid", "noexec", "nodev")
	}
	for _, m := range t.mounts {
		bind(m.Source, DebugTarget+m.Destination, "ro")
		if sub := t.rec.More[m.Destination].Subpath; sub != "" {
			if cfg.Sources == nil {
				cfg.Sources = map[string]runtime.Source{}
			}
			cfg.Sources[DebugTarget+m.Destination] = runtime.Source{Subpath: sub}
		}
	}
	for file, dst := range map[string]string{"hosts": "/etc/hosts", "hostname": "/etc/hostname", "resolv.conf": "/etc/resolv.conf"} {
		if t.files == "" {
			break
		}
		if _, err := os.Stat(filepath.Join(t.files, file)); err == nil {
			opts := []string{"ro"}
			if t.ownIDs() {
				opts = append(opts, "idmap")
			}
			bind(filepath.Join(t.files, file), dst, opts...)
		}
	}
	if req.Note != nil {
		req.Note(t.what, req.Name)
	}
	code, err = talk(ctx, runtime.New(), cfg, &req.Console)
	var ee *runtime.ExecError
	if errors.As(err, &ee) {
		return ee.ExitCode(), &ExitError{ee.ExitCode(), err}
	}
	if t.rec != nil && err == nil {
		e.event(t.rec, "debug", map[string]string{"exitCode": fmt.Sprint(code), "image": cmp.Or(req.Image, e.cfg.Debug.Image)})
	}
	return code, err
}

// target is what is debugged.
type target struct {
	what string
	rec  *container.Record // nil for an image
	tree *os.File          // its file system, a detached mount
	shm  *os.File
	// mounts are the volumes of a stopped container.
	mounts []apic.MountPoint
	// files is the folder of hosts and so on, "" without.
	files string
	// spaces are the namespaces to join, cgroup is the one to be in.
	spaces []specs.LinuxNamespace
	cgroup string
	// systemd has made it.
	systemd bool
	// uid and gid are the host's for the root of a user namespace among them.
	uid, gid int
	dir      string // the working folder
	env      []string
	back     undo.Stack
}

// ownIDs reports whether the command runs in a user namespace.
func (t *target) ownIDs() bool {
	return slices.ContainsFunc(t.spaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
}

func (e *Engine) debugTarget(ctx context.Context, name string) (_ *target, err error) {
	t := &target{}
	defer func() {
		if err != nil {
			t.back.Run()
		}
	}()
	n, err := e.snapshot(ctx, name)
	if errors.Is(err, ErrNotFound) {
		return t, e.imageTarget(ctx, t, name)
	}
	if err != nil {
		return nil, err
	}
	t.rec = n.Record
	t.dir, t.env = n.Record.Config.WorkingDir, n.Record.Config.Env
	t.files = e.Containers().Dir(n.Record.ID, "files")
	for { // it may end and begin again while we look
		a := n.Alive()
		if a == nil || a.Status == container.Restarting {
			return t, e.stoppedTarget(ctx, t)
		}
		if a.Paused { // the command would stand still with the others, and could not even be killed
			return t, conflict("container %s is paused, unpause the container before debug", n.Record.ID)
		}
		if ok, err := t.running(n.Record.ID, a); ok || err != nil {
			return t, err
		}
		t.back.Run() // what is open of the one that has ended
		t.spaces, t.shm, t.tree, t.uid, t.gid = nil, nil, nil, 0, 0
		if n, err = e.lookAgain(ctx, n.Record.ID); err != nil {
			return nil, err
		}
	}
}

// running joins a running container; false when it has ended.
func (t *target) running(id string, a *container.State) (bool, error) {
	p, err := initOf(id, a)
	if p == nil {
		return false, err
	}
	t.back.Add(func() { p.Close() })
	kinds := map[specs.LinuxNamespaceType]string{
		specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts",
	}
	shared, err := sameNamespace(a.Pid, "user")
	if err != nil {
		if gone(p, err) {
			return false, nil
		}
		return false, err
	}
	if !shared { // the tools run with its ids, as an exec does: its root is the host's nobody
		uids, gids, err := userns.MapsOf(a.Pid)
		if gone(p, err) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		uid, _ := uids.Outside(0) // every one that we make has a root
		gid, _ := gids.Outside(0)
		t.uid, t.gid = int(uid), int(gid)
		kinds[specs.UserNamespace] = "user"
	}
	for kind, name := range kinds {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", a.Pid, name))
		if err != nil {
			if gone(p, err) {
				return false, nil
			}
			return false, fmt.Errorf("join %s namespace: %w", kind, err)
		}
		t.back.Add(func() { f.Close() })
		t.spaces = append(t.spaces, specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/self/fd/%d", f.Fd())})
	}
	slices.SortFunc(t.spaces, func(a, b specs.LinuxNamespace) int { return cmp.Compare(a.Type, b.Type) })
	if t.tree, err = runtime.RootOf(p); err != nil {
		if gone(p, err) {
			return false, nil
		}
		return false, err
	}
	t.back.Add(func() { t.tree.Close() })
	if shm, err := runtime.MountOf(p, "/dev/shm"); err == nil { // the container need not have one
		t.shm = shm
		t.back.Add(func() { shm.Close() })
	}
	if gone(p, nil) { // then the numbers above may have been another's
		return false, nil
	}
	t.what, t.cgroup = "running container", a.Cgroup
	return true, nil
}

// sameNamespace reports whether a process is in our namespace of a kind.
func sameNamespace(pid int, kind string) (bool, error) {
	a, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	if err != nil {
		return false, err
	}
	b, err := os.Readlink("/proc/self/ns/" + kind)
	return a == b, err
}

func (e *Engine) stoppedTarget(ctx context.Context, t *target) error {
	t.what = "stopped container"
	t.mounts = slices.DeleteFunc(slices.Clone(t.rec.Mounts), func(m apic.MountPoint) bool {
		_, err := os.Stat(m.Source)
		return m.Type != "bind" && m.Type != "volume" || err != nil
	})
	slices.SortStableFunc(t.mounts, func(a, b apic.MountPoint) int { // parents before what is mounted in them
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	return e.copyTarget(ctx, t, t.rec.Layers, e.Containers().Dir(t.rec.ID, "upper"))
}

func (e *Engine) imageTarget(ctx context.Context, t *target, name string) error {
	images, err := e.Images()
	if err != nil {
		return err
	}
	img, err := images.Resolve(name)
	if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrReference) {
		return &kindError{ErrNotFound, fmt.Errorf("No such container or image: %s", name)} //nolint:staticcheck // Docker's words
	}
	if err != nil {
		return err
	}
	t.what, t.dir, t.env = "image", img.Config.Config.WorkingDir, img.Config.Config.Env
	return e.copyTarget(ctx, t, img.Layers(), "")
}

// copyTarget shows layers, and a container's changes on them, with another writable layer on top, in memory.
func (e *Engine) copyTarget(ctx context.Context, t *target, ids []ocispec.Digest, upper string) error {
	lease, err := collect.Hold(e.root, ids...)
	if err != nil {
		return err
	}
	t.back.Add(func() { lease.Close() })
	ls, err := e.Layers()
	if err != nil {
		return err
	}
	lower, err := ls.Lower(ctx, ids)
	if err != nil {
		return err
	}
	if upper != "" {
		lower = append([]string{upper}, lower...)
	}
	guest, err := build.NewGuest(e.cfg.State, e.systemdCgroup())
	if err != nil {
		return err
	}
	t.back.Add(guest.Release)
	t.cgroup, t.systemd = guest.Cgroup().String(), e.systemdCgroup()
	if t.tree, err = memoryOverlay(lower, filepath.Join(e.cfg.State, "c")); err != nil {
		return err
	}
	t.back.Add(func() { t.tree.Close() })
	return nil
}

// debugCommand is the command to execute: the one given, or a shell.
func debugCommand(lower []string, req *DebugRequest) ([]string, error) {
	if len(req.Args) > 0 {
		return req.Args, nil
	}
	shell := []string{req.Shell}
	if req.Shell == "" {
		root, err := mount.Overlay(mount.OverlayOptions{Lower: lower})
		if err != nil {
			return nil, err
		}
		defer root.Close()
		shell = nil
		for _, p := range []string{"/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh", "/bin/ash", "/bin/busybox"} {
			if st, err := safepath.Stat(root, p); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Mode&0o111 != 0 {
				shell = []string{p}
				break
			}
		}
		if shell == nil {
			return nil, invalid("the toolbox image has no shell: name one with --shell, or another image with --image")
		}
		if shell[0] == "/bin/busybox" {
			shell = append(shell, "sh")
		}
	}
	if req.Script != "" {
		return append(shell, "-c", req.Script), nil
	}
	return shell, nil
}

// debugConfig is what the runtime gets, but for the file systems.
func (e *Engine) debugConfig(t *target, box ocispec.Image, req *DebugRequest, args []string) (*runtime.Config, error) {
	s := runtime.DefaultSpec()
	hc := &apic.HostConfig{}
	if t.rec != nil {
		hc = t.rec.HostConfig
	}
	s.Linux.CgroupsPath = t.cgroup
	names, err := caps.Resolve(s.Process.Capabilities.Bounding, hc.CapAdd, hc.CapDrop, hc.Privileged)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(names, "CAP_SYS_PTRACE") {
		names = append(names, "CAP_SYS_PTRACE") // what a debugger is for
	}
	if req.Privileged {
		names = caps.All()
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: names, Permitted: names, Effective: names}
	s.Process.Args = args
	s.Process.Env = debugEnv(t, box, req)
	s.Process.Cwd = req.WorkingDir
	if s.Process.Cwd == "" {
		s.Process.Cwd = DebugTarget
		if t.dir != "" && t.spaces != nil {
			if d, err := safepath.OpenNoLinks(t.tree, t.dir, unix.O_PATH|unix.O_DIRECTORY, 0); err == nil {
				d.Close()
				s.Process.Cwd = filepath.Join(DebugTarget, t.dir)
			}
		}
	}
	s.Hostname = "debug"
	if t.rec != nil {
		s.Hostname = t.rec.Config.Hostname
	}
	joined := func(k specs.LinuxNamespaceType) bool {
		return slices.ContainsFunc(t.spaces, func(n specs.LinuxNamespace) bool { return n.Type == k })
	}
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return joined(n.Type) })
	s.Linux.Namespaces = append(s.Linux.Namespaces, t.spaces...)
	if t.spaces != nil {
		s.Hostname, s.Linux.Sysctl = "", nil // the container's own
	}
	return &runtime.Config{
		ID: "debug", Spec: s, User: req.User, DefaultSeccomp: !req.Privileged, SeccompCache: filepath.Join(e.cfg.State, "seccomp"),
		DieWithParent: true, InCgroup: t.spaces != nil, SystemdCgroup: t.systemd,
	}, nil
}

// debugEnv is the container's environment, so that tools find what it finds, with the toolbox's PATH.
func debugEnv(t *target, box ocispec.Image, req *DebugRequest) []string {
	path := "PATH=" + runtime.DefaultPath
	for _, v := range box.Config.Env {
		if strings.HasPrefix(v, "PATH=") {
			path = v
		}
	}
	skip := func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return slices.Contains([]string{"PATH", "HOME", "TERM", "LD_PRELOAD", "LD_LIBRARY_PATH", "SHELL"}, name)
	}
	env := append([]string{path}, slices.DeleteFunc(slices.Clone(t.env), skip)...)
	if req.Console.Terminal {
		env = append(env, "TERM="+cmp.Or(os.Getenv("TERM"), "xterm"))
	}
	for _, v := range req.Env {
		name, _, _ := strings.Cut(v, "=")
		env = append(slices.DeleteFunc(env, func(o string) bool { return strings.HasPrefix(o, name+"=") }), v)
	}
	return env
}

// memoryOverlay makes a detached overlay whose changes go into memory, gone with it. at is an existing folder that no layer lies below.
func memoryOverlay(lower []string, at string) (*os.File, error) {
	mem, err := mount.New("tmpfs", []mount.Param{{Key: "source", Value: "debug"}, {Key: "mode", Value: "700"}}, 0)
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	for _, d := range []string{"upper", "work"} {
		if err := unix.Mkdirat(int(mem.Fd()), d, 0o755); err != nil {
			return nil, fmt.Errorf("make folder: %w", &fs.PathError{Op: "mkdir", Path: d, Err: err})
		}
	}
	return mount.Aside(mem, at, func() (*os.File, error) {
		return mount.Overlay(mount.OverlayOptions{Lower: lower, Upper: at + "/upper", Work: at + "/work", Volatile: true})
	})
}
