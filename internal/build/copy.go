package build

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"conex/internal/compress"
	"conex/internal/dockerfile"
	"conex/internal/layertar"
	"conex/internal/linux/mount"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// copyOp is what COPY, ADD say; with the inputs it is all that their result depends on.
type copyOp struct {
	Add     bool                 `json:"add,omitempty"`
	Sources []string             `json:"sources,omitempty"`
	Files   []dockerfile.Heredoc `json:"files,omitempty"`
	Dest    string               `json:"dest"` // absolute; a trailing slash counts
	Chown   string               `json:"chown,omitempty"`
	Chmod   string               `json:"chmod,omitempty"`
	Exclude []string             `json:"exclude,omitempty"`
	Parents bool                 `json:"parents,omitempty"`
	Follow  bool                 `json:"follow,omitempty"`
	Unpack  bool                 `json:"unpack,omitempty"`
	URLs    []string             `json:"urls,omitempty"`
	Gits    []string             `json:"gits,omitempty"`
	// UnpackURLs is ADD --unpack, without which a downloaded archive stays one.
	UnpackURLs bool `json:"unpackURLs,omitempty"`
	// Link makes the layer without a look at what lies below.
	Link bool `json:"link,omitempty"`
}

// mkdirOp is WORKDIR.
type mkdirOp struct {
	Path string `json:"path"`
	User string `json:"user,omitempty"`
}

