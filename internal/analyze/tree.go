package analyze

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// Tree is how images share layers: those with the same layers from the base on have the same ancestors.
type Tree struct {
	// Schema is the version of the JSON form.
	Schema int `json:"schema"`
	// Images and Layers count what is in it, a layer once however many images have it.
	Images int `json:"images"`
	Layers int `json:"layers"`
	// Size is the sum of the layers' sizes, each once; Unshared is the sum of the images' sizes.
	Size     int64 `json:"size"`
	Unshared int64 `json:"unsharedSize"`
	// Roots are the bases.
	Roots []*TreeNode `json:"roots"`
}

// TreeNode is a run of layers that the same images have.
type TreeNode struct {
	Layers []TreeLayer `json:"layers"`
	// Size is that of these layers, Total with all below them.
	Size  int64 `json:"size"`
	Total int64 `json:"totalSize"`
	// Images are those that end here.
	Images   []TreeImage `json:"images"`
	Children []*TreeNode `json:"children"`

	digest ocispec.Digest
}

// TreeLayer is a layer in the tree.
type TreeLayer struct {
	Digest      ocispec.Digest `json:"digest"`
	Instruction string         `json:"instruction"`
	CreatedBy   string         `json:"createdBy"`
	Size        int64          `json:"size"`
	// Missing layers are not in the store: a power loss damaged them, or somebody deleted them.
	Missing bool `json:"missing,omitempty"`
	// SharedBy is the number of images that have the layer.
	SharedBy int `json:"sharedBy"`
}

// TreeImage is an image in the tree.
type TreeImage struct {
	ID       ocispec.Digest `json:"id"`
	Tags     []string       `json:"tags"`
	Platform string         `json:"platform"`
}

// Tree puts all images into a tree of layers, or with one given those whose layers are also its, which makes a chain. Runs of layers
// without a branch are one node, but for a chain, where each layer has its own. image.ErrDamaged comes with the tree of all other images.
func (s Store) Tree(ctx context.Context, only *image.Image) (*Tree, error) {
	all, damaged := s.Images.List()
	if damaged != nil && !errors.Is(damaged, image.ErrDamaged) {
		return nil, damaged
	}
	b := &treeBuilder{s: s, root: &TreeNode{}, layers: map[ocispec.Digest]*TreeLayer{}}
	for _, img := range all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := b.count(img); err != nil {
			return nil, err
		}
		if only == nil || isPrefix(img.Layers(), only.Layers()) {
			b.add(img)
		}
	}
	t := b.finish(only == nil)
	return t, damaged
}

// isPrefix reports whether the layers a are the first of those of another image. No layers are nobody's but the like's.
func isPrefix(a, of []ocispec.Digest) bool {
	return len(a) <= len(of) && slices.Equal(a, of[:len(a)]) && (len(a) > 0 || len(of) == 0)
}

type treeBuilder struct {
	s      Store
	root   *TreeNode
	layers map[ocispec.Digest]*TreeLayer
	t      Tree
}

// count learns of an image's layers.
func (b *treeBuilder) count(img image.Image) error {
	steps := Steps(img.Config)
	seen := map[ocispec.Digest]bool{}
	for i, d := range img.Layers() {
		l := b.layers[d]
		if l == nil {
			l = &TreeLayer{Digest: d}
			info, err := b.s.Layers.Stat(d)
			if err != nil && !errors.Is(err, layers.ErrNotFound) {
				return fmt.Errorf("image %s: %w", img.ID, err)
			}
			l.Size, l.Missing = info.ContentSize, err != nil
			b.layers[d] = l
		}
		if l.CreatedBy == "" {
			l.CreatedBy, l.Instruction = steps[i].CreatedBy, Instruction(steps[i].CreatedBy)
			if l.Instruction == "" {
				l.Instruction = Line(steps[i].Comment)
			}
		}
		if !seen[d] {
			l.SharedBy++
			seen[d] = true
		}
	}
	return nil
}

// add puts an image at the end of its layers.
func (b *treeBuilder) add(img image.Image) {
	n := b.root
	for _, d := range img.Layers() {
		i := slices.IndexFunc(n.Children, func(c *TreeNode) bool { return c.digest == d })
		if i < 0 {
			i = len(n.Children)
			n.Children = append(n.Children, &TreeNode{digest: d})
		}
		n = n.Children[i]
		b.t.Unshared += b.layers[d].Size
	}
	tags := img.RepoTags
	if tags == nil {
		tags = []string{}
	}
	n.Images = append(n.Images, TreeImage{img.ID, tags, registry.FormatPlatform(img.Config.Platform)})
	b.t.Images++
}

// finish sums up and, with join, makes runs of layers one node.
func (b *treeBuilder) finish(join bool) *Tree {
	used := map[ocispec.Digest]bool{}
	take := func(n *TreeNode, d ocispec.Digest) {
		l := *b.layers[d]
		if !used[d] {
			used[d] = true
			b.t.Layers++
			b.t.Size += l.Size
		}
		n.Layers = append(n.Layers, l)
		n.Size += l.Size
	}
	var settle func(n *TreeNode, below int64)
	settle = func(n *TreeNode, below int64) {
		if n.digest != "" {
			take(n, n.digest)
		}
		for join && n.digest != "" && len(n.Children) == 1 && len(n.Images) == 0 {
			c := n.Children[0]
			take(n, c.digest)
			n.Images, n.Children = c.Images, c.Children
		}
		n.Total = below + n.Size
		for _, c := range n.Children {
			settle(c, n.Total)
		}
		slices.SortFunc(n.Images, func(a, b TreeImage) int { return cmp.Or(slices.Compare(a.Tags, b.Tags), cmp.Compare(a.ID, b.ID)) })
		slices.SortFunc(n.Children, func(a, b *TreeNode) int { return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.digest, b.digest)) })
		if n.Images == nil {
			n.Images = []TreeImage{}
		}
		if n.Children == nil {
			n.Children = []*TreeNode{}
		}
	}
	settle(b.root, 0)
	b.t.Schema, b.t.Roots = ReportSchema, b.root.Children
	if len(b.root.Images) > 0 { // images FROM scratch without a layer
		b.t.Roots = append(b.t.Roots, &TreeNode{Layers: []TreeLayer{}, Images: b.root.Images, Children: []*TreeNode{}})
	}
	return &b.t
}
