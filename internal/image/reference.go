package image

import (
	"errors"
	"fmt"
	"strings"

	"conex/internal/ocispec"
)

// Docker's defaults for what a short reference leaves out.
const (
	// DefaultDomain is the registry of references that name none.
	DefaultDomain = "docker.io"
	// DefaultTag is the tag of references with neither tag nor digest.
	DefaultTag = "latest"

	legacyDomain   = "index.docker.io"
	officialPrefix = "library/"
	maxPath        = 255
	maxTag         = 128
)

// ErrReference says that a string is not a reference. Its text, and that of errors that wrap it, are Docker's words.
var ErrReference = errors.New("invalid reference format")

// Reference names an image in a registry: domain/path[:tag][@digest], normalised as Docker does. It is comparable; the zero
// value names nothing.
//
// The parser is our own because github.com/distribution/reference compiles its regular expressions when the program starts,
// which costs every command 0.6 ms; the tests hold ours equal to it.
type Reference struct {
	domain, path, tag string
	digest            ocispec.Digest
}

// ParseReference normalises s: nginx becomes docker.io/library/nginx:latest.
func ParseReference(s string) (Reference, error) {
	if isHex64(s) {
		return Reference{}, fmt.Errorf("invalid repository name (%s), cannot specify 64-byte hexadecimal strings", s)
	}
	domain, rest := splitDomain(s)
	remote, _, _ := strings.Cut(rest, ":")
	if strings.ToLower(remote) != remote {
		return Reference{}, fmt.Errorf("%w: repository name (%s) must be lowercase", ErrReference, remote)
	}
	r := Reference{domain: domain, path: rest}
	if i := strings.IndexAny(rest, ":@"); i >= 0 {
		r.path, rest = rest[:i], rest[i:]
		if rest[0] == ':' {
			tag, _, _ := strings.Cut(rest[1:], "@")
			if !validTag(tag) {
				return Reference{}, ErrReference
			}
			r.tag, rest = tag, rest[1+len(tag):]
		}
		if rest != "" {
			if !looksLikeDigest(rest[1:]) {
				return Reference{}, ErrReference
			}
			d, err := ocispec.ParseDigest(rest[1:])
			if err != nil {
				return Reference{}, err
			}
			r.digest = d
		}
	}
	if !validDomain(domain) || !validPath(r.path) {
		return Reference{}, ErrReference
	}
	if len(r.path) > maxPath {
		return Reference{}, fmt.Errorf("repository name must not be more than %d characters", maxPath)
	}
	if r.tag == "" && r.digest == "" {
		r.tag = DefaultTag
	}
	return r, nil
}

// splitDomain finds out whether the part before the first slash names a registry, by Docker's rules: it has a dot or a colon, is
// localhost, or holds an upper-case letter.
func splitDomain(s string) (domain, rest string) {
	first, after, ok := strings.Cut(s, "/")
	if !ok {
		return DefaultDomain, officialPrefix + s
	}
	switch {
	case first == "localhost", strings.ContainsAny(first, ".:"), strings.ToLower(first) != first:
		domain, rest = first, after
		if first == legacyDomain {
			domain = DefaultDomain
		}
	default:
		domain, rest = DefaultDomain, s
	}
	if domain == DefaultDomain && !strings.Contains(rest, "/") {
		rest = officialPrefix + rest
	}
	return domain, rest
}

// Domain returns the registry, "docker.io" or "localhost:5000".
func (r Reference) Domain() string { return r.domain }

// Path returns the repository in the registry, "library/nginx".
func (r Reference) Path() string { return r.path }

// Tag returns the tag, "" if only a digest was given.
func (r Reference) Tag() string { return r.tag }

// Digest returns the manifest's digest, "" if only a tag was given.
func (r Reference) Digest() ocispec.Digest { return r.digest }

// Name returns domain/path.
func (r Reference) Name() string { return r.domain + "/" + r.path }

// HasTag reports whether a reference as people write it names a tag or digest, so that no default was taken.
func HasTag(s string) bool {
	return strings.ContainsAny(s[strings.LastIndexByte(s, '/')+1:], ":@")
}