func (p *planner) planMkdir(n *node, s *stage) {
	op := mkdirOp{s.cfg.workdir(), s.cfg.image.Config.User}
	n.kind, n.op = kindMkdir, op
	n.run = func(ctx context.Context, _ *node, in []result) (_ made, err error) {
		t, err := newTarget(ctx, p.b.Layers, in[0].layers)
		if err != nil {
			return made{}, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		at, err := t.resolve(op.Path, true)
		if err != nil {
			return made{}, err
		}
		if ok, err := t.isDir(at); err != nil || ok {
			return made{}, err
		}
		var o owner
		if op.User != "" {
			if o, err = t.lookupOwner(op.User); err != nil {
				return made{}, err
			}
		}
		if err := t.mkdirAll(at, o, 0o755, time.Unix(0, 0)); err != nil {
			return made{}, err
		}
		return t.commit()
	}
}

// copier executes one COPY or ADD.
type copier struct {
	b  *Builder
	op copyOp
	// tree is where the sources lie, sel was filled when the key was computed; nil for those of a stage or image.
	tree *tree
	from *view
	sel  []source
	// sums are the hashes of a stage's regular files in the order of sel, filled while they are copied.
	sums [][sha256.Size]byte
	// placed are the context's regular files, as far as they count for remarkWaste.
	placed []placed
	// changed says that a file was not what it was when it was hashed.
	changed bool
	urls    []*download
	gits    []*clone
	t       *target
	chown   *owner
	chmod   modeChange           // nil without --chmod
	links   map[[2]uint64]linked // first names of files with several, by device and inode
	vertex  *vertex
	bytes   int64
	shown   time.Time
}

// linked is where a file with several names went first, and the number of its hash in copier.sums.
type linked struct {
	at  string
	sum int
}

// planCopy makes the node of a COPY or ADD and returns its history entry.
func (p *planner) planCopy(ctx context.Context, n *node, s *stage, c *dockerfile.Copy) (string, error) {
	op := copyOp{Add: c.Add, Files: c.Files, Chown: c.Chown, Chmod: c.Chmod, Exclude: c.Exclude, Parents: c.Parents, Unpack: c.Add}
	op.Follow = c.Follow
	op.Link = c.Link && c.Chmod == "" // as in BuildKit: the folders on the way would get the mode too
	if c.Unpack != nil {
		op.Unpack, op.UnpackURLs = *c.Unpack, *c.Unpack
	}
	created := "COPY"
	if c.Add {
		created = "ADD"
	}
	if c.Parents {
		created += " --parents"
	}
	if c.Chown != "" {
		created += " --chown=" + c.Chown
	}
	cp := &copier{b: p.b}
	if c.Chmod != "" {
		change, err := parseChmod(c.Chmod)
		if err != nil {
			return "", err
		}
		cp.chmod = change
		created += " --chmod=" + c.Chmod
	}
	op.Dest = c.Dest
	if !path.IsAbs(op.Dest) {
		op.Dest = path.Join(s.cfg.workdir(), c.Dest)
		if c.Dest == "." || c.Dest == "" || strings.HasSuffix(c.Dest, "/") || strings.HasSuffix(c.Dest, "/.") {
			op.Dest += "/"
		}
	}
	if c.Checksum != "" && len(c.Sources) != 1 {
		return "", errors.New("checksum can't be specified for multiple sources")
	}
	for _, src := range c.Sources {
		created += " " + src
		switch isGit, err := cp.gitSource(p, c, src); {
		case err != nil:
			return "", err
		case isGit:
			op.Gits = append(op.Gits, src)
		case isHTTP(src):
			if !c.Add {
				return "", errors.New("source can't be a URL for COPY")
			}
			d, err := newDownload(p.b.fetcher(p.req), src, c.Checksum)
			if err != nil {
				return "", fmt.Errorf("ADD %w", err)
			}
			op.URLs, cp.urls = append(op.URLs, src), append(cp.urls, d)
		default:
			op.Sources = append(op.Sources, src)
		}
	}
	for _, f := range c.Files {
		created += " <<" + f.Name
	}
	created += " " + c.Dest
	if c.Checksum != "" && len(op.Sources) > 0 {
		return "", errors.New("checksum requires HTTP(S) or Git sources")
	}
	n.kind, n.op, n.copies, cp.op = kindCopy, op, cp, op
	n.run = func(ctx context.Context, n *node, in []result) (made, error) {
		cp.vertex = n.vertex
		return cp.run(ctx, in)
	}
	n.again = func() bool { return cp.changed }
	n.free = op.Link
	cp.tree = p.tree(c.From)
	switch {
	case cp.tree == nil:
		from, err := p.from(ctx, s, c.From, n.step.Lines)
		if err != nil {
			return "", err
		}
		n.inputs = append(n.inputs, from)
		n.selects = cp
	case len(op.Sources) > 0:
		cp.tree.expect(p.journal)
		cp.tree.lists = fileLists{p.b.Root}
		source := InputRecord{Kind: kindContext, Name: c.From, Step: cp.tree.vertex.id}
		n.inputs = append(n.inputs, &node{kind: kindContext, owner: n, source: source, prepare: func(ctx context.Context) (string, error) {
			cp.tree.begin()
			defer cp.tree.done()
			var err error
			if cp.from, err = cp.tree.open(ctx); err != nil {
				return "", err
			}
			if cp.sel, err = cp.from.selection(ctx, op.Sources, selectOptions{op.Exclude, op.Parents, op.Follow}); err != nil {
				return "", err
			}
			return cp.from.fingerprint(ctx, cp.sel)
		}})
	}
	for _, d := range cp.urls {
		n.inputs = append(n.inputs, &node{kind: kindURL, owner: n, source: InputRecord{Kind: kindURL, Name: shownURL(d.url)}, prepare: d.key})
	}
	for _, g := range cp.gits {
		n.inputs = append(n.inputs, &node{kind: kindGit, owner: n, source: InputRecord{Kind: kindGit, Name: g.src.String()}, prepare: g.key})
	}
	return created, nil
}

// from is the node whose files --from names: a stage's last or an image.
func (p *planner) from(ctx context.Context, s *stage, name string, at dockerfile.Lines) (*node, error) {
	st, err := p.fromStage(s, name)
	if err != nil {
		return nil, err
	}
	if st != nil {
		if err := p.plan(ctx, st); err != nil {
			return nil, err
		}
		return st.tip, nil
	}
	if name = p.imageName(name); name == "scratch" && p.context("scratch") == nil {
		return &node{kind: kindScratch, op: "", fixed: &scratchResult}, nil
	}
	b, err := p.image(ctx, name, p.platform, at)
	if err != nil {
		return nil, err
	}
	return b.node, nil
}

func (c *copier) run(ctx context.Context, in []result) (_ made, err error) {
	below := in[0].layers
	if c.op.Link {
		below = nil
	}
	if c.t, err = newTarget(ctx, c.b.Layers, below); err != nil {
		return made{}, err
	}
	defer func() { err = errors.Join(err, c.t.close()) }()
	if c.op.Chown != "" {
		o, err := c.t.lookupOwner(c.op.Chown)
		if err != nil {
			return made{}, err
		}
		c.chown = &o
	}
	if c.tree == nil {
		if err := c.openStage(ctx, in[1]); err != nil {
			return made{}, err
		}
	}
	if c.op.Parents && len(c.sel) == 0 { // the destination is made all the same, as in BuildKit
		at, err := c.t.resolve(c.op.Dest, true)
		if err == nil {
			err = c.t.mkdirAll(at, c.dirOwner(), c.dirMode(), time.Unix(0, 0))
		}
		if err != nil {
			return made{}, err
		}
	}
	count := len(c.sel) + len(c.op.Files) + len(c.urls) + len(c.gits)
	for i := range c.sel {
		if err := c.source(ctx, c.from, &c.sel[i], count > 1); err != nil {
			return made{}, err
		}
		if c.tree != nil {
			c.sel[i].items = nil // only after wants them again; there may be a million
		}
	}
	for _, f := range c.op.Files {
		h := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.Data)), ModTime: time.Unix(0, 0)}
		if err := c.file(h, path.Base("/"+f.Name), strings.NewReader(f.Data), count > 1); err != nil {
			return made{}, err
		}
	}
	for _, d := range c.urls {
		if err := d.copyTo(ctx, c, count > 1); err != nil {
			return made{}, err
		}
	}
	for _, g := range c.gits {
		if err := g.copyTo(ctx, c, count > 1); err != nil {
			return made{}, err
		}
	}
	return c.t.commit()
}

