package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/compress"
	"conex/internal/container"
	"conex/internal/layers"
	"conex/internal/runtime"
	"conex/internal/safepath"
	"conex/internal/treecopy"

	"golang.org/x/sys/unix"
)

// CopyRequest asks to copy a file or folder between the machine and a container. Paths have Docker's meaning: a folder that ends in "/." is
// what is in it, and an existing folder as destination takes the source in.
type CopyRequest struct {
	Container string
	// Path is the place in the container.
	Path string
	// Local is the place on the machine. With Tar instead, it is an archive that is written or read.
	Local string
	// FollowLink copies what a symbolic link in the place of the source leads to.
	FollowLink bool
	// Archive keeps owners, set-id bits and devices of what comes from a container. What goes into one belongs to the container's user
	// with it, if the container has one.
	Archive bool
	// Progress is told how much has been copied. May be nil.
	Progress func(size int64)
	// LeftOut is told of devices that are not copied to the machine. May be nil.
	LeftOut func(path string)
	// Torn is as in ExportRequest.
	Torn func(path string)
}

// CopyFrom copies from a container to the machine and returns how much, counted as the size of a tar.
func (e *Engine) CopyFrom(ctx context.Context, req CopyRequest) (int64, error) {
	if req.Path == "" {
		return 0, invalid("bad parameter: path cannot be empty")
	}
	if err := checkOutputPath(req.Local); err != nil {
		return 0, err
	}
	v, src, err := e.copySource(ctx, req)
	if err != nil {
		return 0, err
	}
	defer v.Close()
	defer src.close()
	host, err := safepath.OpenRoot("/")
	if err != nil {
		return 0, err
	}
	defer host.Close()
	dst, err := resolveSpot(host, req.Local, true)
	if err != nil {
		return 0, localError(req.Local, err)
	}
	defer dst.close()
	as, dir, err := place(src, dst)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	size, err := treecopy.Copy(ctx, src.dir, src.name, dir, as, treecopy.Options{
		// Another owner has what was the container's: what it may do to others stays behind.
		From: v.ids, KeepOwner: req.Archive, SetID: req.Archive, Caps: req.Archive, Devices: req.Archive, LeftOut: req.LeftOut, Progress: req.Progress,
	})
	return size, inFolder(dst, err)
}

// CopyOut writes a file or folder of a container to w as a tar.
func (e *Engine) CopyOut(ctx context.Context, req CopyRequest, w io.Writer) error {
	if req.Path == "" {
		return invalid("bad parameter: path cannot be empty")
	}
	v, src, err := e.copySource(ctx, req)
	if err != nil {
		return err
	}
	defer v.Close()
	defer src.close()
	as := src.base
	if src.followed != "" && !src.asserted {
		as = src.followed
	}
	if src.contents {
		as = "."
	}
	var id func(int) int
	if v.ids != nil {
		id = v.ids.Inside
	}
	return layers.WriteEntry(ctx, w, src.dir, src.name, as, id, func(path string) {
		if req.Torn != nil {
			req.Torn(path)
		}
	})
}

// copySource finds what is to be copied in a container.
func (e *Engine) copySource(ctx context.Context, req CopyRequest) (*view, *spot, error) {
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return nil, nil, err
	}
	v, err := e.view(ctx, n, false)
	if err != nil {
		return nil, nil, err
	}
	src, err := resolveSpot(v.root, "/"+req.Path, req.FollowLink)
	if err == nil && !src.exists {
		err = &missingError{src.path}
		src.close()
	}
	if err != nil {
		v.Close()
		return nil, nil, containerError(req.Container, err)
	}
	e.event(n.Record, "archive-path", nil)
	return v, src, nil
}

// CopyTo copies from the machine into a container and returns how much, counted as the size of a tar.
func (e *Engine) CopyTo(ctx context.Context, req CopyRequest) (int64, error) {
	return e.copyInto(ctx, req, func(v *view, dst *spot, o treecopy.Options) (int64, error) {
		host, err := safepath.OpenRoot("/")
		if err != nil {
			return 0, err
		}
		defer host.Close()
		src, err := resolveSpot(host, req.Local, req.FollowLink)
		if err == nil && !src.exists {
			err = &missingError{src.path}
			src.close()
		}
		if err != nil {
			return 0, localError(req.Local, err)
		}
		defer src.close()
		as, dir, err := place(src, dst)
		if err != nil {
			return 0, containerError(req.Container, err)
		}
		defer dir.Close()
		if err := e.checkWritable(dir, v); err != nil {
			return 0, err
		}
		size, err := treecopy.Copy(ctx, src.dir, src.name, dir, as, o)
		return size, inFolder(dst, err)
	})
}

