// Package erofsindex owns the writing of a layer's EROFS index: a filesystem image that holds every name and attribute of
// a layer and points into the layer's tar for the contents.
//
// The format is the kernel's (fs/erofs/erofs_fs.h), little endian. What we use of it:
//
//	0      nothing (room for boot sectors)
//	1024   superblock, 128 bytes
//	1152   device slots, 128 bytes each: 1 = layer.tar, 2 = sparse.data (only with sparse files)
//	....   inodes, each 64 bytes (the extended form: the short one has no mtime), then its extended attributes, then
//	         a regular file: chunk indexes of 8 bytes, aligned to 8
//	         a folder or symbolic link: its last, incomplete block, if all that fits into one block
//	....   blocks: what folders and symbolic links could not keep beside their inode
//
// Blocks have 512 bytes, as in a tar, where contents begin at multiples of that. A regular file is one chunk as long as it
// needs to be, so one index entry, however large it is. An inode's number (nid) is its position divided by 32.
//
// github.com/erofs/go-erofs writes such images too, but v0.3.1 gives every name an inode of its own, so that hard links become
// copies, and keeps access control lists under a prefix that the kernel does not look at. Tests read what this package
// writes with it.
package erofsindex

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"

	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// BlockSize is the filesystem's block size in bytes.
const BlockSize = layertar.Block

const (
	magic          = 0xe0f5e1e2
	superOffset    = 1024
	slotOffset     = 1152
	slotSize       = 128
	inodeSize      = 64
	direntSize     = 12
	xattrHeader    = 12
	chunkIndexSize = 8

	blockBits = 9

	incompatChunked = 0x4
	incompatDevices = 0x8

	layoutPlain  = 0
	layoutInline = 2
	layoutChunks = 4
	formatLong   = 1 // bit 0 of i_format: 64-byte inode

	chunkIndexes = 0x20 // chunk format: 8-byte indexes with a device number
	maxChunkBits = 31
	hole         = math32 // the address of a chunk of zeros

	math32 = 0xffffffff

	devTar    = 1
	devSpill  = 2
	spillBits = 3 // SparseChunk = BlockSize << 3
)

// Write writes the index of t, which must be finished. tarSize and spillSize are the lengths in bytes of the two files that
// it points into; with spillSize 0 the second is not named. Equal trees give equal bytes. When tarSize is 0 too, the index
// needs no device: for trees without contents.
func Write(w io.Writer, t *layertar.Tree, tarSize, spillSize int64) error {
	b := &builder{nodes: make([]node, 0, t.Inodes()), byInode: make(map[*layertar.Inode]int32, t.Inodes())}
	devices := 0
	if tarSize > 0 {
		devices = 1
	}
	if spillSize > 0 {
		devices = 2
	}
	b.pos = slotOffset + int64(devices)*slotSize
	b.place(t.Root(), nil)
	b.placeBlocks()
	if b.err != nil {
		return fmt.Errorf("write index: %w", b.err)
	}
	img := make([]byte, b.size)
	b.img = img
	b.emit()

	sb := img[superOffset:]
	le := binary.LittleEndian
	le.PutUint32(sb[0:], magic)
	sb[12] = blockBits
	le.PutUint16(sb[14:], uint16(b.nodes[0].pos/32))
	le.PutUint64(sb[16:], uint64(len(b.nodes)))
	le.PutUint32(sb[36:], uint32(b.size/BlockSize))
	copy(sb[64:80], "conex layer")
	incompat := uint32(incompatChunked)
	if devices > 0 {
		incompat |= incompatDevices
		le.PutUint16(sb[86:], uint16(devices))
		le.PutUint16(sb[88:], slotOffset/slotSize)
		for d, size := range []int64{tarSize, spillSize}[:devices] {
			slot := img[slotOffset+d*slotSize:]
			copy(slot, []string{"layer.tar", "sparse.data"}[d])
			le.PutUint32(slot[64:], uint32((size+BlockSize-1)/BlockSize))
		}
	}
	le.PutUint32(sb[80:], incompat)
	if _, err := w.Write(img); err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	return nil
}

// node is an inode with its place.
type node struct {
	ino    *layertar.Inode
	parent int32 // the folder that ".." leads to
	layout uint16
	xattrs int    // size of the extended attributes, header included
	pos    int64  // of the inode in the image
	dsize  int64  // i_size of folders and links
	block  uint32 // first block of a plain folder or link
}

type builder struct {
	nodes   []node
	byInode map[*layertar.Inode]int32
	pos     int64
	size    int64
	img     []byte
	err     error
}

