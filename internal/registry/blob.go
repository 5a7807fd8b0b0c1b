package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"conex/internal/blobs"
	"conex/internal/ocispec"
)

// Blob streams the blob that desc names from ep, or where ep is a mirror that does not have it, from the endpoints behind it. The reader verifies: it never gives more than desc.Size bytes, and reports
// ErrMismatch instead of io.EOF if size or digest are not as promised. A connection that breaks or stalls on the way is taken up
// again where it ended. ctx ends the reading too.
func (c *Client) Blob(ctx context.Context, ep Endpoint, path string, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	rc, err := c.RawBlob(ctx, ep, path, desc, 0)
	if err != nil {
		return nil, err
	}
	b := rc.(*blob)
	v, err := blobs.Verify(b, desc.Digest)
	if err != nil {
		b.Close()
		return nil, b.wrap(err)
	}
	return &verified{v, b}, nil
}

// RawBlob is Blob from the byte at off on, for who has the bytes before and verifies the whole.
func (c *Client) RawBlob(ctx context.Context, ep Endpoint, path string, desc ocispec.Descriptor, off int64) (io.ReadCloser, error) {
	b := &blob{c: c, ctx: ctx, ep: ep, path: path, desc: desc, off: off}
	for {
		err := b.open()
		if err == nil {
			return b, nil
		}
		if !b.next(err) {
			return nil, b.wrap(err)
		}
	}
}

// verified translates the verifier's sentinel into this package's.
type verified struct {
	io.ReadCloser
	b *blob
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.ReadCloser.Read(p)
	if errors.Is(err, blobs.ErrMismatch) {
		err = v.b.wrap(fmt.Errorf("%w (%w)", ErrMismatch, err))
	}
	return n, err
}

// minProgress is how many bytes must come within the time of a stall, and over a connection that breaks, for it to be worth going on so. A
// registry that sends a byte a second would be done with a layer in years.
const minProgress = 64 << 10

// maxSlow is how often a connection may be too slow before the blob is given up.
const maxSlow = 3

// blob reads one blob across several connections.
type blob struct {
	c    *Client
	ctx  context.Context // of the read, given to Blob; a Reader has no other way to get it
	ep   Endpoint
	path string
	desc ocispec.Descriptor

	body   io.ReadCloser
	cancel context.CancelFunc // ends the present connection
	timer  *time.Timer        // calls cancel when nothing comes
	off    int64              // bytes delivered
	drops  int                // connections lost without having brought much
	came   int64              // bytes since the last reckoning of how fast they come
	waited time.Duration      // for these
	slow   int                // reckonings that were too slow, one after another

	rest   []Endpoint // behind ep, once a mirror has failed
	failed []error    // what the endpoints before ep said
}

func (b *blob) wrap(err error) error {
	return joinLine(append(b.failed, &endpointError{b.ep, fmt.Errorf("blob %s: %w", b.desc.Digest, err)}))
}

// next goes on to the endpoint behind a mirror that failed, where there is one. Bytes that were wrong don't count as a failure here: they are
// delivered already.
func (b *blob) next(err error) bool {
	if b.ctx.Err() != nil || errors.Is(err, ErrMismatch) && b.off > 0 {
		return false
	}
	rest := b.c.after(b.ep)
	if !b.ep.Mirror {
		// The registry itself on a loopback address: http behind https.
		rest = b.rest
	}
	if len(rest) == 0 {
		return false
	}
	if !noTLS(err) || b.ep.Mirror {
		b.failed = append(b.failed, &endpointError{b.ep, fmt.Errorf("blob %s: %w", b.desc.Digest, err)})
	}
	b.ep, b.rest, b.drops, b.slow = rest[0], rest[1:], 0, 0
	return true
}

// open asks for the bytes from off on.
func (b *blob) open() error {
	ctx, cancel := context.WithCancel(b.ctx)
	h := http.Header{"Accept": {"*/*"}}
	if b.off > 0 { // to the end in numbers: some registries understand no other form
		h.Set("Range", fmt.Sprintf("bytes=%d-%d", b.off, max(b.off, b.desc.Size-1)))
	}
	resp, err := b.c.send(ctx, b.ep, b.path, b.ep.url(b.path, "blobs", string(b.desc.Digest)), h)
	if err == nil && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		drop(resp)
		h.Del("Range")
		resp, err = b.c.send(ctx, b.ep, b.path, b.ep.url(b.path, "blobs", string(b.desc.Digest)), h)
	}
	if err != nil {
		cancel()
		return err
	}
	switch {
	case resp.StatusCode == http.StatusOK && b.off > 0:
		// No ranges here. What we have already was hashed, so skipping it is safe: other bytes would fail at the end.
		if _, err := io.CopyN(io.Discard, resp.Body, b.off); err != nil {
			resp.Body.Close()
			cancel()
			return err
		}
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent && b.off > 0:
	default:
		err := answerError(resp)
		resp.Body.Close()
		cancel()
		return err
	}
	if n := resp.ContentLength; n >= 0 && resp.StatusCode == http.StatusOK && n != b.desc.Size {
		resp.Body.Close()
		cancel()
		return fmt.Errorf("the registry offers %d bytes, the manifest says %d: %w", n, b.desc.Size, ErrMismatch)
	}
	b.body, b.cancel = resp.Body, cancel
	b.timer = time.AfterFunc(b.c.stall, cancel)
	return nil
}

func (b *blob) Read(p []byte) (int, error) {
	for {
		if b.body == nil {
			if err := b.open(); err != nil {
				if !b.again(err) && !b.next(err) {
					return 0, b.wrap(err)
				}
				continue
			}
		}
		b.timer.Reset(b.c.stall)
		began := time.Now()
		n, err := b.body.Read(p)
		b.waited += time.Since(began) // what the caller does in between is his own time
		b.timer.Stop()
		if over := b.off + int64(n) - b.desc.Size; over > 0 {
			return 0, b.wrap(fmt.Errorf("more than the %d bytes of the manifest: %w", b.desc.Size, ErrMismatch))
		}
		b.off += int64(n)
		if b.came += int64(n); b.came >= minProgress {
			b.drops, b.slow = 0, 0
			b.came, b.waited = 0, 0
		}
		switch {
		case err == nil && b.waited < b.c.stall:
			return n, nil
		case err == nil && b.off < b.desc.Size:
			err = fmt.Errorf("less than %d bytes came in %s", minProgress, b.c.stall)
			if b.slow++; b.slow >= maxSlow {
				err = refused("%v, the registry is too slow", err)
			}
		case err == nil:
			return n, nil
		case err == io.EOF && b.off == b.desc.Size:
			return n, io.EOF
		}
		// Cut short: a clean end too early (a chunked answer has no length to miss) is a drop like any other.
		b.Close()
		b.came, b.waited = 0, 0
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if !b.again(err) && !b.next(err) {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("ended after %d of %d bytes: %w", b.off, b.desc.Size, ErrMismatch)
			}
			return n, b.wrap(err)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// again reports whether a failed connection should be followed by another, after a pause.
func (b *blob) again(err error) bool {
	if b.ctx.Err() != nil || isAnswer(err) {
		return false
	}
	b.drops++
	return b.drops < attempts && b.c.wait(b.ctx, b.drops-1, "") == nil
}

// Close ends the connection.
func (b *blob) Close() error {
	if b.body == nil {
		return nil
	}
	b.timer.Stop()
	b.cancel()
	err := b.body.Close()
	b.body = nil
	return err
}