// openStage shows the source's layers and selects in them, once.
func (c *copier) openStage(ctx context.Context, from result) error {
	if c.from != nil {
		return nil
	}
	root, err := openStage(ctx, c.b.Layers, from.layers)
	if err == nil && root == nil {
		root, err = emptyFolder()
	}
	if err != nil {
		return err
	}
	c.from = &view{root: root, owners: true, lists: fileLists{c.b.Root}}
	c.sel, err = c.from.selection(ctx, c.op.Sources, selectOptions{c.op.Exclude, c.op.Parents, c.op.Follow})
	return err
}

// emptyFolder is the root of a stage that has no layers. It is gone when closed.
func emptyFolder() (*os.File, error) {
	f, err := mount.New("tmpfs", []mount.Param{{Key: "mode", Value: "0755"}}, 0)
	if err != nil {
		return nil, fmt.Errorf("empty folder: %w", err)
	}
	// Its time may become that of a copy.
	if err := unix.UtimesNanoAt(int(f.Fd()), ".", make([]unix.Timespec, 2), 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("empty folder: %w", err)
	}
	return f, nil
}

// before is selector's.
func (c *copier) before(ctx context.Context, from result) (string, error) {
	if err := c.openStage(ctx, from); err != nil {
		return "", err
	}
	return c.from.fingerprint(ctx, c.sel)
}

// after is selector's.
func (c *copier) after() (string, bool) {
	sum, ok := c.from.sumUp(c.sel, c.sums)
	if ok {
		c.from.lists.keep(sum, c.sel, c.sums)
	}
	return sum, ok
}

// release is selector's.
func (c *copier) release() error {
	if c.from == nil || c.from.root == nil {
		return nil
	}
	err := c.from.root.Close()
	c.from.root = nil
	return err
}

// owned sets a header's owner: --chown's, else root's for what comes from the context, else the one it has.
func (c *copier) owned(h *tar.Header, st *fileStat) {
	switch {
	case c.chown != nil:
		h.Uid, h.Gid = c.chown.uid, c.chown.gid
	case c.tree == nil && st != nil:
		h.Uid, h.Gid = int(st.Uid), int(st.Gid)
	}
}

func (c *copier) dirOwner() owner {
	if c.chown != nil {
		return *c.chown
	}
	return owner{}
}

// dirMode is the mode of folders that the copy makes on the way. --chmod reaches them as it does in Docker, but whoever may read a folder
// may enter it too: --chmod=644 must not make a folder that nobody but root can use.
func (c *copier) dirMode() int64 {
	const plain = 0o755
	if c.chmod == nil || strings.Trim(c.op.Chmod, "01234567") != "" { // a symbolic one speaks of what is copied
		return plain
	}
	m := c.chmod(plain, true) & 0o777
	return m | m&0o444>>2
}

