package build

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/git"
	"conex/internal/image"
)

// named is what --build-context gives a name: one of the three.
type named struct {
	// tree is a folder, a git repository or a file of a URL.
	tree *tree
	// ref is an image: a reference, or oci-layout://...
	ref string
	// stage is one of the Dockerfile's.
	stage string
}

// contextKey is a context's name as it is compared: an image's in its familiar form, without the tag latest.
func contextKey(name string) (string, error) {
	ref, err := image.ParseReference(name)
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(ref.Familiar(), ":latest"), nil
}

// readContexts reads --build-context. Nothing is fetched.
func (p *planner) readContexts() error {
	p.contexts = map[string]*named{}
	for _, name := range slices.Sorted(maps.Keys(p.req.Contexts)) {
		key, err := contextKey(name)
		if err != nil {
			return fmt.Errorf("invalid context name %s: %w", name, err)
		}
		if p.contexts[key], err = p.readContext(name, p.req.Contexts[name]); err != nil {
			return fmt.Errorf("build context %s: %w", name, err)
		}
		if t := p.contexts[key].tree; t != nil {
			p.trees[key] = t
		}
	}
	return nil
}

func (p *planner) readContext(name, value string) (*named, error) {
	if ref, ok := strings.CutPrefix(value, "docker-image://"); ok {
		if ref != "scratch" {
			if _, err := image.ParseReference(ref); err != nil {
				return nil, err
			}
		}
		return &named{ref: ref}, nil
	}
	if where, ok := strings.CutPrefix(value, layoutScheme); ok {
		if where == "" {
			return nil, errors.New("oci-layout:// needs a folder")
		}
		abs, err := filepath.Abs(where)
		return &named{ref: layoutScheme + abs}, err
	}
	if stage, ok := strings.CutPrefix(value, "target:"); ok {
		return &named{stage: stage}, nil
	}
	title := "[context " + name + "] "
	if isFolder(value) || !IsRemote(value) {
		st, err := os.Stat(value)
		if err != nil {
			return nil, err
		}
		if !st.IsDir() {
			return nil, fmt.Errorf("%s is not a folder", value)
		}
		return &named{tree: &tree{title: title + "load build context", source: func(context.Context) (*view, func() error, error) {
			return p.b.folder(value)
		}}}, nil
	}
	src, isGit, err := git.Parse(value)
	if err != nil {
		return nil, err
	}
	if isGit {
		return &named{tree: &tree{title: title + src.String(), source: func(ctx context.Context) (*view, func() error, error) {
			c := gitClient(p.req)
			commit, err := c.Resolve(ctx, src)
			if err != nil {
				return nil, nil, err
			}
			return p.b.gitView(ctx, c, src, commit)
		}}}, nil
	}
	u, err := parseURL(value)
	if err != nil {
		return nil, err
	}
	return &named{tree: &tree{title: title + shownURL(u), source: func(ctx context.Context) (*view, func() error, error) {
		return p.b.httpFile(ctx, p.req, value)
	}}}, nil
}

// layoutScheme begins the reference of an image in an OCI layout, which Builder.Base takes too.
const layoutScheme = "oci-layout://"

// folder opens a folder as a context, with the ignore file in it.
func (b *Builder) folder(dir string) (_ *view, _ func() error, err error) {
	in := &input{}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.close())
		}
	}()
	if in.view.root, err = openContext(dir); err != nil {
		return nil, nil, err
	}
	real, err := realPath(dir)
	if err != nil {
		return nil, nil, err
	}
	in.view.stats = openStatCache(b.Root, real)
	if err := in.ignoreFrom(".dockerignore"); err != nil {
		return nil, nil, err
	}
	return &in.view, in.close, nil
}

// context finds what --build-context gave a name; nil when it gave nothing.
func (p *planner) context(name string) *named {
	if len(p.contexts) == 0 {
		return nil
	}
	key, err := contextKey(name)
	if err != nil {
		return nil
	}
	return p.contexts[key]
}

// tree finds the files that a name of --from means; "" is the main context. nil when it means a stage or an image.
func (p *planner) tree(name string) *tree {
	if name == "" {
		return p.trees[""]
	}
	if c := p.context(name); c != nil && !isNumber(name) {
		return c.tree
	}
	return nil
}

// replace lets a context stand for a stage of its name, or for the image that the stage begins with.
func (p *planner) replace(s *stage) error {
	c := p.context(s.spec.Name)
	if s.spec.Name == "" || c == nil {
		if s.parent != nil || s.base == "scratch" {
			return nil
		}
		if c = p.context(s.base); c == nil {
			return nil
		}
	} else {
		// What the stage does is left out.
		spec := *s.spec
		spec.Steps = nil
		s.spec, s.base, s.parent = &spec, spec.Name, nil
	}
	switch {
	case c.ref != "":
		s.base = c.ref
	case c.stage != "":
		if s.parent = p.stageNamed(c.stage); s.parent == nil {
			return fmt.Errorf("build context %s: there is no stage %s before this one", s.base, c.stage)
		}
	default:
		s.tree = true
	}
	return nil
}

// imageName is the image that a name of --from means when it means no stage.
func (p *planner) imageName(name string) string {
	if c := p.context(name); c != nil && c.ref != "" {
		return c.ref
	}
	return name
}

// httpFile is what an address gives as a tree of one file called "context", as BuildKit has it for a named context.
func (b *Builder) httpFile(ctx context.Context, req *Request, address string) (*view, func() error, error) {
	u, err := parseURL(address)
	if err != nil {
		return nil, nil, err
	}
	rec, file, _, err := b.fetcher(req).body(ctx, u, "", nil)
	if err != nil {
		return nil, nil, fmt.Errorf("context %w", err)
	}
	defer file.Close()
	tree, err := b.cachedTree(ctx, []string{"file", string(rec.Digest), rec.Modified}, treeInfo{Source: rec.URL, Commit: string(rec.Digest)},
		func(_ context.Context, files, _ string) error {
			out, err := os.OpenFile(filepath.Join(files, "context"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			if _, err := copyBuffered(out, file); err != nil {
				return errors.Join(err, out.Close())
			}
			return errors.Join(out.Close(), os.Chtimes(out.Name(), time.Time{}, rec.when()))
		})
	if err != nil {
		return nil, nil, err
	}
	return b.treeView(tree, "")
}

// planTree makes the files of a context the base of a stage.
func (p *planner) planTree(ctx context.Context, s *stage) error {
	c := &dockerfile.Copy{From: s.base, Sources: []string{"/"}, Dest: "/"}
	title := "FROM " + s.base
	n := &node{step: dockerfile.Step{Instruction: c, Lines: s.spec.Lines, Code: title}, title: title, inputs: []*node{s.tip}, number: 1, config: s.config()}
	if _, err := p.planCopy(ctx, n, s, c); err != nil {
		return err
	}
	n.vertex = p.journal.vertex(s.label, p.number(s)+title)
	p.nodes = append(p.nodes, n)
	s.cfg.noteNode(title, n)
	s.tip = n
	return nil
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
