package git

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Commit is what a source's ref leads to at the moment.
type Commit struct {
	// ID is the commit's or, for an annotated tag, the tag's; Peeled is the commit then.
	ID, Peeled string
	// Ref is the full name that led there, "" when the source names the commit itself.
	Ref string
}

// Tree identifies the files: two commits with one Tree have the same.
func (c Commit) Tree() string {
	if c.Peeled != "" {
		return c.Peeled
	}
	return c.ID
}

func hostOf(remote string) string {
	u, err := url.Parse(remote)
	if err != nil {
		return ""
	}
	return u.Host
}

// Resolve asks the remote what the source's ref is. A source that names a commit needs no answer.
func (c *Client) Resolve(ctx context.Context, s Source) (Commit, error) {
	commit, err := c.resolve(ctx, s)
	if err != nil {
		return commit, s.wrap(err)
	}
	if s.Checksum != "" && !strings.HasPrefix(commit.ID, s.Checksum) && (commit.Peeled == "" || !strings.HasPrefix(commit.Peeled, s.Checksum)) {
		return commit, s.wrap(fmt.Errorf("expected checksum to match %s, got %s", s.Checksum, commit.Tree()))
	}
	return commit, nil
}

func (s Source) wrap(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s", askTime)
	}
	return fmt.Errorf("fetch %s: %w", s, err)
}

func (c *Client) resolve(ctx context.Context, s Source) (Commit, error) {
	switch {
	case isCommit(s.Ref):
		return Commit{ID: s.Ref}, nil
	case s.ByCommit:
		ref := s.Ref
		if ref != "" && !strings.HasPrefix(ref, "refs/") {
			ref = "refs/heads/" + ref
		}
		return Commit{ID: s.Checksum, Ref: ref}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if s.Ref == "" {
		out, err := c.run(ctx, command{args: []string{"ls-remote", "--symref", "--", s.Remote, "HEAD"}, remote: s.Remote})
		if err != nil {
			return Commit{}, err
		}
		var found Commit
		for line := range strings.Lines(out) {
			value, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
			ref, symbolic := strings.CutPrefix(value, "ref: ")
			switch {
			case name != "HEAD":
			case symbolic:
				found.Ref = ref
			default:
				found.ID = value
			}
		}
		if !isCommit(found.ID) {
			return Commit{}, errors.New("the repository is empty: it has no default branch")
		}
		if strings.HasPrefix(found.Ref, "-") || !strings.HasPrefix(found.Ref, "refs/") {
			found.Ref = "HEAD"
		}
		return found, nil
	}
	out, err := c.run(ctx, command{args: []string{"ls-remote", "--", s.Remote, s.Ref, s.Ref + "^{}"}, remote: s.Remote})
	if err != nil {
		return Commit{}, err
	}
	refs := map[string]string{}
	for line := range strings.Lines(out) {
		if id, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "\t"); ok && isCommit(id) {
			refs[name] = id
		}
	}
	// A full name goes before a branch, and that before a tag, as git checkout has it.
	tag := "refs/tags/" + strings.TrimPrefix(s.Ref, "refs/tags/")
	for _, name := range []string{"refs/" + strings.TrimPrefix(s.Ref, "refs/"), "refs/heads/" + strings.TrimPrefix(s.Ref, "refs/heads/"), tag} {
		if id := refs[name]; id != "" {
			found := Commit{ID: id, Ref: name}
			if name == tag {
				found.Peeled = refs[tag+"^{}"]
			}
			return found, nil
		}
	}
	return Commit{}, fmt.Errorf("repository does not contain ref %s", s.Ref)
}

// Options say how a commit's files are wanted.
type Options struct {
	// KeepDir leaves .git in the tree. Submodules checks them out too.
	KeepDir, Submodules bool
}

// Fetch brings a commit's files into the empty folder tree; scratch is another, for git's own. All times are the commit's, modes 0755
// or 0644, whatever the umask.
func (c *Client) Fetch(ctx context.Context, s Source, commit Commit, o Options, scratch, tree string) error {
	if err := c.fetch(ctx, s, commit, o, scratch, tree); err != nil {
		return s.wrap(err)
	}
	return nil
}

// wanted is where a fetched ref lies that shall not show.
const wanted = "refs/conex/wanted"

