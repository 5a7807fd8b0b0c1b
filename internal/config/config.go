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
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Places that hold when neither flag, environment nor file says otherwise.
const (
	DefaultPath  = "/etc/conex/config.toml"
	DefaultRoot  = "/var/lib/conex"
	DefaultState = "/run/conex"
)

// BuiltinRuntime is the name of the runtime that is a part of this program.
const BuiltinRuntime = "conex"

// Config is the file's content with defaults filled in.
type Config struct {
	// Root is the data folder, which survives a reboot.
	Root string `toml:"root"`
	// State is the runtime folder, on a tmpfs.
	State string `toml:"state"`
	// StorageDriver is "erofs", "dir", or "" to let the kernel's abilities decide.
	StorageDriver string `toml:"storage-driver"`
	// CertDirs are folders with a folder for each registry that has its own certificates or hosts.toml, instead of the usual ones.
	CertDirs []string `toml:"cert-dirs"`
	// Registry configures registries by their name in references, such as "docker.io" or "localhost:5000"; "*" is for all that have no
	// mirrors of their own.
	Registry map[string]Registry `toml:"registry"`
	// Log is what containers get that name no --log-driver or --log-opt.
	Log Log `toml:"log"`
	// DNS lists name servers for containers, instead of the host's.
	DNS []string `toml:"dns"`
	// DNSSearch lists search domains for containers, instead of the host's.
	DNSSearch []string `toml:"dns-search"`
	// PublishPolicy says whether published ports obey the host's firewall: PublishHost (also "") or PublishDocker.
	PublishPolicy string `toml:"publish-policy"`
	// DNSDomains lists the name servers, ADDRESS[:PORT], that containers' questions about a domain and what lies in it go to, instead of
	// the others. With none, the domain has no names.
	DNSDomains map[string][]string `toml:"dns-domains"`
	// CDISpecDirs are folders with descriptions of devices, instead of /etc/cdi and /var/run/cdi; Docker's name.
	CDISpecDirs []string `toml:"cdi-spec-dirs"`
	// UsernsRange is FIRST:SIZE, the host's ids that `--userns auto` takes from; "" for DefaultUsernsRange.
	UsernsRange string `toml:"userns-range"`
	// KeepBlobs says what becomes of layers' compressed blobs: KeepAuto, KeepAlways or KeepNever.
	KeepBlobs string `toml:"keep-blobs"`
	// GC bounds what is kept for later.
	GC GC `toml:"gc"`
	// Build bounds builds.
	Build Build `toml:"build"`
	// Runtimes are OCI runtimes that --runtime knows by a name: the paths of their programs.
	Runtimes map[string]string `toml:"runtimes"`
	// CgroupDriver says who makes containers' cgroups: CgroupFS (also ""), conex itself, or CgroupSystemd.
	CgroupDriver string `toml:"cgroup-driver"`
	// Debug is for `conex debug`.
	Debug Debug `toml:"debug"`
}

// Debug is what `conex debug` takes when the command line doesn't say.
type Debug struct {
	// Image is the toolbox; DefaultToolbox by default.
	Image string `toml:"image"`
}

// DefaultToolbox is the image whose tools `conex debug` brings.
const DefaultToolbox = "busybox"

// The values of cgroup-driver, by Docker's names.
const (
	CgroupFS      = "cgroupfs"
	CgroupSystemd = "systemd"
)

// The values of publish-policy: what filters the host's input filters published ports too, or they pass it by as Docker's do.
const (
	PublishHost   = "host"
	PublishDocker = "docker"
)

// Build bounds builds.
type Build struct {
	// MaxParallelism is how many commands of RUN steps one build lets run at a time, by BuildKit's name; 0 is all that are ready.
	MaxParallelism int `toml:"max-parallelism"`
}

// Registry says how one registry is reached.
type Registry struct {
	// Mirrors are tried in order before the registry itself: http(s)://host[:port][/prefix]. The prefix goes before each
	// repository's name, as a proxy for several registries wants it: http://h/hub is asked for http://h/v2/hub/library/nginx. In it
	// {registry} stands for the registry's name; without that, a mirror of "*" is told the name by ?ns=, as containerd does it.
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
	if c.Debug.Image == "" {
		c.Debug.Image = DefaultToolbox
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
	var value *valueError
	if err := c.check(); errors.As(err, &value) {
		if line := lineOf([]byte(data), value.key); line > 0 {
			return fmt.Errorf("%s:%d: %w", path, line, err)
		}
		return fmt.Errorf("%s: %w", path, err)
	} else if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// valueError is a value that makes no sense, and where it stands.
type valueError struct {
	key  []string
	text string
}

func (e *valueError) Error() string { return e.text }

// bad says what is wrong with the value of a key: one or, in a table, several parts of its name.
func bad(key []string, format string, args ...any) error {
	return &valueError{key, fmt.Sprintf(format, args...)}
}

// lineOf finds the line where a key is given its value, 0 if it is not there.
func lineOf(data []byte, key []string) int {
	var table []string
	p := unstable.Parser{}
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		var parts []string
		line := 0
		for it := e.Key(); it.Next(); {
			if line == 0 {
				line = p.Shape(it.Node().Raw).Start.Line
			}
			parts = append(parts, string(it.Node().Data))
		}
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = parts
			parts = nil
		case unstable.KeyValue:
		default:
			continue
		}
		full := append(slices.Clone(table), parts...)
		// A key may lie in an inline table, which begins on this line.
		if len(parts) > 0 && len(full) <= len(key) && slices.Equal(full, key[:len(full)]) {
			return line
		}
	}
	return 0
}

