package registry

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// HostDirs are the folders with settings of single registries, one folder for each below them: conex's own, then what other engines
// were given. The first that has something for a host counts.
func HostDirs() []string {
	return []string{"/etc/conex/certs.d", "/etc/docker/certs.d", "/etc/containerd/certs.d"}
}

// defaultHost is the folder for registries that have none of their own.
const defaultHost = "_default"

// maxSettings bounds a hosts.toml and a certificate file.
const maxSettings = 1 << 20

// capability is what a host may be asked for.
type capability uint8

const (
	canPull    capability = 1 << iota // blobs, and manifests by digest
	canResolve                        // manifests by tag
	canPush
)

// tlsFiles says which certificates count for a host.
type tlsFiles struct {
	ca    []string
	pairs [][2]string // certificate, key
	skip  bool        // any certificate will do
}

func (f tlsFiles) empty() bool { return len(f.ca) == 0 && len(f.pairs) == 0 && !f.skip }

// hostEntry is one host of a hosts.toml.
type hostEntry struct {
	scheme, host string
	base         string // of the API's paths, /v2
	can          capability
	header       http.Header
	tls          tlsFiles
}

// hostsFile is a hosts.toml: the hosts to ask before the server, and the server if the file names one.
type hostsFile struct {
	hosts  []hostEntry
	server *hostEntry
}

// tomlHost is the file's form. Keys that are not here are containerd's business.
type tomlHost struct {
	Server       string              `toml:"server"`
	Capabilities []string            `toml:"capabilities"`
	CA           any                 `toml:"ca"`     // a path or several
	Client       any                 `toml:"client"` // a path, several, or pairs of certificate and key
	SkipVerify   bool                `toml:"skip_verify"`
	Header       map[string]any      `toml:"header"`
	OverridePath bool                `toml:"override_path"`
	Host         map[string]tomlHost `toml:"host"`
}

// parseHosts reads a hosts.toml, containerd's format. Files that it names are relative to its folder.
func parseHosts(file string, data []byte) (hostsFile, error) {
	var h hostsFile
	var t tomlHost
	err := toml.Unmarshal(data, &t)
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		line, _ := bad.Position()
		return h, fmt.Errorf("%s:%d: %s", file, line, oneLine(strings.TrimPrefix(bad.Error(), "toml: ")))
	}
	if err != nil {
		return h, fmt.Errorf("%s: %s", file, oneLine(err.Error()))
	}
	dir := filepath.Dir(file)
	if t.Server != "" || t.hasSettings() {
		e, err := t.entry(dir, t.Server)
		if err != nil && t.Server != "" {
			return h, fmt.Errorf("%s: server: %w", file, err)
		}
		h.server = &e
	}
	for _, name := range hostOrder(data) {
		sub, ok := t.Host[name]
		if !ok {
			continue
		}
		e, err := sub.entry(dir, name)
		if err != nil {
			return h, fmt.Errorf("%s: host %q: %w", file, oneLine(name), err)
		}
		h.hosts = append(h.hosts, e)
	}
	return h, nil
}

func (t tomlHost) hasSettings() bool {
	return len(t.Capabilities) > 0 || t.CA != nil || t.Client != nil || t.SkipVerify || len(t.Header) > 0
}

// hostOrder returns the keys of [host."..."] as they stand in the file: the hosts are asked in this order.
func hostOrder(data []byte) []string {
	var order []string
	p := unstable.Parser{}
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table && e.Kind != unstable.KeyValue {
			continue
		}
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		if len(key) > 1 && key[0] == "host" && !slices.Contains(order, key[1]) {
			order = append(order, key[1])
		}
	}
	return order
}

// entry checks one host's settings. For an address that is none the entry is usable without it.
func (t tomlHost) entry(dir, address string) (hostEntry, error) {
	e := hostEntry{can: canPull | canResolve | canPush, base: "/v2", header: http.Header{}}
	if len(t.Capabilities) > 0 {
		e.can = 0
		for _, c := range t.Capabilities {
			switch strings.ToLower(c) {
			case "pull":
				e.can |= canPull
			case "resolve":
				e.can |= canResolve
			case "push":
				e.can |= canPush
			default:
				return e, fmt.Errorf("capability %q is none of pull, resolve, push", oneLine(c))
			}
		}
	}
	e.tls.skip = t.SkipVerify
	abs := func(p string) string {
		if filepath.IsAbs(p) {
			return p
		}
		return filepath.Join(dir, p)
	}
	cas, err := texts(t.CA)
	if err != nil {
		return e, fmt.Errorf("ca: %w", err)
	}
	for _, ca := range cas {
		e.tls.ca = append(e.tls.ca, abs(ca))
	}
	if e.tls.pairs, err = pairs(t.Client, abs); err != nil {
		return e, fmt.Errorf("client: %w", err)
	}
	for k, v := range t.Header {
		values, err := texts(v)
		if err != nil {
			return e, fmt.Errorf("header %q: %w", oneLine(k), err)
		}
		for _, v := range values {
			if !validHeader(k, v) {
				return e, fmt.Errorf("header %q is not one that can be sent", oneLine(k))
			}
			e.header.Add(k, v)
		}
	}
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.RawQuery != "" {
		return e, fmt.Errorf("%q is not of the form http(s)://host[:port][/path]", oneLine(address))
	}
	e.scheme, e.host = u.Scheme, u.Host
	p := strings.TrimRight(path.Clean("/"+u.EscapedPath()), "/")
	switch {
	case t.OverridePath:
		e.base = p
	case strings.HasSuffix(p, "/v2"):
		e.base = p
	default:
		e.base = p + "/v2"
	}
	return e, nil
}

