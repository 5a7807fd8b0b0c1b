// Package analyze owns the understanding of an image: what each of its layers added, changed and removed, which bytes of it nobody
// can see any more, and how two images differ.
//
// It reads the headers of the layers' tars and no contents (but for Diff, where two files of one size must be told apart), so an image
// of 500 MB takes milliseconds. All is held in one tree: a Node is a path that any layer has, with a State for each layer that said
// something about it. 300,000 paths take some 200 MB at the peak.
//
// # What the numbers mean
//
// The size of a layer is that of its regular files, each counted once however many names (hard links) it has in that layer. The size of an
// image is the sum over its layers.
//
// A file is wasted when a later layer has overwritten or deleted it under each of its names: its bytes lie in the layer, are pulled and
// pushed and stored, and no container sees them. Every such copy counts once; the copy that shows in the end does not count.
//
// The efficiency is 1 - wasted/size, and 1 for an image without bytes. A file that a layer stores a second time is a changed one, whatever
// its bytes are: the second copy takes its place all the same. Tools that speak of "image efficiency" mean this, and count a little
// differently: see [Image.PathEfficiency].
package analyze

import (
	"cmp"
	"errors"
	"slices"
	"strings"
	"time"

	"conex/internal/layertar"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// Change is what a layer did to a path.
type Change uint8

// The changes. A path is changed when it was there before and the layer has it again; a folder only when its mode, owner or extended
// attributes are other ones, since a layer's tar names every folder on the way to a file.
const (
	Unchanged Change = iota
	Added
	Changed
	Removed
)

// String is the word that the JSON form has.
func (c Change) String() string { return [...]string{"unchanged", "added", "changed", "removed"}[c] }

// Letter is Docker's letter for it ("docker diff"), a space for Unchanged.
func (c Change) Letter() byte { return " ACD"[c] }

// MarshalText makes it a word in JSON.
func (c Change) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// MaxStates bounds the memory for one image, all its layers taken together: some 100 bytes each. The largest public images have a tenth.
const MaxStates = 8_000_000

// errTooMany says that an image passes MaxStates.
var errTooMany = errors.New("more than 8,000,000 changes of paths in one image: too many to look at at once")

// Image is what was found out about an image. It is read-only once made.
type Image struct {
	ID       ocispec.Digest
	Tags     []string
	Created  time.Time
	Platform string // linux/amd64
	Config   ocispec.Image
	Layers   []Layer
	// Size is the sum of the layers' sizes, Wasted that of their wasted bytes.
	Size, Wasted int64
	// Waste is every file with wasted bytes, the worst first.
	Waste []Waste

	root *Node
}

// Efficiency is 1 - Wasted/Size.
func (i *Image) Efficiency() float64 {
	if i.Size == 0 {
		return 1
	}
	return 1 - float64(i.Wasted)/float64(i.Size)
}

// Root is the image's root folder.
func (i *Image) Root() *Node { return i.root }

// Lookup returns the node at path ("a/b", "" for the root), nil if no layer ever had it.
func (i *Image) Lookup(path string) *Node {
	n := i.root
	for p := range strings.SplitSeq(path, "/") {
		if p == "" {
			continue
		}
		if n = n.child(p); n == nil {
			return nil
		}
	}
	return n
}

// Layer is one layer of an image.
type Layer struct {
	DiffID ocispec.Digest
	// CreatedBy is the instruction as the image's history has it, "" for a layer that the history does not tell of.
	CreatedBy, Comment string
	Created            time.Time
	// Size is that of the layer's files, TarSize that of its tar, Entries the number of the tar's entries.
	Size, TarSize int64
	Entries       int
	// Added, Changed and Removed count paths, folders too. Removing a folder removes every path in it.
	Added, Changed, Removed int
	// Wasted are the bytes of this layer that later ones overwrite or delete; Hides are the bytes of lower layers that this one does.
	Wasted, Hides int64
	// SharedWith are the other images here that have the layer: a tag of each, or its short id.
	SharedWith []string
}

// Waste is a file whose bytes some layer has and nobody sees.
type Waste struct {
	Path string
	// Copies is the number of wasted copies, Bytes their sum.
	Copies int
	Bytes  int64
	// Layers are the indexes of the layers that hold them.
	Layers []int
	// Deleted says that the image has nothing at the path in the end; else a later copy is there.
	Deleted bool
}

// Node is a path that at least one layer has.
type Node struct {
	name     string
	parent   *Node
	children []*Node // by name
	states   []State // by layer
}

// State is a path as a layer left it.
type State struct {
	// Layer is the index of the layer.
	Layer int
	// Gone says that the layer removed the path; then the rest is zero.
	Gone bool
	// Mode is st_mode: type and permission bits.
	Mode     uint32
	UID, GID uint32
	// Size is that of a regular file, ModTime the time in nanoseconds since 1970.
	Size, ModTime int64
	// Major and Minor are a device's.
	Major, Minor uint32
	// Target is where a symbolic link leads.
	Target string
	Xattrs []layertar.Xattr

	content *content
}

// content is a regular file's inode in a layer, of one or more names.
type content struct {
	layer  int
	offset int64 // in the layer's tar
	size   int64
	names  int // those that still show
	links  int // those that the layer has
	first  *Node
}

// Name is the last part of the path, "" for the root.
func (n *Node) Name() string { return n.name }

// Parent is the folder that the node is in, nil for the root.
func (n *Node) Parent() *Node { return n.parent }

// Children are the nodes in the folder, by name, whatever layer they belong to.
func (n *Node) Children() []*Node { return n.children }

// Path is the path without a leading slash, "" for the root.
func (n *Node) Path() string {
	if n.parent == nil {
		return ""
	}
	if n.parent.parent == nil {
		return n.name
	}
	return n.parent.Path() + "/" + n.name
}

// last is the index of the newest state that a layer up to the given one made, -1 for none.
func (n *Node) last(layer int) int {
	i := len(n.states) - 1
	for i >= 0 && n.states[i].Layer > layer {
		i--
	}
	return i
}

// At returns the path as an image ending with the layer has it, nil if it has no such path.
func (n *Node) At(layer int) *State {
	i := n.last(layer)
	if i < 0 || n.states[i].Gone {
		return nil
	}
	return &n.states[i]
}

// Change is what the layer did to the path.
func (n *Node) Change(layer int) Change {
	i := n.last(layer)
	if i < 0 || n.states[i].Layer != layer {
		return Unchanged
	}
	before := i > 0 && !n.states[i-1].Gone
	switch {
	case n.states[i].Gone:
		return Removed
	case before:
		return Changed
	}
	return Added
}

// Shown returns what to show of the path at the layer: the state there, or for a path that the layer removed the one before; nil when the
// path does not exist there.
func (n *Node) Shown(layer int) *State {
	if n.Change(layer) == Removed {
		return &n.states[n.last(layer)-1]
	}
	return n.At(layer)
}

// States are all states of the path, by layer.
func (n *Node) States() []State { return n.states }

func (n *Node) child(name string) *Node {
	i, ok := slices.BinarySearchFunc(n.children, name, func(c *Node, s string) int { return cmp.Compare(c.name, s) })
	if !ok {
		return nil
	}
	return n.children[i]
}

// IsDir reports whether it is a folder.
func (s *State) IsDir() bool { return s.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsRegular reports whether it is a regular file.
func (s *State) IsRegular() bool { return s.Mode&unix.S_IFMT == unix.S_IFREG }

// Links is the number of names that a regular file has in its layer.
func (s *State) Links() int {
	if s.content == nil {
		return 1
	}
	return s.content.links
}

// FirstName is the path that the file's bytes are counted at: another one for a hard link.
func (s *State) FirstName() *Node {
	if s.content == nil {
		return nil
	}
	return s.content.first
}

// ownSize is the size of the file, 0 for its further names.
func (s *State) ownSize(n *Node) int64 {
	if s.content != nil && s.content.first != n {
		return 0
	}
	return s.Size
}

// Type is the word that the JSON form has for the kind of file.
func (s *State) Type() string {
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "dir"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	case unix.S_IFIFO:
		return "fifo"
	}
	return "file"
}

// ModeString is the mode as ls shows it: -rwsr-xr-x.
func (s *State) ModeString() string {
	b := []byte("?rwxrwxrwx")
	b[0] = map[uint32]byte{unix.S_IFDIR: 'd', unix.S_IFLNK: 'l', unix.S_IFCHR: 'c', unix.S_IFBLK: 'b', unix.S_IFIFO: 'p', unix.S_IFREG: '-'}[s.Mode&unix.S_IFMT]
	for i := range 9 {
		if s.Mode&(1<<(8-i)) == 0 {
			b[1+i] = '-'
		}
	}
	for _, x := range []struct {
		bit uint32
		at  int
		c   byte
	}{{unix.S_ISUID, 3, 's'}, {unix.S_ISGID, 6, 's'}, {unix.S_ISVTX, 9, 't'}} {
		if s.Mode&x.bit != 0 {
			if b[x.at] == '-' {
				x.c -= 'a' - 'A'
			}
			b[x.at] = x.c
		}
	}
	return string(b)
}

// PathEfficiency is the score as dive defines it, for whoever compares: over every path that is a file in some layer, the sum of the
// smallest sizes divided by the sum of all sizes, where deleting a file is one more copy of size 0, and deleting a folder one more copy of
// all that was in it. A file that is written twice is at fault for the larger of its copies there, whichever of them shows.
func (i *Image) PathEfficiency() float64 {
	var least, all int64
	var walk func(n *Node)
	// below is what the layers under the given one have in a folder, names counted as files.
	var below func(n *Node, layer int) int64
	below = func(n *Node, layer int) int64 {
		s := n.At(layer)
		if s == nil {
			return 0
		}
		sum := s.ownSize(n)
		for _, c := range n.children {
			sum += below(c, layer)
		}
		return sum
	}
	walk = func(n *Node) {
		lo, sum, found := int64(-1), int64(0), false
		for k := range n.states {
			s := &n.states[k]
			var size int64
			switch {
			case s.Gone && (n.parent.At(s.Layer) == nil || !n.parent.At(s.Layer).IsDir()):
				continue // it is a folder above that the layer speaks of
			case s.Gone && k > 0 && n.states[k-1].IsDir():
				size = below(n, s.Layer-1)
			case s.Gone:
			case s.IsDir():
				continue
			default:
				size = s.ownSize(n)
			}
			found = true
			sum += size
			if lo < 0 || size < lo {
				lo = size
			}
		}
		if found {
			least += lo
			all += sum
		}
		for _, c := range n.children {
			walk(c)
		}
	}
	walk(i.root)
	if all == 0 {
		return 1
	}
	return float64(least) / float64(all)
}
