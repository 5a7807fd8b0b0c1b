// Package layertar owns the reading of a layer's tar: from untrusted bytes to a checked tree of inodes.
//
// Every driver of package layers builds on the tree, never on the tar, so that what a tar means is decided once: the last
// of two entries with one name wins, a hard link shares its target's inode, OCI whiteouts ("x/.wh.y", "x/.wh..wh..opq")
// become overlayfs's (a character device 0:0, an opaque folder), and a folder that the tar uses but never names is marked as
// implied. A tar that could harm is refused as a whole with an *EntryError; the rules stand at Tree.Add.
//
// The tree holds no file contents, only where in the tar they lie.
package layertar

import (
	"errors"
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of one layer. They bound memory and time, not what people do: the largest layers seen in public images hold some
// 300,000 entries.
const (
	// MaxEntries is the highest number of entries, implied folders included.
	MaxEntries = 999_999
	// MaxMeta is the highest sum, in bytes, of names, link targets and extended attributes.
	MaxMeta = 256 << 20
	// MaxSparse is the highest sum, in bytes, of the apparent sizes of sparse files. A few bytes of tar stand for them, so
	// they could fill whatever reads or copies the layer.
	MaxSparse = 4 << 30
	// MaxPath and MaxName are the kernel's limits of a path and of one name in it, in bytes.
	MaxPath = 4095
	MaxName = 255
)

// Block is the unit of a tar, in bytes.
const Block = 512

// SparseChunk is the unit, in bytes, in which a sparse file's data is kept; chunks of zeros are holes.
const SparseChunk = 4096

// ErrRefused is what errors.Is finds in every error that blames the tar and not the machine.
var ErrRefused = errors.New("tar refused")

// EntryError names the entry for which a tar is refused.
type EntryError struct {
	// Name is the entry's name as the tar has it.
	Name string
	// Err says what is wrong with it.
	Err error
}

// Error is one line.
func (e *EntryError) Error() string {
	if e.Name == "" { // not even a first entry
		return fmt.Sprintf("no tar, or damaged at its beginning: %v", e.Err)
	}
	name := e.Name
	if most := 300; len(name) > most {
		name = name[:most] + "..."
	}
	return fmt.Sprintf("tar entry %q: %v", name, e.Err)
}

// Unwrap gives ErrRefused and the reason.
func (e *EntryError) Unwrap() []error { return []error{ErrRefused, e.Err} }

// Xattr is one extended attribute, with its full name ("user.mime_type").
type Xattr struct{ Name, Value string }

// Extent is a piece of a sparse file: the SparseChunk bytes at Off of the file stand at At of the spill. Both are multiples
// of SparseChunk; the last chunk is padded with zeros.
type Extent struct{ Off, At int64 }

// Inode is one file of any type. Two names of one file (a hard link) share it. There may be a million of them: the order of the fields keeps
// it at 128 bytes.
type Inode struct {
	// Mode is st_mode: type and permission bits.
	Mode uint32
	// UID and GID are the owner's numbers.
	UID, GID uint32
	// Sec and Nsec are the modification time since 1970.
	Nsec uint32
	Sec  int64
	// Size is the length of a regular file's content in bytes.
	Size int64
	// Offset is where the content begins in the tar, a multiple of Block. Without meaning for sparse files.
	Offset int64
	// Major and Minor name the device of a device node.
	Major, Minor uint32
	// Nlink is the number of names; for a folder 2 and one for each folder in it. Set by Tree.Finish.
	Nlink uint32
	// Sparse files have their content in Extents, not at Offset; what no extent covers is zeros.
	Sparse bool
	// Implied marks a folder that the tar uses but does not name: its attributes belong to the layers below.
	Implied bool
	// Opaque marks a folder that hides what the layers below have in it.
	Opaque bool
	// Whiteouts marks a folder with whiteouts in it. Set by Tree.Finish.
	Whiteouts bool
	// Extents are a sparse file's.
	Extents []Extent
	// Target is where a symbolic link leads.
	Target string
	// Xattrs are sorted by name.
	Xattrs []Xattr

	folder *folder // nil unless it is one
}

// folder is what is in a folder.
type folder struct {
	children map[string]*Inode
	names    []string
}

func newFolder() *folder { return &folder{children: map[string]*Inode{}} }

// Type returns the type bits of the mode (unix.S_IFDIR and so on).
func (i *Inode) Type() uint32 { return i.Mode & unix.S_IFMT }

// IsDir reports whether the inode is a folder.
func (i *Inode) IsDir() bool { return i.Type() == unix.S_IFDIR }

// IsWhiteout reports whether the inode hides a name of the layers below: overlayfs's character device 0:0.
func (i *Inode) IsWhiteout() bool { return i.Type() == unix.S_IFCHR && i.Major == 0 && i.Minor == 0 }

// Marks returns the extended attributes by which overlayfs knows what the folder is, without the prefix "trusted.overlay." or
// "user.overlay.". "opaque" hides the layers below. "origin", though empty, makes it look for whiteouts among the names
// of a folder that it merges with nothing; without, they would show as files that nobody can open.
func (i *Inode) Marks() []Xattr {
	var out []Xattr
	if i.Opaque {
		out = append(out, Xattr{"opaque", "y"})
	}
	if i.Whiteouts {
		out = append(out, Xattr{"origin", ""})
	}
	return out
}

// Names returns the names in a folder in byte order. Valid after Tree.Finish.
func (i *Inode) Names() []string {
	if i.folder == nil {
		return nil
	}
	return i.folder.names
}

// Child returns the inode that a folder has under name, or nil.
func (i *Inode) Child(name string) *Inode {
	if i.folder == nil {
		return nil
	}
	return i.folder.children[name]
}

// Tree is the content of a layer.
type Tree struct {
	root     *Inode
	entries  int
	implied  int
	inodes   int
	content  int64
	meta     int64
	sparse   int64
	finished bool
}

// NewTree returns a tree with an implied root folder only.
func NewTree() *Tree { return &Tree{root: newImplied()} }

// Root returns the root folder.
func (t *Tree) Root() *Inode { return t.root }

// Entries returns the number of tar entries in the tree, implied folders not counted.
func (t *Tree) Entries() int { return t.entries }

// ContentSize returns the sum of the sizes of regular files, in bytes, hard links counted once. Valid after Finish.
func (t *Tree) ContentSize() int64 { return t.content }

// Inodes returns the number of inodes. Valid after Finish.
func (t *Tree) Inodes() int { return t.inodes }

func newImplied() *Inode {
	return &Inode{Mode: unix.S_IFDIR | 0o755, Implied: true, folder: newFolder()}
}

// Finish counts links and sorts names. Whiteouts below an opaque folder say nothing that it does not say already; since
// overlayfs would show them as names in a folder that it merges with nothing, they go. Call it once, after the last Add.
func (t *Tree) Finish() {
	if t.finished {
		return
	}
	t.finished = true
	seen := func(i *Inode) {
		if i.Nlink++; i.Nlink == 1 {
			t.inodes++
			if i.Type() == unix.S_IFREG {
				t.content += i.Size
			}
		}
	}
	var walk func(d *Inode, hidden bool)
	walk = func(d *Inode, hidden bool) { // as deep as MaxPath allows, 2,048 calls
		t.inodes++
		d.Nlink = 2
		hidden = hidden || d.Opaque
		f := d.folder
		f.names = make([]string, 0, len(f.children))
		for name, c := range f.children {
			if hidden && c.IsWhiteout() {
				delete(f.children, name)
				continue
			}
			f.names = append(f.names, name)
			d.Whiteouts = d.Whiteouts || c.IsWhiteout()
			if c.IsDir() {
				d.Nlink++
				walk(c, hidden)
			} else {
				seen(c)
			}
		}
		sort.Strings(f.names)
	}
	walk(t.root, false)
}

// Implied returns the paths of the implied folders, sorted, the root ("") not among them. Valid after Finish.
func (t *Tree) Implied() []string {
	var out []string
	_ = t.Walk(func(path string, i *Inode) error {
		if i.Implied && path != "" {
			out = append(out, path)
		}
		return nil
	})
	return out
}

// Walk calls fn for every name, a folder before what is in it, in byte order of the names; the root's path is "". It ends
// with fn's first error. Valid after Finish.
func (t *Tree) Walk(fn func(path string, i *Inode) error) error { return walkFrom("", t.root, fn) }

func walkFrom(path string, i *Inode, fn func(string, *Inode) error) error {
	if err := fn(path, i); err != nil {
		return err
	}
	if path != "" {
		path += "/"
	}
	for _, name := range i.Names() {
		if err := walkFrom(path+name, i.Child(name), fn); err != nil {
			return err
		}
	}
	return nil
}

// Lookup returns what lies at path ("a/b", "" for the root), or nil. Symbolic links are not followed.
func (t *Tree) Lookup(path string) *Inode {
	i := t.root
	for path != "" {
		var name string
		name, path, _ = strings.Cut(path, "/")
		if name == "" || name == "." {
			continue
		}
		if i = i.Child(name); i == nil { // nothing is called ".."
			return nil
		}
	}
	return i
}
