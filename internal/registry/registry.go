// Package registry speaks the OCI distribution protocol with image registries: it finds an image's manifest, at a mirror or at
// the registry itself, streams verified blobs, and uploads blobs and manifests. It owns no files.
//
// One function sends every request (do, in send.go), one place holds the tokens (auth.go).
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"conex/internal/config"
	"conex/internal/credentials"
	"conex/internal/ocispec"
)

var (
	// ErrManifestUnknown says that the registry has the repository but not this tag or digest.
	ErrManifestUnknown = errors.New("manifest unknown")
	// ErrNameUnknown says that the registry has no such repository.
	ErrNameUnknown = errors.New("name unknown")
	// ErrDenied says that the registry wants a login, or that this one may not read the repository.
	ErrDenied = errors.New("denied")
	// ErrMismatch says that a registry sent something else than it announced, or than was asked for.
	ErrMismatch = errors.New("content does not match")
	// ErrUnsupported says that an image is of a kind that conex does not run.
	ErrUnsupported = errors.New("not supported")
)

// MaxManifest bounds a manifest or index in bytes, as the distribution specification recommends.
const MaxManifest = 4 << 20

// maxError bounds the body of an error answer or token, in bytes.
const maxError = 1 << 20

// Client asks registries. It keeps connections and tokens, and may be used by several goroutines at a time.
type Client struct {
	cfg       map[string]config.Registry
	http      *http.Client
	backoff   func(attempt int) time.Duration // tests make it short
	stall     time.Duration                   // a blob that delivers nothing for so long is asked for again
	listing   time.Duration                   // bounds the time of a list of tags or repositories
	tokenTime time.Duration                   // bounds one question to a token service

	credentials *credentials.Store // nil: everything is asked for anonymously

	logins chan struct{} // held by who logs in, so that a token is fetched once
	mu     sync.Mutex
	tokens map[string][]token                 // by endpoint
	known  map[string]credentials.Credentials // by host
}

// Options says how registries are reached. The zero value is valid.
type Options struct {
	// Registry has what the configuration says of registries, by the names that references use ("docker.io").
	Registry map[string]config.Registry
	// Credentials has what the user has logged in with, nil for nothing. It is asked when a registry wants a login.
	Credentials *credentials.Store
}

// New returns a client. It reads no file and asks nobody.
func New(o Options) *Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	t.MaxIdleConnsPerHost = 8
	t.ResponseHeaderTimeout = time.Minute
	t.DisableCompression = true // layers are compressed already, and their digests are of what is sent
	return &Client{
		cfg:         o.Registry,
		credentials: o.Credentials,
		http:        &http.Client{Transport: t, CheckRedirect: checkRedirect},
		backoff:     func(n int) time.Duration { return 250 * time.Millisecond << n },
		stall:       time.Minute,
		listing:     listingTime,
		tokenTime:   30 * time.Second,
		logins:      make(chan struct{}, 1),
		tokens:      map[string][]token{},
		known:       map[string]credentials.Credentials{},
	}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// checkRedirect lets blobs move to a storage host, but never from https to http: what the digest protects from changes would
// still tell everybody on the way what is fetched. Credentials and the address that was asked stay behind.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxHops {
		return refused("stopped after %d redirects", maxHops)
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return refused("refused a redirect from https to %s://%s", oneLine(req.URL.Scheme), oneLine(req.URL.Host))
	}
	req.Header.Del("Referer")
	for _, v := range append(via[1:], req) {
		// The http package lets them go along to subdomains and other ports.
		if v.URL.Host != via[0].URL.Host || v.URL.Scheme != via[0].URL.Scheme {
			req.Header.Del("Authorization")
		}
	}
	return nil
}

// Endpoint is one place to ask for a registry's images: a mirror or the registry itself.
type Endpoint struct {
	// Domain is the registry's name in references.
	Domain string
	// Scheme is http or https; Host has the port, if any.
	Scheme, Host string
	// Prefix is put before repository names, without slashes at its ends: a mirror http://h/hub serves library/nginx as
	// http://h/v2/hub/library/nginx.
	Prefix string
	// Mirror is true for a configured mirror.
	Mirror bool
}

