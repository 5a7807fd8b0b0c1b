package build

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"conex/internal/compress"
	"conex/internal/dockerfile"
	"conex/internal/git"
	"conex/internal/layertar"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// IsRemote reports whether a context's value is fetched over the network, as a git repository or over http, unless it is a folder's name.
func IsRemote(value string) bool {
	_, isGit, err := git.Parse(value)
	return isGit || err != nil || isHTTP(value)
}

func isHTTP(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	return ok && (strings.EqualFold(scheme, "http") || strings.EqualFold(scheme, "https"))
}

// remote is a context that was fetched: a tree, or a Dockerfile alone.
type remote struct {
	view   *view
	source []byte
	closer func() error
}

func (r *remote) close() error {
	if r.closer == nil {
		return nil
	}
	return r.closer()
}

// openRemote fetches the context if it is remote; nil otherwise.
func (b *Builder) openRemote(ctx context.Context, req *Request, j *journal) (_ *remote, err error) {
	if req.Context == "-" || isFolder(req.Context) || !IsRemote(req.Context) {
		return nil, nil
	}
	src, isGit, err := git.Parse(req.Context)
	if err != nil {
		return nil, err
	}
	title := "[internal] load remote build context"
	if isGit {
		title = "[internal] load git source " + src.String()
	}
	v := j.vertex("", title)
	v.start()
	var r *remote
	if isGit {
		if keep := req.BuildArgs["BUILDKIT_CONTEXT_KEEP_GIT_DIR"]; keep != nil {
			if on, err := strconv.ParseBool(*keep); err == nil && on {
				src.KeepDir = &on
			}
		}
		r, err = b.gitContext(ctx, req, src)
	} else {
		r, err = b.httpContext(ctx, req, v)
	}
	if err != nil {
		v.end(failed(ctx), "", err)
		return nil, err
	}
	v.end(Done, "", nil)
	return r, nil
}

// failed is how a line ends whose work did not succeed.
func failed(ctx context.Context) EventKind {
	if ctx.Err() != nil {
		return Canceled
	}
	return Failed
}

func isFolder(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.IsDir()
}

// gitClient answers remotes with the build's secrets and agent.
func gitClient(req *Request) *git.Client {
	c := &git.Client{}
	if paths := req.Agents["default"].Paths; len(paths) == 1 && isSocket(paths[0]) {
		c.AuthSock = paths[0]
	} else {
		c.Keys = paths
	}
	c.Header = func(host string) (string, error) {
		for _, s := range []string{"GIT_AUTH_HEADER." + host, "GIT_AUTH_TOKEN." + host, "GIT_AUTH_HEADER", "GIT_AUTH_TOKEN"} {
			secret, ok := req.Secrets[s]
			if !ok {
				continue
			}
			v, err := secretText(s, secret)
			if err != nil || strings.HasPrefix(s, "GIT_AUTH_HEADER") {
				return v, err
			}
			return git.TokenHeader(v), nil
		}
		return "", nil
	}
	return c
}

func isSocket(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode()&fs.ModeSocket != 0
}

// gitContext is a repository's tree as a context.
func (b *Builder) gitContext(ctx context.Context, req *Request, src git.Source) (*remote, error) {
	c := gitClient(req)
	commit, err := c.Resolve(ctx, src)
	if err != nil {
		return nil, err
	}
	v, closer, err := b.gitView(ctx, c, src, commit)
	if err != nil {
		return nil, err
	}
	return &remote{view: v, closer: closer}, nil
}

// gitView gives the files of a commit, from the cache or the repository.
func (b *Builder) gitView(ctx context.Context, c *git.Client, src git.Source, commit git.Commit) (*view, func() error, error) {
	o := gitOptions(src)
	tree, err := b.cachedTree(ctx, append([]string{"git", src.Remote}, gitKey(src, commit)...), treeInfo{Source: src.Shown(), Commit: commit.Tree()},
		func(ctx context.Context, files, scratch string) error {
			return c.Fetch(ctx, src, commit, o, scratch, files)
		})
	if err != nil {
		return nil, nil, err
	}
	return b.treeView(tree, src.Subdir)
}

