package analyze

import (
	"cmp"
	"slices"
	"strings"

	"conex/internal/layertar"
)

// merger puts layer upon layer, as overlayfs does.
type merger struct {
	img    *Image
	layer  int // the one that is being put on
	states int
	hard   map[*layertar.Inode]*content
	waste  map[*Node]*Waste
}

func newMerger(img *Image) *merger {
	img.root = &Node{}
	return &merger{img: img, waste: map[*Node]*Waste{}}
}

// add puts the next layer on. Afterwards nothing refers to the tree.
func (m *merger) add(l Layer, t *layertar.Tree) error {
	m.layer, m.hard = len(m.img.Layers), map[*layertar.Inode]*content{}
	l.Size, l.Entries = t.ContentSize(), t.Entries()
	m.img.Layers = append(m.img.Layers, l)
	m.img.Size += l.Size
	m.put(m.img.root, t.Root(), false)
	if m.states > MaxStates {
		return errTooMany
	}
	return nil
}

// done sorts what was found.
func (m *merger) done() {
	for n, w := range m.waste {
		w.Path, w.Deleted = n.Path(), n.At(m.layer) == nil
		m.img.Waste = append(m.img.Waste, *w)
	}
	slices.SortFunc(m.img.Waste, func(a, b Waste) int { return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.Path, b.Path)) })
}

func (m *merger) current() *Layer { return &m.img.Layers[m.layer] }

// put applies what the layer says of a path. alone says that a folder above hides what the layers below have in it.
func (m *merger) put(n *Node, in *layertar.Inode, alone bool) {
	before := n.At(m.layer - 1)
	if in.IsWhiteout() {
		m.remove(n)
		return
	}
	if !in.IsDir() {
		if before != nil {
			m.removeChildren(n, nil)
			m.release(before)
		}
		s := m.push(n, in)
		if s.IsRegular() {
			s.content = m.contentOf(n, in)
		}
		return
	}
	wasDir := before != nil && before.IsDir()
	if before != nil && !wasDir {
		m.release(before)
	}
	if !wasDir || (!in.Implied || alone) && !sameFolder(before, in) {
		m.push(n, in)
	}
	alone = alone || in.Opaque
	if wasDir && alone {
		m.removeChildren(n, in)
	}
	for i, c := range n.grow(in.Names()) {
		m.put(c, in.Child(in.Names()[i]), alone)
	}
}

// push records what the layer has at a path, and counts it.
func (m *merger) push(n *Node, in *layertar.Inode) *State {
	s := State{Layer: m.layer, Mode: in.Mode, UID: in.UID, GID: in.GID, Size: in.Size, ModTime: in.Sec*1e9 + int64(in.Nsec),
		Major: in.Major, Minor: in.Minor, Target: in.Target, Xattrs: in.Xattrs}
	n.states = append(n.states, s)
	m.states++
	if n.parent != nil {
		switch n.Change(m.layer) {
		case Added:
			m.current().Added++
		case Changed:
			m.current().Changed++
		}
	}
	return &n.states[len(n.states)-1]
}

func (m *merger) contentOf(n *Node, in *layertar.Inode) *content {
	c := m.hard[in]
	if c == nil {
		c = &content{layer: m.layer, offset: in.Offset, size: in.Size, first: n}
		if in.Nlink > 1 {
			m.hard[in] = c
		}
	}
	c.names++
	c.links++
	return c
}

// remove takes a path and all in it away, if the layers below have it.
func (m *merger) remove(n *Node) {
	s := n.At(m.layer - 1)
	if s == nil {
		return
	}
	m.removeChildren(n, nil)
	m.release(s)
	n.states = append(n.states, State{Layer: m.layer, Gone: true})
	m.states++
	m.current().Removed++
}

// removeChildren takes away what the layers below have in a folder, but for the names that the layer itself has there.
func (m *merger) removeChildren(n *Node, in *layertar.Inode) {
	for _, c := range n.children {
		if in == nil || in.Child(c.name) == nil {
			m.remove(c)
		}
	}
}

// release says that a name of a file shows no more. With the last one its bytes are wasted.
func (m *merger) release(s *State) {
	c := s.content
	if c == nil {
		return
	}
	if c.names--; c.names > 0 || c.size == 0 {
		return
	}
	m.img.Wasted += c.size
	m.img.Layers[c.layer].Wasted += c.size
	m.current().Hides += c.size
	w := m.waste[c.first]
	if w == nil {
		w = &Waste{}
		m.waste[c.first] = w
	}
	w.Copies++
	w.Bytes += c.size
	w.Layers = append(w.Layers, c.layer)
}

// sameFolder reports whether the layer only names a folder that is there already.
func sameFolder(s *State, in *layertar.Inode) bool {
	return s.Mode == in.Mode && s.UID == in.UID && s.GID == in.GID && slices.Equal(s.Xattrs, in.Xattrs)
}

// grow returns the children of the given names, which are sorted, and makes those that are missing.
func (n *Node) grow(names []string) []*Node {
	out := make([]*Node, len(names))
	missing := 0
	for i, k := 0, 0; i < len(names); i++ {
		for k < len(n.children) && n.children[k].name < names[i] {
			k++
		}
		if k < len(n.children) && n.children[k].name == names[i] {
			out[i] = n.children[k]
		} else {
			// A copy: the name is a piece of the whole path in the tar's header, which would stay in memory.
			out[i] = &Node{name: strings.Clone(names[i]), parent: n}
			missing++
		}
	}
	if missing == 0 {
		return out
	}
	all := make([]*Node, 0, len(n.children)+missing)
	for i, k := 0, 0; i < len(out) || k < len(n.children); {
		switch {
		case i == len(out) || k < len(n.children) && n.children[k].name < out[i].name:
			all = append(all, n.children[k])
			k++
		case k < len(n.children) && n.children[k] == out[i]:
			k++
		default:
			all = append(all, out[i])
			i++
		}
	}
	n.children = all
	return out
}
