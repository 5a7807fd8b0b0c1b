package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"conex/internal/ocispec"
)

// Bounds of a listing (tags, catalog): a registry could go on for ever.
const (
	maxPages   = 1000
	maxListing = 64 << 20 // bytes of all pages
	maxNames   = 500_000

	listingTime = 5 * time.Minute
)

// HeadManifest asks what domain/path has at tagOrDigest, without fetching it where the registry can say that. Endpoints and errors
// are as of Resolve.
func (c *Client) HeadManifest(ctx context.Context, domain, path, tagOrDigest string) (ocispec.Descriptor, Endpoint, error) {
	var desc ocispec.Descriptor
	ep, err := c.first(ctx, domain, wanted(tagOrDigest), func(ep Endpoint) (err error) {
		desc, err = c.head(ctx, ep, path, tagOrDigest)
		return err
	})
	return desc, ep, err
}

func (c *Client) head(ctx context.Context, ep Endpoint, path, tagOrDigest string) (ocispec.Descriptor, error) {
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodHead, target: ep.url(path, "manifests", tagOrDigest), header: http.Header{"Accept": accept},
		scopes: []string{ep.pull(path)}})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	drop(resp)
	if resp.StatusCode == http.StatusTooManyRequests {
		return ocispec.Descriptor{}, answerError(resp)
	}
	desc := ocispec.Descriptor{Digest: ocispec.Digest(resp.Header.Get("Docker-Content-Digest")), Size: resp.ContentLength}
	desc.MediaType, _, _ = mime.ParseMediaType(resp.Header.Get("Content-Type")) //nolint:errcheck // then it is none of ours
	asked := strings.Contains(tagOrDigest, ":")
	if resp.StatusCode == http.StatusOK && knownType(desc.MediaType) && checkDescriptor(desc) == nil && (!asked || string(desc.Digest) == tagOrDigest) {
		return desc, nil
	}
	// An answer without these is allowed, and one to HEAD has no body that could say what is wrong.
	desc, _, err = c.manifest(ctx, ep, path, tagOrDigest)
	return desc, err
}

// knownType reports whether a media type is that of a manifest or index that we understand.
func knownType(mediaType string) bool {
	return slices.Contains(accept, mediaType)
}

// Tags lists the tags of domain/path, as the first endpoint that can has them.
func (c *Client) Tags(ctx context.Context, domain, path string) ([]string, error) {
	var tags []string
	_, err := c.first(ctx, domain, canResolve, func(ep Endpoint) error {
		tags = nil
		target := ep.api() + "/" + ep.repo(path) + "/tags/list?n=1000"
		if ep.ns {
			target += "&ns=" + url.QueryEscape(domain)
		}
		err := c.pages(ctx, ep, target, ep.pull(path), "tags", func(name string) bool {
			tags = append(tags, name)
			return true
		})
		if err != nil {
			return fmt.Errorf("list tags: %w", err)
		}
		return nil
	})
	return tags, err
}

// Catalog calls fn with the name of every repository of a registry, until it returns false. Many registries show nobody their catalog.
func (c *Client) Catalog(ctx context.Context, domain string, fn func(name string) bool) error {
	eps, err := c.itself(domain, canResolve)
	if err != nil {
		return err
	}
	ep, err := c.speaking(ctx, eps)
	if err != nil {
		return err
	}
	err = c.pages(ctx, ep, ep.api()+"/_catalog?n=1000", "registry:catalog:*", "repositories", fn)
	if err != nil {
		return &endpointError{ep, fmt.Errorf("list repositories: %w", err)}
	}
	return nil
}

// pages follows a listing from page to page: JSON objects with a list of names under key, and a Link header to the next.
func (c *Client) pages(ctx context.Context, ep Endpoint, target, scope, key string, fn func(string) bool) error {
	ctx, cancel := context.WithTimeout(ctx, c.listing)
	defer cancel()
	seen := map[string]bool{}
	size, names := 0, 0
	for page := 1; target != ""; page++ {
		if seen[target] || page > maxPages {
			return fmt.Errorf("the list does not end, %d pages were read: %w", page-1, ErrMismatch)
		}
		seen[target] = true
		list, n, next, err := c.page(ctx, ep, target, scope, key)
		if err != nil {
			if ctx.Err() == context.DeadlineExceeded {
				return fmt.Errorf("the list did not end within %s, %d pages were read: %w", c.listing, page-1, ErrMismatch)
			}
			return err
		}
		size += n
		names += len(list)
		if size > maxListing || names > maxNames {
			return fmt.Errorf("the list is longer than %d names or %d MB: %w", maxNames, maxListing>>20, ErrMismatch)
		}
		for _, name := range list {
			if !fn(name) {
				return nil
			}
		}
		target = next
	}
	return nil
}

// page reads one page and the address of the next, "" after the last.
func (c *Client) page(ctx context.Context, ep Endpoint, target, scope, key string) (names []string, size int, next string, err error) {
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodGet, target: target, scopes: []string{scope}})
	if err != nil {
		return nil, 0, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, 0, "", answerError(resp)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest+1))
	if err != nil {
		return nil, 0, "", err
	}
	if len(raw) > MaxManifest {
		return nil, 0, "", fmt.Errorf("a page is larger than %d bytes: %w", MaxManifest, ErrMismatch)
	}
	var body map[string]json.RawMessage
	if err := json.Unmarshal(raw, &body); err != nil {
		return nil, 0, "", fmt.Errorf("the list is not JSON: %w", ErrMismatch)
	}
	if list := body[key]; list != nil {
		if err := json.Unmarshal(list, &names); err != nil {
			return nil, 0, "", fmt.Errorf("%q is no list of names: %w", key, ErrMismatch)
		}
	}
	for _, name := range names {
		if name == "" || len(name) > 512 || oneLine(name) != name && len(name) <= 300 {
			return nil, 0, "", fmt.Errorf("%q holds the name %q: %w", key, oneLine(name), ErrMismatch)
		}
	}
	link := nextLink(resp.Header.Values("Link"))
	if link == "" {
		return names, len(raw), "", nil
	}
	if next, err = follow(target, link); err != nil {
		return nil, 0, "", err
	}
	if !ep.owns(next) {
		u, _ := url.Parse(next) //nolint:errcheck // follow made it
		return nil, 0, "", refused("the list goes on at another host, %s", oneLine(u.Host))
	}
	return names, len(raw), next, nil
}

// nextLink returns the target of a Link header's rel=next (RFC 8288), "" for none: </v2/a/tags/list?last=x&n=9>; rel="next".
func nextLink(headers []string) string {
	for _, s := range headers {
		for s != "" {
			_, after, ok := strings.Cut(s, "<")
			if !ok {
				break
			}
			target, rest, ok := strings.Cut(after, ">")
			if !ok {
				break
			}
			params := rest
			if i := strings.Index(rest, ",<"); i >= 0 {
				params = rest[:i]
			} else if i := strings.Index(rest, ", <"); i >= 0 {
				params = rest[:i]
			}
			s = rest[len(params):]
			for _, p := range strings.Split(params, ";") {
				k, v, _ := strings.Cut(strings.TrimSpace(p), "=")
				v = strings.Trim(strings.TrimSpace(v), `"`)
				if strings.EqualFold(strings.TrimSpace(k), "rel") && slices.Contains(strings.Fields(v), "next") {
					return target
				}
			}
		}
	}
	return ""
}
