package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"conex/internal/ocispec"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// Difference is where two builds of the same differ.
type Difference struct {
	// Path is the first file that differs, "" when the image's config does; Step is the instruction that made it.
	Path, Step string
	// What is what differs, with both values.
	What string
	// Times says that nothing but times differs, in so many files.
	Times int
}

// Error says it in a line.
func (d *Difference) Error() string {
	var b strings.Builder
	b.WriteString("the second build is not the same: ")
	if d.Path != "" {
		b.WriteString("/" + d.Path + ": ")
	}
	b.WriteString(d.What)
	if d.Step != "" {
		b.WriteString(" (" + firstLine(d.Step) + ")")
	}
	if d.Times > 0 {
		fmt.Fprintf(&b, "; only times differ, in %s: with SOURCE_DATE_EPOCH and --output type=image,rewrite-timestamp=true they don't", plural(d.Times, "file"))
	}
	return b.String()
}

// Compare looks for a difference between a build and another of the same, and returns nil if there is none. Contents, modes, owners
// and the like come before times.
func (x *Export) Compare(ctx context.Context, other *Export) (*Difference, error) {
	c := &comparison{ctx: ctx}
	for i := range max(len(x.Layers), len(other.Layers)) {
		if i < len(x.Layers) && i < len(other.Layers) && x.Layers[i] == other.Layers[i] {
			continue
		}
		side, index := x, i
		if i >= len(x.Layers) {
			side = other
		}
		c.step = side.stepOf(index)
		if err := x.compareLayer(c, other, i); err != nil {
			return nil, err
		}
		if c.found == nil && c.times == nil {
			c.found = &Difference{Step: c.step, What: fmt.Sprintf("layer %d holds the same files in another form", i+1)}
		}
		if c.found != nil {
			return c.found, nil
		}
	}
	if c.times != nil {
		c.times.Times = c.count
		return c.times, nil
	}
	if x.ID() == other.ID() {
		return nil, nil
	}
	if a, b := x.Image.Created, other.Image.Created; a != nil && b != nil && !a.Equal(*b) {
		return &Difference{What: fmt.Sprintf("the image's time is %s, then %s; SOURCE_DATE_EPOCH fixes it", stamp(*a), stamp(*b))}, nil
	}
	return &Difference{What: "the image's config"}, nil
}

// stepOf names the instruction that made a layer.
func (x *Export) stepOf(layer int) string {
	for _, h := range x.Image.History {
		if h.EmptyLayer {
			continue
		}
		if layer--; layer < 0 {
			return h.CreatedBy
		}
	}
	return ""
}

// compareLayer compares the layers of a number, of which one side may have none.
func (x *Export) compareLayer(c *comparison, other *Export, i int) error {
	var dirs [2]*os.File
	for k, e := range []*Export{x, other} {
		if i >= len(e.Layers) {
			continue
		}
		lower, err := x.b.Layers.Lower(c.ctx, []ocispec.Digest{e.Layers[i]})
		if err != nil {
			return err
		}
		root, err := safepath.OpenRoot(lower[len(lower)-1])
		if err != nil {
			return err
		}
		dirs[k] = root
		defer root.Close()
	}
	return c.folder("", dirs[0], dirs[1])
}

// comparison compares two layers' folders.
type comparison struct {
	ctx   context.Context //nolint:containedctx // one Compare, which it spans
	step  string
	found *Difference
	times *Difference
	count int
}

func (c *comparison) differ(p, format string, args ...any) {
	if c.found == nil {
		c.found = &Difference{Path: p, Step: c.step, What: fmt.Sprintf(format, args...)}
	}
}

// folder compares two folders, of which one may be nil: an empty one.
func (c *comparison) folder(p string, a, b *os.File) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	var lists [2][]string
	for k, d := range []*os.File{a, b} {
		if d == nil {
			continue
		}
		f, err := openDirAt(int(d.Fd()), ".")
		if err != nil {
			return err
		}
		lists[k], err = f.Readdirnames(-1)
		f.Close()
		if err != nil {
			return err
		}
	}
	names := append(slices.Clone(lists[0]), lists[1]...)
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		if c.found != nil {
			return nil
		}
		at := join(p, n)
		switch {
		case !slices.Contains(lists[1], n):
			c.differ(at, "only the first build has it")
		case !slices.Contains(lists[0], n):
			c.differ(at, "only the second build has it")
		default:
			if err := c.file(at, n, a, b); err != nil {
				return fmt.Errorf("compare %s: %w", at, err)
			}
		}
	}
	return nil
}

