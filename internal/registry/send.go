package registry

import (
	"context"
	"encoding/json"
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
	"syscall"
	"time"
)

// attempts is how often a request is sent before its failure is believed.
const attempts = 5

// maxWait bounds what a registry's Retry-After can make us wait.
const maxWait = 30 * time.Second

// send asks ep with GET for a resource of repository path. It logs in when asked to, and repeats after a dropped connection, 429
// and 5xx. The answer's status is the caller's to judge; its body must be closed.
func (c *Client) send(ctx context.Context, ep Endpoint, path, target string, header http.Header) (*http.Response, error) {
	authed := false
	for n := 0; ; n++ {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return nil, err
		}
		for k, v := range header {
			req.Header[k] = v
		}
		req.Header.Set("User-Agent", "conex")
		if t := c.token(ep, path); t != "" {
			req.Header.Set("Authorization", t)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			if n+1 < attempts && ctx.Err() == nil && temporary(err) {
				if err := c.wait(ctx, n, ""); err != nil {
					return nil, err
				}
				continue
			}
			return nil, plain(err)
		}
		if resp.StatusCode == http.StatusUnauthorized && !authed {
			challenge := resp.Header.Values("WWW-Authenticate")
			drop(resp)
			authed = true
			if err := c.login(ctx, ep, path, challenge); err != nil {
				return nil, err
			}
			continue
		}
		if n+1 < attempts && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500) {
			after := resp.Header.Get("Retry-After")
			drop(resp)
			if err := c.wait(ctx, n, after); err != nil {
				return nil, err
			}
			continue
		}
		return resp, nil
	}
}

// drop empties an answer nobody reads, so that its connection can serve again.
func drop(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 64<<10) //nolint:errcheck // a connection that fails here is not reused, which is all
	resp.Body.Close()
}

// wait sleeps before attempt n+1: what the server asked for, else twice as long each time, with some chance in it so that many
// clients don't come back together.
func (c *Client) wait(ctx context.Context, n int, retryAfter string) error {
	d := c.backoff(n)
	d += rand.N(d/2 + 1)
	if s, err := strconv.Atoi(strings.TrimSpace(retryAfter)); err == nil && s > 0 {
		d = min(time.Duration(s)*time.Second, maxWait)
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

// temporary reports whether asking again may help. A host that is unknown, refuses or does not answer a
// connection will do so in a second too, and the next mirror should not wait for it.
func temporary(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsTemporary && !dns.IsNotFound
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return false
	}
	var netErr net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded) ||
		(errors.As(err, &netErr) && netErr.Timeout() && !errors.Is(err, context.DeadlineExceeded))
}

// plain takes the method and URL off a client error; whoever prints it names the endpoint.
func plain(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// endpointError says which endpoint failed.
type endpointError struct {
	ep  Endpoint
	err error
}

func (e *endpointError) Error() string {
	kind := "registry "
	if e.ep.Mirror {
		kind = "mirror "
	}
	return kind + e.ep.String() + ": " + e.err.Error()
}

func (e *endpointError) Unwrap() error { return e.err }

// lineError is several errors in one line. It is, for errors.Is, the last of them: what the registry itself said counts, the mirrors
// only explain.
type lineError struct{ errs []error }

func joinLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return &lineError{errs}
}

func (e *lineError) Error() string {
	s := make([]string, len(e.errs))
	for i, err := range e.errs {
		s[i] = err.Error()
	}
	return strings.Join(s, "; ")
}

func (e *lineError) Unwrap() error { return e.errs[len(e.errs)-1] }

// Cause returns what the registry itself, the last that was asked, answered to a Resolve, without the endpoints' names. Behind it stand
// in brackets the mirrors that failed otherwise than by not having the image: it may lie there.
func Cause(err error) error {
	var failed []string
	var line *lineError
	if errors.As(err, &line) {
		for _, e := range line.errs[:len(line.errs)-1] {
			if !errors.Is(e, ErrManifestUnknown) && !errors.Is(e, ErrNameUnknown) {
				failed = append(failed, e.Error())
			}
		}
	}
	var ee *endpointError
	for errors.As(err, &ee) {
		err = ee.err
	}
	if len(failed) > 0 {
		return fmt.Errorf("%w (%s)", err, strings.Join(failed, "; "))
	}
	return err
}

// AnswerError is an answer that is no success.
type AnswerError struct {
	// Status is the HTTP status code.
	Status int
	// Code and Message are the first error of the body, as the distribution specification has them; both may be "".
	Code, Message string
}

func (e *AnswerError) Error() string {
	code := strings.ToLower(strings.ReplaceAll(e.Code, "_", " "))
	switch {
	case code != "" && e.Message != "":
		return code + ": " + e.Message
	case code != "":
		return code
	case e.Status == http.StatusTooManyRequests:
		return "too many requests: the registry limits how much may be pulled; try again later"
	}
	return fmt.Sprintf("unexpected status %d %s", e.Status, http.StatusText(e.Status))
}

// Is maps the specification's codes, and statuses without one, to this package's sentinels.
func (e *AnswerError) Is(target error) bool {
	switch e.Code {
	case "MANIFEST_UNKNOWN", "TAG_INVALID", "NOT_FOUND":
		return target == ErrManifestUnknown
	case "NAME_UNKNOWN":
		return target == ErrNameUnknown
	case "DENIED", "UNAUTHORIZED":
		return target == ErrDenied
	}
	switch e.Status {
	case http.StatusNotFound:
		return target == ErrManifestUnknown
	case http.StatusUnauthorized, http.StatusForbidden:
		return target == ErrDenied
	}
	return false
}

// answerError reads an answer that is no success.
func answerError(resp *http.Response) error {
	e := &AnswerError{Status: resp.StatusCode}
	var body struct {
		Errors []struct{ Code, Message string } `json:"errors"`
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err == nil && json.Unmarshal(raw, &body) == nil && len(body.Errors) > 0 {
		e.Code, e.Message = oneLine(body.Errors[0].Code), oneLine(body.Errors[0].Message)
	}
	return e
}

// oneLine makes a foreign text fit to be printed: no control characters (a terminal would obey them), no more than 300 bytes.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
			return ' '
		}
		return r
	}, s)
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "..."
	}
	return strings.TrimSpace(s)
}

// isAnswer reports whether err is something that a registry said, as opposed to a failure to reach one.
func isAnswer(err error) bool {
	var a *AnswerError
	return errors.As(err, &a) || errors.Is(err, ErrMismatch) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrDenied)
}
