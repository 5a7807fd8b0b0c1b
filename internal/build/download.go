package build

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// download is one URL of an ADD. Its key is its content.
type download struct {
	url, checksum string
	dir           interface{ Path(...string) string }
	file          *os.File
	name          string
	size          int64
	modified      time.Time
}

// fetch loads the URL into an unnamed file and returns the sha256 of its content and what else shows in the layer.
func (d *download) fetch(ctx context.Context) (_ string, err error) {
	u, err := url.Parse(d.url)
	if err != nil {
		return "", fmt.Errorf("ADD %s: %w", d.url, err)
	}
	d.name = path.Base("/" + u.Path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.url, nil)
	if err != nil {
		return "", fmt.Errorf("ADD %s: %w", d.url, err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", fmt.Errorf("ADD: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("ADD %s: the server says %s", d.url, res.Status)
	}
	fd, err := unix.Open(d.dir.Path("staging"), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return "", fmt.Errorf("ADD %s: %w", d.url, err)
	}
	d.file = os.NewFile(uintptr(fd), filepath.Base(d.url))
	digest, n, err := hashTo(d.file, res.Body)
	if err != nil {
		return "", fmt.Errorf("ADD %s: %w", d.url, err)
	}
	if d.checksum != "" && d.checksum != string(digest) {
		return "", fmt.Errorf("ADD %s: digest mismatch: %s instead of %s", d.url, digest, d.checksum)
	}
	d.size, d.modified = n, time.Unix(0, 0)
	if t, err := http.ParseTime(res.Header.Get("Last-Modified")); err == nil {
		d.modified = t
	}
	return d.name + " " + string(digest), nil
}

func (d *download) copyTo(c *copier, several bool) error {
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if c.op.UnpackURLs {
		if done, err := c.unpackFile(d.file, d.modified, d.url); done || err != nil {
			return err
		}
		if _, err := d.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	if strings.HasSuffix(c.op.Dest, "/") && d.name == "/" {
		return fmt.Errorf("ADD %s: the URL names no file, so the destination must", d.url)
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Mode: 0o600, Size: d.size, ModTime: d.modified}
	return c.file(h, d.name, d.file, several)
}

func (d *download) close() error {
	if d.file == nil {
		return nil
	}
	return d.file.Close()
}