// gitOptions are what a source says of how it is fetched.
func gitOptions(src git.Source) git.Options {
	return git.Options{
		// As in BuildKit a folder of the repository has no .git.
		KeepDir:    src.KeepDir != nil && *src.KeepDir && src.Subdir == "",
		Submodules: src.Submodules == nil || *src.Submodules,
	}
}

// gitKey is what the files of a source depend on, but for the remote and the folder.
func gitKey(src git.Source, commit git.Commit) []string {
	o := gitOptions(src)
	key := []string{commit.Tree(), strconv.FormatBool(o.Submodules)}
	if o.KeepDir {
		key = append(key, commit.ID, commit.Ref)
	}
	return key
}

// treeView opens a kept tree, or a folder in it, which the caller owns from now on.
func (b *Builder) treeView(tree *cachedTree, folder string) (_ *view, _ func() error, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, tree.close())
		}
	}()
	root, err := openContext(tree.dir)
	if err != nil {
		return nil, nil, err
	}
	if folder != "" {
		sub, err := safepath.OpenNoLinks(root, folder, unix.O_PATH|unix.O_DIRECTORY, 0)
		root.Close()
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return nil, nil, fmt.Errorf("the repository has no folder %q", folder)
		case err != nil:
			return nil, nil, err
		}
		root = sub
	}
	v := &view{root: root, stats: openStatCache(b.Root, filepath.Join(tree.dir, folder))}
	return v, func() error { return errors.Join(root.Close(), tree.close()) }, nil
}

// httpContext is what an address gives: an archive is the context, anything else a Dockerfile.
func (b *Builder) httpContext(ctx context.Context, req *Request, v *vertex) (*remote, error) {
	u, err := parseURL(req.Context)
	if err != nil {
		return nil, err
	}
	rec, file, _, err := b.fetcher(req).body(ctx, u, "", v.progress)
	if err != nil {
		return nil, fmt.Errorf("context %w", err)
	}
	defer file.Close()
	archive, err := archiveIn(file)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", shownURL(u), err)
	}
	if archive == nil {
		source, err := readDockerfile(file)
		return &remote{view: &view{}, source: source}, err
	}
	defer archive.Close()
	tree, err := b.cachedTree(ctx, []string{"tar", string(rec.Digest)}, treeInfo{Source: rec.URL, Commit: string(rec.Digest)},
		func(ctx context.Context, files, _ string) error {
			root, err := openContext(files)
			if err != nil {
				return err
			}
			defer root.Close()
			return extractContext(ctx, root, &watched{r: archive, total: -1, root: b.Root.Path()})
		})
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", shownURL(u), err)
	}
	view, closer, err := b.treeView(tree, "")
	if err != nil {
		return nil, err
	}
	return &remote{view: view, closer: closer}, nil
}

// archiveIn gives the plain tar in a file that stands at its beginning; nil, and the file at its beginning again, when it is none.
func archiveIn(file *os.File) (io.ReadCloser, error) {
	r, kind, err := compress.Reader(file)
	if err != nil {
		return nil, err
	}
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(layertar.Block)
	if err != nil && err != io.EOF {
		r.Close()
		return nil, err
	}
	if kind != compress.None || isTar(head) {
		return struct {
			io.Reader
			io.Closer
		}{br, r}, nil
	}
	r.Close()
	_, err = file.Seek(0, io.SeekStart)
	return nil, err
}

// urlDockerfile reads -f https://...
func (b *Builder) urlDockerfile(ctx context.Context, req *Request) (name string, source []byte, err error) {
	u, err := parseURL(req.Dockerfile)
	if err != nil {
		return "", nil, err
	}
	_, file, size, err := b.fetcher(req).body(ctx, u, "", nil)
	if err != nil {
		return "", nil, fmt.Errorf("read Dockerfile %w", err)
	}
	defer file.Close()
	if size > dockerfile.MaxSize {
		return "", nil, fmt.Errorf("read Dockerfile %s: it has %d bytes, more than %d", shownURL(u), size, dockerfile.MaxSize)
	}
	source, err = readDockerfile(file)
	return shownURL(u), source, err
}