// IsZero reports whether r names nothing.
func (r Reference) IsZero() bool { return r == Reference{} }

// WithDigest returns the reference to d in the same repository, without a tag.
func (r Reference) WithDigest(d ocispec.Digest) Reference {
	r.tag, r.digest = "", d
	return r
}

// String returns the full form, docker.io/library/nginx:latest.
func (r Reference) String() string { return r.Name() + r.suffix() }

// FamiliarName returns the repository as people write it, nginx.
func (r Reference) FamiliarName() string {
	if r.domain != DefaultDomain {
		return r.Name()
	}
	if short, ok := strings.CutPrefix(r.path, officialPrefix); ok && !strings.Contains(short, "/") {
		return short
	}
	return r.path
}

// Familiar returns the reference as people write it, nginx:latest.
func (r Reference) Familiar() string { return r.FamiliarName() + r.suffix() }

func (r Reference) suffix() string {
	s := ""
	if r.tag != "" {
		s = ":" + r.tag
	}
	if r.digest != "" {
		s += "@" + string(r.digest)
	}
	return s
}

func isLower(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }
func isAlnum(c byte) bool { return isLower(c) || c >= 'A' && c <= 'Z' }

func isHex64(s string) bool { return len(s) == 64 && isHex(s) }

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return s != ""
}

func validTag(s string) bool {
	if s == "" || len(s) > maxTag {
		return false
	}
	for i := range len(s) {
		if c := s[i]; !isAlnum(c) && c != '_' && (i == 0 || c != '.' && c != '-') {
			return false
		}
	}
	return true
}

// looksLikeDigest reports whether s has a digest's shape, algorithm:hex; whether the algorithm is known and the length right
// is go-digest's to say, in its words.
func looksLikeDigest(s string) bool {
	algo, hexa, ok := strings.Cut(s, ":")
	if !ok || len(hexa) < 32 {
		return false
	}
	for i := range len(hexa) {
		if c := hexa[i]; !isAlnum(c) || c > 'F' && c < 'a' || c > 'f' {
			return false
		}
	}
	start := true // of a component: a letter must follow
	for i := range len(algo) {
		c := algo[i]
		switch {
		case start && isAlnum(c) && c > '9':
			start = false
		case start:
			return false
		case isAlnum(c):
		case strings.IndexByte("-_+.", c) >= 0:
			start = true
		default:
			return false
		}
	}
	return !start
}

// validDomain accepts a host name, IPv4 or bracketed IPv6 address, with an optional port.
func validDomain(s string) bool {
	host, port := s, ""
	hasPort := false
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 2 {
			return false
		}
		for i := 1; i < end; i++ {
			if c := s[i]; c != ':' && !isHex(strings.ToLower(s[i:i+1])) {
				return false
			}
		}
		rest := s[end+1:]
		if rest == "" {
			return true
		}
		if rest[0] != ':' {
			return false
		}
		return isDigits(rest[1:])
	}
	if host, port, hasPort = strings.Cut(s, ":"); hasPort && !isDigits(port) {
		return false
	}
	for _, label := range strings.Split(host, ".") {
		if label == "" || !isAlnum(label[0]) || !isAlnum(label[len(label)-1]) {
			return false
		}
		for i := range len(label) {
			if !isAlnum(label[i]) && label[i] != '-' {
				return false
			}
		}
	}
	return true
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// validPath accepts components separated by slashes: lower-case letters and digits, joined by one dot, one or two underscores,
// or any number of dashes.
func validPath(s string) bool {
	for _, c := range strings.Split(s, "/") {
		if !validComponent(c) {
			return false
		}
	}
	return true
}

func validComponent(s string) bool {
	if s == "" || !isLower(s[0]) || !isLower(s[len(s)-1]) {
		return false
	}
	for i := 0; i < len(s); {
		if isLower(s[i]) {
			i++
			continue
		}
		j := i
		for !isLower(s[j]) { // ends: the last byte is a letter or digit
			j++
		}
		switch sep := s[i:j]; {
		case sep == "." || sep == "_" || sep == "__":
		case strings.Trim(sep, "-") == "":
		default:
			return false
		}
		i = j
	}
	return true
}
