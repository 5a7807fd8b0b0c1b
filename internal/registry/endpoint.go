package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
)

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

	base string     // of the API's paths; "" is /v2
	ns   bool       // a mirror of several registries is told which one is meant
	can  capability // 0: everything
}

// String returns the endpoint as a person would write it.
func (e Endpoint) String() string {
	s := e.Scheme + "://" + e.Host
	if e.base != "" && e.base != "/v2" {
		s += e.base
	}
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

// api returns the address that all others begin with, https://host/v2.
func (e Endpoint) api() string {
	base := e.base
	if base == "" {
		base = "/v2"
	}
	return e.Scheme + "://" + e.Host + base
}

func (e Endpoint) url(path, kind, name string) string {
	s := e.api() + "/" + e.repo(path) + "/" + kind + "/" + name
	if e.ns {
		s += "?ns=" + url.QueryEscape(e.Domain)
	}
	return s
}

// pull is the scope of reading a repository, push that of writing to it.
func (e Endpoint) pull(path string) string { return "repository:" + e.repo(path) + ":pull" }
func (e Endpoint) push(path string) string { return "repository:" + e.repo(path) + ":pull,push" }

// owns reports whether a URL leads to the endpoint's own host: credentials go nowhere else.
func (e Endpoint) owns(target string) bool {
	u, err := url.Parse(target)
	return err == nil && u.Scheme == e.Scheme && u.Host == e.Host
}

// everyRegistry is the configuration's entry for registries that have no mirrors of their own.
const everyRegistry = "*"

// registryMark stands for the registry's name in a mirror's path.
const registryMark = "{registry}"

// endpoints lists where to ask for a registry's images, in order: the configuration's mirrors, the hosts of its hosts.toml, itself.
func (c *Client) endpoints(domain string) ([]Endpoint, error) {
	c.mu.Lock()
	eps, ok := c.hosts[domain]
	c.mu.Unlock()
	if ok {
		return eps, nil
	}
	file, err := hostsOf(c.dirs, domain)
	if err != nil {
		return nil, err
	}
	r := c.cfg[domain]
	mirrors, all := r.Mirrors, false
	if mirrors == nil {
		mirrors, all = c.cfg[everyRegistry].Mirrors, true
	}
	for _, m := range mirrors {
		u, err := url.Parse(m)
		if err != nil || u.Host == "" || all && u.Host == domain {
			continue // config.Load refuses the first; nobody is his own mirror
		}
		ep := Endpoint{Domain: domain, Scheme: u.Scheme, Host: u.Host, Prefix: strings.Trim(u.Path, "/"), Mirror: true}
		if strings.Contains(ep.Prefix, registryMark) {
			ep.Prefix = strings.ReplaceAll(ep.Prefix, registryMark, strings.ReplaceAll(domain, ":", "_"))
		} else {
			ep.ns = all
		}
		eps = append(eps, ep)
		c.transports.name(u.Host, tlsFiles{})
	}
	for _, h := range file.hosts {
		ep := c.use(domain, h)
		ep.Mirror, ep.ns = true, h.host != domain
		ep.can &^= canPush // pushes go to the registry itself
		eps = append(eps, ep)
	}
	host := domain
	if domain == "docker.io" {
		host = "registry-1.docker.io" // docker.io itself is a web site
	}
	own := hostEntry{host: host, can: canPull | canResolve | canPush}
	if file.server != nil {
		own = *file.server
		if own.host == "" || own.host == "docker.io" {
			own.host = host
		}
	}
	if c.insecure {
		own.tls.skip = true
		c.mu.Lock()
		c.plain[own.host] = true
		c.mu.Unlock()
	}
	if own.scheme != "" {
		ep := c.use(domain, own)
		if ep.Scheme == "http" {
			c.mu.Lock()
			c.plain[ep.Host] = true
			c.mu.Unlock()
		}
		eps = append(eps, ep)
	} else {
		if !r.PlainHTTP {
			own.scheme = "https"
			eps = append(eps, c.use(domain, own))
		}
		if r.PlainHTTP || isLoopback(own.host) || c.insecure {
			own.scheme = "http"
			eps = append(eps, c.use(domain, own))
		}
	}
	c.mu.Lock()
	c.hosts[domain] = eps
	c.mu.Unlock()
	return eps, nil
}

// use makes an endpoint of a host's settings.
func (c *Client) use(domain string, h hostEntry) Endpoint {
	c.transports.name(h.host, h.tls)
	ep := Endpoint{Domain: domain, Scheme: h.scheme, Host: h.host, base: h.base, can: h.can}
	if ep.base == "/v2" {
		ep.base = ""
	}
	if ep.can == canPull|canResolve|canPush {
		ep.can = 0
	}
	if len(h.header) > 0 {
		c.mu.Lock()
		c.headers[h.scheme+"://"+h.host] = h.header
		c.mu.Unlock()
	}
	return ep
}

// may returns the endpoints that may be asked for something. What a digest names is what any of them has, a tag's meaning is not.
func (c *Client) may(domain string, what capability) ([]Endpoint, error) {
	all, err := c.endpoints(domain)
	if err != nil {
		return nil, err
	}
	var eps []Endpoint
	for _, ep := range all {
		if ep.can == 0 || ep.can&what != 0 {
			eps = append(eps, ep)
		}
	}
	if len(eps) == 0 {
		return nil, refused("no host of %s is allowed to answer this: see capabilities in its hosts.toml", domain)
	}
	return eps, nil
}

// wanted is what asking for a tag or digest takes.
func wanted(tagOrDigest string) capability {
	if strings.Contains(tagOrDigest, ":") {
		return canPull
	}
	return canResolve
}

// first calls ask with one endpoint after another that may be asked for something, and returns that which answered without an error.
// When all fail, the error has what each said.
func (c *Client) first(ctx context.Context, domain string, what capability, ask func(Endpoint) error) (Endpoint, error) {
	eps, err := c.may(domain, what)
	if err != nil {
		return Endpoint{}, err
	}
	return c.firstOf(ctx, eps, ask)
}

func (c *Client) firstOf(ctx context.Context, eps []Endpoint, ask func(Endpoint) error) (Endpoint, error) {
	var failed []error
	for i, ep := range eps {
		err := ask(ep)
		if err == nil {
			return ep, nil
		}
		if ctx.Err() != nil {
			return Endpoint{}, ctx.Err()
		}
		// The same host by http next, on a loopback address: one report of it is enough.
		tryHTTP := i+1 < len(eps) && ep.Scheme == "https" && !ep.Mirror && eps[i+1].Scheme == "http" && eps[i+1].Host == ep.Host
		if tryHTTP && noTLS(err) {
			continue
		}
		failed = append(failed, &endpointError{ep, err})
		if tryHTTP {
			break // it does speak https
		}
	}
	return Endpoint{}, joinLine(failed)
}

// noTLS reports whether https failed in a way that http may not.
func noTLS(err error) bool {
	return errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, syscall.ECONNREFUSED)
}