// place gives a folder and then all that is in it a position: first the folder's other files, side by side as ls -l will
// read them, then its folders. The root comes first: the superblock has 16 bits for its number.
func (b *builder) place(dir *layertar.Inode, up *int32) {
	self := b.add(dir)
	if up == nil {
		b.nodes[self].parent = self
	} else {
		b.nodes[self].parent = *up
	}
	for _, name := range dir.Names() {
		c := dir.Child(name)
		if c.IsDir() {
			continue
		}
		if _, ok := b.byInode[c]; !ok {
			b.add(c)
		}
	}
	for _, name := range dir.Names() {
		if c := dir.Child(name); c.IsDir() {
			b.place(c, &self)
		}
	}
}

func (b *builder) add(i *layertar.Inode) int32 {
	n := node{ino: i, xattrs: xattrSize(xattrs(i))}
	head := int64(inodeSize + n.xattrs)
	total := head
	switch i.Type() {
	case unix.S_IFREG:
		n.layout = layoutChunks
		if i.Size > 0 {
			total = (head+chunkIndexSize-1)&^(chunkIndexSize-1) + chunkIndexSize*chunkCount(i)
		} else {
			n.layout = layoutPlain
		}
	case unix.S_IFDIR, unix.S_IFLNK:
		n.dsize = int64(len(i.Target))
		if i.IsDir() {
			n.dsize = dirSize(i)
		}
		tail := n.dsize % BlockSize
		// What is kept beside the inode must not cross a block's border. With attributes longer than a block the place of
		// the tail is not worth computing.
		if tail > 0 && head+tail <= BlockSize && (i.IsDir() || n.dsize < BlockSize) {
			n.layout = layoutInline
			total = head + tail
			if b.pos%BlockSize+total > BlockSize {
				b.pos = (b.pos + BlockSize - 1) &^ (BlockSize - 1)
			}
		} else {
			n.layout = layoutPlain
		}
	}
	if b.pos%BlockSize+inodeSize > BlockSize { // spare the kernel an inode in two blocks
		b.pos = (b.pos + BlockSize - 1) &^ (BlockSize - 1)
	}
	n.pos = b.pos
	b.pos = (b.pos + total + 31) &^ 31
	id := int32(len(b.nodes))
	b.nodes = append(b.nodes, n)
	b.byInode[i] = id
	return id
}

// placeBlocks gives plain folders and links their blocks behind the inodes.
func (b *builder) placeBlocks() {
	blk := (b.pos + BlockSize - 1) / BlockSize
	for k := range b.nodes {
		n := &b.nodes[k]
		if n.dsize == 0 {
			continue
		}
		n.block = uint32(blk)
		if n.layout == layoutInline {
			blk += n.dsize / BlockSize
		} else {
			blk += (n.dsize + BlockSize - 1) / BlockSize
		}
	}
	// A multiple of the page size, so that no read of metadata runs past the end of the file.
	b.size = (blk*BlockSize + 4095) &^ 4095
	if blk >= math32 {
		b.err = errors.New("index longer than 2 TiB")
	}
}

func (b *builder) emit() {
	le := binary.LittleEndian
	for k := range b.nodes {
		n := &b.nodes[k]
		i := n.ino
		p := b.img[n.pos:]
		le.PutUint16(p[0:], n.layout<<1|formatLong)
		if n.xattrs > 0 {
			le.PutUint16(p[2:], uint16((n.xattrs-xattrHeader)/4+1))
			putXattrs(p[inodeSize:], xattrs(i))
		}
		le.PutUint16(p[4:], uint16(i.Mode))
		le.PutUint32(p[20:], uint32(k+1)) // i_ino, for programs with 32-bit inode numbers
		le.PutUint32(p[24:], i.UID)
		le.PutUint32(p[28:], i.GID)
		le.PutUint64(p[32:], uint64(i.Sec))
		le.PutUint32(p[40:], i.Nsec)
		le.PutUint32(p[44:], i.Nlink)
		tail := p[inodeSize+n.xattrs:]
		switch i.Type() {
		case unix.S_IFREG:
			le.PutUint64(p[8:], uint64(i.Size))
			if i.Size > 0 {
				le.PutUint16(p[16:], chunkFormat(i))
				start := n.pos + int64(inodeSize+n.xattrs)
				start = (start + chunkIndexSize - 1) &^ (chunkIndexSize - 1)
				putChunks(b.img[start:], i)
			}
		case unix.S_IFDIR:
			le.PutUint64(p[8:], uint64(n.dsize))
			le.PutUint32(p[16:], n.block)
			b.putDir(n, int32(k), tail)
		case unix.S_IFLNK:
			le.PutUint64(p[8:], uint64(n.dsize))
			le.PutUint32(p[16:], n.block)
			if n.layout == layoutInline {
				copy(tail, i.Target)
			} else {
				copy(b.img[int64(n.block)*BlockSize:], i.Target)
			}
		case unix.S_IFCHR, unix.S_IFBLK:
			le.PutUint32(p[16:], i.Minor&0xff|i.Major<<8|(i.Minor&^0xff)<<12)
		}
	}
}