// String returns the endpoint as a person would write it.
func (e Endpoint) String() string {
	s := e.Scheme + "://" + e.Host
	if e.Prefix != "" {
		s += "/" + e.Prefix
	}
	return s
}

func (e Endpoint) repo(path string) string {
	if e.Prefix != "" {
		return e.Prefix + "/" + path
	}
	return path
}

func (e Endpoint) url(path, kind, name string) string {
	return e.Scheme + "://" + e.Host + "/v2/" + e.repo(path) + "/" + kind + "/" + name
}

// endpoints lists where to ask for a registry's images, in order.
func (c *Client) endpoints(domain string) []Endpoint {
	var eps []Endpoint
	r := c.cfg[domain]
	for _, m := range r.Mirrors {
		u, err := url.Parse(m)
		if err != nil || u.Host == "" {
			continue // config.Load refuses these
		}
		eps = append(eps, Endpoint{domain, u.Scheme, u.Host, strings.Trim(u.Path, "/"), true})
	}
	host := domain
	if domain == "docker.io" {
		host = "registry-1.docker.io" // docker.io itself is a web site
	}
	if !r.PlainHTTP {
		eps = append(eps, Endpoint{domain, "https", host, "", false})
	}
	if r.PlainHTTP || isLoopback(host) {
		eps = append(eps, Endpoint{domain, "http", host, "", false})
	}
	return eps
}

// isLoopback reports whether host (with or without port) is this machine by name or address; no DNS answer can make it so.
func isLoopback(host string) bool {
	u := url.URL{Host: host}
	h := u.Hostname()
	if h == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(h)
	return err == nil && a.IsLoopback()
}

// accept lists the manifest kinds that we understand. Schema 1 is not among them; a registry that sends it anyway is refused.
var accept = []string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, ocispec.MediaTypeDockerManifestList, ocispec.MediaTypeDockerManifest,
}

// Resolve fetches the manifest or index of domain/path at tagOrDigest from the first endpoint that has it: the mirrors in their order,
// then the registry. The raw bytes are verified against a digest that was asked for or announced. When all fail, the error tells
// what each said; it is ErrManifestUnknown, ErrNameUnknown or ErrDenied if the registry itself said so.
func (c *Client) Resolve(ctx context.Context, domain, path, tagOrDigest string) (ocispec.Descriptor, []byte, Endpoint, error) {
	var desc ocispec.Descriptor
	var raw []byte
	ep, err := c.first(ctx, c.endpoints(domain), func(ep Endpoint) (err error) {
		desc, raw, err = c.manifest(ctx, ep, path, tagOrDigest)
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, Endpoint{}, err
	}
	return desc, raw, ep, nil
}

// first calls ask with one endpoint after another and returns that which answered without an error. When all fail, the error has
// what each said.
func (c *Client) first(ctx context.Context, eps []Endpoint, ask func(Endpoint) error) (Endpoint, error) {
	var failed []error
	for _, ep := range eps {
		err := ask(ep)
		if err == nil {
			return ep, nil
		}
		if ctx.Err() != nil {
			return Endpoint{}, ctx.Err()
		}
		tryHTTP := ep.Scheme == "https" && !ep.Mirror && isLoopback(ep.Host)
		if tryHTTP && noTLS(err) {
			continue // the same host is asked by http next; one report of it is enough
		}
		failed = append(failed, &endpointError{ep, err})
		if tryHTTP && isAnswer(err) {
			break
		}
	}
	return Endpoint{}, joinLine(failed)
}

// noTLS reports whether https failed in a way that http may not.
func noTLS(err error) bool {
	return errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.ECONNREFUSED)
}

