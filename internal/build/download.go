package build

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"

	"conex/internal/ocispec"
)

// download is one URL of an ADD. Its key is its content.
type download struct {
	fetcher *fetcher
	url     *url.URL
	name    string
	// digest is what the content must have: --checksum's, else what the server had when the key was made.
	digest ocispec.Digest
}

// newDownload reads the address; checksum is --checksum's value or "".
func newDownload(f *fetcher, address, checksum string) (*download, error) {
	u, err := parseURL(address)
	if err != nil {
		return nil, err
	}
	name := urlName(u)
	if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) || name == ".." {
		return nil, fmt.Errorf("URL %s: it names no file: %q", shownURL(u), name)
	}
	d := &download{fetcher: f, url: u, name: name, digest: ocispec.Digest(checksum)}
	if checksum != "" {
		if err := ocispec.Validate(d.digest); err != nil {
			return nil, fmt.Errorf("--checksum=%s: %w", checksum, err)
		}
		if d.digest.Algorithm() != "sha256" {
			return nil, fmt.Errorf("--checksum=%s: only sha256 is taken", checksum)
		}
	}
	return d, nil
}

// key is the content's, with what else shows in the layer. With a checksum the server need not even be asked.
func (d *download) key(ctx context.Context) (string, error) {
	if d.digest == "" {
		rec, err := d.fetcher.get(ctx, d.url, nil)
		if err != nil {
			return "", fmt.Errorf("ADD %w", err)
		}
		d.digest = rec.Digest
	}
	return d.name + " " + string(d.digest), nil
}

// copyTo adds the file to the layer, or what is in it.
func (d *download) copyTo(ctx context.Context, c *copier, several bool) error {
	rec, file, size, err := d.fetcher.body(ctx, d.url, d.digest, c.vertex.progress)
	if err != nil {
		return fmt.Errorf("ADD %w", err)
	}
	defer file.Close()
	if c.op.UnpackURLs {
		if done, err := c.unpackFile(file, rec.when(), shownURL(d.url)); done || err != nil {
			return err
		}
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o600, Size: size, ModTime: rec.when()}
	return c.file(h, d.name, file, several)
}
