package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// File is one file of the store as it lies on the disk, for who accounts for each or judges it.
type File struct {
	Path string
	// Tag and Record say what it is: the file of a tag, the record of an image. A file that is neither is the lock, or Stray.
	Tag, Record, Stray bool
	// Reference is a tag's, in full.
	Reference string
	// IDs are the images that it speaks of, Blobs the manifests and indexes.
	IDs, Blobs []ocispec.Digest
	// RepoDigests are an image's, in full: where it can be fetched again.
	RepoDigests []string
	// Err says why it can't be read, or that it speaks of something that its name does not.
	Err error
}

// Files lists all files of the store, unreadable ones too.
func (s *Store) Files() ([]File, error) {
	var files []File
	for _, dir := range []string{s.root.Path("images"), s.root.Path("images", "by-id")} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) && len(files) > 0 {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list images: %w", err)
		}
		for _, e := range entries {
			f := File{Path: filepath.Join(dir, e.Name())}
			byID := filepath.Base(dir) == "by-id"
			switch {
			case !byID && (e.Name() == "lock" || e.Name() == "by-id"):
				if e.IsDir() {
					continue
				}
			case !e.Type().IsRegular() || disk.IsTemp(e.Name()) || !strings.HasSuffix(e.Name(), ".json"):
				f.Stray = true
			case byID:
				f.Record = true
				f.read(strings.TrimSuffix(e.Name(), ".json"))
			default:
				f.Tag = true
				f.read(e.Name())
			}
			if !errors.Is(f.Err, fs.ErrNotExist) {
				files = append(files, f)
			}
		}
	}
	return files, nil
}

// read decodes a tag's file or an image's record; name is what it must be called.
func (f *File) read(name string) {
	var rec struct {
		Reference       string
		ID              ocispec.Digest
		Index, Manifest ocispec.Digest
		Others          []ocispec.Digest
		RepoDigests     []string
	}
	if f.Err = disk.ReadJSON(f.Path, &rec); f.Err != nil {
		return
	}
	f.Reference, f.RepoDigests = rec.Reference, rec.RepoDigests
	f.IDs = append([]ocispec.Digest{rec.ID}, rec.Others...)
	for _, d := range []ocispec.Digest{rec.Index, rec.Manifest} {
		if d != "" {
			f.Blobs = append(f.Blobs, d)
		}
	}
	for _, d := range append(f.IDs, f.Blobs...) {
		if err := ocispec.Validate(d); err != nil {
			f.Err = fmt.Errorf("%q: %w", d, err)
			return
		}
	}
	if f.Record {
		if rec.ID.Encoded() != name {
			f.Err = fmt.Errorf("it speaks of %s", rec.ID)
		}
		return
	}
	ref, err := ParseReference(rec.Reference)
	switch {
	case err != nil:
		f.Err = fmt.Errorf("reference %q: %w", rec.Reference, err)
	case fileName(ref) != name:
		f.Err = fmt.Errorf("it speaks of %s", ref)
	}
}
