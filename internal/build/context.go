package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"conex/internal/compress"
	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/layertar"
	"conex/internal/safepath"

	"github.com/moby/patternmatcher/ignorefile"
	"golang.org/x/sys/unix"
)

// input is what a build reads: the Dockerfile and the context.
type input struct {
	name   string // the Dockerfile's, for messages
	source []byte
	view   view
	// ignoreName is the ignore file's name, "" without one.
	ignoreName string
	stage      *disk.Stage
	remote     *remote // where the view is from; it closes it
	vertex     *vertex // the line of the Dockerfile in the display
}

func (in *input) close() error {
	var errs []error
	switch {
	case in.remote != nil:
		errs = append(errs, in.remote.close())
	case in.view.root != nil:
		errs = append(errs, in.view.root.Close())
	}
	if in.stage != nil {
		errs = append(errs, in.stage.Close())
	}
	return errors.Join(errs...)
}

// openInput finds the Dockerfile and the context of a request; remote is the context if it was fetched.
func (b *Builder) openInput(ctx context.Context, req *Request, remote *remote) (in *input, err error) {
	in = &input{remote: remote}
	defer func() {
		if err != nil {
			err = errors.Join(err, in.close())
		}
	}()
	if req.Context == "-" {
		if req.Dockerfile == "-" {
			return in, errors.New("context and Dockerfile can't both come from stdin")
		}
		return in, in.fromStdin(ctx, b, req)
	}
	if remote != nil {
		in.view = *remote.view
		if remote.source != nil && req.Dockerfile != "-" && !isHTTP(req.Dockerfile) {
			in.name, in.source = "Dockerfile", remote.source
			return in, nil
		}
		return in, in.inside(ctx, b, req, req.Context)
	}
	dir := req.Context
	if in.view.root, err = openContext(dir); err != nil {
		return in, err
	}
	real, err := realPath(dir)
	if err != nil {
		return in, err
	}
	in.view.stats = openStatCache(b.Root, real)
	ignoreBeside := ""
	switch given, err := in.given(ctx, b, req); {
	case err != nil:
		return in, err
	case !given:
		p, err := findDockerfile(dir, req.Dockerfile)
		if err != nil {
			return in, err
		}
		in.name = display(p)
		ignoreBeside = p + ".dockerignore"
		f, err := os.Open(p)
		if err != nil {
			return in, fmt.Errorf("open Dockerfile: %w", err)
		}
		in.source, err = readDockerfile(f)
		f.Close()
		if err != nil {
			return in, err
		}
	}
	if ignoreBeside != "" {
		data, err := readBounded(ignoreBeside, maxIgnore)
		if err == nil {
			return in, in.ignore(display(ignoreBeside), data)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			return in, fmt.Errorf("read %s: %w", ignoreBeside, err)
		}
	}
	if err = in.ignoreFrom(".dockerignore"); in.ignoreName != "" {
		in.ignoreName = display(filepath.Join(dir, in.ignoreName))
	}
	return in, err
}

// realPath is a folder's path from the root, by which its files are remembered and builds of it are found again.
func realPath(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

func openContext(dir string) (*os.File, error) {
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("unable to prepare context: path %q not found", dir)
	case errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("unable to prepare context: path %q is not a folder", dir)
	case err != nil:
		return nil, fmt.Errorf("open context: %w", err)
	}
	return root, nil
}

// given takes a Dockerfile that is not a file of the context or beside it: from stdin, or an address.
func (in *input) given(ctx context.Context, b *Builder, req *Request) (ok bool, err error) {
	switch {
	case req.Dockerfile == "-":
		in.name = "Dockerfile (stdin)"
		in.source, err = readDockerfile(req.Stdin)
		return true, err
	case isHTTP(req.Dockerfile):
		in.name, in.source, err = b.urlDockerfile(ctx, req)
		return true, err
	}
	return false, nil
}

// inside finds the Dockerfile and the ignore file in a context that is no folder of the user's; where says which in messages.
func (in *input) inside(ctx context.Context, b *Builder, req *Request, where string) error {
	given, err := in.given(ctx, b, req)
	if err != nil {
		return err
	}
	if given {
		if in.view.root == nil {
			return nil
		}
		return in.ignoreFrom(".dockerignore")
	}
	names := []string{req.Dockerfile}
	if req.Dockerfile == "" {
		names = []string{"Dockerfile", "dockerfile"}
	}
	for _, name := range names {
		in.source, err = safepath.ReadFile(in.view.root, name, dockerfile.MaxSize)
		if err == nil {
			in.name = name
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read Dockerfile: %w", err)
		}
	}
	if in.name == "" {
		return fmt.Errorf("%w: %s is not in %s", ErrNoDockerfile, names[0], where)
	}
	if err := in.ignoreFrom(in.name + ".dockerignore"); err != nil || in.view.ignore != nil {
		return err
	}
	return in.ignoreFrom(".dockerignore")
}

// readBounded reads a regular file; another, as a pipe, would keep us waiting.
func readBounded(p string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("not a regular file"))
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("longer than %d bytes", limit)
	}
	return data, err
}

