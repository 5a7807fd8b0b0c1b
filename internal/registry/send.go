package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// attempts is how often a request is sent before its failure is believed.
const attempts = 5

// maxWait bounds what a registry's Retry-After can make us wait.
const maxWait = 30 * time.Second

// request is one thing to ask of an endpoint.
type request struct {
	ep             Endpoint
	method, target string
	header         http.Header
	// scopes are the rights that a token for it must have, as in repository:team/app:pull,push.
	scopes []string
	// stream leaves it to the caller how long the body of a good answer may take.
	stream bool
	// bare asks without credentials but those in header, and leaves a 401 to the caller.
	bare bool
	// raw is a small body.
	raw []byte
	// open makes a large body, anew for every time that it is sent; nil for none. Such a request is not repeated after a failure:
	// what the registry has of it by then is unknown, and only who uploads can begin again.
	open func() (*sending, error)
}

// send asks ep with GET for a blob of repository path, see do.
func (c *Client) send(ctx context.Context, ep Endpoint, path, target string, header http.Header) (*http.Response, error) {
	return c.do(ctx, request{ep: ep, method: http.MethodGet, target: target, header: header, scopes: []string{ep.pull(path)}, stream: true})
}

// do sends r. It logs in when asked to, and repeats after a dropped connection, 429 and 5xx. The answer's status is the caller's to
// judge; its body must be closed.
func (c *Client) do(ctx context.Context, r request) (*http.Response, error) {
	authed := false
	hops := 0
	for n := 0; ; n++ {
		resp, used, err := c.try(ctx, r)
		if err != nil {
			if r.open == nil && n+1 < attempts && ctx.Err() == nil && !isAnswer(err) && temporary(err) {
				if err := c.wait(ctx, n, ""); err != nil {
					return nil, err
				}
				continue
			}
			return nil, explain(r.ep, plain(err))
		}
		switch status := resp.StatusCode; {
		case status == http.StatusUnauthorized && !authed && !r.bare && r.ep.owns(r.target):
			challenge := resp.Header.Values("WWW-Authenticate")
			drop(resp)
			authed = true
			if err := c.login(ctx, r.ep, r.scopes, used, challenge); err != nil {
				return nil, err
			}
		case r.open != nil && (status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect) && hops < maxHops:
			// The http package follows by itself where there is no body to be sent again.
			loc := resp.Header.Get("Location")
			drop(resp)
			hops++
			if r.target, err = follow(r.target, loc); err != nil {
				return nil, err
			}
		case r.open == nil && n+1 < attempts && (status == http.StatusTooManyRequests || status >= 500):
			after := resp.Header.Get("Retry-After")
			drop(resp)
			if err := c.wait(ctx, n, after); err != nil {
				return nil, err
			}
		default:
			return resp, nil
		}
	}
}

// try sends r once and tells which Authorization it had.
func (c *Client) try(ctx context.Context, r request) (resp *http.Response, auth string, err error) {
	var raw io.Reader
	if r.raw != nil {
		raw = bytes.NewReader(r.raw)
	}
	req, err := http.NewRequestWithContext(ctx, r.method, r.target, raw)
	if err != nil {
		return nil, "", err
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", "conex")
	if r.ep.owns(r.target) {
		c.mu.Lock()
		for k, v := range c.headers[r.ep.Scheme+"://"+r.ep.Host] {
			req.Header[k] = v
		}
		c.mu.Unlock()
	}
	if !r.bare && r.ep.owns(r.target) {
		if auth = c.token(r.ep, r.scopes); auth != "" {
			req.Header.Set("Authorization", auth)
		}
	}
	inner, cancel := context.WithCancel(ctx)
	req = req.WithContext(inner)
	if r.open == nil {
		if resp, err = c.http.Do(req); err != nil {
			cancel()
			return nil, auth, err
		}
		c.within(resp, cancel, r.stream && (resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusPartialContent))
		return resp, auth, nil
	}
	body, err := r.open()
	if err != nil {
		cancel()
		return nil, auth, err
	}
	body.watch(c.stall, cancel)
	req.Body, req.ContentLength = body, body.size
	if body.size == 0 {
		req.Body = http.NoBody
	}
	resp, err = c.http.Do(req)
	if err == nil {
		c.within(resp, cancel, false)
		err = buffer(resp)
	} else if inner.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("the registry took nothing for %s: %w", c.stall, os.ErrDeadlineExceeded)
	}
	cancel()
	if source := body.finish(); source != nil {
		err = source
	}
	if err != nil {
		return nil, auth, err
	}
	return resp, auth, nil
}