func (c *comparison) file(at, n string, a, b *os.File) error {
	var st [2]unix.Stat_t
	var text [2]string // of links and attributes
	for k, d := range []*os.File{a, b} {
		if err := unix.Fstatat(int(d.Fd()), n, &st[k], unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		list, err := xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), n), false)
		if err != nil {
			return err
		}
		text[k] = strings.Join(list, "\x00")
	}
	x, y := &st[0], &st[1]
	kind := x.Mode & unix.S_IFMT
	switch {
	case kind != y.Mode&unix.S_IFMT || kind == unix.S_IFCHR && (x.Rdev == 0) != (y.Rdev == 0):
		c.differ(at, "it is %s, then %s", kindName(x), kindName(y))
	case x.Mode != y.Mode:
		c.differ(at, "its mode is %04o, then %04o", x.Mode&0o7777, y.Mode&0o7777)
	case x.Uid != y.Uid || x.Gid != y.Gid:
		c.differ(at, "its owner is %d:%d, then %d:%d", x.Uid, x.Gid, y.Uid, y.Gid)
	case x.Rdev != y.Rdev:
		c.differ(at, "its device number differs")
	case text[0] != text[1]:
		c.differ(at, "its extended attributes differ")
	case kind != unix.S_IFDIR && x.Nlink != y.Nlink:
		c.differ(at, "it has %s, then %d", plural(int(x.Nlink), "name"), y.Nlink)
	}
	if c.found != nil {
		return nil
	}
	if err := c.content(at, n, kind, a, b); err != nil || c.found != nil {
		return err
	}
	// A whiteout has no time.
	if (x.Mtim.Sec != y.Mtim.Sec || x.Mtim.Nsec != y.Mtim.Nsec) && (kind != unix.S_IFCHR || x.Rdev != 0) {
		c.count++
		if c.times == nil {
			c.times = &Difference{Path: at, Step: c.step, What: fmt.Sprintf("its time is %s, then %s", stamp(time.Unix(x.Mtim.Unix())), stamp(time.Unix(y.Mtim.Unix())))}
		}
	}
	return nil
}

// content compares what is in two files of a kind.
func (c *comparison) content(at, n string, kind uint32, a, b *os.File) error {
	switch kind {
	case unix.S_IFLNK:
		var to [2]string
		for k, d := range []*os.File{a, b} {
			buf := make([]byte, unix.PathMax)
			m, err := unix.Readlinkat(int(d.Fd()), n, buf)
			if err != nil {
				return err
			}
			to[k] = string(buf[:m])
		}
		if to[0] != to[1] {
			c.differ(at, "it links to %q, then %q", to[0], to[1])
		}
		return nil
	case unix.S_IFDIR, unix.S_IFREG:
	default:
		return nil
	}
	var f [2]*os.File
	for k, d := range []*os.File{a, b} {
		fd, err := unix.Openat(int(d.Fd()), n, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f[k] = os.NewFile(uintptr(fd), n)
		defer f[k].Close()
	}
	if kind == unix.S_IFDIR {
		return c.folder(at, f[0], f[1])
	}
	off, was, is, err := firstDifference(f[0], f[1])
	if err == nil && off >= 0 {
		c.differ(at, "its content differs from byte %d on: %q, then %q", off, was, is)
	}
	return err
}

// firstDifference returns the offset of the first byte that differs, -1 for none, and a piece of both from there.
func firstDifference(a, b io.Reader) (off int64, was, is []byte, err error) {
	const piece = 24
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(a, x)
		if err != nil && err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, nil, nil, err
		}
		m, err := io.ReadFull(b, y)
		if err != nil && err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
			return 0, nil, nil, err
		}
		if !bytes.Equal(x[:n], y[:m]) {
			i := 0
			for i < min(n, m) && x[i] == y[i] {
				i++
			}
			return off + int64(i), x[i:min(n, i+piece)], y[i:min(m, i+piece)], nil
		}
		if n < len(x) {
			return -1, nil, nil, nil
		}
		off += int64(n)
	}
}

func kindName(st *unix.Stat_t) string {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "a folder"
	case unix.S_IFREG:
		return "a file"
	case unix.S_IFLNK:
		return "a link"
	case unix.S_IFIFO:
		return "a pipe"
	case unix.S_IFCHR:
		if st.Rdev == 0 {
			return "deleted"
		}
	}
	return "a device"
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000000Z") }
