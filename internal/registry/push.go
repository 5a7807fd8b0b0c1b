package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"conex/internal/ocispec"
)

// HasBlob reports whether a repository that is pushed to has a blob already, and its size (-1 if the registry does not say).
func (c *Client) HasBlob(ctx context.Context, ep Endpoint, path string, d ocispec.Digest) (size int64, ok bool, err error) {
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodHead, target: ep.url(path, "blobs", string(d)), scopes: []string{ep.push(path)}})
	if err != nil {
		return 0, false, pushError(ep, d, err)
	}
	defer drop(resp)
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.ContentLength, true, nil
	case http.StatusNotFound:
		return 0, false, nil
	}
	return 0, false, pushError(ep, d, answerError(resp))
}

// MountBlob makes repository path have a blob of repository from, of the same registry, without moving a byte. mounted is false where
// the registry does not do that, or not for us: then the blob must be uploaded.
func (c *Client) MountBlob(ctx context.Context, ep Endpoint, path string, d ocispec.Digest, from string) (mounted bool, err error) {
	q := url.Values{"mount": {string(d)}, "from": {ep.repo(from)}}
	target := ep.url(path, "blobs", "uploads/") + "?" + q.Encode()
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodPost, target: target, scopes: []string{ep.push(path), ep.pull(from)}})
	if err != nil {
		if errors.Is(err, ErrDenied) {
			return false, nil // of reading the other repository, perhaps; if it is of writing, the upload will say so
		}
		return false, pushError(ep, d, err)
	}
	defer drop(resp)
	switch status := resp.StatusCode; {
	case status == http.StatusCreated:
		return true, nil
	case status == http.StatusAccepted:
		// An upload was opened instead. Nobody will use it: where the blob came from decides how it is uploaded.
		if loc, err := follow(target, resp.Header.Get("Location")); err == nil {
			c.cancel(ctx, ep, path, loc)
		}
		return false, nil
	case status == http.StatusTooManyRequests || status >= 500:
		return false, pushError(ep, d, answerError(resp))
	}
	return false, nil
}

// Upload is a blob to be put into a registry.
type Upload struct {
	// Digest names it; "" when it is known only after reading, see Sum.
	Digest ocispec.Digest
	// Size is -1 when it is not known before.
	Size int64
	// Open begins to read it. Every attempt reads from the start.
	Open func() (io.ReadCloser, error)
	// Sum is called, if Digest is "", when the body was read to its end, and returns its digest.
	Sum func() ocispec.Digest
}

// PutBlob uploads a blob in one piece if its digest and size are known, else as a stream whose digest follows. It begins anew, after a
// pause, when the connection breaks or the registry is overloaded. A nil error promises that the registry has confirmed the digest.
func (c *Client) PutBlob(ctx context.Context, ep Endpoint, path string, up Upload) error {
	for n := 0; ; n++ {
		opened, err := c.putBlob(ctx, ep, path, up)
		if err == nil {
			return nil
		}
		var source *sourceError
		if errors.As(err, &source) {
			return source.err // our own disk's, not the registry's
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		again, after := !unreachable(err) && !isAnswer(err), ""
		var answer *AnswerError
		if errors.As(err, &answer) {
			again = answer.Status >= 500 || answer.Status == http.StatusTooManyRequests || answer.Status == http.StatusRequestTimeout ||
				answer.Code == "BLOB_UPLOAD_UNKNOWN" || answer.Code == "BLOB_UPLOAD_INVALID"
			after = answer.after
		}
		if !again || !opened || n+1 >= attempts { // opening one was tried often enough
			return pushError(ep, up.Digest, err)
		}
		if err := c.wait(ctx, n, after); err != nil {
			return err
		}
	}
}

// putBlob is one attempt. If it fails, the registry is told to forget the upload, if one was opened.
func (c *Client) putBlob(ctx context.Context, ep Endpoint, path string, up Upload) (opened bool, err error) {
	upload := ep.url(path, "blobs", "uploads/") // becomes the upload's own address, which may change with every answer
	ask := func(method, target string, open func() (*sending, error)) (*http.Response, error) {
		r := request{ep: ep, method: method, target: target, scopes: []string{ep.push(path)}, open: open}
		if open != nil {
			r.header = http.Header{"Content-Type": {"application/octet-stream"}}
		}
		resp, err := c.do(ctx, r)
		if err != nil {
			return nil, err
		}
		defer drop(resp)
		if resp.StatusCode/100 != 2 {
			return nil, answerError(resp)
		}
		if loc := resp.Header.Get("Location"); loc != "" && method != http.MethodPut || method == http.MethodPost {
			upload, err = follow(target, loc)
		}
		return resp, err
	}
	if _, err := ask(http.MethodPost, upload, nil); err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			c.cancel(ctx, ep, path, upload)
		}
	}()
	var last *sending
	open := func() (*sending, error) {
		r, err := up.Open()
		if err != nil {
			return nil, &sourceError{err}
		}
		last = &sending{r: r, size: up.Size}
		return last, nil
	}
	var resp *http.Response
	if up.Digest != "" && up.Size >= 0 {
		if resp, err = ask(http.MethodPut, withDigest(upload, up.Digest), open); err != nil {
			return true, err
		}
		if err := last.complete(); err != nil {
			return true, err
		}
		return true, confirmed(resp, up.Digest)
	}
	if _, err := ask(http.MethodPatch, upload, open); err != nil {
		return true, err
	}
	if err := last.complete(); err != nil {
		return true, err
	}
	if up.Digest == "" {
		up.Digest = up.Sum()
	}
	if resp, err = ask(http.MethodPut, withDigest(upload, up.Digest), nil); err != nil {
		return true, err
	}
	return true, confirmed(resp, up.Digest)
}

