package layertar

import (
	"archive/tar"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Whiteout names as the OCI image specification has them (layer.md, "Whiteouts").
const (
	// WhiteoutPrefix before a name says that the name is gone.
	WhiteoutPrefix = ".wh."
	// OpaqueName in a folder says that nothing of the layers below shows in it.
	OpaqueName = ".wh..wh..opq"
	// aufsPrefix begins names that aufs kept for itself; old images have them, everybody skips them.
	aufsPrefix = ".wh..wh."
)

// xattrRecord begins the PAX records that hold extended attributes, as GNU tar, star and every container engine write them.
const xattrRecord = "SCHILY.xattr."

// Split checks an entry's name and cuts it into its parts; a leading "./" and a trailing "/" do not count. It refuses
// what leaves the root, absolute names, NUL and what no kernel would take.
func Split(name string) ([]string, error) {
	switch {
	case name == "":
		return nil, nil
	case name[0] == '/':
		return nil, errors.New("absolute name")
	case strings.IndexByte(name, 0) >= 0:
		return nil, errors.New("NUL in the name")
	}
	parts := make([]string, 0, strings.Count(name, "/")+1)
	length := 0
	for p := range strings.SplitSeq(name, "/") {
		switch {
		case p == "" || p == ".":
			continue
		case p == "..":
			return nil, errors.New("\"..\" in the name")
		case len(p) > MaxName:
			return nil, fmt.Errorf("name longer than %d bytes", MaxName)
		}
		length += len(p) + 1
		parts = append(parts, p)
	}
	if length > MaxPath {
		return nil, fmt.Errorf("path longer than %d bytes", MaxPath)
	}
	return parts, nil
}

// Add puts an entry into the tree; offset is where its content begins in the tar. The inode is nil for entries that stand
// for nothing (global PAX headers, aufs's own files, opaque markers).
//
// Refused: names that leave the root or are absolute; anything below a name that is no folder, a symbolic link above all
// (it would be a way to write elsewhere); a folder that replaces something else or the reverse; a hard link to what is not in
// this tar; whiteouts of "/", "." and ".."; types, owners, device numbers and sizes that no kernel has; and whatever passes
// the limits of this package. Dropped without a word: extended attributes that belong to overlayfs itself, for which the
// kernel would follow the tar's orders, and those whose namespace Linux does not know.
func (t *Tree) Add(h *tar.Header, offset int64) (*Inode, error) {
	i, err := t.add(h, offset)
	if err != nil {
		return nil, &EntryError{Name: h.Name, Err: err}
	}
	return i, nil
}

func (t *Tree) add(h *tar.Header, offset int64) (*Inode, error) {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil, nil
	}
	if h.Name == "" {
		return nil, errors.New("empty name")
	}
	parts, err := Split(h.Name)
	if err != nil {
		return nil, err
	}
	if err := t.count(h); err != nil {
		return nil, err
	}
	t.entries++
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return nil, errors.New("the root is no folder")
		}
		return t.root, t.setDir(t.root, h)
	}
	base := parts[len(parts)-1]
	for _, p := range parts[:len(parts)-1] {
		if strings.HasPrefix(p, WhiteoutPrefix) {
			if strings.HasPrefix(p, aufsPrefix) {
				return nil, nil
			}
			return nil, errors.New("a whiteout used as a folder")
		}
	}
	if strings.HasPrefix(base, aufsPrefix) && base != OpaqueName {
		return nil, nil
	}
	dir, err := t.parent(parts)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(base, WhiteoutPrefix) {
		return whiteout(dir, base, len(parts) == 1)
	}
	old := dir.folder.children[base]
	if h.Typeflag == tar.TypeDir {
		d := old
		switch {
		case old == nil:
			d = &Inode{Mode: unix.S_IFDIR, folder: newFolder()}
		case old.IsWhiteout():
			d = &Inode{Mode: unix.S_IFDIR, folder: newFolder(), Opaque: true}
		case !old.IsDir():
			return nil, errors.New("a folder takes the place of something else")
		}
		if err := t.setDir(d, h); err != nil {
			return nil, err
		}
		dir.folder.children[base] = d
		return d, nil
	}
	if old != nil && old.IsDir() {
		return nil, errors.New("takes the place of a folder")
	}
	var i *Inode
	if h.Typeflag == tar.TypeLink {
		if i, err = t.linkTarget(h.Linkname); err != nil {
			return nil, err
		}
		if i == old {
			return i, nil
		}
	} else if i, err = t.newInode(h, offset); err != nil {
		return nil, err
	}
	dir.folder.children[base] = i
	return i, nil
}