// CopyIn puts what is in a tar, compressed or not, into a folder of a container.
func (e *Engine) CopyIn(ctx context.Context, req CopyRequest, r io.Reader) (int64, error) {
	return e.copyInto(ctx, req, func(v *view, dst *spot, o treecopy.Options) (int64, error) {
		if !dst.exists || !dst.isDir() {
			return 0, invalid("destination \"%s:%s\" must be a directory", req.Container, req.Path)
		}
		dir, err := dst.open()
		if err != nil {
			return 0, containerError(req.Container, err)
		}
		defer dir.Close()
		if err := e.checkWritable(dir, v); err != nil {
			return 0, err
		}
		plain, _, err := compress.Reader(r)
		if err != nil {
			return 0, fmt.Errorf("read the archive: %w", err)
		}
		defer plain.Close()
		o.SetID = true
		return treecopy.Extract(ctx, plain, v.root, dst.full(), o)
	})
}

// copyInto finds the destination in a container and lets copy do the work.
func (e *Engine) copyInto(ctx context.Context, req CopyRequest, copy func(v *view, dst *spot, o treecopy.Options) (int64, error)) (int64, error) {
	if req.Path == "" {
		return 0, invalid("bad parameter: path cannot be empty")
	}
	n, err := e.snapshot(ctx, req.Container)
	if err != nil {
		return 0, err
	}
	v, err := e.view(ctx, n, true)
	if err != nil {
		return 0, err
	}
	defer v.Close()
	dst, err := resolveSpot(v.root, "/"+req.Path, true)
	if err != nil {
		return 0, containerError(req.Container, err)
	}
	defer dst.close()
	if why := unfit(dst); why != "" {
		return 0, invalid(`destination "%s:%s" must be a directory or a regular file: %s`, req.Container, req.Path, why)
	}
	o := treecopy.Options{To: v.ids, KeepOwner: true, Caps: true, Devices: true, SetID: req.Archive, Progress: req.Progress}
	if req.Archive && n.Record.Config.User != "" {
		u, err := runtime.ResolveUser(v.root, n.Record.Config.User, nil)
		if err != nil {
			return 0, err
		}
		o.Owner = &treecopy.Owner{UID: int(u.UID), GID: int(u.GID)}
	}
	var size int64
	err = v.do(func() (err error) {
		size, err = copy(v, dst, o)
		return err
	})
	if err != nil {
		return size, err
	}
	if _, err := e.Containers().Load(n.Record.ID); errors.Is(err, container.ErrNotFound) {
		return size, conflict("container %s was removed while it was copied to", n.Record.Name)
	}
	e.event(n.Record, "extract-to-dir", nil)
	return size, nil
}

// checkWritable refuses a folder that is mounted read-only, in Docker's words.
func (e *Engine) checkWritable(dir *os.File, v *view) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	a, err := mountID(dir)
	if err != nil {
		return err
	}
	b, err := mountID(v.root)
	if err != nil {
		return err
	}
	if a == b {
		return invalid("container rootfs is marked read-only")
	}
	return invalid("mounted volume is marked read-only")
}

func mountID(f *os.File) (uint64, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, fmt.Errorf("look for mount: %w", err)
	}
	return st.Mnt_id, nil
}

// spot is where a path leads in a tree: a name in a folder, which need not exist.
type spot struct {
	dir  *os.File // the folder
	name string   // "." for the folder itself
	at   string   // the folder's path in the tree
	// base is the path's last part as it was given, followed the one that it led to by links, "" without.
	base, followed string
	path           string // as it was given, cleaned, or where its links led
	exists         bool
	// asserted says that the path ends as folders do, contents that it means what is in the folder.
	asserted, contents bool
	st                 unix.Stat_t
}

func (s *spot) close() { s.dir.Close() }

func (s *spot) isDir() bool { return s.st.Mode&unix.S_IFMT == unix.S_IFDIR }

// full is the path of an existing spot in the tree.
func (s *spot) full() string { return s.at + "/" + s.name }

