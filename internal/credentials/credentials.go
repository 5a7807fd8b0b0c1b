// Package credentials owns what a user has logged in with: Docker's config.json, and the credential helpers that it names.
//
// The file is shared with docker, podman and others, so what it holds besides stays as it is. It is read when a registry asks for a
// login, not before. Podman's auth.json is read after it, and never written.
package credentials

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"conex/internal/disk"
)

// Hub is the key of Docker Hub's credentials, an address that once meant something.
const Hub = "https://index.docker.io/v1/"

// maxFile bounds a file that is read.
const maxFile = 8 << 20

// Credentials are what a registry wants to see. The zero value is nobody.
type Credentials struct {
	Username, Password string
	// IdentityToken is given to the token service instead of a password.
	IdentityToken string
	// RegistryToken is given to the registry itself.
	RegistryToken string
}

// IsZero reports whether there is nothing to show.
func (c Credentials) IsZero() bool { return c == Credentials{} }

// Store is one user's credentials. It may be used by several goroutines and processes at a time.
type Store struct {
	path     string
	fallback []string // read only
}

// Open returns the store of the present user: $DOCKER_CONFIG/config.json, or ~/.docker/config.json; behind it stands podman's
// auth.json. Nothing is read.
func Open() *Store {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			home = "/root" // a service without HOME; conex runs as root
		}
		dir = filepath.Join(home, ".docker")
	}
	s := &Store{path: filepath.Join(dir, "config.json")}
	if f := os.Getenv("REGISTRY_AUTH_FILE"); f != "" {
		s.fallback = append(s.fallback, f)
	}
	run := os.Getenv("XDG_RUNTIME_DIR")
	if run == "" {
		run = fmt.Sprintf("/run/user/%d", os.Getuid())
	}
	s.fallback = append(s.fallback, filepath.Join(run, "containers/auth.json"))
	if os.Getuid() == 0 {
		s.fallback = append(s.fallback, "/run/containers/0/auth.json") // podman's place for root
	}
	return s
}

// Path returns the file that is written.
func (s *Store) Path() string { return s.path }

// entry is one of the file's "auths".
type entry struct {
	Auth          string `json:"auth,omitempty"` // base64 of name:password
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identitytoken,omitempty"`
	RegistryToken string `json:"registrytoken,omitempty"`
}

// file is what we read of config.json.
type file struct {
	Auths   map[string]entry  `json:"auths"`
	Store   string            `json:"credsStore"`
	Helpers map[string]string `json:"credHelpers"`
}

// Key returns the name under which a server's credentials are kept: localhost:5000, ghcr.io, and Docker Hub's address. Scheme and path
// of what a person typed don't count.
func Key(server string) string {
	if h := hostOf(server); h != "docker.io" && h != "" {
		return h
	}
	return Hub
}

// hostOf returns the host and port of a key or server; docker.io under each of its names.
func hostOf(key string) string {
	h := strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	h, _, _ = strings.Cut(h, "/")
	switch h = strings.ToLower(h); h {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return h
}

// Get returns the credentials for a server, the zero value if there are none.
func (s *Store) Get(ctx context.Context, server string) (Credentials, error) {
	for _, path := range append([]string{s.path}, s.fallback...) {
		f, err := read(path)
		if err != nil {
			return Credentials{}, err
		}
		c, err := f.get(ctx, server)
		if err != nil {
			return Credentials{}, fmt.Errorf("credentials for %s: %w", hostOf(server), err)
		}
		if !c.IsZero() {
			return c, nil
		}
	}
	return Credentials{}, nil
}

func read(path string) (file, error) {
	var f file
	data, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) && os.Getuid() != 0 {
		return f, nil
	}
	if err != nil || len(strings.TrimSpace(string(data))) == 0 {
		return f, err
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return f, fmt.Errorf("read %s: %w", path, plain(err))
	}
	return f, nil
}

// plain takes what could be a secret off a decoder's error.
func plain(err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("not JSON at byte %d", syntax.Offset)
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		return fmt.Errorf("%q is not a %s", typ.Field, typ.Type)
	}
	return err
}

func readBounded(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return nil, fmt.Errorf("read %s: not a file of at most %d MB", path, maxFile>>20)
	}
	return os.ReadFile(path)
}

// helper returns the credential helper that keeps a server's credentials, "" for the file itself.
func (f file) helper(server string) string {
	host := hostOf(server)
	for key, name := range f.Helpers {
		if hostOf(key) == host {
			return name
		}
	}
	return f.Store
}

