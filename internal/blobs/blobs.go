// Package blobs owns blobs/sha256/: bytes stored under their own sha256, verified when written and when read.
//
// Manifests and image configs live here. Layers do not: they are kept uncompressed by the package layers.
package blobs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

var (
	// ErrNotFound says that the store has no such blob.
	ErrNotFound = errors.New("blob not found")
	// ErrMismatch says that bytes are not what their digest or announced size promises.
	ErrMismatch = errors.New("content does not match")
	// ErrTooLarge says that content exceeds the limit of the call.
	ErrTooLarge = errors.New("content too large")
)

// MaxUnsized bounds a blob of unknown size, in bytes: more is refused rather than written until the disk is full.
const MaxUnsized = 16 << 30

// verifyExisting is the size in bytes up to which Put re-reads a blob that is there already, so that a damaged manifest or
// config is healed by fetching or building it again.
const verifyExisting = 4 << 20

// Store is the blob store of one root. It has no state of its own; any number of processes may use one at a time.
type Store struct{ root *disk.Root }

// Open returns the store in root.
func Open(root *disk.Root) *Store { return &Store{root} }

// path returns where d lies. Digests reach us from registries and command lines, so everything but a well-formed sha256 is
// refused here: no digest can name a file outside the folder.
func (s *Store) path(d ocispec.Digest) (string, error) {
	hexa, ok := hexOf(d)
	if !ok {
		return "", fmt.Errorf("digest %q is not a sha256: %w", string(d), ErrNotFound)
	}
	return s.root.Path("blobs", "sha256", hexa), nil
}

func hexOf(d ocispec.Digest) (string, bool) {
	const prefix = "sha256:"
	if len(d) != len(prefix)+64 || d[:len(prefix)] != prefix {
		return "", false
	}
	h := string(d[len(prefix):])
	return h, isHex64(h)
}

func isHex64(h string) bool {
	if len(h) != 64 {
		return false
	}
	for i := range len(h) {
		if c := h[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// Put stores what r delivers. want "" accepts any content; size is the announced length in bytes, -1 if unknown (then at most
// MaxUnsized). Content that differs from want or size is ErrMismatch, more than size bytes are never written. A nil error
// promises a whole, verified blob that survives a power loss; after an error nothing is left. Storing what is there already is
// success.
func (s *Store) Put(ctx context.Context, r io.Reader, want ocispec.Digest, size int64) (ocispec.Digest, int64, error) {
	if want != "" {
		if _, err := s.path(want); err != nil {
			return "", 0, err
		}
	}
	st, err := s.root.Stage()
	if err != nil {
		return "", 0, err
	}
	d, n, err := s.put(ctx, st, r, want, size)
	if cerr := st.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("store blob: %w", cerr)
	}
	if err != nil {
		return "", 0, err
	}
	return d, n, nil
}

func (s *Store) put(ctx context.Context, st *disk.Stage, r io.Reader, want ocispec.Digest, size int64) (ocispec.Digest, int64, error) {
	limit := size
	if size < 0 {
		limit = MaxUnsized
	}
	tmp := filepath.Join(st.Dir, "blob")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", 0, fmt.Errorf("store blob: %w", err)
	}
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(ctxReader{ctx, r}, limit))
	if err == nil {
		err = overrun(r, size, limit, n)
	}
	d := ocispec.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
	if err == nil && want != "" && d != want {
		err = fmt.Errorf("got %s, want %s: %w", d, want, ErrMismatch)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", 0, fmt.Errorf("store blob: %w", err)
	}
	dst, err := s.path(d)
	if err != nil {
		return "", 0, err
	}
	won, err := disk.Publish(tmp, dst)
	if err != nil {
		return "", 0, err
	}
	if !won && !s.Intact(d, n) {
		// What lies there was damaged since it was written; ours is verified and replaces it in one step.
		if err := os.Rename(tmp, dst); err != nil {
			return "", 0, fmt.Errorf("store blob %s: %w", d, err)
		}
		won = true
	}
	if won {
		if err := disk.SyncDir(filepath.Dir(dst)); err != nil {
			return "", 0, fmt.Errorf("store blob %s: %w", d, err)
		}
	}
	return d, n, nil
}

// overrun judges the length n that was read against the announced size: too few bytes, or one more than limit.
func overrun(r io.Reader, size, limit, n int64) error {
	if size >= 0 && n < size {
		return fmt.Errorf("got %d bytes of %d: %w", n, size, ErrMismatch)
	}
	if n < limit {
		return nil
	}
	var one [1]byte
	switch k, err := io.ReadFull(r, one[:]); {
	case k > 0 && size >= 0:
		return fmt.Errorf("more than the announced %d bytes: %w", size, ErrMismatch)
	case k > 0:
		return fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
	case err != io.EOF:
		return err
	}
	return nil
}