// findDockerfile gives the file's path: name relative to the working folder, then to the context; by default Dockerfile (or dockerfile)
// in the context.
func findDockerfile(dir, name string) (string, error) {
	candidates := []string{filepath.Join(dir, "Dockerfile"), filepath.Join(dir, "dockerfile")}
	if name != "" {
		candidates = []string{name}
		if !filepath.IsAbs(name) {
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	for _, c := range candidates {
		st, err := os.Stat(c)
		// A pipe is one that a shell makes of <(...), or /dev/stdin: given by name, since who waits for one in a context may wait for ever.
		if err == nil && !st.Mode().IsRegular() && (name == "" || st.Mode()&(fs.ModeNamedPipe|fs.ModeCharDevice) == 0) {
			return "", fmt.Errorf("%w: %s is not a file", ErrNoDockerfile, c)
		}
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("open Dockerfile: %w", err)
		}
	}
	return "", fmt.Errorf("%w: %s does not exist", ErrNoDockerfile, candidates[0])
}

// display shortens a path for messages: relative to the working folder when it lies below.
func display(p string) string {
	wd, err := os.Getwd()
	if err != nil {
		return p
	}
	abs, err := filepath.Abs(p)
	if err != nil {
		return p
	}
	if rel, err := filepath.Rel(wd, abs); err == nil && !strings.HasPrefix(rel, "../") && rel != ".." {
		return rel
	}
	return p
}

func readDockerfile(r io.Reader) ([]byte, error) {
	if r == nil {
		return nil, fmt.Errorf("%w: stdin is not given", ErrNoDockerfile)
	}
	data, err := io.ReadAll(io.LimitReader(r, dockerfile.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read Dockerfile: %w", err)
	}
	return data, nil
}

// ignoreFrom reads an ignore file in the context, if there is one.
func (in *input) ignoreFrom(name string) error {
	data, err := safepath.ReadFile(in.view.root, name, maxIgnore)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return in.ignore(name, data)
}

func (in *input) ignore(name string, data []byte) error {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if err := checkPatterns(patterns); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	in.view.ignore, in.ignoreName = patterns, name
	// A pattern that is wrong shall say so even if no COPY uses it.
	_, err = (&view{ignore: patterns}).selection(context.Background(), nil, selectOptions{})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// fromStdin reads a Dockerfile or a tar, plain or compressed, from stdin.
func (in *input) fromStdin(ctx context.Context, b *Builder, req *Request) error {
	if req.Stdin == nil {
		return fmt.Errorf("%w: stdin is not given", ErrNoDockerfile)
	}
	r, kind, err := compress.Reader(req.Stdin)
	if err != nil {
		return fmt.Errorf("read context: %w", err)
	}
	defer r.Close()
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(layertar.Block)
	if err != nil && err != io.EOF {
		return fmt.Errorf("read context: %w", err)
	}
	if kind == compress.None && !isTar(head) {
		in.name = "Dockerfile (stdin)"
		in.source, err = readDockerfile(br)
		return err
	}
	if in.stage, err = b.Root.Stage(); err != nil {
		return err
	}
	dir := filepath.Join(in.stage.Dir, "context")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if in.view.root, err = openContext(dir); err != nil {
		return err
	}
	if err := extractContext(ctx, in.view.root, br); err != nil {
		return fmt.Errorf("context on stdin: %w", err)
	}
	return in.inside(ctx, b, req, "the tar on stdin")
}

// isTar reports whether a stream that begins with head is a tar.
func isTar(head []byte) bool {
	if len(head) < layertar.Block {
		return false
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	// A PAX or GNU long name header is followed by more than head holds.
	return err == nil || errors.Is(err, io.ErrUnexpectedEOF) && bytes.HasPrefix(head[257:], []byte("ustar"))
}

// extractContext unpacks an untrusted tar below root. Names that lead out of it, devices and sparse files are errors; owners and times
// other than a file's modification time do not matter to COPY and are dropped.
func extractContext(ctx context.Context, root *os.File, r io.Reader) error {
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if n >= layertar.MaxEntries {
			return fmt.Errorf("tar has more than %d entries", layertar.MaxEntries)
		}
		if err := extractEntry(root, h, tr); err != nil {
			return &layertar.EntryError{Name: h.Name, Err: err}
		}
	}
}

func extractEntry(root *os.File, h *tar.Header, content io.Reader) error {
	parts, err := layertar.Split(h.Name)
	if err != nil || len(parts) == 0 {
		return err
	}
	if layertar.IsSparse(h) {
		return errors.New("sparse files are not taken in a context")
	}
	name := parts[len(parts)-1]
	dir, err := safepath.MkdirAll(root, path.Join(parts[:len(parts)-1]...), 0o755)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd := int(dir.Fd())
	mode := uint32(h.Mode & 0o7777)
	if h.Typeflag == tar.TypeDir {
		err := unix.Mkdirat(fd, name, 0o700)
		if err != nil && err != unix.EEXIST {
			return err
		}
		return chmodAt(dir, name, mode, unix.O_DIRECTORY)
	}
	if err := unix.Unlinkat(fd, name, 0); err != nil && err != unix.ENOENT {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := safepath.OpenNoLinks(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = copyBuffered(f, content)
		if err == nil {
			err = unix.Fchmod(int(f.Fd()), mode)
		}
		if err == nil {
			ts := unix.NsecToTimespec(h.ModTime.UnixNano())
			err = unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), []unix.Timespec{ts, ts}, 0)
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return err
	case tar.TypeSymlink:
		return unix.Symlinkat(h.Linkname, fd, name)
	case tar.TypeLink:
		old, err := layertar.Split(h.Linkname)
		if err != nil {
			return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
		}
		f, err := safepath.Open(root, path.Join(old...), unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Linkat(int(f.Fd()), "", fd, name, unix.AT_EMPTY_PATH)
	case tar.TypeXGlobalHeader:
		return nil
	}
	return fmt.Errorf("type %q is not taken in a context", h.Typeflag)
}

// chmodAt sets the mode of a name in dir, which must not be a link.
func chmodAt(dir *os.File, name string, mode uint32, flags int) error {
	f, err := safepath.OpenNoLinks(dir, name, unix.O_RDONLY|flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fchmod(int(f.Fd()), mode)
}