// count charges an entry to the limits.
func (t *Tree) count(h *tar.Header) error {
	if t.entries+t.implied >= MaxEntries {
		return fmt.Errorf("more than %d entries", MaxEntries)
	}
	t.meta += int64(len(h.Name) + len(h.Linkname))
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, xattrRecord) {
			t.meta += int64(len(k) + len(v))
		}
	}
	if t.meta > MaxMeta {
		return fmt.Errorf("names and attributes of more than %d MiB", MaxMeta>>20)
	}
	return nil
}

// parent walks to the folder that holds the last part and makes what is missing as implied folders.
func (t *Tree) parent(parts []string) (*Inode, error) {
	d := t.root
	for n, p := range parts[:len(parts)-1] {
		c := d.folder.children[p]
		switch {
		case c == nil || c.IsWhiteout():
			if t.implied++; t.entries+t.implied > MaxEntries {
				return nil, fmt.Errorf("more than %d entries", MaxEntries)
			}
			gone := c != nil // the one below is deleted: this one inherits nothing
			c = newImplied()
			c.Opaque, c.Implied = gone, !gone
			d.folder.children[p] = c
		case c.Type() == unix.S_IFLNK:
			return nil, fmt.Errorf("%q above it is a symbolic link", strings.Join(parts[:n+1], "/"))
		case !c.IsDir():
			return nil, fmt.Errorf("%q above it is no folder", strings.Join(parts[:n+1], "/"))
		}
		d = c
	}
	return d, nil
}

func whiteout(dir *Inode, base string, inRoot bool) (*Inode, error) {
	if base == OpaqueName {
		if inRoot {
			return nil, errors.New("whiteout of /")
		}
		dir.Opaque = true
		return nil, nil
	}
	name := base[len(WhiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		if inRoot {
			return nil, errors.New("whiteout of /")
		}
		return nil, errors.New("whiteout of a folder by itself")
	}
	if old := dir.folder.children[name]; old != nil { // the order within a tar says nothing: a whiteout speaks of lower layers only
		if old.IsDir() {
			old.Opaque, old.Implied = true, false
		}
		return old, nil
	}
	w := &Inode{Mode: unix.S_IFCHR}
	dir.folder.children[name] = w
	return w, nil
}

func (t *Tree) linkTarget(name string) (*Inode, error) {
	parts, err := Split(name)
	if err != nil {
		return nil, fmt.Errorf("hard link to %q: %w", name, err)
	}
	i := t.root
	for _, p := range parts {
		if i = i.Child(p); i == nil {
			return nil, fmt.Errorf("hard link to %q, which is not in this tar before it", name)
		}
	}
	if i.IsDir() {
		return nil, fmt.Errorf("hard link to the folder %q", name)
	}
	if i.IsWhiteout() {
		return nil, fmt.Errorf("hard link to the whiteout %q", name)
	}
	return i, nil
}

// setDir gives an existing or new folder the entry's attributes; what is in it stays.
func (t *Tree) setDir(d *Inode, h *tar.Header) error {
	n := *d
	if err := n.setAttributes(h); err != nil {
		return err
	}
	n.Mode = unix.S_IFDIR | uint32(h.Mode&0o7777)
	n.Implied = false
	*d = n
	return nil
}

func (t *Tree) newInode(h *tar.Header, offset int64) (*Inode, error) {
	i := &Inode{}
	if err := i.setAttributes(h); err != nil {
		return nil, err
	}
	i.Mode = uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeReg, 0, tar.TypeCont, tar.TypeGNUSparse: // 0, the oldest form: the reader turns it into TypeReg, a caller may not
		i.Mode |= unix.S_IFREG
		if h.Size < 0 {
			return nil, errors.New("negative size")
		}
		i.Size, i.Offset, i.Sparse = h.Size, offset, IsSparse(h)
		if i.Sparse {
			if t.sparse += h.Size; h.Size > MaxSparse || t.sparse > MaxSparse {
				return nil, fmt.Errorf("sparse files of more than %d GiB", MaxSparse>>30)
			}
		} else if offset%Block != 0 {
			return nil, fmt.Errorf("content at %d, which is no multiple of %d", offset, Block)
		} else if (offset+h.Size)/Block >= math.MaxUint32 {
			return nil, errors.New("layer longer than 2 TiB")
		}
	case tar.TypeSymlink:
		i.Mode = unix.S_IFLNK | 0o777
		if h.Linkname == "" || len(h.Linkname) > MaxPath || strings.IndexByte(h.Linkname, 0) >= 0 {
			return nil, fmt.Errorf("symbolic link with a target of %d bytes", len(h.Linkname))
		}
		i.Target = h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		if h.Typeflag == tar.TypeChar {
			i.Mode |= unix.S_IFCHR
		} else {
			i.Mode |= unix.S_IFBLK
		}
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("device number %d:%d", h.Devmajor, h.Devminor)
		}
		i.Major, i.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		i.Mode |= unix.S_IFIFO
	default:
		return nil, fmt.Errorf("unknown type %q", h.Typeflag)
	}
	i.filterUserXattrs()
	return i, nil
}

