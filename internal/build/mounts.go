package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/dockerfile"
	"conex/internal/linux/mount"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/undo"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

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
	// Owned says that a cache mount was given a mode, user or group: then it is another cache than one without.
	Owned bool `json:"owned,omitempty"`
	// Env is the variable that a secret goes into, Required that the step fails without the secret or agent.
	Env      string `json:"env,omitempty"`
	Required bool   `json:"required,omitempty"`
	// Input is the number of the node's input that a bind mount shows, or that a cache begins with.
	Input int `json:"input,omitempty"`
}

// planMount adds a --mount to a RUN.
func (p *planner) planMount(ctx context.Context, n *node, s *stage, op *runOp, m dockerfile.Mount) error {
	o := mountOp{Type: m.Type, Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
	var err error
	switch m.Type {
	case "tmpfs":
		o.Size, o.Source = m.Size, ""
	case "cache":
		if o.Sharing, o.ID = m.Sharing, cmp.Or(m.ID, path.Clean(o.Target)); m.From == "" && path.Clean("/"+m.Source) != "/" {
			return fmt.Errorf("source=%s: a cache has no files of its own, say where they come from with from=", m.Source)
		}
		if ns := given(p.req.BuildArgs["BUILDKIT_CACHE_MOUNT_NS"]); ns != "" {
			o.ID = ns + "/" + o.ID
		}
		o.Owned = m.Mode != nil || m.UID != nil || m.GID != nil
		o.own(m, 0o755)
		if m.From != "" && m.From != "scratch" {
			err = p.mountFrom(ctx, n, s, &o, m)
		}
	case "bind":
		err = p.mountFrom(ctx, n, s, &o, m)
	case "secret":
		o.own(m, 0o400)
		if o.ID, o.Source = cmp.Or(m.Source, m.ID, path.Base(o.Target)), ""; m.Env != nil {
			if o.Env = *m.Env; o.Env == "" || strings.ContainsAny(o.Env, "=\x00") {
				return fmt.Errorf("env=%s is no name of a variable", o.Env)
			}
		} else if o.Target == "" {
			o.Target = "/run/secrets/" + path.Base(o.ID)
		}
	case "ssh":
		if m.Source != "" {
			return errors.New("ssh does not support source")
		}
		o.own(m, 0o600)
		o.ID = cmp.Or(m.ID, "default")
		if o.Target == "" {
			before := slices.DeleteFunc(slices.Clone(op.Mounts), func(b mountOp) bool { return b.Type != "ssh" })
			o.Target = fmt.Sprintf("/run/buildkit/ssh_agent.%d", len(before))
		}
	}
	if err != nil {
		return err
	}
	o.Required = m.Required
	if !path.IsAbs(o.Target) && (o.Target != "" || o.Env == "") { // none is the working folder
		o.Target = path.Join(s.cfg.workdir(), o.Target)
	}
	if path.Clean(o.Target) == "/" {
		return errors.New("target can't be /")
	}
	op.Mounts = append(op.Mounts, o)
	return nil
}

func (o *mountOp) own(m dockerfile.Mount, mode uint32) {
	o.Mode = mode
	if m.Mode != nil {
		o.Mode = uint32(*m.Mode & 0o7777)
	}
	if m.UID != nil {
		o.UID = int(*m.UID)
	}
	if m.GID != nil {
		o.GID = int(*m.GID)
	}
}

// mountFrom makes what a mount shows an input of the step.
func (p *planner) mountFrom(ctx context.Context, n *node, s *stage, o *mountOp, m dockerfile.Mount) error {
	var from *node
	var err error
	switch {
	case p.tree(m.From) != nil:
		from, err = p.contextLayer(ctx, n, s, m.From, m.Source)
	case m.From == "scratch":
		from = &node{kind: kindScratch, op: "", fixed: &scratchResult}
	default:
		from, err = p.from(ctx, s, m.From, n.step.Lines)
	}
	if err != nil {
		return err
	}
	n.inputs = append(n.inputs, from)
	o.Input = len(n.inputs) - 1
	return nil
}

// contextLayer is a node that holds a part of a context as a layer of its own, for a mount: what .dockerignore excludes must not show
// there.
func (p *planner) contextLayer(ctx context.Context, n *node, s *stage, name, source string) (*node, error) {
	c := &dockerfile.Copy{From: name, Sources: []string{source}, Dest: "/", Parents: true, Follow: true}
	if path.Clean("/"+source) == "/" {
		c.Sources, c.Parents = []string{"/"}, false
	}
	empty := &node{kind: kindScratch, op: "", fixed: &scratchResult}
	l := &node{step: n.step, title: "context for " + n.title, inputs: []*node{empty}}
	if _, err := p.planCopy(ctx, l, s, c); err != nil {
		return nil, err
	}
	title := "context"
	if name != "" {
		title += " " + name
	}
	l.vertex = p.journal.vertex("", "[internal] "+title+" for "+firstLine(n.title))
	p.nodes = append(p.nodes, l)
	return l, nil
}

// mounts are the mounts of one container of a step while it is made ready: what they show, and what goes when the container has ended.
type mounts struct {
	x     *execution
	held  *undo.Stack
	specs []specs.Mount
	env   []string
	trees []runtime.Tree

	caches  map[string]string // the folder of each cache, by name
	private *private
}

// prepare makes all of a step's mounts.
func (m *mounts) prepare(ctx context.Context) error {
	for i, op := range m.x.op.Mounts {
		if err := m.add(ctx, i, op); err != nil {
			if op.Type == "secret" || op.Type == "ssh" {
				return err // it says which
			}
			return fmt.Errorf("--mount=type=%s,target=%s: %w", op.Type, op.Target, err)
		}
	}
	return nil
}

func (m *mounts) add(ctx context.Context, i int, op mountOp) error {
	out := specs.Mount{Destination: op.Target, Type: "bind", Options: []string{"bind"}}
	var err error
	switch op.Type {
	case "tmpfs":
		out.Type, out.Source, out.Options = "tmpfs", "tmpfs", []string{"nosuid", "nodev", "mode=1777"}
		if op.Size > 0 {
			out.Options = append(out.Options, fmt.Sprintf("size=%d", op.Size))
		}
	case "cache":
		out.Source, err = m.x.cacheDir(ctx, m.caches[m.x.cacheName(op)], op)
	case "secret":
		return m.secret(i, op)
	case "ssh":
		return m.agent(i, op)
	default:
		out.Source, err = m.bind(ctx, op)
	}
	if err != nil {
		return err
	}
	if op.ReadOnly {
		out.Options = append(out.Options, "ro")
	}
	m.specs = append(m.specs, out)
	return nil
}

// show makes a detached mount visible to the container's mounts and returns where.
func (m *mounts) show(tree *os.File) (dir string, err error) {
	m.held.Add(func() { tree.Close() })
	dir = filepath.Join(m.x.dir, fmt.Sprintf("tree.%d", len(m.trees)))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	m.trees = append(m.trees, runtime.Tree{Mount: tree, Dir: dir})
	return dir, nil
}

// bind gives the path of what a bind mount shows.
func (m *mounts) bind(ctx context.Context, op mountOp) (string, error) {
	root, err := m.x.tree(ctx, op)
	if err != nil {
		return "", err
	}
	if root == nil && path.Clean("/"+op.Source) == "/" {
		return os.MkdirTemp(m.x.dir, "nothing-")
	}
	if root == nil {
		return "", fmt.Errorf("%q: %w", op.Source, ErrNotFound)
	}
	dir, err := m.show(root)
	if err != nil {
		return "", err
	}
	f, err := openIn(root, op.Source)
	if err != nil {
		return "", err
	}
	defer f.Close()
	v := view{root: root}
	real, err := v.realPath(f) // without links, so that the path can't mean anything else when it is mounted
	return filepath.Join(dir, real), err
}

// openIn opens what a mount's source names.
func openIn(root *os.File, source string) (*os.File, error) {
	f, err := safepath.Open(root, source, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%q: %w", path.Join("/", source), ErrNotFound)
	}
	return f, err
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

// findPoints notes where the container's mounts lie, the image's links resolved. Those of every container are on no links: the runtime
// refuses that.
func (x *execution) findPoints(list []specs.Mount) error {
	lower, err := mount.Overlay(mount.OverlayOptions{Lower: x.lower})
	if err != nil {
		return err
	}
	defer lower.Close()
	t := &target{lower: lower}
	for _, m := range list {
		p := strings.TrimPrefix(path.Clean(m.Destination), "/")
		if first, _, _ := strings.Cut(p, "/"); first != "proc" && first != "sys" && first != "dev" {
			if p, err = t.resolve(p, true); err != nil {
				return fmt.Errorf("mount %s: %w", m.Destination, err)
			}
		}
		x.points[p] = true
	}
	return nil
}

// exclude leaves out of the layer what the runtime made as mount points: nothing else can be at these paths, since a mount lay over
// them while the command ran. A folder that holds nothing but such, and is otherwise as it was below, is left out too.
func (x *execution) exclude() func(string) bool {
	var parents []string
	for p := range x.points {
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			parents = append(parents, d)
		}
	}
	slices.SortFunc(parents, func(a, b string) int { // what is inside comes first
		return cmp.Or(cmp.Compare(strings.Count(b, "/"), strings.Count(a, "/")), cmp.Compare(a, b))
	})
	for _, d := range slices.Compact(parents) {
		if x.untouched(d) {
			x.points[d] = true
		}
	}
	return func(p string) bool { return x.points[p] }
}

// untouched reports whether the upper folder d is there only because mount points were made in it.
func (x *execution) untouched(d string) bool {
	entries, err := os.ReadDir(filepath.Join(x.upper, d))
	if err != nil {
		return false
	}
	for _, e := range entries {
		if !x.points[join(d, e.Name())] {
			return false
		}
	}
	var up unix.Stat_t
	if err := unix.Lstat(filepath.Join(x.upper, d), &up); err != nil || up.Mode&unix.S_IFMT != unix.S_IFDIR {
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