// timed is the body of an answer that must come to its end within a time; only blobs may take longer, and watch themselves.
type timed struct {
	io.ReadCloser
	limit  time.Duration
	timer  *time.Timer // nil: no limit
	late   atomic.Bool
	cancel context.CancelFunc // of the request
}

// within bounds the time of an answer's body, unless it is a blob's stream. cancel ends the request, at the latest with the body.
func (c *Client) within(resp *http.Response, cancel context.CancelFunc, stream bool) {
	t := &timed{ReadCloser: resp.Body, limit: c.stall, cancel: cancel}
	if !stream {
		t.timer = time.AfterFunc(c.stall, func() {
			t.late.Store(true)
			cancel()
		})
	}
	resp.Body = t
}

func (t *timed) Read(p []byte) (int, error) {
	n, err := t.ReadCloser.Read(p)
	if err != nil && err != io.EOF && t.late.Load() {
		err = fmt.Errorf("the answer did not end within %s: %w", t.limit, ErrMismatch)
	}
	return n, err
}

// Close ends the request.
func (t *timed) Close() error {
	if t.timer != nil {
		t.timer.Stop()
	}
	err := t.ReadCloser.Close()
	t.cancel()
	return err
}

// buffer takes in the body of an answer to an upload, which is empty or tells of an error.
func buffer(resp *http.Response) error {
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(raw))
	return err
}

// maxHops bounds the redirects of one request.
const maxHops = 10

// follow resolves a Location header against the URL that was asked. A registry behind a proxy that ends TLS often calls itself http;
// that is put right, another way from https to http is refused.
func follow(from, location string) (string, error) {
	base, err := url.Parse(from)
	if err != nil {
		return "", err
	}
	u, err := url.Parse(location)
	if err != nil || location == "" {
		return "", fmt.Errorf("the registry sends us to %q, which is no address: %w", oneLine(location), ErrMismatch)
	}
	u = base.ResolveReference(u)
	if base.Scheme == "https" && u.Scheme == "http" && u.Host == base.Host {
		u.Scheme = "https"
	}
	if u.Host == "" {
		return "", refused("refused a redirect to %q", oneLine(location))
	}
	if err := mayLead(base, u); err != nil {
		return "", err
	}
	u.User, u.Fragment = nil, ""
	return u.String(), nil
}

// dropTime bounds how long a connection is worth saving.
const dropTime = 2 * time.Second

// drop empties an answer nobody reads, so that its connection can serve again.
func drop(resp *http.Response) {
	if t, ok := resp.Body.(*timed); ok && t.timer != nil {
		t.timer.Reset(min(dropTime, t.limit))
	}
	io.CopyN(io.Discard, resp.Body, 64<<10) //nolint:errcheck // a connection that fails here is not reused, which is all
	resp.Body.Close()
}

// wait sleeps before attempt n+1: what the server asked for, else twice as long each time, with some chance in it so that many
// clients don't come back together.
func (c *Client) wait(ctx context.Context, n int, retryAfter string) error {
	d := c.backoff(n)
	d += rand.N(d/2 + 1)
	if asked := after(retryAfter, time.Now()); asked > 0 {
		d = min(asked, c.maxWait)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// after reads a Retry-After header, which counts seconds or names a time; 0 for none.
func after(header string, now time.Time) time.Duration {
	header = strings.TrimSpace(header)
	if s, err := strconv.Atoi(header); err == nil {
		return time.Duration(min(max(s, 0), 1<<20)) * time.Second
	}
	if t, err := http.ParseTime(header); err == nil {
		return max(t.Sub(now), 0)
	}
	return 0
}

// unreachable reports whether no connection to a host came about.
func unreachable(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return !dns.IsTemporary || dns.IsNotFound
	}
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	return errors.As(err, &op) && op.Op == "dial" || errors.As(err, &cert) || errors.Is(err, http.ErrSchemeMismatch)
}

// temporary reports whether asking again may help. A host that is unknown, refuses or does not answer a
// connection will do so in a second too, and the next mirror should not wait for it.
func temporary(err error) bool {
	if unreachable(err) {
		return false
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return true
	}
	var netErr net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded) ||
		(errors.As(err, &netErr) && netErr.Timeout() && !errors.Is(err, context.DeadlineExceeded))
}