// open opens a spot that is a folder.
func (s *spot) open() (*os.File, error) {
	return safepath.OpenNoLinks(s.dir, s.name, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// missingError says that a path does not exist.
type missingError struct{ path string }

func (e *missingError) Error() string { return "no such file or directory: " + e.path }

func (e *missingError) Is(target error) bool { return target == fs.ErrNotExist }

// errNotDirectory is what a path through a file ends with.
var errNotDirectory = errors.New("extraction point is not a directory")

// resolveSpot finds where path leads in a tree. Links on the way are followed, the last one with follow or when the path ends in a slash;
// where a followed link leads to nothing, that nothing is the spot.
func resolveSpot(root *os.File, path string, follow bool) (*spot, error) {
	s := &spot{asserted: strings.HasSuffix(path, "/") || filepath.Base(path) == ".", contents: filepath.Base(path) == "."}
	path = filepath.Clean(path)
	s.path, s.base = path, filepath.Base(path)
	if path == "/" {
		s.contents = true
	}
	for range 40 { // the kernel's own limit of links
		dir, name := filepath.Split(path)
		if name == "" || name == "." || name == ".." { // at the end of a link
			dir, name = path, "."
		}
		f, err := safepath.Open(root, dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, &missingError{filepath.Clean(dir)}
		case errors.Is(err, unix.ENOTDIR):
			return nil, errNotDirectory
		case err != nil:
			return nil, err
		}
		s.dir, s.name, s.at, s.exists = f, name, strings.TrimRight(dir, "/"), true
		err = unix.Fstatat(int(f.Fd()), name, &s.st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			s.exists = false
			return s, nil
		}
		if err == nil && s.st.Mode&unix.S_IFMT != unix.S_IFLNK {
			if s.asserted && !s.isDir() {
				s.exists = false
				if !follow {
					err = unix.ENOTDIR
				}
			}
			if err == nil {
				return s, nil
			}
		}
		if err == nil && !follow && !s.asserted {
			return s, nil
		}
		var target string
		if err == nil {
			target, err = readlinkat(f, name)
		}
		f.Close()
		if err != nil {
			return nil, &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		if !filepath.IsAbs(target) {
			target = dir + target // not cleaned: ".." behind a link is the kernel's to resolve
		}
		s.followed = filepath.Base(filepath.Clean(target))
		path, s.path = target, filepath.Clean(target)
	}
	return nil, &fs.PathError{Op: "lstat", Path: path, Err: unix.ELOOP}
}

func readlinkat(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// place says in which folder and under which name the copy of src is made for the destination dst, by Docker's rules.
func place(src, dst *spot) (as string, dir *os.File, err error) {
	name := src.base
	if src.contents {
		name = "."
	}
	switch {
	case dst.exists && dst.isDir():
		dir, err = dst.open()
		return name, dir, err
	case dst.exists && src.isDir():
		return "", nil, invalid("cannot copy directory")
	case !dst.exists && dst.asserted && !src.isDir():
		return "", nil, invalid("no such directory")
	}
	if dst.name == "." { // a link to nothing that ends in a slash
		return "", nil, &missingError{dst.path}
	}
	dir, err = safepath.OpenNoLinks(dst.dir, ".", unix.O_PATH|unix.O_DIRECTORY, 0)
	return dst.name, dir, err
}

// inFolder completes the path of what stands in the way.
func inFolder(dst *spot, err error) error {
	var ce *treecopy.ConflictError
	if errors.As(err, &ce) {
		dir := dst.path
		if !dst.exists || !dst.isDir() {
			dir = filepath.Dir(dir)
		}
		ce.Path = filepath.Join(dir, ce.Path)
	}
	return err
}

// containerError puts what is missing in a container into Docker's words.
func containerError(name string, err error) error {
	var me *missingError
	switch {
	case errors.As(err, &me):
		return &kindError{ErrNotFound, fmt.Errorf("Could not find the file %s in container %s", me.path, name)} //nolint:staticcheck // Docker's words
	case errors.Is(err, errNotDirectory):
		return &kindError{ErrInvalid, err}
	}
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return fmt.Errorf("container %s: %s: %w", name, pe.Path, pe.Err)
	}
	return err
}

// localError does it for the machine's files.
func localError(path string, err error) error {
	var me *missingError
	switch {
	case errors.As(err, &me):
		return &fs.PathError{Op: "lstat", Path: me.path, Err: unix.ENOENT}
	case errors.Is(err, errNotDirectory):
		return fmt.Errorf("%s: %w", path, unix.ENOTDIR)
	}
	return err
}

// unfit says why nothing can be copied to an existing spot, "" if it can.
func unfit(s *spot) string {
	if s.exists {
		switch s.st.Mode & unix.S_IFMT {
		case unix.S_IFCHR, unix.S_IFBLK:
			return "got a device"
		case unix.S_IFSOCK:
			return "got an irregular file"
		}
	}
	return ""
}

// checkOutputPath refuses places on the machine that nothing can be copied to, in Docker's words.
func checkOutputPath(path string) error {
	dir := filepath.Dir(filepath.Clean(path))
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return invalid("invalid output path: directory %q does not exist", dir)
	}
	st, err := os.Stat(path)
	if err != nil || st.IsDir() || st.Mode().IsRegular() {
		return nil //nolint:nilerr // a place that is not there yet
	}
	if st.Mode()&os.ModeDevice != 0 {
		return invalid("invalid output path: %q must be a directory or a regular file: got a device", path)
	}
	if st.Mode()&(os.ModeIrregular|os.ModeSocket) != 0 {
		return invalid("invalid output path: %q must be a directory or a regular file: got an irregular file", path)
	}
	return nil
}