func (f file) get(ctx context.Context, server string) (Credentials, error) {
	if h := f.helper(server); h != "" {
		c, err := helperGet(ctx, h, Key(server))
		if err != nil || !c.IsZero() {
			return c, err
		}
	}
	host := hostOf(server)
	var keys []string
	for key := range f.Auths {
		if hostOf(key) == host {
			keys = append(keys, key)
		}
	}
	// The plain host before addresses with a path, as podman keeps them for single repositories.
	slices.SortFunc(keys, func(a, b string) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	for _, key := range keys {
		c, err := f.Auths[key].credentials()
		if err != nil {
			return Credentials{}, fmt.Errorf("entry %q: %w", key, err)
		}
		if !c.IsZero() {
			return c, nil
		}
	}
	return Credentials{}, nil
}

func (e entry) credentials() (Credentials, error) {
	c := Credentials{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" {
		raw, err := base64.StdEncoding.DecodeString(e.Auth)
		if err != nil {
			return Credentials{}, errors.New(`"auth" is not base64`)
		}
		user, pass, ok := strings.Cut(string(raw), ":")
		if !ok || user == "" {
			return Credentials{}, errors.New(`"auth" is not name:password`)
		}
		c.Username, c.Password = user, strings.TrimRight(pass, "\x00")
	}
	if c.IdentityToken != "" {
		c.Password = ""
	}
	return c, nil
}

// Put keeps credentials for a server, in its helper or else in the file. helper is the helper's name, "" for the file, where anybody
// who can read it can read them. A nil error promises that they are kept and that nothing else in the file has changed.
func (s *Store) Put(ctx context.Context, server string, c Credentials) (helper string, err error) {
	key := Key(server)
	f, err := read(s.path)
	if err != nil {
		return "", err
	}
	e := entry{IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken}
	if helper = f.helper(server); helper != "" {
		if err := helperStore(ctx, helper, key, c); err != nil {
			return helper, err
		}
		e = entry{} // tells others that there are some
	} else if c.Username != "" {
		e.Auth = base64.StdEncoding.EncodeToString([]byte(c.Username + ":" + c.Password))
	}
	return helper, s.update(func(auths map[string]json.RawMessage) error {
		raw, err := json.Marshal(e)
		auths[key] = raw
		return err
	})
}

// Delete forgets a server's credentials. It is no error when there are none.
func (s *Store) Delete(ctx context.Context, server string) error {
	f, err := read(s.path)
	if err != nil {
		return err
	}
	if h := f.helper(server); h != "" {
		if err := helperErase(ctx, h, Key(server)); err != nil {
			return err
		}
	}
	host := hostOf(server)
	if !slices.ContainsFunc(keysOf(f.Auths), func(k string) bool { return hostOf(k) == host }) {
		return nil
	}
	return s.update(func(auths map[string]json.RawMessage) error {
		for key := range auths {
			if hostOf(key) == host {
				delete(auths, key)
			}
		}
		return nil
	})
}

func keysOf[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}

// update changes the file's "auths" and nothing else, under its lock.
func (s *Store) update(fn func(auths map[string]json.RawMessage) error) error {
	path := s.path
	if p, err := filepath.EvalSymlinks(path); err == nil {
		path = p // a link to where the user really keeps it stays one
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return disk.Update(path, 0o600, disk.Durable, func(old []byte) ([]byte, error) {
		all, auths := map[string]json.RawMessage{}, map[string]json.RawMessage{}
		if len(strings.TrimSpace(string(old))) > 0 {
			if err := json.Unmarshal(old, &all); err != nil {
				return nil, fmt.Errorf("read %s: %w", path, plain(err))
			}
		}
		if raw := all["auths"]; raw != nil {
			if err := json.Unmarshal(raw, &auths); err != nil {
				return nil, fmt.Errorf("read %s: auths: %w", path, plain(err))
			}
		}
		if all == nil || auths == nil { // null
			all, auths = notNil(all), notNil(auths)
		}
		if err := fn(auths); err != nil {
			return nil, err
		}
		raw, err := json.Marshal(auths)
		if err != nil {
			return nil, err
		}
		all["auths"] = raw
		data, err := json.MarshalIndent(all, "", "\t")
		if err != nil {
			return nil, err
		}
		return append(data, '\n'), nil
	})
}

func notNil(m map[string]json.RawMessage) map[string]json.RawMessage {
	if m == nil {
		return map[string]json.RawMessage{}
	}
	return m
}

// CheckServer refuses what is no registry's address, and returns its host and port.
func CheckServer(server string) (string, error) {
	h := hostOf(server)
	if u, err := url.Parse("https://" + h + "/"); err != nil || u.Host != h || h == "" || strings.ContainsAny(h, "@?#\\ \t\n") {
		return "", fmt.Errorf("%q is not the address of a registry", server)
	}
	return h, nil
}
