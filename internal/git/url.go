package git

import (
	"fmt"
	"net/url"
	"path"
	"strconv"
	"strings"
)

// Source is what a git URL in BuildKit's form says.
type Source struct {
	// Remote is the repository, as git takes it. It may hold a password: show Shown instead.
	Remote string
	// Ref is a branch, a tag, a full ref or a full commit id; "" is the remote's default branch.
	Ref string
	// Subdir is the folder that is meant, clean and without a leading slash; "" is all.
	Subdir string
	// Checksum is the beginning of the id that the commit, or its tag, must have.
	Checksum string
	// KeepDir keeps .git, Submodules fetches them; nil is not said.
	KeepDir, Submodules *bool
	// ByCommit takes Checksum, which is a full commit id then, without asking what Ref is.
	ByCommit bool
	// Short says that the URL had no scheme, as in github.com/x/y, so that a folder may be meant as well.
	Short bool
}

// Parse reads a reference to a git repository:
//
//	https://host/x.git[#ref[:folder]]   the path ends in .git; http likewise
//	git://host/x  ssh://host/x  user@host:x  github.com/x/y
//
// A query may say ref, tag, branch, subdir, checksum, commit, keep-git-dir, submodules, mtime and fetch-by-commit. ok is false for what
// is something else; an error is one of a git reference that is wrong.
func Parse(s string) (src Source, ok bool, err error) {
	var query url.Values
	var fragment string
	switch {
	case strings.HasPrefix(s, "github.com/"):
		u, err := url.Parse("https://" + s)
		if err != nil {
			return src, false, nil //nolint:nilerr // then it is a folder's name
		}
		src.Short = true
		query, fragment = u.Query(), u.Fragment
		src.Remote = bare(u)
	case strings.Contains(s, "://"):
		u, err := url.Parse(s)
		if err != nil {
			return src, false, nil //nolint:nilerr // whoever takes it for a URL of another kind says what is wrong with it
		}
		switch u.Scheme {
		case "http", "https":
			if !strings.HasSuffix(u.Path, ".git") {
				return src, false, nil
			}
		case "git", "ssh":
		default:
			return src, false, nil
		}
		if u.Hostname() == "" || strings.HasPrefix(u.Hostname(), "-") || strings.HasPrefix(u.User.Username(), "-") {
			return src, true, fmt.Errorf("git URL %s: there is no host of that name", u.Redacted())
		}
		if query, err = url.ParseQuery(u.RawQuery); err != nil {
			return src, true, fmt.Errorf("git URL %s: %w", u.Redacted(), err)
		}
		fragment, src.Remote = u.Fragment, bare(u)
	default:
		remote, rawQuery, frag, found := scp(s)
		if !found {
			return src, false, nil
		}
		if query, err = url.ParseQuery(rawQuery); err != nil {
			return src, true, fmt.Errorf("git URL %s: %w", s, err)
		}
		fragment, src.Remote = frag, remote
	}
	var sub string
	src.Ref, sub, _ = strings.Cut(fragment, ":")
	src.Subdir = cleanSubdir(sub)
	if err := src.query(query); err != nil {
		return src, true, fmt.Errorf("git URL %s: %w", src.Shown(), err)
	}
	if err := src.check(); err != nil {
		return src, true, fmt.Errorf("git URL %s: %w", src.Shown(), err)
	}
	return src, true, nil
}

// Shown is the remote without a password.
func (s Source) Shown() string { return shown(s.Remote) }

func shown(remote string) string {
	u, err := url.Parse(remote)
	if err != nil || u.User == nil {
		return remote
	}
	return u.Redacted()
}

// String is the source in short form, without a password.
func (s Source) String() string {
	out := s.Shown()
	if s.Ref != "" || s.Subdir != "" {
		out += "#" + s.Ref
	}
	if s.Subdir != "" {
		out += ":" + s.Subdir
	}
	return out
}

// bare is u without query and fragment.
func bare(u *url.URL) string {
	c := *u
	c.RawQuery, c.ForceQuery, c.Fragment, c.RawFragment = "", false, "", ""
	return c.String()
}

func cleanSubdir(s string) string { return strings.TrimPrefix(path.Join("/", s), "/") }

