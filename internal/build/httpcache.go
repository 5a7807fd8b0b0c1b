package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// httpRecord is buildcache/http/<hash of the URL>.json: what the server said last. The body lies beside it, <sha256>.body.
type httpRecord struct {
	// URL is the address without password and query, which may hold a signature.
	URL string `json:"url"`
	// ETag and Modified are the server's, to ask it whether they still hold.
	ETag     string         `json:"etag,omitempty"`
	Modified string         `json:"modified,omitempty"`
	Digest   ocispec.Digest `json:"digest"`
}

// when is the file's time: the server's, else the epoch.
func (r httpRecord) when() time.Time {
	if t, err := http.ParseTime(r.Modified); err == nil {
		return t
	}
	return time.Unix(0, 0)
}

// fetcher gets files over http through buildcache/http. An unchanged one is not transferred again.
type fetcher struct {
	root    *disk.Root
	secrets map[string]Secret
	client  *http.Client
	// wrote is called when something came.
	wrote func()
}

// Time bounds: until a server answers, and between two pieces of a body.
const (
	answerTime = 2 * time.Minute
	idleTime   = 2 * time.Minute
)

func (b *Builder) fetcher(req *Request) *fetcher {
	f := &fetcher{root: b.Root, secrets: req.Secrets, wrote: func() { b.fetched.Store(true) }}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = answerTime
	t.MaxResponseHeaderBytes = 1 << 20
	t.DisableKeepAlives = true // nobody would close what is left
	f.client = &http.Client{Transport: t}
	return f
}

// parseURL takes an address of http or https.
func parseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the address, which may hold a password
		}
		return nil, fmt.Errorf("URL: %w", err)
	}
	if u.Host == "" {
		return nil, fmt.Errorf("URL %s: it names no host", u.Redacted())
	}
	return u, nil
}

// shownURL is for messages and lists: no password, no query.
func shownURL(u *url.URL) string {
	c := *u
	c.RawQuery, c.Fragment, c.RawFragment = "", "", ""
	return c.Redacted()
}

func (f *fetcher) recordPath(u *url.URL) string {
	sum := sha256.Sum256([]byte(u.String()))
	return f.root.Path("buildcache", httpFolder, hex.EncodeToString(sum[:16])+".json")
}

func (f *fetcher) bodyPath(d ocispec.Digest) string {
	return f.root.Path("buildcache", httpFolder, d.Encoded()+".body")
}

// record reads what is known of an address and kept; a zero Digest says: nothing.
func (f *fetcher) record(u *url.URL) httpRecord {
	var rec httpRecord
	p := f.recordPath(u)
	if err := disk.ReadJSON(p, &rec); err != nil || ocispec.Validate(rec.Digest) != nil {
		return httpRecord{}
	}
	now := time.Now()
	if os.Chtimes(f.bodyPath(rec.Digest), now, now) != nil {
		return httpRecord{} // the body was pruned
	}
	_ = os.Chtimes(p, now, now)
	return rec
}

// get asks the server for a file unless it has the one that is kept. progress may be nil.
func (f *fetcher) get(ctx context.Context, u *url.URL, progress func(current, total int64)) (httpRecord, error) {
	known := f.record(u)
	rec, err := f.request(ctx, u, known, progress)
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return rec, err
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return rec, fmt.Errorf("%s: %w", shownURL(u), err)
}

func (f *fetcher) request(ctx context.Context, u *url.URL, known httpRecord, progress func(current, total int64)) (rec httpRecord, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return rec, err
	}
	req.Header.Set("User-Agent", "conex")
	if known.Digest != "" {
		if known.ETag != "" {
			req.Header.Set("If-None-Match", known.ETag)
		}
		if known.Modified != "" {
			req.Header.Set("If-Modified-Since", known.Modified)
		}
	}
	if err := f.authorize(req); err != nil {
		return rec, err
	}
	res, err := f.client.Do(req)
	if err != nil {
		return rec, err
	}
	defer res.Body.Close()
	etag := res.Header.Get("ETag")
	switch {
	case known.Digest != "" && res.StatusCode == http.StatusNotModified:
		return known, nil
	case res.StatusCode != http.StatusOK:
		return rec, fmt.Errorf("the server says %s", strings.TrimSpace(strconv.Itoa(res.StatusCode)+" "+http.StatusText(res.StatusCode)))
	case known.Digest != "" && etag != "" && strings.TrimPrefix(etag, "W/") == strings.TrimPrefix(known.ETag, "W/"):
		return known, nil // some servers send a body that they have been told is known
	}
	f.wrote()
	idle := time.AfterFunc(idleTime, func() { cancel(fmt.Errorf("no more came for %s", idleTime)) })
	defer idle.Stop()
	body := &watched{r: res.Body, total: res.ContentLength, root: f.root.Path(), progress: progress, seen: func() { idle.Reset(idleTime) }}
	if rec.Digest, err = f.save(body); err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		return rec, err
	}
	rec.URL, rec.ETag, rec.Modified = shownURL(u), etag, res.Header.Get("Last-Modified")
	if err := disk.WriteJSON(f.recordPath(u), rec, disk.Volatile); err != nil {
		return rec, fmt.Errorf("build cache: %w", err)
	}
	return rec, nil
}