// withDigest adds ?digest= to an upload's address, keeping what the registry has put there.
func withDigest(target string, d ocispec.Digest) string {
	sep := "?"
	if strings.Contains(target, "?") {
		sep = "&"
	}
	return target + sep + "digest=" + url.QueryEscape(string(d))
}

// confirmed checks the digest that a registry says it has stored, if it says one.
func confirmed(resp *http.Response, d ocispec.Digest) error {
	if got := resp.Header.Get("Docker-Content-Digest"); strings.HasPrefix(got, "sha256:") && got != string(d) {
		return fmt.Errorf("the registry stored %s instead of %s: %w", oneLine(got), d, ErrMismatch)
	}
	return nil
}

// cancel tells the registry to forget an upload, shortly: it would in its own time.
func (c *Client) cancel(ctx context.Context, ep Endpoint, path, target string) {
	if !ep.owns(target) {
		return
	}
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer stop()
	resp, _, err := c.try(ctx, request{ep: ep, method: http.MethodDelete, target: target, scopes: []string{ep.push(path)}})
	if err == nil {
		drop(resp)
	}
}

// PutManifest stores a manifest or index under a tag or its digest, and returns its digest. What it names must be there.
func (c *Client) PutManifest(ctx context.Context, ep Endpoint, path, tagOrDigest, mediaType string, raw []byte) (ocispec.Digest, error) {
	d := ocispec.FromBytes(raw)
	if strings.Contains(tagOrDigest, ":") && tagOrDigest != string(d) {
		return "", fmt.Errorf("manifest is %s, not %s: %w", d, tagOrDigest, ErrMismatch)
	}
	r := request{ep: ep, method: http.MethodPut, target: ep.url(path, "manifests", tagOrDigest), scopes: []string{ep.push(path)},
		header: http.Header{"Content-Type": {mediaType}}, raw: raw}
	resp, err := c.do(ctx, r)
	if err == nil {
		defer drop(resp)
		if resp.StatusCode/100 == 2 {
			err = confirmed(resp, d)
		} else {
			err = answerError(resp)
		}
	}
	if err != nil {
		return "", &endpointError{ep, fmt.Errorf("put manifest %s: %w", tagOrDigest, err)}
	}
	return d, nil
}

func pushError(ep Endpoint, d ocispec.Digest, err error) error {
	if d == "" {
		return &endpointError{ep, fmt.Errorf("push blob: %w", err)}
	}
	return &endpointError{ep, fmt.Errorf("push blob %s: %w", d, err)}
}

// sourceError is a failure to read what should be uploaded.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// sending is a body on its way. The http package may read and close it for some time after its answer; finish ends that.
type sending struct {
	size int64 // -1: unknown

	mu     sync.Mutex
	r      io.ReadCloser // nil: finished
	n      int64
	end    bool // read to its end
	failed error
	timer  *time.Timer // ends the request when nobody reads
	stall  time.Duration
}

// watch calls cancel when the network takes nothing for so long.
func (s *sending) watch(stall time.Duration, cancel func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stall, s.timer = stall, time.AfterFunc(stall, cancel)
}

// piece is how much of a body goes at a time, in bytes.
const piece = 1 << 20

// WriteTo serves a body of unknown size: each piece becomes one chunk on the wire. Pieces of a compressor's size wake a registry up more
// often than they are worth: with whole megabytes a push of 512 MB is 8 to 17 % shorter.
func (s *sending) WriteTo(w io.Writer) (n int64, err error) {
	buf := make([]byte, piece)
	for {
		k, err := 0, error(nil)
		for k < len(buf) && err == nil {
			var got int
			got, err = s.Read(buf[k:])
			k += got
		}
		if k > 0 {
			j, werr := w.Write(buf[:k])
			if n += int64(j); werr != nil {
				return n, werr
			}
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func (s *sending) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.r == nil {
		return 0, io.ErrClosedPipe
	}
	s.timer.Stop() // what takes time now is our own side
	n, err := s.r.Read(p)
	s.n += int64(n)
	switch {
	case err == io.EOF && s.n < s.size:
		s.failed = fmt.Errorf("blob ended after %d of %d bytes: %w", s.n, s.size, io.ErrUnexpectedEOF)
		return n, s.failed
	case err == io.EOF:
		s.end = true
	case err != nil:
		s.failed = err
	}
	if s.size >= 0 && s.n > s.size {
		s.failed = fmt.Errorf("blob is larger than the %d bytes that were announced", s.size)
		return 0, s.failed
	}
	if s.n != s.size && !s.end && s.failed == nil {
		s.timer.Reset(s.stall)
	}
	return n, err
}

func (s *sending) Close() error { return nil }

// finish ends the reading and returns what went wrong with it.
func (s *sending) finish() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.r == nil {
		return nil
	}
	err := s.r.Close()
	s.r = nil
	if s.failed != nil {
		err = s.failed
	}
	if err != nil {
		return &sourceError{err}
	}
	return nil
}

// complete returns an error if a registry was content before it had all.
func (s *sending) complete() error {
	if s == nil || s.end || s.n == s.size {
		return nil
	}
	return fmt.Errorf("the registry accepted the upload after %d bytes: %w", s.n, ErrMismatch)
}