// after returns the endpoints that may be asked for what ep, a mirror, does not have.
func (c *Client) after(ep Endpoint) []Endpoint {
	if !ep.Mirror {
		return nil
	}
	eps, err := c.may(ep.Domain, canPull)
	if err != nil {
		return nil
	}
	return eps[slices.Index(eps, ep)+1:]
}

// itself returns the registry itself, by https and, on a loopback address, by http.
func (c *Client) itself(domain string, what capability) ([]Endpoint, error) {
	eps, err := c.may(domain, what)
	if err != nil {
		return nil, err
	}
	eps = slices.DeleteFunc(eps, func(ep Endpoint) bool { return ep.Mirror })
	if len(eps) == 0 {
		return nil, refused("%s itself is not allowed to answer this: see capabilities in its hosts.toml", domain)
	}
	return eps, nil
}

// PushEndpoint returns where images of a registry are pushed to: the registry itself, never a mirror. A loopback address is asked
// whether it speaks https or http.
func (c *Client) PushEndpoint(ctx context.Context, domain, path string) (Endpoint, error) {
	eps, err := c.itself(domain, canPush)
	if err != nil {
		return Endpoint{}, fmt.Errorf("push to %s: %w", domain, err)
	}
	return c.speaking(ctx, eps)
}

// speaking returns the endpoint that speaks its protocol, asking only where there is a choice.
func (c *Client) speaking(ctx context.Context, eps []Endpoint) (Endpoint, error) {
	if len(eps) == 1 {
		return eps[0], nil
	}
	return c.firstOf(ctx, eps, func(ep Endpoint) error {
		resp, err := c.do(ctx, request{ep: ep, method: http.MethodGet, target: ep.api() + "/", bare: true})
		if err != nil {
			return err
		}
		drop(resp)
		return nil
	})
}

// isLoopback reports whether host (with or without port) is this machine by name or address; no DNS answer can make it so.
func isLoopback(host string) bool {
	h := hostname(host)
	if h == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(h)
	return err == nil && a.IsLoopback()
}

func hostname(host string) string { return (&url.URL{Host: host}).Hostname() }