// place finds where a file called name goes: the destination itself, or into it when it is or shall be a folder. It makes the folder.
func (c *copier) place(name string, several bool, when time.Time) (string, error) {
	at, err := c.t.resolve(c.op.Dest, true) // a link that the destination itself names is followed
	if err != nil {
		return "", err
	}
	dir, err := c.t.isDir(at)
	if err != nil {
		return "", err
	}
	switch {
	case dir || strings.HasSuffix(c.op.Dest, "/"):
		if err := c.t.mkdirAll(at, c.dirOwner(), c.dirMode(), when); err != nil {
			return "", err
		}
		return join(at, name), nil // a link of that name is replaced
	case several:
		return "", fmt.Errorf("with more than one source the destination must be a folder: end %q with a /", c.op.Dest)
	}
	parent := path.Dir(at)
	if parent == "." {
		return at, nil
	}
	return at, c.t.mkdirAll(parent, c.dirOwner(), c.dirMode(), when)
}

// file writes one regular file.
func (c *copier) file(h *tar.Header, name string, content io.Reader, several bool) error {
	at, err := c.place(name, several, h.ModTime)
	if err != nil {
		return err
	}
	h.Name = at
	if c.chmod != nil {
		h.Mode = c.chmod(h.Mode, false)
	}
	c.owned(h, nil)
	return c.t.write(h, content)
}

// source copies what one path of the instruction led to.
func (c *copier) source(ctx context.Context, v *view, s *source, several bool) error {
	top := &s.items[0]
	c.links = map[[2]uint64]linked{} // what is named twice is copied twice: only names within one folder stay linked
	when := top.st.mtime()
	if !s.dir {
		if c.op.Unpack && top.kind() == unix.S_IFREG {
			done, err := c.unpack(v, top, when)
			if done || err != nil {
				return err
			}
		}
		at, err := c.place(s.name, several, when)
		if err != nil {
			return err
		}
		return c.item(v, top, at)
	}
	at, err := c.t.resolve(c.op.Dest, true)
	if err != nil {
		return err
	}
	if err := c.t.mkdirAll(at, c.dirOwner(), c.dirMode(), when); err != nil {
		return err
	}
	for i := range s.items {
		it := &s.items[i]
		if it.rel == "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		p := join(at, it.rel)
		if it.rel == s.items[0].rel {
			if err := c.parents(v, it, at); err != nil {
				return err
			}
		}
		if err := c.item(v, it, p); err != nil {
			return err
		}
	}
	return nil
}

// parents makes the folders between at and the item that --parents keeps, as they are in the source.
func (c *copier) parents(v *view, top *item, at string) error {
	from := path.Dir(top.path)
	var dirs []*item // innermost first
	for rel := path.Dir(top.rel); rel != "."; rel, from = path.Dir(rel), path.Dir(from) {
		it := &item{path: from, rel: rel}
		f, err := safepath.Open(v.root, from, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Fstat(int(f.Fd()), &st)
		f.Close()
		if err != nil {
			return fmt.Errorf("stat %s: %w", from, err)
		}
		it.st = statOf(&st)
		dirs = append(dirs, it)
	}
	for _, it := range slices.Backward(dirs) {
		p := join(at, it.rel)
		there, err := c.t.isDir(p)
		if err != nil {
			return err
		}
		if there { // it stays as it is
			if err := c.t.mkdirAll(p, c.dirOwner(), c.dirMode(), time.Time{}); err != nil {
				return err
			}
			continue
		}
		if err := c.item(v, it, p); err != nil {
			return err
		}
	}
	return nil
}

// item writes one selected item to a place whose parents exist.
func (c *copier) item(v *view, it *item, at string) error {
	h := &tar.Header{
		Name: at, Mode: int64(it.st.Mode & 0o7777), ModTime: it.st.mtime(), PAXRecords: paxXattrs(it.xattrs),
	}
	c.owned(h, &it.st)
	kind := it.kind()
	if c.chmod != nil && kind != unix.S_IFLNK {
		h.Mode = c.chmod(h.Mode, kind == unix.S_IFDIR)
	}
	if kind != unix.S_IFDIR && it.st.Nlink > 1 {
		key := [2]uint64{it.st.Dev, it.st.Ino}
		if first, ok := c.links[key]; ok && first.at != at {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first.at, nil
			if c.tree == nil && kind == unix.S_IFREG {
				c.sums = append(c.sums, c.sums[first.sum])
			}
			return c.t.write(h, nil)
		}
		c.links[key] = linked{at, len(c.sums)}
	}
	switch kind {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, it.link
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(it.st.Rdev)), int64(unix.Minor(it.st.Rdev))
	case unix.S_IFREG:
		return c.regular(v, it, h)
	default:
		return fmt.Errorf("%q has a type that can't be copied", "/"+it.path)
	}
	return c.t.write(h, nil)
}

