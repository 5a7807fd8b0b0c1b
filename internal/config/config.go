// Package config owns /etc/conex/config.toml: what an administrator may set once for the whole machine.
//
// Command line flags and environment variables stand above it; a missing file means the defaults.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Places that hold when neither flag, environment nor file says otherwise.
const (
	DefaultPath  = "/etc/conex/config.toml"
	DefaultRoot  = "/var/lib/conex"
	DefaultState = "/run/conex"
)

// Config is the file's content with defaults filled in.
type Config struct {
	// Root is the data folder, which survives a reboot.
	Root string `toml:"root"`
	// State is the runtime folder, on a tmpfs.
	State string `toml:"state"`
	// StorageDriver is "erofs", "dir", or "" to let the kernel's abilities decide.
	StorageDriver string `toml:"storage-driver"`
	// Registry configures registries by their name in references, such as "docker.io" or "localhost:5000".
	Registry map[string]Registry `toml:"registry"`
	// Log is what containers get that name no --log-driver or --log-opt.
	Log Log `toml:"log"`
	// DNS lists name servers for containers, instead of the host's.
	DNS []string `toml:"dns"`
	// DNSSearch lists search domains for containers, instead of the host's.
	DNSSearch []string `toml:"dns-search"`
	// KeepBlobs says what becomes of layers' compressed blobs: KeepAuto, KeepAlways or KeepNever.
	KeepBlobs string `toml:"keep-blobs"`
	// GC bounds what is kept for later.
	GC GC `toml:"gc"`
}

// Registry says how one registry is reached.
type Registry struct {
	// Mirrors are tried in order before the registry itself: http(s)://host[:port][/prefix]. The prefix goes before each
	// repository's name, as a proxy for several registries wants it: http://h/hub is asked for http://h/v2/hub/library/nginx.
	Mirrors []string `toml:"mirrors"`
	// PlainHTTP lets the registry itself be asked without TLS. Loopback addresses need no leave.
	PlainHTTP bool `toml:"plain-http"`
}

// Log is the default log driver and its options.
type Log struct {
	Driver  string            `toml:"driver"`
	Options map[string]string `toml:"options"`
}

// Path returns the configuration file's place: CONEX_CONFIG, or DefaultPath.
func Path() string {
	if p := os.Getenv("CONEX_CONFIG"); p != "" {
		return p
	}
	return DefaultPath
}

// Load reads the file at path. A missing file gives the defaults; an unknown key, a wrong type or a senseless value is an error
// that names file and line where the parser knows it.
func Load(path string) (*Config, error) {
	c := &Config{}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist): // the usual case: one failed open, the parser is not touched
	case err != nil:
		return nil, fmt.Errorf("read configuration: %w", err)
	default:
		if err := parse(path, string(data), c); err != nil {
			return nil, err
		}
	}
	if c.Root == "" {
		c.Root = DefaultRoot
	}
	if c.State == "" {
		c.State = DefaultState
	}
	if c.KeepBlobs == "" {
		c.KeepBlobs = KeepAuto
	}
	return c, nil
}

func parse(path, data string, c *Config) error {
	dec := toml.NewDecoder(strings.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		e := unknown.Errors[0]
		line, _ := e.Position()
		return fmt.Errorf("%s:%d: unknown key %q", path, line, strings.Join(e.Key(), "."))
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, col := bad.Position()
		return fmt.Errorf("%s:%d:%d: %s", path, line, col, strings.TrimPrefix(bad.Error(), "toml: "))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// check refuses values that would only fail later and less clearly.
func (c *Config) check() error {
	for _, dir := range []struct{ key, val string }{{"root", c.Root}, {"state", c.State}} {
		if dir.val != "" && !strings.HasPrefix(dir.val, "/") {
			return fmt.Errorf("%s: %q is not an absolute path", dir.key, dir.val)
		}
	}
	switch c.StorageDriver {
	case "", "erofs", "dir":
	default:
		return fmt.Errorf("storage-driver: %q is none of erofs, dir", c.StorageDriver)
	}
	switch c.KeepBlobs {
	case "", KeepAuto, KeepAlways, KeepNever:
	default:
		return fmt.Errorf("keep-blobs: %q is none of auto, always, never", c.KeepBlobs)
	}
	for name, r := range c.Registry {
		for _, m := range r.Mirrors {
			u, err := url.Parse(m)
			if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || u.RawQuery != "" || u.Fragment != "" {
				return fmt.Errorf("registry.%q.mirrors: %q is not of the form http(s)://host[:port][/prefix]", name, m)
			}
		}
	}
	for _, a := range c.DNS {
		if _, err := netip.ParseAddr(a); err != nil {
			return fmt.Errorf("dns: %q is not an IP address", a)
		}
	}
	return nil
}