// authorize adds what the secrets HTTP_AUTH_HEADER_<host> and HTTP_AUTH_TOKEN_<host> hold, as BuildKit has it.
func (f *fetcher) authorize(req *http.Request) error {
	host := req.URL.Hostname()
	for _, s := range [][2]string{{"HTTP_AUTH_HEADER_" + host, ""}, {"HTTP_AUTH_TOKEN_" + host, "Bearer "}} {
		secret, ok := f.secrets[s[0]]
		if !ok {
			continue
		}
		v, err := secretText(s[0], secret)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", s[1]+v)
		return nil
	}
	return nil
}

// secretText reads a secret that is a line of text.
func secretText(id string, s Secret) (string, error) {
	if s.Env != "" {
		return strings.TrimSpace(os.Getenv(s.Env)), nil
	}
	file, err := os.Open(s.File)
	if err != nil {
		return "", fmt.Errorf("secret %s: %w", id, err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, 64<<10))
	if err != nil {
		return "", fmt.Errorf("secret %s: %w", id, err)
	}
	return strings.TrimSpace(string(data)), nil
}

// save keeps a body by its digest.
func (f *fetcher) save(r io.Reader) (ocispec.Digest, error) {
	dir := f.root.Path("buildcache", httpFolder)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("build cache: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return "", fmt.Errorf("build cache: %w", &fs.PathError{Op: "open", Path: dir, Err: err})
	}
	file := os.NewFile(uintptr(fd), filepath.Join(dir, "body"))
	defer file.Close()
	digest, _, err := hashTo(file, r)
	if err != nil {
		return "", err
	}
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, f.bodyPath(digest), unix.AT_SYMLINK_FOLLOW)
	if err != nil && err != unix.EEXIST {
		return "", fmt.Errorf("build cache: %w", err)
	}
	return digest, nil
}

// errNotKept says that a body is not in the cache, or not whole.
var errNotKept = errors.New("not kept")

// open opens a kept body, verified: a power loss may have cut it short.
func (f *fetcher) open(d ocispec.Digest) (*os.File, int64, error) {
	file, err := os.Open(f.bodyPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, errNotKept
	}
	if err != nil {
		return nil, 0, fmt.Errorf("build cache: %w", err)
	}
	h := sha256.New()
	n, err := copyBuffered(h, file)
	if err == nil && hex.EncodeToString(h.Sum(nil)) != d.Encoded() {
		_ = os.Remove(f.bodyPath(d))
		err = errNotKept
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, n, nil
}

// body gives the bytes of an address: those of want, "" for whatever the server has.
func (f *fetcher) body(ctx context.Context, u *url.URL, want ocispec.Digest, progress func(current, total int64)) (httpRecord, *os.File, int64, error) {
	for try := 0; ; try++ {
		rec := f.record(u)
		if want == "" || rec.Digest != want {
			var err error
			if rec, err = f.get(ctx, u, progress); err != nil {
				return rec, nil, 0, err
			}
		}
		if want != "" && rec.Digest != want {
			return rec, nil, 0, fmt.Errorf("%s: digest mismatch: %s instead of %s", shownURL(u), rec.Digest, want)
		}
		file, size, err := f.open(rec.Digest)
		if errors.Is(err, errNotKept) && try < 3 {
			continue // pruned meanwhile
		}
		return rec, file, size, err
	}
}

// watched counts a body, notices when it is more than the disk has room for, and when it is shorter than was announced.
type watched struct {
	r        io.Reader
	total    int64 // -1: not announced
	root     string
	progress func(current, total int64)
	seen     func()
	got      int64
	checked  int64
	shown    time.Time
}

// looks is after how many bytes the free space is looked at again.
const looks = 64 << 20

// reserve is what a download must leave free, of a file system of so many bytes.
func reserve(total int64) int64 { return min(total/50, 1<<30) }

func (w *watched) Read(p []byte) (int, error) {
	if w.got >= w.checked {
		free, size, err := disk.Free(w.root)
		if err != nil {
			return 0, err
		}
		if need := max(w.total-w.got, 0) + reserve(size); free < need {
			if w.total >= 0 {
				return 0, fmt.Errorf("it has %d bytes, more than there is room for: %w", w.total, unix.ENOSPC)
			}
			return 0, fmt.Errorf("after %d bytes there is no room for more: %w", w.got, unix.ENOSPC)
		}
		w.checked = w.got + looks
	}
	n, err := w.r.Read(p)
	w.got += int64(n)
	if n > 0 && w.seen != nil {
		w.seen()
	}
	if now := time.Now(); w.progress != nil && now.Sub(w.shown) > 200*time.Millisecond {
		w.shown = now
		w.progress(w.got, max(w.total, 0))
	}
	return n, err
}

// urlName is what ADD calls the file of an address.
func urlName(u *url.URL) string {
	if name := path.Base(u.Path); name != "." && name != "/" {
		return name
	}
	return "__unnamed__"
}