// regular streams a file. It notices when the file is not the one that was hashed, since its key would then promise the wrong content.
func (c *copier) regular(v *view, it *item, h *tar.Header) error {
	before := it.st
	f, err := v.open(it)
	if err != nil {
		return err
	}
	defer f.close()
	if statID(&before) != statID(&it.st) {
		c.changed = true
		h.ModTime = it.st.mtime()
	}
	h.Typeflag, h.Size = tar.TypeReg, it.st.Size
	var content io.Reader = f
	var sum *contentHash
	if c.tree == nil {
		sum = newContentHash()
		content = io.TeeReader(f, sum)
	}
	if err := c.t.write(h, content); err != nil {
		return err
	}
	if sum != nil {
		c.sums = append(c.sums, sum.sum())
	}
	after, err := f.stat()
	if err != nil {
		return err
	}
	if statID(&after) != statID(&it.st) {
		c.changed = true
	}
	if c.tree != nil && len(c.placed) < wasteFiles {
		c.placed = append(c.placed, placed{it.path, h.Name, h.Size, h.ModTime.Unix()})
	}
	c.bytes += h.Size
	if now := time.Now(); now.Sub(c.shown) > 200*time.Millisecond {
		c.shown = now
		c.vertex.progress(c.bytes, 0)
	}
	return nil
}

// unpack spreads a local archive into the destination; done is false when the file is none.
func (c *copier) unpack(v *view, it *item, when time.Time) (done bool, err error) {
	f, err := v.openFile(it)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return c.unpackFile(f, when, it.path)
}

func (c *copier) unpackFile(f *os.File, when time.Time, name string) (done bool, err error) {
	var head [6]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		return false, nil //nolint:nilerr // too short for an archive; a real read error shows when it is copied
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	r, _, err := compress.Reader(f)
	if errors.Is(err, compress.ErrUnsupported) {
		return false, fmt.Errorf("unpack %s: %w", name, err)
	}
	if err != nil {
		return false, nil //nolint:nilerr // begins like a compressed file and is none
	}
	defer r.Close()
	br := bufio.NewReaderSize(r, 64<<10)
	block, err := br.Peek(layertar.Block)
	if err != nil || !isTar(block) {
		return false, nil //nolint:nilerr // not a tar inside: copied as it is, as Docker does
	}
	at, err := c.t.resolve(c.op.Dest, true)
	if err != nil {
		return false, err
	}
	if err := c.t.mkdirAll(at, c.dirOwner(), 0o755, when); err != nil {
		return false, err
	}
	tr := tar.NewReader(br)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("unpack %s: %w", name, err)
		}
		if n >= layertar.MaxEntries {
			return false, fmt.Errorf("unpack %s: more than %d entries", name, layertar.MaxEntries)
		}
		if err := c.entry(h, tr, at, when); err != nil {
			return false, fmt.Errorf("unpack %s: %w", name, &layertar.EntryError{Name: h.Name, Err: err})
		}
	}
}

// entry writes one entry of an archive below the folder at.
func (c *copier) entry(h *tar.Header, content io.Reader, at string, when time.Time) error {
	place := func(name string) (string, error) {
		parts, err := layertar.Split(strings.TrimLeft(name, "/"))
		if err != nil || len(parts) == 0 {
			return "", err
		}
		// Links of the stage or the archive itself are followed for the folders on the way, inside the root.
		dir, err := c.t.resolve(join(at, strings.Join(parts[:len(parts)-1], "/")), true)
		return join(dir, parts[len(parts)-1]), err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if layertar.IsSparse(h) {
		return errors.New("sparse files are not taken")
	}
	p, err := place(h.Name)
	if err != nil || p == "" {
		return err
	}
	out := *h
	out.Name = p
	if c.chown != nil {
		out.Uid, out.Gid = c.chown.uid, c.chown.gid
	}
	if h.Typeflag == tar.TypeLink {
		if out.Linkname, err = place(h.Linkname); err != nil {
			return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
		}
	}
	if parent := path.Dir(p); parent != "." {
		if err := c.t.mkdirAll(parent, c.dirOwner(), 0o755, when); err != nil {
			return err
		}
	}
	return c.t.replace(&out, content)
}