// scp takes user@host:path[?query][#fragment] apart.
func scp(s string) (remote, query, fragment string, ok bool) {
	user, rest, ok := strings.Cut(s, "@")
	if !ok || !word(user, "-_") {
		return "", "", "", false
	}
	host, rest, ok := strings.Cut(rest, ":")
	if !ok || !word(host, "-.") {
		return "", "", "", false
	}
	rest, fragment, _ = strings.Cut(rest, "#")
	where, query, _ := strings.Cut(rest, "?")
	return user + "@" + host + ":" + where, query, fragment, where != ""
}

// word reports whether s begins with a letter or digit and has nothing but those and the bytes of also.
func word(s, also string) bool {
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune(also, rune(c))) {
			return false
		}
	}
	return s != ""
}

// query takes the parameters in.
func (s *Source) query(q url.Values) error {
	var tag, branch string
	for k, values := range q {
		if len(values) > 1 {
			return fmt.Errorf("query %q has multiple values", k)
		}
		v := ""
		if len(values) == 1 {
			v = values[0]
		}
		switch k {
		case "submodules", "keep-git-dir", "fetch-by-commit":
			on := true
			if v != "" {
				var err error
				if on, err = strconv.ParseBool(v); err != nil {
					return fmt.Errorf("invalid %s value: %q", k, v)
				}
			}
			switch k {
			case "submodules":
				s.Submodules = &on
			case "keep-git-dir":
				s.KeepDir = &on
			default:
				s.ByCommit = on
			}
			continue
		}
		if v == "" {
			return fmt.Errorf("query %q has no value", k)
		}
		switch k {
		case "ref":
			if s.Ref != "" && s.Ref != v {
				return fmt.Errorf("ref conflicts: %q vs %q", s.Ref, v)
			}
			s.Ref = v
		case "tag":
			tag = "refs/tags/" + strings.TrimPrefix(v, "refs/tags/")
		case "branch":
			branch = "refs/heads/" + strings.TrimPrefix(v, "refs/heads/")
		case "subdir":
			if sub := cleanSubdir(v); s.Subdir != "" && s.Subdir != sub {
				return fmt.Errorf("subdir conflicts: %q vs %q", s.Subdir, v)
			}
			s.Subdir = cleanSubdir(v)
		case "checksum", "commit":
			s.Checksum = v
		case "mtime":
			if v != "checkout" && v != "commit" {
				return fmt.Errorf(`invalid mtime value: %q (must be "checkout" or "commit")`, v)
			}
		default:
			return fmt.Errorf("unexpected query %q", k)
		}
	}
	if tag != "" && branch != "" {
		return fmt.Errorf("branch conflicts with tag")
	}
	for _, full := range []string{tag, branch} {
		if full != "" && s.Ref != "" && s.Ref != full {
			return fmt.Errorf("ref conflicts: %q vs %q", s.Ref, full)
		}
		if full != "" {
			s.Ref = full
		}
	}
	return nil
}

// check refuses what git would take for something else than it says.
func (s *Source) check() error {
	// What git itself has no refs of; * and its like are patterns to ls-remote.
	if strings.HasPrefix(s.Ref, "-") || strings.ContainsAny(s.Ref, " ~^:?*[\\\x7f") || strings.ContainsFunc(s.Ref, control) || strings.Contains(s.Ref, "..") {
		return fmt.Errorf("invalid git ref %q", s.Ref)
	}
	if strings.ContainsFunc(s.Remote, control) || strings.ContainsFunc(s.Subdir, func(r rune) bool { return r == 0 }) {
		return fmt.Errorf("it has control characters")
	}
	if s.Checksum != "" && !isHex(s.Checksum) {
		return fmt.Errorf("invalid checksum %s for Git URL, expected hex commit hash", s.Checksum)
	}
	if s.ByCommit && !isCommit(s.Checksum) && !isCommit(s.Ref) {
		return fmt.Errorf("fetch-by-commit requires a full commit id as checksum or ref")
	}
	return nil
}

func control(r rune) bool { return r < ' ' }

func isHex(s string) bool { return s != "" && strings.Trim(s, "0123456789abcdefABCDEF") == "" }

// isCommit reports whether s is a whole commit id, SHA-1 or SHA-256.
func isCommit(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}