// Manifest fetches the manifest that desc names, an entry of an index, from ep.
func (c *Client) Manifest(ctx context.Context, ep Endpoint, path string, desc ocispec.Descriptor) ([]byte, error) {
	got, raw, err := c.manifest(ctx, ep, path, string(desc.Digest))
	if err != nil {
		return nil, &endpointError{ep, err}
	}
	if got.MediaType != desc.MediaType && desc.MediaType != "" {
		return nil, &endpointError{ep, fmt.Errorf("manifest %s is a %s, the index says %s: %w", desc.Digest, got.MediaType, desc.MediaType, ErrMismatch)}
	}
	return raw, nil
}

func (c *Client) manifest(ctx context.Context, ep Endpoint, path, tagOrDigest string) (ocispec.Descriptor, []byte, error) {
	var desc ocispec.Descriptor
	resp, err := c.send(ctx, ep, path, ep.url(path, "manifests", tagOrDigest), http.Header{"Accept": accept})
	if err != nil {
		return desc, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return desc, nil, answerError(resp)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	if err != nil {
		return desc, nil, fmt.Errorf("read manifest %s: %w", tagOrDigest, err)
	}
	if len(raw) > MaxManifest {
		return desc, nil, fmt.Errorf("manifest %s is larger than %d bytes: %w", tagOrDigest, MaxManifest, ErrMismatch)
	}
	desc.Digest, desc.Size = ocispec.FromBytes(raw), int64(len(raw))
	want := resp.Header.Get("Docker-Content-Digest")
	if strings.Contains(tagOrDigest, ":") {
		want = tagOrDigest
	}
	if strings.HasPrefix(want, "sha256:") && want != string(desc.Digest) {
		return desc, nil, fmt.Errorf("manifest is %s, not %s: %w", desc.Digest, want, ErrMismatch)
	}
	desc.MediaType, err = mediaType(resp.Header.Get("Content-Type"), raw)
	return desc, raw, err
}

// mediaType decides what raw is: by its own mediaType field, else by the answer's header, else by its shape.
func mediaType(header string, raw []byte) (string, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     json.RawMessage `json:"manifests"`
		Config        json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("manifest is not JSON: %w", ErrMismatch)
	}
	if m.SchemaVersion == 1 {
		return "", fmt.Errorf("the image has a schema 1 manifest, a format withdrawn in 2019, push it again with a current tool: %w", ErrUnsupported)
	}
	if m.MediaType == "" {
		m.MediaType, _, _ = mime.ParseMediaType(header)
	}
	for _, known := range accept {
		if m.MediaType == known {
			// A document that is read as an index by one and as a manifest by another is an attack (CVE-2021-41190).
			if (IsIndex(known) && m.Config != nil) || (!IsIndex(known) && m.Manifests != nil) {
				return "", fmt.Errorf("manifest is ambiguous, both an index and a manifest: %w", ErrMismatch)
			}
			return known, nil
		}
	}
	switch {
	case m.Manifests != nil && m.Config == nil:
		return ocispec.MediaTypeImageIndex, nil
	case m.Config != nil && m.Manifests == nil:
		return ocispec.MediaTypeImageManifest, nil
	}
	return "", fmt.Errorf("manifest of type %q: %w", m.MediaType, ErrUnsupported)
}

// IsIndex reports whether a media type is that of a list of manifests.
func IsIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == ocispec.MediaTypeDockerManifestList
}

// DecodeManifest decodes an image manifest and refuses what is none: digests must be sha256, sizes positive.
func DecodeManifest(raw []byte) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, fmt.Errorf("decode manifest: %w", err)
	}
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, ocispec.MediaTypeDockerConfig, "application/octet-stream": // the last by very old clients
	default:
		return m, fmt.Errorf("config of type %q, so this is no container image: %w", m.Config.MediaType, ErrUnsupported)
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := checkDescriptor(d); err != nil {
			return m, err
		}
	}
	return m, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil || d.Digest.Algorithm() != "sha256" {
		return fmt.Errorf("manifest names digest %q, which is not a sha256: %w", string(d.Digest), ErrUnsupported)
	}
	if d.Size < 0 {
		return fmt.Errorf("manifest gives %s a size of %d: %w", d.Digest, d.Size, ErrMismatch)
	}
	return nil
}
