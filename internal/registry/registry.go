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
	"net/http"
	"strings"
	"sync"
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

// MaxLayers bounds the layers of an image: the kernel mounts no more as one.
const MaxLayers = 500

// maxError bounds the body of an error answer or token, in bytes.
const maxError = 1 << 20

// Client asks registries. It keeps connections and tokens, and may be used by several goroutines at a time.
type Client struct {
	cfg        map[string]config.Registry
	dirs       []string
	http       *http.Client
	transports *transports
	insecure   bool
	backoff    func(attempt int) time.Duration // tests make it short
	maxWait    time.Duration                   // bounds what a Retry-After can make us wait
	stall      time.Duration                   // a blob that delivers nothing for so long is asked for again
	listing    time.Duration                   // bounds the time of a list of tags or repositories
	tokenTime  time.Duration                   // bounds one question to a token service

	credentials *credentials.Store // nil: everything is asked for anonymously

	logins  chan struct{} // held by who logs in, so that a token is fetched once
	mu      sync.Mutex
	tokens  map[string][]token                 // by endpoint
	known   map[string]credentials.Credentials // by host
	hosts   map[string][]Endpoint              // by domain
	headers map[string]http.Header             // what hosts.toml adds, by scheme and host
	plain   map[string]bool                    // hosts that hosts.toml allows to be asked by plain http
}

// Options says how registries are reached. The zero value is valid.
type Options struct {
	// Registry has what the configuration says of registries, by the names that references use ("docker.io").
	Registry map[string]config.Registry
	// Credentials has what the user has logged in with, nil for nothing. It is asked when a registry wants a login.
	Credentials *credentials.Store
	// HostDirs are the folders with settings of single registries, see HostDirs.
	HostDirs []string
	// Insecure lets every registry be asked with a certificate that nobody vouches for, or without TLS: the user has said so.
	Insecure bool
}

// New returns a client. It reads no file and asks nobody.
func New(o Options) *Client {
	t := newTransports(o.HostDirs)
	return &Client{
		cfg:         o.Registry,
		dirs:        o.HostDirs,
		transports:  t,
		insecure:    o.Insecure,
		credentials: o.Credentials,
		http:        &http.Client{Transport: t, CheckRedirect: checkRedirect},
		backoff:     func(n int) time.Duration { return 250 * time.Millisecond << n },
		stall:       time.Minute,
		maxWait:     maxWait,
		listing:     listingTime,
		tokenTime:   30 * time.Second,
		logins:      make(chan struct{}, 1),
		tokens:      map[string][]token{},
		known:       map[string]credentials.Credentials{},
		hosts:       map[string][]Endpoint{},
		headers:     map[string]http.Header{},
		plain:       map[string]bool{},
	}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

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
	ep, err := c.first(ctx, domain, wanted(tagOrDigest), func(ep Endpoint) (err error) {
		desc, raw, err = c.manifest(ctx, ep, path, tagOrDigest)
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, Endpoint{}, err
	}
	return desc, raw, ep, nil
}

// Manifest fetches the manifest that desc names, an entry of an index, from ep, or where ep is a mirror that does not have it, from the
// endpoints behind it.
func (c *Client) Manifest(ctx context.Context, ep Endpoint, path string, desc ocispec.Descriptor) ([]byte, error) {
	var raw []byte
	_, err := c.firstOf(ctx, append([]Endpoint{ep}, c.after(ep)...), func(ep Endpoint) error {
		got, b, err := c.manifest(ctx, ep, path, string(desc.Digest))
		if err != nil {
			return err
		}
		if got.MediaType != desc.MediaType && desc.MediaType != "" {
			return fmt.Errorf("manifest %s is a %s, the index says %s: %w", desc.Digest, got.MediaType, desc.MediaType, ErrMismatch)
		}
		raw = b
		return nil
	})
	return raw, err
}

func (c *Client) manifest(ctx context.Context, ep Endpoint, path, tagOrDigest string) (ocispec.Descriptor, []byte, error) {
	var desc ocispec.Descriptor
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodGet, target: ep.url(path, "manifests", tagOrDigest), header: http.Header{"Accept": accept},
		scopes: []string{ep.pull(path)}})
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
		return m, fmt.Errorf("manifest is not as it should be: %s: %w", oneLine(err.Error()), ErrMismatch)
	}
	switch m.Config.MediaType {
	case ocispec.MediaTypeImageConfig, ocispec.MediaTypeDockerConfig, "application/octet-stream": // the last by very old clients
	default:
		return m, fmt.Errorf("config of type %q, so this is no container image: %w", m.Config.MediaType, ErrUnsupported)
	}
	if len(m.Layers) > MaxLayers {
		return m, fmt.Errorf("the image has %d layers, more than the %d that can be mounted: %w", len(m.Layers), MaxLayers, ErrUnsupported)
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if err := checkDescriptor(d); err != nil {
			return m, err
		}
	}
	return m, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if err := ocispec.Validate(d.Digest); err != nil || d.Digest.Algorithm() != "sha256" {
		return fmt.Errorf("manifest names digest %q, which is not a sha256: %w", string(d.Digest), ErrUnsupported)
	}
	if d.Size < 0 {
		return fmt.Errorf("manifest gives %s a size of %d: %w", d.Digest, d.Size, ErrMismatch)
	}
	return nil
}