// chunkBits gives the length of a file's chunks: BlockSize << chunkBits.
func chunkBits(i *layertar.Inode) int {
	if i.Sparse {
		return spillBits
	}
	return min(maxChunkBits, bits.Len64(uint64(i.Size-1)/BlockSize))
}

func chunkFormat(i *layertar.Inode) uint16 { return chunkIndexes | uint16(chunkBits(i)) }

func chunkCount(i *layertar.Inode) int64 {
	return (i.Size-1)>>(blockBits+chunkBits(i)) + 1
}

func putChunks(p []byte, i *layertar.Inode) {
	le := binary.LittleEndian
	if !i.Sparse {
		for c := range chunkCount(i) {
			le.PutUint16(p[c*8+2:], devTar)
			le.PutUint32(p[c*8+4:], uint32(i.Offset/BlockSize+c<<chunkBits(i)))
		}
		return
	}
	for c := range chunkCount(i) {
		le.PutUint32(p[c*8+4:], hole)
	}
	for _, e := range i.Extents {
		c := e.Off / layertar.SparseChunk
		le.PutUint16(p[c*8+2:], devSpill)
		le.PutUint32(p[c*8+4:], uint32(e.At/BlockSize))
	}
}

// entries calls fn for each name of a folder, "." and ".." among them, in byte order.
func entries(i *layertar.Inode, fn func(name string)) {
	dots := []string{".", ".."}
	for _, name := range i.Names() {
		for len(dots) > 0 && dots[0] < name {
			fn(dots[0])
			dots = dots[1:]
		}
		fn(name)
	}
	for _, d := range dots {
		fn(d)
	}
}

// dirSize returns the length of a folder's blocks, the last one counted as far as it is used.
func dirSize(i *layertar.Inode) int64 {
	full, used := int64(0), 0
	entries(i, func(name string) {
		if used+direntSize+len(name) > BlockSize {
			full++
			used = 0
		}
		used += direntSize + len(name)
	})
	return full*BlockSize + int64(used)
}

// putDir writes a folder's blocks: in each, the entries and then their names, sorted over all, so that the kernel finds a
// name by bisection.
func (b *builder) putDir(n *node, self int32, tail []byte) {
	le := binary.LittleEndian
	var names []string
	used, blk := 0, int64(0)
	flush := func(last bool) {
		out := b.img[(int64(n.block)+blk)*BlockSize:]
		if last && n.layout == layoutInline {
			out = tail
		}
		off := direntSize * len(names)
		for k, name := range names {
			target, ftype := self, byte(2)
			switch name {
			case ".":
			case "..":
				target = n.parent
			default:
				c := n.ino.Child(name)
				target, ftype = b.byInode[c], fileType(c.Mode)
			}
			e := out[k*direntSize:]
			le.PutUint64(e[0:], uint64(b.nodes[target].pos/32))
			le.PutUint16(e[8:], uint16(off))
			e[10] = ftype
			copy(out[off:], name)
			off += len(name)
		}
		names, used = names[:0], 0
		blk++
	}
	entries(n.ino, func(name string) {
		if used+direntSize+len(name) > BlockSize {
			flush(false)
		}
		used += direntSize + len(name)
		names = append(names, name)
	})
	flush(true)
}

func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

// xattrs returns an inode's attributes and overlayfs's marks.
func xattrs(i *layertar.Inode) []layertar.Xattr {
	list := i.Xattrs
	for _, m := range i.Marks() {
		list = append(list[:len(list):len(list)], layertar.Xattr{Name: "trusted.overlay." + m.Name, Value: m.Value})
	}
	return list
}

// splitXattr gives the number of a name's prefix and the rest.
func splitXattr(name string) (byte, string) {
	switch {
	case name == layertar.ACLAccess:
		return 2, ""
	case name == layertar.ACLDefault:
		return 3, ""
	case strings.HasPrefix(name, "user."):
		return 1, name[len("user."):]
	case strings.HasPrefix(name, "trusted."):
		return 4, name[len("trusted."):]
	}
	return 6, strings.TrimPrefix(name, "security.")
}

func oneXattrSize(x layertar.Xattr) int {
	_, rest := splitXattr(x.Name)
	return (4 + len(rest) + len(x.Value) + 3) &^ 3
}

func xattrSize(list []layertar.Xattr) int {
	if len(list) == 0 {
		return 0
	}
	size := xattrHeader
	for _, x := range list {
		size += oneXattrSize(x)
	}
	return size
}

func putXattrs(p []byte, list []layertar.Xattr) {
	p = p[xattrHeader:] // no shared attributes, no name filter: zeros
	for _, x := range list {
		index, rest := splitXattr(x.Name)
		p[0], p[1] = byte(len(rest)), index
		binary.LittleEndian.PutUint16(p[2:], uint16(len(x.Value)))
		copy(p[4:], rest)
		copy(p[4+len(rest):], x.Value)
		p = p[oneXattrSize(x):]
	}
}