// validHeader refuses what would break out of a header's line, and headers that the protocol itself decides.
func validHeader(k, v string) bool {
	for _, r := range k {
		if r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r) {
			return false
		}
	}
	switch strings.ToLower(k) {
	case "", "host", "content-length", "transfer-encoding", "connection":
		return false
	}
	return !strings.ContainsFunc(v, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
}

// texts reads a string or a list of strings.
func texts(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var list []string
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, errors.New("not a list of texts")
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, errors.New("neither a text nor a list of texts")
}

// pairs reads what names client certificates: a file that holds certificate and key, or pairs of files.
func pairs(v any, abs func(string) string) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
		if v == nil {
			return nil, nil
		}
	}
	var out [][2]string
	for _, x := range list {
		files, err := texts(x)
		if err != nil || len(files) < 1 || len(files) > 2 || files[0] == "" {
			return nil, errors.New("want a file, or pairs of certificate and key")
		}
		p := [2]string{abs(files[0]), abs(files[0])}
		if len(files) == 2 && files[1] != "" {
			p[1] = abs(files[1])
		}
		out = append(out, p)
	}
	return out, nil
}

// folderNames are how a host's folder may be called: as the host, or in containerd's form without a colon.
func folderNames(host string) []string {
	if name, port, ok := strings.Cut(host, ":"); ok && !strings.Contains(port, ":") {
		return []string{host, name + "_" + port + "_"}
	}
	return []string{host}
}

// safeFolder keeps a host that a registry made up from leading out of the folders.
func safeFolder(host string) bool {
	return host != "" && host != "." && host != ".." && !strings.ContainsAny(host, "/\x00")
}

// hostsOf reads the hosts.toml of a registry, or that of all others. It is no error when there is none.
func hostsOf(dirs []string, domain string) (hostsFile, error) {
	if !safeFolder(domain) {
		return hostsFile{}, nil
	}
	for _, name := range append(folderNames(domain), defaultHost) {
		for _, dir := range dirs {
			file := filepath.Join(dir, name, "hosts.toml")
			data, err := readSettings(file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return hostsFile{}, err
			}
			return parseHosts(file, data)
		}
	}
	return hostsFile{}, nil
}

func readSettings(file string) ([]byte, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxSettings {
		return nil, fmt.Errorf("read %s: not a file of at most %d bytes", file, maxSettings)
	}
	return os.ReadFile(file)
}

// certsOf finds a host's certificates as docker keeps them: *.crt are authorities, NAME.cert and NAME.key are ours.
func certsOf(dirs []string, host string) (tlsFiles, error) {
	var f tlsFiles
	if !safeFolder(host) {
		return f, nil
	}
	for _, dir := range dirs {
		for _, name := range folderNames(host) {
			dir := filepath.Join(dir, name)
			entries, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return f, err
			}
			for _, e := range entries {
				file := filepath.Join(dir, e.Name())
				base, ext := strings.TrimSuffix(file, filepath.Ext(file)), filepath.Ext(file)
				other := map[string]string{".cert": ".key", ".key": ".cert"}[ext]
				if ext == ".crt" {
					f.ca = append(f.ca, file)
				}
				if other == "" {
					continue
				}
				if _, err := os.Stat(base + other); err != nil {
					return f, fmt.Errorf("%s: a client certificate needs both: %s is missing", file, filepath.Base(base+other))
				}
				if ext == ".cert" {
					f.pairs = append(f.pairs, [2]string{file, base + other})
				}
			}
			if !f.empty() {
				return f, nil
			}
		}
	}
	return f, nil
}

// load makes a TLS configuration of the files.
func (f tlsFiles) load() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: f.skip} //nolint:gosec // where the administrator wants it so
	if len(f.ca) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, file := range f.ca {
			pem, err := readSettings(file)
			if err != nil {
				return nil, err
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s holds no certificate (PEM)", file)
			}
		}
		cfg.RootCAs = pool
	}
	for _, p := range f.pairs {
		cert, err := readSettings(p[0])
		if err != nil {
			return nil, err
		}
		key, err := readSettings(p[1])
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(bytes.TrimSpace(cert), bytes.TrimSpace(key))
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w", p[0], err)
		}
		cfg.Certificates = append(cfg.Certificates, pair)
	}
	return cfg, nil
}
