package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/linux/mount"
	"conex/internal/network"
	"conex/internal/ocispec"
	"conex/internal/resolver"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/undo"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runOp is what RUN says; with the layers below it is all that its result may depend on.
type runOp struct {
	Args    []string  `json:"args,omitempty"`
	Script  string    `json:"script,omitempty"`
	Env     []string  `json:"env,omitempty"`
	Dir     string    `json:"dir"`
	User    string    `json:"user,omitempty"`
	Network string    `json:"network,omitempty"`
	Mounts  []mountOp `json:"mounts,omitempty"`
}

// mountOp is one --mount.
type mountOp struct {
	Type     string `json:"type"`
	Source   string `json:"source,omitempty"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
	Size     int64  `json:"size,omitempty"`
	ID       string `json:"id,omitempty"`
	Sharing  string `json:"sharing,omitempty"`
	Mode     uint32 `json:"mode,omitempty"`
	UID      int    `json:"uid,omitempty"`
	GID      int    `json:"gid,omitempty"`
	// Input is the number of the node's input that a bind mount shows.
	Input int `json:"input,omitempty"`
}

// hostname is what RUN steps see; the same in all, so that it can't make results differ.
const hostname = "build"

// planRun makes the node of a RUN and returns its history entry.
func (p *planner) planRun(ctx context.Context, n *node, s *stage, r *dockerfile.Run) (string, error) {
	if r.Network == "host" {
		return "", fmt.Errorf("RUN --network=host is %w", ErrUnsupported)
	}
	if r.Security != "sandbox" {
		return "", fmt.Errorf("RUN --security=%s is %w", r.Security, ErrUnsupported)
	}
	if r.Devices {
		return "", fmt.Errorf("RUN --device is %w", ErrUnsupported)
	}
	op := runOp{Script: r.Script, Dir: s.cfg.workdir(), User: s.cfg.image.Config.User}
	if r.Network != "default" {
		op.Network = r.Network
	}
	scriptName := path.Base("/" + r.ScriptName)
	switch {
	case r.Script != "":
		op.Args = []string{"/dev/pipes/" + scriptName}
	default:
		op.Args = s.cfg.withShell(r.CommandLine)
	}
	if len(op.Args) == 0 {
		return "", errors.New("RUN needs a command")
	}
	var shown []string
	for _, a := range s.args {
		v, ok := s.vars.Get(a.Key)
		if !ok && a.Value != nil {
			v = *a.Value
		}
		shown = append(shown, a.Key+"="+v) // of one without a value too, as in Docker
	}
	op.Env = s.env()
	proxies := slices.DeleteFunc(slices.Clone(p.proxies), func(e string) bool {
		k, _, _ := strings.Cut(e, "=")
		_, declared := s.vars.Get(k)
		return declared
	})
	for _, m := range r.Mounts {
		if err := p.planMount(ctx, n, s, &op, m); err != nil {
			return "", fmt.Errorf("RUN --mount=type=%s: %w", m.Type, err)
		}
	}
	n.kind, n.op = kindRun, op
	n.run = func(ctx context.Context, n *node, in []result) (made, error) {
		x := &execution{b: p.b, op: op, in: in, vertex: n.vertex, script: scriptName, proxies: proxies, gates: p.gates}
		layer, err := x.run(ctx)
		return made{layer, time.Now(), x.waited}, err
	}
	created := "RUN "
	if len(shown) > 0 {
		created += fmt.Sprintf("|%d %s ", len(shown), strings.Join(shown, " "))
	}
	return created + strings.Join(op.Args, " "), nil
}

// planMount adds a --mount to a RUN. Secrets and agents that nobody gave are left out unless they are required, as in Docker.
func (p *planner) planMount(ctx context.Context, n *node, s *stage, op *runOp, m dockerfile.Mount) error {
	o := mountOp{Type: m.Type, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
	if m.Type != "secret" && m.Type != "ssh" {
		if o.Target == "" {
			return errors.New("target is required")
		}
		if !path.IsAbs(o.Target) {
			o.Target = path.Join(s.cfg.workdir(), o.Target)
		}
		if path.Clean(o.Target) == "/" {
			return errors.New("target can't be /")
		}
	}
	switch m.Type {
	case "tmpfs":
		o.Size, o.Source = m.Size, ""
	case "cache":
		if m.From != "" {
			return fmt.Errorf("from is %w", ErrUnsupported)
		}
		if o.ID, o.Sharing = m.ID, m.Sharing; o.ID == "" {
			o.ID = path.Clean(o.Target)
		}
		o.Mode = 0o755
		if m.Mode != nil {
			o.Mode = uint32(*m.Mode & 0o7777)
		}
		if m.UID != nil {
			o.UID = int(*m.UID)
		}
		if m.GID != nil {
			o.GID = int(*m.GID)
		}
	case "bind":
		var from *node
		var err error
		if m.From == "" {
			from, err = p.contextLayer(ctx, n, s, m.Source)
		} else {
			from, err = p.from(ctx, s, m.From, n.step.Lines)
		}
		if err != nil {
			return err
		}
		n.inputs = append(n.inputs, from)
		o.Input = len(n.inputs) - 1
	default: // secret, ssh
		if m.Required {
			return fmt.Errorf("it is required, and giving one to a build is %w", ErrUnsupported)
		}
		return nil
	}
	op.Mounts = append(op.Mounts, o)
	return nil
}

// contextLayer is a node that holds a part of the context as a layer of its own, for a bind mount: what .dockerignore excludes
// must not show there.
func (p *planner) contextLayer(ctx context.Context, n *node, s *stage, source string) (*node, error) {
	c := &dockerfile.Copy{Sources: []string{source}, Dest: "/", Parents: true}
	if path.Clean("/"+source) == "/" {
		c.Sources, c.Parents = []string{"/"}, false
	}
	empty := &node{kind: kindScratch, op: "", fixed: &scratchResult}
	l := &node{step: n.step, title: "context for " + n.title, inputs: []*node{empty}}
	if _, err := p.planCopy(ctx, l, s, c); err != nil {
		return nil, err
	}
	l.vertex = p.journal.vertex("", "[internal] context for "+firstLine(n.title))
	p.nodes = append(p.nodes, l)
	return l, nil
}

// execution is one RUN on its way.
type execution struct {
	b       *Builder
	op      runOp
	in      []result
	vertex  *vertex
	gates   *gates
	script  string
	proxies []string
	lower   []string
	dir     string
	owner   *running
	waited  time.Duration // for others, before the command began
}

// run executes the command over the layers and turns what it changed into a new one.
func (x *execution) run(ctx context.Context) (_ ocispec.Digest, err error) {
	var undone undo.Stack
	defer undone.Run()
	id := disk.RandomID()
	owner, err := own(x.b.State, id)
	if err != nil {
		return "", err
	}
	x.owner = owner
	undone.Add(owner.release)
	st, err := x.b.Root.Stage()
	if err != nil {
		return "", err
	}
	closeStage := func() error { return st.Close() }
	undone.Add(func() { err = errors.Join(err, closeStage()) })
	x.dir = st.Dir
	for _, d := range []string{"upper", "work", "root", "empty", "files"} {
		if err := os.Mkdir(filepath.Join(st.Dir, d), 0o755); err != nil {
			return "", err
		}
	}
	x.lower = []string{filepath.Join(st.Dir, "empty")}
	if len(x.in[0].layers) > 0 {
		if x.lower, err = x.b.Layers.Lower(ctx, x.in[0].layers); err != nil {
			return "", err
		}
	}
	var held undo.Stack // until the command has ended
	defer held.Run()
	begun := time.Now()
	if err := x.lockCaches(ctx, &held); err != nil {
		return "", err
	}
	leave, err := x.gates.runs.enter(ctx)
	if err != nil {
		return "", err
	}
	held.Add(leave)
	x.waited = time.Since(begun)
	undone.Add(func() { err = errors.Join(err, owner.detach()) })
	spec, err := x.spec(ctx, id)
	if err != nil {
		return "", err
	}
	out, err := newOutput(x.vertex)
	if err != nil {
		return "", err
	}
	undone.Add(out.abort)
	cfg := &runtime.Config{
		ID: id, Spec: spec, User: x.op.User,
		RootFS:  runtime.RootFS{Lower: x.lower, Upper: filepath.Join(st.Dir, "upper"), Work: filepath.Join(st.Dir, "work"), Volatile: true},
		Stdio:   [3]*os.File{nil, out.stdout, out.stderr},
		Scratch: filepath.Join(st.Dir, "root"), SeccompCache: filepath.Join(x.b.State, "seccomp"), DefaultSeccomp: true,
	}
	c, err := x.b.Runtime.Create(ctx, cfg)
	if err != nil {
		return "", err
	}
	// Only once nobody is left in there may address and cgroup go to others.
	gone := func() error {
		err := c.Delete()
		if x.b.Networks != nil {
			err = errors.Join(err, x.b.Networks.Detach(context.WithoutCancel(ctx), id))
		}
		return err
	}
	undone.Add(func() { err = errors.Join(err, gone()) })
	if err := x.connect(ctx, id, c); err != nil {
		return "", err
	}
	code, err := x.wait(ctx, c, out)
	if err != nil {
		return "", err
	}
	if code != 0 {
		return "", &exitError{strings.Join(x.op.Args, " "), code, out.tail()}
	}
	held.Run()
	if leave, err = x.gates.work.enter(ctx); err != nil {
		return "", err
	}
	defer leave()
	// The process is dead, so nobody writes to upper any more: the layer is made while the kernel takes the rest down.
	info, err := x.b.Layers.WriteUpper(ctx, filepath.Join(st.Dir, "upper"), x.exclude(spec))
	if err != nil {
		return "", err
	}
	undone.Forget()
	x.b.background(func() error {
		defer owner.release()
		out.abort()
		return errors.Join(gone(), closeStage())
	})
	if info.Entries == 0 {
		return "", nil
	}
	return info.DiffID, nil
}

// connect gives the container its network, while its file system is being mounted.
func (x *execution) connect(ctx context.Context, id string, c runtime.Container) error {
	ns := c.NetNS()
	if x.b.Networks == nil || ns == nil {
		return nil
	}
	if x.op.Network == "none" {
		return x.b.Networks.Loopback(ns)
	}
	_, err := x.b.Networks.Attach(ctx, network.AttachRequest{ContainerID: id, Name: "build", NetNS: ns, Hostname: hostname})
	return err
}

// wait starts the command and waits for its end; a cancelled ctx kills it.
func (x *execution) wait(ctx context.Context, c runtime.Container, out *output) (int, error) {
	proc, err := c.Start(ctx)
	if err != nil {
		var ee *runtime.ExecError
		if errors.As(err, &ee) {
			return 0, &exitError{strings.Join(x.op.Args, " "), ee.ExitCode(), ee.Error()}
		}
		return 0, err
	}
	out.started()
	ended, quiet := make(chan struct{}), make(chan struct{})
	go func() { // ends with the process, which is waited for below
		defer close(quiet)
		select {
		case <-ctx.Done():
			if err := proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
				x.vertex.output("kill: "+err.Error()+"\n", true)
			}
		case <-ended:
		}
	}()
	derr := x.owner.detach()
	status, err := proc.Wait()
	close(ended)
	<-quiet
	if err == nil {
		err = derr
	}
	if err != nil {
		return 0, err
	}
	out.wait()
	return status.Code, ctx.Err()
}

// spec is what the runtime gets: Docker's defaults and what the step asks for.
func (x *execution) spec(ctx context.Context, id string) (*specs.Spec, error) {
	s := runtime.DefaultSpec()
	s.Hostname = hostname
	s.Linux.CgroupsPath = "/conex/build-" + id
	s.Process.Args, s.Process.Cwd = x.op.Args, x.op.Dir
	s.Process.Env = append(slices.Clone(x.op.Env), x.proxies...)
	conf, err := resolver.Config(resolver.HostFile, x.b.DNS, x.b.DNSSearch, nil)
	if err != nil && !errors.Is(err, resolver.ErrNoNameserver) {
		return nil, err
	}
	files := filepath.Join(x.dir, "files")
	for _, f := range []struct {
		name string
		data []byte
	}{{"resolv.conf", conf}, {"hosts", resolver.Hosts(hostname, netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil)}} {
		p := filepath.Join(files, f.name)
		if err := os.WriteFile(p, f.data, 0o644); err != nil {
			return nil, err
		}
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: p, Destination: "/etc/" + f.name, Options: []string{"bind", "ro"}})
	}
	if x.op.Script != "" {
		dir := filepath.Join(files, "pipes")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, x.script), []byte(x.op.Script), 0o755); err != nil {
			return nil, err
		}
		s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: dir, Destination: "/dev/pipes", Options: []string{"bind", "ro"}})
	}
	for _, m := range x.op.Mounts {
		sm, err := x.mount(ctx, m)
		if err != nil {
			return nil, fmt.Errorf("--mount=type=%s,target=%s: %w", m.Type, m.Target, err)
		}
		s.Mounts = append(s.Mounts, sm)
	}
	return s, nil
}

// mount prepares one --mount.
func (x *execution) mount(ctx context.Context, m mountOp) (specs.Mount, error) {
	out := specs.Mount{Destination: m.Target}
	switch m.Type {
	case "tmpfs":
		out.Type, out.Source, out.Options = "tmpfs", "tmpfs", []string{"nosuid", "nodev", "mode=1777"}
		if m.Size > 0 {
			out.Options = append(out.Options, fmt.Sprintf("size=%d", m.Size))
		}
		return out, nil
	case "cache":
		dir, err := x.cacheDir(m)
		out.Type, out.Source, out.Options = "bind", dir, []string{"bind"}
		if m.ReadOnly {
			out.Options = append(out.Options, "ro")
		}
		return out, err
	}
	root, err := x.tree(ctx, m)
	if err != nil {
		return out, err
	}
	if root == nil {
		return out, fmt.Errorf("%q: %w", m.Source, ErrNotFound)
	}
	defer root.Close()
	dir, err := x.owner.attach(root)
	if err != nil {
		return out, err
	}
	f, err := safepath.Open(root, m.Source, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return out, fmt.Errorf("%q: %w", path.Join("/", m.Source), ErrNotFound)
	}
	if err != nil {
		return out, err
	}
	defer f.Close()
	v := view{root: root}
	real, err := v.realPath(f) // without links, so that the path can't mean anything else when it is mounted
	if err != nil {
		return out, err
	}
	out.Type, out.Source, out.Options = "bind", filepath.Join(dir, real), []string{"bind"}
	if m.ReadOnly {
		out.Options = append(out.Options, "ro")
	}
	return out, nil
}

// tree is what a bind mount shows: read-only, or with a layer on top that goes with the step, so that the step may write there and
// nothing stays. nil when there is nothing.
func (x *execution) tree(ctx context.Context, m mountOp) (*os.File, error) {
	ids := x.in[m.Input].layers
	if m.ReadOnly || len(ids) == 0 {
		return openStage(ctx, x.b.Layers, ids)
	}
	lower, err := x.b.Layers.Lower(ctx, ids)
	if err != nil {
		return nil, err
	}
	top, err := os.MkdirTemp(x.dir, "bind-")
	if err != nil {
		return nil, err
	}
	upper, work := filepath.Join(top, "upper"), filepath.Join(top, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	return mount.Overlay(mount.OverlayOptions{Lower: lower, Upper: upper, Work: work, Volatile: true})
}

// cachePath is where a cache mount lies.
func (x *execution) cachePath(m mountOp) string {
	sum := sha256.Sum256([]byte(m.ID))
	return x.b.Root.Path("buildcache", "mount", hex.EncodeToString(sum[:16]))
}

// lockCaches takes the locks of all cache mounts, each once and in one order, so that no two steps wait for each other.
func (x *execution) lockCaches(ctx context.Context, held *undo.Stack) error {
	alone := map[string]bool{} // by path
	for _, m := range x.op.Mounts {
		if m.Type == "cache" {
			// A private one would get a folder of its own while another step has this; it waits instead, which no result depends on.
			p := x.cachePath(m)
			alone[p] = alone[p] || m.Sharing == "locked" || m.Sharing == "private"
		}
	}
	if len(alone) == 0 {
		return nil
	}
	if err := os.MkdirAll(x.b.Root.Path("buildcache", "mount"), 0o700); err != nil {
		return err
	}
	now := time.Now() // of the last use: Entries tells what is old by it
	for _, p := range slices.Sorted(maps.Keys(alone)) {
		l, err := x.lockCache(ctx, p+".lock", alone[p])
		if err != nil {
			return err
		}
		held.Add(l.Release)
		if err := os.Chtimes(p+".lock", now, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (x *execution) lockCache(ctx context.Context, path string, alone bool) (*disk.Lock, error) {
	try, wait := disk.TryAcquireShared, disk.AcquireSharedContext
	if alone {
		try, wait = disk.TryAcquire, disk.AcquireContext
	}
	l, err := try(path)
	if !errors.Is(err, disk.ErrLocked) {
		return l, err
	}
	x.vertex.output("waiting for a cache mount that another step has\n", true)
	return wait(ctx, path)
}

// cacheDir is the folder of a cache mount. It outlives the build and is not part of any layer.
func (x *execution) cacheDir(m mountOp) (string, error) {
	dir := x.cachePath(m)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return dir, nil
	}
	if err == nil {
		err = os.Chown(dir, m.UID, m.GID)
	}
	if err == nil {
		err = os.Chmod(dir, os.FileMode(m.Mode&0o777)|fileModeBits(m.Mode))
	}
	return dir, err
}

func fileModeBits(m uint32) os.FileMode {
	var out os.FileMode
	for bit, mode := range map[uint32]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if m&bit != 0 {
			out |= mode
		}
	}
	return out
}

// exclude leaves out of the layer what the runtime made as mount points: nothing else can be at these paths, since a mount lay over
// them while the command ran. A folder that holds nothing but such, and is otherwise as it was below, is left out too.
func (x *execution) exclude(s *specs.Spec) func(string) bool {
	points := map[string]bool{}
	parents := map[string]bool{}
	for _, m := range s.Mounts {
		p := strings.TrimPrefix(path.Clean(m.Destination), "/")
		points[p] = true
		if d := path.Dir(p); d != "." {
			parents[d] = true
		}
	}
	upper := filepath.Join(x.dir, "upper")
	for d := range parents {
		if x.untouched(upper, d, points) {
			points[d] = true
		}
	}
	return func(p string) bool { return points[p] }
}

// untouched reports whether the upper folder d is there only because mount points were made in it.
func (x *execution) untouched(upper, d string, points map[string]bool) bool {
	entries, err := os.ReadDir(filepath.Join(upper, d))
	if err != nil {
		return false
	}
	for _, e := range entries {
		if !points[join(d, e.Name())] {
			return false
		}
	}
	var up unix.Stat_t
	if err := unix.Lstat(filepath.Join(upper, d), &up); err != nil || up.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false
	}
	for _, l := range x.lower {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(l, d), &st); err == nil {
			return st.Mode == up.Mode && st.Uid == up.Uid && st.Gid == up.Gid
		}
	}
	return up.Mode&0o7777 == 0o755 && up.Uid == 0 && up.Gid == 0
}