// ParseServer reads a name server, ADDRESS or ADDRESS:PORT, IPv6 with a port in brackets.
func ParseServer(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return a, fmt.Errorf("%q is not an IP address with or without a port", s)
	}
	return a, nil
}

// check refuses values that would only fail later and less clearly.
func (c *Config) check() error {
	for _, dir := range []struct{ key, val string }{{"root", c.Root}, {"state", c.State}} {
		if dir.val != "" && !strings.HasPrefix(dir.val, "/") {
			return bad([]string{dir.key}, "%s: %q is not an absolute path", dir.key, dir.val)
		}
	}
	switch c.StorageDriver {
	case "", "erofs", "dir":
	default:
		return bad([]string{"storage-driver"}, "storage-driver: %q is none of erofs, dir", c.StorageDriver)
	}
	switch c.CgroupDriver {
	case "", CgroupFS, CgroupSystemd:
	default:
		return bad([]string{"cgroup-driver"}, "cgroup-driver: %q is none of cgroupfs, systemd", c.CgroupDriver)
	}
	switch c.PublishPolicy {
	case "", PublishHost, PublishDocker:
	default:
		return bad([]string{"publish-policy"}, "publish-policy: %q is none of host, docker", c.PublishPolicy)
	}
	if _, err := ParseIDRange(c.UsernsRange); err != nil {
		return bad([]string{"userns-range"}, "%s", err)
	}
	switch c.KeepBlobs {
	case "", KeepAuto, KeepAlways, KeepNever:
	default:
		return bad([]string{"keep-blobs"}, "keep-blobs: %q is none of auto, always, never", c.KeepBlobs)
	}
	for i, dir := range c.CertDirs {
		if !strings.HasPrefix(dir, "/") {
			return bad([]string{"cert-dirs"}, "cert-dirs: %q (number %d) is not an absolute path", dir, i+1)
		}
	}
	for name, r := range c.Registry {
		switch {
		case name == "*" && r.PlainHTTP:
			return bad([]string{"registry", name, "plain-http"}, "registry.\"*\".plain-http: would let every registry be asked without TLS; name those that need it")
		case strings.ContainsAny(name, "/ ") || strings.Contains(name, "*") && name != "*":
			return bad([]string{"registry", name}, "registry.%q: is not a registry's name, host[:port], nor \"*\" for all others", name)
		}
		for _, m := range r.Mirrors {
			u, err := url.Parse(m)
			if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || u.RawQuery != "" || u.Fragment != "" {
				return bad([]string{"registry", name, "mirrors"}, "registry.%q.mirrors: %q is not of the form http(s)://host[:port][/prefix]", name, m)
			}
		}
	}
	for name, path := range c.Runtimes {
		switch {
		case name == BuiltinRuntime || name == "" || strings.ContainsAny(name, "/ "):
			return bad([]string{"runtimes", name}, "runtimes.%q: is not a name for another runtime", name)
		case !strings.HasPrefix(path, "/"):
			return bad([]string{"runtimes", name}, "runtimes.%q: %q is not an absolute path", name, path)
		}
	}
	if c.Build.MaxParallelism < 0 {
		return bad([]string{"build", "max-parallelism"}, "build.max-parallelism: %d is negative; 0 is no bound", c.Build.MaxParallelism)
	}
	for _, a := range c.DNS {
		if _, err := netip.ParseAddr(a); err != nil {
			return bad([]string{"dns"}, "dns: %q is not an IP address", a)
		}
	}
	for domain, servers := range c.DNSDomains {
		key := []string{"dns-domains", domain}
		if domain == "" || strings.ContainsFunc(domain, func(r rune) bool { return r <= ' ' || r == '/' || r == '*' }) || strings.HasPrefix(domain, ".") {
			return bad(key, "dns-domains.%q: is not a domain, such as corp.example", domain)
		}
		for _, a := range servers {
			if _, err := ParseServer(a); err != nil {
				return bad(key, "dns-domains.%q: %s", domain, err)
			}
		}
	}
	return nil
}