// Intact reports whether the blob d is there and n bytes long. Of a small one the bytes are compared with its name too; a large one's are
// when it is read.
func (s *Store) Intact(d ocispec.Digest, n int64) bool {
	rc, size, err := s.Open(d)
	if err != nil {
		return false
	}
	defer rc.Close()
	if size != n {
		return false
	}
	if n > verifyExisting {
		return true
	}
	_, err = io.Copy(io.Discard, rc)
	return err == nil
}

// PutBytes stores b and returns its digest. The promises are Put's.
func (s *Store) PutBytes(b []byte) (ocispec.Digest, error) {
	d := ocispec.FromBytes(b)
	if s.Intact(d, int64(len(b))) {
		return d, nil
	}
	d, _, err := s.Put(context.Background(), bytes.NewReader(b), d, int64(len(b)))
	return d, err
}

// Open returns a reader over the blob and its size in bytes. The reader hashes on the way: where others report io.EOF it reports
// ErrMismatch if the bytes were not d's, so a caller that reads to the end never uses damaged content unknowingly.
func (s *Store) Open(d ocispec.Digest) (io.ReadCloser, int64, error) {
	p, err := s.path(d)
	if err != nil {
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	f, err := os.Open(p)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrNotFound
		}
		return nil, 0, fmt.Errorf("open blob %s: %w", d, err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open blob %s: %w", d, err)
	}
	v, err := Verify(f, d)
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	return v, fi.Size(), nil
}

// ReadAll returns the whole verified blob; more than max bytes are ErrTooLarge.
func (s *Store) ReadAll(d ocispec.Digest, max int64) ([]byte, error) {
	rc, size, err := s.Open(d)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	if size > max {
		return nil, fmt.Errorf("read blob %s: %d bytes, at most %d allowed: %w", d, size, max, ErrTooLarge)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(rc, b); err != nil {
		return nil, fmt.Errorf("read blob %s: %w", d, err)
	}
	var one [1]byte
	if k, err := rc.Read(one[:]); k > 0 || err != io.EOF {
		if err == nil || k > 0 {
			err = ErrMismatch // grew after Stat: nobody writes to a blob
		}
		return nil, fmt.Errorf("read blob %s: %w", d, err)
	}
	return b, nil
}

// Has reports whether the blob is there. It does not read it.
func (s *Store) Has(d ocispec.Digest) bool {
	p, err := s.path(d)
	if err != nil {
		return false
	}
	_, err = os.Lstat(p)
	return err == nil
}

// Size returns a blob's length in bytes.
func (s *Store) Size(d ocispec.Digest) (int64, error) {
	p, err := s.path(d)
	if err != nil {
		return 0, err
	}
	fi, err := os.Lstat(p)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = ErrNotFound
		}
		return 0, fmt.Errorf("blob %s: %w", d, err)
	}
	return fi.Size(), nil
}

// Remove deletes the blob. It is no error when there is none. The space is given back by disk.Root.Sweep.
func (s *Store) Remove(d ocispec.Digest) error {
	p, err := s.path(d)
	if err != nil {
		return fmt.Errorf("remove blob: %w", err)
	}
	_, err = s.root.TrashLater(p)
	return err
}

// List returns the digests of all blobs, in no order that means anything.
func (s *Store) List() ([]ocispec.Digest, error) {
	entries, err := os.ReadDir(s.root.Path("blobs", "sha256"))
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	ds := make([]ocispec.Digest, 0, len(entries))
	for _, e := range entries {
		if isHex64(e.Name()) {
			ds = append(ds, ocispec.Digest("sha256:"+e.Name()))
		}
	}
	return ds, nil
}

// Verify wraps rc so that reading it to the end yields ErrMismatch instead of io.EOF if the bytes were not those of d, a sha256.
func Verify(rc io.ReadCloser, d ocispec.Digest) (io.ReadCloser, error) {
	want, ok := hexOf(d)
	if !ok {
		return nil, fmt.Errorf("digest %q is not a sha256: %w", string(d), ErrMismatch)
	}
	return &verifier{rc: rc, h: sha256.New(), want: want}, nil
}

type verifier struct {
	rc   io.ReadCloser
	h    hash.Hash
	want string
	err  error // sticky: the verdict at the end
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	n, err := v.rc.Read(p)
	v.h.Write(p[:n])
	if err == io.EOF {
		if got := hex.EncodeToString(v.h.Sum(nil)); got != v.want {
			err = fmt.Errorf("got sha256:%s, want sha256:%s: %w", got, v.want, ErrMismatch)
		}
	}
	v.err = err
	return n, err
}

func (v *verifier) Close() error { return v.rc.Close() }

// ctxReader stops a copy when ctx ends, between two reads.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// Check reads the whole blob: ErrMismatch if it is damaged, ErrNotFound if it is not there.
func (s *Store) Check(ctx context.Context, d ocispec.Digest) error {
	rc, _, err := s.Open(d)
	if err != nil {
		return err
	}
	defer rc.Close()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, ctxReader{ctx, rc}, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("check blob %s: %w", d, err)
	}
	return nil
}