// IsSparse reports whether the entry's content is stored without its holes.
func IsSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (i *Inode) setAttributes(h *tar.Header) error {
	// The number that is all ones means "leave it" to chown(2) and nobody can be it.
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return fmt.Errorf("owner %d:%d", h.Uid, h.Gid)
	}
	i.UID, i.GID = uint32(h.Uid), uint32(h.Gid)
	i.Sec, i.Nsec = 0, 0
	if !h.ModTime.IsZero() {
		i.Sec, i.Nsec = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	}
	i.Xattrs = nil
	size := 0
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, xattrRecord)
		if !ok || !KeepXattr(name) {
			continue
		}
		if len(name) > MaxName || len(v) > math.MaxUint16 {
			return fmt.Errorf("extended attribute %.40q of %d bytes", name, len(v))
		}
		if err := checkXattr(name, v); err != nil {
			return err
		}
		// 64 KiB is what the kernel lists of one file; the index could hold four times that.
		if size += len(name) + len(v) + 8; size > 128<<10 {
			return errors.New("extended attributes of more than 128 KiB")
		}
		i.Xattrs = append(i.Xattrs, Xattr{name, v})
	}
	sort.Slice(i.Xattrs, func(a, b int) bool { return i.Xattrs[a].Name < i.Xattrs[b].Name })
	return nil
}

// filterUserXattrs drops what the kernel allows on regular files and folders only.
func (i *Inode) filterUserXattrs() {
	if i.Type() == unix.S_IFREG {
		return
	}
	kept := i.Xattrs[:0]
	for _, x := range i.Xattrs {
		if !strings.HasPrefix(x.Name, "user.") && !strings.HasPrefix(x.Name, "system.") {
			kept = append(kept, x)
		}
	}
	i.Xattrs = kept
}

// KeepXattr reports whether an extended attribute belongs into a layer. Those of overlayfs do not: they are how it marks
// whiteouts and redirects, and a tar that brings its own could show a container files that are not in its image.
func KeepXattr(name string) bool {
	switch {
	case strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay."):
		return false
	case name == ACLAccess || name == ACLDefault:
		return true
	}
	for _, p := range []string{"user.", "trusted.", "security."} {
		if strings.HasPrefix(name, p) && len(name) > len(p) && strings.IndexByte(name, 0) < 0 {
			return true
		}
	}
	return false
}

// Names of POSIX access control lists.
const (
	ACLAccess  = "system.posix_acl_access"
	ACLDefault = "system.posix_acl_default"
)

// checkXattr refuses values that the kernel would take for damage of the file system when it reads them.
func checkXattr(name, v string) error {
	switch name {
	case ACLAccess, ACLDefault:
		if len(v) < 4 || (len(v)-4)%8 != 0 || binary.LittleEndian.Uint32([]byte(v[:4])) != 2 {
			return fmt.Errorf("extended attribute %s is no access control list", name)
		}
	case "security.capability":
		want := map[uint32]int{1: 12, 2: 20, 3: 24}
		if len(v) < 4 || want[binary.LittleEndian.Uint32([]byte(v[:4]))>>24] != len(v) {
			return errors.New("extended attribute security.capability is no file capability")
		}
	}
	return nil
}