func (c *Client) fetch(ctx context.Context, s Source, commit Commit, o Options, scratch, tree string) error {
	dir := filepath.Join(scratch, "git")
	if o.KeepDir {
		dir = filepath.Join(tree, ".git")
	}
	git := func(args ...string) (string, error) {
		return c.run(ctx, command{args: args, dir: dir, tree: tree, remote: s.Remote})
	}
	initial := []string{"init", "--quiet", "--template="}
	if len(commit.ID) == 64 {
		initial = append(initial, "--object-format=sha256")
	}
	if _, err := git(initial...); err != nil {
		return err
	}
	if _, err := git("config", "remote.origin.url", s.Remote); err != nil {
		return err
	}
	if err := c.objects(s, commit, o, git); err != nil {
		return err
	}
	if _, err := git("checkout", "--quiet", "--force", "--detach", commit.ID+"^{commit}"); err != nil {
		return err
	}
	if s.Checksum != "" {
		out, err := git("rev-parse", commit.ID, commit.ID+"^{commit}")
		if err != nil {
			return err
		}
		id, peeled, _ := strings.Cut(strings.TrimSpace(out), "\n")
		if !strings.HasPrefix(id, s.Checksum) && !strings.HasPrefix(peeled, s.Checksum) {
			return fmt.Errorf("expected checksum to match %s, got %s", s.Checksum, peeled)
		}
	}
	if o.Submodules {
		if err := submodules(git, tree); err != nil {
			return err
		}
	}
	out, err := git("log", "-1", "--format=%ct", commit.ID+"^{commit}")
	if err != nil {
		return err
	}
	sec, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil || sec < 0 {
		sec = 0
	}
	if o.KeepDir {
		if err := tidy(git, dir, s); err != nil {
			return err
		}
	}
	return normalise(tree, time.Unix(sec, 0), o.KeepDir)
}

// objects fetches the commit as shallow as the remote lets us. The ref may have moved since it was resolved: the commit counts.
func (c *Client) objects(s Source, commit Commit, o Options, git func(...string) (string, error)) error {
	there := func() bool {
		_, err := git("cat-file", "-e", commit.ID+"^{commit}")
		return err == nil
	}
	target := wanted
	if o.KeepDir && strings.HasPrefix(commit.Ref, "refs/") {
		target = commit.Ref
	}
	fetch := func(depth bool, specs ...string) error {
		args := []string{"fetch", "--quiet", "--no-tags", "--force", "--update-head-ok", "--no-write-fetch-head"}
		if depth {
			args = append(args, "--depth=1")
		}
		_, err := git(append(append(args, "--", "origin"), specs...)...)
		if depth && has(err, "shallow", "--depth") { // the dumb protocol has all or nothing
			args = append(args[:len(args)-1], "--", "origin")
			_, err = git(append(args, specs...)...)
		}
		return err
	}
	var err error
	if commit.Ref != "" && !s.ByCommit {
		if err = fetch(true, "+"+commit.Ref+":"+target); err == nil && there() {
			return nil
		}
	}
	if err == nil {
		err = fetch(true, "+"+commit.ID+":"+target)
	}
	if has(err, "not our ref", "unadvertised object", "no such remote ref", "couldn't find remote ref") {
		// A remote that gives nothing but what its refs name: all of it, then.
		err = fetch(false, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
		if err == nil && !there() {
			return fmt.Errorf("commit %s is not in the repository", commit.ID)
		}
	}
	if err == nil && !there() {
		return fmt.Errorf("%s is no commit", commit.ID)
	}
	return err
}

// submodules checks them out, to any depth. The URLs are the repository's own: the protocols that git may speak are ours.
func submodules(git func(...string) (string, error), tree string) error {
	if _, err := os.Lstat(filepath.Join(tree, ".gitmodules")); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, err := git("submodule", "--quiet", "update", "--init", "--recursive", "--depth=1")
	if has(err, "shallow", "--depth") {
		_, err = git("submodule", "--quiet", "update", "--init", "--recursive")
	}
	return err
}

// tidy takes out of a .git that stays what says when and by whom it was made.
func tidy(git func(...string) (string, error), dir string, s Source) error {
	if _, err := git("config", "remote.origin.url", s.Shown()); err != nil {
		return err
	}
	if _, err := git("config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*"); err != nil {
		return err
	}
	for _, name := range []string{"logs", "FETCH_HEAD", "hooks", "refs/conex"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// normalise gives all files one time and the two modes that git knows. Without keep, the .git of submodules goes.
func normalise(tree string, when time.Time, keep bool) error {
	ts := unix.NsecToTimespec(when.UnixNano())
	times := []unix.Timespec{ts, ts}
	var dirs []string
	err := filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Name() == ".git" && !keep {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		switch {
		case d.IsDir():
			dirs = append(dirs, p)
			if err := os.Chmod(p, 0o755); err != nil {
				return err
			}
		case d.Type().IsRegular():
			info, err := d.Info()
			if err != nil {
				return err
			}
			mode := fs.FileMode(0o644)
			if info.Mode()&0o100 != 0 {
				mode = 0o755
			}
			if err := os.Chmod(p, mode); err != nil {
				return err
			}
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, times, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		return err
	}
	// Deleting and setting children touches a folder.
	for _, p := range dirs {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "utimes", Path: p, Err: err}
		}
	}
	return nil
}

// TokenHeader is the Authorization that a token stands for.
func TokenHeader(token string) string {
	return "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+token))
}
